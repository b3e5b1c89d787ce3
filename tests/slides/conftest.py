"A small cohort, which several modules of tests read."

import pytest

from streaming_pathology.slides.cohorts import read_manifest, tiny_cohort


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with a small cohort."
    return tiny_cohort(tmp_path_factory.mktemp('tiny') / 'cohort').parent


@pytest.fixture(scope='module')
def cases(folder):
    return read_manifest(folder / 'manifest.csv')
