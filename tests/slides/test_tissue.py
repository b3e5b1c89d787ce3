"The tissue mask against what was painted: as it is, faint, and with what gets onto slides."

import math

import numpy as np
import pytest
import pyvips
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from streaming_pathology.core import InputError
from streaming_pathology.slides.readers import forget_operations, sample_slide, write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.slides.tissue import (
    biopsies,
    class_numbers,
    numbers_in,
    pen_marks,
    tissue_box,
    tissue_mask,
)

SPACING = 4.0
INKS = dict(
    blue=(40, 70, 170),
    dark_blue=(30, 50, 150),
    light_blue=(110, 160, 225),
    green=(30, 140, 70),
    black=(25, 25, 30),
    red=(215, 45, 50),
)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def found(rgb, shape, **kwargs):
    "The mask of pixels at 4 microns, as it is found at 8, on their grid."
    h, w = rgb.shape[:2]
    mask, at = tissue_mask(
        rgb.reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)).astype(np.uint8), 2 * SPACING, **kwargs
    )
    assert at == 2 * SPACING
    return mask.repeat(2, 0).repeat(2, 1)


@pytest.fixture(scope='module', params=range(3))
def painted(request):
    b = paint_biopsy((500, 1500), SPACING, 0.3 * (request.param % 2), request.param)
    return b.image, b.mask > 0, np.random.default_rng(request.param)


def test_as_painted(painted):
    rgb, truth, _ = painted
    assert dice(found(rgb, truth.shape), truth) > 0.95
    assert not (pen_marks(rgb, SPACING) & truth).any()


@pytest.mark.parametrize('strength', [0.5, 0.2])
def test_faint(painted, strength):
    rgb, truth, rng = painted
    faint = (
        (243 * (rgb / 243).clip(1e-3) ** strength + rng.normal(0, 1.5, rgb.shape))
        .clip(0, 255)
        .astype(np.uint8)
    )
    assert dice(found(faint, truth.shape), truth) > 0.95


@pytest.mark.parametrize('ink', INKS)
def test_pen(painted, ink):
    "A stroke of a felt pen, also over the tissue: none of it counts where there is no tissue, and the rest is found."
    rgb, truth, rng = painted
    y, x = np.mgrid[: truth.shape[0], : truth.shape[1]]
    a, top, left = rng.uniform(0, np.pi), *(rng.uniform(0.2, 0.8, 2) * truth.shape)
    stroke = (
        abs((y - top) * np.cos(a) + (x - left) * np.sin(a) + 10 * np.sin(x * SPACING / 300))
        * SPACING
        < 200
    )
    uneven = 1 + 0.1 * ndimage.gaussian_filter(rng.normal(size=truth.shape), 15) * 15
    light = (np.array(INKS[ink]) / 245.0) ** np.clip(
        ndimage.gaussian_filter(stroke.astype(float), 2.5) * uneven, 0, 1
    )[..., None]
    mask, near = (
        found((rgb * light).clip(0, 255).astype(np.uint8), truth.shape),
        ndimage.binary_dilation(stroke, iterations=22),
    )
    assert dice(mask & ~near, truth & ~near) > 0.95
    assert (mask & near & ~truth).sum() < 0.03 * (near & ~truth).sum()


def test_borders_and_dust(painted):
    rgb, truth, rng = painted
    rgb = rgb.copy()
    frame = np.zeros(truth.shape, bool)
    frame[:14], frame[-20:], frame[:, :25] = True, True, True
    dark = 1 - ndimage.gaussian_filter(frame.astype(float), 1.5)[..., None]
    rgb = (rgb * dark + rng.normal(0, 2, rgb.shape)).clip(0, 255)
    for t, l in rng.integers(
        20, np.array(truth.shape) - 40, (80, 2)
    ):  # specks of 10 to 60 microns, dark or coloured
        n = int(rng.integers(2, 15))
        rgb[t : t + n, l : l + n] *= rng.uniform(0.2, 0.9, 3)
    mask = found(rgb.astype(np.uint8), truth.shape)
    assert dice(mask & ~frame, truth & ~frame) > 0.95 and not (mask & frame & ~truth).any()


def test_sample_slide_has_no_ink():
    with Slide(sample_slide()) as s:
        assert not pen_marks(s.read(SPACING), SPACING).any()


def test_mask_from_a_file(tmp_path):
    b = paint_biopsy((500, 900), SPACING, 0.0, 1)
    write_tiff(b.image, tmp_path / 'a.tiff', SPACING)
    Image.fromarray(b.mask[::3, ::3]).save(tmp_path / 'mask.png')
    Image.fromarray(b.mask[:, :300]).save(tmp_path / 'other.png')
    with Slide(tmp_path / 'a.tiff') as s:
        mask, at = tissue_mask(s, source=tmp_path / 'mask.png')
        assert at == 8.0 and mask.shape == (250, 450) and dice(mask, b.mask[::2, ::2] > 0) > 0.95
        with pytest.raises(InputError, match='does not fit'):
            tissue_mask(s, source=tmp_path / 'other.png')
        with pytest.raises(InputError, match='is not an image'):
            tissue_mask(s, source=tmp_path / 'a.csv')
        layer = np.dstack(
            [np.full_like(b.mask, 90)] * 3 + [(b.mask > 0) * np.uint8(255)]
        )  # painted on a transparent layer
        for name, pixels in {
            'layer.png': layer,
            'grey.png': layer[..., 2:],
            'shades.jpg': (b.mask > 0) * np.uint8(255),
            'classes.png': b.mask,
            'deep.png': b.mask.astype(np.uint16),
        }.items():
            Image.fromarray(pixels).save(tmp_path / name)
            assert dice(tissue_mask(s, source=tmp_path / name)[0], b.mask[::2, ::2] > 0) > 0.98, (
                name
            )
        Image.fromarray(b.mask[:1, :1] + np.uint8(1)).save(tmp_path / 'dot.png')
        labels = (np.arange(b.mask.size).reshape(b.mask.shape) % 200 + 1) * (b.mask > 0)
        Image.fromarray(labels.astype(np.uint8)).save(
            tmp_path / 'objects.png'
        )  # numbers of many objects
        assert dice(tissue_mask(s, source=tmp_path / 'objects.png')[0], b.mask[::2, ::2] > 0) > 0.98
        tifffile.imwrite(
            tmp_path / 'more.tif',
            np.dstack([b.mask] * 4),
            photometric='rgb',
            extrasamples=['unspecified'],
        )
        Image.fromarray(b.mask).save(tmp_path / 'classes.jpg')
        for name, says in (
            ('more.tif', 'what the last one is'),
            ('classes.jpg', 'numbers of classes'),
        ):
            with pytest.raises(InputError, match=says):
                tissue_mask(s, source=tmp_path / name)
        with pytest.raises(InputError, match='too coarse'):
            tissue_mask(s, source=tmp_path / 'dot.png')


def test_mask_from_a_network(tmp_path):
    "A streamed network in the place of colour: here one that finds what is darker than glass."
    b = paint_biopsy((500, 900), SPACING, 0.0, 1)
    write_tiff(b.image, tmp_path / 'a.tiff', SPACING)
    conv = nn.Conv2d(3, 1, 5, stride=2, padding=2)
    with torch.no_grad():
        conv.weight.fill_(-1 / 75)
        conv.bias.fill_(0.9)
    with Slide(tmp_path / 'a.tiff') as s:
        mask, at = tissue_mask(s, source=conv)
        assert mask.shape == (250, 450) and dice(mask, b.mask[::2, ::2] > 0) > 0.9
        two = nn.Sequential(conv, nn.Conv2d(1, 2, 1))
        with torch.no_grad():
            two[1].weight[:, 0, 0, 0] = torch.tensor([-1.0, 1.0])
            two[1].bias.zero_()
        assert (tissue_mask(s, source=two)[0] == mask).all()
        with pytest.raises(InputError, match='logits'):
            tissue_mask(s, source=nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def test_biopsies_in_reading_order():
    "Cores side by side, in two rows of sections, upright, flat and tilted; a piece in line is joined, one beside is not, a crumb goes to the nearest."
    at = 8.0

    def bar(mask, top, left, h, w):
        mask[top : top + h, left : left + w] = True

    for turned in (0, 1):
        mask = np.zeros((1200, 700), bool)
        for row, top in enumerate((20, 640)):
            for left in (50, 250, 450):
                bar(mask, top, left, 500, 60)
        mask[250:280, 250:310] = False  # broken: a gap of 240 microns
        bar(mask, 300, 130, 4, 6)  # a crumb beside the first
        found = biopsies(None, mask=(mask.T if turned else mask, at))
        assert len(found) == 6
        places = [tuple(np.argwhere(b.mask).mean(0)) for b in found]
        expect = [(t + 250, l + 30) for t in (20, 640) for l in (50, 250, 450)]
        assert all(
            abs(np.array(p) - (e[::-1] if turned else e)).max() < 8 for p, e in zip(places, expect)
        ), places
        assert all(abs(abs(b.angle) - 90 * turned) < 2 for b in found)
        assert found[0].mask.sum() == 500 * 60 + 24
    assert biopsies(None, mask=(np.zeros((50, 50), bool), at)) == []


def test_large_masks(tmp_path):
    "A mask with more pixels than Pillow opens, as PANDA's have."
    pyvips.Image.black(16000, 14000).draw_rect(1, 8000, 0, 8000, 14000, fill=True).tiffsave(
        str(tmp_path / 'mask.tif'), tile=True, compression='deflate'
    )
    write_tiff(np.full((700, 800, 3), 240, np.uint8), tmp_path / 'a.tiff', SPACING)
    with Slide(tmp_path / 'a.tiff') as s:
        mask, _ = tissue_mask(s, source=tmp_path / 'mask.tif')
    assert mask.shape == (350, 400) and mask[:, 205:].all() and not mask[:, :195].any()


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
        (np.zeros((9, 9, 3), np.uint8), 'rgb.png', 'has 3 channels'),
        (np.zeros((9, 9), np.uint8), 'grey.jpg', 'is a JPEG'),
        (np.zeros((9, 9), np.float32), 'real.tif', 'of the type float'),
    ],
    ids=['rgb', 'jpeg', 'float'],
)
def test_numbers_of_classes_are_exact_or_refused(tmp_path, pixels, name, says):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(InputError, match=says):
        numbers_in(tmp_path / name)
    with pytest.raises(InputError, match=says):
        class_numbers(tmp_path / name, 8.0, (9, 9))


@pytest.fixture
def canvas():
    "A patch of tissue on white, with a black border, dark noise and a speck."
    canvas = np.full((1200, 900, 3), 244, np.uint8)
    canvas[300:700, 200:500] = (200, 120, 180)
    canvas[:, 880:] = 0
    canvas[1000:, :400] = np.random.default_rng(0).integers(0, 4, (200, 400, 3))
    canvas[50:53, 50:53] = (150, 60, 120)
    return canvas


def test_box_of_a_painted_patch(canvas, tmp_path):
    "Right within a pixel of the mask."
    Image.fromarray(canvas).save(tmp_path / 'patch.png')
    top, left, height, width = tissue_box(Slide(tmp_path / 'patch.png', spacing=1.0), 1.0)
    ends = np.array([top, left, top + height, left + width])
    assert abs(ends - [300, 200, 700, 500]).max() <= 16, ends


@pytest.mark.parametrize(
    'pixels',
    [
        np.full((500, 500, 3), 255),
        np.full((500, 500, 3), 128),
        np.zeros((500, 500, 3)),
        np.random.default_rng(0).normal(240, 4, (500, 500, 3)).clip(0, 255),
    ],
    ids=['white', 'grey', 'black', 'noise'],
)
def test_blank_slides_have_no_box(pixels, tmp_path):
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / 'blank.png')
    with pytest.raises(InputError, match='blank.png has no tissue'):
        tissue_box(Slide(tmp_path / 'blank.png', spacing=1.0), 2.0)


@pytest.mark.parametrize(
    'pixels', [np.zeros((9, 9)), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)], ids=str
)
def test_a_mask_of_other_pixels_is_refused(pixels):
    with pytest.raises(InputError, match='uint8'):
        tissue_mask(pixels)


@pytest.mark.parametrize(
    'bad',
    [dict(spacing=0), dict(spacing='8'), dict(threshold=math.nan), dict(smallest=-1)],
    ids=str,
)
def test_numbers_of_a_mask_out_of_range_are_refused(canvas, bad):
    with pytest.raises(InputError, match='must be a number'):
        tissue_mask(canvas, **bad)


def test_a_network_needs_a_slide(canvas):
    with pytest.raises(InputError, match='a network needs a Slide'):
        tissue_mask(canvas, source=nn.Identity())
