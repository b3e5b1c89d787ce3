"Properties of the evaluation over random labels and scores, ties included"

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from streaming_pathology.core import InputError
from streaming_pathology.evaluation.auc import (
    INTERVALS,
    auc,
    auc_interval,
    bootstrap_aucs,
    bootstrap_ci,
    delong_test,
    draw_weights,
    roc,
    weighted_auc,
)
from streaming_pathology.evaluation.evaluation import (
    evaluate,
    operating_point,
    point_intervals,
    roc_band,
)


def cohort(seed, n, levels):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    return y, rng.integers(0, levels, n) / levels


cohorts = st.builds(
    cohort, st.integers(0, 2**32 - 1), st.integers(2, 80), st.sampled_from([1, 2, 5, 50, 10**6])
)


@settings(max_examples=100, deadline=None)
@given(cohorts, st.integers(0, 2**32 - 1))
def test_weighted_auc_is_scikit_learns(c, seed):
    y, s = c
    w = draw_weights(len(y), 20, np.random.default_rng(seed))
    assert (w.sum(1) == len(y)).all()
    for row, a in zip(w, weighted_auc(y, s, w)):
        if len(set(y[row > 0])) < 2:
            assert np.isnan(a)
        else:
            assert abs(a - roc_auc_score(y, s, sample_weight=row)) < 1e-12


@settings(max_examples=60, deadline=None)
@given(cohorts)
def test_auc_is_the_share_of_pairs(c):
    y, s = c
    d = s[y == 1][:, None] - s[y == 0]
    assert abs(auc(y, s) - ((d > 0) + 0.5 * (d == 0)).mean()) < 1e-12
    assert abs(auc(y, s) + auc(1 - y, s) - 1) < 1e-12
    assert abs(auc(y, s) - auc(y, np.exp(3 * s) - 7)) < 1e-12
    assert abs(weighted_auc(y, s, np.ones((1, len(y))))[0] - auc(y, s)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(cohorts)
def test_threshold_of_maximum_accuracy(c):
    y, s = c
    best = max(((s >= t) == y).mean() for t in [*s, s.max() + 1])
    point = operating_point(y, s)
    assert abs(point.accuracy - best) < 1e-12 and np.isfinite(point.threshold)
    assert (
        abs(
            point.accuracy * len(y)
            - (point.sensitivity * y.sum() + point.specificity * (1 - y).sum())
        )
        < 1e-9
    )


@settings(max_examples=30, deadline=None)
@given(cohorts, st.integers(0, 99))
def test_interval(c, seed):
    y, s = c
    ci = bootstrap_ci(y, s, 300, seed)
    assert 0 <= ci.low <= ci.high <= 1 and ci == bootstrap_ci(y, s, 300, seed)
    wide = bootstrap_ci(y, s, 300, seed, level=0.99)
    assert wide.low <= ci.low and ci.high <= wide.high
    aucs, redrawn = bootstrap_aucs(y, s, 300, seed)
    assert len(aucs) == 300 and redrawn == ci.redrawn and not np.isnan(aucs).any()
    assert evaluate(y, s, n=300, seed=seed).bootstrap == ci


@settings(max_examples=20, deadline=None)
@given(cohorts)
def test_band_contains_no_impossible_curve(c):
    grid, low, high = roc_band(*c, n=50)
    assert (
        (low <= high + 1e-12).all()
        and (low >= 0).all()
        and (high <= 1).all()
        and low[-1] == high[-1] == 1
    )
    fpr, tpr, _ = roc(*c)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()


def test_ten_thousand_draws_are_one_sequence():
    "The first draws do not depend on how many follow"
    y, s = cohort(3, 535, 10**6)
    assert np.array_equal(bootstrap_aucs(y, s, 500)[0], bootstrap_aucs(y, s, 5000)[0][:500])


def test_delong_beside_another():
    "The difference and its error of MLstatkit, whose own code it is."
    other, rng = pytest.importorskip('MLstatkit').Delong_test, np.random.default_rng(0)
    for n, places in ((30, 1), (80, 9), (535, 2)):
        y = np.arange(n) % 3 == 0
        a, b = (rng.normal(y * k, 1).round(places) for k in (1.6, 1.2))
        z, p, (*_,), (*_,), auc_a, auc_b, more = other(y.astype(int), a, b)
        t = delong_test(y, a, b)
        assert (
            abs(t.a - auc_a) < 1e-10
            and abs(t.b - auc_b) < 1e-10
            and abs(t.difference / t.error + z) < 1e-10
            and abs(t.p - p) < 1e-10
            and abs(t.error**2 - more['var_diff']) < 1e-10
        )


@settings(max_examples=30, deadline=None)
@given(cohorts, st.sampled_from(sorted(INTERVALS)), st.integers(0, 99))
def test_every_interval_is_one(c, method, seed):
    y, s = c
    of = np.random.default_rng(seed).integers(0, max(2, len(y) // 3), len(y))
    for groups in (None, of):
        if groups is not None and len(set(of[y == 1]) | set(of[y == 0])) < 2:
            continue
        units = np.arange(len(y)) if groups is None else groups
        if method == 'delong' and min(len(set(units[y == k])) for k in (0, 1)) < 2:
            with pytest.raises(InputError, match='two of each'):
                auc_interval(y, s, method, groups=groups)
            continue
        ci = auc_interval(y, s, method, n=100, seed=seed, groups=groups)
        assert 0 <= ci.low <= ci.high <= 1 and ci == auc_interval(
            y, s, method, n=100, seed=seed, groups=groups
        ), ci
        if method in ('logit', 'delong'):
            assert (
                ci.low <= auc(y, s) <= ci.high
                or abs(auc(y, s) - ci.low) < 1e-9
                or abs(auc(y, s) - ci.high) < 1e-9
            )


@settings(max_examples=30, deadline=None)
@given(cohorts, st.floats(0.01, 1))
def test_threshold_of_a_wanted_sensitivity(c, least):
    y, s = c
    point = operating_point(y, s, least=least)
    assert point.sensitivity >= least - 1e-9 and all(
        ((s >= t)[y == 1]).mean() < least for t in set(s) if t > point.threshold
    )
    for low, high in point_intervals(y, s, point.threshold).values():
        assert 0 <= low <= high <= 1
