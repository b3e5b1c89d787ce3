"Functions that read neighbouring rows: rows computed by themselves are those of the whole."

import pytest
import torch
from torch.nn import functional as F

from streaming_pathology.engine.graph import Value
from streaming_pathology.engine.layers import (
    NEIGHBOURS,
    avg_pool2d,
    entries_of,
    full_index,
    getitem,
    interpolate,
    outputs_reached,
)
from streaming_pathology.engine.rules import Map, Refused, Rows
from streaming_pathology.engine.windows import Region, side_of, whole_side


def map_of(x, axis=2):
    "A tensor as rules see it."
    return Map(Value('x', x.shape, x.dtype), Rows(4, axis, 5 - axis))


def across_of(op, x, whole, axis):
    "The side across the strips, where all columns are computed."
    if op.across is None:
        return None
    other = 5 - axis
    return whole_side(op.across, whole.shape[other], x.shape[other], other)


def compare_in_parts(op, x, whole, axis, error, step=5):
    "Assert that the rows of a map, computed `step` at a time, are those of the whole."
    edges = [*range(0, whole.shape[axis], step), whole.shape[axis]]
    across = across_of(op, x, whole, axis)
    for first, stop in zip(edges, edges[1:]):
        start, end, along = side_of(op.window, first, stop, x.shape[axis], axis)
        part = op.run(Region(along, across), x.narrow(axis, start, end - start))
        expected = whole.narrow(axis, first, stop - first)
        assert torch.allclose(part, expected, atol=error)


def test_averages_that_do_not_count_padding():
    x = torch.rand(1, 1, 9, 9)
    op = avg_pool2d(map_of(x), 3, 2, 1, count_include_pad=False)
    whole = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    compare_in_parts(op, x, whole, 2, 1e-6, step=2)


@pytest.mark.parametrize('axis', [2, 3])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize(
    'how',
    [
        {'size': (77, 40)},
        {'size': (48, 12)},
        {'size': (1, 9)},
        {'size': (8, 80)},
        {'scale_factor': 0.5},
        {'scale_factor': (1.5, 0.3)},
        {'scale_factor': (0.7, 2)},
        {'scale_factor': 2.3, 'recompute_scale_factor': True},
        {'scale_factor': 2},
        {'scale_factor': (4, 1)},
        {'size': (96, 80)},
        {'size': (48, 40)},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    'mode,align_corners',
    [
        ('nearest', None),
        ('nearest-exact', None),
        ('bilinear', False),
        ('bilinear', True),
        ('bicubic', False),
        ('bicubic', True),
    ],
)
def test_interpolation_in_parts(mode, align_corners, how, dtype, axis):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 48, 40, dtype=dtype)
    try:
        op = interpolate(map_of(x, axis), **how, mode=mode, align_corners=align_corners)
    except Refused as e:  # where PyTorch's gradient is not that of its values
        assert 'gradient' in str(e) and mode[:7] == 'nearest' and dtype == torch.double
        return
    whole = F.interpolate(x, **how, mode=mode, align_corners=align_corners)
    compare_in_parts(op, x, whole, axis, 1e-12 if dtype == torch.double else 1e-5)


@pytest.mark.parametrize('mode', NEIGHBOURS)
@pytest.mark.parametrize('factor', [2, 3, 4, 5])
def test_outputs_that_an_input_row_reaches(mode, factor):
    reach, before = outputs_reached(factor, NEIGHBOURS[mode])
    x = torch.zeros(1, 1, 9, 1, dtype=torch.double)
    x[0, 0, 4] = 1
    y = F.interpolate(x, scale_factor=(float(factor), 1.0), mode=mode).flatten()
    reached = y.nonzero()[:, 0].tolist()
    first = 4 * factor - before
    assert first <= reached[0] and reached[-1] < first + reach


# --- slices


@pytest.mark.parametrize('axis', [2, 3])
@pytest.mark.parametrize(
    'index',
    [
        (slice(None), slice(1, 3), slice(3, None, 2), slice(1, -2, 3)),
        (..., slice(4, 9), slice(None, None, 2)),
        (slice(None), None, slice(0, 2), slice(2, 17), slice(3, 11)),
        (0, slice(None), slice(1, None, 3), slice(None)),
        (slice(None), [3, 0, 1], ..., slice(2, 9)),
        (..., None),
    ],
    ids=str,
)
def test_slices_in_parts(index, axis):
    x = torch.rand(2, 4, 20, 20)
    op = getitem(map_of(x, axis), index)
    whole = x[index]
    across = None
    if op.across is not None and op.out.across is not None:
        across = whole_side(op.across, whole.shape[op.out.across], 20, 5 - axis)
    rows = op.out.axis
    for first in range(0, whole.shape[rows], 2):
        stop = min(first + 2, whole.shape[rows])
        start, end, along = side_of(op.window, first, stop, 20, axis)
        part = op.run(Region(along, across), x.narrow(axis, start, end - start))
        assert torch.equal(part, whole.narrow(rows, first, stop - first))


def test_entries_of_an_index():
    entries = entries_of(full_index((None, 0, ..., slice(2, 5)), 4))
    assert [entry.dim for entry in entries] == [None, 0, 1, 2, 3]
    assert [entry.dim_out for entry in entries] == [0, None, 1, 2, 3]
    assert entries[-1].index == slice(2, 5)
