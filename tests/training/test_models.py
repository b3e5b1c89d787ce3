"The classifier, and what is refused."

import copy

import pytest
import torch
from refusals import refusal
from torch import nn

from streaming_pathology.engine.exactness import canvas_like, check_exact, largest_difference
from streaming_pathology.training.backbones import imagenet_mean, imagenet_std
from streaming_pathology.training.models import (
    AttentionPool,
    Normalize,
    StreamingClassifier,
    WithScores,
    pools,
)

FOUR = dict(in_chans=4, mean=[0.5] * 4, std=[0.2] * 4)  # channels


def plain(model):
    "The same network, not streamed."
    return nn.Sequential(model.trunk.module, model.head)


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 200, 300), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return StreamingClassifier('resnet18', strip=64)


# ---- pixels


def test_pixels_are_normalised_as_of_imagenet():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(imagenet_mean)) / torch.tensor(imagenet_std)
    torch.testing.assert_close(Normalize()(white)[0, :, 0, 0], expected)
    assert Normalize()(white.double()).dtype == torch.float64


# ---- pooling: a new head is tested by being in `pools`

ATTENTION_POOLS = [name for name, make in pools.items() if isinstance(make(1), AttentionPool)]


def trunk_and_head(pool):
    "A small trunk, and a head that pools by `pool`."
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh())
    head = nn.Sequential(pools[pool](8), nn.Flatten(), nn.Linear(8, 2))
    return trunk, head


def check_exact_by_rows(network):
    "As `check_exact`, but by rows alone: of equal maxima the first in reading order is taken."
    image = torch.randn(1, 3, 67, 59, dtype=torch.double, requires_grad=True)
    for x in (image, canvas_like(image)):
        for strip in (1, 5, 16):
            assert largest_difference(network.double(), x, strip) <= 1e-9


BY_ROWS_ALONE = {'max'}


@pytest.mark.parametrize('pool', pools)
def test_a_pool_is_streamed_exactly(pool):
    check = check_exact_by_rows if pool in BY_ROWS_ALONE else check_exact
    check(nn.Sequential(*trunk_and_head(pool)))


@pytest.mark.parametrize('pool', pools)
def test_a_pool_gives_a_number_for_each_channel(pool):
    pooled = pools[pool](8)(torch.randn(2, 8, 5, 7))
    assert pooled.shape in ((2, 8), (2, 8, 1, 1))


@pytest.mark.parametrize('pool', ATTENTION_POOLS)
def test_the_scores_of_an_attention_pool_are_streamed_exactly(pool):
    check_exact(WithScores(*trunk_and_head(pool)))


class Brightness(AttentionPool):
    "A head of one's own: what is bright counts."

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Conv2d(channels, 1, 1)

    def scores(self, x):
        return self.weight(x)


def test_a_head_of_ones_own_shows_its_attention(monkeypatch, image):
    monkeypatch.setitem(pools, 'brightness', Brightness)
    model = StreamingClassifier('resnet18', pool='brightness', strip=64)
    logits, attention = model(image, attention=True)
    assert torch.allclose(logits, plain(model)(image), rtol=1e-4, atol=1e-5)
    assert attention.shape == (1, 1, 7, 10)
    assert abs(attention.sum() - 1) < 1e-5
    expected = model.head.pool.scores(model.features(image)).flatten().softmax(0)
    torch.testing.assert_close(attention.flatten(), expected)


# ---- the classifier


def test_gradients_are_those_of_the_plain_network(model, image):
    model.update_batchnorm(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    parameters = list(model.parameters())
    streamed = torch.autograd.grad(model(image).sum(), parameters)
    whole = torch.autograd.grad(plain(model)(image).sum(), parameters)
    for a, b in zip(streamed, whole, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7
    assert model.features(image).shape == (1, 512, 7, 10)


def test_gradients_with_four_channels():
    torch.manual_seed(0)
    options = dict(in_chans=4, mean=[0.1, 0.2, 0.1, 0.3], std=[0.2] * 4)
    model = StreamingClassifier('resnet18', strip=64, **options).double()
    model.update_batchnorm(torch.randint(0, 256, (4, 4, 64, 64), dtype=torch.uint8))
    image = torch.randint(0, 256, (1, 4, 200, 130), dtype=torch.uint8)
    parameters = list(model.parameters())
    streamed = torch.autograd.grad(model(image).sum(), parameters)
    whole = torch.autograd.grad(plain(model)(image).sum(), parameters)
    for a, b in zip(streamed, whole, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


@pytest.mark.parametrize('pool', pools)
def test_pools_copies_and_state_dicts(pool, image):
    model = StreamingClassifier('resnet50', n_out=3, pool=pool, strip=50).double()
    model.trunk.module.layer4[-1].bn3.weight.data.fill_(0.5)
    image = image[:, :, :120, :160].double()
    assert (model(image) - plain(model)(image)).abs().max() < 1e-9
    other = copy.deepcopy(model)
    other.head.fc.weight.data.zero_()  # only the copy's
    assert model.head.fc.weight.abs().max() > 0
    assert other(image).std() < 1e9
    assert torch.equal(other(image), other.head.fc.bias[None])
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(image), other(image))


def test_another_head_or_strip_is_used(model, image):
    "Trunk and head are joined once, but for a new head or other options again."
    changed = copy.deepcopy(model)
    former = changed.whole()
    assert changed.whole() is former
    changed.head = copy.deepcopy(changed.head)
    changed.head.fc.weight.data.zero_()
    assert torch.equal(changed(image), changed.head.fc.bias[None])
    changed.trunk = changed.trunk.with_options(strip=32)
    assert changed.whole().options['strip'] == 32


def test_attention_is_that_of_the_same_pass(model, image):
    gated = StreamingClassifier('resnet18', pool='attention', strip=64)
    logits, attention = gated(image, attention=True)
    assert torch.allclose(logits, gated(image))
    assert torch.equal(attention, gated.attention(image))
    assert abs(attention.sum() - 1) < 1e-5
    assert "pool='attention'" in refusal(model, image, attention=True)


def test_frozen_stages_get_no_gradient(image):
    model = StreamingClassifier('resnet34', strip=64)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.freeze_until('layer4')
    frozen, trained = model.trunk.module.layer3, model.trunk.module.layer4
    assert not frozen[0].conv1.weight.requires_grad and trained[0].conv1.weight.requires_grad
    model(image).sum().backward()
    assert frozen[0].conv1.weight.grad is None and trained[2].bn2.weight.grad is not None


def test_batchnorm_is_never_in_training_mode(model):
    norms = model.train().batch_norms()
    assert len(norms) == 20 and not any(norm.training for norm in norms)


def test_an_update_of_batchnorm_that_fails_changes_nothing(model):
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nan = torch.full((4, 3, 64, 64), torch.nan)
    assert 'not finite' in refusal(model.update_batchnorm, nan)
    assert all(torch.equal(tensor, former[name]) for name, tensor in model.state_dict().items())
    for norm in model.batch_norms():
        assert norm.momentum == 0.1 and not norm.training
    model.update_batchnorm(torch.randint(0, 256, (4, 3, 64, 64)).double())


# ---- what is refused


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(arch='vgg17'), 'vgg17'),
        (dict(pool='median'), 'median'),
        (dict(in_chans=0), 'in_chans='),
        (dict(in_chans=True), 'in_chans='),
        (dict(in_chans=3.0), 'in_chans='),
        (dict(in_chans=4), 'give in_chans=4 numbers each'),
        (dict(n_out=0), 'n_out=0 is not a number of logits'),
        (dict(mean=0.5), 'three numbers'),
        (dict(weights='DEFAULT', sha256='0' * 64), 'leave it out'),
        (dict(sha256='0' * 64), 'sha256 is the checksum of a file'),
        (dict(in_chans=1, mean=[0.5], std=[0.5], weights='IMAGENET1K_V1'), 'in_chans=1'),
    ],
    ids=str,
)
def test_options_that_are_refused(options, says):
    assert says in refusal(StreamingClassifier, **options)


def test_stages_that_are_not_there(model):
    assert 'layer5' in refusal(model.freeze_until, 'layer5')


def test_images_that_are_refused(model, image):
    assert '(N, 3, H, W)' in refusal(model, image[:, :1])
    assert 'not torch.bool' in refusal(model, image > 0)
    assert 'not torch.complex64' in refusal(model, image.to(torch.complex64))


def test_patches_that_are_refused(model, image):
    four = StreamingClassifier('resnet18', strip=64, **FOUR)
    assert 'images are (N, 4, H, W)' in refusal(four, image)
    assert 'patches of 4 channels' in refusal(four.update_batchnorm, image)
    assert 'needs a batch' in refusal(model.update_batchnorm, image[:, :, :8, :8])
