"Patch embeddings of a frozen encoder: what is computed and cached, and that nothing stale is used."

import copy
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.mil.aggregators import make_aggregator
from streaming_pathology.mil.bags import Bag, BagDataset, PatchGrid
from streaming_pathology.mil.features import (
    Encoder,
    FeatureDataset,
    FeatureMIL,
    Features,
    KeptBag,
    built,
    features_path,
    make_encoder,
    read_features,
    slide_hash,
)
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.cohorts import Case
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.training.callbacks import EMA
from streaming_pathology.training.loop import fit
from streaming_pathology.training.models import StreamingClassifier
from streaming_pathology.training.tasks import Binary

GRID = PatchGrid(64)
TURNING = Augmentation(elastic=2.0)


def close(a, b, eps):
    torch.testing.assert_close(a, b, rtol=0, atol=eps)


@pytest.fixture(scope='module')
def patches():
    patches = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    return torch.from_numpy(patches)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return StreamingClassifier('resnet18').eval()


@pytest.fixture(scope='module')
def encoder(net):
    return Encoder(net, card=dict(model=dict(arch='resnet18'), classifies=True))


# ---- encoders


def test_features_of_a_classifier_are_those_before_its_last_layer(net, encoder, patches):
    features, scores = encoder(patches)
    assert (features.shape, features.dtype) == ((3, 512), torch.float32)
    assert not features.requires_grad
    close(scores, net(patches)[:, 0].detach(), 1e-5)
    close(features @ net.head.fc.weight[0] + net.head.fc.bias, scores, 1e-4)


@pytest.mark.parametrize('name', ['torchvision:resnet18', 'torchvision:mobilenet_v3_small'])
def test_an_encoder_is_built_again_from_its_card(name, patches):
    torch.manual_seed(0)
    first = make_encoder(name)
    features, scores = first(patches)
    assert scores is None
    again = built(first.card)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(patches)[0], features)
    assert again.sealed() == first.sealed()


def test_the_last_layer_is_left_out():
    network = make_encoder('torchvision:resnet18').network
    assert torch.equal(network.fc(torch.ones(2, 512)), torch.ones(2, 512))


OWN = """
from torch import nn
from torchvision import transforms
from streaming_pathology.mil.features import Encoder

class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))

def network():
    return Mean(), lambda x: x / 255

def by_image():
    steps = [transforms.Resize(16), transforms.ToTensor()]
    return Encoder(Mean(), transforms.Compose(steps), pil=True)

def wrong():
    return 3

def broken():
    return Mean(3)

def map_of():
    return nn.Identity(), lambda x: x / 255
"""


@pytest.fixture
def own(tmp_path):
    "A file with networks of somebody's own."
    (tmp_path / 'mine.py').write_text(OWN)
    return tmp_path / 'mine.py'


def test_a_network_of_ones_own(own, patches):
    mean = patches.float().mean((2, 3)) / 255
    encoder = make_encoder(f'{own}:network')
    close(encoder(patches)[0], mean, 1e-6)
    close(make_encoder(f'{own}:by_image')(patches)[0], mean, 0.01)
    assert torch.equal(built(encoder.card)(patches)[0], encoder(patches)[0])


@pytest.mark.parametrize(
    'name, message',
    [('wrong', 'gives int'), ('broken', 'cannot be built'), ('none', 'cannot be built')],
)
def test_code_that_gives_no_encoder_is_refused(own, name, message):
    with pytest.raises(InputError, match=message):
        make_encoder(f'{own}:{name}')


def test_a_network_that_gives_no_vectors_is_refused(own, patches):
    with pytest.raises(InputError, match='a vector each'):
        make_encoder(f'{own}:map_of')(patches)


def test_code_that_was_changed_is_refused(own):
    card = make_encoder(f'{own}:network').card
    own.write_text(OWN + '\n')
    with pytest.raises(InputError, match='was changed'):
        built(card)


@pytest.mark.parametrize(
    'name, message',
    [
        ('torchvision:resnet1', 'has no network'),
        ('nowhere.pt', 'is no run folder'),
        ('cnn:x', 'is no run folder'),
        ('timm:no_such', 'timm'),
        ('no.py:f', 'no such file'),
    ],
)
def test_a_name_that_means_no_network_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        make_encoder(name)


def test_patches_of_a_size_that_does_not_fit_are_refused(patches):
    with pytest.raises(InputError, match='cannot take patches of 64'):
        make_encoder('torchvision:vit_b_16')(patches)


def test_weights_of_another_network_are_refused(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / 'w.pt')
    with pytest.raises(InputError, match='another network'):
        make_encoder('torchvision:resnet34', tmp_path / 'w.pt')


def test_weights_of_a_file_are_loaded(patches, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'r.pt')
    first = make_encoder('torchvision:resnet18', tmp_path / 'r.pt')
    second = make_encoder('torchvision:resnet18', tmp_path / 'r.pt')
    assert torch.equal(first(patches)[0], second(patches)[0])


# ---- a cohort whose features are cached


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    folder, cases = tmp_path_factory.mktemp('cohort'), []
    for i in range(8):
        label, path = i % 2, folder / f's{i}.tiff'
        biopsy = paint_biopsy((128, 224), spacing=4.0, tumour_fraction=0.5 * label, seed=i)
        write_tiff(biopsy.image, path, 4.0)
        cases.append(Case(f's{i}', label, path, split='train' if i < 6 else 'tuning'))
    return cases


@pytest.fixture(scope='module')
def dataset(cases, encoder):
    def make(folder, **options):
        checksum = encoder.sealed()['sha256']
        return FeatureDataset(cases, 4.0, grid=GRID, folder=folder, encoder=checksum, **options)

    return make


@pytest.fixture(scope='module')
def trained(encoder):
    def train(name, data, epochs=2, augment=None, **options):
        torch.manual_seed(1)
        model = FeatureMIL(encoder, make_aggregator(name, 512), batch=9)
        history = fit(
            model,
            data.part('train', augment=augment),
            data.part('tuning'),
            epochs=epochs,
            lr=1e-3,
            optimizer='adamw',
            batch=3,
            progress=False,
            **options,
        )
        for row in history:
            del row['seconds'], row['peak_mb']
        return model, history

    return train


@pytest.fixture(scope='module')
def cached(dataset, encoder, tmp_path_factory):
    "A dataset whose features are all cached."
    data = dataset(tmp_path_factory.mktemp('features'))
    model = FeatureMIL(encoder, make_aggregator('max', 512), batch=9).eval()
    for i in range(len(data)):
        model(data[i]['image'])
    return data


@pytest.mark.parametrize('name', ['max', 'rnn', 'clam'])
def test_training_on_cached_features_is_bit_identical(cached, dataset, trained, tmp_path, name):
    model, history = trained(name, cached)
    other, same = trained(name, dataset(tmp_path))
    assert same == history
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    paths = [*tmp_path.iterdir()]
    assert len(paths) == 8
    for path in paths:
        assert path.read_bytes() == (cached.folder / path.name).read_bytes()


def test_a_slide_is_a_bag_once_and_features_then(cached, dataset, cases, encoder, tmp_path):
    assert isinstance(dataset(tmp_path)[0]['image'], KeptBag)
    features = cached[1]['image']
    assert isinstance(features, Features)
    bag = BagDataset(cases, 4.0, grid=GRID)[1]['image']
    model = FeatureMIL(encoder, make_aggregator('max', 512), batch=9)
    assert torch.equal(features.x, model.encode(bag).x)
    assert torch.equal(features.positions, bag.positions)
    assert features.shape == bag.shape


@pytest.mark.parametrize('name', ['max', 'clam', 'dsmil', 'rnn'])
def test_the_gradient_is_that_of_encoder_and_aggregator_as_one_network(
    cached, cases, net, encoder, name
):
    "In float64. The encoder gets none."

    def gradient(model, logits, details):
        label = torch.ones(len(logits)).double()
        model.zero_grad()
        model.loss(Binary(), logits, label, **details).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(gradients)

    torch.manual_seed(0)
    model = FeatureMIL(encoder, make_aggregator(name, 512).double(), batch=9).train()
    found = gradient(model, *model.forward_with_details(cached[1]['image']))
    bag = BagDataset(cases, 4.0, grid=GRID)[1]['image']
    vectors = []
    for positions in bag.positions.split(9):
        vectors.append(net.head.flatten(net.head.pool(net.features(bag.patches(positions)))))
    x = torch.cat(vectors)
    scores = net.head.fc(x)[:, 0]
    inputs = x.detach().double(), scores.detach().double()
    expected = gradient(model, *model.aggregator.forward_with_details(*inputs))
    close(found, expected, 1e-4)
    assert all(p.grad is None for p in encoder.parameters())
    assert not any('encoder' in name for name in model.state_dict())


def test_views_are_what_a_bag_dataset_shows(dataset, trained, cases, tmp_path):
    views = dataset(tmp_path, views=2, seed=3)
    train = views.part('train', augment=TURNING)
    trained('abmil', views, epochs=3, augment=TURNING)
    assert len([*tmp_path.iterdir()]) == 6 * 2 + 2
    shown = BagDataset(cases[:6], 4.0, grid=GRID, seed=3, augment=TURNING)
    for epoch in range(5):
        assert torch.equal(
            train[2, epoch]['image'].positions, shown[2, epoch % 2]['image'].positions
        )


# ---- nothing stale is used

OTHERS = dict(
    encoder='x',
    amp='bf16',
    spacing=8.0,
    size=(64, 64),
    grid=PatchGrid(32),
    pen=False,
    stain='ihc',
    color=(0, 0, 0),
)


def test_what_differs_has_features_of_its_own(cached, dataset, cases, tmp_path):
    keys = {json.dumps(cached.key(1))}
    for name, value in OTHERS.items():
        data = dataset(cached.folder)
        setattr(data, name, value)
        assert isinstance(data[1]['image'], KeptBag), name
        keys.add(json.dumps(data.key(1)))
    for seed, view in ((0, 0), (0, 1), (1, 0)):
        data = dataset(cached.folder, seed=seed).part('train', augment=TURNING)
        keys.add(json.dumps(data.key(1, view)))
    shutil.copy(cases[3].path, tmp_path / 'other.tiff')
    keys.add(json.dumps(key_of(tmp_path / 'other.tiff', cached)))
    assert len(keys) == 2 + len(OTHERS) + 3


def key_of(path, data):
    "The key of a slide s1 whose file is `path`."
    case = Case('s1', 1, path)
    options = dict(grid=data.grid, folder=data.folder, encoder=data.encoder)
    return FeatureDataset([case], 4.0, **options).key(0)


def test_a_file_that_was_moved_is_the_same(cached, cases, tmp_path):
    shutil.copy(cases[1].path, tmp_path / 'moved.tiff')
    assert key_of(tmp_path / 'moved.tiff', cached) == cached.key(1)


def test_a_damaged_file_is_not_used(cached, tmp_path):
    key = cached.key(1)
    path = tmp_path / 'features'
    good = features_path(cached.folder, 's1', key).read_bytes()
    positions = np.random.default_rng(0).integers(0, len(good), 25)
    for i in [*positions, 0, 8, len(good) - 1]:
        flipped = good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]
        for wrong in (flipped, good[:i]):
            path.write_bytes(wrong)
            with pytest.warns(UserWarning, match='made again'):
                assert read_features(path, key) is None, i


def test_a_renamed_file_is_made_again(cached, dataset, encoder, tmp_path):
    shutil.copytree(cached.folder, tmp_path / 'features')
    data = dataset(tmp_path / 'features')
    path = features_path(data.folder, 's1', data.key(1))
    good = path.read_bytes()
    shutil.copy(features_path(data.folder, 's2', data.key(2)), path)
    model = FeatureMIL(encoder, make_aggregator('max', 512), batch=9).eval()
    with pytest.warns(UserWarning, match='something else'):
        model(data[1]['image'])
    assert path.read_bytes() == good


def test_features_know_the_id_of_the_case_that_asks(cached):
    data = copy.copy(cached)
    data.hashes = {}
    data.cases = [replace(cached.cases[1], slide_id='renamed')]
    path = features_path(data.folder, 'renamed', data.key(0))
    shutil.copy(features_path(cached.folder, 's1', cached.key(1)), path)
    try:
        assert data[0]['image'].slide_id == data[0]['slide_id'] == 'renamed'
    finally:
        path.unlink()


def test_the_checksum_of_a_slide_is_of_all_its_files(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a.mrxs').write_text('x')
    (tmp_path / 'a/Data0.dat').write_text('1')
    case = Case('a', 1, tmp_path / 'a.mrxs')
    before = slide_hash(case)
    (tmp_path / 'a/Data0.dat').write_text('2')
    assert slide_hash(case) != before


def test_a_slide_that_is_not_there_is_refused(tmp_path):
    data = FeatureDataset([Case('s', 1, tmp_path / 'none.tiff')], 4.0, folder=tmp_path)
    with pytest.raises(InputError, match="'s'"):
        data.key(0)


# ---- the network


def test_an_average_of_weights_does_not_copy_the_encoder(cached, trained, encoder):
    model, _ = trained('abmil', cached, callbacks=[EMA(0.9)])
    assert copy.deepcopy(model).encoder is encoder
    whole = FeatureMIL(encoder, model.aggregator, whole=True)
    assert {name.split('.')[0] for name in whole.state_dict()} == {'encoder', 'aggregator'}
    whole.train()
    assert not any(module.training for module in encoder.modules())


def test_a_bag_of_one_patch(cases, encoder):
    bag = BagDataset(cases, 4.0, grid=GRID)[1]['image']
    one = Bag(bag.image, bag.positions[:1], 32, 'one')
    model = FeatureMIL(encoder, make_aggregator('abmil', 512), batch=9).eval()
    assert model(one).shape == (1, 1)


class Mean(nn.Module):
    "The mean colour of patches; remembers how many it was shown at a time."

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return x.mean((2, 3))


def as_float(x):
    return x.float()


@pytest.fixture
def many():
    "A bag of ten thousand patches."
    steps = torch.arange(100) * 32
    positions = torch.cartesian_prod(steps, steps, torch.ones(1, dtype=torch.long))
    return Bag(torch.zeros(3, 3200, 3200, dtype=torch.uint8), positions, 32)


def test_the_encoder_sees_a_batch_at_a_time(many):
    network = Mean()
    model = FeatureMIL(Encoder(network, as_float), make_aggregator('abmil', 3), batch=50).eval()
    assert model(many).shape == (1, 1)
    assert (len(network.batches), max(network.batches)) == (200, 50)


def test_features_that_are_not_finite_are_refused_and_not_cached(cached, cases, tmp_path):
    def dark_is_nan(x):
        x = x.float()
        return torch.where(x.mean((1, 2, 3), keepdim=True) < 205, torch.nan, x)

    bag = BagDataset(cases, 4.0, grid=cached.grid)[1]['image']
    path = tmp_path / 'nan.safetensors'
    kept = KeptBag(**vars(bag), path=path, key=cached.key(1))
    model = FeatureMIL(Encoder(Mean(), dark_is_nan), make_aggregator('max', 3))
    with pytest.raises(InputError, match="'s1': the backbone gives features that are not finite"):
        model(kept)
    assert not path.exists()


def test_refusals(many, encoder, dataset, tmp_path):
    aggregator = make_aggregator('max', 512)
    with pytest.raises(InputError, match='no backbone'):
        FeatureMIL(None, aggregator)(many)
    with pytest.raises(InputError, match='Bag or Features'):
        FeatureMIL(encoder, aggregator)(many.image)
    with pytest.raises(InputError, match='views'):
        dataset(tmp_path, views=0)
    with pytest.raises(InputError, match='batch is 0'):
        FeatureMIL(encoder, aggregator, batch=0)


def test_nothing_is_warned_of_where_there_is_no_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_features(tmp_path / 'none', {}) is None
