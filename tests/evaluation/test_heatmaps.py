"Properties of heatmaps over random images and grids."

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_pathology.evaluation.heatmaps import colour_map, fit_map, overlay, pool_map


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
