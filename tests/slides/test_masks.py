"Masks from files: numbers as they are stored, whatever the file shows them as."

import warnings

import numpy as np
import pytest
import pyvips
import tifffile
import tiffs
from PIL import Image
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.slides.masks import (
    class_numbers,
    invert_mask,
    looks_inverted,
    numbers_in,
    tissue_from_file,
)
from streaming_pathology.slides.readers import forget_operations
from streaming_pathology.slides.tissue import find_tissue, tissue_mask

WHITE, RED, PURPLE = (255, 255, 255), (200, 30, 30), (128, 0, 128)


def classes_of(size):
    "Numbers of classes: 1 in a box, 3 in another, else 0."
    height, width = size
    numbers = np.zeros(size, np.uint8)
    numbers[height // 5 : height // 2, width // 4 : width // 2] = 1
    numbers[height // 2 : height - 9, width // 2 : width - 11] = 3
    return numbers


def pixels_of(tissue):
    "Pixels of a slide whose tissue, bool (height, width), is darker than the glass."
    return np.where(tissue[..., None], (180, 110, 160), (243, 243, 243)).astype(np.uint8)


@pytest.fixture(params=[(200, 260), (123, 317)], ids=str)
def classes(request):
    return classes_of(request.param)


def write_palette_png(path, classes):
    picture = Image.fromarray(classes).convert('P')
    picture.putpalette([*WHITE, *RED, *PURPLE, *WHITE])
    picture.save(path, format='png')
    return path


def write_palette_tiff(path, classes):
    colors = np.full((3, 256), 65535, np.uint16)
    colors[:, 1] = 9
    kwargs = dict(photometric='palette', colormap=colors, compression='adobe_deflate')
    tifffile.imwrite(path, classes, tile=(64, 64), **kwargs)
    return path


@pytest.mark.parametrize('write', [write_palette_png, write_palette_tiff])
def test_a_palette_with_white_for_the_background(tmp_path, classes, write):
    path = write(tmp_path / 'mask', classes)
    assert (tissue_from_file(path, 8.0, classes.shape) == (classes > 0)).all()
    assert numbers_in(path) == [0, 1, 3]
    assert (class_numbers(path, 8.0, classes.shape) == classes).all()


def test_one_bit_with_white_as_0_is_what_it_looks_like(tmp_path, classes):
    "The tissue is white in both files."
    tissue = classes > 0
    tifffile.imwrite(tmp_path / 'black.tif', tissue, photometric='minisblack')
    tifffile.imwrite(tmp_path / 'white.tif', ~tissue, photometric='miniswhite')
    for name in ('black.tif', 'white.tif'):
        assert (tissue_from_file(tmp_path / name, 8.0, tissue.shape) == tissue).all()


def test_numbers_with_white_as_0_are_refused(tmp_path, classes):
    tifffile.imwrite(tmp_path / 'a.tif', classes, photometric='miniswhite')
    text = refusal(tissue_mask, pixels_of(classes > 0), source=tmp_path / 'a.tif')
    assert 'a.tif is stored with white as 0 (MinIsWhite)' in text and 'as PNG' in text


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_labels_of_16_bits(tmp_path, classes, name):
    "Numbers of objects, of which the lower 8 bits may be 0."
    labels = classes.astype(np.uint16) * 256
    labels[classes == 3] = 40_000
    if name == 'a.png':
        Image.fromarray(labels).save(tmp_path / name)
    else:
        tifffile.imwrite(tmp_path / name, labels, tile=(32, 48), compression='adobe_deflate')
    assert (tissue_from_file(tmp_path / name, 8.0, labels.shape) == (classes > 0)).all()
    assert numbers_in(tmp_path / name) == [0, 256, 40_000]


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_a_pyramid_with_sparse_tiles(tmp_path, classes, kind):
    "What is left out is 0, in the tissue and in the numbers."
    path = tmp_path / 'a.tif'
    numbers = classes.astype(kind) + kind(1)
    options = dict(tile=True, tile_width=64, tile_height=64, pyramid=True, region_shrink='nearest')
    pyvips.Image.new_from_array(numbers).tiffsave(str(path), compression='deflate', **options)
    columns = -(-classes.shape[1] // 64)
    tiffs.leave_out(path, [0, columns + 1])
    numbers[:64, :64] = 0
    numbers[64:128, 64:128] = 0
    assert (class_numbers(path, 8.0, classes.shape) == numbers).all()
    assert (tissue_from_file(path, 8.0, classes.shape) == (numbers > 0)).all()
    assert numbers_in(path) == [0, 1, 2, 4]


# ---- masks that mark the glass


def warned(slide, **kwargs):
    "The mask of tissue, and the warnings."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        mask, _ = tissue_mask(slide, **kwargs)
    return mask, [str(each.message) for each in told]


def test_an_inverted_mask_is_told_once_with_the_way_out(tmp_path, classes):
    tissue, path = classes > 0, tmp_path / 'glass.png'
    Image.fromarray(~tissue * np.uint8(255)).save(path)
    mask, (text,) = warned(pixels_of(tissue), smallest=0, source=path)
    assert (mask == ~tissue).all()
    share = round(100 * (~tissue).mean())
    assert text.startswith(f'{path} marks {share}% of the slide') and 'invert_mask' in text
    invert_mask(path, tmp_path / 'tissue.png')
    mask, told = warned(pixels_of(tissue), smallest=0, source=tmp_path / 'tissue.png')
    assert (mask == tissue).all() and not told


def test_a_mask_up_to_the_border_is_not_inverted_where_the_tissue_is(tmp_path, classes):
    "As of a biopsy that was cut out without a margin."
    tissue = classes == 0
    assert looks_inverted(tissue)
    Image.fromarray(tissue * np.uint8(255)).save(tmp_path / 'a.png')
    assert find_tissue(pixels_of(tissue), source=tmp_path / 'a.png').notes == []


def test_an_inverted_mask_is_written_as_png(tmp_path, classes):
    write_palette_png(tmp_path / 'a', classes)
    assert 'ends with .png' in refusal(invert_mask, tmp_path / 'a', tmp_path / 'b.tif')


# ---- numbers of classes


def test_a_mask_file_that_changed_is_read_anew(tmp_path):
    "libvips keeps what it has opened; and nothing of a mask stays open."
    forget_operations()
    for number in (1, 2):
        pixels = np.full((50, 40), number, np.uint8)
        tifffile.imwrite(tmp_path / 'mask.tif', pixels, tile=(16, 16))
        assert numbers_in(tmp_path / 'mask.tif') == [number]
        assert (class_numbers(tmp_path / 'mask.tif', 8.0, (50, 40)) == number).all()
    assert pyvips.cache_get_size() == 0


@pytest.mark.parametrize(
    'pixels, name, says',
    [
        (np.ones((9, 9, 3), np.uint8), 'rgb.png', 'has colours'),
        (np.zeros((9, 9, 4), np.uint8), 'rgba.png', 'has 4 channels'),
        (np.zeros((9, 9), np.uint8), 'grey.jpg', 'is a JPEG'),
        (np.zeros((9, 9), np.float32), 'real.tif', 'of the type float'),
    ],
    ids=['rgb', 'rgba', 'jpeg', 'float'],
)
def test_numbers_of_classes_are_exact_or_refused(tmp_path, pixels, name, says):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(InputError, match=says):
        numbers_in(tmp_path / name)
    with pytest.raises(InputError, match=says):
        class_numbers(tmp_path / name, 8.0, (9, 9))


def test_numbers_of_classes_in_the_red_channel(tmp_path, classes):
    "As in the masks of PANDA, whose green and blue are empty."
    rgb = np.zeros((*classes.shape, 3), np.uint8)
    rgb[..., 0] = classes
    tifffile.imwrite(tmp_path / 'mask.tiff', rgb, photometric='rgb', tile=(16, 16))
    assert numbers_in(tmp_path / 'mask.tiff') == np.unique(classes).tolist()
    assert (class_numbers(tmp_path / 'mask.tiff', 8.0, classes.shape) == classes).all()
