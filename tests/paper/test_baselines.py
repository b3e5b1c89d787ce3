"Baselines of the comparison: shortcuts, the backbone, frozen features, aggregators on them."

import numpy as np
import pytest
import torch
from refusals import refusal
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from streaming_pathology.paper.baselines import (
    POOLINGS,
    SHORTCUTS,
    FeatureSlides,
    features,
    logistic_scores,
    logits_of_slides,
    make_backbone,
    shortcut_values,
    shortcut_vectors,
    train_aggregator,
    view_of,
)
from streaming_pathology.paper.data import Split
from streaming_pathology.paper.plan import SMALL
from streaming_pathology.slides.cohorts import Case

pytestmark = pytest.mark.usefixtures('small_resnet')


def split_of_noise(n=24, d=3, seed=0):
    "Vectors of slides whose first value tells the label, and their split."
    rng = np.random.default_rng(seed)
    cases = [Case(f's{i:02}', i % 2, 'none') for i in range(n)]
    vectors = {case.slide_id: rng.standard_normal(d) for case in cases}
    for case in cases:
        vectors[case.slide_id][0] += 3 * case.label
    return vectors, Split(cases[: n // 2], cases[n // 2 : 3 * n // 4], cases[3 * n // 4 :])


# ---- shortcuts


def test_values_are_those_of_the_tissue():
    rgb = np.full((10, 10, 3), 255, np.uint8)
    rgb[:5] = 200, 100, 50
    assert shortcut_values(rgb) == dict(red=200, green=100, blue=50, area=0.5)
    assert 'without tissue' in refusal(shortcut_values, rgb[5:])


def test_each_shortcut_sees_its_values():
    values = dict(a=dict(red=1.0, green=2.0, blue=3.0, area=4.0))
    seen = {name: shortcut_vectors(values, name)['a'].tolist() for name in SHORTCUTS}
    assert seen['green'] == [2] and seen['area'] == [4] and seen['colour-area'] == [1, 2, 3, 4]


def test_the_classifier_is_scikit_learns_and_never_sees_test_slides():
    vectors, split = split_of_noise()
    learn = [*split.train, *split.tuning]
    x = np.stack([vectors[case.slide_id] for case in learn])
    y = [case.label for case in learn]
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(class_weight='balanced', max_iter=5000).fit(scaler.transform(x), y)
    tested = np.stack([vectors[case.slide_id] for case in split.test])
    expected = model.decision_function(scaler.transform(tested))
    found = logistic_scores(vectors, split)
    np.testing.assert_allclose([*found.values()], expected, atol=1e-9)
    changed = {**vectors, split.test[0].slide_id: vectors[split.test[0].slide_id] + 100}
    again = logistic_scores(changed, split)
    assert [*again.values()][1:] == [*found.values()][1:]


# ---- the backbone


def test_trunks_are_alike_and_heads_are_of_the_seed():
    first, again, other = make_backbone(seed=1), make_backbone(seed=1), make_backbone(seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if name.startswith('trunk'):
            assert torch.equal(tensor, other.state_dict()[name])
    assert not torch.equal(first.head.fc.weight, other.head.fc.weight)
    assert [*first.stages][-1] == 'layer4'


def test_a_backbone_does_not_touch_the_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_backbone()
    assert torch.equal(torch.rand(3), expected)


# ---- features


def grid_of_means(images):
    "A backbone whose features are the mean colours of squares of 32 pixels."
    return torch.nn.functional.avg_pool2d(images.float(), 32)


def test_features_are_those_over_tissue():
    image = torch.full((3, 96, 128), 255, dtype=torch.uint8)
    image[:, 32:64, 64:128] = 100
    image[:, :16, :32] = 90  # half of the first square
    vectors, positions = features(grid_of_means, image)
    assert positions.tolist() == [[0, 0, 1], [32, 64, 1], [32, 96, 1]]
    assert vectors[1:].tolist() == 2 * [[100.0] * 3]


def test_an_image_with_little_tissue_has_one_position():
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    image[:, 40:52, 8:24] = 50
    vectors, positions = features(grid_of_means, image)
    assert positions.tolist() == [[32, 0, 1]] and len(vectors) == 1
    image[:] = 255
    assert 'without tissue' in refusal(features, grid_of_means, image)


def test_poolings():
    vectors = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    assert POOLINGS['max'](vectors).tolist() == [3, 4]
    assert POOLINGS['mean'](vectors).tolist() == [2, 2]


def test_views_come_in_turn():
    assert [view_of(epoch, 3) for epoch in range(5)] == [1, 2, 3, 1, 2]
    assert view_of(7, 0) == 0


def bags(cases, d=6):
    "Features of slides: of a positive one, a few vectors differ."
    asked = []

    def get(case, view):
        asked.append((case.slide_id, view))
        rng = np.random.default_rng(int(case.slide_id[1:]))
        vectors = torch.from_numpy(rng.standard_normal((9, d))).float()
        vectors[:3, 0] += 4 * case.label
        return vectors, torch.zeros(9, 3, dtype=torch.long)

    return get, asked


@pytest.mark.parametrize('name', ['abmil', 'clam', 'dsmil', 'mean', 'max'])
def test_aggregators_are_trained_on_views_and_tested_on_slides_as_they_are(name, tmp_path):
    _, split = split_of_noise()
    get, asked = bags(split.train)
    plan = SMALL.__class__(**{**SMALL.__dict__, 'aggregator_epochs': 2})
    logits, history = train_aggregator(name, split, get, plan, 0, tmp_path)
    assert sorted(logits) == sorted(case.slide_id for case in split.test)
    assert len(history) == 2 and all(np.isfinite([*logits.values()]))
    tested = {case.slide_id for case in [*split.test, *split.tuning]}
    assert {view for slide_id, view in asked if slide_id in tested} == {0}
    of_training = {view for slide_id, view in asked if slide_id not in tested}
    assert of_training - {0} == {1, 2}  # view 0 of the first slide says how long a vector is


def test_an_aggregator_learns(tmp_path):
    _, split = split_of_noise(40)
    get, _ = bags(split.train)
    settings = {**SMALL.__dict__, 'aggregator_epochs': 15, 'aggregator_lr': 1e-3, 'views': 0}
    logits, _ = train_aggregator('abmil', split, get, SMALL.__class__(**settings), 0, tmp_path)
    labels = {case.slide_id: case.label for case in split.test}
    positive = [logits[slide_id] for slide_id, label in labels.items() if label]
    negative = [logits[slide_id] for slide_id, label in labels.items() if not label]
    assert min(positive) > max(negative)
    again, _ = train_aggregator(
        'abmil', split, get, SMALL.__class__(**settings), 0, tmp_path / 'again'
    )
    assert again == logits


def test_logits_of_slides_are_by_id():
    cases = [Case('a', 1, 'none'), Case('b', 0, 'none')]
    data = FeatureSlides(
        cases, lambda case, view: (torch.ones(2, 1) * case.label, torch.zeros(2, 3))
    )

    class Sum(torch.nn.Module):
        def forward(self, found):
            return found.x.sum().view(1, 1)

    assert logits_of_slides(Sum(), data) == dict(a=2.0, b=0.0)
