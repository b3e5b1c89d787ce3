"A trace is made anew when what it depends on changes, knows the types under autocast, and tells the user's own line."

import importlib
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from streaming_pathology.engine.exactness import largest_difference
from streaming_pathology.engine.graph import (
    FLOAT32_ON_CPU,
    LOW_PRECISION,
    as_under_autocast,
    comparable,
)
from streaming_pathology.engine.stream import stream
from streaming_pathology.engine.windows import StreamingError


@dataclass(slots=True)
class Options:
    "Options of a layer, without a __dict__."

    scale: float = 2.0


class Hidden:
    "A slot whose name Python changes."

    __slots__ = ('__scale',)

    def __init__(self) -> None:
        self.__scale = 2.0

    def set(self, scale: float) -> None:
        self.__scale = scale

    def get(self) -> float:
        return self.__scale


@dataclass
class Settings:
    "What a forward may look into."

    names: set = field(default_factory=lambda: {'relu', 'twice'})
    last: deque = field(default_factory=lambda: deque([2.0, 3.0]))
    flags: bytearray = field(default_factory=lambda: bytearray([1]))
    options: Options = field(default_factory=Options)
    hidden: Hidden = field(default_factory=Hidden)


class Asks(nn.Module):
    "Reads all of its settings in forward."

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.settings = Settings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings, y = self.settings, self.conv(x)
        if 'relu' in settings.names:
            y = y.relu()
        if settings.flags[0]:
            y = y + settings.last[-1]
        return y * settings.options.scale * settings.hidden.get()


@pytest.mark.parametrize(
    'change',
    [
        lambda settings: settings.names.discard('relu'),
        lambda settings: settings.last.append(7.0),
        lambda settings: settings.flags.__setitem__(0, 0),
        lambda settings: setattr(settings.options, 'scale', 5.0),
        lambda settings: settings.hidden.set(5.0),
    ],
    ids=['set', 'deque', 'bytearray', 'slots', 'private slot'],
)
def test_settings_changed_in_place(change):
    net, x = Asks().double(), torch.randn(1, 3, 20, 15, dtype=torch.double)
    streamed = stream(net, 4)
    before = streamed(x)
    change(net.settings)
    after = streamed(x)
    assert torch.allclose(after, net(x), atol=1e-12) and not torch.allclose(after, before)


def test_a_set_is_compared_by_content():
    names = {'a'}
    before = comparable(names)
    assert before == comparable({'a'})
    names.add('b')
    assert before != comparable(names)


def test_a_module_whose_name_begins_as_torchs(tmp_path, monkeypatch):
    source = (
        'from torch import nn\n'
        'class Net(nn.Conv2d):\n'
        '    scale = 2.0\n'
        '    def forward(self, x):\n'
        '        return super().forward(x) * self.scale\n'
    )
    (tmp_path / 'torchnets.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module('torchnets').Net
    net, x = kind(3, 4, 3).double(), torch.randn(1, 3, 20, 15, dtype=torch.double)
    streamed = stream(net, 4)
    streamed(x)
    kind.scale = 3.0
    assert torch.allclose(streamed(x), net(x), atol=1e-12)


def test_a_refusal_names_the_line_of_the_network():
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 16)
    with pytest.raises(StreamingError) as refused:
        stream(vit, 8)(torch.rand(1, 3, 32, 32))
    assert 'streaming.py' not in str(refused.value) and 'graph.py' not in str(refused.value)


# functions with tensors as they occur in networks, by the name that a trace gives them
FUNCTIONS = {
    'addbmm': lambda x: (torch.addbmm, x[0, 0], x[0], x[0]),
    'addmm': lambda x: (torch.addmm, x[0, 0], x[0, 0], x[0, 0]),
    'addmv': lambda x: (torch.addmv, x[0, 0, 0], x[0, 0], x[0, 0, 0]),
    'baddbmm': lambda x: (torch.baddbmm, x[0], x[0], x[0]),
    'batch_norm': lambda x: (F.batch_norm, x, x[0, 0, 0], x[0, 0, 0]),
    'bmm': lambda x: (torch.bmm, x[0], x[0]),
    'cdist': lambda x: (torch.cdist, x, x),
    'conv1d': lambda x: (F.conv1d, x[0], x[0]),
    'conv2d': lambda x: (F.conv2d, x, x),
    'conv3d': lambda x: (F.conv3d, x, x[None]),
    'conv_transpose1d': lambda x: (F.conv_transpose1d, x[0], x[0]),
    'conv_transpose2d': lambda x: (F.conv_transpose2d, x, x),
    'conv_transpose3d': lambda x: (F.conv_transpose3d, x, x[:, None]),
    'einsum': lambda x: (torch.einsum, 'nchw,nchv->nhwv', x, x),
    'exp': lambda x: (torch.exp, x),
    'inner': lambda x: (torch.inner, x, x),
    'layer_norm': lambda x: (F.layer_norm, x, (4,)),
    'linear': lambda x: (F.linear, x, x[0, 0]),
    'local_response_norm': lambda x: (F.local_response_norm, x, 2),
    'matmul': lambda x: (torch.matmul, x, x),
    'mm': lambda x: (torch.mm, x[0, 0], x[0, 0]),
    'mse_loss': lambda x: (F.mse_loss, x, x),
    'mv': lambda x: (torch.mv, x[0, 0], x[0, 0, 0]),
    'prelu': lambda x: (F.prelu, x, x[0, 0, 0]),
    'prod': lambda x: (torch.prod, x, 1),
    'relu': lambda x: (torch.relu, x),
    'scaled_dot_product_attention': lambda x: (F.scaled_dot_product_attention, x, x, x),
    'softmax': lambda x: (torch.softmax, x, 1),
    'sum': lambda x: (torch.sum, x, 1),
    'tensordot': lambda x: (torch.tensordot, x[0, 0], x[0, 0], 1),
    'trace': lambda x: (torch.trace, x[0, 0]),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_types_under_autocast(name, dtype):
    function, *args = FUNCTIONS[name](torch.rand(4, 4, 4, 4).to(dtype))
    with torch.autocast('cpu', torch.bfloat16):
        given, _ = as_under_autocast(name, tuple(args), {}, torch.device('cpu'))
        expected = function(*args).dtype
    assert function(*given).dtype == expected


def test_every_name_of_the_tables_is_tried():
    assert LOW_PRECISION | FLOAT32_ON_CPU <= set(FUNCTIONS)


class Product(nn.Module):
    "A product over channels, which autocast computes in float32."

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).prod(1, keepdim=True)


def test_an_output_has_the_type_that_autocast_gives_it():
    net, x = Product(), torch.randn(1, 3, 20, 15)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected, found = net(x), stream(net, 4)(x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


class Nothing(nn.Module):
    "A network that gives no tensor."

    def forward(self, x: torch.Tensor) -> dict:
        return {}


def test_a_network_without_an_output_has_nothing_to_compare():
    with pytest.raises(StreamingError, match='gives no tensor'):
        largest_difference(Nothing(), torch.rand(1, 3, 8, 8).double(), 4)
