"Two runs, made or reused by one command, and held against each other."

import json
import shutil
import signal

import pytest
from resumed import as_if_never_stopped, rows

from streaming_pathology.cli import commands as cli
from streaming_pathology.cli import compare
from streaming_pathology.evaluation.review import errors_of
from streaming_pathology.io import write_csv
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('small_resnet')

TRAIN = ['--spacing', 4, '--epochs', 2, '--batch', 3, '--heatmaps', 0, '--save-minutes', 0]


@pytest.fixture(scope='module')
def whole(once):
    "A run that streams, the settings of one on patches, and both compared without a stop."

    def make(folder):
        manifest = tiny_cohort(folder / 'cohort', size=(96, 128), n=16)
        assert (
            cli.main(
                [
                    'train',
                    manifest,
                    folder / 'streaming',
                    *TRAIN,
                    '--size',
                    '128,128',
                    '--strip',
                    32,
                ]
            )
            == 0
        )
        (folder / 'mil.toml').write_text(
            f'command = "sp_mil"\nmanifest = "{manifest}"\nspacing = 4.0\nepochs = 2\nbatch = 3\nheatmaps = 0\npatch = 32\nlr = 0.001\nsave_minutes = 0.0\n'
        )
        assert compared(folder / 'streaming', folder / 'mil.toml', folder / 'compared') == 0

    return once('compare', make)


def compared(*argv):
    return cli.sp_compare([str(a) for a in argv])


def figures(folder):
    return {
        k: v
        for k, v in json.loads((folder / 'comparison.json').read_text()).items()
        if k not in ('environment', 'tables')
    }


def test_one_reused_and_one_made(whole, capsys):
    found, folder = figures(whole / 'compared'), whole / 'compared'
    assert (
        found['names'] == ['streaming', 'mil']
        and found['slides'] == 4
        and (folder / 'mil/report/index.html').exists()
        and {p.name for p in folder.iterdir()} == {*compare.FILES, 'mil'}
    )
    slides = rows(folder / 'comparison.csv')
    assert {r['slide_id'] for r in slides} == {
        r['slide_id'] for r in rows(whole / 'streaming/predictions.csv') if r['split'] == 'test'
    }
    before = (folder / 'mil/predictions.csv').stat().st_mtime_ns
    assert (
        compared(whole / 'streaming', whole / 'mil.toml', folder) == 0
        and figures(folder) == found
        and (folder / 'mil/predictions.csv').stat().st_mtime_ns == before
    )  # what is there is reused
    assert (
        compared(whole / 'streaming/settings.toml', folder / 'mil/predictions.csv', folder) == 0
        and figures(folder) == found
    )  # the same two, named otherwise
    assert (
        compared(whole / 'streaming', folder / 'mil', folder, '--split', 'tuning') == 2
        and figures(folder) == found
    )


def test_categories_side_by_side(whole, tmp_path, capsys):
    "The paper's Table III: what a reviewer wrote of the errors of both."
    run, other, out = whole / 'streaming', whole / 'compared/mil', tmp_path / 'out'
    for name, of in (('a', run), ('b', other)):
        write_csv(
            tmp_path / f'{name}.csv',
            [
                dict(slide_id=e.slide_id, error=e.kind, category='a fold of the tissue')
                for e in errors_of(of / 'predictions.csv')[0]
            ],
            ['slide_id', 'error', 'category'],
        )
    b = tmp_path / 'b.csv'
    b.write_text('\ufeff' + b.read_text().replace(',', ';'))  # as Excel has it in much of the world
    assert (
        compared(
            run,
            other,
            out,
            '--draws',
            50,
            '--categories',
            f'{tmp_path / "a.csv"},{tmp_path / "b.csv"}',
        )
        == 0
    )
    said = (out / 'comparison.html').read_text()
    n = sum(len(errors_of(r / 'predictions.csv')[0]) for r in (run, other))
    assert ('a fold of the tissue' in said) == bool(n) and 'maximum accuracy' in said
    assert (
        compared(run, whole / 'mil.toml', tmp_path / 'new', '--categories', f',{b}') == 2
        and 'mil is not finished' in capsys.readouterr().err
        and not (tmp_path / 'new').exists()
    )
    for given, says in (
        (tmp_path / 'a.csv', 'two tables'),
        (f'{tmp_path / "none.csv"},', 'none.csv'),
        (f'{run / "predictions.csv"},', 'error'),
    ):
        assert (
            compared(run, other, out, '--categories', given) == 2
            and says in capsys.readouterr().err
        )


def test_links_to_runs_of_any_name(whole, tmp_path):
    shutil.copytree(whole / 'streaming', tmp_path / 'run #1 of 50%')
    assert (
        compared(
            tmp_path / 'run #1 of 50%',
            whole / 'compared/mil',
            tmp_path / 'out',
            '--draws',
            50,
            '--level',
            0.999,
        )
        == 0
    )
    said = (tmp_path / 'out/comparison.html').read_text()
    assert (
        'href="../run%20%231%20of%2050%25/report/index.html"' in said and '99.9% interval' in said
    )


def test_stopped_and_gone_on(whole, tmp_path, monkeypatch):
    save, seen = Checkpoints.save, []

    def stopped(self, s):
        save(self, s)
        seen.append(1)
        len(seen) % 9 == 4 and signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', stopped)
    stops = 0
    while (
        status := compared(whole / 'streaming', whole / 'mil.toml', tmp_path / 'compared')
    ) == 75:
        stops += 1
        assert not (tmp_path / 'compared/comparison.json').exists()
    assert (
        status == 0 and stops >= 2 and figures(tmp_path / 'compared') == figures(whole / 'compared')
    )
    as_if_never_stopped(tmp_path / 'compared/mil', whole / 'compared/mil')


def test_refused(whole, tmp_path, capsys):
    def refused(*argv, says):
        capsys.readouterr()
        assert compared(*argv) == 2
        err = capsys.readouterr().err
        assert says in err and 'Traceback' not in err, err

    run, other, out = whole / 'streaming', tmp_path / 'other', tmp_path / 'out'
    shutil.copytree(run, other)
    table = rows(other / 'cohort.csv')
    test = next(r for r in table if r['split'] == 'test')
    test['split'] = 'train'
    write_csv(other / 'cohort.csv', table)
    refused(run, other, out, says='has learnt from')
    assert not out.exists()
    refused(run, run / 'predictions.csv', out, says='are one')
    refused(run, whole / 'mil.toml', run, says='folder of a run')
    refused(run, whole / 'mil.toml', whole / 'cohort', says='holds')
    (tmp_path / 'bad.toml').write_text('command = "sp_mil"\npatches = 3\n')
    refused(run, tmp_path / 'bad.toml', out, says='no setting')
    assert not out.exists()
    (other / 'settings.toml').write_text(
        (other / 'settings.toml').read_text().replace('task = "binary"', 'task = "survival"')
    )
    refused(run, other, out, says='task survival')
    for split, says in (
        ('train', 'in only one of'),
        ('test', 'with another label'),
    ):  # known before anything is trained
        table = rows(whole / 'cohort/manifest.csv')
        cohort = {r['slide_id']: r['split'] for r in rows(run / 'cohort.csv')}
        for r in table:
            r.update(path=whole / 'cohort' / r['path'], split=cohort[r['slide_id']])
        two = [next(r for r in table if r['split'] == 'test' and r['label'] == l) for l in '01']
        for r in two[:1] if split == 'train' else two:
            r.update(split=split, label=str(1 - int(r['label'])) if split == 'test' else r['label'])
        write_csv(tmp_path / 'cohort.csv', table)
        (tmp_path / 'mil.toml').write_text(
            (whole / 'mil.toml')
            .read_text()
            .replace(str(whole / 'cohort/manifest.csv'), str(tmp_path / 'cohort.csv'))
        )
        refused(run, tmp_path / 'mil.toml', out, says=says)
        assert not out.exists()
    (tmp_path / 'mil.toml').write_text((whole / 'mil.toml').read_text() + 'stride = 99\n')
    refused(run, tmp_path / 'mil.toml', out, says='99 pixels apart')
    assert not out.exists()
    shutil.rmtree(other / 'checkpoints')
    shutil.rmtree(other / 'report')
    (other / 'settings.toml').write_text('command = 3\n')
    refused(run, other, out, says='command')
