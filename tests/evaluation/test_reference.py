"""Metrics of simulated slides beside values that R made: survival, pROC and formulas of the papers.

The values are in r/reference.csv; r/reference.R made them, of the tables that r/slides.py wrote."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from scipy.stats import CensoredData, ecdf

from streaming_pathology.evaluation.auc import Resampling, auc_interval
from streaming_pathology.evaluation.outcomes import kappa, macro_auc, survival_band
from streaming_pathology.evaluation.results import (
    figures_of,
    read_outcomes,
    results,
    survival_of_patients,
)
from streaming_pathology.io import read_table

matplotlib.use('Agg')

FOLDER = Path(__file__).parent / 'r'
SURVIVAL, CLASSES = FOLDER / 'survival.csv', FOLDER / 'classes.csv'


@pytest.fixture(scope='module')
def reference():
    "What R found: {name: value}."
    rows = read_table(FOLDER / 'reference.csv', ('name', 'value'))
    return {row['name']: float(row['value']) for row in rows if not row['name'].startswith('#')}


# ---- survival


@pytest.fixture(scope='module')
def survival():
    "The metrics of 40 patients with one to four slides each."
    return results(SURVIVAL, manifest=SURVIVAL, n_bootstrap=50)


def test_logrank_test_is_of_patients(reference, survival):
    assert survival['patients'] == reference['survival patients']
    assert survival['events'] == reference['survival events']
    assert survival['high_risk'] == reference['survival high']
    assert abs(survival['threshold'] - reference['survival threshold']) < 1e-12
    assert abs(survival['logrank_p'] - reference['survival p']) < 1e-9
    assert abs(survival['logrank_p'] - reference['survival p of slides']) > 0.001


def test_curve_is_of_patients(reference, survival):
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    figures_of(survival, SURVIVAL, SURVIVAL)['survival'](ax)
    times, shares = ax.lines[0].get_data()
    for time in (6, 12, 24):
        share = shares[times <= time][-1]
        assert abs(share - reference[f'survival high at {time}']) < 1e-9
    legend = ax.get_legend().get_texts()[0].get_text()
    assert legend.startswith(f'high risk, {survival["high_risk"]} of whom')
    plt.close(ax.figure)


def test_band_is_of_patients(reference, survival):
    patients = {row['slide_id']: row['patient_id'] for row in read_table(SURVIVAL, ())}
    times, events, risks = survival_of_patients(read_outcomes(SURVIVAL).of_split('test', patients))
    high = risks > survival['threshold']
    curve = ecdf(CensoredData.right_censored(times[high], events[high] == 0)).sf
    for name, limits in zip(('low', 'high'), survival_band(curve, 0.95), strict=True):
        for time in (6, 12, 24):
            limit = limits[np.r_[0, curve.quantiles] <= time][-1]
            assert abs(limit - reference[f'survival high {name} at {time}']) < 1e-9


# ---- intervals of an AUC


@pytest.mark.parametrize(
    'name, method, used',
    [
        ('plain', 'logit', 'logit'),
        ('plain', 'delong', 'delong'),
        ('clustered', 'logit', 'clustered_logit'),
        ('clustered', 'delong', 'clustered_delong'),
        ('separated', 'logit', 'newcombe'),
        ('one positive', 'logit', 'newcombe'),
        ('swapped', 'logit', 'logit'),
    ],
)
def test_intervals_are_called_by_the_method_that_made_them(reference, name, method, used):
    columns = ('set', 'label', 'score', 'patient_id')
    rows = [row for row in read_table(FOLDER / 'aucs.csv', columns) if row['set'] == name]
    labels = [int(row['label']) for row in rows]
    scores = [float(row['score']) for row in rows]
    resampling = Resampling(patient_ids=[row['patient_id'] for row in rows])
    found = auc_interval(labels, scores, method, resampling)
    limits = f'{name} delong' if method == 'delong' else name
    assert found.method == used
    assert abs(found.value - reference[f'{name} auc']) < 1e-12
    assert abs(found.low - reference[f'{limits} low']) < 1e-9
    assert abs(found.high - reference[f'{limits} high']) < 1e-9


# ---- classes without an order


def test_macro_auc_and_unweighted_kappa(reference):
    found = results(CLASSES, n_bootstrap=4000)
    assert abs(found['macro_auc'] - reference['classes macro auc']) < 1e-12
    assert abs(found['kappa'] - reference['classes kappa']) < 1e-12
    names = dict(low='macro auc low', high='macro auc high')
    names |= dict(kappa_low='kappa low', kappa_high='kappa high')
    for name, theirs in names.items():
        assert abs(found[name] - reference[f'classes {theirs}']) < 0.01


def test_quadratic_kappa_depends_on_numbers_and_the_unweighted_one_does_not(reference):
    outcomes = read_outcomes(CLASSES).of_split('test', {})
    labels, called = outcomes.labels[:, 0].astype(int), outcomes.predicted.argmax(1)
    renumbered, few = np.array([2, 0, 1, 3]), Resampling(10)
    before = kappa(labels, called, resampling=few).value
    after = kappa(renumbered[labels], renumbered[called], resampling=few).value
    assert abs(before - reference['classes quadratic kappa']) < 1e-12
    assert abs(after - reference['classes quadratic kappa renumbered']) < 1e-12
    assert abs(before - after) > 0.05
    unweighted = kappa(renumbered[labels], renumbered[called], 'none', resampling=few).value
    assert abs(unweighted - reference['classes kappa']) < 1e-12
    numbers = np.argsort(renumbered)
    area = macro_auc(renumbered[labels], outcomes.predicted[:, numbers], few).value
    assert abs(area - reference['classes macro auc']) < 1e-12
