"What counts as another output of a cell, and what does not"

import pytest
from notebooks import NBS, cells
from printed import MEASURED, difference


def stream(text, name='stdout'):
    return [dict(output_type='stream', name=name, text=text.splitlines(True))]


def result(**data):
    return [dict(output_type='execute_result', data=data)]


@pytest.mark.parametrize(
    'committed, now',
    [
        ('AUC 0.91', 'AUC 0.91'),
        ('loss 0.6959440', 'loss 0.6959443'),
        ('largest error 9e-16', 'largest error 2e-15'),
        ('[0.76 0.56]\n', '[0.76  0.56]'),
        ('<Net object>', '<Net object at 0x7f99ab34cd>'),
        ('model ab352453f170e16e; done', 'model 29d9f76414285a7a; done'),
        ('exported 2026-11-30 with', 'exported 2027-01-02 with'),
    ],
    ids=['equal', 'rounding', 'rounding error', 'spaces', 'address', 'weights', 'today'],
)
def test_same(committed, now):
    assert difference(stream(committed), stream(now)) == ''


@pytest.mark.parametrize(
    'committed, now',
    [
        ('AUC 0.91', 'AUC 0.92'),
        ('12 slides', '13 slides'),
        ('12 slides', '12 images'),
        ('measured 2026-11-30', 'measured 2026-12-01'),
        ('a 1', ''),
        ('', 'a 1'),
        ('error 1e-16', 'error 1e-3'),
    ],
)
def test_different(committed, now):
    found = difference(stream(committed), stream(now))
    assert f'-{committed}' in found
    assert f'+{now}' in found


def test_results_are_compared_and_pictures_are_not():
    table = {'text/markdown': ['|a|\n', '|1|'], 'text/plain': ['<Markdown object>']}
    assert difference(result(**table), result(**table)) == ''
    assert '-|1|' in difference(result(**table), result(**table | {'text/markdown': ['|a|\n|2|']}))
    before, after = {'image/png': 'x', 'text/plain': 'f'}, {'image/png': 'y', 'text/plain': 'f'}
    assert difference(result(**before), result(**after)) == ''


def test_warnings():
    warning = stream('UserWarning: overflow', 'stderr')
    assert 'overflow' in difference([], warning)
    assert 'committed' in difference(warning, [])
    assert 'overflow' in difference(warning, warning)


def test_progress_bars_are_left_out():
    bar = '\rslides:   0%|          | 0/3\rslides: 100%|██████████| 3/3 [00:01<00:00,  2.1it/s]\n'
    assert difference([], stream(bar, 'stderr')) == ''
    assert 'overflow' in difference([], stream(bar + 'overflow\n', 'stderr'))


@pytest.mark.parametrize('notebook, cell', MEASURED)
def test_exceptions_are_cells(notebook, cell):
    assert cell in [each['id'] for each in cells(NBS / f'{notebook}.ipynb')]
