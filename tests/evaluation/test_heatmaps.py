"Maps that are coarser than the image, and what is done with a map."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.engine.stream import stream
from streaming_pathology.evaluation.heatmaps import (
    Grid,
    attention_map,
    check_map,
    class_activation,
    color_map,
    fit_map,
    high_value,
    load_heatmap,
    occlusion,
    overlay,
    patch_heatmap,
    plot_heatmap,
    pool_map,
    save_heatmap,
)
from streaming_pathology.mil.bags import Bag
from streaming_pathology.training.models import StreamingClassifier

pytestmark = pytest.mark.usefixtures('small_resnet')


@pytest.fixture(scope='module')
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 150, 230), generator=generator, dtype=torch.uint8).double()


class Dark(nn.Module):
    "A logit that is the share of dark values."

    def forward(self, x):
        return (x < 128).double().mean((1, 2, 3))[:, None]


class First(nn.Module):
    "A model of patches that gives each the value of its first pixel."

    def relevance(self, bag):
        return bag.patches()[:, 0, 0, 0] / 255


# ---- class activation and attention


@pytest.mark.parametrize('pool', ['max', 'attention'])
def test_class_activation_of_other_heads(x, pool):
    net = StreamingClassifier('resnet18', strip=64, pool=pool).double()
    assert class_activation(net, x).shape == (5, 8)


def test_class_activation_refuses_other_models_and_outputs(x):
    net = StreamingClassifier('resnet18', strip=64).double()
    with pytest.raises(InputError, match='target=2'):
        class_activation(net, x, target=2)
    with pytest.raises(InputError, match='no features'):
        class_activation(nn.Flatten(), x)


def test_attention_leaves_the_model_as_it_was_and_refuses_others(x):
    net = StreamingClassifier('resnet18', strip=64, pool='attention').double()
    attention_map(net, x)
    assert all(parameter.requires_grad for parameter in net.head.parameters())
    with pytest.raises(InputError, match="pool='attention'"):
        attention_map(StreamingClassifier('resnet18', strip=64).double(), x)
    with pytest.raises(InputError, match='is no StreamingClassifier'):
        attention_map(nn.Flatten(), x)


# ---- occlusion and patches


def test_occlusion_finds_dark_pixels():
    image = torch.full((3, 40, 60), 200.0)
    image[:, 8:16, 20:28] = 10
    heat = occlusion(Dark(), image, size=8, stride=8)
    expected = np.zeros((5, 8))
    expected[1, 2], expected[1, 3] = 0.5, 0.5
    expected *= 64 / 2400
    assert np.allclose(heat, expected, rtol=0, atol=1e-7)


def test_occlusion_in_colored_glass_and_signed():
    image = torch.full((3, 40, 60), 200.0)
    falls = occlusion(Dark(), image, size=8, glass=(0, 255, 255), signed=True)
    assert falls.shape == (10, 15)
    assert falls.max() < 0  # a third of the values becomes dark, so the logit rises
    assert not occlusion(Dark(), image, size=8, glass=(0, 255, 255)).any()


def test_occlusion_streamed_equals_the_plain_network():
    image = torch.full((3, 40, 60), 200.0)
    image[:, 8:16, 20:28] = 10
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    streamed = occlusion(stream(net, strip=16), image, size=16)
    assert np.allclose(streamed, occlusion(net, image, size=16), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'setting, message',
    [
        (dict(size=8, stride=9), 'leaves gaps'),
        (dict(size=0), 'size is 0'),
        (dict(size=8, stride=0), 'stride is 0'),
    ],
)
def test_occlusion_refuses_what_is_out_of_range(setting, message):
    with pytest.raises(InputError, match=message):
        occlusion(Dark(), torch.zeros(3, 40, 60), **setting)


def test_no_patch_no_heat():
    image = torch.full((3, 96, 192), 255, dtype=torch.uint8)
    heat = patch_heatmap(First(), Bag(image, torch.tensor([[0, 0, 1]]), 32))
    assert heat.shape == (6, 12)
    assert np.array_equal(heat[:2, :2], np.ones((2, 2)))
    assert not heat[2:].any() and not heat[:, 2:].any()


def test_patches_of_two_magnifications_are_averaged():
    image = torch.zeros(3, 96, 192, dtype=torch.uint8)
    image[:, :, :64] = 255
    positions = torch.tensor([[0, 0, 2], [0, 64, 1], [0, 0, 1]])
    heat = patch_heatmap(First(), Bag(image, positions, 32), cell=32)
    assert np.array_equal(heat[:2, :3], [[1, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize('cell', [0, 0.5, 1.5])
def test_cells_of_patches_are_whole_pixels(cell):
    bag = Bag(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[0, 0, 1]]), 32)
    with pytest.raises(InputError, match=f'cell={cell}'):
        patch_heatmap(First(), bag, cell)


def test_cells_may_be_a_float_that_is_whole():
    bag = Bag(torch.full((3, 64, 64), 255, dtype=torch.uint8), torch.tensor([[0, 0, 1]]), 32)
    assert np.array_equal(patch_heatmap(First(), bag, 16.0), patch_heatmap(First(), bag, 16))


# ---- smaller maps


@pytest.mark.parametrize(
    'bad, message',
    [
        (np.zeros((2, 2, 2)), '(H, W)'),
        (np.array([['a']]), '(H, W)'),
        (np.zeros((0, 3)), '(H, W)'),
        ([[np.nan]], 'not finite'),
        ([[-1.0]], 'negative'),
    ],
)
def test_what_is_no_map_is_refused(bad, message):
    for function in (check_map, lambda heat: pool_map(heat, 2), fit_map, color_map):
        with pytest.raises(InputError) as refused:
            function(bad)
        assert message in str(refused.value)


def test_factors_are_whole_pixels():
    with pytest.raises(InputError, match='factor=0.5'):
        pool_map([[1]], 0.5)


@pytest.mark.parametrize('factor', [1, 2, 3, 5, 7, 50])
def test_the_last_window_may_be_smaller(factor):
    heat = np.random.default_rng(factor).random((11, 17))
    last = heat[(10 // factor) * factor :, (16 // factor) * factor :]
    assert abs(pool_map(heat, factor)[-1, -1] - last.mean()) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    factor=st.integers(1, 80),
)
def test_pooling_keeps_the_mean(seed, h, w, factor):
    heat = np.random.default_rng(seed).random((h, w)).astype(np.float32)
    pooled = pool_map(heat, factor)
    rows, columns = -(-h // factor), -(-w // factor)
    assert pooled.shape == (rows, columns)
    for row, column in [(0, 0), (rows - 1, columns - 1)]:
        top, left = row * factor, column * factor
        window = heat[top : top + factor, left : left + factor]
        assert abs(pooled[row, column] - window.mean()) < 1e-6
    fitted = fit_map(heat, 20)
    assert max(fitted.shape) <= 20
    assert heat.min() - 1e-6 <= fitted.min()
    assert fitted.max() <= heat.max() + 1e-6


# ---- where the cells lie


def test_a_grid_on_another_size_keeps_its_extent():
    grid = Grid.of_cells((103, 157), (7, 10), 16, spacing=0.5)
    assert grid.extent == (112 / 103, 160 / 157)
    large = grid.on((206, 314))
    assert large.extent == pytest.approx(grid.extent)
    assert (large.cell, large.spacing) == ((32, 32), 0.25)
    assert Grid.over((103, 157), (7, 10)).extent == pytest.approx((1, 1))


@pytest.mark.parametrize('shape', [(4, 10), (8, 10), (7, 12)])
def test_a_map_that_does_not_fit_its_cells_is_refused(shape):
    with pytest.raises(InputError, match='does not lie on an image of 103 x 157'):
        Grid.of_cells((103, 157), shape, 16)


def weights(cell, number, n_cells, side, image):
    """How much of a cell there is at each of `side` pixels of an image whose `image` pixels have
    cells of `cell`: it falls off to the middles of its neighbours, and stays at the border."""
    place = (np.arange(side) + 0.5) * image / side / cell
    place = np.clip(place, 0.5, n_cells - 0.5)
    return np.clip(1 - abs(place - number - 0.5), 0, None)


@pytest.mark.parametrize('image', [(103, 157), (97, 160), (40, 33)])
@pytest.mark.parametrize('scale', [1, 3.3])
def test_a_cell_is_drawn_where_it_lies(image, scale):
    "In pixels, also the last one, of which a part or less than half is in the image."
    step, blue = 16, np.array([200, 37])  # of the background, of full colour
    shape = tuple(-(-side // step) for side in image)
    size = tuple(round(side * scale) for side in image)
    for row, column in [(0, 0), (1, 1), (shape[0] - 1, shape[1] - 1), (0, shape[1] - 1)]:
        heat = np.zeros(shape)
        heat[row, column] = 1
        rgb = np.full((*size, 3), 200, np.uint8)
        drawn = overlay(rgb, heat, 1.0, 1.0, grid=Grid.of_cells(image, shape, step))
        opacity = (blue[0] - drawn[..., 2].astype(float)) / (blue[0] - blue[1])
        expected = np.outer(
            weights(step, row, shape[0], size[0], image[0]),
            weights(step, column, shape[1], size[1], image[1]),
        )
        assert abs(opacity - expected).max() < 0.03


def test_a_map_that_ends_before_its_image_is_not_stretched():
    "As those of networks without padding."
    grid = Grid.of_cells((50, 64), (2, 4), 16)
    drawn = overlay(np.full((50, 64, 3), 200, np.uint8), np.ones((2, 4)), 1.0, 1.0, grid=grid)
    assert (drawn[:24] != 200).any(-1).all() and (drawn[42:] == 200).all()


@pytest.mark.parametrize('image', [(103, 157), (97, 160), (40, 33)])
@pytest.mark.parametrize('max_side', [512, 5])
def test_a_fitted_map_covers_the_image_and_no_more(image, max_side):
    "Its value is the mean over the pixels of the image in each of its parts."
    step = 16
    shape = tuple(-(-side // step) for side in image)
    heat = np.random.default_rng(0).random(shape).astype(np.float32)
    pixels = heat.repeat(step, 0).repeat(step, 1)[: image[0], : image[1]]
    fitted = fit_map(heat, max_side, Grid.of_cells(image, shape, step))
    rows, columns = fitted.shape
    assert max(fitted.shape) <= max_side
    for row, column in [(0, 0), (rows - 1, columns - 1)]:
        fine = pixels.repeat(rows, 0).repeat(columns, 1)
        part = fine[row * image[0] : (row + 1) * image[0], column * image[1] :][:, : image[1]]
        assert abs(fitted[row, column] - part.mean()) < 1e-5


# ---- over the tissue


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(1, 30), w=st.integers(1, 30))
def test_overlay_changes_only_where_the_map_is_not_zero(seed, h, w):
    rng = np.random.default_rng(seed)
    heat = rng.random((h, w)).astype(np.float32)
    rgb = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    heat[:, : w // 2] = 0
    drawn = overlay(rgb, heat)
    assert drawn.shape == rgb.shape
    assert np.array_equal(drawn[:, : w // 2], rgb[:, : w // 2])
    # a power of two rounds nothing
    assert np.array_equal(color_map(heat), color_map(heat * 1024))


def test_overlay_refuses_other_images_and_opacities():
    rgb, heat = np.zeros((4, 4, 3), np.uint8), np.ones((2, 2))
    with pytest.raises(InputError, match='uint8'):
        overlay(rgb / 255, heat)
    with pytest.raises(InputError, match='alpha=2'):
        overlay(rgb, heat, alpha=2)


def test_full_color_begins_at_the_percentile_or_at_the_highest_value():
    assert color_map(np.ones((4, 4)))[..., 3].min() == 255
    assert color_map(np.eye(40))[..., 3].max() == 255
    lonely = np.zeros((40, 40))
    lonely[0, 0] = 1  # the percentile is 0
    assert color_map(lonely)[0, 0, 3] == 255
    assert not color_map(np.zeros((4, 4)))[..., 3].any()


def test_plot_draws_into_the_axis_that_it_returns():
    rgb, heat = np.zeros((4, 6, 3), np.uint8), np.ones((2, 3))
    fig, ax = plt.subplots()
    assert plot_heatmap(rgb, heat, ax, 'title') is ax
    assert ax.get_title() == 'title'
    new = plot_heatmap(rgb, heat, alpha=1)
    assert new is not ax
    assert np.array_equal(new.images[0].get_array(), overlay(rgb, heat, alpha=1))
    plt.close(fig)
    plt.close(new.figure)


# ---- files


def test_damaged_files_are_refused_by_name(tmp_path):
    heat = np.random.default_rng(0).random((12, 24)).astype(np.float32)
    path = save_heatmap(tmp_path / 'a.npy', heat)
    assert np.array_equal(load_heatmap(path), heat)
    with pytest.raises(InputError, match='b.npy does not exist'):
        load_heatmap(tmp_path / 'b.npy')
    for content in (path.read_bytes()[:200], b'no', b''):
        path.write_bytes(content)
        with pytest.raises(InputError, match='a.npy is no heatmap'):
            load_heatmap(path)
    np.save(path, -heat)
    with pytest.raises(InputError, match='a.npy has values'):
        load_heatmap(path)


def test_a_high_value_is_of_what_is_covered():
    heat = np.zeros((100, 100), np.float32)
    assert high_value(heat) == high_value(heat, on_tissue=True) == 0
    heat[0, :4] = 1, 2, 3, 4  # less than half a percent of the cells
    assert high_value(heat, on_tissue=True) == pytest.approx(np.percentile([1, 2, 3, 4], 99.5))
