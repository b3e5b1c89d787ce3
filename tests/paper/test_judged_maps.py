"Heatmaps with known truth: what is judged, when a map passes, and tables of several jobs."

import numpy as np
import pytest
from torch import nn

from streaming_pathology.paper.judged_maps import (
    MAP_COLUMNS,
    alike,
    joined_maps,
    judge,
    judge_maps,
    mean_interval,
    passes,
    rows_of_maps,
)
from streaming_pathology.paper.painted import SMALL_LABELS, Cohort, truth_of


def test_maps_are_judged_by_the_truth(tmp_path):
    cohort = Cohort(SMALL_LABELS, 'tumour', 8.0, 2)
    cases = [case for case in cohort.paint(tmp_path) if case.label][:3]

    class Told(nn.Linear):
        "Knows the truth with its own weights only."

    model = Told(1, 1)

    def draw(shown, number):
        truth = (truth_of(cases[number]) >= 3).reshape(12, 8, 12, 8).mean((1, 3))
        return truth if shown is model else np.arange(144.0).reshape(12, 12)

    found = judge_maps(model, draw, cases, truth_of, 8, 0)
    n = len(found['slides'])
    assert n >= 2 and found['trained']['pointing'] == n * [1.0]
    assert min(found['trained']['auprc']) > 0.99 > max(found['darkness']['auprc'])
    assert passes(found)
    same = found | dict(randomised=found['trained'], correlation=n * [1.0])
    assert not passes(same) and not passes(found | dict(correlation=n * [0.9]))


def test_a_flat_map_has_no_order():
    assert alike(np.ones(4), np.arange(4.0)) is None
    assert alike(np.arange(4.0), np.arange(4.0)) == pytest.approx(1)
    truth = np.array([True, False, False, False])
    assert judge(np.ones(4), truth) == dict(pointing=0.25, auprc=0.25)


def test_an_interval_of_a_mean():
    from scipy import stats

    values = np.array([0.1, 0.4, 0.2, 0.5])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose(mean_interval(values), (0.3, expected.low, expected.high))


def judged(auprc, name='a'):
    "Judged maps of a job, with the same values for each kind of map."
    n = len(auprc)
    of_map = dict(pointing=n * [1.0], auprc=list(auprc))
    kinds = dict.fromkeys(('trained', 'randomised', 'darkness', 'green'), of_map)
    slides = [f'{name}{number}' for number in range(n)]
    return dict(side=8, slides=slides, prevalence=n * [0.25], correlation=n * [None], **kinds)


def test_maps_of_several_jobs_are_those_of_one():
    joined = joined_maps([judged([0.1, 0.3]), judged([0.8], 'b')])
    assert joined['slides'] == ['a0', 'a1', 'b0']
    assert joined['trained'] == dict(pointing=[1.0] * 3, auprc=[0.1, 0.3, 0.8])
    assert joined['prevalence'] == [0.25] * 3
    assert joined_maps([joined]) == joined
    nothing = dict(side=8, slides=[], prevalence=[], correlation=[])
    assert joined_maps([joined, nothing]) == joined
    assert joined_maps([nothing])['slides'] == [] == joined_maps([])['slides']


def test_rows_of_a_table():
    maps = judged([0.1, 0.3])
    of_networks, of_baselines = rows_of_maps(dict(streaming=maps, mil=maps), ', 8 um')
    assert [row[0] for row in of_networks] == ['streaming, 8 um', 'mil, 8 um']
    names = ['darkness, 8 um', 'green, 8 um', 'prevalence, 8 um']
    assert [row[0] for row in of_baselines] == names
    assert all(len(row) == len(MAP_COLUMNS) for row in of_networks + of_baselines)
    assert of_networks[0][1:4] == [2, '100%', '0.20 (-1.07 to 1.47)']
    assert of_networks[0][4:] == ['0.20', 'none: it is flat', 'no']
    assert of_baselines[2][1:4] == [2, '–', '0.25']
    assert rows_of_maps({}) == ([], [])
