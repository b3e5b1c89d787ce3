"The AUC, its intervals and the tests of two models, beside the formulas that they come from."

import json
import time

import numpy as np
import pytest
from cohorts import cohort, cohorts
from hypothesis import given, settings
from hypothesis import strategies as st
from notebooks import NBS
from refusals import refusal
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from streaming_pathology.evaluation.auc import (
    INTERVAL_NAMES,
    INTERVALS,
    Estimate,
    Resampling,
    accuracy_test,
    asked_interval,
    auc,
    auc_error,
    auc_interval,
    aucs_without_each,
    bootstrap_aucs,
    bootstrap_ci,
    check_scores,
    delong_test,
    difference_shown,
    draw_weights,
    newcombe_interval,
    paired_bootstrap,
    percent,
    permutation_test,
    placements,
    roc,
    share_interval,
    weighted_auc,
)


def limits(estimate):
    return [estimate.low, estimate.high]


@pytest.fixture
def two_models():
    "Labels, and the scores of two models, of 200 slides."
    rng = np.random.default_rng(11)
    positive = rng.permutation(np.arange(200) % 3 == 0)
    return positive, rng.normal(positive * 1.5, 1), rng.normal(positive, 1)


# ---- the input, the curve and its area


@pytest.mark.parametrize(
    ('labels', 'scores', 'says'),
    [
        ([0, 1], [0.5], '2 labels but 1 scores'),
        ([], [], 'no labelled slides'),
        ([0, 1], [0.5, float('nan')], 'score number 1 is nan'),
        ([1, 1], [0.1, 0.2], 'all 2 slides have label 1'),
        ([0, 2], [0.1, 0.2], 'label number 1 is 2'),
        ([0, None], [0.1, 0.2], 'label number 1 is nan'),
        (['benign', 1], [0.1, 0.2], 'have to be numbers'),
        ([[0, 1]], [[0.1, 0.2]], 'shapes'),
    ],
)
def test_scores_without_a_curve_are_refused(labels, scores, says):
    assert says in refusal(check_scores, labels, scores)


@settings(max_examples=60, deadline=None)
@given(cohorts)
def test_auc_is_the_share_of_pairs(c):
    y, s = c
    d = s[y == 1][:, None] - s[y == 0]
    assert abs(auc(y, s) - ((d > 0) + 0.5 * (d == 0)).mean()) < 1e-12
    assert abs(auc(y, s) + auc(1 - y, s) - 1) < 1e-12
    assert abs(auc(y, s) - auc(y, np.exp(3 * s) - 7)) < 1e-12
    assert abs(weighted_auc(y, s, np.ones((1, len(y))))[0] - auc(y, s)) < 1e-12


@settings(max_examples=20, deadline=None)
@given(cohorts)
def test_curve_never_falls(c):
    fpr, tpr, _ = roc(*c)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()


# ---- resamples


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


def test_ten_thousand_draws_are_one_sequence():
    "The first draws do not depend on how many follow."
    y, s = cohort(3, 535, 10**6)
    few, _ = bootstrap_aucs(y, s, Resampling(500))
    many, _ = bootstrap_aucs(y, s, Resampling(5000))
    assert np.array_equal(few, many[:500])


def test_stratified_resamples_have_both_classes():
    labels, scores = [0] * 19 + [1], np.arange(20)
    _, redrawn = bootstrap_aucs(labels, scores, Resampling(1000), stratified=True)
    assert redrawn == 0


def cpu_seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def test_ten_thousand_resamples_take_less_than_a_second():
    "Of a test set as large as the paper's."
    y, s = cohort(3, 535, 10**6)
    assert min(cpu_seconds(bootstrap_aucs, y, s) for _ in range(3)) < 1


def test_estimates_are_written_as_before():
    found = Estimate(0.5, 0.4, 0.6, 0.9, 'bca', 100, 3, 7)
    assert str(found) == '0.500 (0.400–0.600)' and found.interval == '0.400–0.600'
    assert list(found.as_json().items()) == [
        ('low', 0.4),
        ('high', 0.6),
        ('draws', 100),
        ('redrawn', 3),
        ('seed', 7),
        ('level', 0.9),
        ('method', 'bca'),
    ]


def test_patients_of_some_slides():
    resampling = Resampling(5, 1, 0.9, ['a', 'b', 'a', 'c'])
    some = resampling.of_slides(np.array([True, False, True, True]))
    assert some.patients(3).tolist() == [0, 0, 1]
    assert (some.n, some.seed, some.level) == (5, 1, 0.9)
    assert Resampling().of_slides(np.array([True, False])).patient_ids is None
    assert '4 patients for 2 slides' in refusal(resampling.of_slides, np.array([True, False]))


def test_patients_have_to_be_given_for_each_slide():
    for function in (auc_interval, bootstrap_aucs):
        says = refusal(function, [0, 1, 1], [1, 2, 3], resampling=Resampling(patient_ids=[1]))
        assert '1 patients for 3 slides' in says


def test_percent():
    assert [percent(level) for level in (0.95, 0.999, 0.975)] == ['95%', '99.9%', '97.5%']


# ---- the error by placements


def delongs_error(positive, *models):
    "DeLong's own formulas, pair by pair: the AUC, or the difference of two, and its error."
    pairs = [scores[positive][:, None] - scores[~positive] for scores in models]
    right = np.array([(pair > 0) + 0.5 * (pair == 0) for pair in pairs])
    covariance = np.cov(right.mean(2)) / right.shape[1] + np.cov(right.mean(1)) / right.shape[2]
    area = right.mean((1, 2))
    if len(models) == 1:
        return area[0], np.sqrt(covariance)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return area[0] - area[1], np.sqrt(variance)


def obuchowskis_error(positive, scores, patients):
    "His formulas, patient by patient."
    of_positive, of_negative = placements(positive, scores)
    area, every = of_positive.mean(), np.unique(patients)
    x = np.array([(of_positive[patients[positive] == u] - area).sum() for u in every])
    z = np.array([(of_negative[patients[~positive] == u] - area).sum() for u in every])
    ix, iz = len({*patients[positive]}), len({*patients[~positive]})
    m, n = positive.sum(), (~positive).sum()
    return np.sqrt(
        ix / ((ix - 1) * m) * (x**2).sum() / m
        + iz / ((iz - 1) * n) * (z**2).sum() / n
        + 2 / (m * n) * len(every) / (len(every) - 1) * (x * z).sum()
    )


@pytest.mark.parametrize('n', [7, 60, 200])
def test_error_is_delongs_and_obuchowskis(n):
    rng = np.random.default_rng(n)
    positive = rng.permutation(np.arange(n) % 3 == 0)
    scores = rng.normal(positive * 1.5, 1).round(n % 2)
    patients = np.unique(rng.integers(0, n // 3, n), return_inverse=True)[1]
    of_positive, of_negative = placements(positive, scores)
    error = auc_error(of_positive, of_negative, positive, np.arange(n))
    assert np.allclose([of_positive.mean(), error], delongs_error(positive, scores), atol=1e-12)
    if n > 7:
        clustered = auc_error(of_positive, of_negative, positive, patients)
        assert abs(clustered - obuchowskis_error(positive, scores, patients)) < 1e-12


def test_error_of_patients_is_that_of_a_simulation():
    "Of patients with four slides each, which are alike."
    rng = np.random.default_rng(0)
    patients = np.arange(120) // 4
    positive = patients % 2 == 1
    aucs, errors, ignoring = [], [], []
    for _ in range(400):
        scores = positive * 1.5 + rng.normal(0, 1, 30)[patients] + rng.normal(0, 0.5, 120)
        found = placements(positive, scores)
        aucs.append(found[0].mean())
        errors.append(auc_error(*found, positive, patients))
        ignoring.append(auc_error(*found, positive, np.arange(120)))
    assert 0.85 < np.mean(errors) / np.std(aucs) < 1.15
    assert np.std(aucs) > 1.4 * np.mean(ignoring)


def test_aucs_without_each_patient():
    rng = np.random.default_rng(0)
    positive = np.arange(30) % 2 == 1
    scores = rng.normal(positive, 1).round(1)
    patients = np.arange(30) % 8
    slow = [roc_auc_score(positive[patients != u], scores[patients != u]) for u in range(8)]
    assert np.allclose(aucs_without_each(positive, scores, patients), slow, atol=1e-12)


# ---- intervals


@settings(max_examples=30, deadline=None)
@given(cohorts, st.integers(0, 99))
def test_bootstrap_interval(c, seed):
    y, s = c
    ci = bootstrap_ci(y, s, Resampling(300, seed))
    assert 0 <= ci.low <= ci.high <= 1 and ci == bootstrap_ci(y, s, Resampling(300, seed))
    wide = bootstrap_ci(y, s, Resampling(300, seed, level=0.99))
    assert wide.low <= ci.low and ci.high <= wide.high
    aucs, redrawn = bootstrap_aucs(y, s, Resampling(300, seed))
    assert len(aucs) == 300 and redrawn == ci.redrawn and not np.isnan(aucs).any()


@settings(max_examples=30, deadline=None)
@given(cohorts, st.sampled_from(sorted(INTERVALS)), st.integers(0, 99))
def test_every_interval_is_one(c, method, seed):
    y, s = c
    of = np.random.default_rng(seed).integers(0, max(2, len(y) // 3), len(y))
    for patient_ids in (None, of):
        if patient_ids is not None and len(set(of)) < 2:
            continue
        units = np.arange(len(y)) if patient_ids is None else patient_ids
        resampling = Resampling(100, seed, patient_ids=patient_ids)
        if method == 'delong' and min(len(set(units[y == k])) for k in (0, 1)) < 2:
            assert 'two of each' in refusal(auc_interval, y, s, method, resampling)
            continue
        ci = auc_interval(y, s, method, resampling)
        assert 0 <= ci.low <= ci.high <= 1 and ci == auc_interval(y, s, method, resampling), ci
        if method in ('logit', 'delong'):
            assert ci.low - 1e-9 <= auc(y, s) <= ci.high + 1e-9


@pytest.mark.parametrize('method', INTERVALS)
def test_interval_of_slides_that_are_there_twice(method):
    """Every slide twice, of one patient: nothing is known better. Scores of another scale change
    nothing; other labels turn the interval round."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    scores = rng.normal(labels, 1).round(1)
    resampling = Resampling(2000)
    once = auc_interval(labels, scores, method, resampling)
    assert 0 <= once.low <= auc(labels, scores) <= once.high <= 1
    by_patient = Resampling(2000, patient_ids=np.arange(30).repeat(2))
    twice = auc_interval(labels.repeat(2), scores.repeat(2), method, by_patient)
    within = 1e-9 if method in ('logit', 'delong') else 0.03
    assert np.allclose(limits(once), limits(twice), rtol=0, atol=within)
    assert limits(once) == limits(auc_interval(labels, np.exp(scores), method, resampling))
    turned = auc_interval(1 - labels, scores, method, resampling)
    assert np.allclose(limits(turned), 1 - np.array(limits(once))[::-1], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ('labels', 'full'),
    [
        ([0] * 9 + [1] * 7, 'high'),
        ([1] * 9 + [0] * 7, 'low'),
        ([0] * 9 + [1], 'high'),
        ([0, 1], 'high'),
    ],
)
def test_interval_has_a_width_where_there_is_no_error(labels, full):
    "No pair in the wrong order, or none in the right one."
    found = auc_interval(labels, np.arange(len(labels)))
    assert getattr(found, full) == (full == 'high')
    assert 0.02 < found.high - found.low < 1


@pytest.mark.parametrize(
    ('labels', 'scores', 'patient_ids', 'method', 'used'),
    [
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], None, 'logit', 'logit'),
        ([0, 0, 0, 1, 1], [1, 2, 3, 4, 5], None, 'logit', 'newcombe'),
        ([0, 0, 0, 1, 1], [4, 5, 6, 2, 3], None, 'logit', 'newcombe'),
        ([0, 0, 0, 1, 1], [1, 1, 1, 1, 1], None, 'logit', 'newcombe'),
        ([0, 0, 0, 0, 1], [1, 2, 4, 5, 3], None, 'logit', 'newcombe'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], 'abcde', 'logit', 'logit'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], 'aabcd', 'logit', 'clustered_logit'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], 'aabcc', 'logit', 'clustered_newcombe'),
        ([0, 0, 0, 1, 1], [1, 2, 3, 4, 5], 'aabcd', 'logit', 'clustered_newcombe'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], None, 'delong', 'delong'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], 'aabcd', 'delong', 'clustered_delong'),
        ([0, 0, 0, 1, 1], [1, 2, 4, 3, 5], 'aabcd', 'bca', 'bca'),
    ],
)
def test_the_method_of_an_interval_is_the_one_that_was_used(
    labels, scores, patient_ids, method, used
):
    ids = None if patient_ids is None else [*patient_ids]
    found = auc_interval(labels, scores, method, Resampling(50, patient_ids=ids))
    assert found.method == used and used in INTERVAL_NAMES
    assert found.as_json()['method'] == used
    again = auc_interval(labels, scores, asked_interval(used), Resampling(50, patient_ids=ids))
    assert again == found


def test_shares_say_by_which_method_they_were_made():
    assert share_interval([1, 0, 1]).method == 'wilson'
    assert share_interval([1, 0, 1], patient_ids='abc').method == 'wilson'
    assert share_interval([1, 0, 1], patient_ids='aab').method == 'clustered_wilson'


def test_interval_of_one_patient():
    resampling = Resampling(patient_ids=[0] * 10)
    found = auc_interval([0, 1] * 5, np.arange(10), resampling=resampling)
    assert 0 < found.low < 0.2


def test_newcombes_interval_by_its_definition():
    low, high = newcombe_interval(0.8, 30, 40, 1.959964)
    assert low < 0.8 < high
    for limit in (low, high):
        spread = 1 + 34 * ((1 - limit) / (2 - limit) + limit / (1 + limit))
        error = np.sqrt(limit * (1 - limit) * spread / 1200)
        assert abs(abs(0.8 - limit) / error - 1.959964) < 1e-6


@pytest.mark.parametrize(
    ('method', 'options', 'says'),
    [
        ('wald', dict(), "'wald'"),
        ('logit', dict(level=1.0), 'level 1.0'),
        ('logit', dict(patient_ids=[1]), '1 patients'),
        ('bca', dict(n=0), '0 bootstrap resamples'),
    ],
)
def test_impossible_intervals_are_refused(method, options, says):
    def interval():
        return auc_interval([0, 1, 0, 1], [1, 2, 3, 4], method, Resampling(**options))

    assert says in refusal(interval)


def test_delongs_interval_needs_two_of_each():
    says = refusal(auc_interval, [0, 0, 1], [1, 2, 3], 'delong')
    assert 'slides that are positive: 1' in says


def test_coverage_that_was_measured():
    "The notebook says that `logit` is between 93% and 97% everywhere, of normal distributions."
    rows = json.loads((NBS / 'results' / 'coverage-cpu.json').read_text())['rows']
    assert all(row['sets'] >= 1000 for row in rows)
    of_logit = [
        row['coverage']
        for row in rows
        if (row['method'], row['kind'], row['each']) == ('logit', 'normal', 1)
    ]
    assert len(of_logit) == 6 and all(0.93 <= share <= 0.97 for share in of_logit)


# ---- shares


@pytest.mark.parametrize(('right', 'n'), [(0, 7), (3, 9), (40, 40), (500, 535)])
def test_interval_of_a_share_is_wilsons(right, n):
    found = share_interval([1] * right + [0] * (n - right))
    wilson = binomtest(right, n).proportion_ci(method='wilson')
    assert np.allclose(limits(found), [*wilson], rtol=0, atol=1e-9)
    assert found.value == right / n


def test_interval_of_a_share_with_patients():
    rng = np.random.default_rng(0)
    x = rng.random(200) < 0.8
    alone = limits(share_interval(x))
    of_patients = share_interval(x, patient_ids=np.arange(200))
    assert np.allclose(limits(of_patients), alone, rtol=0, atol=1e-12)
    thrice = share_interval(x.repeat(3), patient_ids=np.arange(200).repeat(3))
    assert np.allclose(limits(thrice), alone, rtol=0, atol=0.002)
    alike = share_interval([1] * 9, patient_ids='aaabbbccc')
    assert np.allclose(limits(alike), limits(share_interval([1] * 3)), rtol=0, atol=1e-12)
    one = share_interval([1, 0], patient_ids='aa')
    assert np.allclose(limits(one), limits(share_interval([0.5])), rtol=0, atol=1e-9)
    assert 'at least one' in refusal(share_interval, [])


def test_interval_of_a_share_holds_the_truth_as_often_as_it_says():
    "Of patients whose slides are alike."
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        right = (rng.random(40) < 0.8).repeat(3)
        found = share_interval(right, patient_ids=np.arange(40).repeat(3))
        held += found.low <= 0.8 <= found.high
    assert 0.91 < held / 600 < 0.99


# ---- two models


@pytest.mark.parametrize('n', [7, 60, 200])
def test_delongs_test_is_his(n):
    rng = np.random.default_rng(n)
    positive = rng.permutation(np.arange(n) % 3 == 0)
    a, b = (rng.normal(positive * shift, 1).round(n % 2) for shift in (1.5, 1.0))
    found = delong_test(positive, a, b)
    expected = delongs_error(positive, a, b)
    assert np.allclose([found.difference, found.error], expected, rtol=0, atol=1e-10)
    assert np.allclose([found.a, found.b], [auc(positive, a), auc(positive, b)], atol=1e-12)


def test_delong_beside_another():
    "The difference and its error of MLstatkit, whose own code it is."
    other, rng = pytest.importorskip('MLstatkit').Delong_test, np.random.default_rng(0)
    for n, places in ((30, 1), (80, 9), (535, 2)):
        y = np.arange(n) % 3 == 0
        a, b = (rng.normal(y * k, 1).round(places) for k in (1.6, 1.2))
        z, p, (*_,), (*_,), auc_a, auc_b, more = other(y.astype(int), a, b)
        t = delong_test(y, a, b)
        assert abs(t.a - auc_a) < 1e-10 and abs(t.b - auc_b) < 1e-10
        assert abs(t.difference / t.error + z) < 1e-10
        assert abs(t.p - p) < 1e-10
        assert abs(t.error**2 - more['var_diff']) < 1e-10


def test_delongs_test_where_nothing_varies(two_models):
    positive, a, b = two_models
    same = delong_test(positive, a, a)
    assert (same.difference, same.error, same.p) == (0.0, 0.0, 1.0)
    assert np.isnan(delong_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1]).p)
    thrice = [np.tile(values[:40], 3) for values in two_models]
    alike = delong_test(*thrice, patient_ids=np.repeat(range(3), 40))
    assert alike.error == 0 and np.isnan(alike.p)


def test_delongs_test_with_a_patient_for_each_slide(two_models):
    order = np.random.default_rng(0).permutation(200)
    alone = delong_test(*two_models)
    assert abs(delong_test(*two_models, patient_ids=order).error - alone.error) < 1e-12
    positive, a, b = two_models
    swapped = delong_test(positive, b, a)
    assert np.allclose((swapped.difference, swapped.p), (-alone.difference, alone.p))


def test_three_ways_to_say_the_same(two_models):
    test, paired = delong_test(*two_models), paired_bootstrap(*two_models)
    assert np.allclose(limits(paired), limits(test), rtol=0, atol=0.02)
    assert abs(paired.value - test.difference) < 1e-12
    assert abs(permutation_test(*two_models) - test.p) < 0.05


def test_paired_bootstrap_takes_less_than_20_seconds():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 535)
    pair = [rng.normal(labels * shift, 1) for shift in (2.0, 1.8)]
    assert cpu_seconds(paired_bootstrap, labels, *pair) < 20


def test_two_models_that_are_one(two_models):
    positive, a, _ = two_models
    assert limits(paired_bootstrap(positive, a, a)) == [0.0, 0.0]
    assert permutation_test(positive, a, a, 100) == 1.0


def test_two_models_on_slides_that_are_there_twice(two_models):
    "Every slide twice, of one patient: nothing is known better."
    patients = np.repeat(np.arange(200), 2)
    twice = [np.repeat(values, 2) for values in two_models]
    once = paired_bootstrap(*two_models)
    by_patient = paired_bootstrap(*twice, Resampling(patient_ids=patients))
    assert limits(by_patient) == limits(once)
    by_slide = paired_bootstrap(*twice)
    assert by_slide.high - by_slide.low < 0.8 * (by_patient.high - by_patient.low)
    p = permutation_test(*twice, patient_ids=patients)
    assert abs(p - permutation_test(*two_models)) < 0.02
    interval = bootstrap_ci(*twice[:2], Resampling(patient_ids=patients))
    assert np.allclose(limits(interval), limits(bootstrap_ci(*two_models[:2])), rtol=0, atol=0.005)


def test_p_is_small_as_often_as_it_says():
    "Where there is no difference, below .05 in about one of twenty."
    rng = np.random.default_rng(0)
    positive = np.arange(200) % 3 == 0
    low = []
    for seed in range(200):
        shared = rng.normal(positive * 1.5, 1)
        a, b = (shared + rng.normal(0, 0.7, 200) for _ in range(2))
        p = permutation_test(positive, a, b, 199, seed)
        low.append((delong_test(positive, a, b).p < 0.05, p <= 0.05))
    share = np.mean(low, axis=0)
    assert (share < 0.105).all() and (share > 0.005).all(), share


def test_accuracy_with_and_without_patients():
    right = np.random.default_rng(0).random((2, 40)) < 0.8
    by_patient = accuracy_test(*right, 20_000, patient_ids=np.arange(40))
    assert abs(by_patient - accuracy_test(*right)) < 0.02
    assert accuracy_test([1, 0], [1, 0]) == 1.0
    assert accuracy_test([1, 0], [1, 0], patient_ids=[0, 1]) == 1.0
    assert accuracy_test([1] * 6, [0] * 6) == 2 / 64
    assert accuracy_test([1] * 6, [0] * 6, patient_ids=[0] * 6) == 1.0


def test_impossible_accuracies_are_refused():
    assert 'same slides' in refusal(accuracy_test, [1, 0], [1])
    assert 'n_permutations is 0' in refusal(accuracy_test, [1, 1], [0, 1], 0, patient_ids=[0, 1])


@pytest.mark.parametrize('test', [delong_test, paired_bootstrap, permutation_test])
def test_impossible_pairs_are_refused(test):
    assert '4 labels but 3 scores' in refusal(test, [0, 1, 1, 0], [1, 2, 3, 4], [1, 2, 3])
    assert 'both classes' in refusal(test, [1, 1], [1, 2], [1, 2])


def test_delongs_test_needs_two_of_each(two_models):
    says = refusal(delong_test, [0, 1, 1], [1, 2, 3], [1, 2, 3])
    assert 'slides that are positive: 2, negative: 1' in says
    says = refusal(delong_test, [0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4], patient_ids='aabb')
    assert 'patients with slides that are positive: 1' in says
    assert '1 patients' in refusal(paired_bootstrap, *two_models, Resampling(patient_ids=[1]))


@pytest.mark.parametrize(
    ('low', 'high', 'says'),
    [
        (0.1, 0.2, 'streaming has the higher AUC'),
        (-0.2, -0.1, 'MIL has the higher AUC'),
        (-0.1, 0.1, 'No difference is shown'),
        (0, 0, 'No difference is shown'),
        (0.1, 0.1, 'has no width'),
    ],
)
def test_difference_in_words(low, high, says):
    assert says in difference_shown(('streaming', 'MIL'), low, high)
