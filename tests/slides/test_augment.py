"Augmented pixels are those of the formula, and the same in every process."

import math
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext

import numpy as np
import pytest
import pyvips
from scipy import ndimage

from streaming_pathology.core import InputError
from streaming_pathology.slides.augment import (
    GREY,
    STEP,
    Augmentation,
    augment,
    augmented_checksum,
    augmented_size,
    background,
    color_matrix,
    displacement,
    linear_map,
    pixels,
)
from streaming_pathology.slides.synthetic import paint_biopsy

OFF = dict(flip=False, rotate=0, scale=0, elastic=0, hue=0, saturation=0, brightness=0, stain=0)
NOTHING = Augmentation(**OFF).draw(0, 0, 'a')  # a record that changes nothing
NOISE = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)


def changed(image, size=None, **changes):
    "An image with some numbers of the record changed, uint8 (height, width, 3)."
    return pixels(augment(image, {**NOTHING, **changes}, size)).transpose(1, 2, 0)


@pytest.fixture(scope='module')
def smooth():
    "A smooth image, whose pixels hardly depend on how they are interpolated."
    rng = np.random.default_rng(0)
    channels = [ndimage.gaussian_filter(rng.normal(0, 900, (300, 420)), 6) for _ in range(3)]
    return (np.stack(channels, -1) + 128).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def biopsy():
    "A painted biopsy on white."
    painted = paint_biopsy((140, 380), spacing=4.0, tumour_fraction=0.3, seed=5)
    return np.where(painted.mask[..., None] > 0, painted.image, 255).astype(np.uint8)


# ---- places


def test_mirrors_are_exact():
    np.testing.assert_array_equal(changed(NOISE), NOISE)
    np.testing.assert_array_equal(changed(NOISE, mirror_rows=True), NOISE[::-1])
    both = changed(NOISE, mirror_rows=True, mirror_columns=True)
    np.testing.assert_array_equal(both, NOISE[::-1, ::-1])


def test_a_mirrored_image_is_cut_and_padded_about_its_middle():
    cut = changed(NOISE, (50, 200), mirror_columns=True)
    np.testing.assert_array_equal(cut[:, 35:165], NOISE[20:70, ::-1])


@pytest.mark.parametrize('angle, quarters', [(90.0, 1), (180.0, 2), (-90.0, -1)])
def test_quarter_turns_are_exact_but_for_rounding(angle, quarters):
    turned = changed(NOISE, angle=angle).astype(int)
    assert abs(turned - np.rot90(NOISE, quarters)).max() <= 1


def read_linearly(image, points, **options):
    "Channels of an image at points (height, width, 2), by linear interpolation in float64."
    at = np.moveaxis(points, -1, 0)
    channels = np.moveaxis(image.astype(float), -1, 0)
    found = [ndimage.map_coordinates(channel, at, order=1, **options) for channel in channels]
    return np.stack(found, -1)


@pytest.mark.parametrize('seed', range(6))
def test_pixels_are_those_of_the_formula(smooth, seed):
    "Computed at every pixel; outside the old image is the background."
    settings = dict(scale=0.3, elastic=6.0, grain=60.0, hue=0, saturation=0, brightness=0)
    record = Augmentation(**settings).draw(seed, 0, 'a')
    size = np.array(smooth.shape[:2])
    new_size = augmented_size(record, smooth.shape[:2])
    found = changed(smooth, **record)
    grid = tuple(len(range(0, n + STEP, STEP)) for n in new_size)
    new_points = np.stack(np.meshgrid(*map(np.arange, new_size), indexing='ij'), -1).astype(float)
    elastic = read_linearly(displacement(record, grid), new_points / STEP)
    moved = new_points - (np.array(new_size) - 1) / 2 + elastic
    points = moved @ np.linalg.inv(linear_map(record)).T + (size - 1) / 2
    reference = read_linearly(smooth, points, cval=255.0, mode='constant')
    inside = ((points > 1) & (points < size - 2)).all(-1)
    assert abs(found - reference)[inside].max() <= 2
    outside = ((points < -2) | (points > size + 1)).any(-1)
    assert (found[outside] == 255).all()


@pytest.mark.parametrize('rotate', [0, 20, 45, 90, 300])
def test_reach_is_the_largest_size(rotate):
    augmentation = Augmentation(rotate=rotate, scale=0.1)
    records = [augmentation.draw(0, epoch, 'a') for epoch in range(400)]
    sizes = np.array([augmented_size(record, (300, 100)) for record in records])
    reach = np.array(augmentation.reach((300, 100)))
    assert (sizes <= reach).all()
    assert (sizes.max(0) > 0.97 * reach).all()


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (33, 7)])
def test_tiny_images(size):
    record = Augmentation().draw(1, 1, 'c')
    image = np.full((*size, 3), 9, np.uint8)
    assert pixels(augment(image, record)).shape[1:] == augmented_size(record, size)
    assert pixels(augment(image, record, (5, 5))).shape == (3, 5, 5)


# ---- colours


def test_almost_no_change_of_color_changes_nothing():
    found = changed(NOISE, hue=1e-9, saturation=1 + 1e-6).astype(int)
    assert abs(found - NOISE).max() <= 1


def test_grey_stays_grey():
    grey = np.repeat(NOISE[..., :1], 3, axis=2)
    found = changed(grey, hue=40.0, saturation=1.5, brightness=0.9).astype(int)
    assert np.ptp(found, axis=2).max() <= 1


def test_the_color_matrix_is_the_formula():
    grey = np.outer(np.ones(3), GREY)
    no_color = color_matrix({**NOTHING, 'saturation': 0.0})
    np.testing.assert_allclose(no_color, grey, rtol=0, atol=1e-12)
    darker = color_matrix({**NOTHING, 'brightness': 0.8})
    np.testing.assert_allclose(darker, 0.8 * np.eye(3), rtol=0, atol=1e-12)


def test_a_third_of_the_color_circle_takes_red_to_green_to_blue():
    "Less their grey."
    turn = color_matrix({**NOTHING, 'hue': 120.0})
    swap = np.roll(np.eye(3), 1, 0)
    np.testing.assert_allclose(turn - turn[0], swap - swap[0], rtol=0, atol=0.6)


@pytest.mark.parametrize('seed', range(20))
def test_the_background_has_the_color_that_background_tells(biopsy, seed):
    record = Augmentation(stain=0.2, brightness=0.2).draw(seed, 0, 'b')
    image = pixels(augment(biopsy, record, (600, 600)))
    color = background(record)
    edge = np.unique(image[:, :20].reshape(3, -1), axis=1)
    assert edge.ravel().tolist() == list(color)
    assert np.ptp(color) <= 1


# ---- the same everywhere


def test_every_process_has_the_same_pixels(smooth, tmp_path):
    "In any order, and from a file of tiles as from memory."
    pyvips.Image.new_from_array(smooth).tiffsave(
        str(tmp_path / 'a.tif'), tile=True, tile_width=128, tile_height=128, compression='deflate'
    )
    here = {}
    for key in ((0, 'a'), (0, 'b'), (1, 'a'), (1, 'b')):
        record = Augmentation(stain=0.1).draw(7, *key)
        here[key] = zlib.crc32(pixels(augment(smooth, record, (500, 300))))
    assert len(set(here.values())) == 4
    with ProcessPoolExecutor(2, SpawnContext()) as pool:  # each with hashes of its own
        there = {
            key: pool.submit(augmented_checksum, tmp_path / 'a.tif', (500, 300), 7, *key, stain=0.1)
            for key in reversed(here)
        }
        assert {key: future.result() for key, future in there.items()} == here


# ---- what is refused


@pytest.mark.parametrize(
    'setting',
    [
        dict(rotate=-1),
        dict(hue=1.1),
        dict(brightness=1.0),
        dict(grain=1e5),
        dict(scale=math.nan),
        dict(elastic='much'),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match='of an augmentation'):
        Augmentation(**setting)


def test_a_number_of_numpy_is_a_setting():
    assert Augmentation(rotate=np.float32(3)).rotate == 3


@pytest.mark.parametrize(
    'image, problem',
    [
        (NOISE[..., 0], 'uint8'),
        (NOISE.astype(float), 'uint8'),
        (pyvips.Image.new_from_array(NOISE[..., 0].copy()), 'three bands'),
    ],
    ids=['grey', 'float', 'one band'],
)
def test_other_images_are_refused(image, problem):
    with pytest.raises(InputError, match=problem):
        augment(image, NOTHING)


@pytest.mark.parametrize('color', [(300, 0, 0), 'white'], ids=str)
def test_what_is_no_color_is_refused(color):
    with pytest.raises(InputError, match='is no colour'):
        augment(NOISE, NOTHING, color=color)
    with pytest.raises(InputError, match='is no colour'):
        background(NOTHING, color=color)


@pytest.mark.parametrize('record', [{}, {'angle': 0}, None], ids=str)
def test_what_is_no_record_is_refused(record):
    with pytest.raises(InputError, match='is no record'):
        augment(NOISE, record)


@pytest.mark.parametrize('size', [(0, 5), 7], ids=str)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match='is no size'):
        augment(NOISE, NOTHING, size)


@pytest.mark.parametrize('seed', [-1, 1.5, None, 'x'])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(InputError, match='is no seed'):
        Augmentation().draw(seed, 0, 'a')
