"Grades, classes and survival, beside scikit-learn, scipy and their definitions."

import matplotlib
import numpy as np
import pytest
from refusals import refusal
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from sklearn.metrics import confusion_matrix as confusion_of

from streaming_pathology.evaluation.auc import Resampling
from streaming_pathology.evaluation.outcomes import (
    class_aucs,
    concordance,
    confusion_matrix,
    kappa,
    logrank,
    macro_auc,
    plot_confusion,
    plot_survival,
    riskiest_slides,
)

matplotlib.use('Agg')


def limits(estimate):
    return [estimate.low, estimate.high]


# ---- agreement


@pytest.fixture
def grades():
    "Grades of 300 slides, and what they were called."
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    return labels, np.clip(labels + rng.normal(0, 0.8, 300).round().astype(int), 0, 5)


def test_confusion_matrix_is_scikit_learns(grades):
    assert (confusion_matrix(*grades, 6) == confusion_of(*grades)).all()


@pytest.mark.parametrize(
    ('weights', 'theirs'), [('quadratic', 'quadratic'), ('linear', 'linear'), ('none', None)]
)
def test_kappa_is_scikit_learns(grades, weights, theirs):
    found = kappa(*grades, weights, resampling=Resampling(10))
    assert abs(found.value - cohen_kappa_score(*grades, weights=theirs)) < 1e-12


def test_interval_of_kappa(grades):
    labels, predicted = grades
    slow = [
        cohen_kappa_score(labels[drawn], predicted[drawn], weights='quadratic')
        for drawn in np.random.default_rng(3).integers(0, 300, (200, 300))
    ]
    found = kappa(labels, predicted, resampling=Resampling(200, seed=3))
    assert np.allclose(limits(found), np.quantile(slow, [0.025, 0.975]), rtol=0, atol=1e-9)


def test_kappa_of_slides_that_are_there_twice(grades):
    "Of one patient each: nothing is known better."
    by_patient = Resampling(500, patient_ids=np.arange(300).repeat(2))
    twice = kappa(*(values.repeat(2) for values in grades), resampling=by_patient)
    once = kappa(*grades, resampling=Resampling(500))
    assert np.allclose(limits(twice), limits(once), rtol=0, atol=1e-9)


def test_resamples_without_kappa_are_drawn_again():
    assert kappa([0, 1], [0, 1], resampling=Resampling(50)).redrawn > 0


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (([0, 1], [0]), '(2,) labels but (1,)'),
        (([0, 0.5], [0, 1]), 'label number 1 is 0.5'),
        (([], []), 'no slides'),
        (([1, 1], [1, 1]), 'all 2 slides are of class 1'),
        (([0, 1], [0, 3], 'quadratic', 3), 'from 0 to 2'),
        (([0, np.nan], [0, 1]), 'nan'),
        (([0, 1], [1, 0], 'cubic'), "'cubic'"),
        ((['x', 1], [1, 0]), 'have to be numbers'),
    ],
)
def test_impossible_classes_are_refused(args, says):
    assert says in refusal(kappa, *args)


def test_confusion_is_drawn_into_a_new_axis_or_the_one_given(grades):
    ax = plot_confusion(*grades)
    assert plot_confusion(*grades, ax, names='abcdef') is ax
    assert [text.get_text() for text in ax.get_xticklabels()] == list('abcdef')


# ---- classes


def test_class_aucs_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 3, 300), rng.normal(0, 1, (300, 3))
    scores[np.arange(300), labels] += 1.5
    for number, found in enumerate(class_aucs(labels, scores)):
        assert abs(found.value - roc_auc_score(labels == number, scores[:, number])) < 1e-12


@pytest.fixture
def four_classes():
    "Labels of three classes, and probabilities of four, of 120 slides."
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 3, 120), rng.normal(0, 1, (120, 4))
    logits[np.arange(120), labels] += 1
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def mean_auc(labels, probabilities):
    return np.mean([roc_auc_score(labels == k, probabilities[:, k]) for k in np.unique(labels)])


def test_macro_auc_is_the_mean_of_classes_that_have_slides(four_classes):
    found = macro_auc(*four_classes, Resampling(10))
    assert abs(found.value - mean_auc(*four_classes)) < 1e-12


def test_interval_of_macro_auc(four_classes):
    labels, probabilities = four_classes
    slow = [
        mean_auc(labels[drawn], probabilities[drawn])
        for drawn in np.random.default_rng(3).integers(0, 120, (100, 120))
    ]
    found = macro_auc(labels, probabilities, Resampling(100, seed=3))
    assert np.allclose(limits(found), np.quantile(slow, [0.025, 0.975]), rtol=0, atol=1e-9)


def test_macro_auc_of_slides_that_are_there_twice(four_classes):
    labels, probabilities = four_classes
    by_patient = Resampling(200, patient_ids=np.arange(120).repeat(2))
    twice = macro_auc(labels.repeat(2), probabilities.repeat(2, axis=0), by_patient)
    once = macro_auc(labels, probabilities, Resampling(200))
    assert np.allclose(limits(twice), limits(once), rtol=0, atol=1e-9)


def test_rare_classes_do_not_count_in_resamples_without_them():
    "Of 25 classes with one slide each, hardly any resample has all."
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(25, int), np.arange(1, 26)]
    found = macro_auc(labels, rng.random((50, 26)), Resampling(100))
    assert found.low < found.value < found.high and found.redrawn == 0


def test_macro_auc_needs_two_classes():
    says = refusal(macro_auc, [1, 1], [[0.2, 0.8], [0.3, 0.7]])
    assert 'all 2 slides are of class 1' in says
    assert 'one row a slide' in refusal(macro_auc, [0, 1], [0.1, 0.2])


def test_impossible_probabilities_are_refused():
    assert 'one row a slide' in refusal(class_aucs, [0, 1], [0.1, 0.2])
    assert 'slide number 1 are not finite' in refusal(class_aucs, [0, 1], [[0, 1], [np.nan, 1]])


# ---- survival


def slow_concordance(times, events, risks):
    won = pairs = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            earlier = times[i] < times[j] or (times[i] == times[j] and not events[j])
            if events[i] and earlier:
                pairs += 1
                won += 1.0 if risks[i] > risks[j] else 0.5 * (risks[i] == risks[j])
    return won / pairs


def logrank_statistic(times, events, high):
    "By its definition."
    observed = variance = 0.0
    for time in np.unique(times[events]):
        at_risk, of_high = (times >= time).sum(), ((times >= time) & high).sum()
        n_events = ((times == time) & events).sum()
        share = of_high / at_risk
        observed += ((times == time) & events & high).sum() - n_events * share
        left = (at_risk - n_events) / max(at_risk - 1, 1)
        variance += n_events * share * (1 - share) * left
    return observed**2 / variance


@pytest.fixture
def patients():
    "Times, events and risks of 40 patients, with ties."
    rng = np.random.default_rng(0)
    return rng.integers(1, 9, 40), rng.random(40) < 0.6, rng.integers(0, 6, 40)


def test_concordance_by_its_definition(patients):
    times, events, risks = patients
    slow = slow_concordance(*patients)
    assert abs(concordance(*patients, Resampling(10)).value - slow) < 1e-6
    turned = concordance(times, events, -risks, Resampling(10))
    assert abs(turned.value - (1 - slow)) < 1e-6


def test_interval_of_concordance(patients):
    slow = [
        slow_concordance(*(values[drawn] for values in patients))
        for drawn in np.random.default_rng(2).integers(0, 40, (60, 40))
    ]
    found = concordance(*patients, Resampling(60, seed=2))
    assert np.allclose(limits(found), np.quantile(slow, [0.025, 0.975]), rtol=0, atol=1e-5)


def test_concordance_of_slides_that_are_there_twice(patients):
    by_patient = Resampling(200, patient_ids=np.arange(40).repeat(2))
    twice = concordance(*(values.repeat(2) for values in patients), by_patient)
    once = concordance(*patients, Resampling(200))
    assert np.allclose(limits(twice), limits(once), rtol=0, atol=1e-5)


def test_logrank_by_its_definition(patients):
    times, events, risks = patients
    high = risks > 2
    expected = stats.chi2.sf(logrank_statistic(times, events, high), 1)
    assert abs(logrank(times, events, high) - expected) < 1e-9


def test_the_slide_with_the_highest_risk_stands_for_its_patient():
    times, events = [3, 3, 5, 8, 8, 8], [1, 1, 0, 0, 0, 0]
    risks, patient_ids = [0.1, 0.4, 0.3, -2, -1, -3], ['a', 'a', 'b', 'c', 'c', 'c']
    assert riskiest_slides(times, events, risks, patient_ids).tolist() == [1, 2, 4]
    assert riskiest_slides(times, events, risks, None).tolist() == [0, 1, 2, 3, 4, 5]
    shuffled = [5, 3, 1, 0, 4, 2]
    parts = [[column[i] for i in shuffled] for column in (times, events, risks, patient_ids)]
    assert {shuffled[number] for number in riskiest_slides(*parts)} == {1, 2, 4}


def test_of_equal_risks_the_longest_time_counts():
    chosen = riskiest_slides([2, 7, 7, 5], [1, 0, 1, 1], [1, 1, 1, 0], ['a', 'a', 'a', 'a'])
    assert chosen.tolist() == [2]
    assert '1 patients for 2 slides' in refusal(riskiest_slides, [1, 2], [1, 0], [0, 0], ['a'])


def p_without_effect(rng, one_row_a_patient):
    "The p-value of 60 patients with five slides each, whose risks say nothing."
    patients = np.arange(60).repeat(5)
    times = rng.exponential(20, 60)[patients] + 0.1
    events = (rng.random(60) < 0.6)[patients]
    risks = rng.normal(0, 1, 60)[patients] + rng.normal(0, 0.7, 300)
    if one_row_a_patient:
        chosen = riskiest_slides(times, events, risks, patients)
        times, events, risks = times[chosen], events[chosen], risks[chosen]
        assert len(times) == 60
    return logrank(times, events, risks > np.median(risks))


@pytest.mark.parametrize('one_row_a_patient, low, high', [(True, 0.02, 0.085), (False, 0.2, 0.45)])
def test_logrank_finds_no_effect_where_there_is_none(one_row_a_patient, low, high):
    "In about one of twenty studies, and not in a third of them, as with every slide a row."
    rng = np.random.default_rng(0)
    p_values = np.array([p_without_effect(rng, one_row_a_patient) for _ in range(400)])
    assert low < (p_values < 0.05).mean() < high


def test_logrank_of_nothing(patients):
    times, events, risks = patients
    assert np.isnan(logrank(times, events, risks > 99))
    assert np.isnan(logrank(times, times < 0, risks > 2))
    assert 'give one for each' in refusal(logrank, [1, 2, 3], [1, 0, 0], [1, 0])


def changed(patients, which):
    times, events, risks = patients
    return {
        'one each of the same': (times[1:], events, risks),
        'time number 0 is 0': (times * 0, events, risks),
        'has to be 0 or 1': (times, events * 2, risks),
        'has to be finite': (times, events, risks * np.nan),
        'no pair': (times, events & False, risks),
        'have to be numbers': (['x'], [1], [1]),
    }[which]


@pytest.mark.parametrize(
    'says',
    [
        'one each of the same',
        'time number 0 is 0',
        'has to be 0 or 1',
        'has to be finite',
        'no pair',
        'have to be numbers',
    ],
)
def test_impossible_survival_is_refused(patients, says):
    assert says in refusal(concordance, *changed(patients, says))


def test_survival_is_drawn_where_one_group_is_empty(patients):
    times, events, _ = patients
    ax = plot_survival(times, events & (times < 5), np.ones(40))
    assert plot_survival(times, events, np.arange(40) % 2, ax) is ax
