"""Regions at any spacing against a plain integral of the pixels; levels, threads and processes;
checks of arguments; libvips' settings."""

import gc
import math
import pickle
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streaming_pathology.core import InputError
from streaming_pathology.slides.readers import forget_operations, sample_slide
from streaming_pathology.slides.slides import (
    PixelRows,
    Slide,
    checked_color,
    checked_flag,
    checked_number,
    checked_pixels,
    checked_size,
    read_in_worker,
)

TILED = dict(tile=True, tile_width=128, tile_height=128, compression='deflate')
KINDS = {
    'pages.tif': dict(pyramid=True, **TILED),
    'children.tif': dict(pyramid=True, subifd=True, **TILED),
    'big.tif': dict(bigtiff=True, pyramid=True, **TILED),
    'onelevel.tif': TILED,
    'strips.tif': dict(compression='lzw'),
}


def save_tiff(pixels, path, spacing=0.5, **kwargs):
    per_mm = 1000 / spacing
    image = pyvips.Image.new_from_array(pixels).copy(xres=per_mm, yres=per_mm)
    image.tiffsave(str(path), resunit='cm', **kwargs)
    return path


@pytest.fixture(scope='module')
def blocks():
    "Grey blocks of 16 x 16 pixels, so that every level of a pyramid of them is exact."
    values = np.random.default_rng(0).integers(0, 256, (80, 61, 1), dtype=np.uint8)
    return np.kron(values, np.ones((16, 16, 3), np.uint8))


@pytest.fixture(scope='module')
def flat_file(tmp_path_factory):
    return tmp_path_factory.mktemp('flat') / 'flat.png'


@pytest.fixture
def slide():
    with Slide(sample_slide()) as slide:
        yield slide


# ---- pixels


def shares(size, start, count, factor):
    "(count, size): the share of each pixel in each window; and the share that lies outside."
    edges = (start + np.arange(count + 1)) * factor
    pixel = np.arange(size)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    inside = np.clip(covered, 0, None) / factor
    return inside, 1 - inside.sum(1)


def reference_read(pixels, factor, region):
    "The region by a plain integral over the whole image in float64, white outside."
    top, left, height, width = region
    down, _ = shares(pixels.shape[0], top, height, factor)
    across, _ = shares(pixels.shape[1], left, width, factor)
    covered = down.sum(1)[:, None] * across.sum(1)[None]
    means = np.einsum('ab,bcd,ec->aed', down, pixels.astype(float), across)
    return means + 255 * (1 - covered)[..., None]


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.92, 4),
    st.tuples(st.integers(-5, 30), st.integers(-5, 30), st.integers(1, 20), st.integers(1, 20)),
)
def test_flat_images(flat_file, height, width, factor, region):
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(flat_file)
    found = Slide(flat_file, spacing=2.0).read(2.0 * factor, region)
    assert abs(found - reference_read(pixels, factor, region)).max() <= 0.75


def test_nearly_twice_as_coarse_is_not_twice_as_coarse(tmp_path):
    path = tmp_path / 'one.png'
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(path)
    found = Slide(path, spacing=2.0).read(2 * 2.125, (0, 0, 1, 1))
    assert found.ravel()[0] == round(255 * (1 - 1 / 2.125**2))


@pytest.mark.parametrize('name', KINDS)
def test_pyramids_against_their_levels(blocks, tmp_path, name):
    kwargs = KINDS[name]
    with Slide(save_tiff(blocks, tmp_path / name, **kwargs)) as slide:
        assert abs(slide.spacing - 0.5) < 1e-6
        assert slide.size == blocks.shape[:2]
        assert len(slide.levels) == (5 if 'pyramid' in kwargs else 1)
        assert (slide.read(0.5) == blocks).all()
        assert (slide.read(4.0, (3, 5, 60, 40)) == blocks[::8, ::8][3:63, 5:45]).all()
        assert (slide.read(1.0, (600, 470, 60, 40))[:, 18:] == 255).all()


@pytest.mark.parametrize('name', ['grey.png', 'alpha.png', 'palette.png', 'grey.jpg'])
def test_grey_with_transparency_palette_and_jpeg(blocks, tmp_path, name):
    grey = Image.fromarray(blocks[..., 0])
    images = {'alpha.png': grey.convert('RGBA'), 'palette.png': grey.quantize(256)}
    images.get(name, grey).save(tmp_path / name, quality=95)
    found = Slide(tmp_path / name, spacing=0.5).read(0.5)
    assert abs(found.astype(int) - blocks).mean() < 1.5


def test_a_label_and_a_second_image_are_no_levels(blocks, tmp_path):
    first, label = Image.fromarray(blocks), Image.fromarray(blocks[:500, :500])
    first.save(tmp_path / 'label.tif', save_all=True, append_images=[label, first])
    assert len(Slide(tmp_path / 'label.tif', spacing=0.5).levels) == 1


def test_a_mask_of_half_the_size_is_no_level(blocks, tmp_path):
    mask = 255 * (blocks[::2, ::2] > 128).astype(np.uint8)
    for name, pixels in {'image.tif': blocks, 'mask.tif': mask}.items():
        pyvips.Image.new_from_array(pixels).tiffsave(str(tmp_path / name), **TILED)
    pages = [Image.open(tmp_path / name) for name in ('image.tif', 'mask.tif')]
    pages[0].save(tmp_path / 'masked.tif', save_all=True, append_images=pages[1:])
    assert len(Slide(tmp_path / 'masked.tif', spacing=0.5).levels) == 1


def test_contradictions_are_warned_of(blocks, tmp_path):
    path = save_tiff(blocks, tmp_path / 'pages.tif', **KINDS['pages.tif'])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert abs(Slide(path, spacing=0.25).spacing - 0.5) < 1e-5
        assert Slide(path, spacing=0.25, override=True).spacing == 0.25
        assert len(seen) == 2
        assert '0.25 by its given spacing; 0.5 is used' in str(seen[0].message)
        Slide(path, spacing=0.25, warn=False)
        assert len(seen) == 2


def test_a_small_region_of_a_large_slide_is_quick(blocks, tmp_path):
    "256 x 256 pixels out of a tiled TIFF of 8192 x 8192."
    large = pyvips.Image.new_from_array(np.tile(blocks[:512, :512], (16, 16, 1)))
    large = large.copy(xres=2000, yres=2000)
    large.tiffsave(str(tmp_path / 'large.tif'), tile=True, compression='none')
    start = time.perf_counter()
    with Slide(tmp_path / 'large.tif') as slide:
        slide.read(0.5, (5000, 5000, 256, 256))
    assert time.perf_counter() - start < 0.5


def test_a_spacing_in_float32_reads_as_its_number(slide):
    "Coordinates are not computed in float32, and nothing overflows."
    spacing, region = np.float32(1.3), (1000, 700, 60, 80)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (slide.read(spacing, region) == slide.read(float(spacing), region)).all()


# ---- threads and processes


@pytest.mark.parametrize('name', ['sample', 'pages.tif', 'grey.jpg'])
def test_a_slide_in_use_goes_to_threads_and_processes(blocks, tmp_path, name):
    if name == 'sample':
        slide = Slide(sample_slide())
    elif name == 'pages.tif':
        slide = Slide(save_tiff(blocks, tmp_path / name, **KINDS[name]))
    else:
        Image.fromarray(blocks[..., 0]).save(tmp_path / name, quality=95)
        slide = Slide(tmp_path / name, spacing=0.5)
    region = (20, 20, 50, 50)
    expected = slide.read(2.0, region)
    assert (pickle.loads(pickle.dumps(slide)).read(2.0, region) == expected).all()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: slide.read(2.0, region), range(6)):
            assert (found == expected).all()
    with get_context('fork').Pool(1) as pool:
        found = pool.apply_async(read_in_worker, (slide, 2.0, region)).get(20)
    assert (found == expected).all()


def test_what_ends_an_image_early_is_kept():
    def pixels(top, bottom):
        if top:
            raise OSError('the disk is gone')
        return np.zeros((bottom - top, 20, 3), np.uint8)

    rows = PixelRows(pixels, (600, 20))
    with pytest.raises(pyvips.Error):
        rows.image(band=100).numpy()
    assert str(rows.error) == 'the disk is gone'


# ---- libvips' cache, which belongs to the whole process


def test_an_import_leaves_the_settings_of_libvips():
    code = (
        'import pyvips; before = pyvips.cache_get_max(); '
        'import streaming_pathology.slides.tissue, streaming_pathology.slides.synthetic; '
        'assert before == pyvips.cache_get_max() > 0, pyvips.cache_get_max()'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.fixture
def setting():
    "A setting of the host's; what it is afterwards is checked."
    before = pyvips.cache_get_max()
    pyvips.cache_set_max(57)
    yield
    after = pyvips.cache_get_max()
    pyvips.cache_set_max(before)
    assert after == 57


@pytest.mark.parametrize('end', ['closed', 'forgotten'])
def test_libvips_keeps_nothing_of_a_slide(setting, blocks, tmp_path, end):
    forget_operations()
    paths = {name: save_tiff(blocks, tmp_path / name, **KINDS[name]) for name in KINDS}
    paths['flat.png'] = tmp_path / 'flat.png'
    Image.fromarray(blocks).convert('RGBA').save(paths['flat.png'])
    for path in paths.values():
        slide = Slide(path, spacing=0.5)
        slide.read(1.0, (10, 10, 300, 300))
        if end == 'closed':
            slide.close()
        else:
            del slide
            gc.collect()
        assert pyvips.cache_get_size() == 0, path


def test_libvips_keeps_nothing_of_what_is_no_slide(setting, blocks, tmp_path):
    forget_operations()
    Image.fromarray(blocks).save(tmp_path / 'flat.png')
    with pytest.raises(InputError, match='has no pixel size'):
        Slide(tmp_path / 'flat.png')
    gc.collect()
    assert pyvips.cache_get_size() == 0


# ---- checks of arguments


@pytest.mark.parametrize('kind', [np.float16, np.float32, np.float64, np.int8, np.uint64, int])
def test_numbers_of_numpy_are_checked_without_a_warning(kind):
    "The limit of 1e300 overflowed where it was compared with a float32."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert checked_number(kind(2), 'a', 0, 1e5) == 2
        assert checked_number(kind(2), 'a', open=True) == 2
        with pytest.raises(InputError, match='at least 3 and at most 100000'):
            checked_number(kind(2), 'a', 3, 1e5)
        with pytest.raises(InputError, match='above 2'):
            checked_number(kind(2), 'a', 2, open=True)


@pytest.mark.parametrize('kind', [np.float16, np.float32, np.float64, float])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(kind, value):
    with pytest.raises(InputError, match='must be a number'):
        checked_number(kind(value), 'a', -math.inf)


@pytest.mark.parametrize('value', ['2', None, True, np.bool_(True), 2j, np.array([2.0])])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InputError, match='must be a number'):
        checked_number(value, 'a')


def test_a_number_too_long_for_a_float():
    with pytest.raises(InputError, match='at most 5'):
        checked_number(10**400, 'a', 0, 5)


@pytest.mark.parametrize('value', [0, 1, None, 'yes'])
def test_what_only_counts_as_true_is_refused(value):
    assert checked_flag(np.bool_(True), 'a') is True
    with pytest.raises(InputError, match='must be True or False'):
        checked_flag(value, 'a')


def test_colors_and_sizes_of_numpy():
    assert checked_color(np.array([1, 2, 255])) == (1, 2, 255)
    assert checked_size(np.array([3, 4])) == (3, 4)


@pytest.mark.parametrize(
    'bad', [512, (0, 5), (-1, 5), (10.5, 20), (64,), (1, 2, 3), 'ab', None], ids=str
)
def test_what_is_no_size_is_refused(bad):
    with pytest.raises(InputError, match='is no size'):
        checked_size(bad)


@pytest.mark.parametrize(
    'bad',
    ['white', (256, 0, 0), (1, 2), 5, (0.5, 0, 0), (0, math.nan, 0), (-1, 0, 0), None],
    ids=str,
)
def test_what_is_no_color_is_refused(bad):
    with pytest.raises(InputError, match='is no colour'):
        checked_color(bad)


def test_a_color_is_checked_where_it_can_be_read_only_once():
    "Fractions got through where the values came from a generator."
    with pytest.raises(InputError, match='is no colour'):
        checked_color(value for value in (0.5, 0, 0))


def test_pixels_of_another_kind_are_refused():
    for pixels in (np.zeros((9, 9)), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)):
        with pytest.raises(InputError, match='uint8'):
            checked_pixels(pixels)


@pytest.mark.parametrize('region', [5, ('a', 0, 1, 1), (0, 0, np.nan, 1), (0, 0, 1)], ids=str)
def test_what_is_no_region_is_refused(slide, region):
    with pytest.raises(InputError, match='four whole numbers'):
        slide.read(2.0, region)


@pytest.mark.parametrize(
    'spacing, region, says',
    [
        (1.0, (0, 0, 10**12, 5), '100 million'),
        (1.0, (0, 0, 10**7, 10**7), 'fit into memory'),
        (None, (0, 0, 10**7, 10**7), 'fit into memory'),
        (10**400, None, 'cannot read'),
        (1e9, None, 'less than a pixel'),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(slide, spacing, region, says):
    with pytest.raises(InputError, match=says):
        slide.read(slide.spacing if spacing is None else spacing, region)


def test_a_thumbnail_without_pixels_is_refused(slide):
    with pytest.raises(InputError, match='at least 1'):
        slide.thumbnail(0)
