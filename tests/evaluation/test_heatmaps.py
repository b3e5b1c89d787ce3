"Properties of the heatmaps over random networks, images and grids"

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streaming_pathology.engine.stream import stream
from streaming_pathology.evaluation.gradients import Noise, integrated_gradients, smoothgrad
from streaming_pathology.evaluation.heatmaps import colour_map, fit_map, overlay, pool_map


def net(seed, width=4):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 2),
        )
        .double()
        .eval()
    )


sizes = st.integers(9, 40)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    sizes,
    sizes,
    st.integers(1, 4),
    st.sampled_from(['absolute', 'squared', 'signed']),
)
def test_equals_a_loop(seed, h, w, n, average):
    model, x, g = net(seed), torch.rand(1, 3, h, w, dtype=torch.float64) * 255, []
    for k in range(n):
        copy = (
            Noise(w, 0.05 * x.std(correction=0).item(), seed, k, x.dtype)
            .add(x.clone(), 0)
            .requires_grad_()
        )
        g.append(torch.autograd.grad(model(copy)[0, 0], copy)[0][0].numpy())
    want = {
        'absolute': np.abs(g).mean(0).sum(0),
        'squared': np.square(g).mean(0).sum(0),
        'signed': np.abs(np.mean(g, 0)).sum(0),
    }[average]
    got = smoothgrad(model, x[0], n=n, seed=seed, average=average)
    assert got.dtype == np.float32 and np.allclose(got, want, rtol=1e-5, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 70), st.integers(1, 80))
def test_pooling_keeps_the_mean(seed, h, w, factor):
    m = np.random.default_rng(seed).random((h, w)).astype(np.float32)
    p = pool_map(m, factor)
    assert p.shape == (-(-h // factor), -(-w // factor))
    for i, j in [(0, 0), (p.shape[0] - 1, p.shape[1] - 1)]:
        assert (
            abs(p[i, j] - m[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].mean())
            < 1e-6
        )
    f = fit_map(m, 20)
    assert max(f.shape) <= 20 and m.min() - 1e-6 <= f.min() and f.max() <= m.max() + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30))
def test_overlay_changes_only_where_the_map_is_not_zero(seed, h, w):
    rng = np.random.default_rng(seed)
    m, rgb = rng.random((h, w)).astype(np.float32), rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    m[:, : w // 2] = 0
    out = overlay(rgb, m)
    assert out.shape == rgb.shape and np.array_equal(out[:, : w // 2], rgb[:, : w // 2])
    assert np.array_equal(
        colour_map(m), colour_map(m * 1024)
    )  # a power of two, which rounds nothing


@pytest.mark.parametrize('strip', [1, 16, 1000])
def test_through_the_stream_equals_the_plain_network(strip):
    model, x = net(0), torch.rand(3, 61, 47, dtype=torch.float64) * 255
    plain, streamed = smoothgrad(model, x, n=3), smoothgrad(stream(model, strip=strip), x, n=3)
    assert np.abs(streamed - plain).max() <= 1e-7 * plain.max()
    plain, streamed = (
        integrated_gradients(m, x, steps=3, signed=True)
        for m in (model, stream(model, strip=strip))
    )
    assert np.abs(streamed - plain).max() <= 1e-7 * np.abs(plain).max()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
