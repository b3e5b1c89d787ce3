"Random networks, and how two of them are compared"

import os
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.shufflenetv2 import channel_shuffle
from torchvision.ops import Permute

from streaming_pathology.engine.stream import stream
from streaming_pathology.engine.windows import StreamingError
from streaming_pathology.training.models import GatedAttention

tolerance = 1e-9
EXAMPLES = int(os.environ.get('STREAMING_EXAMPLES', 100))


def random_tests(number=EXAMPLES, **more):
    "Settings of a test of random networks: the same ones every time, unless more are asked for."
    return settings(
        max_examples=number,
        deadline=None,
        derandomize='STREAMING_EXAMPLES' not in os.environ,
        suppress_health_check=list(HealthCheck),
        **more,
    )


pick = st.sampled_from


class Apply(nn.Module):
    "A function as a layer, with layers and parameters of its own."

    def __init__(self, f, *layers, **params):
        super().__init__()
        self.f, self.layers = f, nn.ModuleList(layers)
        for k, v in params.items():
            self.register_parameter(k, nn.Parameter(v))

    def forward(self, x):
        return self.f(self, x)


def frozen_norm(c):
    m = nn.BatchNorm2d(c).eval()
    m.running_mean.normal_(0, 0.3)
    m.running_var.uniform_(0.5, 2)
    nn.init.uniform_(m.weight, 0.5, 1.5)
    nn.init.normal_(m.bias, 0, 0.3)
    return m


@st.composite
def convs(draw, c, out=None):
    "Any convolution of `c` channels."
    groups = draw(pick([g for g in (1, 1, 2, c) if c % g == 0]))
    out = out or groups * draw(st.integers(1, 3))
    k = draw(pick([1, 2, 3, 5, (1, 3), (3, 1), (2, 4), (5, 2)]))
    d = draw(pick([1, 1, 2, (2, 1), (1, 3)]))
    s = draw(pick([1, 1, 2, 3, (2, 1), (1, 2), (3, 2)]))
    p, mode = (
        draw(pick([0, 1, 2, (1, 0), (0, 2), 'valid', 'same', 3])),
        draw(pick(['zeros'] * 3 + ['reflect', 'replicate'])),
    )
    if p == 'same':
        s = 1
    bias = draw(st.booleans())
    if draw(pick([False] * 5 + [True])) and mode == 'zeros':
        return Apply(
            lambda m, x: F.conv2d(
                x, m.w * m.g, m.b, stride=s, padding=p, dilation=d, groups=groups
            ),
            w=torch.randn(out, c // groups, *nn.Conv2d(1, 1, k).kernel_size) * 0.3,
            g=torch.rand(1) + 0.5,
            b=torch.randn(out),
        ), out
    return nn.Conv2d(c, out, k, s, p, d, groups, bias, mode), out


@st.composite
def same_shape(draw, c):
    "A part that keeps the shape: what a residual branch is made of."
    k, d = draw(pick([1, 3, 5, (3, 1), (1, 5)])), draw(pick([1, 2]))
    parts = [nn.Conv2d(c, c, k, padding='same', dilation=d, groups=draw(pick([1, c])))]
    if draw(st.booleans()):
        parts.append(frozen_norm(c))
    if draw(st.booleans()):
        parts.append(draw(activations(c)))
    return nn.Sequential(*parts)


@st.composite
def activations(draw, c):
    i = draw(st.booleans())
    return draw(
        pick(
            [
                nn.ReLU(i),
                nn.ReLU6(i),
                nn.LeakyReLU(0.1, i),
                nn.ELU(inplace=i),
                nn.GELU(),
                nn.SiLU(i),
                nn.Mish(i),
                nn.Hardswish(i),
                nn.Hardsigmoid(i),
                nn.Hardtanh(inplace=i),
                nn.Sigmoid(),
                nn.Tanh(),
                nn.Softplus(),
                nn.Softsign(),
                nn.PReLU(c),
                nn.PReLU(),
                nn.SELU(i),
                nn.CELU(inplace=i),
                nn.LogSigmoid(),
                nn.Tanhshrink(),
                nn.Softmax(1),
                nn.Softmax2d(),
                nn.Identity(),
                nn.Dropout(0.3).eval(),
                nn.Dropout2d(0.3).eval(),
                Apply(lambda m, x: torch.relu(x)),
                Apply(lambda m, x: x.clamp(-1, 1)),
                Apply(lambda m, x: F.relu_(x)),
                Apply(lambda m, x: x.tanh_()),
                Apply(lambda m, x: 2 * x - x.abs()),
                Apply(lambda m, x: F.relu(x, True)),
                Apply(
                    lambda m, x: (x - m.mean) / m.std,
                    mean=torch.randn(c, 1, 1),
                    std=torch.rand(1, c, 1, 1) + 0.5,
                ),
            ]
        )
    )


@st.composite
def pools(draw):
    k = draw(pick([2, 3, (3, 2), (1, 2), (2, 1)]))
    s = draw(pick([None, 1, 2, (2, 1), 3]))
    ceil = draw(st.booleans())
    p = draw(pick([0, 0, 1])) if k in (2, 3) else 0
    if draw(st.booleans()):
        return nn.MaxPool2d(
            k, s, p, 1 if p else draw(pick([1, 1, 2])), ceil_mode=ceil
        )  # a dilated window that lies in the padding alone makes PyTorch's own backward write out of bounds
    return nn.AvgPool2d(k, s, p, ceil, draw(st.booleans()), draw(pick([None, None, 3])))


class UNet(nn.Module):
    "Down by two, up again, joined with what came in; the sizes are made even first."

    def __init__(self, c, up):
        super().__init__()
        self.even, self.down, self.deep = (
            nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Upsample(scale_factor=2)),
            nn.Conv2d(c, c, 3, 2, 1),
            nn.Conv2d(c, c, 3, padding=1),
        )
        self.up = (
            nn.ConvTranspose2d(c, c, 2, 2)
            if up == 'transposed'
            else nn.Upsample(scale_factor=2, mode=up)
        )

    def forward(self, x):
        x = self.even(x)
        return torch.cat([self.up(self.deep(torch.tanh(self.down(x)))), x], 1)


@st.composite
def transposed(draw, c):
    groups = draw(pick([1, 1, c]))
    out = groups * draw(st.integers(1, 2))
    k, s, d, p = (
        draw(pick([1, 2, 3, 4, (2, 3), (3, 1)])),
        draw(pick([1, 2, 3, (2, 1), (1, 3)])),
        draw(pick([1, 1, 2, (1, 2)])),
        draw(pick([0, 0, 1, (1, 0)])),
    )
    most = [
        max(a, b) - 1
        for a, b in zip(nn.Conv2d(1, 1, 1, s).stride, nn.Conv2d(1, 1, 1, 1, 0, d).dilation)
    ]
    return nn.ConvTranspose2d(
        c, out, k, s, p, [draw(st.integers(0, m)) for m in most], groups, draw(st.booleans()), d
    ), out


def add_inplace(m, x):
    y = m.layers[0](x)
    y += x
    return y


def halves(m, x):
    a, b = x.chunk(chunks=2, dim=1)
    c, d = torch.split(b, [1, 2], 1)
    return torch.cat([d, a, torch.tanh(c)], 1)


@st.composite
def blocks(draw, c):
    "One part of a network and the number of channels behind it."
    kind = draw(
        pick(
            'conv conv conv norm act act pool residual residual inplace gate cat twice layernorm layernorm2d scale pad downsample channels shuffle up resize transposed unet'.split()
        )
    )
    if kind == 'conv':
        return draw(convs(c))
    if kind == 'norm':
        return frozen_norm(c), c
    if kind == 'act':
        return draw(activations(c)), c
    if kind == 'pool':
        return draw(pools()), c
    if kind == 'residual':
        return Apply(lambda m, x: x + m.layers[0](x), draw(same_shape(c))), c
    if kind == 'inplace':
        return Apply(add_inplace, draw(same_shape(c))), c
    if kind == 'gate':
        return Apply(lambda m, x: x * torch.sigmoid(m.layers[0](x)), draw(same_shape(c))), c
    if kind == 'cat':
        return Apply(
            lambda m, x: torch.cat([m.layers[0](x), x, m.layers[1](x)], 1),
            draw(same_shape(c)),
            draw(same_shape(c)),
        ), 3 * c
    if kind == 'twice':
        return Apply(lambda m, x: m.layers[0](torch.tanh(m.layers[0](x))), draw(same_shape(c))), c
    if kind == 'layernorm':
        return nn.Sequential(
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(c),
            nn.Linear(c, c + 1),
            nn.GELU(),
            Permute([0, 3, 1, 2]),
        ), c + 1
    if kind == 'layernorm2d':
        return LayerNorm2d(c), c
    if kind == 'scale':
        return Apply(
            lambda m, x: x + m.scale * m.layers[0](x),
            draw(same_shape(c)),
            scale=torch.randn(c, 1, 1),
        ), c
    if kind == 'pad':
        return draw(
            pick(
                [
                    nn.ZeroPad2d((1, 0, 2, 1)),
                    nn.ReflectionPad2d((1, 1, 2, 1)),
                    nn.ReplicationPad2d((0, 1, 1, 3)),
                    nn.ConstantPad2d((1, 1, 0, 2), 0.7),
                    nn.CircularPad2d((1, 1, 0, 0)),
                    nn.ZeroPad2d((-1, 2, 0, 0)),
                ]
            )
        ), c
    if kind == 'up':
        f = draw(pick([2, 3, (1, 2), (2, 1), (3, 2)]))
        mode = draw(pick(['nearest', 'bilinear', 'bilinear', 'bicubic', 'nearest-exact']))
        return draw(
            pick(
                [
                    nn.Upsample(scale_factor=f, mode=mode),
                    Apply(lambda m, x: F.interpolate(x, scale_factor=f, mode=mode)),
                ]
                + [nn.PixelUnshuffle(1)] * (c % 4 > 0)
                + [nn.Sequential(nn.Conv2d(c, 4 * c, 1), nn.PixelShuffle(2))]
            )
        ), c
    if kind == 'resize':
        mode, corners = draw(
            pick(
                [
                    ('nearest', None),
                    ('bilinear', False),
                    ('bilinear', True),
                    ('bicubic', False),
                    ('bicubic', True),
                ]
            )
        )
        how = draw(
            pick(
                [
                    {'scale_factor': 0.5},
                    {'scale_factor': (1.5, 0.7)},
                    {'scale_factor': 2.3, 'recompute_scale_factor': True},
                    {'scale_factor': 2},
                    {'size': (31, 17)},
                    {'size': (7, 40)},
                ]
            )
        )
        return Apply(lambda m, x: F.interpolate(x, **how, mode=mode, align_corners=corners)), c
    if kind == 'transposed':
        return draw(transposed(c))
    if kind == 'unet':
        return UNet(c, draw(pick(['nearest', 'bilinear', 'transposed']))), 2 * c
    if kind == 'shuffle':
        return nn.Sequential(
            nn.Conv2d(c, 6, 1),
            draw(
                pick(
                    [
                        nn.ChannelShuffle(2),
                        nn.ChannelShuffle(1),
                        Apply(lambda m, x: channel_shuffle(x, 3)),
                        Apply(halves),
                    ]
                )
            ),
        ), 6
    if kind == 'channels':
        return Apply(lambda m, x: x[:, 1:] * x[:, :1] if c > 1 else x), max(1, c - 1)
    return Apply(
        lambda m, x: F.relu(m.layers[0](x) + m.layers[1](x), inplace=True),
        nn.Conv2d(c, 4, 3, 2, 1),
        nn.Conv2d(c, 4, 1, 2),
    ), 4


@st.composite
def networks(draw):
    c, parts = draw(pick([1, 2, 3])), []
    start = c
    for _ in range(draw(st.integers(1, 6))):
        part, c = draw(blocks(c))
        parts.append(part)
    end = draw(pick(['map', 'map', 'avg', 'max', 'mean', 'bins', 'maxbins', 'sum', 'attention']))
    if end in ('avg', 'max'):
        parts += [
            nn.AdaptiveAvgPool2d(1) if end == 'avg' else nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(c, 2),
        ]
    if end == 'mean':
        parts += [Apply(lambda m, x: x.mean((2, 3))), nn.Linear(c, 2), nn.ReLU(inplace=True)]
    if end == 'sum':
        parts += [Apply(lambda m, x: torch.sum(x, dim=[-2, -1], keepdim=True)), nn.Conv2d(c, 2, 1)]
    if end == 'bins':
        parts += [nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(6 * c, 2)]
    if end == 'attention':
        parts += [GatedAttention(c, 4), nn.Linear(c, 2)]
    if end == 'maxbins':
        parts += [nn.AdaptiveMaxPool2d((3, 2))]
    return start, nn.Sequential(*parts).double()


def close(a, b, floor=1e-14):
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item() + floor


def compare(net, x, strip, keep=1, **how):
    "Both networks on `x`: assert equal outputs and gradients. A size that the plain network refuses must be refused."
    params = list(net.parameters())
    try:
        y = net(x * 1)
    except (RuntimeError, ValueError):
        with pytest.raises(StreamingError):
            stream(net, strip, **how)(x * 1)
        return 'refused'
    g = torch.randn_like(y)
    try:
        want = torch.autograd.grad(y, [x, *params], g, allow_unused=True)
    except RuntimeError as e:  # the plain network has no gradient either
        if 'inplace operation' not in str(e):
            raise
        return assume(False)
    ys = stream(net, strip, keep, **how)(x * 1)
    assert ys.shape == y.shape and close(ys, y)
    got = torch.autograd.grad(ys, [x, *params], g, allow_unused=True)
    floor = 1e-13 * (
        1 + max(t.abs().max().item() for t in want if t is not None)
    )  # rounding of what cancels to nothing
    for name, a, b in zip(['input', *dict(net.named_parameters())], got, want):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        assert close(a, b, floor), f'{name}: {(a - b).abs().max():.2e} of {b.abs().max():.2e}'
    with torch.no_grad():
        assert torch.equal(stream(net, strip, **how)(x * 1), ys)


waits = pick([0, 20, 10000])


def waiting(positions):
    return mock.patch(
        'streaming_pathology.engine.streaming.wait_positions', positions
    )  # that layers behind a stride wait for


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        frozen_norm(8),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
    )
