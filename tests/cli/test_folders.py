"Commands on a folder with slides and other things: the counts add up, what failed is named, the exit status tells."

import csv
import shutil
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import made
import pytest
import pyvips
import torch
from pydicom import dcmread
from told import told_in_lines

from streaming_pathology.cli.commands import (
    sp_check,
    sp_heatmap,
    sp_predict,
    sp_train,
    sp_trim,
)
from streaming_pathology.slides.cohorts import tiny_cohort, tiny_slide
from streaming_pathology.training.checkpoints import save_checkpoint
from streaming_pathology.training.models import StreamingClassifier

pytestmark = pytest.mark.usefixtures('small_resnet')

GOOD = ['a', 'b', 'series', 'patient_c']
FAILED = ['damaged', 'flat']
COUNTS = '6 slides found: 4 {}, 2 failed; 2 left out as no slides (.txt 1, CT Image Storage 1)'
FEW = {
    'trim': ['--spacing', 8, '--min-area-mm2', 0.001, '--workers', 0],
    'heatmap': ['--method', 'gradient', '--cell', 8],
}


@pytest.fixture(scope='module')
def slides(tmp_path_factory):
    "A folder of four slides, two that cannot be used, and two files that are no slides."
    folder = tmp_path_factory.mktemp('folders') / 'slides'
    (folder / 'patient').mkdir(parents=True)
    for number, name in enumerate(['a', 'b', 'patient/c']):
        tiny_slide(folder / f'{name}.tiff', number)
    made.dicom(folder / 'series', made.pixels())
    (folder / 'damaged.svs').write_bytes((folder / 'a.tiff').read_bytes()[:300])
    pyvips.Image.new_from_file(str(folder / 'a.tiff')).pngsave(str(folder / 'flat.png'))
    (folder / 'notes.txt').write_text('b was scanned twice')
    ct = dcmread(folder / 'series/level1.dcm')
    ct.SOPClassUID = ct.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    ct.SeriesInstanceUID = '1.2.3'
    ct.save_as(folder / 'series/ct')
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory, small_resnet):
    "A folder that looks like a run, whose network has random weights."
    folder = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    network = dict(arch='resnet18', n_out=1, strip=64)
    save_checkpoint(
        folder / 'checkpoints/best.pt',
        model=dict(StreamingClassifier(**network).state_dict()),
        settings=dict(model=network, spacing=4.0, size=None, amp=None),
    )
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder that is the current one."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def statuses(path):
    "Status -> names, of the table of a command."
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            found.setdefault(row['status'], []).append(row['name'])
            assert (row['reason'] == '') == (row['status'] in ('done', 'ok'))
    return found


def check_counts(found, table, done='done'):
    "Four slides are done, two failed, and two files are no slides."
    status, lines, error = found
    assert status == 3, error
    assert lines[-1].startswith(COUNTS.format(done))
    assert error.startswith('error: 2 of 6 slides failed: ')
    assert 'damaged.svs' in error and 'flat.png has no pixel size' in error
    by_status = statuses(table)
    assert sorted(by_status.pop(done)) == sorted(GOOD)
    assert sorted(by_status.pop('failed')) == FAILED
    assert by_status == {'left out': ['notes.txt', 'ct']}


# ---- the counts add up in every command


def test_check(slides, here):
    found = told_in_lines(sp_check, slides, '--csv', 'checked.csv', '--workers', 0)
    check_counts(found, 'checked.csv', 'ok')
    lines = found[1]
    assert [line.split(':')[0] for line in lines[:-1]] == ['a', 'b', *FAILED, 'patient_c', 'series']
    with open('checked.csv') as file:
        rows = {row['name']: row for row in csv.DictReader(file)}
    assert (rows['a']['format'], rows['a']['spacing'], rows['a']['levels']) == ('tiff', '4', '1')
    assert float(rows['a']['tissue_mm2']) > 0.02
    assert rows['flat']['format'] == 'png' and rows['flat']['spacing'] == ''
    assert rows['notes.txt']['format'] == ''
    again = told_in_lines(sp_check, slides, '--csv', 'checked.csv', '--no-tissue', '--workers', 0)
    assert again[0] == 3  # the table is replaced


def test_trim(slides, here):
    check_counts(told_in_lines(sp_trim, slides, 'out', *FEW['trim']), 'out/slides.csv')
    assert len(list(here.glob('out/biopsies/*.tiff'))) == len(GOOD)


def test_heatmap(slides, run, here):
    found = told_in_lines(sp_heatmap, run, slides, 'out', *FEW['heatmap'])
    check_counts(found, 'out/slides.csv')
    assert sorted(path.stem for path in here.glob('out/maps/*.npy')) == sorted(GOOD)
    again = told_in_lines(sp_heatmap, run, slides, 'out', *FEW['heatmap'])
    assert again[0] == 3  # into the same folder


def test_predict(slides, run, here):
    status, lines, error = told_in_lines(sp_predict, run, slides, 'p.csv')
    assert (status, lines[-1].split(';')[0]) == (2, '6 slides found: 4 done, 2 failed')
    assert '--skip-failed. Finished slides are kept' in error
    assert not (here / 'p.csv').exists() and statuses('p.slides.csv')['failed'] == FAILED
    check_counts(told_in_lines(sp_predict, run, slides, 'p.csv', '--skip-failed'), 'p.slides.csv')
    with open('p.csv') as file:
        assert sorted(row['slide_id'] for row in csv.DictReader(file)) == sorted(GOOD)


def test_with_a_spacing_only_damage_fails(slides, run, here):
    for command, words in (
        (sp_check, [slides, '--no-tissue', '--workers', 0]),
        (sp_predict, [run, slides, 'p.csv', '--skip-failed']),
    ):
        status, _, error = told_in_lines(command, *words, '--slide-spacing', 4)
        assert status == 3
        assert '1 of 6 slides failed' in error and 'damaged.svs' in error


def test_a_table_of_the_user_is_never_replaced(slides, run, here):
    (here / 'out').mkdir()
    for path in ('out/slides.csv', 'p.slides.csv', 'c.csv'):
        (here / path).write_text('slide_id,label\na,1\n')
    for command, words in (
        (sp_check, [slides, '--csv', 'c.csv']),
        (sp_trim, [slides, 'out', *FEW['trim']]),
        (sp_predict, [run, slides / 'a.tiff', 'p.csv']),
        (sp_heatmap, [run, slides / 'a.tiff', 'out', *FEW['heatmap']]),
    ):
        status, _, error = told_in_lines(command, *words)
        assert status == 2 and 'exists and is something else' in error
    assert sorted(path.name for path in here.rglob('*')) == [
        'c.csv',
        'out',
        'p.slides.csv',
        'slides.csv',
    ]


def test_what_is_no_slide_is_no_failure(slides, here):
    (here / 'in').mkdir()
    shutil.copy(slides / 'a.tiff', here / 'in')
    (here / 'in/notes.txt').touch()
    found = told_in_lines(sp_check, 'in', '--workers', 0)
    assert found[0] == 0 and 'error' not in found[2]
    assert found[1][-1] == '1 slide found: 1 ok; 1 left out as no slides (.txt 1)'


def test_nothing_that_can_be_used(slides, run, here):
    status, lines, error = told_in_lines(
        sp_heatmap, run, slides / 'damaged.svs', 'out', *FEW['heatmap']
    )
    assert status == 2 and lines[-1].startswith('1 slide found: 0 done, 1 failed; see ')
    assert error.startswith('error: 1 of 1 slides failed: ')


TOO_LONG = 'n' * 190  # bytes, for an id


def test_names_that_cannot_be_ids_are_refused_before_the_work(slides, run, here):
    (here / 'in').mkdir()
    for name in ('a', TOO_LONG):
        shutil.copy(slides / 'a.tiff', here / f'in/{name}.tiff')
    status, _, error = told_in_lines(sp_predict, run, 'in', 'p.csv')
    assert status == 2 and '190 bytes' in error and '--skip-failed' in error
    assert '1 of 2 slides has no usable name; nothing was predicted' in error
    (here / 'in/gone.tiff').symlink_to('nowhere')
    error = told_in_lines(sp_predict, run, 'in', 'p.csv')[2]
    assert '2 of 3 slides cannot be used; nothing was predicted' in error and 'gone' in error
    (here / 'in/gone.tiff').unlink()
    assert not list(here.glob('p.*'))
    assert told_in_lines(sp_predict, run, 'in', 'p.csv', '--skip-failed')[0] == 3
    assert statuses('p.slides.csv') == dict(done=['a'], failed=[f'{TOO_LONG}.tiff'])


def failed_in(path):
    "(slide_id, reason) of each row of failed.csv."
    with open(path) as file:
        return [(row['slide_id'], row['reason']) for row in csv.DictReader(file)]


@pytest.mark.parametrize('in_shards', [False, True])
def test_failed_slides_of_a_trimming_are_all_in_its_table(slides, here, in_shards):
    "Also those without an id, until they have one."
    (here / 'in').mkdir()
    for name in ('a', TOO_LONG):
        shutil.copy(slides / 'a.tiff', here / f'in/{name}.tiff')
    shutil.copy(slides / 'damaged.svs', here / 'in')
    words = ['in', 'out', *FEW['trim']]
    last = []
    if in_shards:
        told_in_lines(sp_trim, *words, '--shard', '1/1')
        last = ['--merge']
    assert told_in_lines(sp_trim, *words, *last)[0] == 3
    (damaged, of_damaged), (unnamed, of_unnamed) = failed_in('out/failed.csv')
    assert (damaged, unnamed) == ('damaged', '') and 'damaged.svs' in of_damaged
    assert f'{TOO_LONG}.tiff has no name that can be its id' in of_unnamed
    (here / f'in/{TOO_LONG}.tiff').rename(here / 'in/one.tiff')
    (here / 'in/damaged.svs').unlink()
    told_in_lines(sp_trim, *words)
    assert [slide_id for slide_id, _ in failed_in('out/failed.csv')] == ['damaged']


# ---- slides without a manifest, a run in place of a network


def test_one_slide_without_a_manifest(slides, run, here):
    status, lines, note = told_in_lines(sp_predict, run, slides / 'a.tiff')
    assert status == 0
    assert lines[0].startswith('a: probability 0.')
    assert lines[-1] == f'1 slide found: 1 done; see {here / "predictions.slides.csv"}'
    assert (here / 'predictions.csv').read_text().count('\n') == 2
    status, _, error = told_in_lines(sp_predict, run, slides / 'a.tiff')
    assert status == 2 and 'predictions.csv exists; name the table to write by --out' in error


@pytest.mark.parametrize(
    'words',
    [
        ['{a}', '--tta', 'flips', '{b}', 'p.csv'],
        ['{a}', '{b}', '--out', 'p.csv'],
        ['{a}', '{b}', 'p.csv', '--tta', 'none'],
    ],
)
def test_several_slides(slides, run, here, words):
    words = [word.format(a=slides / 'a.tiff', b=slides / 'patient') for word in words]
    assert told_in_lines(sp_predict, run, *words)[0] == 0
    with open('p.csv') as file:
        assert [row['slide_id'] for row in csv.DictReader(file)] == ['a', 'c']


def test_a_run_is_as_good_as_its_best_checkpoint(slides, run, here):
    best = run / 'checkpoints/best.pt'
    err = StringIO()
    with redirect_stderr(err), redirect_stdout(StringIO()):
        assert sp_predict([str(run), str(slides / 'a.tiff'), 'p.csv']) == 0
    assert f'taking {best}' in err.getvalue()
    assert told_in_lines(sp_predict, best, slides / 'a.tiff', 'q.csv')[0] == 0

    def without_seconds(path):
        lines = (here / path).read_text().splitlines()
        return [line.split(',')[:4] + line.split(',')[5:] for line in lines]

    assert without_seconds('p.csv') == without_seconds('q.csv')
    for command in (sp_predict, sp_heatmap):
        status, _, error = told_in_lines(command, here, slides / 'a.tiff', 'r.csv')
        assert status == 2 and 'without checkpoints/best.pt' in error


# ---- a training


def test_a_training_without_slides_that_cannot_be_used(tmp_path):
    "Of slides that do not say their spacing, one of them damaged."
    manifest = tiny_cohort(tmp_path / 'cohort', 12, size=(64, 64))
    folder = manifest.parent / 'slides'
    for path in sorted(folder.iterdir()):
        pyvips.Image.new_from_file(str(path)).pngsave(str(path.with_suffix('.png')))
        path.unlink()
    manifest.write_text(manifest.read_text().replace('.tiff', '.png'))
    (folder / 's01.png').write_text('no image')
    few = ['--spacing', 4, '--strip', 64, '--heatmaps', 0, '--epochs', 1, '--batch-size', 4]
    words = [manifest, tmp_path / 'run', *few]
    status, _, error = told_in_lines(sp_train, *words)
    assert status == 2 and '12 of 12 slides cannot be used' in error
    status, _, error = told_in_lines(sp_train, *words, '--slide-spacing', 4)
    assert status == 2 and "1 of 12 slides cannot be used: slide 's01'" in error
    assert not (tmp_path / 'run').exists()
    words += ['--slide-spacing', 4, '--skip-failed']
    status, lines, _ = told_in_lines(sp_train, *words)
    assert status == 0
    assert lines[-1] == 'left out 1 slide that cannot be used: s01'
    settings = tomllib.loads((tmp_path / 'run/settings.toml').read_text())
    assert (settings['left_out'], settings['slide_spacing']) == (['s01'], 4.0)
    assert (tmp_path / 'run/predictions.csv').read_text().count('\n') == 12
    assert told_in_lines(sp_train, *words, '--resume')[0] == 0
    shutil.copy(folder / 's03.png', folder / 's01.png')
    status, _, error = told_in_lines(
        sp_train, *words, '--resume', '--epochs', 2, '--accept-changes'
    )
    assert status == 0, error
