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
from streaming_pathology.slides.readers import sample_slide, write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import RUIFROK_JOHNSTON, SAMPLE_STAINS, paint_biopsy
from streaming_pathology.slides.tissue import (
    STAINS,
    biopsies,
    draw_tissue,
    find_tissue,
    optical_density,
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


def found(rgb, **kwargs):
    "The mask of pixels at 4 microns, as it is found at 8, on their grid."
    height, width = rgb.shape[:2]
    blocks = rgb.reshape(height // 2, 2, width // 2, 2, 3)
    mask, at = tissue_mask(blocks.mean((1, 3)).astype(np.uint8), 2 * SPACING, **kwargs)
    assert at == 2 * SPACING
    return mask.repeat(2, 0).repeat(2, 1)


@pytest.fixture(scope='module', params=range(3))
def painted(request):
    "Pixels of a painted biopsy, where its tissue is, and random numbers."
    biopsy = paint_biopsy((500, 1500), SPACING, 0.3 * (request.param % 2), request.param)
    return biopsy.image, biopsy.mask > 0, np.random.default_rng(request.param)


def test_as_painted(painted):
    rgb, truth, _ = painted
    assert dice(found(rgb), truth) > 0.95
    assert not (pen_marks(rgb, SPACING) & truth).any()


@pytest.mark.parametrize('strength', [0.5, 0.2])
def test_faint(painted, strength):
    rgb, truth, rng = painted
    faint = 243 * (rgb / 243).clip(1e-3) ** strength + rng.normal(0, 1.5, rgb.shape)
    assert dice(found(faint.clip(0, 255).astype(np.uint8)), truth) > 0.95


def drawn_stroke(shape, rng):
    "A wavy stroke of a felt pen, 400 microns wide, somewhere in the middle: bool (height, width)."
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle = rng.uniform(0, np.pi)
    top, left = rng.uniform(0.2, 0.8, 2) * shape
    wave = 10 * np.sin(x * SPACING / 300)
    distance = abs((y - top) * np.cos(angle) + (x - left) * np.sin(angle) + wave)
    return distance * SPACING < 200


def under_ink(rgb, stroke, ink, rng):
    "Pixels seen through uneven ink with a blurred edge."
    uneven = 1 + 0.1 * ndimage.gaussian_filter(rng.normal(size=stroke.shape), 15) * 15
    amount = np.clip(ndimage.gaussian_filter(stroke.astype(float), 2.5) * uneven, 0, 1)
    light = (np.array(ink) / 245.0) ** amount[..., None]
    return (rgb * light).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('ink', INKS)
def test_pen(painted, ink):
    """A stroke of a felt pen, also over the tissue: none of it counts where there is no tissue, and
    the rest is found."""
    rgb, truth, rng = painted
    stroke = drawn_stroke(truth.shape, rng)
    mask = found(under_ink(rgb, stroke, INKS[ink], rng))
    near = ndimage.binary_dilation(stroke, iterations=22)
    assert dice(mask & ~near, truth & ~near) > 0.95
    assert (mask & near & ~truth).sum() < 0.03 * (near & ~truth).sum()


def test_borders_and_dust(painted):
    "Black borders, and specks of 10 to 60 microns, dark or coloured."
    rgb, truth, rng = painted
    frame = np.zeros(truth.shape, bool)
    frame[:14], frame[-20:], frame[:, :25] = True, True, True
    light = 1 - ndimage.gaussian_filter(frame.astype(float), 1.5)[..., None]
    rgb = (rgb * light + rng.normal(0, 2, rgb.shape)).clip(0, 255)
    for top, left in rng.integers(20, np.array(truth.shape) - 40, (80, 2)):
        side = int(rng.integers(2, 15))
        rgb[top : top + side, left : left + side] *= rng.uniform(0.2, 0.9, 3)
    mask = found(rgb.astype(np.uint8))
    assert dice(mask & ~frame, truth & ~frame) > 0.95
    assert not (mask & frame & ~truth).any()


@pytest.mark.parametrize('stain', STAINS)
def test_sample_slide_has_no_ink(stain):
    with Slide(sample_slide()) as s:
        assert not pen_marks(s.read(SPACING), SPACING, stain=stain).any()


# ---- other stains

DAB = np.array([0.268, 0.570, 0.776])  # Ruifrok and Johnston 2001
BROWN_PEN = (120, 70, 40)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def light_through(density, rng):
    "Pixels of an optical density (height, width, 3) on glass, with noise of the camera."
    light = 243 * 10**-density + rng.normal(0, 1.5, density.shape)
    return light.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def biopsy():
    "Pixels of a painted biopsy, and where its tissue is."
    biopsy = paint_biopsy((500, 1500), SPACING, 0.3, 1)
    return biopsy.image, biopsy.mask > 0


@pytest.fixture(scope='module')
def amounts(biopsy):
    "Amounts of haematoxylin and eosin (height, width, 1) in the biopsy, and its tissue."
    rgb, tissue = biopsy
    found = optical_density(rgb, 243) @ np.linalg.pinv(SAMPLE_STAINS)
    return *np.split(found.clip(0), 2, axis=2), tissue


def brown_section(amounts, reacts, blue=RUIFROK_JOHNSTON[0]):
    """Density of a section in haematoxylin, faint as a counterstain is, and DAB.

    DAB is where eosin was, in what reacts, bool (height, width)."""
    haematoxylin, eosin, _ = amounts
    counterstain = 0.4 * haematoxylin + 0.2 * eosin
    return counterstain * blue + 1.2 * eosin * reacts[..., None] * DAB


def reacting(amounts, share):
    "Where tissue reacts: this share of the slide, from the left."
    _, _, tissue = amounts
    return np.broadcast_to(np.arange(tissue.shape[1]) < share * tissue.shape[1], tissue.shape)


@pytest.mark.parametrize('share', [0, 0.5, 1])
@pytest.mark.parametrize('blue', [RUIFROK_JOHNSTON[0], SAMPLE_STAINS[0]], ids=['violet', 'blue'])
def test_immunohistochemistry(amounts, share, blue):
    "Brown and blue tissue, as much of it as there is."
    rng = np.random.default_rng(0)
    rgb = light_through(brown_section(amounts, reacting(amounts, share), blue), rng)
    assert iou(found(rgb, stain='ihc'), amounts[2]) > 0.9
    if share == 1:
        assert iou(found(rgb), amounts[2]) < 0.1


@pytest.mark.parametrize('ink', INKS)
def test_pen_on_immunohistochemistry(amounts, ink):
    "Ink is not tissue, and brown tissue beside it is."
    rng = np.random.default_rng(1)
    rgb = light_through(brown_section(amounts, reacting(amounts, 0.5)), rng)
    truth = amounts[2]
    stroke = drawn_stroke(truth.shape, rng)
    mask = found(under_ink(rgb, stroke, INKS[ink], rng), stain='ihc')
    near = ndimage.binary_dilation(stroke, iterations=22)
    assert iou(mask & ~near, truth & ~near) > 0.9
    assert (mask & near & ~truth).sum() < 0.03 * (near & ~truth).sum()


def test_brown_ink_is_tissue_where_brown_is_a_stain(biopsy):
    "As nothing but the stain tells them apart."
    rgb, truth = biopsy
    rng = np.random.default_rng(0)
    stroke = drawn_stroke(truth.shape, rng)
    marked = under_ink(rgb, stroke, BROWN_PEN, rng)
    outside = stroke & ~ndimage.binary_dilation(truth, iterations=12)
    assert found(marked)[outside].mean() < 0.03
    assert found(marked, stain='ihc')[outside].mean() > 0.9


def faded(rgb, strength, rng):
    "Pixels with a share of their stain, and noise of the camera."
    pale = 243 * (rgb / 243).clip(1e-3) ** strength + rng.normal(0, 1.5, rgb.shape)
    return pale.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('strength', [0.5, 0.2, 0.08])
def test_pale_tissue(painted, strength):
    rgb, truth, _ = painted
    pale = faded(rgb, strength, np.random.default_rng(0))
    assert iou(found(pale, stain='pale'), truth) > 0.9
    if strength == 0.08:
        assert iou(found(pale), truth) < 0.1


@pytest.mark.parametrize(
    'strength, least, most', [(0.1, 0.8, 1), (0.05, 0.2, 0.97), (0.03, 0, 0.2), (0.01, 0, 0)]
)
def test_how_pale_tissue_may_be(painted, strength, least, most):
    "The limits that the notebook tells: most of it at a tenth of the stain, parts at a twentieth."
    rgb, truth, _ = painted
    mask = found(faded(rgb, strength, np.random.default_rng(0)), stain='pale')
    assert least <= (mask & truth).sum() / truth.sum() <= most
    assert (mask & ~truth).sum() < 0.02 * (~truth).sum()


@pytest.mark.parametrize(
    'color, density, expected',
    [
        ((0, 0.5, 1), 0.01, set()),
        ((0, 0.5, 1), 0.02, {'pale'}),
        ((0, 0.5, 1), 0.05, {'he', 'pale'}),
        ((1, 0.5, 0.2), 0.02, {'pale'}),
        ((1, 1, 1), 0.1, set()),
    ],
    ids=['hardly yellow', 'a little yellow', 'yellow', 'wiped ink', 'grey'],
)
def test_coloured_glass_is_tissue_to_a_preset_for_what_is_pale(color, density, expected):
    "The other side of finding pale tissue: a tint of 5% of blue light is enough."
    place = np.zeros((300, 300, 1))
    place[100:200, 100:200] = 1
    clean = 243 * 10 ** (-density * place * np.array(color))
    rgb = np.round(clean + np.random.default_rng(0).normal(0, 1.5, clean.shape))
    rgb = rgb.clip(0, 255).astype(np.uint8)
    taken = {stain for stain in ('he', 'pale') if tissue_mask(rgb, 4.0, stain=stain)[0].any()}
    assert taken == expected


@pytest.mark.parametrize('ink', ['blue', 'green', 'black'])
def test_pen_on_pale_tissue(biopsy, ink):
    rgb, truth = biopsy
    rng = np.random.default_rng(2)
    stroke = drawn_stroke(truth.shape, rng)
    marked = under_ink(faded(rgb, 0.1, rng), stroke, INKS[ink], rng)
    mask = found(marked, stain='pale')
    near = ndimage.binary_dilation(stroke, iterations=22)
    assert iou(mask & ~near, truth & ~near) > 0.9
    assert (mask & near & ~truth).sum() < 0.03 * (near & ~truth).sum()


@pytest.mark.parametrize(
    'color, glass, stain',
    [
        ((234, 222, 232), (242, 242, 242), 'pale'),
        ((130, 90, 60), (228, 232, 242), 'ihc'),
        ((170, 130, 95), (228, 232, 242), 'ihc'),
    ],
    ids=['pale', 'brown', 'light brown'],
)
def test_a_square_of_one_color(color, glass, stain):
    "As people have reported them: nothing is found as haematoxylin and eosin."
    rgb = np.full((256, 256, 3), glass, np.uint8)
    rgb[60:200, 50:190] = color
    truth = np.zeros((256, 256), bool)
    truth[60:200, 50:190] = True
    assert not tissue_mask(rgb, 8.0)[0].any()
    assert iou(tissue_mask(rgb, 8.0, stain=stain)[0], truth) > 0.9


def test_a_stain_that_is_not_known():
    with pytest.raises(InputError, match="stain is 'HE'; use he, ihc, pale"):
        find_tissue(np.full((50, 50, 3), 243, np.uint8), stain='HE')


# ---- what was left out


@pytest.fixture
def littered():
    "Pixels at 8 microns: tissue, a mark of a pen, grey dust, a crumb and a black border."
    rgb = np.full((250, 400, 3), 243, np.uint8)
    rgb[100:200, 50:150] = (190, 110, 170)
    rgb[20:80, 200:300] = (40, 70, 170)
    rgb[150:240, 250:350] = 205
    rgb[20:25, 20:30] = (190, 110, 170)
    rgb[:, 390:] = 0
    return rgb


def test_areas_of_what_was_left_out(littered):
    found = find_tissue(littered, 8.0)
    areas = found.areas
    mm2 = 64e-6  # of a pixel
    assert areas.slide == pytest.approx(250 * 400 * mm2)
    assert areas.tissue == pytest.approx(100 * 100 * mm2, rel=0.1)
    assert areas.pen == pytest.approx(60 * 100 * mm2, rel=0.1)
    assert areas.colorless == pytest.approx(90 * 100 * mm2, rel=0.1)
    assert areas.black == pytest.approx(250 * 10 * mm2, rel=0.1)
    assert 0 < areas.small < 0.02
    dark = (littered.max(axis=2) < 240).sum() * mm2
    assert areas.dark == pytest.approx(dark, rel=0.05)
    assert not any((mask & found.mask).any() for mask in found.removed.values())


def test_a_picture_of_what_was_left_out(littered, tmp_path):
    write_tiff(littered, tmp_path / 'a.tiff', 8.0)
    with Slide(tmp_path / 'a.tiff') as slide:
        ax = draw_tissue(slide, find_tissue(slide))
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[0] == '9% has too little colour' and len(legend) == 4
    (picture,) = (image.get_array() for image in ax.get_images())
    blue = picture[50, 250].astype(int)
    assert blue[2] - blue[0] > 150


def why_nothing(rgb, **kwargs):
    "Why pixels at 8 microns have no tissue."
    found = find_tissue(rgb, 8.0, **kwargs)
    assert not found.mask.any()
    return found.why_empty()


def with_square(color):
    rgb = np.full((200, 200, 3), 243, np.uint8)
    rgb[50:150, 40:140] = color
    return rgb


def test_an_empty_mask_says_what_was_taken_for_pen_marks():
    text = why_nothing(with_square((130, 90, 60)))
    assert text.startswith('25% of it is darker than glass, but 25% was taken for pen marks')
    assert '--stain ihc' in text and '--keep-pen' in text
    text = why_nothing(with_square((40, 70, 170)), stain='ihc')
    assert 'for pen marks' in text and '--stain' not in text and '--keep-pen' in text


def test_an_empty_mask_says_what_has_too_little_color():
    text = why_nothing(with_square((234, 222, 232)))
    assert '25% has too little colour' in text and '--stain pale' in text


def test_an_empty_mask_says_what_is_too_small():
    text = why_nothing(with_square((190, 110, 170)), smallest=1e6)
    assert '25% is in pieces below 1 square mm' in text or '26% is in pieces' in text


def test_an_empty_mask_of_a_blank_slide():
    assert why_nothing(with_square(243)) == 'nothing on it is darker than glass'


def test_an_empty_mask_from_a_file(tmp_path):
    mask = np.zeros((200, 200), np.uint8)
    Image.fromarray(mask).save(tmp_path / 'a.png')
    rgb = with_square((190, 110, 170))
    assert why_nothing(rgb, source=tmp_path / 'a.png') == 'its mask marks nothing'
    mask[:4, :4] = 1
    Image.fromarray(mask).save(tmp_path / 'b.png')
    text = why_nothing(rgb, source=tmp_path / 'b.png')
    assert text == 'its mask marks only pieces below 0.02 square mm'


@pytest.fixture
def written(tmp_path):
    "A painted biopsy as a slide, and its mask: uint8 (height, width), classes."
    biopsy = paint_biopsy((500, 900), SPACING, 0.0, 1)
    write_tiff(biopsy.image, tmp_path / 'a.tiff', SPACING)
    with Slide(tmp_path / 'a.tiff') as slide:
        yield slide, biopsy.mask


def as_files(mask):
    "Name -> pixels of a file that says what `mask` says, in one of the ways of doing so."
    white = (mask > 0) * np.uint8(255)
    layer = np.dstack([np.full_like(mask, 90)] * 3 + [white])  # painted on a transparent layer
    objects = (np.arange(mask.size).reshape(mask.shape) % 200 + 1) * (mask > 0)
    return {
        'layer.png': layer,
        'grey.png': layer[..., 2:],
        'shades.jpg': white,
        'classes.png': mask,
        'deep.png': mask.astype(np.uint16),
        'objects.png': objects.astype(np.uint8),  # numbers of many objects
    }


@pytest.mark.parametrize(
    'name',
    ['layer.png', 'grey.png', 'shades.jpg', 'classes.png', 'deep.png', 'objects.png'],
)
def test_mask_from_a_file(written, tmp_path, name):
    slide, mask = written
    Image.fromarray(as_files(mask)[name]).save(tmp_path / name)
    found, _ = tissue_mask(slide, source=tmp_path / name)
    assert dice(found, mask[::2, ::2] > 0) > 0.98


def test_mask_from_a_file_of_another_size(written, tmp_path):
    slide, mask = written
    Image.fromarray(mask[::3, ::3]).save(tmp_path / 'mask.png')
    found, at = tissue_mask(slide, source=tmp_path / 'mask.png')
    assert at == 8.0 and found.shape == (250, 450)
    assert dice(found, mask[::2, ::2] > 0) > 0.95


def test_mask_files_that_are_refused(written, tmp_path):
    slide, mask = written
    Image.fromarray(mask[:, :300]).save(tmp_path / 'other.png')
    Image.fromarray(mask).save(tmp_path / 'classes.jpg')
    Image.fromarray(mask[:1, :1] + np.uint8(1)).save(tmp_path / 'dot.png')
    tifffile.imwrite(
        tmp_path / 'more.tif',
        np.dstack([mask] * 4),
        photometric='rgb',
        extrasamples=['unspecified'],
    )
    for name, says in {
        'other.png': 'does not fit',
        'a.csv': 'is not an image',
        'more.tif': 'what the last one is',
        'classes.jpg': 'numbers of classes',
        'dot.png': 'too coarse',
    }.items():
        with pytest.raises(InputError, match=says):
            tissue_mask(slide, source=tmp_path / name)


def test_mask_from_a_network(written):
    "A streamed network in the place of colour: here one that finds what is darker than glass."
    slide, truth = written
    conv = nn.Conv2d(3, 1, 5, stride=2, padding=2)
    with torch.no_grad():
        conv.weight.fill_(-1 / 75)
        conv.bias.fill_(0.9)
    mask, _ = tissue_mask(slide, source=conv)
    assert mask.shape == (250, 450) and dice(mask, truth[::2, ::2] > 0) > 0.9
    two = nn.Sequential(conv, nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        two[1].weight[:, 0, 0, 0] = torch.tensor([-1.0, 1.0])
        two[1].bias.zero_()
    assert (tissue_mask(slide, source=two)[0] == mask).all()
    with pytest.raises(InputError, match='logits'):
        tissue_mask(slide, source=nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.mark.parametrize('turned', [False, True], ids=['upright', 'flat'])
def test_biopsies_in_reading_order(turned):
    """Cores side by side, in two rows of sections: a piece in line is joined, one beside is not, a
    crumb goes to the nearest."""
    mask = np.zeros((1200, 700), bool)
    corners = [(top, left) for top in (20, 640) for left in (50, 250, 450)]
    for top, left in corners:
        mask[top : top + 500, left : left + 60] = True
    mask[250:280, 250:310] = False  # broken: a gap of 240 microns
    mask[300:304, 130:136] = True  # a crumb beside the first
    found = biopsies(None, mask=(mask.T if turned else mask, 8.0))
    assert len(found) == 6
    for biopsy, (top, left) in zip(found, corners):
        expected = np.array([top + 250, left + 30])
        if turned:
            expected = expected[::-1]
        assert abs(np.argwhere(biopsy.mask).mean(0) - expected).max() < 8
        assert abs(abs(biopsy.angle) - 90 * turned) < 2
    assert found[0].mask.sum() == 500 * 60 + 24


def test_no_tissue_has_no_biopsies():
    assert biopsies(None, mask=(np.zeros((50, 50), bool), 8.0)) == []


def test_large_masks(tmp_path):
    "A mask with more pixels than Pillow opens, as PANDA's have."
    pyvips.Image.black(16000, 14000).draw_rect(1, 8000, 0, 8000, 14000, fill=True).tiffsave(
        str(tmp_path / 'mask.tif'), tile=True, compression='deflate'
    )
    write_tiff(np.full((700, 800, 3), 240, np.uint8), tmp_path / 'a.tiff', SPACING)
    with Slide(tmp_path / 'a.tiff') as s:
        mask, _ = tissue_mask(s, source=tmp_path / 'mask.tif')
    assert mask.shape == (350, 400) and mask[:, 205:].all() and not mask[:, :195].any()


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
    for stain in STAINS:
        assert not tissue_mask(pixels.astype(np.uint8), 8.0, stain=stain)[0].any()


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
