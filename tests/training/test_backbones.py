"Networks by name: that a backbone is all of its network but the pooling and what follows it."

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from refusals import refusal
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

from streaming_pathology.engine.exactness import check_exact
from streaming_pathology.evaluation.predict import load_model
from streaming_pathology.runs.maps import MapRun
from streaming_pathology.runs.runs import Run
from streaming_pathology.runs.settings import HeatmapSettings, MILSettings, StreamingSettings
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.backbones import (
    chain_of,
    check_code,
    code_of,
    make_backbone,
)
from streaming_pathology.training.models import StreamingClassifier

LITE = 'timm/tf_efficientnet_lite0'


def picture(height=128, width=160):
    "Random pixels, uint8 (1, 3, height, width)."
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)


# ---- torchvision


def mean_then(layers, features):
    return layers(F.adaptive_avg_pool2d(features, 1).flatten(1))


def pooled_then(pool, layers, features):
    return layers(pool(features).flatten(1))


# what each family computes of its map: all layers that the backbone leaves out
FAMILIES = {
    'alexnet': lambda net: partial(pooled_then, net.avgpool, net.classifier),
    'convnext_tiny': lambda net: nn.Sequential(net.avgpool, net.classifier),
    'densenet121': lambda net: partial(mean_then, net.classifier),
    'efficientnet_b0': lambda net: partial(mean_then, net.classifier),
    'googlenet': lambda net: partial(mean_then, net.fc),
    'inception_v3': lambda net: partial(mean_then, net.fc),
    'mnasnet0_5': lambda net: partial(mean_then, net.classifier),
    'mobilenet_v2': lambda net: partial(mean_then, net.classifier),
    'mobilenet_v3_small': lambda net: partial(mean_then, net.classifier),
    'regnet_x_400mf': lambda net: partial(mean_then, net.fc),
    'resnet18': lambda net: partial(mean_then, net.fc),
    'resnext50_32x4d': lambda net: partial(mean_then, net.fc),
    'shufflenet_v2_x0_5': lambda net: partial(mean_then, net.fc),
    'squeezenet1_1': lambda net: lambda features: net.classifier(features).flatten(1),
    'swin_t': lambda net: partial(mean_then, net.head),
    'vgg11_bn': lambda net: partial(pooled_then, net.avgpool, net.classifier),
}
INITIAL = dict(googlenet=dict(init_weights=False), inception_v3=dict(init_weights=False))


@pytest.mark.parametrize('name', FAMILIES)
def test_a_backbone_is_all_before_the_pooling(name, monkeypatch):
    whole = getattr(torchvision.models, name)(**INITIAL.get(name, {})).eval()
    monkeypatch.setattr(torchvision.models, name, lambda **_: whole)
    backbone = make_backbone(name)
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        features = backbone.network.eval()(image)
        assert torch.equal(FAMILIES[name](whole)(features), whole(image))
    assert features.shape[1] == backbone.channels
    assert backbone.stride in (16, 32)
    trained = {part for parts in backbone.stages.values() for part in parts}
    of_stages = [backbone.network.get_submodule(part).parameters() for part in trained]
    number = sum(parameter.numel() for part in of_stages for parameter in part)
    assert number == sum(parameter.numel() for parameter in backbone.network.parameters())
    assert len(backbone.stages) >= 4


def test_the_order_of_stages_is_that_in_which_they_compute():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(4, 5, 1)
            self.norm = nn.BatchNorm2d(4)
            self.first = nn.Conv2d(3, 4, 3, stride=3)

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    backbone = make_backbone(Backwards())
    assert backbone.stages == {'first': ['first', 'norm'], 'last': ['last']}
    assert (backbone.channels, backbone.stride) == (5, 3)
    assert backbone.network.training and backbone.network.norm.num_batches_tracked == 0


def test_weights_of_googlenet_expect_other_pixels(tmp_path):
    state = torchvision.models.googlenet(init_weights=False, aux_logits=True).state_dict()
    torch.save(state, tmp_path / 'googlenet.pth')
    backbone = make_backbone('googlenet', tmp_path / 'googlenet.pth')
    assert backbone.mean == (0.5, 0.5, 0.5)
    assert torch.equal(backbone.network.conv1.conv.weight, state['conv1.conv.weight'])


def test_images_of_four_channels():
    backbone = make_backbone('vgg11', in_chans=4)
    assert backbone.network(torch.zeros(1, 4, 64, 64)).shape == (1, 512, 2, 2)
    four = StreamingClassifier('vgg11', in_chans=4, mean=[0.5] * 4, std=[0.2] * 4, strip=32)
    assert four.update_batchnorm(torch.zeros(4, 4, 64, 64)) is four  # it has none


# ---- timm


def test_a_backbone_of_timm():
    timm = pytest.importorskip('timm')
    backbone = make_backbone(LITE, 'pypi')
    assert list(backbone.stages) == ['conv_stem', *(f'blocks.{i}' for i in range(7)), 'conv_head']
    assert (backbone.channels, backbone.stride, backbone.mean[0]) == (1280, 32, 0.5)
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    whole.load_state_dict(backbone.network.state_dict(), strict=False)
    image = torch.rand(1, 3, 101, 77)
    with torch.no_grad():
        features = backbone.network.eval()(image)
        assert torch.equal(mean_then(whole.classifier, features), whole(image))


@pytest.mark.parametrize('name, words', [('flower.jpg', 'daisy'), ('china.jpg', 'palace')])
def test_packaged_weights_name_what_photographs_show(name, words):
    "With the mean and the standard deviation that timm gives; of ImageNet's, daisy is not first."
    timm = pytest.importorskip('timm')
    from streaming_pathology.training.weights import packaged_weights

    network = timm.create_model('tf_efficientnet_lite0').eval()
    network.load_state_dict(packaged_weights(LITE), strict=False)
    pixels = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1)[None] / 255
    small = F.interpolate(pixels, scale_factor=256 / 427, mode='bicubic', antialias=True)
    image = torchvision.transforms.functional.center_crop(small, [224, 224])
    backbone = make_backbone(LITE)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (backbone.mean, backbone.std))
    with torch.no_grad():
        best = int(network((image - mean) / std).argmax())
    assert words in timm.data.ImageNetInfo().index_to_description(best)


@pytest.mark.parametrize('arch', [LITE, 'mobilenet_v2'])
def test_gradients_are_those_of_the_plain_network(arch):
    "Of all parameters and of the pixels, in float64, with BatchNorm's scale and shift trained."
    if arch == LITE:
        pytest.importorskip('timm')
    torch.manual_seed(0)
    model = StreamingClassifier(arch, n_out=2, strip=64, train_affine=True)
    model.update_batchnorm(picture(200, 200))
    plain = nn.Sequential(model.trunk.module, model.head).eval()
    check_exact(plain, (1, 3, 173, 133), strips=(48,))


def test_parts_of_timm_that_follow_each_other_are_a_sequence():
    timm = pytest.importorskip('timm')
    backbone = make_backbone(LITE)
    assert type(backbone.network) is nn.Sequential
    whole = timm.create_model('tf_efficientnet_lite0', num_classes=0, global_pool='')
    names = {name for name in whole.state_dict() if not name.startswith('head')}
    assert names == set(backbone.network.state_dict())


class Unusual(nn.Module):
    "Two convolutions, of which the second takes more than what the first gives."

    def __init__(self, of_training):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.of_training = of_training

    def forward(self, x):
        y = self.first(x)
        if not self.of_training:
            return self.second(y + x)
        return self.second(F.dropout(y, 0.5, self.training))


@pytest.mark.parametrize('of_training', [False, True])
def test_a_network_that_is_no_sequence_stays_as_it_is(of_training):
    network = Unusual(of_training)
    assert chain_of(network, ['first', 'second'], 3) is network
    assert network.training and network.first.training


# ---- a network of one's own

CODE = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))

def flat():
    return nn.Flatten()

def fails():
    raise RuntimeError('no weights')

number = 3
"""


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "A package that Python can import, with networks."
    folder = tmp_path_factory.mktemp('own')
    (folder / 'own_networks').mkdir()
    (folder / 'own_networks/__init__.py').touch()
    (folder / 'own_networks/nets.py').write_text(CODE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder / 'own_networks/nets.py'
    sys.path.remove(str(folder))


def test_a_function_of_ones_own(package):
    backbone = make_backbone('own_networks.nets:small')
    assert (backbone.channels, backbone.stride) == (8, 4)
    assert backbone.stages == {'0': ['0', '1'], '3': ['3']}


def test_a_network_itself():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = StreamingClassifier(network, strip=16)
    assert model.arch == 'Sequential' and model(picture(40, 30)).shape == (1, 1)
    assert next(model.parameters()) is network[0].weight


@pytest.mark.parametrize(
    'arch, says',
    [
        ('resnet43', 'use resnet34'),
        ('resnet', 'timm/NAME'),
        (34, 'neither the name of a network nor a network'),
        ('vit_b_16', 'cannot be a backbone'),
        ('own_networks.nets:none', 'cannot be found'),
        ('own_networks.none:small', 'cannot be found'),
        (':', 'cannot be found'),
        ('own_networks.nets:fails', 'fails with RuntimeError: no weights'),
        ('own_networks.nets:number', 'fails with TypeError'),
        ('own_networks.nets:flat', 'without pooling'),
        (nn.Identity(), 'Identity has no layers with parameters'),
        (nn.AdaptiveAvgPool2d(1), 'has to grow with the image'),
        (nn.Conv1d(3, 3, 1), 'cannot be a backbone'),
        (nn.Conv2d(3, 3, 1, stride=(1, 2)), 'by rows as by columns'),
    ],
    ids=str,
)
def test_networks_that_are_refused(package, arch, says):
    assert says in refusal(StreamingClassifier, arch)


def test_names_of_timm_that_are_refused():
    pytest.importorskip('timm')
    assert 'use timm/resnet18' in refusal(make_backbone, 'timm/resnet19')
    assert 'cannot be a backbone' in refusal(make_backbone, 'timm/vit_tiny_patch16_224')


def test_timm_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    assert "pip install 'streaming_pathology[timm]'" in refusal(make_backbone, LITE)


# ---- stages


@pytest.mark.parametrize('arch', ['mobilenet_v2', LITE])
def test_stages_are_frozen_up_to_one(arch):
    if arch == LITE:
        pytest.importorskip('timm')
    model = StreamingClassifier(arch, strip=64)
    names = list(model.stages)
    model.freeze_until(names[3])
    for name in names:
        for part in model.stages[name]:
            parameters = list(model.trunk.module.get_submodule(part).parameters())
            assert parameters
            assert all(p.requires_grad == (name in names[3:]) for p in parameters)
    model.freeze_until('last')
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = tuple(f'trunk.{part}.' for part in model.stages[names[-1]])
    assert all(name.startswith((*last, 'head.')) for name in trained)
    assert any(name.startswith(last) for name in trained)
    assert all(parameter.requires_grad for parameter in model.freeze_until(None).parameters())
    assert names[3] in refusal(model.freeze_until, 'layer4')


# ---- runs


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    return tiny_cohort(tmp_path_factory.mktemp('backbones') / 'cohort', size=(64, 64))


def trained(manifest, folder, kind=StreamingSettings, **settings):
    "The folder of a run of one epoch."
    usual = dict(manifest=str(manifest), spacing=4.0, epochs=1, heatmaps=0, device='cpu')
    if kind is MILSettings:
        usual.update(patch_size=32)
    Run(kind(**usual | settings), folder).train()
    return folder


OWN = 'own_networks.nets:small'


@pytest.mark.parametrize('kind', [StreamingSettings, MILSettings])
def test_a_run_of_ones_own_network(package, manifest, tmp_path, kind):
    folder = trained(manifest, tmp_path / 'run', kind, arch=OWN)
    _, card = load_model(folder)
    assert card['model']['arch'] == OWN and card['arch_code'] == code_of(OWN)
    package.write_text(CODE + '# changed\n')
    try:
        assert 'whose file has changed since' in refusal(load_model, folder)
    finally:
        package.write_text(CODE)


def test_code_of_python_itself_is_no_network():
    assert 'is a part of Python' in refusal(check_code, 'os:abort', '0' * 64, 'model.pt')
    assert 'finds no file' in refusal(check_code, 'nowhere.at.all:net', None, 'model.pt')


def test_a_run_keeps_the_pixel_statistics_of_its_network(manifest, tmp_path):
    pytest.importorskip('timm')
    folder = trained(manifest, tmp_path / 'run', arch=LITE)
    model, card = load_model(folder)
    assert card['model']['mean'] == card['model']['std'] == [0.5] * 3
    assert torch.equal(model.trunk.module.normalise.mean.flatten(), torch.full((3,), 127.5))


@pytest.mark.filterwarnings('ignore:slide .* the map is zero everywhere')
def test_cells_of_a_map_are_as_far_apart_as_the_stride(package, manifest, tmp_path):
    folder = trained(manifest, tmp_path / 'run', arch=OWN)
    settings = HeatmapSettings(
        checkpoint=str(folder),
        slides=str(manifest),
        out=str(tmp_path / 'maps'),
        method='activation',
    )
    MapRun(settings).draw()
    maps = list((tmp_path / 'maps').rglob('*.npy'))
    assert maps and all(np.load(path).shape == (16, 16) for path in maps)  # of 64 x 64 pixels
