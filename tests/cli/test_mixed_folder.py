"What a lab may have in a folder, from sp_check to sp_report: the counts add up in each command."

import csv
import re
import tomllib

import made
import pytest
import tiffs
from PIL import Image
from pydicom import dcmread
from reports import Page
from told import told_in_lines

from streaming_pathology.cli.commands import sp_check, sp_predict, sp_report, sp_train, sp_trim
from streaming_pathology.io import write_csv
from streaming_pathology.slides.synthetic import paint_biopsy

pytestmark = pytest.mark.usefixtures('small_resnet')

SPLITS = ['train'] * 4 + ['tuning'] * 2 + ['test'] * 2 + ['train'] * 4
KINDS = ['svs', 'ome', 'dicom', 'png'] * 3
N_USABLE = len(KINDS)
N_PNG = KINDS.count('png')
QPI = (
    '<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>'
    '<ImageType>FullResolution</ImageType><Name>{}</Name></PerkinElmer-QPI-ImageDescription>'
)
NO_SLIDES = '3 left out as no slides (.csv 1, .txt 1, CT Image Storage 1)'


def write_slide(folder, number, kind, rgb):
    "A slide of a kind. Returns its path."
    if kind == 'dicom':
        return made.dicom(folder / f'series{number}', rgb)
    if kind == 'png':
        path = folder / f'flat{number}.png'
        Image.fromarray(rgb).save(path)
    elif kind == 'svs':
        path = folder / f'scan{number}.svs'
        made.svs(path, rgb)
    else:
        path = folder / f'more/image{number}.ome.tif'
        path.parent.mkdir(exist_ok=True)
        made.ome(path, rgb)
    return path


def write_fluorescence(path, rgb):
    "A QPTIFF with a page for each of three stains."
    pages = []
    for channel, name in enumerate(['DAPI', 'FITC', 'Cy3']):
        pages.append((rgb[..., channel], dict(description=QPI.format(name))))
    options = dict(photometric='minisblack', tile=(64, 64), **tiffs.resolution())
    return tiffs.write_pages(path, pages, **options)


def write_ct(path, slide):
    "A CT image, as DICOM."
    dataset = dcmread(slide / 'level1.dcm')
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    dataset.SeriesInstanceUID = '1.2.3'
    dataset.save_as(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Twelve slides in four formats, of which PNG needs the column spacing; a damaged one and one
    of fluorescence, which the manifest slides.csv has too; a CT image and a text."""
    folder = tmp_path_factory.mktemp('lab') / 'slides'
    folder.mkdir()
    rows = []
    for number, (kind, split) in enumerate(zip(KINDS, SPLITS, strict=True)):
        label = number % 2
        rgb = paint_biopsy((480, 400), made.SPACING, 0.5 * label, seed=number).image
        path = write_slide(folder, number, kind, rgb)
        row = dict(slide_id=f's{number}', label=label, path=path.relative_to(folder), split=split)
        row['spacing'] = made.SPACING if kind == 'png' else ''
        rows.append(row)
    whole = (folder / 'scan0.svs').read_bytes()
    (folder / 'damaged.svs').write_bytes(whole[: len(whole) // 3])
    write_fluorescence(folder / 'stains.qptiff', rgb)
    for name in ('damaged.svs', 'stains.qptiff'):
        slide_id = name.split('.')[0]
        rows.append(dict(slide_id=slide_id, label=1, path=name, split='train', spacing=''))
    write_ct(folder / 'thorax', folder / 'series2')
    (folder / 'notes.txt').write_text('s3 was scanned twice')
    write_csv(folder / 'slides.csv', rows)
    return folder


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Where commands write."
    return tmp_path_factory.mktemp('here')


@pytest.fixture(scope='module')
def run(folder, here, small_resnet):
    "A run on the slides of the manifest that can be used."
    words = [folder / 'slides.csv', here / 'run', '--spacing', 4, '--strip', 64, '--epochs', 1]
    words += ['--batch-size', 4, '--heatmaps', 0, '--arch', 'resnet18']
    status, _, error = told_in_lines(sp_train, *words)
    assert status == 2 and error.startswith('error: 2 of 14 slides cannot be used: ')
    assert not (here / 'run').exists()
    status, lines, error = told_in_lines(sp_train, *words, '--skip-failed')
    assert status == 0, error
    assert lines[-1] == 'left out 2 slides that cannot be used: damaged; stains'
    return here / 'run'


def check_counts(found, table, n_failed, done='done', of_folder=True):
    "So many of 14 slides failed, the others are done, and three files are no slides."
    status, lines, error = found
    assert status == 3, error
    n_done = N_USABLE + 2 - n_failed
    expected = f'14 slides found: {n_done} {done}, {n_failed} failed; '
    assert lines[-1].startswith(expected + (NO_SLIDES if of_folder else 'see '))
    assert error.startswith(f'error: {n_failed} of 14 slides failed: ')
    assert 'damaged.svs is truncated' in error and '3 fluorescence channels (DAPI, FITC' in error
    statuses = column(table, 'status')
    assert statuses.count('failed') == n_failed and statuses.count(done) == n_done
    assert statuses.count('left out') == (3 if of_folder else 0)


def column(path, name):
    "A column of a table."
    with open(path) as file:
        return [row[name] for row in csv.DictReader(file)]


@pytest.mark.parametrize('of_folder', [True, False])
def test_check(folder, here, of_folder):
    "A PNG fails where no table says its spacing."
    place = folder if of_folder else folder / 'slides.csv'
    table = here / f'checked{of_folder:d}.csv'
    found = told_in_lines(sp_check, place, '--csv', table, '--workers', 0)
    check_counts(found, table, 2 + N_PNG * of_folder, 'ok', of_folder)
    formats = column(table, 'format')
    assert [formats.count(name) for name in ('Aperio', 'OME-TIFF', 'DICOM', 'png')] == [3] * 4


@pytest.mark.parametrize('of_folder', [True, False])
def test_trim(folder, here, of_folder):
    place = folder if of_folder else folder / 'slides.csv'
    out = here / f'trimmed{of_folder:d}'
    few = ['--spacing', 2, '--min-area-mm2', 0.001, '--workers', 0]
    n_failed = 2 + N_PNG * of_folder
    found = told_in_lines(sp_trim, place, out, *few)
    check_counts(found, out / 'slides.csv', n_failed, of_folder=of_folder)
    assert len(set(column(out / 'manifest.csv', 'source_id'))) == N_USABLE + 2 - n_failed
    assert len(column(out / 'failed.csv', 'slide_id')) == n_failed


@pytest.mark.parametrize('of_folder', [True, False])
def test_predict(folder, run, here, of_folder):
    place = folder if of_folder else folder / 'slides.csv'
    table = here / f'p{of_folder:d}.csv'
    n_failed = 2 + N_PNG * of_folder
    found = told_in_lines(sp_predict, run, place, table, '--skip-failed')
    check_counts(found, table.with_suffix('.slides.csv'), n_failed, of_folder=of_folder)
    assert len(column(table, 'slide_id')) == N_USABLE + 2 - n_failed


def test_train_and_report(folder, run):
    "The report begins with all slides of the manifest."
    assert tomllib.loads((run / 'settings.toml').read_text())['left_out'] == ['damaged', 'stains']
    assert len(column(run / 'cohort.csv', 'slide_id')) == N_USABLE
    spacings = column(run / 'cohort.csv', 'spacing')
    assert [float(text) for text in spacings if text] == [made.SPACING] * N_PNG
    assert told_in_lines(sp_report, run)[0] == 0
    text = Page((run / 'report/index.html').read_text()).text
    found = re.search(
        r'in the manifest\s+(\d+)\s+left out: cannot be read or has no tissue\s+(\d+)', text
    )
    assert found and found.groups() == ('14', '2')
