"Cached outputs of frozen stages: the same as without, and none is used for other weights or data."

import numpy as np
import pytest
import torch
from refusals import refusal
from torch import nn

from streaming_pathology.mil.mil import InstanceMIL, TwoPhases
from streaming_pathology.paper.baselines import make_backbone
from streaming_pathology.paper.data import paint_stand_in, prepare
from streaming_pathology.paper.plan import SMALL
from streaming_pathology.paper.views import KINDS, MapBag, Tail, Views, ViewSlides, cut_trunk
from streaming_pathology.slides.cohorts import read_manifest
from streaming_pathology.training.loop import fit

pytestmark = pytest.mark.usefixtures('small_resnet')
PLAN = SMALL.__class__(**{**SMALL.__dict__, 'size': 96, 'patch': 32})


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('views')
    source = paint_stand_in(folder / 'painted', (3, 2, 1), size=192)
    return read_manifest(prepare(source, folder / 'reduced', 96))


@pytest.fixture
def network():
    return make_backbone(PLAN.backbone, PLAN.weights)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---- exactness


@pytest.mark.parametrize('view', [0, 1, 2])
@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-5), (torch.float16, 3e-3)])
def test_logits_and_gradients_are_those_of_the_network(
    cases, network, tmp_path, view, dtype, close
):
    views = Views(tmp_path, network, PLAN, 'image', dtype=dtype)
    image = views.item(cases[0], view)['image']
    network.freeze_until('layer4')
    expected = network(image[None])
    expected.sum().backward()
    wanted = gradients(network)
    network.zero_grad()
    tail = Tail(network, 1).train()
    found = tail(views.get(cases[0], view)[0])
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    after = gradients(network)
    assert wanted.keys() == after.keys() and any(name.startswith('trunk') for name in after)
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=close, atol=close)


def test_patches_are_classified_as_without_the_cache(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'patches', dtype=torch.float32)
    for view in (0, 2):
        bag = views.item(cases[-1], view)['image']
        whole = InstanceMIL(network).eval()
        cut = InstanceMIL(Tail(network, 1)).eval()
        maps, positions = views.get(cases[-1], view)
        cached = MapBag(bag.image, positions, 32, bag.slide_id, maps=maps)
        assert len(bag) > 1
        torch.testing.assert_close(cut.scores(cached), whole.scores(bag), rtol=1e-4, atol=1e-5)
        assert whole(bag).item() == pytest.approx(cut(cached).item(), abs=1e-5)


def test_features_are_those_of_the_whole_trunk(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'features', dtype=torch.float32)
    vectors, positions = views.get(cases[0], 0)
    network.eval()
    with torch.no_grad():
        maps = network.features(views.item(cases[0], 0)['image'][None])[0]
    rows, columns = (positions[:, :2] // 32).T
    torch.testing.assert_close(vectors, maps[:, rows, columns].T, rtol=1e-5, atol=1e-5)


def test_training_from_the_cache_is_training(cases, network, tmp_path):
    "Two epochs from float32 maps end with the weights of two epochs from pixels."
    plan = PLAN.__class__(**{**PLAN.__dict__, 'views': 0})
    views = Views(tmp_path, network, plan, 'image', dtype=torch.float32)
    options = dict(epochs=2, lr=0.01, batch=2, seed=3, progress=False)
    items = [views.item(case, 0) for case in cases]
    other = make_backbone(PLAN.backbone, PLAN.weights)
    fit(other.freeze_until('layer4'), items, items, **options)
    tail = Tail(network, 1)
    data = [ViewSlides(cases, views)[i] for i in range(len(cases))]
    fit(tail, data, data, **options)
    before = make_backbone(PLAN.backbone, PLAN.weights).state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5)
        if name.startswith(('trunk.module.layer3', 'trunk.layer3')):
            assert torch.equal(tensor, before[name])
    assert not torch.equal(network.head.fc.weight, before['head.fc.weight'])


# ---- the tail


def test_the_tail_is_a_part_of_the_network(network):
    tail = Tail(network, 2)
    mine = {id(p) for p in tail.parameters()}
    assert mine < {id(p) for p in network.parameters()}
    names = [name for name, _ in cut_trunk(network, 2)[0].named_children()]
    assert names[-1] == 'layer2' and [*dict(tail.trunk.named_children())] == ['layer3', 'layer4']
    tail.train()
    norms = [layer for layer in tail.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


@pytest.mark.parametrize('stages', [0, 5, 20])
def test_a_cut_that_leaves_nothing_on_one_side(network, stages):
    assert 'it has to be from 1 to 4' in refusal(Tail, network, stages)


@pytest.mark.parametrize('stages', [1, 2, 4])
def test_a_cut_within_a_sequence_of_layers(stages):
    "timm keeps the stages of EfficientNets in one child, `blocks`."
    network = make_backbone('timm/tf_efficientnet_lite0').double().eval()
    frozen, trained = cut_trunk(network, stages)
    image = torch.randint(256, (1, 3, 96, 64)).double()
    tail = Tail(network, stages).eval()
    assert torch.equal(trained(frozen(image)), network.trunk.module(image))
    assert torch.equal(tail(frozen(image)), network.head(network.trunk.module(image)))
    network.freeze_until([*network.stages][-stages])
    wanted = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for p in tail.parameters()} == wanted


def test_a_network_that_cannot_be_cut(network):
    network.stages = {'stem': ['network.stem'], 'end': ['network.end']}
    said = refusal(Tail, network, 1)
    assert "cannot be cut before 'network.end'" in said and 'follow each other' in said


def test_scale_and_shift_of_pretrained_norms_stay(network):
    network.train_affine = False
    trained = {name for name, p in Tail(network, 1).named_parameters() if p.requires_grad}
    assert not any('bn' in name for name in trained) and any('conv' in name for name in trained)


# ---- the cache


@pytest.mark.parametrize('kind', KINDS)
def test_views_are_written_once(cases, network, tmp_path, kind):
    views = Views(tmp_path, network, PLAN, kind)
    called = []
    views.fill(views.missing(cases[:2]), lambda: called.append(1))
    assert len(called) == 2 * (1 + PLAN.views)
    before = {path: path.stat().st_mtime_ns for path in views.folder.iterdir()}
    again = Views(tmp_path, make_backbone(PLAN.backbone, PLAN.weights, seed=7), PLAN, kind)
    assert not again.missing(cases[:2]) and again.folder == views.folder  # whatever the head
    assert {path: path.stat().st_mtime_ns for path in views.folder.iterdir()} == before
    views.path(cases[0], 1).unlink()
    first = views.get(cases[0], 1)[0]
    assert first.dtype == torch.float16
    assert not views.missing(cases[:2])


def test_views_of_others_are_not_used(cases, network, tmp_path):
    other = dict(PLAN.__dict__)
    folders = {Views(tmp_path, network, PLAN, kind).folder for kind in KINDS}
    folders.add(Views(tmp_path, network, PLAN, 'image', data='others').folder)
    folders.add(Views(tmp_path, network, PLAN, 'image', dtype=torch.bfloat16).folder)
    changed = make_backbone(PLAN.backbone, PLAN.weights, trunk_seed=1)
    folders.add(Views(tmp_path, changed, PLAN, 'image').folder)
    changes = (dict(trained_stages=2), dict(size=64), dict(augmentation=dict(elastic=1)))
    for change in changes:
        plan = PLAN.__class__(**{**other, **change})
        folders.add(Views(tmp_path, network, plan, 'image').folder)
    assert len(folders) == len(KINDS) + 3 + len(changes)


def test_views_are_of_the_weights_that_were_there_before_training(cases, network, tmp_path):
    views = Views(tmp_path / 'a', network, PLAN, 'image')
    before = views.get(cases[0], 0)[0]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    views.path(cases[0], 0).unlink()
    assert torch.equal(views.get(cases[0], 0)[0], before)


def test_maps_that_float16_cannot_hold(cases, network, tmp_path):
    with torch.no_grad():
        network.trunk.module.conv1.weight.mul_(1e9)
    views = Views(tmp_path, network, PLAN, 'image')
    assert 'beyond what torch.float16 can hold' in refusal(views.get, cases[0], 0)
    assert not views.path(cases[0], 0).exists()
    wide = Views(tmp_path, network, PLAN, 'image', dtype=torch.bfloat16)
    assert wide.get(cases[0], 0)[0].isfinite().all()


def test_a_damaged_file_is_named(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'image')
    views.get(cases[0], 0)
    views.path(cases[0], 0).write_bytes(b'damaged')
    assert 'cannot be read' in refusal(views.get, cases[0], 0)


def test_an_unknown_kind(network, tmp_path):
    assert 'use one of image, patches, features' in refusal(Views, tmp_path, network, PLAN, 'x')


# ---- slides to train on


def test_epochs_see_views_in_turn_and_tuning_slides_the_slide_as_it_is(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'image')
    data, plain = ViewSlides(cases, views, augmented=True), ViewSlides(cases, views)
    for epoch, view in enumerate([1, 2, 1]):
        assert torch.equal(data[0, epoch]['image'], views.get(cases[0], view)[0][0].float())
        assert torch.equal(plain[0, epoch]['image'], views.get(cases[0], 0)[0][0].float())
    assert data[0]['label'] == cases[0].label and data[0]['slide_id'] == cases[0].slide_id


def test_a_bag_of_maps_gives_those_that_are_asked_for(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'patches')
    bag = ViewSlides(cases, views)[0]['image']
    chosen = bag.positions[[2, 0]]
    assert torch.equal(bag.patches(chosen), bag.maps[[2, 0]])
    assert torch.equal(bag.patches(chosen.tolist()), bag.maps[[2, 0]])
    assert 'has no patch at (1, 2, 3)' in refusal(bag.patches, [(1, 2, 3)])


def test_the_papers_mil_trains_from_the_cache(cases, network, tmp_path):
    views = Views(tmp_path, network, PLAN, 'patches')
    data = ViewSlides(cases, views, augmented=True)
    model = InstanceMIL(Tail(network, 1))
    history = fit(
        model, data, ViewSlides(cases, views), epochs=2, lr=1e-3, batch=2,
        callbacks=[TwoPhases(data)], progress=False,
    )  # fmt: skip
    assert np.isfinite([row['tuning_loss'] for row in history]).all()
    assert set(model.chosen) == {case.slide_id for case in cases}
