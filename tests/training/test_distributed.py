"Processes that train together: what they exchange, how they meet, and one that dies"

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from forks import Forked
from trainings import complaint

from streaming_pathology.training.distributed import Ranks, joined, own_store
from streaming_pathology.training.loop import Alone


def torchrun(script, n_ranks, folder):
    "A finished torchrun of a script."
    path = folder / 'script.py'
    path.write_text(script)
    options = ['--standalone', f'--nproc-per-node={n_ranks}']
    done = Forked('torch.distributed.run:main', [*options, str(path)])
    done.wait(200)
    return done


AS_ONE_AND_DYING = """
import os
import time
import torch
from streaming_pathology.core import InputError
from streaming_pathology.training.distributed import joined
from streaming_pathology.training.loop import (
    Alone, Callback, TinyNet, fit, predict, synth_slides
)

torch.set_num_threads(1)
train, tuning = synth_slides(7), synth_slides(5, 1)
torch.manual_seed(0)
start = TinyNet().double().state_dict()


class Steps(Callback):
    def __init__(self):
        self.all = []

    def after_step(self, state):
        self.all.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))


def trained(ranks):
    torch.manual_seed(ranks.rank)  # the first rank's weights count
    model = TinyNet().double()
    if ranks.size == 1:
        model.load_state_dict(start)
    steps, options = Steps(), dict(epochs=3, lr=0.1, batch=3, progress=False)
    history = fit(model, train, tuning, ranks=ranks, callbacks=[steps], **options)
    rows = predict(model, tuning, ranks=ranks, progress=False)
    return steps.all, history, [row['slide_id'] for row in rows]


def as_one(ranks):
    steps, history, slides = trained(ranks)
    steps_of_one, history_of_one, slides_of_one = trained(Alone())
    for weights, weights_of_one in zip(steps, steps_of_one, strict=True):
        assert (weights - weights_of_one).abs().max() < 1e-12
    assert slides == slides_of_one
    for row, row_of_one in zip(history, history_of_one, strict=True):
        for name in ('train_loss', 'tuning_loss', 'tuning_auc'):
            assert abs(row[name] - row_of_one[name]) < 1e-12
    try:
        ranks.first(lambda: int('x'))
    except Exception as e:
        assert type(e).__name__ == ('ValueError' if ranks.rank == 0 else 'InputError'), e
    assert ranks.first(lambda: ranks.rank) == 0


class Dying(Callback):
    def after_epoch(self, state):
        if state.ranks.rank == 1:
            os._exit(9)


try:
    with joined() as (ranks, _):
        as_one(ranks)
        print('as one', flush=True)
        options = dict(epochs=3, batch=2, ranks=ranks, progress=False)
        fit(TinyNet(), synth_slides(4), callbacks=[Dying()], **options)
except InputError as e:
    print(e, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope='module')
def died(tmp_path_factory):
    "A torchrun of two ranks that train as one does, until one of them dies; the seconds it took."
    begun = time.perf_counter()
    done = torchrun(AS_ONE_AND_DYING, 2, tmp_path_factory.mktemp('ranks'))
    return done, time.perf_counter() - begun


def test_two_ranks_train_as_one(died):
    done, _ = died
    assert done.text().count('as one') == 2, done.text()[-3000:]


def test_no_process_group():
    assert 'torchrun' in complaint(Ranks)


def test_without_torchrun():
    with joined('cpu') as (ranks, device):
        assert (type(ranks), device) == (Alone, 'cpu')


def join():
    with joined():
        pass


TWO = dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_PORT='99999')
HERE = dict(MASTER_ADDR='localhost')


@pytest.mark.parametrize(
    'environment, said',
    [
        (dict(WORLD_SIZE='2'), 'WORLD_SIZE=2 and RANK='),
        (dict(WORLD_SIZE='two'), 'WORLD_SIZE=two'),
        (TWO, 'MASTER_ADDR='),
        (TWO | HERE, '65535'),
        (TWO | HERE | dict(RANK='2'), 'RANK=2'),
    ],
    ids=['alone', 'no number', 'no address', 'no port', 'no such rank'],
)
def test_an_environment_that_is_not_torchruns(environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in complaint(join)


def test_an_empty_world_size(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '')
    join()


def test_those_who_meet_are_of_one_start():
    "Whatever former ones left in the store; of the next start one dies while the others wait."
    store = dist.HashStore()

    def meet(rank, patience=20):
        time.sleep(0.1 * rank)  # so the first ones see what those that are gone have left
        return own_store(store, rank, 3, patience)

    def wait_in_vain(rank):
        with pytest.raises(RuntimeError, match='in 0.3 s'):
            meet(rank, 0.3)

    with ThreadPoolExecutor(3) as pool:
        for start in range(3):
            stores = list(pool.map(meet, range(3)))
            assert not any(own.check(['address']) for own in stores)
            stores[start].set('address', 'mine')
            assert all(own.check(['address']) for own in stores)
            list(pool.map(wait_in_vain, (0, 2)))


def test_a_rank_that_dies_is_noticed(died):
    done, seconds = died
    assert done.returncode
    assert seconds < 60
    assert re.search(r'exitcode\s*: 9', done.text('err')), done.text()[-3000:]


ON_A_GPU = """
import torch
import torch.distributed as dist
from streaming_pathology.training.distributed import Ranks
from streaming_pathology.training.loop import Alone, TinyNet, fit, predict, synth_slides

torch.cuda.set_device(0)
dist.init_process_group('BACKEND')
ranks = Ranks()
train, tuning = synth_slides(7), synth_slides(5, 1)


def trained(ranks):
    torch.manual_seed(0)
    model = TinyNet().double().cuda()
    options = dict(device='cuda', ranks=ranks, progress=False)
    fit(model, train, tuning, epochs=2, lr=0.1, batch=3, **options)
    return [*model.parameters()], [row['slide_id'] for row in predict(model, tuning, **options)]


(params, slides), (params_of_one, slides_of_one) = trained(ranks), trained(Alone())
for param, param_of_one in zip(params, params_of_one, strict=True):
    assert (param - param_of_one).abs().max() < 1e-12
assert slides == slides_of_one
assert ranks.first(lambda: ranks.rank) == 0
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('backend, n_ranks', [('nccl', 1), ('gloo', 2)])
def test_ranks_on_a_gpu(backend, n_ranks, tmp_path):
    "NCCL does not put two ranks on one device; gloo does."
    done = torchrun(ON_A_GPU.replace('BACKEND', backend), n_ranks, tmp_path)
    assert done.returncode == 0, done.text()[-3000:]
