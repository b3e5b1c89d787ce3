"A training that is killed, stopped or short of disk goes on from its last point and ends with the same weights, bit by bit."

import copy
import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torchvision
from forks import Forked
from resumed import TRAIN, as_if_never_stopped, rows
from runs import refused, tree

from streaming_pathology.cli import commands as cli
from streaming_pathology.cli.parser import status_of
from streaming_pathology.core import InputError
from streaming_pathology.io import write_csv
from streaming_pathology.outputs import REPORT
from streaming_pathology.runs.methods import Streaming
from streaming_pathology.runs.records import Record
from streaming_pathology.runs.settings import StreamingSettings
from streaming_pathology.slides.cohorts import tiny_cohort
from streaming_pathology.training.callbacks import EarlyStopping
from streaming_pathology.training.checkpoints import (
    Checkpoints,
    checkpoint_files,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from streaming_pathology.training.loop import TinyNet, fit, synth_learner

pytestmark = pytest.mark.usefixtures('small_resnet')

KILLS = int(os.environ.get('STREAMING_KILLS', 3))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    return tiny_cohort(tmp_path_factory.mktemp('good') / 'cohort', size=(64, 64)).parent


@pytest.fixture(scope='module')
def whole(once):
    "A run that was never stopped."

    def make(folder):
        tiny_cohort(folder / 'cohort', size=(64, 64))
        assert cli.main(['train', folder / 'cohort/manifest.csv', folder / 'run', *TRAIN]) == 0

    return once('whole', make) / 'run'


def process(*argv, **options):
    "sp_train in a process of its own."
    return Forked('small:command', 'train', *argv, **options)


def test_killed_at_any_moment(cohort, whole, tmp_path):
    "Also while a point is written; what was done before the last point is not done again."
    rng, run, at, killed = random.Random(0), tmp_path / 'run', (0, 0), 0
    while True:
        p = process(cohort / 'manifest.csv', run, *TRAIN, '--resume')
        aim, inside = (
            rng.randrange(1, 12),
            False,
        )  # of the files that it writes from now on: killed behind it, or while it is written
        seen, begun = (
            {f.name for f in run.glob(f'checkpoints/{k}')} for k in ('*.pt', '.*.partial')
        )
        while p.poll() is None and killed < KILLS and not inside:
            new, now = (
                {f.name for f in run.glob(f'checkpoints/{k}')} for k in ('*.pt', '.*.partial')
            )
            inside = bool(now - begun) and rng.random() < 0.15
            if len(new - seen) >= aim or inside:
                time.sleep(rng.random() * 0.03)
                p.kill()
                break
            aim -= len(new - seen)
            seen |= new
            begun |= now
            time.sleep(0.001)
        _, err = p.communicate(timeout=100)
        assert p.returncode in (0, -signal.SIGKILL) and 'Traceback' not in err, err
        there = [
            tuple(map(int, f.stem.split('_')[1:])) for f in checkpoint_files(run / 'checkpoints')
        ]
        assert max(there, default=at) >= at and len(there) <= 3
        at = max(there, default=at)
        if p.returncode:
            killed += 1
            print(f'kill {killed} after point {at}{", in a write" * inside}')
        if p.returncode == 0:
            as_if_never_stopped(run, whole)
            print(f'finished after {killed} kills')
            if killed >= KILLS:
                break
            shutil.rmtree(run)
            at = 0, 0
    assert killed >= KILLS


@pytest.mark.parametrize('workers', [0, 2])
def test_stopped_and_gone_on(cohort, whole, tmp_path, workers):
    "As a cluster does it: a signal, to the process or to all of its group, exit status 75, and the same command again, until it says that all is done."
    run, argv = (
        tmp_path / 'run',
        [
            cohort / 'manifest.csv',
            tmp_path / 'run',
            *TRAIN,
            '--resume',
            '--workers',
            workers,
            '--checkpoint-minutes',
            0,
        ],
    )  # the stops are early in a short run
    for k in range(2):
        p = process(*argv, new_session=True)
        before = set(checkpoint_files(run / 'checkpoints'))
        while p.poll() is None and not set(checkpoint_files(run / 'checkpoints')) - before:
            time.sleep(0.002)
        (os.killpg, os.kill)[k % 2](p.pid, signal.SIGTERM)
        _, err = p.communicate(timeout=100)
        assert (
            p.returncode == 75
            and 'stopped: epoch' in err
            and '--resume' in err
            and 'Traceback' not in err
        ), err
        assert not (run / 'report/index.html').exists()
    p = process(*argv)
    _, err = p.communicate(timeout=100)
    assert p.returncode == 0, err
    as_if_never_stopped(run, whole)
    before = tree(run)
    assert cli.main(['train', *argv]) == 0 and tree(run) == before


@pytest.mark.parametrize('later', [0, 0.5, 2])
def test_stopped_while_workers_start(cohort, tmp_path, later):
    "A signal to all processes of a job, which finds workers half made: all go, and none is left behind."
    words = [*TRAIN, '--epochs', 50, '--workers', 2]
    p = process(cohort / 'manifest.csv', tmp_path / 'run', *words, new_session=True)

    def workers():
        try:
            return [
                c for c in psutil.Process(p.pid).children() if 'spawn_main' in ' '.join(c.cmdline())
            ]
        except psutil.Error:
            return []

    while p.poll() is None and not workers():
        time.sleep(0.01)
    time.sleep(later)
    born = workers()
    os.killpg(p.pid, signal.SIGTERM)
    _, err = p.communicate(timeout=60)
    assert p.returncode in (75, 130) and 'Traceback' not in err, err
    _, left = psutil.wait_procs(born, 20)
    assert not left


def test_a_worker_is_killed(cohort, tmp_path):
    "As where memory runs out."
    words = [*TRAIN, '--epochs', 50, '--workers', 1]
    p = process(cohort / 'manifest.csv', tmp_path / 'run', *words)
    while p.poll() is None and not checkpoint_files(tmp_path / 'run/checkpoints'):
        time.sleep(0.01)
    for c in psutil.Process(p.pid).children():
        if 'spawn_main' in ' '.join(c.cmdline()):
            c.kill()
    _, err = p.communicate(timeout=60)
    assert (
        p.returncode == 2 and 'a data-loading worker was killed' in err and 'Traceback' not in err
    ), err


def test_a_worker_is_killed_while_it_hands_over(capsys):
    def reset():
        raise ConnectionResetError(104, 'Connection reset by peer')

    assert status_of(reset) == 2 and 'a data-loading worker was killed' in capsys.readouterr().err


def test_a_loader_that_misses_its_worker_says_nothing_when_it_goes(capsys, monkeypatch):
    killed = RuntimeError('DataLoader worker (pid 17471) is killed by signal: Killed.')

    class Loader:
        def __del__(self):
            raise killed

    def read():
        loader = Loader()  # noqa: F841
        raise killed

    said = []
    monkeypatch.setattr(sys, 'unraisablehook', said.append)
    assert (
        status_of(read) == 2
        and 'a data-loading worker was killed' in capsys.readouterr().err
        and not said
    )


def test_workers_change_nothing(cohort, whole, tmp_path):
    assert (
        cli.main(['train', cohort / 'manifest.csv', tmp_path / 'run', *TRAIN, '--workers', 3]) == 0
    )
    as_if_never_stopped(tmp_path / 'run', whole)


def test_a_second_signal_ends_it_at_once(cohort, tmp_path):
    p = process(cohort / 'manifest.csv', tmp_path / 'run', *TRAIN, '--epochs', 1000)
    while p.poll() is None and not any((tmp_path / 'run/checkpoints').glob('point_*.pt')):
        time.sleep(0.002)
    os.kill(p.pid, signal.SIGSTOP)
    p.send_signal(signal.SIGTERM)
    p.send_signal(signal.SIGINT)
    p.send_signal(signal.SIGCONT)
    _, err = p.communicate(timeout=100)
    assert (
        p.returncode == 130
        and err.strip().endswith('error: interrupted')
        and 'Traceback' not in err
    ), err


@pytest.fixture
def halfway(whole, tmp_path):
    "A run that was broken off in its second epoch: its points are those of a run that ended there."
    shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/report')
    for p in checkpoint_files(tmp_path / 'run/checkpoints')[1:]:
        p.unlink()
    return tmp_path / 'run'


def test_what_was_changed_is_named(cohort, whole, halfway, capsys):
    before = tree(halfway)

    def again(*says, cohort=cohort, options=()):
        refused(
            capsys, ['train', cohort / 'manifest.csv', halfway, *TRAIN, *options, '--resume'], *says
        )
        assert tree(halfway) == before

    again('--lr was 0.01 and is 0.1', '--accept-changes', options=['--lr', 0.1])
    again('--pool was avg and is max', options=['--pool', 'max'])
    again('--overwrite', options=['--overwrite'])
    other = halfway.parent / 'cohort'
    shutil.copytree(cohort, other)
    text = (other / 'manifest.csv').read_text()
    (other / 'manifest.csv').write_text(
        text.replace('train', 'x', 1).replace('tuning', 'train', 1).replace('x', 'tuning', 1)
    )
    again('the cohort was another one', cohort=other)
    again(
        'data leakage: 1 slide for tuning or testing',
        's0',
        cohort=other,
        options=['--accept-changes'],
    )
    (other / 'manifest.csv').write_text(text)
    (other / 'slides/s03.tiff').write_bytes((other / 'slides/s03.tiff').read_bytes() + b'0')
    again('the cohort was another one', cohort=other)
    assert (
        cli.main(
            [
                'train',
                cohort / 'manifest.csv',
                halfway,
                *TRAIN,
                '--workers',
                1,
                '--n-samples',
                3,
                '--resume',
            ]
        )
        == 0
    )
    as_if_never_stopped(halfway, whole)
    longer = ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--epochs', 4, '--resume']
    for options in (['--lr', 0.1], ['--epochs', 2]):
        refused(
            capsys,
            [*longer[:-3], *options, '--resume', '--accept-changes'],
            'has 3 epochs',
            '--epochs 4 or more',
        )
    assert cli.main([*longer, '--accept-changes']) == 0 and len(rows(halfway / 'log.csv')) == 4
    assert json.loads((halfway / 'environment.json').read_text())['resumed'][-1].endswith(
        '; epoch 4; --epochs was 3 and is 4'
    )
    shutil.rmtree(halfway / 'report')
    (halfway / 'predictions.csv').unlink()  # as where memory did not suffice for them
    assert cli.main([*longer, '--strip', 32, '--accept-changes']) == 0
    longer += ['--strip', 32]
    assert (
        load_checkpoint(halfway / 'checkpoints/best.pt')['settings']['settings']['epochs'] == 4
    )  # what was accepted counts for it, whichever epoch it is of
    assert cli.main(longer) == 0 and 'is finished' in capsys.readouterr().out
    refused(
        capsys,
        ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume'],
        '--epochs was 4 and is 3',
    )
    refused(
        capsys,
        [
            'train',
            cohort / 'manifest.csv',
            halfway,
            *TRAIN,
            '--epochs',
            4,
            '--resume',
            '--accept-changes',
            '--pool',
            'attention',
        ],
        'was trained with --pool avg',
        'cannot be changed on resume',
    )


def test_what_was_learnt_is_never_tested_on(cohort, halfway, capsys):
    "By slide and by patient, also where it takes two changes."
    table = rows(cohort / 'manifest.csv')
    path = halfway.parent / 'other/manifest.csv'
    path.parent.mkdir()

    def tried(epochs, *changes, options=()):
        new = {
            r['slide_id']: dict(
                r,
                path=str(cohort / r['path']),
                mask=str(cohort / r['mask']) if r.get('mask') else '',
            )
            for r in table
        }
        for i, change in changes:
            new[i] |= change
        write_csv(path, list(new.values()))
        return [
            'train',
            path,
            halfway,
            *TRAIN,
            '--epochs',
            epochs,
            '--resume',
            '--accept-changes',
            *options,
        ]

    of = {p: [r['slide_id'] for r in table if r['split'] == p] for p in ('train', 'tuning', 'test')}
    train, tuning, test = of['train'][0], of['tuning'][0], of['test'][0]
    who = next(r['patient_id'] for r in table if r['slide_id'] == train)
    for split in ('tuning', 'test'):
        refused(
            capsys,
            tried(4, (train, dict(split=split, patient_id='new'))),
            f'{train!r} (now {split})',
        )
    refused(capsys, tried(4, (tuning, dict(split='test'))), f'{tuning!r} (now test)')
    refused(
        capsys,
        tried(4, (train, dict(patient_id='new')), (test, dict(patient_id=who))),
        f'{test!r} (now test)',
    )  # a slide of a patient whose others were learned from
    assert (
        cli.main(tried(4, (train, dict(split='', label='')), options=['--lr', 1e-5])) == 0
    )  # left out, and then back in another part
    refused(capsys, tried(5, (train, dict(split='test'))), f'{train!r} (now test)')
    refused(
        capsys,
        tried(5, (train, dict(slide_id='new', patient_id='new', split='test'))),
        "'new' (now test)",
    )  # the same file


def test_a_damaged_point(cohort, halfway, capsys):
    for p in checkpoint_files(halfway / 'checkpoints'):
        data = bytearray(p.read_bytes())
        data[len(data) // 3] ^= 4
        p.write_bytes(data)
    argv = ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume']
    refused(capsys, argv, 'no intact checkpoint', 'checksum')
    (halfway / 'report').mkdir(exist_ok=True)
    (halfway / 'report/index.html').write_text(f'<meta {REPORT.says}>')  # of a run that is finished
    assert cli.main(argv) == 0 and all(
        t in said
        for said in [''.join(capsys.readouterr())]
        for t in ('no intact checkpoint', 'is finished')
    )
    refused(capsys, [*argv, '--lr', 0.1, '--accept-changes'], 'without a checkpoint to resume from')
    (halfway / 'settings.toml').write_text('lr = = 1')
    refused(capsys, argv, 'settings.toml cannot be read')


def test_what_the_point_remembers(cohort, whole, halfway, capsys):
    "Settings that were edited in the run folder are another's; what lies beside a run is in nobody's way."
    f = halfway / 'settings.toml'
    f.write_text(f.read_text().replace('lr = 0.01', 'lr = 0.1'))
    (halfway / 'notes.txt').write_text('mine')
    refused(capsys, ['train', f, halfway, '--resume'], '--lr was 0.01 and is 0.1')
    assert (
        cli.main(['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume']) == 0
        and (halfway / 'notes.txt').read_text() == 'mine'
    )
    (halfway / 'notes.txt').unlink()
    as_if_never_stopped(halfway, whole)


def test_the_best_epoch_is_lost(cohort, whole, halfway, capsys):
    shutil.copytree(whole, halfway, dirs_exist_ok=True)
    shutil.rmtree(halfway / 'report')  # stopped after the last epoch
    best, argv = (
        halfway / 'checkpoints/best.pt',
        ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume'],
    )
    data = bytearray(best.read_bytes())
    data[len(data) // 3] ^= 4
    best.write_bytes(data)
    (halfway / 'report').mkdir()
    (halfway / 'report/index.html').touch()
    before = tree(halfway)
    refused(capsys, [*argv, '--epochs', 4, '--accept-changes'], 'best.pt is damaged')
    assert tree(halfway) == before
    shutil.rmtree(halfway / 'report')
    refused(capsys, argv, 'best.pt is damaged', 'delete it')
    best.unlink()
    assert cli.main(argv) == 0 and 'the weights of the last one are used' in capsys.readouterr().err
    a, b = load_checkpoint(best)['model'], last_checkpoint(halfway / 'checkpoints')['model']
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_was_finished_is_not(cohort, whole, halfway, capsys, monkeypatch):
    "While a run goes on there are no figures of former weights; its record is written again, whatever has become of it."
    for n in ('log.csv', 'settings.toml', 'cohort.csv'):
        (halfway / n).unlink()
    (halfway / 'environment.json').write_text('["streaming_pathology"]')
    (halfway / 'heatmaps').mkdir(exist_ok=True)
    (halfway / 'heatmaps/s00.npy').touch()
    argv, save = (
        ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--checkpoint-minutes', 0, '--resume'],
        Checkpoints.save,
    )

    def stopped(self, s):
        monkeypatch.setattr(Checkpoints, 'save', save)
        save(self, s)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, 'save', stopped)
    assert cli.main(argv) == 75
    assert (
        sorted(p.name for p in halfway.iterdir() if p.is_file())
        == ['cohort.csv', 'environment.json', 'log.csv', 'settings.toml']
        and not any(halfway.glob('images/*'))
        and not any(halfway.glob('heatmaps/*'))
    )
    assert (
        rows(halfway / 'log.csv', 'seconds', 'peak_mb')
        == rows(whole / 'log.csv', 'seconds', 'peak_mb')[
            : last_checkpoint(halfway / 'checkpoints')['epoch']
        ]
        and len(json.loads((halfway / 'environment.json').read_text())['resumed']) == 1
    )
    assert cli.main(argv) == 0
    as_if_never_stopped(halfway, whole)
    assert rows(halfway / 'cohort.csv', 'path') == rows(whole / 'cohort.csv', 'path')


def test_a_cohort_inside_a_run(cohort, whole, tmp_path, capsys):
    "Where there is no point yet, --resume replaces what is there, and so refuses a folder that holds what it reads."
    run = tmp_path / 'run'
    shutil.copytree(cohort, run / 'cohort')
    for n in ('environment.json', 'settings.toml'):
        shutil.copy(whole / n, run / n)
    before = tree(run)
    refused(
        capsys, ['train', run / 'cohort/manifest.csv', run, *TRAIN, '--resume'], 'would be replaced'
    )
    assert tree(run) == before


def test_what_cannot_change(cohort, whole, halfway, capsys):
    for options in (['--spacing', 8], ['--normalize', 'training'], ['--skip-background']):
        refused(
            capsys,
            [
                'train',
                cohort / 'manifest.csv',
                halfway,
                *TRAIN,
                *options,
                '--resume',
                '--accept-changes',
            ],
            'cannot be changed on resume',
            options[0][2:],
        )


def test_settings_by_former_names(cohort, whole, halfway, capsys):
    "Checkpoints and settings of a former version are those of the same run."
    former = dict(
        exclude_pen='pen',
        skip_background='canvas',
        batch_size='batch',
        n_samples='copies',
        checkpoint_minutes='save_minutes',
        memory_check='dry_run',
    )
    for path in (halfway / 'checkpoints').glob('*.pt'):
        point = load_checkpoint(path)
        settings = point['settings']['settings']
        assert former.keys() <= settings.keys()
        renamed = {former.get(name, name): value for name, value in settings.items()}
        point['settings']['settings'] = renamed
        del point['versions']
        save_checkpoint(path, **point)
    argv = ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume']
    refused(capsys, [*argv, '--batch-size', 2], '--batch-size was 3 and is 2')
    refused(capsys, [*argv, '--keep-pen', '--accept-changes'], '--exclude-pen True')
    assert cli.main(argv) == 0
    as_if_never_stopped(halfway, whole)


def test_other_weights(cohort, whole, tmp_path, capsys):
    "They are in the points, so that others would have no effect; but their file may lie elsewhere."
    for i in (1, 2):
        torch.manual_seed(i)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / f'{i}.pt')
    run, argv = (
        tmp_path / 'run',
        ['train', cohort / 'manifest.csv', tmp_path / 'run', *TRAIN, '--epochs', 2, '--resume'],
    )
    assert cli.main([*argv, '--weights', tmp_path / '1.pt']) == 0
    for p in checkpoint_files(run / 'checkpoints')[1:]:
        p.unlink()
    shutil.rmtree(run / 'report')
    before = tree(run)
    shutil.copy(tmp_path / '1.pt', tmp_path / '3.pt')
    for options in (['--weights', tmp_path / '2.pt'], []):
        refused(capsys, [*argv, *options], '--weights-sha256 was')
        refused(
            capsys, [*argv, *options, '--accept-changes'], 'cannot be changed on resume', 'weights'
        )
        assert tree(run) == before
    assert cli.main([*argv, '--weights', tmp_path / '3.pt']) == 0


def test_what_comes_too_late():
    "What was changed is refused where nothing is left that would learn from it, and where something is it is not."

    def refusal(changed, stage=None, done=3, first=0, epochs=3, stop=False, **settings):
        s = SimpleNamespace(
            epoch=done, first=first, epochs=epochs, stop=stop, stage=stage, history=[{}] * done
        )
        try:
            values = dict(recipe=None, epochs=first + epochs, patience=None) | settings
            method = Streaming(StreamingSettings(manifest='', **values))
            Record('run', [], method, changed).after_load(s)
        except InputError as e:
            return str(e)

    assert (
        refusal(dict(lr=0.1), done=2) is None
        and '(--lr): give --epochs 4 or more' in refusal(dict(lr=0.1))
        and refusal({}) is None
    )
    assert (
        refusal(dict(epochs=9)) is None
        and refusal(dict(strip=9, memory='8GB', device='cuda')) is None
        and '--epochs' in refusal(dict(epochs=9), epochs=2)
    )
    assert (
        'more --patience' in refusal(dict(lr=0.1), done=2, stop=True, patience=1)
        and all(refusal(dict(patience=p), done=2, stop=True, patience=1) is None for p in (5, ''))
        and refusal(dict(patience=1), done=2, stop=True, patience=2)
    )  # which stops all the same
    of = dict(recipe='paper')  # of two stages
    assert (
        refusal(dict(clip=1.0), 1, **of) is None
        and refusal(dict(clip=1.0), 1, done=2, stop=True, **of) is None
        and refusal(dict(clip=1.0), 2, done=7, first=3, epochs=9, **of) is None
    )
    for stop, done in ((True, 8), (False, 9)):
        assert refusal(dict(clip=1.0), 2, done=done, first=3, epochs=6, stop=stop, **of).endswith(
            '(--clip): give another folder'
        )


def test_more_patience():
    class Kept:
        def at_rest(self, s):
            self.point = copy.deepcopy(s.state_dict())

    kept, (_model, train, tuning) = Kept(), synth_learner(4)

    def go(patience, **more):
        return fit(
            TinyNet(),
            train,
            tuning,
            epochs=6,
            lr=1e-9,
            callbacks=[EarlyStopping(patience, 1e-3), kept],
            progress=False,
            **more,
        )

    assert len(go(1)) == 2 and len(go(3, resume=kept.point, accept_changes=True)) == 4


def test_a_malicious_point(cohort, halfway, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/owned',)

    for p in checkpoint_files(halfway / 'checkpoints'):
        torch.save(dict(versions={}, x=Evil()), p)
    refused(
        capsys,
        ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume'],
        'no intact checkpoint',
        'run code',
    )
    torch.save(dict(x=Evil()), tmp_path / 'w.pt')
    refused(
        capsys,
        [
            'train',
            cohort / 'manifest.csv',
            tmp_path / 'new',
            *TRAIN,
            '--weights',
            tmp_path / 'w.pt',
        ],
        'w.pt',
    )
    assert not (tmp_path / 'owned').exists()


def test_short_of_disk(cohort, whole, tmp_path):
    "A point that does not fit on the disk ends the training in one sentence; the point before is whole, and with room again it goes on."
    size = max(p.stat().st_size for p in checkpoint_files(whole / 'checkpoints'))
    run, argv = tmp_path / 'run', [cohort / 'manifest.csv', tmp_path / 'run', *TRAIN, '--resume']
    p = process(*argv)
    while p.poll() is None and not checkpoint_files(run / 'checkpoints'):
        time.sleep(0.002)
    p.send_signal(signal.SIGTERM)
    assert p.wait(100) == 75
    there = {f.name: f.read_bytes() for f in checkpoint_files(run / 'checkpoints')}

    p = process(*argv, file_size=size // 2)
    _, err = p.communicate(timeout=100)
    assert p.returncode == 2 and 'cannot be written' in err and 'Traceback' not in err, err
    assert {
        f.name: f.read_bytes() for f in checkpoint_files(run / 'checkpoints')
    } == there and not list(run.rglob('.*.partial'))
    assert cli.main(['train', *argv]) == 0
    as_if_never_stopped(run, whole)


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='permissions do not bind root')
def test_read_only(cohort, halfway, capsys):
    (halfway / 'checkpoints').chmod(0o500)
    try:
        refused(
            capsys,
            ['train', cohort / 'manifest.csv', halfway, *TRAIN, '--resume'],
            'cannot be written',
        )
    finally:
        (halfway / 'checkpoints').chmod(0o700)


def test_a_run_is_run_again(cohort, whole, tmp_path, capsys):
    assert cli.main(['train', whole / 'settings.toml', tmp_path / 'run']) == 0
    as_if_never_stopped(tmp_path / 'run', whole)
    text = (whole / 'settings.toml').read_text()
    (tmp_path / 's.toml').write_text(text.replace('optimizer', 'optimiser'))
    (tmp_path / 'e.toml').write_text(text.replace('seed = 0', 'seed = ""'))
    refused(capsys, ['train', tmp_path / 'e.toml', tmp_path / 'x'], 'e.toml', 'seed is empty')
    refused(
        capsys,
        ['train', tmp_path / 's.toml', tmp_path / 'x'],
        's.toml',
        'optimiser',
        'did you mean optimizer?',
    )
    assert not (tmp_path / 'x').exists()


def test_two_processes_go_on_with_one_run(cohort, whole, halfway):
    both = [process(cohort / 'manifest.csv', halfway, *TRAIN, '--resume') for _ in range(2)]
    said = [p.communicate(timeout=200)[1] for p in both]
    assert 0 in [p.returncode for p in both] and all(
        p.returncode == 0 or 'another process' in s for p, s in zip(both, said)
    ), said
    as_if_never_stopped(halfway, whole)
