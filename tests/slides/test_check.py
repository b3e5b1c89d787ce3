"What a check tells of slides: formats, spacings and their sources, compressions, tissue; and what is wrong."

import made
import numpy as np
import pytest
import tifffile
from PIL import Image

from streaming_pathology.slides import check as checking
from streaming_pathology.slides import slides
from streaming_pathology.slides.check import check_slide, check_slides
from streaming_pathology.slides.cohorts import Case, tiny_cohort
from streaming_pathology.slides.readers import open_reader, write_tiff

RGB = np.random.default_rng(0).integers(90, 250, (700, 540, 3), np.uint8)
SCANNER = 'properties of the scanner'


def case(path, spacing=None, **more):
    return Case(path.stem, None, path, spacing=spacing, **more)


def tissue_slide(path, boxes, size=(600, 800), spacing=4.0):
    "A slide with boxes of tissue: (top, left, height, width) in pixels."
    rgb = np.full((*size, 3), 243, np.uint8)
    for top, left, height, width in boxes:
        rgb[top : top + height, left : left + width] = (190, 110, 160)
    write_tiff(rgb, path, spacing)
    return path


# ---- formats

FORMATS = {
    'svs': (made.svs, 'Aperio', 2, 'none', SCANNER),
    'tiff': (made.philips, 'Philips', 2, 'none', SCANNER),
    'scn': (made.leica, 'Leica', 2, 'none', SCANNER),
    'ndpi': (made.hamamatsu, 'Hamamatsu', 3, 'JPEG', SCANNER),
    'mrxs': (made.mirax, '3DHISTECH (MIRAX)', 2, 'JPEG', SCANNER),
    'ome.tif': (made.ome, 'OME-TIFF', 3, 'deflate', 'OME metadata'),
}


@pytest.mark.parametrize('ending', FORMATS)
def test_what_a_format_says(tmp_path, ending):
    make, name, n_levels, compression, source = FORMATS[ending]
    path = tmp_path / f'a.{ending}'
    make(path, RGB)
    found = check_slide(case(path), tissue=False)
    assert (found.format, found.n_levels, found.compression) == (name, n_levels, compression)
    assert abs(found.spacing - made.SPACING) < 1e-3
    assert found.spacing_from == source
    assert found.problem == '' and found.tissue_mm2 is None


def test_a_folder_of_dicom(tmp_path):
    path = made.dicom(tmp_path / 'a', RGB[:128, :96])
    found = check_slide(case(path), tissue=False)
    assert (found.format, found.size, found.n_levels) == ('DICOM', (128, 96), 2)
    assert found.compression.startswith('JPEG Baseline')
    assert found.n_bytes == sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize('compression, name', [('jpeg', 'JPEG'), ('deflate', 'deflate')])
def test_a_tiff(tmp_path, compression, name):
    path = tmp_path / 'a.tif'
    write_tiff(RGB, path, 0.25, compression)
    found = check_slide(case(path), tissue=False)
    assert (found.compression, found.spacing_from) == (name, 'resolution tags')
    assert abs(found.spacing - 0.25) < 1e-4


# ---- spacing


def test_a_spacing_that_the_user_gives(tmp_path):
    path = tmp_path / 'a.png'
    Image.fromarray(RGB).save(path)
    without = check_slide(case(path))
    assert 'has no pixel size' in without.problem
    assert (without.format, without.size, without.spacing) == ('png', (700, 540), None)
    assert without.spacing_from == ''
    found = check_slide(case(path, 0.5), tissue=False)
    assert (found.problem, found.spacing, found.spacing_from) == ('', 0.5, 'the user')


def test_two_spacings_are_a_note(tmp_path):
    path = tmp_path / 'a.tif'
    write_tiff(RGB, path, 0.5)
    found = check_slide(case(path, 0.25), tissue=False)
    assert (found.problem, found.spacing, found.spacing_from) == ('', 0.5, 'resolution tags')
    (note,) = found.notes
    assert '0.25 by its given spacing' in note and note in found.line()


@pytest.mark.parametrize('has_own', [False, True])
@pytest.mark.parametrize('given', [None, 2.0])
def test_a_spacing_for_slides_that_do_not_say_theirs(tmp_path, has_own, given):
    "That of a file counts more, and then that of the case."
    path = tmp_path / ('a.svs' if has_own else 'a.png')
    if has_own:
        made.svs(path, RGB)
    else:
        Image.fromarray(RGB).save(path)
    found = check_slide(case(path, given), tissue=False, slide_spacing=4.0)
    expected = made.SPACING if has_own else given or 4.0
    assert found.spacing == pytest.approx(expected, rel=1e-3)
    assert found.spacing_from == (SCANNER if has_own else 'the user')
    assert len(found.notes) == (1 if has_own and given else 0)


@pytest.mark.parametrize('name', ['a.svs', 'a.ome.tif', 'a.mrxs', 'a.png', 'dicom', 'a.ndpi'])
@pytest.mark.parametrize('slide_spacing', [None, made.SPACING])
def test_a_slide_is_opened_once(tmp_path, name, slide_spacing, monkeypatch):
    path = tmp_path / name
    kinds = dict(svs=made.svs, tif=made.ome, mrxs=made.mirax, ndpi=made.hamamatsu)
    if name == 'a.png':
        Image.fromarray(RGB).save(path)
    else:
        kinds.get(path.suffix[1:], made.dicom)(path, RGB[:512, :512])
    opened, closed = [], []

    def counted(path):
        reader = open_reader(path)
        opened.append(reader)
        close = reader.close
        monkeypatch.setattr(reader, 'close', lambda: (closed.append(reader), close()))
        return reader

    for module in (checking, slides):
        monkeypatch.setattr(module, 'open_reader', counted)
    found = check_slide(case(path), tissue=False, slide_spacing=slide_spacing)
    assert bool(found.problem) == (name == 'a.png' and slide_spacing is None)
    assert found.format and found.compression and found.size
    assert len(opened) == 1 and closed == opened


# ---- tissue


@pytest.mark.parametrize(
    'boxes, mm2',
    [
        ([(100, 100, 300, 400)], 300 * 400 * 16e-6),
        ([(50, 50, 150, 250), (400, 500, 120, 200)], (150 * 250 + 120 * 200) * 16e-6),
    ],
)
def test_the_area_of_tissue(tmp_path, boxes, mm2):
    found = check_slide(case(tissue_slide(tmp_path / 'a.tif', boxes)))
    assert abs(found.tissue_mm2 / mm2 - 1) < 0.05
    assert f'{found.tissue_mm2:.3g} mm2 tissue' in found.line()


def test_tissue_by_a_mask(tmp_path):
    slide = tissue_slide(tmp_path / 'a.tif', [(100, 100, 300, 400)])
    mask = np.zeros((300, 400), np.uint8)
    mask[:100, :200] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    found = check_slide(case(slide, mask=tmp_path / 'mask.png'))
    assert abs(found.tissue_mm2 - 100 * 200 * 64e-6) < 0.01


def test_no_tissue(tmp_path):
    blank = tissue_slide(tmp_path / 'a.tif', [])
    found = check_slide(case(blank))
    assert 'has no tissue' in found.problem and found.tissue_mm2 == 0
    assert check_slide(case(blank), tissue=False).problem == ''


# ---- what is wrong


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda path: path.write_bytes(b''), 'is empty'),
        (lambda path: path.write_text('no image'), 'is not an image'),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), 'truncated'),
        (lambda path: path.unlink(), 'does not exist'),
        (lambda path: tifffile.imwrite(path, np.zeros((3, 64, 64), 'u1'), imagej=True), 'stack'),
    ],
)
def test_what_cannot_be_opened(tmp_path, spoil, says):
    path = tissue_slide(tmp_path / 'a.tif', [(100, 100, 300, 400)])
    spoil(path)
    found = check_slide(case(path))
    assert says in found.problem
    assert found.line().startswith('a: FAILED: ')


def test_many_slides(tmp_path):
    "In order; one that fails ends nothing; every one is told to the progress bar."
    tiny_cohort(tmp_path, 3)
    cases = [case(tmp_path / f'slides/s{number:02}.tiff') for number in range(3)]
    cases[0].path.write_text('no slide')
    told = []
    found = list(check_slides(cases, after_each=lambda: told.append(1)))
    assert [each.slide_id for each in found] == ['s00', 's01', 's02']
    assert [bool(each.problem) for each in found] == [True, False, False]
    assert len(told) == 3


def test_results_come_in_order():
    done = iter([(2, 'c'), (0, 'a'), (1, 'b'), (3, 'd')])
    assert [*checking.in_order(done)] == ['a', 'b', 'c', 'd']


def test_a_fault_of_a_library_ends_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError('out of memory')

    monkeypatch.setattr(checking, 'check_slide', fail)
    (found,) = check_slides([case(tmp_path / 'a.tif')])
    assert found.problem == f'{tmp_path / "a.tif"}: out of memory'
