"Slides over ranks: the gradients, weights and history of one process, whatever is drawn, lost or broken off."

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from forks import Forked
from forks import ranks as in_ranks
from resumed import rows as rows_but
from runs import quick
from small import COMMAND, command

from streaming_pathology.cli import commands as cli
from streaming_pathology.mil.aggregators import make_aggregator
from streaming_pathology.mil.bags import BagDataset, PatchGrid
from streaming_pathology.mil.features import Encoder, FeatureDataset, FeatureMIL
from streaming_pathology.mil.mil import InstanceMIL, TwoPhases
from streaming_pathology.slides.augment import Augmentation
from streaming_pathology.slides.cohorts import read_manifest, tiny_cohort
from streaming_pathology.slides.datasets import SlideDataset
from streaming_pathology.training.checkpoints import (
    checkpoint_files,
    load_checkpoint,
    save_checkpoint,
)
from streaming_pathology.training.distributed import Ranks
from streaming_pathology.training.loop import Alone, TinyNet, fit, predict, synth_slides
from streaming_pathology.training.recipes import Stage, run_recipe
from streaming_pathology.training.tasks import Binary, Multilabel, Survival

pytestmark = pytest.mark.usefixtures('small_resnet')


class Seen:
    "Callback: the slides of each epoch, and gradient and weights at each step."

    more = ()

    def before_fit(self, s):
        self.slides, self.all, step = [], [], s.optimizer.step

        def noted(*a, **k):
            self.all.append(torch.cat([p.grad.flatten() for p in s.model.parameters()]))
            return step(*a, **k)

        s.optimizer.step = noted

    def after_step(self, s):
        self.all.append(torch.cat([p.detach().flatten() for p in s.model.parameters()]))

    def after_epoch(self, s):
        self.slides.append([i for i, _ in s.losses])


class Net(TinyNet):  # with dropout, in float64
    def __init__(self, n_out=1):
        super().__init__(n_out)
        self.double()

    def forward(self, x):
        return self.head(
            torch.nn.functional.dropout(
                (self.conv(x.double() / 255 - 0.5)).relu().amax((2, 3)), 0.2, self.training
            )
        )

    def freeze_until(self, layer):
        self.conv.requires_grad_(layer is None)
        return self


class Moments(torch.nn.Module):  # a backbone
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def cases_of(folder):
    return [
        c
        for c in read_manifest(folder / 'manifest.csv')
        if c.split == 'train' and c.slide_id not in ('s00', 's03', 's09')
    ]  # two of five are positive: each epoch has three of both


def job(kind, folder, ranks, **more):  # what a training came to
    torch.manual_seed(0)
    seen, task, train = Seen(), Binary(), []
    if kind == 'oversampled':
        task, train = (
            Binary((1.0, 2.0)),
            SlideDataset(cases_of(folder), 4.0, augment=Augmentation(), seed=1),
        )
    if kind == 'survival':
        task, train = (
            Survival(),
            [
                i | dict(label=torch.tensor([3.0 + k % 4, k % 3 > 0]))
                for k, i in enumerate(synth_slides(7))
            ],
        )
    if kind == 'multilabel':
        task, train = (
            Multilabel(2),
            [
                i | dict(label=torch.tensor([float(k % 2), float('nan') if k == 4 else 1.0]))
                for k, i in enumerate(synth_slides(5))
            ],
        )
    net = Net(task.n_out)
    tuning = train[:3] if isinstance(train, list) else SlideDataset(cases_of(folder)[:3], 4.0)
    if kind == 'patches':
        task, train, tuning = (
            Binary(),
            BagDataset(cases_of(folder), 4.0, grid=PatchGrid(32), augment=Augmentation(), seed=1),
            BagDataset(cases_of(folder)[:3], 4.0, grid=PatchGrid(32)),
        )
        net, seen.more = InstanceMIL(net, 2, 3), [TwoPhases(train)]
    if kind == 'features':
        make = lambda cases, **more: FeatureDataset(
            cases,
            4.0,
            grid=PatchGrid(32),
            folder=folder / f'features_{ranks.size}',
            seed=1,
            views=2,
            **more,
        )
        task, train, tuning, net = (
            Binary(),
            make(cases_of(folder), augment=Augmentation()),
            make(cases_of(folder)[:3]),
            FeatureMIL(
                Encoder(Moments(), lambda x: x.float() / 255),
                make_aggregator('clam', 6, dropout=0.2).double(),
                batch=3,
            ),
        )
    history = fit(
        net,
        train,
        tuning,
        epochs=2,
        batch=3,
        lr=0.05,
        task=task,
        ranks=ranks,
        progress=False,
        callbacks=[seen, *seen.more, *more.pop('callbacks', [])],
        **more,
    )
    rows = predict(net, tuning, ranks=ranks, task=task, progress=False)
    return dict(
        steps=seen.all,
        slides=seen.slides,
        history=[{k: v for k, v in r.items() if k not in ('seconds', 'peak_mb')} for r in history],
        rows=[{k: v for k, v in r.items() if k != 'seconds'} for r in rows],
    )


def recipe(folder, ranks):
    torch.manual_seed(0)
    net = Net()
    history = run_recipe(
        net,
        synth_slides(7),
        synth_slides(4, 1),
        (Stage(2, 0.05, 'head', 'middle', batch=3), Stage(3, 0.02, batch=4)),
        folder / f'recipe_{ranks.size}',
        ranks=ranks,
        progress=False,
    )
    return dict(
        steps=[p.detach().flatten() for p in net.parameters()],
        slides=[],
        history=[{k: v for k, v in r.items() if k not in ('seconds', 'peak_mb')} for r in history],
        rows=[],
    )


KINDS = ('oversampled', 'survival', 'multilabel', 'patches', 'features')


def _rank(rank, ranks, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/meet_{ranks}', rank=rank, world_size=ranks
    )
    found = {k: job(k, folder, Ranks()) for k in KINDS}
    found['recipe'] = recipe(folder, Ranks())
    found['on'] = {
        k: job(k, folder, Ranks(), resume=load_checkpoint(folder / f'point_{k}.pt')) for k in KINDS
    }  # that one process left in the middle of an epoch
    fit(
        TinyNet(), synth_slides(2), epochs=1, batch=1, amp='fp16', ranks=Ranks(), progress=False
    )  # of which some have no slide in the first mini-batch
    torch.save(found, folder / f'{ranks}_{rank}.pt')
    dist.destroy_process_group()


def close(a, b, eps=1e-12):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and (a - b).abs().max().item() <= eps
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], eps) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(close(x, y, eps) for x, y in zip(a, b))
    return a == b or isinstance(a, float) and (abs(a - b) <= eps or a != a and b != b)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The folder of a small cohort, what one process comes to, and points that it left in the middle of its second epoch."
    folder = tmp_path_factory.mktemp('ranks')
    tiny_cohort(folder, n=14, size=(64, 64))
    found = {}

    class Leaves:
        def __init__(self, kind):
            self.path = folder / f'point_{kind}.pt'

        def at_rest(self, s):
            if (s.epoch, s.step) == (1, 3):
                save_checkpoint(self.path, **s.state_dict())

    for k in KINDS:
        found[k] = job(k, folder, Alone(), callbacks=[Leaves(k)])
        assert close(
            job(k, folder, Alone(), resume=load_checkpoint(folder / f'point_{k}.pt'))['history'],
            found[k]['history'],
            0,
        )
    return folder, found | dict(recipe=recipe(folder, Alone()))


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_train_as_one(alone, ranks):
    folder, want = alone
    in_ranks('test_ranks:_rank', ranks, folder)
    found = [torch.load(folder / f'{ranks}_{r}.pt', weights_only=False) for r in range(ranks)]
    for r, got in enumerate(found):
        for k in (*KINDS, 'recipe'):
            assert close(got[k], want[k]), (k, r)
        for k in KINDS:
            assert (
                got[k]['slides'] == want[k]['slides']
                and close(got['on'][k]['history'], want[k]['history'])
                and close(got['on'][k]['steps'][-1], want[k]['steps'][-1])
                and close(got['on'][k]['rows'], want[k]['rows'])
            ), (k, r)
    drawn = want['oversampled']['slides']
    positive = {c.slide_id for c in cases_of(folder) if c.label}
    assert (
        all(sum(i in positive for i in s) == sum(i not in positive for i in s) == 3 for s in drawn)
        and drawn[0] != drawn[1]
    )
    assert all(
        torch.equal(a, b)
        for k in KINDS
        for a, b in zip(found[0][k]['steps'], found[-1][k]['steps'])
    )


# the command

TRAIN = quick(3, 3, 1e-3, '--checkpoint-minutes', 0.003)


def free_port():
    "A port of this machine that nobody listens to."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def as_rank(rank, ranks, port, *argv):
    "A command with the environment that torchrun gives to a rank."
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR='localhost',
        MASTER_PORT=str(port),
    )
    return command(*argv)


def on_ranks(*argv, ranks=2):
    "Ranks of a command, forked, without torchrun, which is slow: their exit statuses, and what they printed."
    port = free_port()
    processes = [Forked('test_ranks:as_rank', rank, ranks, port, *argv) for rank in range(ranks)]
    said = ''.join(said_by(process, 200) for process in processes)
    return [process.returncode for process in processes], said


def torchrun(*argv, ranks=2, where=('--standalone',)):
    "Ranks of a command, each a new process; torchrun itself, which starts them, is forked."
    words = [*where, f'--nproc-per-node={ranks}', *COMMAND[1:], *argv]
    return Forked('torch.distributed.run:main', [str(word) for word in words])


def said_by(p, timeout):
    "What torchrun and its ranks printed, once they have ended."
    p.communicate(timeout)
    return p.text()


def rows(path):
    return rows_but(path, 'seconds', 'peak_mb', 'model')


def rank_process(p, rank):
    for c in psutil.Process(p.pid).children(recursive=True):
        try:
            if c.environ().get('RANK') == str(rank) and 'train' in c.cmdline():
                return c
        except psutil.Error:
            pass


@pytest.fixture(scope='module')
def on_two(once):
    "A cohort, a run of one process and one of two ranks."

    def make(folder):
        tiny_cohort(folder / 'cohort', size=(64, 64))
        assert cli.main(['train', folder / 'cohort/manifest.csv', folder / 'one', *TRAIN]) == 0
        argv = ['train', folder / 'cohort/manifest.csv', folder / 'two', *TRAIN]
        statuses, said = on_ranks(*argv)
        assert statuses == [0, 0], said
        assert said.count('report/index.html') == 1, said

    return once('on_two', make)


def test_the_command_on_ranks(on_two, tmp_path):
    one, two = (rows(on_two / n / 'log.csv') for n in ('one', 'two'))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert all(abs(float(a[k]) - float(b[k])) <= 1e-3 * abs(float(a[k])) for k in a), (a, b)
    one, two = (rows(on_two / n / 'predictions.csv') for n in ('one', 'two'))
    assert [r['slide_id'] for r in one] == [r['slide_id'] for r in two] and len(two) == 12
    assert (
        all(abs(float(a['probability']) - float(b['probability'])) < 1e-3 for a, b in zip(one, two))
        and (on_two / 'two/report/index.html').exists()
        and (on_two / 'two/metrics.json').exists()
    )
    model = on_two / 'two/checkpoints/best.pt'
    argv = ['predict', model, on_two / 'cohort/manifest.csv', tmp_path / 'p.csv']
    statuses, said = on_ranks(*argv)
    assert statuses == [0, 0] and said.count('wrote') == 1, said
    assert rows(tmp_path / 'p.csv') == rows(on_two / 'two/predictions.csv')


def test_what_is_refused_is_refused_by_all(on_two, tmp_path):
    statuses, said = on_ranks('train', on_two / 'cohort/none.csv', tmp_path / 'x', *TRAIN)
    assert (
        all(statuses)
        and 'cli.py' not in said
        and [
            l
            for l in said.splitlines()
            if l.startswith('error: rank 0: ') and 'none.csv does not exist' in l
        ]
    ), said


def died(agents, run, rank=1):
    "Kill a rank when two points are there; what the agents said, and the seconds that they still took."
    while any(p.poll() is None for p in agents) and len(checkpoint_files(run / 'checkpoints')) < 2:
        time.sleep(0.01)
    next(filter(None, (rank_process(p, rank) for p in agents))).kill()
    begun = time.monotonic()
    return [said_by(p, 200) for p in agents], time.monotonic() - begun


def test_a_rank_that_dies(on_two, tmp_path):
    "All end soon, and the one that died is named."
    p = torchrun('train', on_two / 'cohort/manifest.csv', tmp_path / 'run', *TRAIN)
    (said,), seconds = died([p], tmp_path / 'run')
    assert p.returncode and seconds < 60 and 'SIGKILL' in said and 'rank      : 1' in said, said


@pytest.mark.parametrize('machines', [1, 2])
def test_a_rank_that_is_started_again(on_two, tmp_path, machines):
    "Also on two machines, of which each counts its own starts: the run ends as if nothing had been."
    port = free_port()
    run, where = (
        tmp_path / 'run',
        ('--nnodes=2', '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}', '--rdzv-id=x')
        if machines == 2
        else ('--standalone',),
    )
    agents = [
        torchrun(
            'train',
            on_two / 'cohort/manifest.csv',
            run,
            *TRAIN,
            '--resume',
            ranks=2 // machines,
            where=(*where, '--max-restarts=2'),
        )
        for _ in range(machines)
    ]
    said, _ = died(agents, run)
    assert [p.returncode for p in agents] == [0] * machines and 'exitcode: -9' in ''.join(said), (
        said
    )
    for name in ('log.csv', 'predictions.csv'):
        assert rows(run / name) == rows(on_two / 'two' / name)
    a, b = (load_checkpoint(r / 'checkpoints/best.pt')['model'] for r in (run, on_two / 'two'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(run.rglob('.*'))


def test_ranks_are_asked_to_stop(on_two, tmp_path):
    "torchrun hands a signal on to its ranks: they leave a point and go."
    run = tmp_path / 'run'
    argv = ['train', on_two / 'cohort/manifest.csv', run, *TRAIN, '--resume']
    p = torchrun(*argv)
    while p.poll() is None and not checkpoint_files(run / 'checkpoints'):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    said = said_by(p, 100)
    assert p.returncode and 'continues' in said, said
    assert cli.main(argv) == 0  # on another number of ranks
    assert all(
        abs(float(a[k]) - float(b[k])) <= 1e-3 * abs(float(a[k]))
        for a, b in zip(rows(run / 'log.csv'), rows(on_two / 'two/log.csv'))
        for k in a
    )
