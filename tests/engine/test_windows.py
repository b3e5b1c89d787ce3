"Windows along one dimension: which rows they read, counted by hand and by PyTorch."

from fractions import Fraction

import pytest
import torch
from torch import nn

from streaming_pathology.engine.windows import (
    NO_PERIOD,
    Filled,
    Repeat,
    Side,
    TransposedWindow,
    Trimmed,
    Window,
    WindowTable,
    side_of,
    whole_side,
)


def rows_read(layer, height, row):
    "The input rows that reach a row of the output, found by its gradient."
    x = torch.rand(1, 1, height, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 0, row].sum(), x)
    return gradient[0, 0, :, 0].nonzero()[:, 0].tolist()


windows = {
    'convolution': (Window(3, 2, 2, (1, 1)), nn.Conv2d(1, 1, (3, 1), (2, 1), (1, 0), (2, 1))),
    'transposed': (
        TransposedWindow(5, 2, 1),
        nn.ConvTranspose2d(1, 1, (5, 1), (2, 1), (1, 0)),
    ),
}


@pytest.mark.parametrize('name', windows)
def test_rows_that_are_read(name):
    torch.manual_seed(0)
    window, layer = windows[name]
    height = 20
    height_out = layer(torch.zeros(1, 1, height, 1)).shape[2]
    for row in range(height_out):
        reads = range(*window.reads(row, row + 1), getattr(window, 'dilation', 1))
        assert rows_read(layer, height, row) == [read for read in reads if 0 <= read < height]


@pytest.mark.parametrize('name', windows)
def test_rows_that_are_complete_and_still_needed(name):
    "By trying each number of rows that have arrived."
    window, layer = windows[name]
    height = 20
    height_out = layer(torch.zeros(1, 1, height, 1)).shape[2]
    reads = [window.reads(row, row + 1) for row in range(height_out)]
    for arrived in range(1, height):
        complete = window.complete(arrived, height, height_out)
        expected = sum(stop <= arrived for _, stop in reads)
        assert complete == expected
        needed = window.still_needed(complete, arrived, height, height_out)
        left = [first for first, _ in reads[complete:]]
        assert needed == max(0, min([arrived, *left]))


def test_padding_that_cuts_off():
    side = whole_side(Window(3, pad=(-2, 1)), 8, 11)
    assert side == Side(2, 8, (Trimmed(2, 11, 11), Filled(0, 1)))
    x = torch.arange(11.0).view(1, 1, 11, 1)
    assert side.pad(x).flatten().tolist() == [*range(2, 11), 0]
    assert side.unpad(torch.ones(1, 1, 10, 1)).flatten().tolist() == [0, 0] + [1] * 9


# --- tables


def table(height, height_out, repeats=None):
    "Of an interpolation by the mean of the two nearest rows."
    scale = height / height_out
    lows = tuple(int(max((row + 0.5) * scale - 0.5, 0)) for row in range(height_out))
    highs = tuple(min(low + 1, height - 1) for low in lows)
    return WindowTable(lows, highs, height, repeats)


def test_rows_of_a_table_that_look_alike_begin_at_the_same_row():
    repeating = table(100, 160, Repeat(inputs=5, outputs=8, head=1, tail=1))
    assert repeating.stride == Fraction(5, 8)
    for first in range(1, 150):
        stop = first + 9
        alike = repeating.first_alike(first, stop)
        assert 1 <= alike <= 8 and (first - alike) % 8 == 0
        further = (first - alike) // 8 * 5
        found, expected = repeating.reads(first, stop), repeating.reads(alike, alike + 9)
        assert found == (expected[0] + further, expected[1] + further)


@pytest.mark.parametrize('first,stop', [(0, 5), (150, 160)])
def test_rows_at_the_ends_of_a_table_are_alike_to_none(first, stop):
    repeating = table(100, 160, Repeat(inputs=5, outputs=8, head=1, tail=1))
    assert repeating.first_alike(first, stop) == first


@pytest.mark.parametrize('height,height_out', [(10, 16), (100, 7), (3, 99), (50, 50), (1, 1)])
def test_a_table_that_never_repeats_has_no_period(height, height_out):
    never = table(height, height_out)
    assert never.stride.numerator == NO_PERIOD
    assert float(never.stride) == pytest.approx(height / height_out)
    assert never.first_alike(height_out - 1, height_out) == height_out - 1


def test_sides_of_tables_and_of_transposed_windows_say_where_they_begin():
    start, end, side = side_of(table(100, 160, Repeat(5, 8, 1, 1)), 9, 17, 100)
    assert (start, end) == (5, 11)
    assert (side.table_row, side.skip) == (1, 0)
    low, high, side = side_of(TransposedWindow(2, 2), 5, 9, 100)
    assert (low, high) == (2, 5)
    assert (side.table_row, side.skip) == (0, 1)
