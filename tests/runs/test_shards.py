"Shards: which slides each takes, what they write beside each other, and what is put together."

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refusal

from streaming_pathology.cli.commands import sp_check, sp_heatmap, sp_predict, sp_trim
from streaming_pathology.core import InputError
from streaming_pathology.io import locked, read_table, write_csv, write_once
from streaming_pathology.runs.shards import (
    Shard,
    Shards,
    all_shards,
    merge_tables,
    merge_trimmed,
    trim_shard,
)
from streaming_pathology.slides.cohorts import Case, read_manifest, tiny_cohort
from streaming_pathology.slides.trim import Trim, trim_slides
from streaming_pathology.training.checkpoints import save_checkpoint
from streaming_pathology.training.models import StreamingClassifier


def cases_named(*names):
    return [Case(name, None, f'{name}.svs') for name in names]


# ---- which slides


@settings(deadline=None, max_examples=50)
@given(st.sets(st.text('abAB09_-', min_size=1, max_size=4)), st.integers(1, 9), st.randoms())
def test_every_slide_is_of_one_shard_whatever_the_order(names, n, random):
    cases = cases_named(*sorted(names))
    parts = [shard.take(cases) for shard in all_shards(n)]
    assert sorted(case.slide_id for part in parts for case in part) == sorted(names)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    other = list(cases)
    random.shuffle(other)
    for shard, part in zip(all_shards(n), parts, strict=True):
        assert set(shard.take(other)) == set(part)
        assert shard.take(other) == [case for case in other if case in part]


def test_every_nth_of_the_sorted_ids():
    "The rule may not change between versions, while shards of one output may be run by several."
    cases = cases_named('s10', 's9', 'S2', 'a', 'b')
    assert [case.slide_id for case in Shard(1, 2).take(cases)] == ['s9', 'S2', 'b']
    assert [case.slide_id for case in Shard.parse(' 2/2 ').take(cases)] == ['s10', 'a']
    assert Shard(7, 9).take(cases) == []


@pytest.mark.parametrize('text', ['', '3', '0/8', '9/8', '1/0', '-1/8', '3/8/1', '3 of 8', 'a/b'])
def test_what_is_no_shard(text):
    assert '--shard' in refusal(Shard.parse, text)


# ---- what they have done


@pytest.fixture
def shards(tmp_path):
    return Shards(tmp_path / 'out')


CASES = cases_named('c', 'a', 'b')


def finish(shards, shard, cases=CASES, failed=(), **about):
    with shards.working(shard, about):
        outcome = {case.slide_id: '' for case in shard.take(cases)}
        shards.finish(shard, outcome | {name: 'is bad' for name in failed})


def test_all_are_done(shards):
    for shard in reversed(all_shards(5)):
        finish(shards, shard, failed=['b'] if shard.number == 2 else [])
    assert shards.all_reasons(CASES) == dict(c='', a='', b='is bad')
    assert list(shards.all_reasons(CASES)) == ['c', 'a', 'b']
    assert shards.all_failed(CASES) == dict(b='is bad')


def test_missing_ones_are_named(shards):
    for number in (1, 3, 7):
        finish(shards, Shard(number, 8))
    with shards.working(Shard(4, 8)):
        pass  # begun, and not done
    message = refusal(shards.all_reasons, CASES)
    assert '5 of 8 shards not done (2/8, 4/8, 5/8, 6/8, 8/8)' in message and '--merge' in message


def test_shards_of_another_manifest_are_named(shards):
    for shard in all_shards(2):
        finish(shards, shard)
    message = refusal(shards.all_reasons, [*CASES, *cases_named('d')])
    assert '1 shard of other slides, or in another state (2/2)' in message


def test_nothing_to_merge(shards):
    assert 'has no shards to merge' in refusal(shards.all_reasons, CASES)


def test_other_numbers_and_other_networks_do_not_go_together(shards):
    finish(shards, Shard(1, 2), model='a')
    for shard, about, says in (
        (Shard(1, 3), dict(model='a'), 'holds 2 shards, not 3'),
        (Shard(2, 2), dict(model='b'), "shards whose model is 'a', not 'b'"),
        (Shard(2, 2), {}, "model is 'a', not None"),
    ):
        assert says in refusal(finish, shards, shard, **about)


def test_a_folder_of_something_else_is_refused_and_stays(shards):
    shards.folder.mkdir(parents=True)
    (shards.folder / 'mine.txt').touch()
    assert 'holds mine.txt, which no shard wrote' in refusal(finish, shards, Shard(1, 2))
    assert [path.name for path in shards.folder.iterdir()] == ['mine.txt']


def test_damaged_files_are_named(shards):
    finish(shards, Shard(1, 1))
    path = shards.folder_of(Shard(1, 1)) / 'done.json'
    path.write_text('{"slides"')
    assert f'{path} is damaged' in refusal(shards.all_reasons, CASES)


def test_one_shard_is_not_worked_on_twice_at_once(shards):
    with shards.working(Shard(1, 2)):
        assert 'shard 1/2' in refusal(finish, shards, Shard(1, 2))
        finish(shards, Shard(2, 2))
    finish(shards, Shard(1, 2))


def test_of_many_at_once_one_writes_a_file(tmp_path):
    path = tmp_path / 'once'
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        return write_once(path, str(number) * 1000).read_text()

    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(write, range(8)))
    assert len(texts) == 1 and [each.name for each in tmp_path.iterdir()] == ['once']


# ---- tables


def test_tables_are_put_together_in_the_order_of_slides(tmp_path):
    rng = np.random.default_rng(0)
    names = [f's{number:02}' for number in rng.permutation(20)]
    rows = []
    for name in names:
        for value in rng.normal(size=rng.integers(0, 4)):
            rows.append(dict(slide_id=name, value=value, text=f'a "{name}", b'))
    whole = write_csv(tmp_path / 'whole.csv', rows)
    tables = []
    for shard in all_shards(3):
        mine = {case.slide_id for case in shard.take(cases_named(*names))}
        path = tmp_path / f'{shard.number}.csv'
        tables.append(write_csv(path, [row for row in rows if row['slide_id'] in mine]))
    assert merge_tables(reversed(tables), tmp_path / 'all.csv', names) == len(rows)
    assert (tmp_path / 'all.csv').read_bytes() == whole.read_bytes()


def test_tables_with_other_columns_are_refused(tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.csv').write_text(f'slide_id,{name}\n')
    tables = [tmp_path / 'a.csv', tmp_path / 'b.csv']
    message = refusal(merge_tables, tables, tmp_path / 'all.csv', [])
    assert f'{tables[1]} has other columns' in message and not (tmp_path / 'all.csv').exists()


# ---- trimming

TRIM = Trim(spacing=8, min_area_mm2=0.001)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "Seven slides, of which the fourth is no image."
    manifest = tiny_cohort(tmp_path_factory.mktemp('shards') / 'cohort', n=7)
    cases = read_manifest(manifest)
    cases[3].path.write_bytes(b'no image')
    return cases


@pytest.fixture(scope='module')
def whole(cohort, tmp_path_factory):
    "The folder of a trimming without shards."
    out = tmp_path_factory.mktemp('whole') / 'trimmed'
    trim_slides(cohort, out, TRIM, progress=False)
    return out


def files_in(folder):
    "All files of a trimming but what shards and notes say."
    found = {}
    for path in folder.rglob('*'):
        place = path.relative_to(folder)
        if path.is_file() and place.parts[0] not in ('shards', 'notes', 'overview'):
            found[place] = path.read_bytes()
    return found


def test_shards_at_once_trim_what_one_process_does(cohort, whole, tmp_path):
    out = tmp_path / 'trimmed'

    def work(shard):
        return trim_shard(cohort, out, TRIM, shard, progress=False)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, all_shards(3)))
    assert [each['slides'] for each in found] == [2, 2, 2]
    assert [len(each['failed']) for each in found] == [1, 0, 0]
    assert not (out / 'manifest.csv').exists()
    merged = merge_trimmed(cohort, out, TRIM)
    assert files_in(out) == files_in(whole)
    assert (merged['slides'], merged['biopsies'], [*merged['failed']]) == (6, 6, ['s03'])
    assert merge_trimmed(cohort, out, TRIM) == merged


def test_a_shard_goes_on_and_is_not_done_twice(cohort, tmp_path):
    out = tmp_path / 'trimmed'
    shard = Shard(2, 3)
    first = trim_shard(cohort, out, TRIM, shard, progress=False)
    assert (first['slides'], first['skipped']) == (2, 0)
    (out / 'notes/s04.json').unlink()
    assert trim_shard(cohort, out, TRIM, shard, progress=False)['skipped'] == 1
    assert trim_shard(cohort, out, TRIM, shard, progress=False)['skipped'] == 2
    message = refusal(merge_trimmed, cohort, out, TRIM)
    assert '2 of 3 shards not done (1/3, 3/3)' in message and not (out / 'manifest.csv').exists()


def test_what_changed_after_its_shard_is_named(cohort, tmp_path):
    for shard in all_shards(2):
        trim_shard(cohort, tmp_path, TRIM, shard, progress=False)
    (tmp_path / 'biopsies/s05_1.tiff').unlink()
    message = refusal(merge_trimmed, cohort, tmp_path, TRIM)
    assert 'as a slide has changed' in message and 'run shard 2/2 again' in message
    assert message.endswith(": 's05'")
    (tmp_path / 'biopsies/s04_1.tiff').unlink()
    (tmp_path / 'biopsies/s06_1.tiff').unlink()
    message = refusal(merge_trimmed, cohort, tmp_path, TRIM)
    assert 'as 3 slides have changed' in message and 'run shards 1/2, 2/2 again' in message


def test_shards_and_a_whole_trimming_exclude_each_other(cohort, tmp_path):
    trim_shard(cohort, tmp_path, TRIM, Shard(1, 9), progress=False)
    with locked(tmp_path):
        message = refusal(trim_shard, cohort, tmp_path, TRIM, Shard(2, 9), progress=False)
    assert 'another process' in message
    with locked(tmp_path, shared=True):
        assert 'another process' in refusal(trim_slides, cohort, tmp_path, TRIM, progress=False)


def test_shards_of_other_settings_are_refused(cohort, tmp_path):
    trim_shard(cohort, tmp_path, TRIM, Shard(1, 9), progress=False)
    other = replace(TRIM, margin=0.0)
    message = refusal(trim_shard, cohort, tmp_path, other, Shard(2, 9), progress=False)
    assert 'other settings' in message


def test_nothing_is_written_into_a_folder_of_something_else(cohort, tmp_path):
    (tmp_path / 'mine.txt').touch()
    with pytest.raises(InputError, match='no folder of trimmed biopsies'):
        trim_shard(cohort, tmp_path, TRIM, Shard(1, 2), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


# ---- commands


@pytest.fixture(scope='module')
def manifest(cohort):
    "The table of the seven slides."
    return cohort[0].path.parent.parent / 'manifest.csv'


@pytest.fixture(scope='module')
def best(tmp_path_factory, small_resnet):
    "A network that was not trained."
    card = dict(model=dict(arch='resnet18', n_out=1, strip=64), spacing=4.0, size=None, amp=None)
    weights = dict(StreamingClassifier(**card['model']).state_dict())
    path = tmp_path_factory.mktemp('network') / 'best.pt'
    return save_checkpoint(path, model=weights, settings=card, epoch=1, history=[])


@pytest.fixture
def run(capsys, monkeypatch):
    """A function: exit status of a command, and all that it says, in one text. Slides are read by
    this process, as it takes long to start others."""
    monkeypatch.setattr('streaming_pathology.cli.commands.processes', lambda workers: 0)

    def said(command, *words):
        status = command([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out + err

    return said


COMMANDS = {
    'check': (sp_check, ['--no-tissue']),
    'trim': (sp_trim, ['--spacing', 8, '--min-area-mm2', 0.001]),
    'predict': (sp_predict, ['--skip-failed', '--device', 'cpu']),
    'heatmap': (sp_heatmap, ['--method', 'activation', '--device', 'cpu']),
}


def words_of(name, best, manifest, out):
    "The words of a command, and the tables that it writes."
    command, options = COMMANDS[name]
    if name == 'check':
        table = out.with_suffix('.csv')
        return [command, manifest, '--csv', table, *options], [table]
    if name == 'trim':
        tables = [out / each for each in ('manifest.csv', 'failed.csv', 'slides.csv')]
        return [command, manifest, out, *options], tables
    if name == 'heatmap':
        tables = [out / each for each in ('regions.csv', 'slides.csv')]
        return [command, best, manifest, out, *options], tables
    table = out.with_suffix('.csv')
    return [command, best, manifest, table, *options], [table, out.with_suffix('.slides.csv')]


def rows_in(table):
    "Rows of a table without the time that each took."
    rows = [dict(row) for row in read_table(table, [])]
    for row in rows:
        row.pop('seconds', None)
    return rows


@pytest.mark.parametrize('name', COMMANDS)
def test_shards_of_a_command_write_what_one_job_does(run, best, manifest, tmp_path, name):
    "In any order, with one slide that is no image, and with a shard that is started twice."
    whole, tables = words_of(name, best, manifest, tmp_path / 'whole')
    assert run(*whole)[0] == 3
    words, parts = words_of(name, best, manifest, tmp_path / 'parts')
    for text, expected in (('2/3', 0), ('1/3', 3), ('2/3', 0)):
        status, said = run(*words, '--shard', text)
        assert status == expected, said
    assert 'shard 2/3' in said and 'was done before' in said
    status, said = run(*words, '--merge')
    assert (status, '1 of 3 shards not done (3/3)' in said) == (2, True), said
    assert not any(path.exists() for path in parts)
    assert run(*words, '--shard', '3/3')[0] == 0
    for _ in range(2):
        status, said = run(*words, '--merge')
        assert status == 3 and '7 slides found: 6' in said and '1 failed' in said, said
    for one, other in zip(tables, parts, strict=True):
        assert rows_in(one) == rows_in(other)


@pytest.mark.parametrize('name', COMMANDS)
def test_options_that_do_not_go_together(run, best, manifest, tmp_path, name):
    words, _ = words_of(name, best, manifest, tmp_path / 'out')
    assert 'give one of the two' in run(*words, '--shard', '1/2', '--merge')[1]
    assert 'as in 3/8' in run(*words, '--shard', '0/2')[1]
    status, said = run(*words, '--merge')
    assert status == 2 and 'has no shards to merge' in said


def test_a_check_in_shards_with_a_spacing_for_all(run, tmp_path):
    "It is one of what all shards have in common, and no slide is opened for it beforehand."
    slides, table = tmp_path / 'slides', tmp_path / 'c.csv'
    slides.mkdir()
    for name in 'ab':
        Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(slides / f'{name}.png')
    words = [slides, '--csv', table, '--no-tissue', '--slide-spacing']
    for shard in ('1/2', '2/2'):
        assert run(sp_check, *words, 4, '--shard', shard)[0] == 0
    status, text = run(sp_check, *words, 2, '--merge')
    assert status == 2 and 'slide_spacing is 4.0, not 2.0' in text
    assert run(sp_check, *words, 4, '--merge')[0] == 0
    assert [float(row['spacing']) for row in rows_in(table)] == [4.0, 4.0]


def test_a_check_in_shards_needs_a_table(run, manifest):
    assert '--csv' in run(sp_check, manifest, '--shard', '1/2')[1]


def test_a_shard_of_predictions_goes_on(run, best, manifest, tmp_path, monkeypatch):
    "What is predicted is not predicted again, but for a slide whose label was corrected."
    from streaming_pathology.training import models

    seen = []
    forward = models.StreamingClassifier.forward

    def counted(self, *args, **options):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    monkeypatch.setattr(models.StreamingClassifier, 'forward', counted)
    words = [sp_predict, best, manifest, tmp_path / 'p.csv', '--device', 'cpu', '--skip-failed']
    assert run(*words, '--shard', '1/1')[0] == 130
    assert run(*words, '--shard', '1/1')[0] == 3
    assert len(seen) == 3 + 4
    text = manifest.read_text()
    changed = manifest.with_name('changed.csv')
    changed.write_text(text.replace('s02,0', 's02,1'))
    words[2] = changed
    status, said = run(*words, '--merge')
    assert status == 2 and 'in another state (1/1)' in said
    assert run(*words, '--shard', '1/1')[0] == 3 and len(seen) == 8
    assert run(*words, '--merge')[0] == 3
    labels = [row['label'] for row in read_table(tmp_path / 'p.csv', ['label'])]
    assert labels == ['0', '1', '1', '0', '1', '0']


def test_without_skipping_a_shard_with_a_bad_slide_is_not_done(run, best, manifest, tmp_path):
    words = [sp_predict, best, manifest, tmp_path / 'p.csv', '--device', 'cpu']
    for text in ('1/2', '2/2'):
        run(*words, '--shard', text)
    status, said = run(*words, '--merge')
    assert status == 2 and '1 of 2 shards not done (2/2)' in said
    assert run(*words, '--skip-failed', '--shard', '2/2')[0] == 3
    assert run(*words, '--merge')[0] == 3


def test_a_name_for_one_is_positive_in_every_command(run, best, manifest, tmp_path):
    "A table with semicolons and names, trimmed and predicted; heatmaps and checks need no labels."
    text = manifest.read_text().replace(',0,', ',benign,').replace(',1,', ',Tumour,')
    named = manifest.with_name('named.csv')
    named.write_text('\ufeff' + text.replace(',', ';'))
    for name in COMMANDS:
        words, tables = words_of(name, best, named, tmp_path / name)
        if name in ('trim', 'predict'):
            status, said = run(*words)
            assert status == 2 and "'benign' (4) and 'Tumour' (3)" in said
            words += ['--positive', 'tumour']
        status, said = run(*words)
        assert status == 3 and 'semicolons' in said, said
        if name in ('trim', 'predict'):
            assert "1 is 'Tumour' (3); 0 is 'benign' (4)" in said
            labels = [row['label'] for row in read_table(tables[0], ['label'])]
            assert labels == ['0', '1', '0', '0', '1', '0']
