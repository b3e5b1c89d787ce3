"What a features dataset or network lacks is said in one sentence."

import pytest
import torch

from streaming_pathology.core import InputError
from streaming_pathology.mil.aggregators import make_aggregator
from streaming_pathology.mil.bags import PatchGrid
from streaming_pathology.mil.features import FeatureDataset, FeatureMIL
from streaming_pathology.slides.cohorts import read_manifest, tiny_cohort


def test_no_folder_for_features(tmp_path):
    cases = read_manifest(tiny_cohort(tmp_path / 'cohort'))
    data = FeatureDataset(cases, spacing=4.0, grid=PatchGrid(32))
    with pytest.raises(InputError, match='no folder in which features could be cached'):
        data[0]


def test_no_backbone_to_calibrate():
    model = FeatureMIL(None, make_aggregator('mean', 4))
    with pytest.raises(InputError, match='no backbone whose statistics'):
        model.update_batchnorm(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
