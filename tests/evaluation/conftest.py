"Made-up runs, which several modules of tests read."

import shutil

import pytest

from streaming_pathology.evaluation.report_inputs import toy_run


@pytest.fixture(scope='session')
def toy(once):
    "A made-up run of 24 labelled slides, which nobody may change."
    return once('toy', toy_run)


@pytest.fixture(scope='session')
def small(once):
    "A made-up run of four labelled slides, which nobody may change."
    return once('small_toy', lambda folder: toy_run(folder, n=4))


@pytest.fixture
def part(small, tmp_path):
    "A copy of the small run, to take something away from."
    return shutil.copytree(small, tmp_path / 'part')
