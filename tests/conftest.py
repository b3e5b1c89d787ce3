"Settings for every test: one thread a worker, and a last word on the cells that were skipped."

import multiprocessing
import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from fast import is_slow, slow_tests, write_slow_tests
from forks import Forked, processor_seconds

COLLECTED = pytest.StashKey[list]()
SECONDS = pytest.StashKey[float]()

# before anything imports torch: two workers share the cores, so neither may take them all
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VIPS_CONCURRENCY'):
    os.environ.setdefault(name, '1')


@pytest.fixture(scope='session', autouse=True)
def quick_workers():
    """Workers that read slides are forked from a process that has imported what they need, which
    takes seconds. Commands in processes of their own, as `Forked`, start theirs as for users."""
    forked = multiprocessing.get_context('forkserver')
    forked.set_forkserver_preload(['streaming_pathology.runs.runs'])
    with mock.patch.dict(multiprocessing.context._concrete_contexts, spawn=forked):
        yield


@pytest.fixture(scope='module')
def small_resnet():
    "resnet18 is a small one while the tests of a module run."
    import torchvision
    from small import Small

    with mock.patch.object(torchvision.models, 'resnet18', Small):
        yield


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "`once(name, make)` is a folder that the first worker who wants it makes, by `make(folder)`, and that nobody may change."
    from filelock import FileLock  # which torch needs

    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def folder(name, make):
        made = base / f'{name}.made'
        with FileLock(base / f'{name}.lock'):
            if not made.exists():
                make(base / name)
                made.touch()
        return base / name

    return folder


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(config, items):
    "Mark the tests that are not slow, for `pytest -m fast`."
    config.stash[COLLECTED] = list(items)
    slow = slow_tests()
    for item in items:
        if not is_slow(item.nodeid, slow):
            item.add_marker(pytest.mark.fast)


@pytest.fixture
def collected(request):
    "All tests of the suite, selected or not; skips where only some files were collected."
    items = request.config.stash[COLLECTED]
    there = {path.resolve() for path in Path(__file__).parent.rglob('test_*.py')}
    named = any('::' in str(arg) for arg in request.config.args)
    if named or there - {item.path.resolve() for item in items}:
        pytest.skip('only some files were collected')
    return items


def pytest_addoption(parser):
    parser.addoption(
        '--find-slow',
        type=float,
        metavar='SECONDS',
        help='write into tests/slow.txt which of the tests that are run take more of the processor',
    )
    parser.addoption(
        '--seconds', metavar='FILE', help='write the processor seconds of each test, longest first'
    )
    parser.addoption(
        '--flags',
        default='',
        help="cells to run that are skipped otherwise, as nbdev_test has it: --flags 'slow cuda'",
    )


def seconds_until_now():
    "What this worker and its processes took of the processor."
    return processor_seconds() + Forked.processor_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    "A test begins."
    item.config.stash[SECONDS] = seconds_until_now()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    "Note in a report what its part of the test took of the processor: that says more than the clock."
    report = yield
    before, item.config.stash[SECONDS] = item.config.stash[SECONDS], seconds_until_now()
    report.processor_seconds = item.config.stash[SECONDS] - before
    return report


def durations(terminalreporter):
    "Processor seconds that each test took, with what it set up."
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, 'processor_seconds'):
                seconds[report.nodeid] += report.processor_seconds
    return seconds


def pytest_terminal_summary(terminalreporter, config):
    "Find slow tests, if that was asked for, and name the notebooks with skipped cells."
    seconds = durations(terminalreporter)
    limit = config.getoption('find_slow')
    if limit:
        write_slow_tests(seconds, limit)
    if config.getoption('seconds'):
        table = [f'{taken:.2f},{test}\n' for test, taken in seconds.most_common()]
        Path(config.getoption('seconds')).write_text(''.join(table), encoding='utf-8')
    name_skipped_cells(terminalreporter)


def name_skipped_cells(terminalreporter):
    "Name the notebooks with skipped cells, and how many of which flag."
    skipped = sorted(
        {
            value
            for reports in terminalreporter.stats.values()
            for report in reports
            for name, value in getattr(report, 'user_properties', ())
            if name == 'skipped_cells'
        }
    )
    if skipped:
        terminalreporter.write_line('cells skipped (--flags runs them): ' + '; '.join(skipped))
