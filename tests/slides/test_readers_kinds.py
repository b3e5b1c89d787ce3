"""What scanners and programs write that is easily read wrong: each kind of file gives the right
pixels at the right place and spacing, or is refused by what it is."""

import io
import warnings
from dataclasses import replace

import made
import numpy as np
import pytest
import pyvips
import tifffile
import tiffs
from PIL import Image, ImageCms
from pydicom import dcmread
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.slides import pixels
from streaming_pathology.slides.masks import looks_inverted, mask_image
from streaming_pathology.slides.readers import (
    OpenSlideReader,
    open_reader,
    sample_slide,
    write_tiff,
)
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.tiff import names_a_photograph, tiff_images

SIZES = [(300, 420), (517, 230), (97, 801)]
MICRONS = dict(PhysicalSizeXUnit='µm', PhysicalSizeYUnit='µm')


def ome_data(spacing=0.5, **kwargs):
    return dict(axes='YXS', PhysicalSizeX=spacing, PhysicalSizeY=spacing, **MICRONS, **kwargs)


def write_ome(path, images):
    "An OME-TIFF of images, each (pixels, name, spacing)."
    with tifffile.TiffWriter(path, ome=True) as file:
        for rgb, name, spacing in images:
            data = ome_data(spacing, Name=name) if name else ome_data(spacing)
            file.write(rgb, photometric='rgb', tile=(64, 64), metadata=data)
    return path


def says(path, **kwargs):
    "What a file is refused with, at opening."
    return refusal(Slide, path, **kwargs)


def quiet(path, **kwargs):
    "A slide, and the warnings that opening it gave."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        slide = Slide(path, **kwargs)
    return slide, [str(warning.message) for warning in seen]


# ---- 1. which image is the slide


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['macro', 'label image', 'Slide Overview', 'MacroImage'])
def test_a_photograph_before_the_slide(tmp_path, size, name):
    rgb = tiffs.pixels(size)
    photo = np.full((90, 160, 3), 9, np.uint8)
    path = write_ome(tmp_path / 'a.ome.tif', [(photo, name, 16.0), (rgb, 'slide', 0.5)])
    slide = Slide(path)
    assert slide.size == size and slide.spacing == 0.5 and not slide.contradictions
    assert (slide.read(0.5) == rgb).all()


@pytest.mark.parametrize('n_before', [0, 2])
def test_a_larger_photograph_is_not_the_slide(tmp_path, n_before):
    rgb, photo = tiffs.pixels(), np.full((900, 1600, 3), 9, np.uint8)
    images = [(photo, 'macro', 8.0), (photo, 'label', 8.0)]
    images.insert(n_before, (rgb, '', 0.5))
    assert Slide(write_ome(tmp_path / 'a.ome.tif', images)).size == rgb.shape[:2]


def test_a_file_of_photographs_is_refused(tmp_path):
    photo = np.full((90, 160, 3), 9, np.uint8)
    images = [(photo, 'label', 16.0), (photo, 'macro', 16.0)]
    assert 'only images that are named' in says(write_ome(tmp_path / 'a.ome.tif', images))
    tiffs.write(tmp_path / 'a.tif', photo, description='Macro')
    assert 'only images that are named' in says(tmp_path / 'a.tif')


def test_an_unnamed_photograph_that_is_larger_is_ambiguous(tmp_path):
    rgb, photo = tiffs.pixels(), np.full((900, 1600, 3), 9, np.uint8)
    images = [(photo, '', 8.0), (rgb, '', 0.5)]
    assert 'none is clearly the slide' in says(write_ome(tmp_path / 'a.ome.tif', images))
    pages = [(photo, tiffs.resolution(8.0)), (rgb, tiffs.resolution(0.5))]
    tiffs.write_pages(tmp_path / 'a.tif', pages)
    assert 'none is clearly the slide' in says(tmp_path / 'a.tif')
    tiffs.write_pages(tmp_path / 'b.tif', [(photo, {}), (rgb, dict(tile=(64, 64)))])
    assert 'none is clearly the slide' in says(tmp_path / 'b.tif', spacing=0.5)


def test_two_scans_in_one_file_are_ambiguous(tmp_path):
    images = [(tiffs.pixels(size), f'scan {size}', 0.5) for size in SIZES[:2]]
    assert 'none is clearly the slide' in says(write_ome(tmp_path / 'a.ome.tif', images))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('flagged', [True, False])
def test_the_smallest_page_first(tmp_path, size, flagged):
    rgb = tiffs.pixels(size)
    pages = [
        (
            rgb[::step, ::step],
            dict(
                tile=(64, 64),
                subfiletype=int(flagged and step > 1),
                **tiffs.resolution(0.5 * step),
            ),
        )
        for step in (4, 2, 1)
    ]
    slide = Slide(tiffs.write_pages(tmp_path / 'a.tif', pages))
    assert slide.size == size and abs(slide.spacing - 0.5) < 1e-6
    assert (slide.read(0.5) == rgb).all()


def test_a_largest_page_that_says_to_be_reduced_is_ambiguous(tmp_path):
    rgb = tiffs.pixels()
    pages = [(rgb[::2, ::2], {}), (rgb, dict(subfiletype=1))]
    assert 'none is clearly the slide' in says(tiffs.write_pages(tmp_path / 'a.tif', pages))


def test_a_sub_image_that_is_larger_is_ambiguous(tmp_path):
    "A raw photograph has a thumbnail as its page, and itself below it."
    rgb = tiffs.pixels()
    with tifffile.TiffWriter(tmp_path / 'a.tif') as file:
        file.write(rgb[::4, ::4], photometric='rgb', subfiletype=1, subifds=1, metadata=None)
        file.write(rgb, photometric='rgb', metadata=None)
    assert 'none is clearly the slide' in says(tmp_path / 'a.tif', spacing=0.5)


@pytest.mark.parametrize(
    'text, is_photograph',
    [
        ('label', True),
        ('Label Image', True),
        ('MacroImage', True),
        ('SLIDE OVERVIEW', True),
        ('thumbnail_1', True),
        ('CD68 macrophages', False),
        ('unlabelled control', False),
        ('', False),
    ],
)
def test_names_of_photographs(text, is_photograph):
    assert names_a_photograph(text) == is_photograph


# ---- 2. stacks and channels


def qpi(name, kind='FullResolution'):
    return (
        '<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>'
        f'<ImageType>{kind}</ImageType><Name>{name}</Name></PerkinElmer-QPI-ImageDescription>'
    )


@pytest.mark.parametrize('n', [2, 3, 5])
@pytest.mark.parametrize('size', SIZES[:2])
def test_channels_as_pages(tmp_path, n, size):
    names = ['DAPI', 'FITC', 'Cy3', 'Texas Red', 'Cy5'][:n]
    grey = tiffs.pixels(size)[..., 0]
    options = dict(photometric='minisblack', tile=(64, 64), **tiffs.resolution())
    pages = [(grey // (i + 1), dict(description=qpi(name))) for i, name in enumerate(names)]
    pages.append((grey[::4, ::4], dict(description=qpi('', 'Thumbnail'), tile=None)))
    text = says(tiffs.write_pages(tmp_path / 'a.qptiff.tif', pages, **options))
    assert f'{n} fluorescence channels (DAPI, FITC' in text


def test_channels_of_the_same_pixels(tmp_path):
    "They are channels by their names, even if nothing was stained."
    grey = tiffs.pixels()[..., 0]
    options = dict(photometric='minisblack', tile=(64, 64), **tiffs.resolution())
    pages = [(grey, dict(description=qpi(name))) for name in ('DAPI', 'FITC')]
    text = says(tiffs.write_pages(tmp_path / 'a.qptiff', pages, **options))
    assert '2 fluorescence channels (DAPI, FITC)' in text


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('size', [(512, 512), (640, 272)])
def test_channels_on_black_without_compression(tmp_path, n, size):
    "Most tiles are alike in all of them; each has a few cells at places of its own."
    pages = [np.zeros(size, np.uint8) for _ in range(n)]
    for number, page in enumerate(pages):
        page[100 + 16 * number : 110 + 16 * number, 120:130] = 200
    options = dict(photometric='minisblack', tile=(16, 16), **tiffs.resolution())
    path = tiffs.write_pages(tmp_path / 'a.tif', [(page, {}) for page in pages], **options)
    assert f'is a stack of {n} images' in says(path)


def test_an_image_that_was_written_twice_is_a_slide(tmp_path):
    rgb = np.full((320, 400, 3), 245, np.uint8)
    rgb[100:140, 200:260] = (190, 90, 140)
    path = tiffs.write_pages(
        tmp_path / 'a.tif', [(rgb, {})] * 2, tile=(16, 16), **tiffs.resolution()
    )
    assert (Slide(path).read(0.5) == rgb).all()


def test_a_qptiff_in_bright_field(tmp_path):
    rgb = tiffs.pixels((300, 420))
    pages = [
        (rgb, dict(description=qpi(''), tile=(64, 64))),
        (rgb[::8, ::8], dict(description=qpi('', 'Thumbnail'))),
        (rgb[::2, ::2], dict(description=qpi('', 'ReducedResolution'), tile=(64, 64))),
        (np.full((400, 900, 3), 9, np.uint8), dict(description=qpi('', 'Overview'))),
        (np.full((400, 900, 3), 7, np.uint8), dict(description=qpi('', 'Label'))),
    ]
    slide = Slide(tiffs.write_pages(tmp_path / 'a.tif', pages, **tiffs.resolution()))
    assert slide.size == (300, 420) and len(slide.levels) == 2
    assert (slide.read(0.5) == rgb).all()


@pytest.mark.parametrize('axes', ['ZYXS', 'TYXS', 'CYX', 'ZYX', 'ZCYX'])
def test_stacks_of_imagej(tmp_path, axes):
    rgb = tiffs.pixels((60, 80))
    images = {
        'ZYXS': np.stack([rgb, rgb]),
        'TYXS': np.stack([rgb, rgb]),
        'CYX': np.moveaxis(rgb, -1, 0),
        'ZYX': np.moveaxis(rgb, -1, 0),
        'ZCYX': np.moveaxis(np.stack([rgb, rgb]), -1, 1),
    }
    path = tmp_path / 'a.tif'
    array = np.ascontiguousarray(images[axes])
    tifffile.imwrite(path, array, imagej=True, metadata=dict(axes=axes))
    text = says(path, spacing=0.5)
    assert 'a stack of ImageJ' in text and 'image' in text


def test_one_image_of_imagej(tmp_path):
    rgb = tiffs.pixels((60, 80))
    tifffile.imwrite(tmp_path / 'a.tif', rgb, imagej=True)
    assert (Slide(tmp_path / 'a.tif', spacing=0.5).read(0.5) == rgb).all()


@pytest.mark.parametrize(
    'unit, per_micron',
    [('um', 1.0), ('micron', 1.0), ('\\u00B5m', 1.0), ('mm', 1e3), ('nm', 1e-3), ('cm', 1e4)],
)
@pytest.mark.parametrize('spacing', [0.25, 0.5])
def test_the_unit_that_imagej_keeps_in_its_description(tmp_path, unit, per_micron, spacing):
    per_unit = per_micron / spacing
    metadata = dict(unit=unit)
    resolution = (per_unit, per_unit)
    rgb = tiffs.pixels((60, 80))
    tifffile.imwrite(tmp_path / 'a.tif', rgb, imagej=True, resolution=resolution, metadata=metadata)
    slide = Slide(tmp_path / 'a.tif')
    assert slide.spacing == pytest.approx(spacing, rel=1e-4) and not slide.contradictions


@pytest.mark.parametrize('unit', ['pixel', 'parsec'])
def test_a_unit_of_imagej_that_is_no_length_of_slides(tmp_path, unit):
    metadata = dict(unit=unit)
    rgb = tiffs.pixels((60, 80))
    tifffile.imwrite(tmp_path / 'a.tif', rgb, imagej=True, resolution=(2, 2), metadata=metadata)
    assert 'has no pixel size' in says(tmp_path / 'a.tif')


@pytest.mark.parametrize('tile', [None, (64, 64)])
@pytest.mark.parametrize('n', [2, 4])
def test_pages_of_one_size(tmp_path, tile, n):
    planes = [(tiffs.pixels(seed=i), dict(tile=tile)) for i in range(n)]
    text = says(tiffs.write_pages(tmp_path / 'a.tif', planes), spacing=0.5)
    assert f'a stack of {n} images of 300 x 420 pixels' in text


def write_channels(path, n, channel):
    "An OME-TIFF with a page for each of `n` channels, of which `channel` says more."
    planes = np.moveaxis(tiffs.pixels((60, 80)), -1, 0)[:n]
    metadata = dict(axes='CYX', PhysicalSizeX=0.5, PhysicalSizeY=0.5, **MICRONS, Channel=channel)
    tifffile.imwrite(path, planes, photometric='minisblack', ome=True, metadata=metadata)


@pytest.mark.parametrize(
    'names',
    [
        ['DAPI', 'FITC', 'TRITC'],
        ['Hoechst', 'Green', 'Texas Red'],
        ['Blue', 'Green', 'Red'],
        ['', '', 'CD8'],
        ['1234567890' * 4 + ' DAPI', '', ''],
    ],
)
def test_channels_in_ome_that_are_named_otherwise(tmp_path, names):
    write_channels(tmp_path / 'a.ome.tif', 3, dict(Name=names))
    text = says(tmp_path / 'a.ome.tif')
    shown = ', '.join(name if name else 'without a name' for name in names)
    assert f'holds 3 channels ({shown}), and not red, green and blue' in text


@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize(
    'more',
    [
        dict(EmissionWavelength=[460.0] * 3, EmissionWavelengthUnit=['nm'] * 3),
        dict(Fluor=['Cy5'] * 3),
        dict(Fluor=['StarBright Blue 520'] * 3),
        dict(ContrastMethod=['Fluorescence'] * 3),
    ],
)
def test_channels_in_ome_with_stains_or_wavelengths(tmp_path, n, more):
    write_channels(tmp_path / 'a.ome.tif', n, {name: values[:n] for name, values in more.items()})
    text = says(tmp_path / 'a.ome.tif')
    assert f'holds {n} fluorescence channel' in text


@pytest.mark.parametrize(
    'more',
    [
        dict(Fluor=['TL Brightfield'] * 3),
        dict(ContrastMethod=['Brightfield'] * 3, EmissionWavelength=[550.0] * 3),
    ],
)
def test_channels_in_ome_of_white_light(tmp_path, more):
    write_channels(tmp_path / 'a.ome.tif', 3, more)
    slide, _ = quiet(tmp_path / 'a.ome.tif')
    assert (slide.read(0.5) == tiffs.pixels((60, 80))).all()


@pytest.mark.parametrize(
    'names', [['Red', 'Green', 'Blue'], ['R', 'G', 'B'], ['red', 'green', 'blue']]
)
def test_channels_in_ome_that_are_colors(tmp_path, names):
    write_channels(tmp_path / 'a.ome.tif', 3, dict(Name=names))
    slide, told = quiet(tmp_path / 'a.ome.tif')
    assert (slide.read(0.5) == tiffs.pixels((60, 80))).all() and not told


@pytest.mark.parametrize(
    'names', [None, ['Channel 0', 'Channel 1', 'Channel 2'], ['C:0', 'C1', '2']]
)
def test_channels_in_ome_without_names_are_told(tmp_path, names):
    write_channels(tmp_path / 'a.ome.tif', 3, dict(Name=names) if names else {})
    slide, told = quiet(tmp_path / 'a.ome.tif')
    assert (slide.read(0.5) == tiffs.pixels((60, 80))).all()
    assert ['have no names, and are taken as red, green and blue' in text for text in told] == [
        True
    ]


@pytest.mark.parametrize('axes, shape', [('ZYXS', (2, 60, 80, 3)), ('CYX', (4, 60, 80))])
def test_stacks_in_ome(tmp_path, axes, shape):
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    photometric = 'rgb' if axes[-1] == 'S' else 'minisblack'
    path = tmp_path / 'a.ome.tif'
    tifffile.imwrite(path, array, ome=True, photometric=photometric, metadata=dict(axes=axes))
    text = says(path, spacing=0.5)
    assert 'focal planes' in text or 'has 4 channels' in text


@pytest.mark.parametrize('kind', ['webp', 'png'])
def test_animations(tmp_path, kind):
    frames = [Image.fromarray(tiffs.pixels((60, 80), seed)) for seed in range(3)]
    path = tmp_path / f'a.{kind}'
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert 'an animation of several images' in says(path, spacing=0.5)
    frames[0].save(path)
    assert Slide(path, spacing=0.5).size == (60, 80)


# ---- 3. geometry of pyramids


def dots(size, at):
    "Glass with dark dots of 40 x 40 pixels, and blobs around them."
    rgb = (tiffs.smooth(size) // 3 + 160).astype(np.uint8)
    for top, left in at:
        rgb[top : top + 40, left : left + 40] = 0
    return rgb


def means(rgb, step, size):
    "Means of `step` x `step` pixels, cropped to a size."
    height, width = size
    cut = rgb[: height * step, : width * step].astype(np.float32)
    return cut.reshape(height, step, width, step, 3).mean((1, 3)).astype(np.uint8)


def cropped(rgb, step):
    return means(rgb, step, (rgb.shape[0] // step, rgb.shape[1] // step))


def resized(rgb, step):
    size = (rgb.shape[1] // step, rgb.shape[0] // step)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def rounded_up(rgb, step):
    size = (-(-rgb.shape[0] // step), -(-rgb.shape[1] // step))
    full = np.pad(
        rgb,
        ((0, size[0] * step - rgb.shape[0]), (0, size[1] * step - rgb.shape[1]), (0, 0)),
        'edge',
    )
    return means(full, step, size)


def padded(rgb, step):
    level = cropped(rgb, step)
    height, width = level.shape[:2]
    return np.pad(level, ((0, -height % 256), (0, -width % 256), (0, 0)), constant_values=255)


def center_of_dot(slide, spacing, at):
    "Where a dot is at a spacing, in microns."
    top, left = (place * slide.spacing for place in at)
    n = int(60 / (spacing / slide.spacing)) + 6
    first = (round(top / spacing) - 3, round(left / spacing) - 3)
    dark = 255.0 - slide.read(spacing, (*first, n, n)).mean(-1)
    dark = np.clip(dark - 120, 0, None)
    rows, columns = np.indices(dark.shape) + 0.5
    return np.array(
        [
            (first[0] + (rows * dark).sum() / dark.sum()) * spacing,
            (first[1] + (columns * dark).sum() / dark.sum()) * spacing,
        ]
    )


@pytest.mark.parametrize('make', [cropped, resized, rounded_up, padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    'size, steps',
    [
        ((1003, 3202), (4, 8, 16)),
        ((3202, 1003), (4, 8, 16)),
        ((2001, 1999), (2, 4, 8)),
        ((1501, 1003), (3, 9)),
    ],
    ids=str,
)
@pytest.mark.parametrize('flagged', [1, 0])
def test_dots_stay_where_they_are(tmp_path, make, size, steps, flagged):
    "Within half a pixel at every level, in every corner."
    height, width = size
    at = [(top, left) for top in (120, height - 160) for left in (120, width - 160)]
    rgb = dots(size, at)
    pages = [(rgb, dict(tile=(256, 256), **tiffs.resolution()))]
    for step in steps:
        kind = dict(tile=(256, 256), subfiletype=flagged, **tiffs.resolution(0.5 * step))
        pages.append((make(rgb, step), kind))
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages)) as slide:
        for step in (1, *steps):
            spacing = 0.5 * step
            for place in at:
                true = (np.array(place) + 20) * 0.5
                off = abs(center_of_dot(slide, spacing, place) - true).max()
                assert off <= spacing / 2, (step, place, off / spacing)


def test_all_levels_padded_to_whole_tiles(tmp_path):
    "A level of 1024 pixels of which 768 are the slide is no sixth of 6144."
    rgb = dots((3072, 3072), [(2800, 2800)])
    pages = [(rgb, dict(tile=(256, 256)))]
    pages += [(padded(rgb, step), dict(tile=(256, 256), subfiletype=1)) for step in (2, 4, 16)]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages), spacing=0.5) as slide:
        for spacing in (1.0, 2.0, 6.0, 8.0):
            off = abs(center_of_dot(slide, spacing, (2800, 2800)) - 1410).max()
            assert off <= spacing / 2, (spacing, off)
            assert slide.read(spacing).shape[:2] == (round(1536 / spacing),) * 2


def test_a_level_that_shows_something_else_is_not_used(tmp_path):
    rgb, other = tiffs.smooth((1000, 800), 1), tiffs.smooth((500, 400), 2)
    pages = [(rgb, dict(tile=(64, 64))), (other, dict(tile=(64, 64), subfiletype=1))]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages), spacing=0.5) as slide:
        assert abs(slide.read(1.0).astype(int) - cropped(rgb, 2)).max() <= 1


def test_a_shifted_level_is_not_used(tmp_path):
    rgb = tiffs.pixels((1000, 800), 1)
    half = np.roll(cropped(rgb, 2), (5, 7), (0, 1))
    pages = [(rgb, dict(tile=(64, 64))), (half, dict(tile=(64, 64), subfiletype=1))]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages), spacing=0.5) as slide:
        assert abs(slide.read(1.0).astype(int) - cropped(rgb, 2)).max() <= 1


def test_levels_without_a_flag_are_read(tmp_path):
    "They are used, which is told from a level that has been made darker."
    rgb = tiffs.pixels((1000, 800), 1)
    dark = (cropped(rgb, 2) * 0.98).astype(np.uint8)
    pages = [(rgb, dict(tile=(64, 64))), (dark, dict(tile=(64, 64)))]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages), spacing=0.5) as slide:
        assert (slide.read(1.0) == dark).all()


def test_what_is_known_of_levels_is_forgotten_when_the_file_changes(tmp_path):
    path = tmp_path / 'a.tif'
    rgb = tiffs.pixels((1000, 800), 1)
    for level in (cropped(rgb, 2), cropped(rgb, 2)[::-1]):
        pages = [(rgb, dict(tile=(64, 64))), (level, dict(tile=(64, 64), subfiletype=1))]
        with Slide(tiffs.write_pages(path, pages), spacing=0.5) as slide:
            assert abs(slide.read(1.0).astype(int) - cropped(rgb, 2)).max() <= 1


@pytest.mark.parametrize('value', [0, 8, 255])
@pytest.mark.parametrize('size, step', [((600, 840), 2), ((1200, 900), 4)])
def test_an_empty_level_is_not_used(tmp_path, value, size, step):
    "One whose writer stopped, or a label of the shape of a level."
    rgb = tiffs.smooth(size)
    empty = np.full_like(rgb[::step, ::step], value)
    tiles = dict(tile=(64, 64))
    pages = [(rgb, dict(**tiles, **tiffs.resolution())), (empty, dict(subfiletype=1, **tiles))]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages)) as slide:
        assert abs(slide.read(0.5 * step).astype(int) - cropped(rgb, step)).max() <= 1


def test_an_empty_level_of_an_empty_slide_is_used(tmp_path):
    glass = np.full((600, 840, 3), 244, np.uint8)
    coarse = np.full((150, 210, 3), 240, np.uint8)
    tiles = dict(tile=(64, 64))
    pages = [(glass, dict(**tiles, **tiffs.resolution())), (coarse, dict(subfiletype=1, **tiles))]
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages)) as slide:
        assert (slide.read(2.0) == 240).all()


# ---- 4. damage


@pytest.mark.parametrize('size, number', [((700, 900), 5), ((700, 900), 0), ((600, 1200), 7)])
@pytest.mark.parametrize('n', [64, 500])
def test_a_damaged_jpeg_tile_is_named(tmp_path, size, number, n):
    path = tmp_path / 'a.tiff'
    write_tiff(tiffs.pixels(size), path, 0.5, 'jpeg')
    tiffs.damage(path, number, n=n)
    columns = -(-size[1] // 256)
    row, column = number // columns, number % columns
    with Slide(path) as slide:
        with pytest.raises(InputError, match=rf'tile {row}, {column}\) of level 0'):
            slide.read(0.5)
        with pytest.raises(InputError, match=f'row {256 * row}, column {256 * column}'):
            slide.read(0.5, (256 * row + 10, 256 * column + 10, 20, 20))
        other = (256 * ((row + 1) % 2), 256 * ((column + 1) % columns), 20, 20)
        assert slide.read(0.5, other).shape == (20, 20, 3)


@pytest.mark.parametrize('number', [0, 57])
def test_a_damaged_tile_of_an_svs_is_named(tmp_path, number):
    "The sample has 10 tiles a row; OpenSlide reads damage of this kind without a word."
    path = tmp_path / 'a.svs'
    path.write_bytes(sample_slide().read_bytes())
    tiffs.damage(path, number, n=300)
    row, column = divmod(number, 10)
    with Slide(path) as slide:
        place = (240 * row + 10, 240 * column + 10, 20, 20)
        with pytest.raises(InputError, match=rf'tile {row}, {column}\) of level 0'):
            slide.read(slide.spacing, place)
        assert slide.read(slide.spacing, (500, 500, 300, 300)).shape == (300, 300, 3)


AFTER_THE_END = {
    'one byte': b'\0',
    'zeros': bytes(20),
    'text': b'written by a scanner',
    'fill bytes': b'\xff' * 7,
    'a second end': b'\xff\xd9',
    'the beginning of a JPEG': b'\xff\xd8\xff\xdb\0\x43',
}


def write_jpeg_tiles(path):
    "A TIFF in tiles of JPEG, an SVS by its name; returns how many it has."
    image = made.vips(tiffs.smooth((300, 420))).copy()
    if path.suffix == '.svs':
        about = 'Aperio Image Library v11.2.1 \r\n420x300 (128x128) JPEG/RGB|MPP = 0.5'
        image.set_type(pyvips.GValue.gstr_type, 'image-description', about)
    tiles = dict(tile=True, tile_width=128, tile_height=128, resunit='cm')
    image.tiffsave(str(path), compression='jpeg', Q=90, **tiles)
    return len(tiffs.places(path))


@pytest.mark.parametrize('name', ['a.svs', 'a.tif'])
@pytest.mark.parametrize('kind', AFTER_THE_END)
def test_bytes_after_the_end_of_a_jpeg_tile_are_harmless(tmp_path, name, kind):
    "libjpeg reads up to the end; what a file has between it and the next tile is nobody's."
    path = tmp_path / name
    n = write_jpeg_tiles(path)
    whole = Slide(path).read(0.5)
    for number in range(n):
        tiffs.change_piece(path, number, lambda data: data + AFTER_THE_END[kind])
    slide, told = quiet(path)
    assert (slide.read(0.5) == whole).all() and not told
    if name == 'a.svs':
        assert slide.format == 'aperio'
        assert (OpenSlideReader(path).fetch(0, 0, 0, 300, 420) == whole).all()


def cut_short(data):
    "Bytes of a JPEG without the last ones."
    return data[:-40]


def without_end(data):
    "Bytes of a JPEG without the mark of its end."
    return data[:-2]


def damage_middle(data):
    "Bytes of a JPEG with others in its middle."
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(0).bytes(200) + data[middle + 200 :]


@pytest.mark.parametrize('name', ['a.svs', 'a.tif'])
@pytest.mark.parametrize('kind', AFTER_THE_END)
@pytest.mark.parametrize('spoil', [cut_short, without_end, damage_middle])
def test_bytes_after_the_end_hide_no_damage(tmp_path, name, kind, spoil):
    path = tmp_path / name
    write_jpeg_tiles(path)
    tiffs.change_piece(path, 5, lambda data: spoil(data) + AFTER_THE_END[kind])
    if kind == 'a second end' and spoil is without_end:
        Slide(path).read(0.5)  # it is the only end
        return
    with pytest.raises(InputError, match=r'tile 1, 1\) of level 0'):
        Slide(path).read(0.5)


@pytest.mark.parametrize('kind', AFTER_THE_END)
def test_bytes_after_the_end_of_a_jpeg_are_harmless(tmp_path, kind):
    path = tmp_path / 'a.jpg'
    Image.fromarray(tiffs.smooth((200, 300))).save(path, quality=90)
    whole = Slide(path, spacing=0.5).read(0.5)
    path.write_bytes(path.read_bytes() + AFTER_THE_END[kind])
    assert (Slide(path, spacing=0.5).read(0.5) == whole).all()


def test_an_svs_by_libvips_is_that_by_openslide():
    path = sample_slide()
    reader, other = open_reader(path), OpenSlideReader(path)
    assert reader.tiles and reader.sizes == other.sizes and reader.spacings == other.spacings
    for region in ((0, 0, 300, 500), (235, 239, 11, 502), (2700, 2000, 267, 220)):
        assert (reader.fetch(0, *region) == other.fetch(0, *region)).all()


def made_dicom(folder):
    made.dicom(folder, made.pixels((440, 440)))
    return folder


def test_a_damaged_length_of_a_dicom_tile(tmp_path):
    path = made_dicom(tmp_path / 'dicom') / 'level0.dcm'
    data = bytearray(path.read_bytes())
    item, pixels = b'\xfe\xff\x00\xe0', data.find(b'\xe0\x7f\x10\x00')
    second = data.find(item, data.find(item, pixels) + 4)
    data[second + 4 : second + 8] = b'\x05\0\0\0'
    path.write_bytes(data)
    assert 'its tiles cannot be found' in says(path)


@pytest.mark.parametrize('tile', [(64, 64), None])
@pytest.mark.parametrize('size', SIZES[:2])
def test_deflated_data_that_are_longer_than_the_image(tmp_path, tile, size):
    "As where they are damaged, or where the header gives another width."
    rgb = tiffs.pixels(size)
    path = tmp_path / 'a.tif'
    tiffs.write(path, rgb, tile, compression='adobe_deflate', rowsperstrip=None if tile else 50)
    assert (Slide(path).read(0.5) == rgb).all()
    tiffs.change_tag(path, 322 if tile else 256, 48 if tile else size[1] - 7)
    text = says_when_read(path)
    assert ('more than' in text and 'bytes are in its data' in text) or 'needs' in text


@pytest.mark.parametrize('predictor', [False, True])
@pytest.mark.parametrize('tile', [(64, 64), (16, 144), (256, 128)])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('order', '<>')
def test_deflated_tiles_are_inflated_once(tmp_path, predictor, tile, size, order, monkeypatch):
    "The bytes that are checked are those that are used, and not inflated by libvips again."
    rgb = tiffs.pixels(size)
    path = tmp_path / 'a.tif'
    options = dict(compression='adobe_deflate', byteorder=order)
    tiffs.write(path, rgb, tile, predictor=predictor, **options)
    inflate, n_inflated = pixels.inflated, []

    def counted(data, least, most):
        n_inflated.append(1)
        return inflate(data, least, most)

    monkeypatch.setattr(pixels, 'inflated', counted)
    monkeypatch.setattr(pixels, 'opened', None)
    with Slide(path) as slide:
        assert (slide.read(0.5) == rgb).all()
        assert len(n_inflated) == len(tiffs.places(path))
        assert (slide.read(0.5, (30, 60, 50, 70)) == rgb[30:80, 60:130]).all()


@pytest.mark.parametrize('kind', ['grey', '16 bits'])
def test_other_deflated_tiles_are_left_to_libvips(tmp_path, kind):
    rgb = tiffs.smooth((200, 300))
    path = tmp_path / 'a.tif'
    options = dict(tile=(64, 64), compression='adobe_deflate')
    if kind == 'grey':
        rgb = np.repeat(rgb[..., :1], 3, axis=2)
        tiffs.write(path, rgb[..., 0], photometric='minisblack', **options)
    else:
        tiffs.write(path, rgb.astype(np.uint16) * 257, **options)
    (image,) = tiff_images(path)
    assert not pixels.is_of_bytes(image)
    assert (Slide(path).read(0.5) == rgb).all()


@pytest.mark.parametrize(
    'change',
    [
        dict(fill_order=2),
        dict(sample_format=2),
        dict(predictor=3),
        dict(planar=2),
        dict(samples=4, extra=(1,)),
        dict(photometric=5),
        dict(tile=(60, 60)),
        dict(tile=None),
    ],
    ids=str,
)
def test_what_inflated_bytes_may_mean(tmp_path, change):
    path = tiffs.write(tmp_path / 'a.tif', tiffs.pixels(), compression='adobe_deflate')
    (image,) = tiff_images(path)
    assert pixels.is_of_bytes(image)
    assert not pixels.is_of_bytes(replace(image, **change))


def says_when_read(path):
    "What a file is refused with, at opening or when it is read."

    def read(path):
        Slide(path, spacing=0.5).read(0.5)

    return refusal(read, path)


@pytest.mark.parametrize('size', SIZES)
def test_a_jpeg_whose_data_do_not_end_where_it_does(tmp_path, size):
    rgb = tiffs.pixels(size)
    path = tmp_path / 'a.jpg'
    Image.fromarray(rgb).save(path, quality=90)
    data = path.read_bytes()
    start = data.find(b'\xff\xda') + 14
    at = (start + len(data)) // 2
    path.write_bytes(data[:at] + data[at + 400 :])
    assert 'truncated or damaged' in says_when_read(path)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize(
    'kind', [{}, {'subsampling': 0}, {'subsampling': 1}, {'progressive': True}]
)
def test_kinds_of_jpeg(tmp_path, mode, kind):
    path = tmp_path / 'a.jpg'
    Image.fromarray(tiffs.smooth((101, 203))).convert(mode).save(path, quality=90, **kind)
    slide, _ = quiet(path, spacing=0.5)
    if mode != 'CMYK':
        assert (slide.read(0.5) == np.asarray(Image.open(path).convert('RGB'))).all()


def test_a_damaged_tile_of_a_coarse_level(tmp_path):
    path = tmp_path / 'a.tiff'
    write_tiff(tiffs.smooth((1500, 1500)), path, 0.5, 'jpeg')
    tiffs.damage(path, 2, page=1, n=300)
    with Slide(path) as slide:
        slide.read(0.5)
        with pytest.raises(InputError, match='of level 1'):
            slide.read(1.0)


@pytest.mark.parametrize('compression', ['deflate', 'lzw'])
def test_a_damaged_tile_of_another_compression(tmp_path, compression):
    path = tmp_path / 'a.tiff'
    write_tiff(made.pixels((700, 900)), path, 0.5, compression)
    begins, length = tiffs.places(path)[6]
    data = bytearray(path.read_bytes())
    data[begins : begins + length] = bytes(length)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r'tile 1, 2\) of level 0'):
        Slide(path).read(0.5)


def test_whole_jpeg_tiles_are_read_by_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / 'a.tiff'
    write_tiff(tiffs.pixels((700, 900)), path, 0.5, 'jpeg')
    slide = Slide(path)
    expected = slide.read(0.5)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: slide.read(0.5), range(6)):
            assert (found == expected).all()


# ---- 5. colours


def as_ycbcr(rgb):
    red, green, blue = np.moveaxis(rgb.astype(float), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    ycc = np.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], -1)
    return ycc.clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('tile', [(64, 64), None])
def test_ycbcr_that_is_no_jpeg(tmp_path, size, tile):
    rgb = tiffs.pixels(size)
    kwargs = dict(photometric='ycbcr', subsampling=(1, 1), compression='adobe_deflate')
    path = tiffs.write(tmp_path / 'a.tif', as_ycbcr(rgb), tile, **kwargs)
    assert abs(Slide(path).read(0.5).astype(int) - rgb).max() <= 2


def test_an_icc_profile_that_matters_is_told(tmp_path):
    rgb = tiffs.pixels((60, 80))
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    Image.fromarray(rgb).save(tmp_path / 'a.png', icc_profile=plain)
    slide, told = quiet(tmp_path / 'a.png', spacing=0.5)
    assert not told and not slide.notes
    other = pyvips.Image.new_from_array(rgb).copy(interpretation='srgb')
    other.icc_transform('p3').pngsave(str(tmp_path / 'b.png'))
    _, told = quiet(tmp_path / 'b.png', spacing=0.5)
    assert len(told) <= 1 and all('ICC profile is not applied' in text for text in told)


def test_cmyk_is_converted_and_told(tmp_path):
    rgb = np.full((60, 80, 3), 250, np.uint8)
    Image.fromarray(rgb).convert('CMYK').save(tmp_path / 'a.tif')
    slide, told = quiet(tmp_path / 'a.tif', spacing=0.5)
    assert slide.read(0.5).mean() > 200 and 'is in CMYK' in told[0]


# ---- 6. depth


@pytest.mark.parametrize('bits', [10, 12, 14])
@pytest.mark.parametrize('tile', [(64, 64), None])
def test_bits_in_use_of_16(tmp_path, bits, tile):
    rgb = tiffs.pixels()
    deep = rgb.astype(np.uint16) << (bits - 8)
    path = tmp_path / 'a.ome.tif'
    tifffile.imwrite(
        path, deep, photometric='rgb', tile=tile, metadata=ome_data(SignificantBits=bits)
    )
    assert (Slide(path).read(0.5) == rgb).all()
    largest = [(281, 'H', 3, (2**bits - 1,) * 3, True)]
    tiffs.write(tmp_path / 'b.tif', deep, tile, extratags=largest)
    assert (Slide(tmp_path / 'b.tif').read(0.5) == rgb).all()


@pytest.mark.parametrize('bits', [8, 10, 12, 14])
@pytest.mark.parametrize('tile', [(64, 64), None])
def test_16_bits_whose_upper_ones_are_empty(tmp_path, bits, tile):
    deep = tiffs.pixels().astype(np.uint16) << (bits - 8)
    text = says(tiffs.write(tmp_path / 'a.tif', deep, tile))
    assert 'the upper ones are empty' in text


def test_16_bits_that_are_used(tmp_path):
    rgb = tiffs.pixels()
    tiffs.write(tmp_path / 'a.tif', rgb.astype(np.uint16) * 257)
    assert (Slide(tmp_path / 'a.tif').read(0.5) == rgb).all()
    pyvips.Image.new_from_array(rgb.astype(np.uint16)).copy(interpretation='rgb16').pngsave(
        str(tmp_path / 'a.png')
    )
    assert 'the upper ones are empty' in says(tmp_path / 'a.png', spacing=0.5)


# ---- 7. orientation


def stored(rgb, number):
    "Pixels as they are stored for an orientation."
    turns = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.swapaxes(0, 1),
        6: np.rot90(rgb),
        7: rgb[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(rgb, -1),
    }
    return np.ascontiguousarray(turns[number])


@pytest.mark.parametrize('number', range(1, 9))
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('tile', [(64, 64), None])
def test_orientation_of_a_tiff(tmp_path, number, size, tile):
    rgb = tiffs.pixels(size)
    tag = [(274, 'H', 1, number, True)]
    pages = [(stored(rgb, number), dict(tile=tile, extratags=tag, **tiffs.resolution()))]
    if tile:
        half = stored(rgb[: size[0] // 2 * 2, : size[1] // 2 * 2], number)
        half = cropped(half, 2)
        kwargs = dict(tile=tile, subfiletype=1, extratags=tag, **tiffs.resolution(1.0))
        pages.append((half, kwargs))
    with Slide(tiffs.write_pages(tmp_path / 'a.tif', pages)) as slide:
        assert slide.size == size
        assert (slide.read(0.5) == rgb).all()
        part = (10, 20, 50, 60)
        assert (slide.read(0.5, part) == rgb[10:60, 20:80]).all()
        height, width = (n // 2 for n in size)
        half = cropped(rgb, 2)
        assert abs(slide.read(1.0)[:height, :width].astype(int) - half).mean() < 1


@pytest.mark.parametrize('number', range(1, 9))
def test_orientation_of_a_photograph(tmp_path, number):
    rgb = tiffs.smooth((120, 200))
    exif = Image.Exif()
    exif[274] = number
    for name in ('a.jpg', 'a.webp'):
        Image.fromarray(stored(rgb, number)).save(tmp_path / name, quality=95, exif=exif)
        slide = Slide(tmp_path / name, spacing=0.5)
        assert slide.size == (120, 200)
        assert abs(slide.read(0.5).astype(int) - rgb).mean() < 4


def test_pixels_that_are_not_square_are_turned(tmp_path):
    "Their height and width are told as of the upright image."
    kwargs = dict(photometric='rgb', tile=(64, 64), metadata=None, resolutionunit='CENTIMETER')
    path, rgb = tmp_path / 'a.tif', tiffs.pixels()
    tags = [(274, 'H', 1, 6, True)]
    tifffile.imwrite(path, stored(rgb, 6), resolution=(2e4, 1e4), extratags=tags, **kwargs)
    assert open_reader(path).spacings['resolution tags'] == (0.5, 1.0)


# ---- 8. harmless flaws, and compressions


def with_flaw(path, rgb, flaw, **kwargs):
    tags = [(306, 's', 20, b'2020:01:01\0 00:00:00', True)] if flaw == 'date' else []
    options = dict(rowsperstrip=50, compression='adobe_deflate', extratags=tags, **kwargs)
    tiffs.write(path, rgb, None, **options)
    return tiffs.swap_last_tags(path) if flaw == 'order' else path


@pytest.mark.parametrize('flaw', ['date', 'order'])
@pytest.mark.parametrize('size', SIZES)
def test_a_flaw_of_the_tags_is_told_and_passed(tmp_path, flaw, size):
    rgb = tiffs.pixels(size)
    path = with_flaw(tmp_path / 'a.tif', rgb, flaw)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert (Slide(path).read(0.5) == rgb).all()
    assert all('harmless flaw' in str(warning.message) for warning in seen)


@pytest.mark.parametrize('flaw', ['date', 'order', 'none'])
def test_a_flaw_does_not_hide_damage(tmp_path, flaw):
    path = with_flaw(tmp_path / 'a.tif', made.pixels((500, 420)), flaw)
    tiffs.damage(path, 3, n=200)
    with pytest.raises(InputError, match='truncated or damaged'):
        Slide(path).read(0.5)


@pytest.mark.parametrize('n', [1, 4, 50])
def test_junk_in_the_header_of_a_jpeg(tmp_path, n):
    rgb = tiffs.smooth((200, 300))
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, 'jpeg', quality=95)
    data = buffer.getvalue()
    (tmp_path / 'a.jpg').write_bytes(data[:20] + bytes(n) + data[20:])
    slide, told = quiet(tmp_path / 'a.jpg', spacing=0.5)
    assert abs(slide.read(0.5).astype(int) - rgb).mean() < 4 and 'mean nothing' in told[0]
    broken = data[: len(data) // 2] + bytes(range(64)) + data[len(data) // 2 + 64 :]
    (tmp_path / 'b.jpg').write_bytes(broken[:20] + bytes(n) + broken[20:])
    with pytest.raises(InputError, match='truncated or damaged'):
        Slide(tmp_path / 'b.jpg', spacing=0.5).read(0.5)


@pytest.mark.parametrize(
    'number, name',
    [(34712, 'JPEG 2000'), (50000, 'Zstandard'), (50002, 'JPEG XL'), (34887, 'LERC')],
)
@pytest.mark.parametrize('tile', [(64, 64), None])
def test_a_compression_is_told_at_opening(tmp_path, number, name, tile, monkeypatch):
    path = tiffs.write(tmp_path / 'a.tif', tiffs.pixels(), tile)
    tiffs.change_tag(path, 259, number)
    monkeypatch.setattr('streaming_pathology.slides.pixels.has_imagecodecs', lambda: False)
    text = says(path)
    assert f'is compressed with {name}, which' in text
    assert 'damaged' not in text and 'truncated' not in text


@pytest.mark.parametrize('compression', ['jpeg2000', 'zstd', 'jpegxl', 'lerc'])
@pytest.mark.parametrize('size', SIZES[:2])
def test_compressions_that_imagecodecs_reads(tmp_path, compression, size):
    pytest.importorskip('imagecodecs')
    rgb = tiffs.smooth(size)
    path = tiffs.write(tmp_path / 'a.tif', rgb, compression=compression)
    assert abs(Slide(path).read(0.5).astype(int) - rgb).mean() < 4


# ---- 9. tiles that are left out


@pytest.mark.parametrize('size', SIZES[:2])
@pytest.mark.parametrize('compression', ['jpeg', 'deflate', 'none'])
def test_tiles_that_are_left_out_are_glass(tmp_path, size, compression):
    rgb = tiffs.smooth(size)
    options = dict(tile=True, tile_width=64, tile_height=64, resunit='cm', Q=95)
    image = pyvips.Image.new_from_array(rgb).copy(xres=2000, yres=2000, interpretation='srgb')
    image.tiffsave(str(tmp_path / 'a.tif'), compression=compression, **options)
    columns = -(-size[1] // 64)
    tiffs.leave_out(tmp_path / 'a.tif', [1, columns + 2])
    slide, told = quiet(tmp_path / 'a.tif')
    assert len(told) == 1 and '2 of its' in told[0]
    true = rgb.copy()
    true[:64, 64:128] = 255
    true[64:128, 128:192] = 255
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = slide.read(0.5)
    assert (found[:64, 64:128] == 255).all() and (found[64:128, 128:192] == 255).all()
    assert abs(found.astype(int) - true).mean() < 4
    assert (slide.read(0.5, (50, 50, 90, 100)) == found[50:140, 50:150]).all()


def test_a_tile_without_a_length_is_damaged(tmp_path):
    path = tiffs.write(tmp_path / 'a.tif', tiffs.pixels())
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags[325]
        at, size = tag.valueoffset, tag.valuebytecount // tag.count
    data = bytearray(path.read_bytes())
    data[at + 3 * size : at + 4 * size] = bytes(size)
    path.write_bytes(data)
    assert 'tile 3 has no place or no length' in says(path)


def test_a_file_without_any_tile_is_refused(tmp_path):
    path = tiffs.write(tmp_path / 'a.tif', tiffs.pixels((100, 100)))
    tiffs.leave_out(path, range(4))
    assert 'holds no pixels' in says(path)


# ---- 10. masks


@pytest.fixture
def classes():
    numbers = np.zeros((200, 260), np.uint8)
    numbers[40:90, 100:200] = 1
    numbers[120:150, 30:90] = 3
    return numbers


def numbers_of(path):
    return mask_image(path).numpy().squeeze()


@pytest.mark.parametrize('n_colors', [4, 16, 256])
def test_a_palette_is_left_out(tmp_path, classes, n_colors):
    picture = Image.fromarray(classes).convert('P')
    palette = [255, 255, 255, 200, 30, 30, 0, 0, 0, 128, 0, 128]
    picture.putpalette(palette + [9] * (3 * n_colors - 12))
    picture.save(tmp_path / 'a.png', bits={4: 2, 16: 4, 256: 8}[n_colors])
    assert (numbers_of(tmp_path / 'a.png') == classes).all()
    picture.save(tmp_path / 'a.tif')
    assert (numbers_of(tmp_path / 'a.tif') == classes).all()


def test_a_palette_in_tiles(tmp_path, classes):
    colormap = np.full((3, 256), 65535, np.uint16)
    colormap[:, 1:] = 100
    kwargs = dict(photometric='palette', colormap=colormap, compression='adobe_deflate')
    tifffile.imwrite(tmp_path / 'a.tif', classes, tile=(64, 64), **kwargs)
    assert (numbers_of(tmp_path / 'a.tif') == classes).all()


@pytest.mark.parametrize('compression', ['deflate', 'none'])
def test_tiles_of_a_mask_that_are_left_out_are_0(tmp_path, classes, compression):
    path = tmp_path / 'a.tif'
    options = dict(tile=True, tile_width=64, tile_height=64, compression=compression)
    pyvips.Image.new_from_array(classes + np.uint8(1)).tiffsave(str(path), **options)
    tiffs.leave_out(path, [0, 7])
    expected = classes + np.uint8(1)
    expected[:64, :64] = 0
    expected[64:128, 128:192] = 0
    assert (numbers_of(path) == expected).all()


def test_white_as_0_is_noticed(tmp_path, classes):
    tiffs.write(tmp_path / 'a.tif', classes, photometric='miniswhite')
    assert 'MinIsWhite' in refusal(mask_image, tmp_path / 'a.tif')
    tiffs.write(tmp_path / 'b.tif', classes, photometric='minisblack')
    assert (numbers_of(tmp_path / 'b.tif') == classes).all()


def test_a_mask_that_is_stored_turned_is_refused(tmp_path, classes):
    tag = [(274, 'H', 1, 6, True)]
    tiffs.write(tmp_path / 'a.tif', classes, photometric='minisblack', extratags=tag)
    assert 'orientation 6' in refusal(mask_image, tmp_path / 'a.tif')


def test_an_inverted_mask_is_noticed(classes):
    assert looks_inverted(classes == 0)
    assert not looks_inverted(classes > 0)
    assert not looks_inverted(np.ones((9, 9), bool)) and not looks_inverted(np.zeros((9, 9), bool))


# ---- 12. what messages say


@pytest.mark.parametrize('spacing', [28.97, 0.04, 352.8])
def test_a_spacing_that_no_slide_has_is_named(tmp_path, spacing):
    text = says(tiffs.write(tmp_path / 'a.tif', tiffs.pixels((90, 80)), spacing=spacing))
    assert f'{spacing:.4g} by its resolution tags' in text
    assert '0.05' in text and '20 microns' in text
    assert '--slide-spacing' in text and 'spacing=' in text


@pytest.mark.parametrize('given, meant', [(0.0005, '0.5'), (252, '0.252'), (2.5e-4, '0.25')])
def test_a_spacing_in_another_unit_is_told(tmp_path, given, meant):
    path = tmp_path / 'a.png'
    Image.fromarray(tiffs.pixels()).save(path)
    assert f'if it is in {"milli" if given < 1 else "nano"}metres, write {meant}' in says(
        path, spacing=given
    )


@pytest.mark.parametrize('given', [0.02, 28.97, 99.0, 5e6])
def test_any_other_spacing_that_a_user_gives_is_taken(tmp_path, given):
    path = tmp_path / 'a.png'
    Image.fromarray(tiffs.pixels()).save(path)
    assert Slide(path, spacing=given).spacing == given


def test_no_spacing_at_all(tmp_path):
    text = says(tiffs.write(tmp_path / 'a.tif', tiffs.pixels((90, 80)), spacing=None))
    assert 'has no pixel size' in text and '--slide-spacing' in text


@pytest.mark.parametrize('size', SIZES)
def test_ome_metadata_that_are_declared_twice(tmp_path, size):
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{size[1]}" SizeY="{size[0]}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5" '
        'PhysicalSizeY="0.5"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels>'
        '</Image></OME>'
    )
    rgb = tiffs.pixels(size)
    path = tiffs.write(tmp_path / 'a.ome.tif', rgb, spacing=None, description=xml)
    slide, told = quiet(path)
    assert slide.spacing == 0.5 and (slide.read(0.5) == rgb).all() and not told
    tiffs.write(path, rgb, description=xml.replace('</Image>', ''))
    slide, told = quiet(path)
    assert abs(slide.spacing - 0.5) < 1e-6 and 'are passed over' in told[0]


def test_what_is_no_image_is_told_by_what_it_is(tmp_path):
    for name, begins, kind in (
        ('a.xlsx', b'PK\x03\x04', 'Excel'),
        ('a.pdf', b'%PDF-1.7', 'PDF'),
        ('a.gz', b'\x1f\x8b', 'gzip'),
    ):
        (tmp_path / name).write_bytes(begins + bytes(100))
        text = says(tmp_path / name)
        assert 'is not an image' in text and kind in text and 'copy it again' not in text


@pytest.mark.parametrize(
    'begins, says_what',
    [
        (b'<!DOCTYPE html><html>', 'is a web page and no image: download the slide again'),
        (b'\r\n<HTML lang="en">', 'is a web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'fetch the slide by git lfs'),
    ],
)
@pytest.mark.parametrize('name', ['a.svs', 'a.tif', 'a.mrxs', 'a.png'])
def test_what_was_downloaded_instead_of_a_slide(tmp_path, begins, says_what, name):
    (tmp_path / name).write_bytes(begins + b' ' * 300)
    text = says(tmp_path / name)
    assert says_what in text and 'damaged' not in text


def test_dicom_that_is_no_slide_is_told_by_its_kind(tmp_path):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns, dataset.BitsAllocated = 8, 8, 16
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 15, 0
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, 'MONOCHROME2'
    dataset.PixelData = bytes(128)
    dataset.save_as(tmp_path / 'a.dcm', enforce_file_format=True)
    assert "its kind is 'CT Image Storage'" in says(tmp_path / 'a.dcm')
    assert 'without DICOM files of a slide (CT Image Storage)' in says(tmp_path)


@pytest.mark.parametrize(
    'changes, text',
    [
        (dict(PhotometricInterpretation='MONOCHROME2'), 'level0.dcm is grey, as a fluorescence'),
        (dict(TotalPixelMatrixFocalPlanes=3), 'level0.dcm has 3 focal planes: export one of them'),
    ],
)
def test_stacks_and_channels_in_dicom(tmp_path, changes, text):
    made.dicom(tmp_path / 'a', made.pixels()[:256, :256])
    path = tmp_path / 'a/level0.dcm'
    dataset = dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    assert text in says(tmp_path / 'a')


def test_a_file_of_a_dicom_series_is_missing(tmp_path):
    "What is left is a slide at a coarser spacing, and that is told."
    folder = made.dicom(tmp_path / 'a', made.pixels()[:256, :256])
    assert not quiet(folder)[1]
    (folder / 'level0.dcm').unlink()
    slide, (told,) = quiet(folder)
    assert 'the file of the full resolution may be missing' in told
    assert slide.spacing == pytest.approx(2 * made.SPACING)


def test_a_damaged_thumbnail_does_not_spoil_the_slide(tmp_path):
    rgb = made.pixels((512, 512))
    path = tmp_path / 'a.svs'
    kwargs = dict(photometric='rgb', metadata=None)
    text = 'Aperio Image Library v11.2.1 \r\n512x512 [0,0 512x512] (256x256) JPEG/RGB|MPP = 0.5'
    with tifffile.TiffWriter(path) as file:
        file.write(rgb, tile=(256, 256), description=text, **kwargs)
        file.write(
            rgb[::4, ::4],
            rowsperstrip=16,
            compression='adobe_deflate',
            description='Aperio Image Library v11.2.1\r\n512x512 -> 128x128 - ',
            **kwargs,
        )
    assert set(Slide(path).associated()) == {'thumbnail'}
    data = bytearray(path.read_bytes())
    for begins, length in tiffs.places(path, page=1):
        data[begins : begins + length] = b'\xff' * length
    path.write_bytes(data)
    with Slide(path) as slide:
        with pytest.warns(UserWarning, match='thumbnail.* is left out'):
            assert slide.associated() == {}
        assert (slide.read(0.5) == rgb).all()
