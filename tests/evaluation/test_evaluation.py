"Curves, thresholds, the metrics of a run and tables of predictions, beside scikit-learn."

import numpy as np
import pytest
from cohorts import cohorts
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from sklearn.metrics import average_precision_score, roc_curve

from streaming_pathology.evaluation.auc import Resampling, bootstrap_ci, draw_weights, percent
from streaming_pathology.evaluation.evaluation import (
    average_precision,
    evaluate,
    operating_point,
    patients_of,
    plot_pr,
    plot_roc,
    point_intervals,
    pr_band,
    read_patients,
    read_predictions,
    roc_band,
)


@pytest.fixture
def test_set():
    "Labels and scores, of as many slides as the paper's test set has."
    labels = np.r_[np.zeros(254), np.ones(281)]
    noise = np.random.default_rng(1).normal(0, 1.3, 535)
    return labels, 1 / (1 + np.exp(-(4 * labels - 2 + noise)))


# ---- curves


@settings(max_examples=20, deadline=None)
@given(cohorts)
def test_band_contains_no_impossible_curve(c):
    _, low, high = roc_band(*c, Resampling(50))
    assert (low <= high + 1e-12).all() and (low >= 0).all() and (high <= 1).all()
    assert low[-1] == high[-1] == 1


def test_roc_band(test_set):
    _, low, high = roc_band(*test_set, Resampling(200))
    assert (low <= high).all() and (np.diff(low) >= -1e-12).all() and low[-1] == high[-1] == 1
    _, low, _ = roc_band([0, 1], [0, 1], Resampling(5))  # perfect: the step is taken at once
    assert (low == np.ones(201)).all()


def test_roc_band_between_the_rates_of_a_resample(test_set):
    labels, scores = (values[240:270].round(1) for values in test_set)
    grid = np.r_[0.037, 0.211, 0.733]
    slow = []
    for weights in draw_weights(30, 50, np.random.default_rng(4)):
        fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
        slow.append(np.interp(grid, fpr, tpr))
    _, low, _ = roc_band(labels, scores, Resampling(50, seed=4), grid)
    assert np.allclose(low, np.quantile(slow, 0.025, axis=0), rtol=0, atol=1e-12)


def test_pr_band(test_set):
    _, low, high = pr_band(*test_set, Resampling(200))
    assert (low <= high).all() and (low >= 0).all() and (high <= 1).all()
    _, low, _ = pr_band([0, 1], [0, 1], Resampling(5))
    assert (low == np.ones(200)).all()


@pytest.mark.parametrize('band', [roc_band, pr_band])
def test_bands_need_a_resample(band):
    assert 'n is 0' in refusal(band, [0, 1], [0, 1], Resampling(0))


@pytest.mark.parametrize(('n', 'places'), [(40, 1), (300, 6)])
def test_average_precision_is_scikit_learns(n, places):
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 2, n)
    scores = rng.normal(labels, 1).round(places)
    found = average_precision(labels, scores, Resampling(300))
    assert abs(found.value - average_precision_score(labels, scores)) < 1e-12
    assert found.low < found.value < found.high
    slow = [
        average_precision_score(labels, scores, sample_weight=weights)
        for weights in draw_weights(n, 300, np.random.default_rng(0))
    ]
    expected = np.quantile(slow, [0.025, 0.975])
    assert np.allclose([found.low, found.high], expected, rtol=0, atol=1e-12)


def test_average_precision_of_one_class_is_drawn_again():
    assert average_precision([0, 1], [0, 1], Resampling(20)).redrawn > 0


def test_curves_are_drawn_into_a_new_axis_or_the_one_given(test_set):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    for plot in (plot_roc, plot_pr):
        ax = plot(*test_set, band=False)
        assert plot(*test_set, ax, label='other', band=False) is ax
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts[1] == f'other: {texts[0]}'
        plt.close(ax.figure)


# ---- thresholds


@settings(max_examples=40, deadline=None)
@given(cohorts)
def test_threshold_of_maximum_accuracy(c):
    y, s = c
    best = max(((s >= t) == y).mean() for t in [*s, s.max() + 1])
    point = operating_point(y, s)
    assert abs(point.accuracy - best) < 1e-12 and np.isfinite(point.threshold)
    n_right = point.sensitivity * y.sum() + point.specificity * (1 - y).sum()
    assert abs(point.accuracy * len(y) - n_right) < 1e-9


def test_threshold_above_every_slide():
    "Nothing beats calling all of them negative."
    point = operating_point([1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4])
    assert point.accuracy == 0.75 and point.sensitivity == 0 and 0.4 < point.threshold < 0.41


def test_threshold_is_the_lowest_of_two_that_are_as_good():
    "Whatever rounding says."
    scores = [0.7, 0.5, 0.1, 0.6, 0.3, 0, 0.8, 0.9, 0.2, 0.4]
    assert operating_point([1] * 5 + [0] * 5, scores).threshold == 0.1


@settings(max_examples=30, deadline=None)
@given(cohorts, st.floats(0.01, 1))
def test_threshold_of_a_wanted_sensitivity(c, min_sensitivity):
    y, s = c
    point = operating_point(y, s, min_sensitivity=min_sensitivity)
    assert point.sensitivity >= min_sensitivity - 1e-9
    for threshold in set(s):
        if threshold > point.threshold:
            assert ((s >= threshold)[y == 1]).mean() < min_sensitivity
    for share in point_intervals(y, s, point.threshold).values():
        assert 0 <= share.low <= share.high <= 1


def test_screening_threshold_is_the_highest(test_set):
    point = operating_point(*test_set, min_sensitivity=0.99)
    higher = operating_point(*test_set, np.nextafter(point.threshold, 1))
    assert point.sensitivity >= 0.99 > higher.sensitivity


def test_point_and_its_intervals_agree(test_set):
    point = operating_point(*test_set)
    for name, share in point_intervals(*test_set, point.threshold).items():
        assert share.value == getattr(point, name) and share.low <= share.value <= share.high


def test_impossible_sensitivities_are_refused(test_set):
    for bad in (0, 1.1):
        says = refusal(operating_point, *test_set, min_sensitivity=bad)
        assert 'above 0, up to 1' in says
    assert 'no threshold given' in refusal(operating_point, *test_set, 0.5, 0.9)


# ---- the metrics of a run


@settings(max_examples=30, deadline=None)
@given(cohorts, st.integers(0, 99))
def test_metrics_have_the_papers_interval(c, seed):
    resampling = Resampling(300, seed)
    assert evaluate(*c, resampling).bootstrap == bootstrap_ci(*c, resampling)


def test_metrics_are_repeatable(test_set):
    metrics = evaluate(*test_set, Resampling(500))
    assert metrics == evaluate(*test_set, Resampling(500))
    assert f'{percent(metrics.level)} interval {metrics.estimate.interval}' in str(metrics)


def test_metrics_name_patients_only_where_they_have_several_slides(test_set):
    alone = evaluate(*test_set, Resampling(50, patient_ids=range(535)))
    assert alone == evaluate(*test_set, Resampling(50)) and alone.patients is None
    metrics = evaluate(*test_set, Resampling(50, patient_ids=np.arange(535) // 5))
    assert metrics.patients == 107 and 'of 107 patients' in str(metrics)


def test_metrics_say_where_the_threshold_comes_from(test_set):
    resampling = Resampling(10)
    assert evaluate(*test_set, resampling, split='a').threshold_from == 'a'
    assert evaluate(*test_set, resampling, threshold=0.5).threshold_from == 'given'
    metrics = evaluate(*test_set, resampling, threshold=0.5, threshold_from='tuning')
    assert (metrics.threshold, metrics.threshold_from) == (0.5, 'tuning')


# ---- tables of predictions

HEAD = 'slide_id,label,split,probability,seconds\n'


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('', 'is empty'),
        (HEAD, 'has no rows'),
        ('slide_id,label,split\na,0,test\n', "no column 'probability'"),
        (HEAD + 'a,0,test,.1,\na,1,test,.1,\n', "'a' more than once"),
        (HEAD + 'a,x,test,.1,\n', "label 'x' is no number"),
        (HEAD + 'a,2,test,.1,\n', "label '2' has to be"),
        (HEAD + 'a,1,test,nan,\n', "probability 'nan' is no number"),
        (HEAD + 'a,1,test,1.5,\n', 'probability 1.5'),
        (HEAD + 'a,1,test\n', '3 values for 5 columns'),
        (HEAD + ',1,test,.1,\n', 'every row needs a slide_id'),
        (HEAD + 'a,1,test,.1,x\n', "seconds 'x' is no number"),
    ],
)
def test_mistakes_in_a_table_are_told_with_their_place(tmp_path, text, says):
    path = tmp_path / 'predictions.csv'
    path.write_text(text)
    found = refusal(read_predictions, path)
    assert says in found and str(path) in found


def test_a_file_that_is_no_table(tmp_path):
    path = tmp_path / 'predictions.csv'
    assert 'does not exist' in refusal(read_predictions, path)
    path.write_bytes(b'\xff\xfe\x00\x01')
    assert 'is not UTF-8 text' in refusal(read_predictions, path)


def test_patients_without_a_table():
    assert patients_of('ab', {}) is None


def test_patients_that_contradict_themselves(tmp_path):
    path = tmp_path / 'cohort.csv'
    path.write_text('slide_id,patient_id\na,1\na,1\n')
    assert read_patients(path) == {'a': '1'}
    path.write_text('slide_id,patient_id\na,1\na,2\n')
    assert "line 3: slide 'a' has the patient_id '2' here and '1' before" in refusal(
        read_patients, path
    )
