"Scores of a map against the truth, and networks whose weights are drawn again."

import copy

import numpy as np
import pytest
import torch
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.evaluation.sanity import (
    pixel_auprc,
    pointing_game,
    pool_truth,
    randomized,
    rank_correlation,
)
from streaming_pathology.mil.aggregators import make_aggregator
from streaming_pathology.mil.features import Encoder, FeatureMIL
from streaming_pathology.training.models import StreamingClassifier


@pytest.fixture
def heat():
    heat = np.zeros((4, 5))
    heat[2, 2] = heat[0, 0] = 3
    return heat


@pytest.fixture
def truth():
    truth = np.zeros((4, 5), bool)
    truth[:2, :2] = True
    return truth


def changed(model, other):
    "The tensors in which two models differ."
    others = other.state_dict()
    return [name for name, tensor in model.state_dict().items() if not tensor.equal(others[name])]


# ---- scores


@pytest.mark.parametrize(
    'change, arguments, message',
    [
        (lambda mask: mask, (2, 0), 'share=0'),
        (lambda mask: mask * 3, (2,), 'mask == 3'),
        (lambda mask: mask[0], (2,), 'give a mask'),
        (lambda mask: mask, (0.5,), 'factor=0.5'),
        (lambda mask: mask + np.nan, (2,), '0 and 1'),
    ],
)
def test_masks_and_settings_are_checked(change, arguments, message):
    with pytest.raises(InputError, match=message):
        pool_truth(change(np.eye(5, 6, dtype=int)), *arguments)


def test_pointing_at_the_truth_or_away_from_it(truth):
    assert pointing_game(truth, truth) == 1
    assert pointing_game(-1.0 * truth, truth) == 0


def test_a_map_that_says_nothing_gets_the_share_that_is_marked():
    assert pixel_auprc(np.zeros((2, 2)), [[0, 0], [0, 1]]) == (0.25, 0.25)


@pytest.mark.parametrize('score', [pointing_game, pixel_auprc])
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda heat, truth: (heat, truth.T), 'same places'),
        (lambda heat, truth: (heat * np.nan, truth), 'not finite'),
        (lambda heat, truth: (heat, truth & False), 'marks nothing'),
        (lambda heat, truth: (heat, truth | True), 'every place'),
        (lambda heat, truth: (heat, truth * 7), 'other numbers'),
        (lambda heat, truth: (heat.astype(str), truth), 'not finite numbers'),
    ],
)
def test_map_and_truth_are_checked(score, change, message, heat, truth):
    with pytest.raises(InputError, match=message):
        score(*change(heat, truth))


@pytest.mark.parametrize('slack', [-1, np.nan])
def test_slack_is_a_distance(heat, truth, slack):
    with pytest.raises(InputError, match='slack'):
        pointing_game(heat, truth, slack)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda a: a.T, 'same places'),
        (lambda a: a * 0, 'same everywhere'),
        (lambda a: a * np.nan, 'not finite'),
    ],
)
def test_maps_without_an_order_are_not_compared(change, message):
    a = np.arange(6.0).reshape(2, 3)
    with pytest.raises(InputError, match=message):
        rank_correlation(a, change(a))


# ---- randomized weights


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)).eval()


@pytest.fixture(scope='module')
def classifier():
    torch.manual_seed(0)
    return StreamingClassifier('resnet18', strip=32).eval()


def feature_mil(classifier, **options):
    return FeatureMIL(Encoder(classifier), make_aggregator('abmil', 512), **options).eval()


def test_the_model_stays_and_the_weights_follow_the_seed(net):
    before = copy.deepcopy(net)
    drawn = randomized(net)
    assert changed(net, before) == []
    assert changed(drawn, randomized(net)) == []
    assert changed(drawn, randomized(net, seed=1))
    assert randomized(net, layers=1)[3].weight.equal(drawn[3].weight)


def test_there_have_to_be_weights_and_layers(net):
    with pytest.raises(InputError, match='no weights'):
        randomized(nn.ReLU())
    with pytest.raises(InputError, match='layers is 0'):
        randomized(net, layers=0)


def test_streaming_classifier_changes_but_for_its_statistics(classifier):
    drawn = randomized(classifier)
    names = changed(classifier, drawn)
    assert 'trunk.layer4.1.conv2.weight' in names
    assert 'head.fc.weight' in names
    assert not [name for name in names if 'running' in name]
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 40, 60), generator=generator, dtype=torch.uint8)
    assert abs(classifier(image) - drawn(image)) > 0
    assert changed(classifier, randomized(classifier, layers=1)) == ['head.fc.weight']


def test_feature_mil_changes_from_the_aggregator_downwards(classifier):
    model = feature_mil(classifier)
    drawn = randomized(model)
    assert changed(model.encoder, drawn.encoder)
    assert changed(model, drawn)
    last = randomized(model, layers=1)
    assert changed(model.encoder, last.encoder) == []
    assert changed(model, last) == ['aggregator.classifier.weight']


def test_feature_mil_without_an_encoder(classifier):
    aggregator = feature_mil(classifier).aggregator
    assert randomized(FeatureMIL(None, aggregator)).encoder is None


def test_feature_mil_whose_state_dict_has_the_encoder(classifier):
    model = feature_mil(classifier, whole=True)
    drawn = randomized(model)
    assert changed(model.encoder, drawn.encoder)
    assert any('attention' in name for name in changed(model, drawn))
    assert drawn.state_dict().keys() == model.state_dict().keys()
