"Folders that commands write: what is refused, what is replaced, and that nothing is lost wherever it is cut short."

import os
import signal
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
from refusals import refusal

from streaming_pathology.core import InputError
from streaming_pathology.outputs import (
    RUN,
    claim,
    foreign,
    output_file,
    replacing,
    staged,
)

MARK = '{"streaming_pathology": "0.1"}'


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


@pytest.fixture
def run(tmp_path):
    "A folder with a run in it."
    return former_run(tmp_path / 'run')


def former_run(folder):
    folder.mkdir(parents=True)
    (folder / RUN.mark).write_text(MARK)
    (folder / 'log.csv').write_text('old')
    return folder


def fail(folder, *files):
    "A training that writes some files and fails."
    with replacing(folder, worth=['checkpoints/point_*.pt']):
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(MARK)
        raise InputError('the loss is nan')


# ---- claim


def test_a_run_is_replaced_only_where_it_may_be(run, tmp_path):
    assert 'holds what a former run wrote; add --overwrite' in refusal(claim, run)
    assert claim(run, overwrite=True) == run
    claim(tmp_path / 'new/deep')
    assert not (tmp_path / 'new').exists()


def test_what_else_lies_in_a_run_is_not_touched(run):
    (run / 'notes.txt').write_text('mine')
    assert 'holds notes.txt' in refusal(claim, run, overwrite=True)
    claim(run, overwrite=True, others=True)


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.tex').write_text('x')
    assert 'no former run' in refusal(claim, tmp_path / 'mine', overwrite=True)
    (tmp_path / 'file').write_text('x')
    assert 'is a file' in refusal(claim, tmp_path / 'file')
    assert 'cannot be written' in refusal(claim, tmp_path / 'file/below')


def test_what_systems_and_killed_processes_leave_does_not_matter(run):
    (run / 'cohort').mkdir()
    (run / 'cohort/manifest.csv').write_text('x')
    (run / '.DS_Store').write_text('x')
    (run / '.log.csv.1a.partial').write_text('x')
    claim(run, overwrite=True)


@pytest.mark.parametrize('name', ['manifest.csv', 'linked.csv'])
def test_inputs_are_not_replaced(run, tmp_path, name):
    (tmp_path / 'file').write_text('x')
    (run / 'cohort').mkdir()
    (run / 'cohort/manifest.csv').write_text('x')
    (run / 'cohort/linked.csv').symlink_to(tmp_path / 'file')
    assert 'lies in' in refusal(claim, run, overwrite=True, inputs=[run / 'cohort' / name])


@pytest.mark.parametrize(
    'name', ['checkpoints/mine.docx', 'images/thesis.pdf.partial', 'mine/2026', 'movie.mkv']
)
def test_files_and_folders_that_no_run_writes(run, name):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        path.write_text('mine')
    else:
        path.mkdir()
    assert f'{run} holds {name.split("/")[0]}' in refusal(claim, run, overwrite=True)


def test_a_link_in_the_place_of_a_folder(run, tmp_path):
    (tmp_path / 'mine').mkdir()
    (run / 'heatmaps').symlink_to(tmp_path / 'mine')
    assert 'holds heatmaps' in refusal(claim, run, overwrite=True)


def test_the_mark_of_another_program(tmp_path):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / RUN.mark).write_text('{"python": "3"}')
    assert f'holds {RUN.mark}' in refusal(claim, tmp_path / 'other', overwrite=True)
    (tmp_path / 'empty/mine').mkdir(parents=True)
    assert 'holds mine' in refusal(claim, tmp_path / 'empty')


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    for name in ('', '~nobody-here/x', tmp_path / 'loop/x'):
        refusal(claim, name)


def test_a_report_that_was_broken_off_belongs_to_its_run(run):
    for file in ('.new/slides/001.html', '.former/index.html', 'pictures/001.jpg'):
        (run / 'report' / file).parent.mkdir(parents=True, exist_ok=True)
        (run / 'report' / file).touch()
    claim(run, overwrite=True)
    for file in (
        'report/.new/mine.docx',
        'report/slides/mine.html',
        'report/pictures/mine.jpg',
        'report/mine.txt',
    ):
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).touch()
        assert f'holds {file}' in refusal(claim, run, overwrite=True)
        (run / file).unlink()
    assert foreign(run, RUN) is None


# ---- replacing


def test_a_training_that_fails_at_once_leaves_the_folder_as_it_was(run):
    before = names(run)
    assert 'the loss is nan' in refusal(fail, run, RUN.mark, 'settings.toml')
    assert names(run) == before


def test_checkpoints_are_kept_beside_the_former_run(run):
    before = names(run)
    with pytest.warns(UserWarning, match='holds unfinished work; what it held before'):
        refusal(fail, run, RUN.mark, 'checkpoints/point_000001_000000.pt')
    assert (run / 'checkpoints/point_000001_000000.pt').exists()
    assert (run / '.former/log.csv').exists()
    # unfinished work is replaced, and the whole run comes back
    claim(run, overwrite=True)
    refusal(fail, run, RUN.mark)
    assert names(run) == before
    assert (run / 'log.csv').read_text() == 'old'


def test_what_somebody_puts_beside_unfinished_work_stays(run):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        refusal(fail, run, RUN.mark, 'my_notes.txt')
    assert (run / 'my_notes.txt').exists()
    assert (run / '.former/log.csv').exists()
    assert len(told) == 1


def test_a_new_folder_goes_again(tmp_path):
    refusal(fail, tmp_path / 'fresh/deep', RUN.mark)
    assert not (tmp_path / 'fresh/deep').exists()


rename = Path.rename


@pytest.mark.parametrize('after', range(5))
def test_cut_short_at_any_move(run, after):
    "Nothing is lost, and the next run knows what is whole."
    (run / 'settings.toml').write_text('old')
    left = after

    def cut(path, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, 'No space left on device')
        return rename(path, target)

    with patch.object(Path, 'rename', cut), pytest.raises((OSError, InputError)):
        fail(run, RUN.mark)
    claim(run, overwrite=True)
    refusal(fail, run)
    assert names(run) == [RUN.mark, 'log.csv', 'settings.toml']
    assert (run / 'log.csv').read_text() == 'old'


def test_stopped_while_files_are_moved(run):
    "The signal is raised afterwards, and everything is put back."

    def stop(path, target):
        os.kill(os.getpid(), signal.SIGINT)
        return rename(path, target)

    # a job in the background ignores it
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with patch.object(Path, 'rename', stop), pytest.raises(KeyboardInterrupt):
            with replacing(run):
                raise AssertionError('the work began')
    finally:
        signal.signal(signal.SIGINT, former)
    assert names(run) == [RUN.mark, 'log.csv']


# ---- staged


def test_staged_work_is_there_when_it_is_done(tmp_path, run):
    with staged(tmp_path / 'whole') as folder:
        (folder / 'log.csv').write_text('1')
    assert names(tmp_path / 'whole') == ['log.csv']
    with pytest.raises(KeyboardInterrupt), staged(run, overwrite=True) as folder:
        (folder / 'log.csv').write_text('new')
        raise KeyboardInterrupt
    assert names(run) == [RUN.mark, 'log.csv']
    assert (run / 'log.csv').read_text() == 'old'
    with staged(run, overwrite=True) as folder:
        (folder / 'log.csv').write_text('new')
    assert names(run) == ['log.csv']
    assert (run / 'log.csv').read_text() == 'new'


def test_two_at_once(tmp_path):
    with staged(tmp_path / 'twice') as folder:
        assert 'another process' in refusal(claim, tmp_path / 'twice', overwrite=True)
        (folder / 'log.csv').write_text('1')


def test_a_link_to_the_folder_stays_one(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'aim')
    (tmp_path / 'aim').mkdir()
    with staged(tmp_path / 'link') as folder:
        (folder / 'log.csv').write_text('1')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'aim/log.csv').exists()


def test_what_comes_in_the_meantime_is_not_replaced(tmp_path):
    def late():
        with staged(tmp_path / 'late') as folder:
            (folder / 'log.csv').write_text('1')
            (tmp_path / 'late/b').write_text('2')

    assert 'holds b' in refusal(late)
    assert (tmp_path / 'late/.new/log.csv').exists()
    assert (tmp_path / 'late/b').exists()


# ---- output_file


def test_files_that_are_refused(tmp_path, run):
    (tmp_path / 'file').write_text('x')
    for args, says in (
        ((tmp_path, '.csv'), 'is a folder'),
        ((tmp_path / 'a.txt', '.csv'), 'a .csv file'),
        ((tmp_path / 'new/../b.csv', '.csv', [tmp_path / 'b.csv']), 'is what is read'),
        ((run / 'predictions.csv', '.csv'), 'belongs to the run'),
        ((tmp_path / 'file/b.csv', '.csv'), 'cannot be written'),
    ):
        assert says in refusal(output_file, *args)


def test_files_that_exist(tmp_path):
    (tmp_path / 'b.csv').write_text('slide_id,label\n')
    said = refusal(output_file, tmp_path / 'b.csv', '.csv', [], 'slide_id,label,split')
    assert 'something else' in said
    (tmp_path / 'none.csv').touch()
    for name in ('b.csv', 'none.csv'):
        output_file(tmp_path / name, '.csv', [], 'slide_id')
