"Calibration and temperature scaling, beside scikit-learn."

import matplotlib
import numpy as np
import pytest
from refusals import refusal
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from streaming_pathology.evaluation.auc import Resampling
from streaming_pathology.evaluation.calibration import (
    calibration,
    fit_temperature,
    plot_reliability,
    scaled_probabilities,
)

matplotlib.use('Agg')


def simulated(n, confidence=1.7):
    rng = np.random.default_rng(n)
    logits = rng.normal(0, 2, n)
    labels = rng.random(n) < 1 / (1 + np.exp(-logits))
    return labels, 1 / (1 + np.exp(-confidence * logits))


@pytest.mark.parametrize('n', [30, 535])
def test_bins_and_score_are_scikit_learns(n):
    labels, probabilities = simulated(n)
    found = calibration(labels, probabilities, 8, Resampling(200))
    observed, predicted = calibration_curve(labels, probabilities, n_bins=8)
    assert np.allclose([each['observed'] for each in found.bins], observed, rtol=0, atol=1e-12)
    assert np.allclose([each['predicted'] for each in found.bins], predicted, rtol=0, atol=1e-12)
    assert abs(found.brier.value - brier_score_loss(labels, probabilities)) < 1e-12
    assert found.brier.low < found.brier.value < found.brier.high
    assert sum(each['n'] for each in found.bins) == n
    assert all(each['low'] <= each['observed'] <= each['high'] for each in found.bins)


def test_calibration_of_perfect_and_of_useless_probabilities():
    found = calibration([0, 1], [0.0, 1.0], resampling=Resampling(10))
    assert (found.brier.value, found.ece) == (0.0, 0.0)
    assert [each['n'] for each in found.bins] == [1, 1]
    useless = calibration([0, 0, 1, 1], [0.5] * 4, resampling=Resampling(10))
    assert abs(useless.brier.value - 0.25) < 1e-12


def test_calibration_of_slides_that_are_there_twice():
    "Of one patient each: nothing is known better."
    labels, probabilities = simulated(535)
    once = calibration(labels, probabilities, resampling=Resampling(300))
    by_patient = Resampling(300, patient_ids=np.arange(535).repeat(2))
    twice = calibration(labels.repeat(2), probabilities.repeat(2), resampling=by_patient)
    limits = [(each.brier.low, each.brier.high) for each in (once, twice)]
    assert np.allclose(*limits, rtol=0, atol=1e-9)


def test_impossible_probabilities_are_refused():
    labels, probabilities = simulated(535)
    assert 'between 0 and 1' in refusal(calibration, labels, probabilities * 2)
    assert '535 labels but 534' in refusal(calibration, labels, probabilities[1:])
    assert 'both classes' in refusal(calibration, [1, 1], [0.2, 0.3])
    assert 'nan' in refusal(calibration, [0, 1], [np.nan, 0.2])
    assert '0 bins' in refusal(calibration, labels, probabilities, 0)


def test_reliability_is_drawn_into_a_new_axis_or_the_one_given():
    ax = plot_reliability(*simulated(100))
    assert plot_reliability(*simulated(100), ax, label='other') is ax
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[1] == f'other: {texts[0]}'


def test_temperature_is_that_of_the_least_loss():
    labels, probabilities = simulated(200, 2.5)
    temperature = fit_temperature(labels, probabilities)
    grid = np.exp(np.linspace(0.5, 1.5, 334))
    losses = [log_loss(labels, scaled_probabilities(probabilities, each)) for each in grid]
    assert abs(temperature - grid[np.argmin(losses)]) < 0.01


def test_scaling_keeps_the_order_of_slides():
    _, probabilities = simulated(535, 2.5)
    scaled = scaled_probabilities(probabilities, 2.5)
    order = np.argsort(probabilities, kind='stable')
    assert (np.argsort(scaled, kind='stable') == order).all()


def test_scaled_probabilities():
    same = scaled_probabilities([0.2, 0.5, 0.8], 1.0)
    assert np.allclose(same, [0.2, 0.5, 0.8], rtol=0, atol=1e-12)
    ends = scaled_probabilities([0.0, 1.0], 2.0)
    assert np.allclose(ends, [np.sqrt(1e-7), 1 - np.sqrt(1e-7)], rtol=0, atol=1e-6)


def test_impossible_temperatures_are_refused():
    assert 'right side' in refusal(fit_temperature, [0, 1], [0.1, 0.9])
    assert 'wrong more than' in refusal(fit_temperature, [0, 1], [0.9, 0.1])
    says = refusal(fit_temperature, [1, 0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8, 0.9])
    assert 'wrong more than' in says
    assert 'temperature 0' in refusal(scaled_probabilities, [0.5], 0)
