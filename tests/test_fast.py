"The fast tests, `pytest -m fast`, say something of every part of the package."

from fast import slow_tests
from notebooks import ROOT, notebooks

PACKAGE = ROOT / 'streaming_pathology'
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob('*/__init__.py'))


def folders_of(item):
    "The folders of the package that a test is of: by where it lies, or the notebook that it runs."
    yield item.path.parent.name
    path = getattr(item, 'callspec', None) and item.callspec.params.get('path')
    if path in notebooks() and item.name.startswith('test_notebook['):
        yield path.parent.name


def test_fast_tests_cover_every_folder(collected):
    fast = [item for item in collected if item.get_closest_marker('fast')]
    covered = {folder for item in fast for folder in folders_of(item)}
    assert covered >= set(FOLDERS)


def test_slow_tests_are_tests(collected):
    "A test that has gone or has another name leaves the list: pytest --find-slow 0.5 writes it anew."
    tests = {item.nodeid for item in collected}
    gone = slow_tests() - tests - {test.split('::')[0] for test in tests}
    assert not gone, f'in tests/slow.txt, but no test: {sorted(gone)}'
