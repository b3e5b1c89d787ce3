"Settings for every test: one thread a worker, and a last word on the cells that were skipped."

import os
from unittest import mock

import pytest

# before anything imports torch: two workers share the cores, so neither may take them all
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'VIPS_CONCURRENCY'):
    os.environ.setdefault(name, '1')


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


def pytest_addoption(parser):
    parser.addoption(
        '--flags',
        default='',
        help="cells to run that are skipped otherwise, as nbdev_test has it: --flags 'slow cuda'",
    )


def pytest_terminal_summary(terminalreporter):
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
