"The measurements of what comes before the network, each at a small size."

import numpy as np
import pytest
import torch
import torchvision

from streaming_pathology.bench import pipeline
from streaming_pathology.bench.processes import process_status
from streaming_pathology.mil.mil import InstanceMIL
from streaming_pathology.training.models import StreamingClassifier


def quiet(*_):
    "Logs nothing."


@pytest.fixture
def slow(request):
    "Tests in several processes, each of which takes seconds to start."
    if 'slow' not in request.config.getoption('flags').split():
        pytest.skip("--flags 'slow' runs it")


# ---- in one process


@pytest.fixture(scope='module')
def biopsy(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('biopsy') / 'biopsy.tiff')
    pipeline.large_biopsy(path, (300, 260))
    return path


@pytest.mark.parametrize('way', pipeline.WAYS.values(), ids=pipeline.WAYS)
def test_every_way_gives_an_image_of_the_size_asked_for(biopsy, way):
    assert sorted(way(biopsy, (300, 260), 0).shape) == [3, 260, 300]


@pytest.mark.parametrize('way', pipeline.WAYS.values(), ids=pipeline.WAYS)
def test_every_way_gives_the_same_for_a_seed(biopsy, way):
    first, again, other = (np.asarray(way(biopsy, (300, 260), seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_trimming_finds_the_biopsies():
    (run,) = pipeline.trimming(1, ((1500, 1500),), 2, (0,), quiet)['runs']
    assert run['failed'] == {}
    assert run['biopsies'] >= 2


def test_a_device_waits_for_a_part_of_an_epoch():
    (run,) = pipeline.loading(1, ((256, 256),), 2, (0.01,), (0,), quiet)['runs']
    assert 0 < run['waits'] < 1


def test_both_loops_see_the_same_patches():
    runs = pipeline.first_phase(1, ((192, 320),), 1, (0,), 64, log=quiet)['runs']
    assert [(run['way'], run.get('alone')) for run in runs] == [
        ('matrix product', None),
        ('ours', False),
        ('ours', True),
        ('plain', False),
        ('plain', True),
    ]
    assert len({run['patches'] for run in runs[1:]}) == 1


def test_the_plain_network_is_torchvisions_with_our_weights():
    ours = InstanceMIL(StreamingClassifier('resnet18')).eval()
    plain = pipeline.plain_network(ours, 'resnet18')
    assert isinstance(plain, torchvision.models.ResNet)
    assert torch.equal(plain.fc.weight, ours.network.head.fc.weight)


def test_memory_in_use_is_a_part_of_the_memory():
    now = pipeline.held()
    assert 0 < now['used'] < 2 * now['memory']
    assert now['files'] > 0


def test_status_of_this_process():
    now, most = (process_status(key) for key in ('VmRSS', 'VmHWM'))
    assert 0 < now <= most
    assert process_status('VmNone') is None


@pytest.mark.parametrize(
    ('found', 'hopeless'),
    [({'error': 'killed'}, True), ({'seconds': 301}, True), ({'seconds': 299}, False)],
)
def test_what_is_not_measured_again(found, hopeless):
    assert pipeline.is_hopeless(found) == hopeless


# ---- in processes of their own


def fail(queue):
    "Ends without an answer."
    raise SystemExit(3)


def test_a_process_that_ends_without_an_answer_is_told(slow):
    assert pipeline.fresh_process(fail) == {'error': 'the process ended with exit status 3'}


def test_every_way_is_measured(slow):
    (size,) = pipeline.beside_chain(1, ((300, 260),), quiet)['sizes']
    for rounds in size['rounds'].values():
        (found,) = rounds
        assert found['seconds'] > 0, found


def test_ranks_beside_one_process(slow):
    runs = pipeline.beside_one(1, ((64, 64),), 4, 2, quiet)['runs']
    assert [run['way'] for run in runs] == ['one', 'ranks', 'apart']


def test_a_long_run_leaves_nothing(slow):
    (run,) = pipeline.long_run(1, ((64, 96),), 10, (1,), 5, quiet)['runs']
    assert len(run['seen']) >= 2
    assert run['after']['files'] <= run['before']['files']
    assert not set(run['after']['processes']) - set(run['before']['processes'])
