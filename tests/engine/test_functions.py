"Rules of functions that keep rows apart, and the tables that name them."

import pytest
import torch
from networks import Apply, compare
from torch import nn
from torch.nn import functional as F

from streaming_pathology.engine.functions import Bins, each_position, moved_dimension
from streaming_pathology.engine.stream import stream
from streaming_pathology.engine.windows import StreamingError


@pytest.mark.parametrize('name', each_position)
def test_functions_of_each_position_are_pytorchs(name):
    places = (torch, F, torch.Tensor, torch._C._nn)
    assert any(
        hasattr(place, each) for place in places for each in (name, f'__{name}__', f'{name}_')
    )


# --- flatten takes what reshape takes


flattened = {
    'flatten': lambda y: y.flatten(2),
    'reshape': lambda y: y.reshape(len(y), y.shape[1], -1),
    'nn.Flatten': lambda y: nn.Flatten(2)(y),
}


@pytest.mark.parametrize('how', flattened)
def test_rows_flattened_with_columns(how):
    "As before a transformer: positions become one dimension, which comes in strips of rows."
    torch.manual_seed(0)
    net = Apply(
        lambda m, x: m.layers[1](flattened[how](m.layers[0](x)).transpose(1, 2)),
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Linear(4, 5),
    ).double()
    for size in ((40, 22), (22, 40)):
        x = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
        for end in (net, nn.Sequential(net, Apply(lambda m, x: x.mean(1)))):
            assert compare(end, x, 6, direction='rows') is None
            assert compare(end, x, 6) is None


@pytest.mark.parametrize('start,end', [(0, -1), (1, -1), (1, 2), (0, 2)])
def test_rows_flattened_with_channels_are_refused(start, end):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(start, end))
    with pytest.raises(StreamingError, match=r"'1' .Flatten. .*pool it first"):
        stream(net, 6, direction='rows')(torch.rand(2, 3, 20, 15))


def test_where_a_dimension_is_after_a_reshape():
    shape = (2, 8, 20, 10)
    kept = moved_dimension(shape, (2, 2, 4, 20, 10), 2)
    assert (kept.target, kept.more, kept.fewer) == (3, 1, 1)
    split = moved_dimension(shape, (2, 8, 5, 4, 10), 2)
    assert (split.target, split.more, split.fewer) == (2, 1, 4)
    merged = moved_dimension(shape, (2, 8, 200), 2)
    assert (merged.target, merged.more, merged.fewer) == (2, 10, 1)
    assert moved_dimension(shape, (2, 160, 10), 2) is None


# --- sorting works along the last dimension unless it is told another


sorts = {
    'sort': lambda y: y.sort()[0],
    'torch.sort': lambda y: torch.sort(y, descending=True).values,
    'argsort': lambda y: y.argsort() * 1.0,
    'sort of channels': lambda y: y.sort(1)[0],
}


@pytest.mark.parametrize('name', sorts)
def test_sorting_along_the_columns(name):
    torch.manual_seed(0)
    net = Apply(lambda m, x: sorts[name](m.layers[0](x)), nn.Conv2d(3, 4, 3, padding=1)).double()
    x = torch.randn(1, 3, 20, 18, dtype=torch.double, requires_grad=True)
    if name == 'argsort':  # which has no gradient
        assert torch.equal(stream(net, 6, direction='rows')(x), net(x))
    else:
        assert compare(net, x, 6, direction='rows') is None


def test_sorting_along_the_rows_is_refused():
    net = Apply(lambda m, x: m.layers[0](x).sort()[0], nn.Conv2d(3, 4, 3))
    with pytest.raises(StreamingError, match='works along the rows'):
        stream(net, 6, direction='columns')(torch.rand(1, 3, 15, 20))


# --- bins


@pytest.mark.parametrize('count,height', [(1, 7), (3, 10), (4, 4), (7, 5), (5, 1), (6, 23)])
def test_bins_are_those_of_pytorch(count, height):
    bins = Bins(count, height)
    x = torch.rand(1, 1, height, 1, dtype=torch.double, requires_grad=True)
    means = F.adaptive_avg_pool2d(x, (count, 1)).flatten()
    for (top, bottom), mean in zip(bins.edges, means):
        (gradient,) = torch.autograd.grad(mean, x, retain_graph=True)
        rows = gradient.flatten().nonzero()[:, 0].tolist()
        assert rows == list(range(top, bottom))


@pytest.mark.parametrize('count,height', [(1, 7), (3, 10), (7, 5), (6, 23)])
@pytest.mark.parametrize('strip', [1, 2, 4, 30])
def test_each_row_of_a_bin_lies_in_one_strip(count, height, strip):
    bins = Bins(count, height)
    rows = [[] for _ in range(count)]
    for first in range(0, height, strip):
        parts = bins.in_rows(first, min(first + strip, height))
        for found, part in zip(rows, parts):
            new = range(first + part.low, first + part.high)
            assert part.is_empty == (not new)
            assert part.is_empty or part.is_continued == bool(found)
            found += new
    assert rows == [list(range(top, bottom)) for top, bottom in bins.edges]
