"""Every format opens, with the right pixels and spacing; and what is damaged is refused in one
sentence, never taken, never a crash."""

import gc
import os
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import made
import numpy as np
import openslide
import pytest
import pyvips
import tifffile
from PIL import Image
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.slides import masks
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.datasets import check_cohort
from streaming_pathology.slides.pixels import decoded
from streaming_pathology.slides.readers import slide_files, slide_key
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.trim import each_apart

NAMES = list(made.FORMATS)
FLAT = [name for name, kind in made.FORMATS.items() if not kind.gives_spacing]
WHOLE_TILES = ('hamamatsu.vms', 'mirax.mrxs', 'ventana.bif')  # made of 640 x 512 pixels


@pytest.fixture(scope='module')
def formats(tmp_path_factory):
    return made.every_format(tmp_path_factory.mktemp('formats'))


def opened(path):
    "A slide, with the spacing that flat files need."
    return Slide(path, spacing=made.SPACING if path.name in FLAT else None)


def test_all_are_here(formats):
    assert all(path.exists() for path in formats.values())


@pytest.mark.skipif(sys.platform != 'linux', reason='open files are looked up in /proc')
def test_no_file_stays_open(formats):
    for path in formats.values():
        with opened(path) as slide:
            slide.read(2 * made.SPACING)
    gc.collect()
    held = [os.readlink(file) for file in Path('/proc/self/fd').iterdir() if file.is_symlink()]
    slides = tuple(str(path) for path in formats.values())
    assert not [file for file in held if file.startswith(slides)]


@pytest.fixture
def unclosed():
    """What Python says of files that were let go of unclosed: a list, once the test has called
    `gc.collect`."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always', ResourceWarning)
        yield told


def sentences(told):
    "The texts of warnings of one kind."
    return [str(each.message) for each in told if each.category is ResourceWarning]


@pytest.mark.parametrize('name', NAMES)
def test_every_file_is_closed(formats, name, unclosed):
    with opened(formats[name]) as slide:
        slide.read(2 * made.SPACING)
        slide.associated()
    slide_files(formats[name])
    del slide
    gc.collect()
    assert sentences(unclosed) == []


def test_temporary_files_are_closed(formats, unclosed, monkeypatch):
    "A flat image and a mask that are too large for the memory lie in one."
    image = pyvips.Image.new_from_file(str(formats['image.png']))
    pixels = decoded(formats['image.png'], image, in_memory=0)
    assert (pixels == image.numpy()).all()
    monkeypatch.setattr(masks, 'IN_MEMORY', 0)
    numbers = masks.zeros((40, 50, 1), np.uint8)
    numbers[3] = 7
    assert numbers.sum() == 7 * 50
    del pixels, numbers
    gc.collect()
    assert sentences(unclosed) == []


def shown(name, rgb):
    "What a slide of a format shows of these pixels."
    if name == 'leica.scn':  # on a larger glass
        glass = np.full((1100, 1140, 3), 255, np.uint8)
        glass[200:900, 300:840] = rgb
        return glass
    return rgb[:640, :512] if name in WHOLE_TILES else rgb


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'sample.svs'])
def test_format(formats, name):
    "Pixels, levels and spacing, of the whole and of a region."
    rgb = shown(name, made.pixels())
    kind = made.FORMATS[name]
    with opened(formats[name]) as slide:
        assert slide.size == rgb.shape[:2]
        assert abs(slide.spacing / made.SPACING - 1) < 0.005 and not slide.contradictions
        assert len(slide.levels) == kind.levels
        found = slide.read(made.SPACING)
        assert abs(found.astype(int) - rgb).mean() < (4 if kind.is_lossy else 1e-9)
        part = slide.read(made.SPACING, (300, 200, 60, 70))
        assert (part == found[300:360, 200:270]).all()
        height, width = (side // 2 - 1 for side in rgb.shape[:2])
        blocks = rgb[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        half = slide.read(2 * made.SPACING)[:height, :width]
        assert abs(half - blocks.mean((1, 3))).mean() < 12


def test_without_spacing(formats):
    for name in FLAT:
        assert 'has no pixel size' in refusal(Slide, formats[name])


def test_slide_files(formats):
    "All files of a slide, whose change is noticed."
    assert len(slide_files(formats['dicom'])) == 4
    assert len(slide_files(formats['mirax.mrxs'])) == 4
    named = [file.name for file in slide_files(formats['hamamatsu.vms'])]
    images = [f'hamamatsu-{key}.jpg' for key in ('ImageFile', 'MacroImage', 'MapFile')]
    assert named == [*images, 'hamamatsu.vms']
    assert slide_files(formats['pages.tif']) == [formats['pages.tif']]


def test_contradictions(tmp_path, formats):
    "What the file says first is used; what contradicts it is told."
    made.ome(tmp_path / 'a.ome.tif', made.pixels((440, 440)))
    image = pyvips.Image.new_from_file(str(tmp_path / 'a.ome.tif'))
    path = tmp_path / 'a.tif'  # its tags say 1 micron, the metadata that are kept 0.5
    image.copy(xres=1000, yres=1000).tiffsave(str(path), tile=True, resunit='cm')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        slide = Slide(path)
    assert abs(slide.spacing - 1) < 0.005 and len(seen) == 1
    assert len(slide.contradictions) == 1 and 'OME metadata' in slide.contradictions[0]
    with pytest.warns(UserWarning, match='0.25 by its given spacing; 0.5 is used'):
        assert abs(Slide(formats['pages.tif'], spacing=0.25).spacing - 0.5) < 1e-3
    with pytest.warns(UserWarning, match='0.5 by its resolution tags; 0.25 is used'):
        assert Slide(formats['pages.tif'], spacing=0.25, override=True).spacing == 0.25


def test_openslide_against_the_tags(tmp_path):
    "The scanner's own words are used, the resolution tags beside them reported."
    path, rgb = tmp_path / 'a.svs', made.pixels((440, 440))
    about = (
        'Aperio Image Library v11.2.1 \r\n440x440 [0,0 440x440] (256x256) JPEG/RGB Q=95'
        '|AppMag = 20|MPP = 0.5'
    )
    options = dict(made.TIFFS, tile=(256, 256), description=about, software=False)
    tags = dict(resolution=(1e4 / 0.4, 1e4 / 0.4), resolutionunit='CENTIMETER')
    with tifffile.TiffWriter(path) as file:
        for step in (1, 4):
            file.write(rgb[::step, ::step], **options, **tags)
    said = '0.5 microns per pixel by its properties of the scanner, but 0.4 by its resolution tags'
    with pytest.warns(UserWarning, match=f'{said}; 0.5 is used'):
        assert Slide(path).spacing == 0.5


OTHER_CHANNELS = dict(resolution=(2e4, 2e4), resolutionunit='CENTIMETER', metadata=None)


@pytest.mark.parametrize('kind, is_kept', [('unspecified', True), ('unassalpha', False)])
def test_other_channels(tmp_path, kind, is_kept):
    "Of a TIFF's other channels only those that say so are transparency."
    rgb = made.pixels((440, 450))[:140, :150]
    more = np.full((140, 150, 1), 100, np.uint8)
    options = dict(photometric='rgb', extrasamples=[kind], **OTHER_CHANNELS)
    tifffile.imwrite(tmp_path / 'a.tif', np.dstack([rgb, more]), **options)
    assert (Slide(tmp_path / 'a.tif').read(0.5) == rgb).all() == is_kept


def test_channels_that_are_no_colours(tmp_path):
    "Two channels, and tiles of one colour each, are refused."
    rgb = made.pixels((440, 450))[:140, :150]
    options = dict(planarconfig='contig', extrasamples=['unspecified'], **OTHER_CHANNELS)
    tifffile.imwrite(tmp_path / 'a.tif', rgb[..., :2], photometric='minisblack', **options)
    assert 'has 2 channels' in refusal(Slide, tmp_path / 'a.tif')
    options = dict(planarconfig='separate', tile=(64, 64), **OTHER_CHANNELS)
    tifffile.imwrite(tmp_path / 'a.tif', np.moveaxis(rgb, -1, 0), photometric='rgb', **options)
    assert 'tiles of its own' in refusal(Slide, tmp_path / 'a.tif')


WITH_PHOTOGRAPHS = (
    'aperio.svs',
    'sample.svs',
    'dicom',
    'hamamatsu.ndpi',
    'hamamatsu.vms',
    'leica.scn',
    'philips.tiff',
    'ventana.bif',
)


def test_label_and_macro_stay(formats):
    "No way leads to the label or the macro photograph."
    for name in WITH_PHOTOGRAPHS:
        with Slide(formats[name]) as slide:
            assert set(slide._open().file.associated_images) & {'label', 'macro'}
            found = slide.associated()
            assert set(found) <= {'thumbnail', 'map'}
            assert not any(np.unique(each).tolist() in ([7], [9]) for each in found.values())


# ---- DICOM


def test_a_folder_with_two_slides(tmp_path, formats):
    assert Slide(formats['dicom'] / 'level1.dcm').size == Slide(formats['dicom']).size
    shutil.copytree(formats['dicom'], tmp_path / 'two')
    made.dicom(tmp_path / 'other', made.pixels((440, 440)))
    for file in (tmp_path / 'other').iterdir():
        shutil.copy(file, tmp_path / 'two' / f'other_{file.name}')
    assert 'holds 2 slides' in refusal(Slide, tmp_path / 'two')
    n_files = len([*(tmp_path / 'two').iterdir()])
    assert len(slide_files(tmp_path / 'two/level1.dcm')) * 2 == n_files
    (tmp_path / 'empty').mkdir()
    assert 'without DICOM' in refusal(Slide, tmp_path / 'empty')


def test_two_files_of_a_series_are_one_slide(tmp_path, formats):
    lines = ['slide_id,label,path,patient_id,split']
    for level, split in enumerate(('train', 'test')):
        path = formats['dicom'] / f'level{level}.dcm'
        lines.append(f's{level},{level},{path},p{level},{split}')
    (tmp_path / 'm.csv').write_text('\n'.join(lines) + '\n')
    says = refusal(read_manifest, tmp_path / 'm.csv')
    assert 'line 3: ' in says and 'level1.dcm is the slide that was given on line 2' in says
    assert slide_files(tmp_path / 'm.csv') == [tmp_path / 'm.csv']


def test_names_of_dicom_files_do_not_matter(tmp_path, formats):
    folder = tmp_path / 'names'
    shutil.copytree(formats['dicom'], folder)
    for file in sorted(folder.iterdir()):
        file.rename(file.with_suffix('.DCM') if file.stem == 'level0' else file.with_suffix(''))
    files = sorted(folder.iterdir())
    assert len({slide_key(path) for path in (folder, *files)}) == 1
    assert all(slide_files(path) == files for path in (folder, *files))
    (folder / 'level1').write_bytes((folder / 'level1').read_bytes()[:9000])
    assert 'truncated' in refusal(Slide, folder / 'level0.DCM')


# ---- a corpus of damaged files

SHARES = (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
MIRAX_FILES = ('Data0000.dat', 'Index.dat', 'Slidedat.ini')
OF_SEVERAL_FILES = ('dicom', 'hamamatsu.vms', 'mirax.mrxs')


def cut_short(formats, folder):
    "Every format cut at several places, but for VMS, which `test_fuzz` damages."
    for name in NAMES:
        if name == 'hamamatsu.vms':
            continue
        for number, share in enumerate(SHARES):
            path = victim = folder / f'cut{number}_{name}'
            if name == 'dicom':
                shutil.copytree(formats[name], path)
                victim = path / 'level0.dcm'
            else:
                shutil.copy(formats[name], path)
            if name == 'mirax.mrxs':
                shutil.copytree(formats[name].with_suffix(''), path.with_suffix(''))
                victim = path.with_suffix('') / MIRAX_FILES[number % 3]
            data = victim.read_bytes()
            victim.write_bytes(data[: int(len(data) * share)])


def flipped(formats, folder):
    """Bytes flipped at random where the format can know: anywhere in files with checksums, in the
    headers of others; not in JPEG, whose header may say anything."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        if name in (*OF_SEVERAL_FILES, 'image.jpg'):
            continue
        data = formats[name].read_bytes()
        has_checksum = name in ('image.png', 'strips.tif', 'pages.tif')
        reach, n = (len(data), 40) if has_checksum else (64, 12)
        for number in range(6):
            broken = bytearray(data)
            for at in rng.integers(0, reach, n):
                broken[at] ^= int(rng.integers(1, 256))
            (folder / f'flip{number}_{name}').write_bytes(broken)


ENDINGS = ('svs', 'tif', 'tiff', 'ndpi', 'mrxs', 'scn', 'bif', 'dcm', 'png', 'jpg', 'webp')
DRAWING = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="500" height="400">'
    '<rect width="300" height="300" fill="purple"/></svg>'
)


def wrong(formats, folder):
    "Files that are something else."
    picture = Image.fromarray(made.pixels())
    for ending in ENDINGS:
        (folder / f'empty.{ending}').touch()
        (folder / f'zeros.{ending}').write_bytes(bytes(5000))
        (folder / f'text.{ending}').write_text('slide_id,label\n')
        with zipfile.ZipFile(folder / f'zip.{ending}', 'w') as archive:
            archive.writestr('slide.tif', bytes(1000))
        noise = np.random.default_rng(len(ending)).bytes(3000)
        (folder / f'random.{ending}').write_bytes(noise)
        (folder / f'drawing.{ending}').write_text(DRAWING)
        picture.save(folder / f'animation.{ending}', 'GIF')
        picture.save(folder / f'bitmap.{ending}', 'PPM')
    (folder / 'folder.svs').mkdir()


IMPOSSIBLE = {256: 2**31 - 1, 257: 2**31 - 1, 277: 40_000, 258: 77, 262: 3000, 259: 60_000}


def crafted(formats, folder):
    "A huge declared size, tags with impossible values, and directories that form a loop."
    data = bytearray(formats['image.png'].read_bytes())
    data[16:24] = struct.pack('>II', 200_000, 200_000)
    data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    (folder / 'huge.png').write_bytes(data)
    for name in ('pages.tif', 'strips.tif', 'children.tif'):
        data = bytearray(formats[name].read_bytes())
        (first,) = struct.unpack_from('<I', data, 4)
        (n,) = struct.unpack_from('<H', data, first)
        entries = range(first + 2, first + 2 + 12 * n, 12)
        looped = bytearray(data)
        struct.pack_into('<I', looped, entries.stop, first)
        (folder / f'loop_{name}').write_bytes(looped)
        for tag, value in IMPOSSIBLE.items():
            changed = bytearray(data)
            for at in entries:
                if struct.unpack_from('<H', data, at)[0] == tag:
                    struct.pack_into('<HII', changed, at + 2, 4, 1, value)
            (folder / f'tag{tag}_{name}').write_bytes(changed)


def outcome(path):
    "What becomes of one file in a cohort: None if it would be trained on, else the reason."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        case = Case(path.name, 1.0, path, spacing=made.SPACING)
        try:
            check_cohort([case], made.SPACING, progress=False)
        except InputError as e:
            return str(e)


N_DAMAGED = 331  # cut 136, flipped 84, something else 89, crafted 22


@pytest.mark.timeout(600)
def test_damaged_corpus(formats, tmp_path):
    "None hangs, crashes its process or enters training; each is named with a reason, in one line."
    for make in (cut_short, flipped, wrong, crafted):
        make(formats, tmp_path)
    data_of_mirax = {path.with_suffix('') for path in tmp_path.glob('*.mrxs')}
    paths = sorted(path for path in tmp_path.iterdir() if path not in data_of_mirax)
    assert len(paths) == N_DAMAGED
    entered = []
    for path, says, error in each_apart(outcome, paths, workers=2):
        assert error is None, f'{path.name}: {error!r}'
        if says is None:
            entered.append(path.name)
        else:
            is_sentence = '\n' not in says and 'Traceback' not in says
            assert path.name in says and is_sentence, (path.name, says)
    assert not entered


def test_a_small_map_of_hamamatsu_has_fewer_levels(formats, tmp_path):
    "OpenSlide halves the map until nothing is left of it, and calls that a level."
    for file in slide_files(formats['hamamatsu.vms']):
        shutil.copy(file, tmp_path)
    path = tmp_path / 'hamamatsu.vms'
    small = made.vips(np.full((2, 256, 3), 200, np.uint8))
    data = small.jpegsave_buffer(Q=95, subsample_mode='off', restart_interval=4)
    (tmp_path / 'hamamatsu-MapFile.jpg').write_bytes(data)
    with openslide.OpenSlide(path) as file:
        assert min(file.level_dimensions[-1]) == 0
    with Slide(path) as slide:
        assert slide.size == (640, 512)
        assert all(level.height and level.width for level in slide.levels)


def test_a_library_that_quotes_a_file_is_cut_short(formats, tmp_path):
    path = tmp_path / 'mirax.mrxs'
    shutil.copy(formats['mirax.mrxs'], path)
    shutil.copytree(formats['mirax.mrxs'].with_suffix(''), tmp_path / 'mirax')
    index = tmp_path / 'mirax/Slidedat.ini'
    index.write_text('x' * 5000 + '\n' + index.read_text())
    assert len(refusal(Slide, path)) < 700


def test_numbers_with_a_sign_are_refused_at_opening(tmp_path):
    "Not only where pixels are read, so that a check without tissue says it too."
    path = tmp_path / 'signed.tif'
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.int8), photometric='rgb', tile=(32, 32))
    assert 'char pixels' in refusal(Slide, path, 0.5)
