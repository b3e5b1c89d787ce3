"What is loaded with a module: nobody pays for what they do not use."

import subprocess
import sys

import pytest

HEAVY = ['torch', 'torchvision', 'openslide', 'pyvips', 'sklearn', 'matplotlib']
PATHOLOGY = [f'streaming_pathology.{f}' for f in ('slides', 'training', 'mil', 'evaluation', 'cli')]
ENGINE = [
    'streaming_pathology.engine.stream',
    'streaming_pathology.engine.bands',
    'streaming_pathology.engine.exactness',
]
SLIDES = [
    'streaming_pathology.slides.tissue',
    'streaming_pathology.slides.trim',
    'streaming_pathology.slides.check',
]
# what a process that reads slides has to import, and what a training does
TRAINING = [
    'streaming_pathology.slides.datasets',
    'streaming_pathology.training.callbacks',
    'streaming_pathology.training.recipes',
    'streaming_pathology.mil.mil',
    'streaming_pathology.evaluation.heatmaps',
    'streaming_pathology.runs.runs',
]
BENCH = [
    'streaming_pathology.bench.comparison',
    'streaming_pathology.bench.networks',
    'streaming_pathology.bench.pipeline',
    'streaming_pathology.bench.strips',
    'streaming_pathology.bench.trial',
    'streaming_pathology.bench.whole_slides',
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
        (['streaming_pathology.evaluation.results'], ['torch', 'matplotlib', 'sklearn']),
        (SLIDES, ['torch', 'matplotlib', 'sklearn']),
        (TRAINING, ['matplotlib', 'sklearn']),
        (ENGINE, [*PATHOLOGY, 'openslide', 'pyvips', 'sklearn', 'matplotlib']),
        (
            ['streaming_pathology.runs.runs'],
            ['streaming_pathology.slides.check', 'streaming_pathology.slides.trim'],
        ),
        (BENCH, ['IPython']),  # which is there in a notebook, and need not be elsewhere
    ],
    ids=['package', 'core', 'auc', 'results', 'slides', 'training', 'engine', 'runs', 'bench'],
)
def test_what_an_import_loads(modules, spared):
    found = loaded(*modules)
    assert not found & set(spared)
    assert found >= set(modules)
