"Every part of the benchmark on images of a few pixels, without processes of their own."

import math
from pathlib import Path

import pytest
import torch
import torchvision

from streaming_pathology.bench import comparison, measure, networks, strips, trial, whole_slides
from streaming_pathology.bench.methods import shake

pytestmark = pytest.mark.usefixtures('small_resnet')


def quiet(*_):
    pass


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    "What runs in fresh processes runs here; lean memory would be for all tests."
    for module in (measure, strips, trial):
        monkeypatch.setattr(module, 'fresh', lambda function, *args: function(*args))
    for module in (measure, trial):
        monkeypatch.setattr(module, 'lean_memory', lambda: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_methods():
    nets = (('resnet18', 'layer1', None),)
    result = comparison.beside_plain(repeats=1, sizes=((64, 96),), nets=nets, peers=(), log=quiet)
    (found,) = result['comparisons']
    assert {*found['memory']} == {'plain', 'checkpoint', 'half', 'least'}
    assert [each['case']['size'] for each in result['growth']] == [[64, 96], [128, 192], [192, 288]]
    assert found['case']['layout'] == 'channels_last'
    assert found['cpu_to_plain']['half']['median'] > 0


def test_a_plain_network_that_fails_leaves_what_was_measured(monkeypatch):
    "Its memory may not be enough where that of streaming is."
    measured = dict(above=1, seconds=1.0, cpu=1.0)

    def peak_memory(way, case):
        return {'error': 'out of memory'} if way['method'] == 'plain' else dict(measured)

    monkeypatch.setattr(comparison, 'peak_memory', peak_memory)
    monkeypatch.setattr(measure, 'peak_memory', peak_memory)
    said = []
    case = measure.make_case('resnet18', 'layer1', (64, 96))
    ways = dict(plain=dict(method='plain'), streaming=dict(method='streaming', strip=32))
    found = comparison.compare(ways, case, 1, said.append)
    assert found['error'] == 'plain: out of memory' and 'to_plain' not in found
    assert list(found['seconds']) == ['streaming'] and 'plain: out of memory' in said[-1]
    nets = (('resnet18', 'layer1', (0,)),)
    result = comparison.beside_peer(
        repeats=1, sizes=((64, 64),), nets=nets, peer='checkpoint', patience=0, log=said.append
    )
    assert 'ratio' not in result['pairs'][0]
    assert 'plain: out of memory' in said[-1]


def test_budgets():
    "The plain network stands in for lightstream."
    nets = (('resnet18', 'layer1', (0,)),)
    result = comparison.beside_peer(
        repeats=1, sizes=((256, 256),), nets=nets, peer='plain', log=quiet
    )
    assert list(result['pairs'][0]['memory']) == ['plain', 'streaming']


def test_budgets_of_a_slow_peer():
    nets = (('resnet18', 'layer1', (0,)),)
    result = comparison.beside_peer(
        repeats=3, sizes=((64, 64),), nets=nets, peer='plain', patience=0, log=quiet
    )
    assert len(result['pairs'][0]['seconds']['plain']) == 1


def test_large():
    result = whole_slides.large(
        sizes=((96, 64), (64, 64)), strip=32, dtype='float32', arch='resnet18', log=quiet
    )
    assert [step['case']['size'] for step in result['steps']] == [[96, 64], [64, 64]]


def test_lean():
    result = whole_slides.beside_default(
        repeats=2, sizes=((128, 96),), strip=32, arch='resnet18', log=quiet
    )
    assert result['pairs'][0]['seconds']['median'] > 0


def test_gigapixel():
    (step,) = whole_slides.gigapixel(sizes=((160, 128),), log=quiet)['steps']
    assert step['seconds'] > step['reading'] > 0


def test_canvas():
    result = whole_slides.beside_dense(
        repeats=2, sizes=((128, 96),), memory='1GB', arch='resnet18', until='layer1', log=quiet
    )
    assert {*result['pairs'][0]['seconds']} == {'dense', 'canvas', 'upright', 'same strips'}


def test_ranges():
    result = whole_slides.beside_one_each(
        repeats=2, sizes=((128, 96),), strip=32, arch='resnet18', until='layer1', log=quiet
    )
    assert result['pairs'][0]['cpu']['median'] > 0


def test_ratio_to_the_sum():
    rounds = {
        'side by side': [{'cpu': 6.0}, {'cpu': 4.0}, {'cpu': 5.0}],
        'left one': [{'cpu': 2.0}, {'cpu': 3.0}, {'cpu': 2.0}],
        'right one': [{'cpu': 2.0}, {'cpu': 1.0}, {'cpu': 2.0}],
    }
    found = whole_slides.to_the_sum(rounds, 'cpu')
    assert (found['low'], found['median'], found['high']) == (1.0, 1.25, 1.5)


def test_strips(monkeypatch):
    few = dict(SHORT=1, LONG=2, PLAIN_SHORT=1, PLAIN_LONG=2, PLAIN_REPEATS=1)
    for name, value in few.items():
        monkeypatch.setattr(strips, name, value)
    result = strips.strip_costs(repeats=2, log=quiet)
    ways = ('plain', 'waiting', 'not waiting')
    names = {f'{way}, {layout}' for way in ways for layout in measure.LAYOUTS}
    assert {*result['per_strip']} == {*result['milliseconds']} == names


def test_milliseconds_of_a_strip(monkeypatch):
    "A step of 3 ms, and 0.5 ms for each row."

    def timed(step, x):
        return {'cpu': 0.003 + 0.0005 * x.shape[2]}

    monkeypatch.setattr(strips, 'timed', timed)
    short, long = torch.zeros(1, 3, 32, 8), torch.zeros(1, 3, 96, 8)
    way = strips.PerStrip(None, None, short, long, repeats=4)
    assert way.milliseconds(16) == pytest.approx(8)


def test_trial():
    result = trial.planned_or_tried(
        repeats=2, sizes=((128, 96),), arch='slim', until='layer1', log=quiet
    )
    for found in result['trials'][0]['budgets']:
        assert found['alive'] <= 1.15 * found['predicted'] and found['ratio']['median'] > 0


def test_the_first_stages_of_efficientnet_v2():
    net = torchvision.models.efficientnet_v2_s(num_classes=2).eval().features[:4].double()
    x = torch.randn(1, 3, 79, 67, dtype=torch.double)
    assert max(networks.exactness(shake(net), x, 32, ['rows']).values()) < 1e-9


def test_a_gradient_that_is_lost_is_seen(monkeypatch):
    net, x = torch.nn.Conv2d(3, 2, 3).double(), torch.randn(1, 3, 20, 20, dtype=torch.double)
    monkeypatch.setattr(networks, 'stream', lambda net, *_, **__: lambda x: net(x.detach()))
    assert networks.exactness(net, x) == {'output': 0.0, 'gradients': math.inf}


def test_every_network_of_torchvision_streams_or_is_refused_with_a_reason():
    "As committed."
    folder = Path(__file__).parents[2] / 'nbs/results'
    found = measure.read_result('networks', folder=folder)['networks']
    for each in found.values():
        for word in ('not known', 'not understood', 'traced'):
            assert word not in each.get('refused', '')
