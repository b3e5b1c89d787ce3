"Every format opens, with the right pixels and spacing; and what is damaged is refused in one sentence, never taken, never a crash."

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
import pytest
import pyvips
import tifffile
from PIL import Image

from streaming_pathology.core import InputError
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.datasets import check_cohort
from streaming_pathology.slides.readers import slide_files, slide_key
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.trim import each_apart


@pytest.fixture(scope='module')
def formats(tmp_path_factory):
    return made.every_format(tmp_path_factory.mktemp('formats'))


NAMES = list(made.FORMATS)
FLAT = [name for name, kind in made.FORMATS.items() if not kind.gives_spacing]


def test_all_are_here(formats):
    assert all(path.exists() for path in formats.values())


def test_slide_files(formats):
    "All files of a slide, whose change is noticed."
    assert len(slide_files(formats['dicom'])) == 4
    assert len(slide_files(formats['mirax.mrxs'])) == 4
    named = [file.name for file in slide_files(formats['hamamatsu.vms'])]
    assert named == [
        'hamamatsu-ImageFile.jpg',
        'hamamatsu-MacroImage.jpg',
        'hamamatsu-MapFile.jpg',
        'hamamatsu.vms',
    ]
    assert slide_files(formats['pages.tif']) == [formats['pages.tif']]


@pytest.mark.skipif(sys.platform != 'linux', reason='open files are looked up in /proc')
def test_no_file_stays_open(formats):
    for name, path in formats.items():
        with Slide(path, spacing=made.SPACING if name in FLAT else None) as s:
            s.read(2 * made.SPACING)
    gc.collect()
    held = [os.readlink(f) for f in Path('/proc/self/fd').iterdir() if f.is_symlink()]
    assert not [h for h in held if any(h.startswith(str(p)) for p in formats.values())], held


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'sample.svs'])
def test_format(formats, name):
    "Pixels, levels and spacing, of the whole and of a region."
    rgb = made.pixels()
    with Slide(formats[name], spacing=made.SPACING if name in FLAT else None) as s:
        if name == 'leica.scn':
            full = np.full((1100, 1140, 3), 255, np.uint8)
            full[200:900, 300:840] = rgb
            rgb = full  # on a larger glass
        if name in ('hamamatsu.vms', 'mirax.mrxs', 'ventana.bif'):
            rgb = rgb[:640, :512]
        assert (
            s.size == rgb.shape[:2]
            and abs(s.spacing / made.SPACING - 1) < 0.005
            and len(s.levels) == made.FORMATS[name].levels
            and not s.contradictions
        )
        got = s.read(made.SPACING)
        assert abs(got.astype(int) - rgb).mean() < (4 if made.FORMATS[name].is_lossy else 1e-9)
        assert (s.read(made.SPACING, (300, 200, 60, 70)) == got[300:360, 200:270]).all()
        h, w = (n // 2 - 1 for n in rgb.shape[:2])
        assert (
            abs(
                s.read(2 * made.SPACING)[:h, :w]
                - rgb[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3))
            ).mean()
            < 12
        )


def test_without_spacing(formats):
    for name in FLAT:
        with pytest.raises(InputError, match='has no pixel size'):
            Slide(formats[name])


def test_contradictions(tmp_path, formats):
    "What the file says first is used; what contradicts it is told."
    rgb = made.pixels((440, 440))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        made.ome(tmp_path / 'a.ome.tif', rgb)
        data = tmp_path / 'a.tif'
        pyvips.Image.new_from_file(str(tmp_path / 'a.ome.tif')).copy(xres=1000, yres=1000).tiffsave(
            str(data), tile=True, resunit='cm'
        )  # tags say 1 micron, the metadata that is kept .5
        s = Slide(data)
    assert (
        abs(s.spacing - 1) < 0.005
        and len(s.contradictions) == 1
        and 'OME metadata' in s.contradictions[0]
        and len(seen) == 1
    )
    with pytest.warns(UserWarning, match='0.25 by its given spacing; 0.5 is used'):
        assert abs(Slide(formats['pages.tif'], spacing=0.25).spacing - 0.5) < 1e-3
    with pytest.warns(UserWarning, match='0.5 by its resolution tags; 0.25 is used'):
        assert Slide(formats['pages.tif'], spacing=0.25, override=True).spacing == 0.25


def test_openslide_against_the_tags(tmp_path):
    "The scanner's own words are used, the resolution tags beside them reported."
    path = tmp_path / 'a.svs'
    rgb = made.pixels((440, 440))
    with tifffile.TiffWriter(path) as t:
        for f in (1, 4):
            t.write(
                rgb[::f, ::f],
                tile=(256, 256),
                description='Aperio Image Library v11.2.1 \r\n440x440 [0,0 440x440] (256x256) JPEG/RGB Q=95|AppMag = 20|MPP = 0.5',
                resolution=(1e4 / 0.4, 1e4 / 0.4),
                resolutionunit='CENTIMETER',
                software=False,
                **made.TIFFS,
            )
    with pytest.warns(
        UserWarning,
        match='0.5 microns per pixel by its properties of the scanner, but 0.4 by its resolution tags; 0.5 is used',
    ):
        assert Slide(path).spacing == 0.5


def test_other_channels(tmp_path):
    "Of a TIFF's other channels only those that say so are transparency; tiles of one colour each are refused."
    rgb, more = made.pixels((440, 450))[:140, :150], np.full((140, 150, 1), 100, np.uint8)
    kwargs = dict(resolution=(2e4, 2e4), resolutionunit='CENTIMETER', metadata=None)
    for kind, kept in (('unspecified', True), ('unassalpha', False)):
        tifffile.imwrite(
            tmp_path / 'a.tif',
            np.dstack([rgb, more]),
            photometric='rgb',
            extrasamples=[kind],
            **kwargs,
        )
        assert (Slide(tmp_path / 'a.tif').read(0.5) == rgb).all() == kept
    tifffile.imwrite(
        tmp_path / 'a.tif',
        np.dstack([rgb[..., :1], more]),
        photometric='minisblack',
        planarconfig='contig',
        extrasamples=['unspecified'],
        **kwargs,
    )
    with pytest.raises(InputError, match='has 2 channels'):
        Slide(tmp_path / 'a.tif')
    tifffile.imwrite(
        tmp_path / 'a.tif',
        np.moveaxis(rgb, -1, 0),
        photometric='rgb',
        planarconfig='separate',
        tile=(64, 64),
        **kwargs,
    )
    with pytest.raises(InputError, match='tiles of its own'):
        Slide(tmp_path / 'a.tif')


def test_label_and_macro_stay(formats):
    "No way leads to the label or the macro photograph."
    for name in (
        'aperio.svs',
        'sample.svs',
        'dicom',
        'hamamatsu.ndpi',
        'leica.scn',
        'philips.tiff',
        'ventana.bif',
    ):
        with Slide(formats[name]) as s:
            assert set(s._open().file.associated_images) & {'label', 'macro'}
            assert set(s.associated()) <= {'thumbnail', 'map'}
            assert not any(np.unique(a).tolist() in ([7], [9]) for a in s.associated().values())


def test_dicom_folders(tmp_path, formats):
    assert Slide(formats['dicom'] / 'level1.dcm').size == Slide(formats['dicom']).size
    shutil.copytree(formats['dicom'], tmp_path / 'two')
    made.dicom(tmp_path / 'other', made.pixels((440, 440)))
    for p in (tmp_path / 'other').iterdir():
        shutil.copy(p, tmp_path / 'two' / f'other_{p.name}')
    with pytest.raises(InputError, match='holds 2 slides'):
        Slide(tmp_path / 'two')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='without DICOM'):
        Slide(tmp_path / 'empty')
    (tmp_path / 'm.csv').write_text(
        'slide_id,label,path,patient_id,split\n'
        + ''.join(
            f'{p.parent.name}{p.stem},{k},{p},p{k},{s}\n'
            for k, (p, s) in enumerate(
                (
                    (formats['dicom'] / 'level0.dcm', 'train'),
                    (formats['dicom'] / 'level1.dcm', 'test'),
                )
            )
        )
    )
    with pytest.raises(
        InputError, match='line 3: .*level1.dcm is the slide that was given on line 2'
    ):
        read_manifest(tmp_path / 'm.csv')
    shutil.copytree(formats['dicom'], tmp_path / 'names')
    for p in sorted((tmp_path / 'names').iterdir()):
        p.rename(p.with_suffix('.DCM') if p.stem == 'level0' else p.with_suffix(''))
    assert len({slide_key(p) for p in (tmp_path / 'names', *(tmp_path / 'names').iterdir())}) == 1
    assert all(
        slide_files(p) == sorted((tmp_path / 'names').iterdir())
        for p in (tmp_path / 'names', *(tmp_path / 'names').iterdir())
    )
    assert len(slide_files(tmp_path / 'two/level1.dcm')) * 2 == len(
        [*(tmp_path / 'two').iterdir()]
    ) and slide_files(tmp_path / 'm.csv') == [tmp_path / 'm.csv']
    (tmp_path / 'names/level1').write_bytes((tmp_path / 'names/level1').read_bytes()[:9000])
    with pytest.raises(InputError, match='truncated'):
        Slide(tmp_path / 'names/level0.DCM')


# ---- a corpus of damaged files


def cut_short(formats, folder):
    "Every format cut at several places."
    for name in NAMES:
        if name == 'hamamatsu.vms':
            continue  # a text that names images; they are damaged in `test_fuzz`
        for k, share in enumerate((0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)):
            path = victim = folder / f'cut{k}_{name}'
            if name == 'dicom':
                shutil.copytree(formats[name], path)
                victim = path / 'level0.dcm'
            else:
                shutil.copy(formats[name], path)
            if name == 'mirax.mrxs':
                shutil.copytree(formats[name].with_suffix(''), path.with_suffix(''))
                victim = path.with_suffix('') / ('Data0000.dat', 'Index.dat', 'Slidedat.ini')[k % 3]
            data = victim.read_bytes()
            victim.write_bytes(data[: int(len(data) * share)])


def flipped(formats, folder):
    "Bytes flipped at random where the format can know: anywhere in files with checksums, in the headers of others; not in JPEG, whose header may say anything."
    rng = np.random.default_rng(0)
    for name in NAMES:
        if name in ('dicom', 'hamamatsu.vms', 'image.jpg', 'mirax.mrxs'):
            continue
        data = formats[name].read_bytes()
        for k in range(6):
            broken, n = (
                bytearray(data),
                len(data) if name in ('image.png', 'strips.tif', 'pages.tif') else 64,
            )
            for at in rng.integers(0, n, 40 if n > 64 else 12):
                broken[at] ^= int(rng.integers(1, 256))
            (folder / f'flip{k}_{name}').write_bytes(broken)


def wrong(formats, folder):
    "Files that are something else."
    for ending in ('svs', 'tif', 'tiff', 'ndpi', 'mrxs', 'scn', 'bif', 'dcm', 'png', 'jpg', 'webp'):
        (folder / f'empty.{ending}').touch()
        (folder / f'zeros.{ending}').write_bytes(bytes(5000))
        (folder / f'text.{ending}').write_text('slide_id,label\n')
        with zipfile.ZipFile(folder / f'zip.{ending}', 'w') as z:
            z.writestr('slide.tif', bytes(1000))
        (folder / f'random.{ending}').write_bytes(np.random.default_rng(len(ending)).bytes(3000))
        (folder / f'drawing.{ending}').write_text(
            '<svg xmlns="http://www.w3.org/2000/svg" width="500" height="400"><rect width="300" height="300" fill="purple"/></svg>'
        )
        Image.fromarray(made.pixels()).save(folder / f'animation.{ending}', 'GIF')
        Image.fromarray(made.pixels()).save(folder / f'bitmap.{ending}', 'PPM')
    (folder / 'folder.svs').mkdir()


def crafted(formats, folder):
    "A huge declared size, and directories that form a loop."
    data = bytearray(formats['image.png'].read_bytes())
    data[16:24] = struct.pack('>II', 200_000, 200_000)
    data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    (folder / 'huge.png').write_bytes(data)

    def entries(
        data, at
    ):  # byte of each entry of a classic TIFF directory, and of the next pointer
        (n,) = struct.unpack_from('<H', data, at)
        return range(at + 2, at + 2 + 12 * n, 12), at + 2 + 12 * n

    for name in ('pages.tif', 'strips.tif', 'children.tif'):
        data = bytearray(formats[name].read_bytes())
        (first,) = struct.unpack_from('<I', data, 4)
        places, pointer = entries(data, first)
        looped = bytearray(data)
        struct.pack_into('<I', looped, pointer, first)
        (folder / f'loop_{name}').write_bytes(looped)
        for tag, value in (
            (256, 2**31 - 1),
            (257, 2**31 - 1),
            (277, 40_000),
            (258, 77),
            (262, 3000),
            (259, 60_000),
        ):
            changed = bytearray(data)
            for p in places:
                if struct.unpack_from('<H', data, p)[0] == tag:
                    struct.pack_into('<HII', changed, p + 2, 4, 1, value)
            (folder / f'tag{tag}_{name}').write_bytes(changed)


def outcome(path):
    "What becomes of one file in a cohort: None if it would be trained on, else the reason that is given."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            check_cohort(
                [Case(path.name, 1.0, path, spacing=made.SPACING)], made.SPACING, progress=False
            )
        except InputError as e:
            return str(e)


@pytest.mark.timeout(600)
def test_damaged_corpus(formats, tmp_path):
    "None hangs, crashes its process or enters training; each is named with a reason, in one line."
    for make in (cut_short, flipped, wrong, crafted):
        make(formats, tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) >= 200, len(paths)
    entered = []
    for path, said, error in each_apart(outcome, paths, workers=2):
        assert error is None, f'{path.name}: {error!r}'
        if said is None:
            entered.append(path.name)
        else:
            assert path.name in said and '\n' not in said and 'Traceback' not in said, (
                path.name,
                said,
            )
    assert not entered, entered


def test_flips_in_pixels(formats, tmp_path):
    "What no checksum tells is read or refused, nothing else."
    rng = np.random.default_rng(1)
    for name in NAMES:
        source = formats[name] / 'level0.dcm' if name == 'dicom' else formats[name]
        for k in range(6):
            if name == 'dicom':
                shutil.copytree(formats[name], tmp_path / 'dicom', dirs_exist_ok=True)
            path = tmp_path / 'dicom/level0.dcm' if name == 'dicom' else tmp_path / name
            broken = bytearray(source.read_bytes())
            for at in rng.integers(64, len(broken), 5):
                broken[at] ^= 255
            path.write_bytes(broken)
            said = outcome(path)
            assert said is None or '\n' not in said
