"What is loaded with a module: nobody pays for what they do not use."

import subprocess
import sys

import pytest

HEAVY = ['torch', 'torchvision', 'openslide', 'pyvips', 'sklearn', 'matplotlib.pyplot']
PATHOLOGY = [f'streaming_pathology.{f}' for f in ('slides', 'training', 'mil', 'evaluation', 'cli')]
ENGINE = [
    'streaming_pathology.engine.stream',
    'streaming_pathology.engine.bands',
    'streaming_pathology.engine.exactness',
]


def loaded(*modules):
    "All that is in `sys.modules` after these imports."
    code = ';'.join(f'import {module}' for module in modules)
    code += ';import sys;print("\\n".join(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    'modules, spared',
    [
        (['streaming_pathology'], [*HEAVY, 'numpy']),
        (['streaming_pathology.core', 'streaming_pathology.io'], [*HEAVY, 'numpy']),
        (['streaming_pathology.evaluation.auc'], ['torch', 'openslide', 'pyvips']),
        (['streaming_pathology.slides.slides'], ['torch', 'matplotlib.pyplot']),
        (['streaming_pathology.slides.tissue'], ['torch']),
        (ENGINE, [*PATHOLOGY, 'openslide', 'pyvips', 'sklearn', 'matplotlib.pyplot']),
        (
            ['streaming_pathology.runs.runs'],
            ['streaming_pathology.slides.check', 'streaming_pathology.slides.trim'],
        ),
    ],
    ids=['package', 'core', 'auc', 'slides', 'tissue', 'engine', 'training'],
)
def test_what_an_import_loads(modules, spared):
    found = loaded(*modules)
    assert not found & set(spared)
    assert found >= set(modules)
