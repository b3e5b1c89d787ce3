"Two runs on the same slides: what is compared and refused, and runs that are trained on the way."

import json
import shutil
import signal

import pytest
from resumed import as_if_never_stopped, rows
from sides import toy_side

from streaming_pathology.cli import commands as cli
from streaming_pathology.evaluation.review import errors_of
from streaming_pathology.io import write_csv
from streaming_pathology.runs import compare
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('small_resnet')


def compared(*argv):
    "The exit status of sp_compare."
    return cli.sp_compare([str(word) for word in argv])


def write_table(path, side):
    names = 'slide_id', 'label', 'split', 'probability'
    predictions = side.predictions.values()
    write_csv(path, [{name: getattr(each, name) for name in names} for each in predictions])


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    "Tables of two sides, and what cannot be compared with the first."
    folder = tmp_path_factory.mktemp('tables')
    write_table(folder / 'streaming.csv', toy_side('streaming', 1.2, seed=1))
    write_table(folder / 'mil.csv', toy_side('mil', 0.6, seed=2))
    lines = (folder / 'mil.csv').read_text().splitlines()
    (folder / 'fewer.csv').write_text('\n'.join(lines[:-3]) + '\n')
    other_label = lines[-1].replace(',1,', ',0,')
    (folder / 'other.csv').write_text('\n'.join([*lines[:-1], other_label]) + '\n')
    (folder / 'bad.toml').write_text('command = "sp_demo"\n')
    (folder / 'number.toml').write_text('command = "sp_mil"\nmanifest = 3\n')
    (folder / 'none.toml').write_text('epochs = 3\n')
    (folder / 'damaged').mkdir()
    (folder / 'damaged/comparison.json').write_text('{')
    return folder


@pytest.fixture(scope='module')
def former(tables):
    "A comparison of the two."
    words = tables / 'streaming.csv', tables / 'mil.csv', tables / 'compared', '--n-bootstrap', 1000
    assert compared(*words) == 0
    return tables / 'compared'


def test_two_tables(tables, former, capsys):
    words = tables / 'streaming.csv', tables / 'mil.csv', former, '--n-bootstrap', 1000
    assert compared(*words) == 0
    out, err = capsys.readouterr()
    assert err == ''
    assert 'lies in no run folder' in out
    assert figures(former)['names'] == ['streaming', 'mil']
    assert 'No difference' not in (former / 'comparison.html').read_text()


def test_slides_that_both_have(tables, tmp_path):
    words = tables / 'streaming.csv', tables / 'fewer.csv', tmp_path / 'out', '--shared'
    assert compared(*words, '--n-bootstrap', 100) == 0


@pytest.mark.parametrize(
    ('words', 'says'),
    [
        ('bad.toml streaming.csv x', 'sp_demo'),
        ('streaming.csv bad.toml x', 'sp_demo'),
        ('streaming.csv number.toml x', 'manifest is 3'),
        ('streaming.csv none.toml x', 'is of no command'),
        ('streaming.csv streaming.csv x', 'are one'),
        ('streaming.csv none.csv x', 'none.csv'),
        ('streaming.csv . x', 'no run folder'),
        ('streaming.csv mil.csv streaming.csv', 'is a file'),
        ('streaming.csv mil.csv .', 'holds'),
        ('streaming.csv mil.csv x --split val', "'val'"),
        ('streaming.csv mil.csv x --confidence 2', '--confidence'),
        ('streaming.csv mil.csv x --n-bootstrap 0', '--n-bootstrap'),
        ('streaming.csv fewer.csv x', '3 slides'),
        ('streaming.csv fewer.csv compared --shared', 'holds the comparison of'),
        ('streaming.csv mil.csv damaged', 'no comparison'),
        ('streaming.csv other.csv x', 'another label'),
    ],
)
def test_what_cannot_be_compared(tables, former, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tables)
    assert compared(*words.split()) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count('\n') == 1, err
    assert not (tables / 'x').exists()


# ---- runs


TRAIN = [
    '--spacing',
    4,
    '--epochs',
    2,
    '--batch-size',
    3,
    '--heatmaps',
    0,
    '--checkpoint-minutes',
    0,
]
MIL = """command = "sp_mil"
manifest = "{manifest}"
spacing = 4.0
epochs = 2
batch = 3
heatmaps = 0
patch = 32
lr = 0.001
save_minutes = 0.0
"""


@pytest.fixture(scope='module')
def whole(once):
    "A run that streams, the settings of one on patches, and both compared without a stop."

    def make(folder):
        manifest = tiny_cohort(folder / 'cohort', size=(96, 128), n=16)
        words = ['train', manifest, folder / 'streaming', *TRAIN]
        assert cli.main([*words, '--size', '128,128', '--strip', 32]) == 0
        (folder / 'mil.toml').write_text(MIL.format(manifest=manifest))
        assert compared(folder / 'streaming', folder / 'mil.toml', folder / 'compared') == 0

    return once('compare', make)


def figures(folder):
    "What comparison.json says, without machine and paths."
    said = json.loads((folder / 'comparison.json').read_text())
    return {name: value for name, value in said.items() if name not in ('environment', 'tables')}


def test_one_run_is_reused_and_one_made(whole):
    folder = whole / 'compared'
    found = figures(folder)
    assert found['names'] == ['streaming', 'mil']
    assert found['slides'] == 4
    assert (folder / 'mil/report/index.html').exists()
    assert {path.name for path in folder.iterdir()} == {*compare.FILES, 'mil'}
    predictions = rows(whole / 'streaming/predictions.csv')
    tested = {row['slide_id'] for row in predictions if row['split'] == 'test'}
    assert {row['slide_id'] for row in rows(folder / 'comparison.csv')} == tested


def test_a_finished_run_is_not_made_again(whole):
    folder = whole / 'compared'
    found, table = figures(folder), folder / 'mil/predictions.csv'
    before = table.stat().st_mtime_ns
    assert compared(whole / 'streaming', whole / 'mil.toml', folder) == 0
    assert figures(folder) == found
    assert table.stat().st_mtime_ns == before


def test_the_same_two_by_other_names(whole):
    folder = whole / 'compared'
    found = figures(folder)
    assert compared(whole / 'streaming/settings.toml', folder / 'mil/predictions.csv', folder) == 0
    assert figures(folder) == found


def test_another_split_needs_another_folder(whole):
    folder = whole / 'compared'
    found = figures(folder)
    assert compared(whole / 'streaming', folder / 'mil', folder, '--split', 'tuning') == 2
    assert figures(folder) == found


@pytest.fixture
def reviewed(whole, tmp_path):
    "Tables of what a reviewer wrote of the errors of both: a.csv, and b.csv as Excel saves it."
    for name, run in (('a', whole / 'streaming'), ('b', whole / 'compared/mil')):
        wrong, _ = errors_of(run / 'predictions.csv')
        table = [
            dict(slide_id=each.slide_id, error=each.kind, category='a fold of the tissue')
            for each in wrong
        ]
        write_csv(tmp_path / f'{name}.csv', table, ['slide_id', 'error', 'category'])
    path = tmp_path / 'b.csv'
    path.write_text('\ufeff' + path.read_text().replace(',', ';'))  # in much of the world
    return tmp_path


def test_categories_side_by_side(whole, reviewed):
    "The paper's Table III: what a reviewer wrote of the errors of both."
    run, other, out = whole / 'streaming', whole / 'compared/mil', reviewed / 'out'
    both = f'{reviewed / "a.csv"},{reviewed / "b.csv"}'
    assert compared(run, other, out, '--n-bootstrap', 50, '--error-review', both) == 0
    page = (out / 'comparison.html').read_text()
    n_errors = sum(len(errors_of(each / 'predictions.csv')[0]) for each in (run, other))
    assert ('a fold of the tissue' in page) == bool(n_errors)
    assert 'maximum accuracy' in page


def test_categories_of_a_run_that_is_not_finished_are_refused(whole, reviewed, capsys):
    words = whole / 'streaming', whole / 'mil.toml', reviewed / 'new'
    assert compared(*words, '--error-review', f',{reviewed / "b.csv"}') == 2
    assert 'mil is not finished' in capsys.readouterr().err
    assert not (reviewed / 'new').exists()


@pytest.mark.parametrize(
    ('categories', 'says'),
    [
        ('{reviewed}/a.csv', 'two tables'),
        ('{reviewed}/none.csv,', 'none.csv'),
        ('{run}/predictions.csv,', 'error'),
    ],
)
def test_categories_that_are_none_are_refused(whole, reviewed, capsys, categories, says):
    run = whole / 'streaming'
    given = categories.format(reviewed=reviewed, run=run)
    words = run, whole / 'compared/mil', reviewed / 'out'
    assert compared(*words, '--error-review', given) == 2
    assert says in capsys.readouterr().err


def test_links_to_runs_of_any_name(whole, tmp_path):
    shutil.copytree(whole / 'streaming', tmp_path / 'run #1 of 50%')
    words = tmp_path / 'run #1 of 50%', whole / 'compared/mil', tmp_path / 'out'
    assert compared(*words, '--n-bootstrap', 50, '--confidence', 0.999) == 0
    page = (tmp_path / 'out/comparison.html').read_text()
    assert 'href="../run%20%231%20of%2050%25/report/index.html"' in page
    assert '99.9% interval' in page


def test_stopped_and_resumed(whole, tmp_path, monkeypatch):
    save, saved = Checkpoints.save, []

    def save_and_stop(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) % 9 == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', save_and_stop)
    words = whole / 'streaming', whole / 'mil.toml', tmp_path / 'compared'
    stops, status = 0, compared(*words)
    while status == 75:
        stops += 1
        assert not (tmp_path / 'compared/comparison.json').exists()
        status = compared(*words)
    assert status == 0
    assert stops >= 2
    assert figures(tmp_path / 'compared') == figures(whole / 'compared')
    as_if_never_stopped(tmp_path / 'compared/mil', whole / 'compared/mil')


@pytest.fixture
def refused(whole, tmp_path, capsys):
    "Asserts that a comparison of the streaming run is refused before anything is written."

    def check(other, says, out=tmp_path / 'out'):
        capsys.readouterr()
        assert compared(whole / 'streaming', other, out) == 2
        err = capsys.readouterr().err
        assert says in err, err
        assert 'Traceback' not in err
        assert not (tmp_path / 'out').exists()

    return check


@pytest.fixture
def copy(whole, tmp_path):
    "A copy of the streaming run."
    return shutil.copytree(whole / 'streaming', tmp_path / 'other')


def test_a_run_that_was_trained_on_a_test_slide_is_refused(copy, refused):
    table = rows(copy / 'cohort.csv')
    next(row for row in table if row['split'] == 'test')['split'] = 'train'
    write_csv(copy / 'cohort.csv', table)
    refused(copy, 'was trained or chosen on')


def test_a_run_with_itself_is_refused(whole, refused):
    refused(whole / 'streaming/predictions.csv', 'are one')


def test_a_folder_of_something_else_is_refused(whole, refused):
    refused(whole / 'mil.toml', 'folder of a run', whole / 'streaming')
    refused(whole / 'mil.toml', 'holds', whole / 'cohort')


def test_an_unknown_setting_is_refused(tmp_path, refused):
    (tmp_path / 'bad.toml').write_text('command = "sp_mil"\npatches = 3\n')
    refused(tmp_path / 'bad.toml', 'no setting')


def test_a_run_of_another_task_is_refused(copy, refused):
    settings = (copy / 'settings.toml').read_text()
    settings = settings.replace('task = "binary"', 'task = "survival"')
    (copy / 'settings.toml').write_text(settings)
    refused(copy, 'task survival')


def other_cohort(whole):
    "The rows of a manifest like that of the runs, and one of its test slides of each class."
    table = rows(whole / 'cohort/manifest.csv')
    splits = {row['slide_id']: row['split'] for row in rows(whole / 'streaming/cohort.csv')}
    for row in table:
        row.update(path=whole / 'cohort' / row['path'], split=splits[row['slide_id']])
    test = [row for row in table if row['split'] == 'test']
    return table, [next(row for row in test if row['label'] == label) for label in '01']


def mil_on(folder, table):
    "Settings of the baseline on another manifest."
    write_csv(folder / 'cohort.csv', table)
    path = folder / 'mil.toml'
    path.write_text(MIL.format(manifest=folder / 'cohort.csv'))
    return path


def test_a_test_slide_for_training_is_refused_before_training(whole, tmp_path, refused):
    table, (negative, _) = other_cohort(whole)
    negative['split'] = 'train'
    refused(mil_on(tmp_path, table), 'in only one of')


def test_other_labels_are_refused_before_training(whole, tmp_path, refused):
    table, (negative, positive) = other_cohort(whole)
    negative['label'], positive['label'] = '1', '0'
    refused(mil_on(tmp_path, table), 'with another label')


def test_settings_that_do_not_go_together_are_refused(whole, tmp_path, refused):
    path = tmp_path / 'mil.toml'
    path.write_text((whole / 'mil.toml').read_text() + 'stride = 99\n')
    refused(path, '99 pixels apart')


def test_a_run_that_cannot_be_finished_is_refused(copy, refused):
    shutil.rmtree(copy / 'checkpoints')
    shutil.rmtree(copy / 'report')
    (copy / 'settings.toml').write_text('command = 3\n')
    refused(copy, 'command')
