"Two models on the same slides: what is found, and what is refused."

import numpy as np
import pytest
from refusals import refusal
from sides import toy_side

from streaming_pathology.evaluation.comparison import compare_sides, comparison_page


@pytest.fixture
def streaming():
    return toy_side('streaming', 1.2, seed=1)


@pytest.fixture
def mil():
    return toy_side('mil', 0.6, seed=2)


@pytest.fixture
def third():
    return toy_side('third', 1.0, seed=3)


def in_pairs(side):
    "Give a side a cohort in which slides 0 and 1, 2 and 3, ... are of one patient."
    side.patients = {f's{i:03}': f'p{i // 2}' for i in range(120)}


def test_the_better_of_two(streaming, mil):
    found = compare_sides(streaming, mil, n_bootstrap=2000)
    assert len(found.slides) == 80
    assert found.paired.low > 0
    assert 'streaming has the higher' in found.conclusion
    back = compare_sides(mil, streaming, n_bootstrap=2000)
    assert back.delong.difference == pytest.approx(-found.delong.difference)


def test_no_difference_of_equal_skill(streaming):
    other = toy_side('other', 1.2, seed=4)
    assert 'No difference' in compare_sides(streaming, other, n_bootstrap=500).conclusion


def test_accuracy_at_thresholds_of_the_validation_slides(streaming, mil):
    found = compare_sides(streaming, mil, n_bootstrap=100).at_thresholds
    right = []
    for side, threshold in zip((streaming, mil), found.thresholds):
        test = [each for each in side.predictions.values() if each.split == 'test']
        right.append(np.array([(each.probability >= threshold) == each.label for each in test]))
    assert found.accuracy == [right[0].mean(), right[1].mean()]
    assert found.only_right == [(right[0] > right[1]).sum(), (right[1] > right[0]).sum()]


def test_no_thresholds_without_validation_slides_of_both_classes(streaming, mil):
    for i in range(0, 40, 2):
        del mil.predictions[f's{i:03}']
    assert compare_sides(streaming, mil, n_bootstrap=100).at_thresholds is None


@pytest.mark.parametrize(
    ('splits', 'patients', 'says'),
    [
        ({('slide', 's100'): {'train'}}, {}, "slide 's100'"),
        ({('patient', 'p7'): {'tuning'}}, {'s101': 'p7'}, "patient 'p7'"),
    ],
)
def test_a_side_that_was_trained_on_the_slides_is_refused(streaming, third, splits, patients, says):
    third.splits, streaming.patients = splits, patients
    assert says in refusal(compare_sides, streaming, third)


@pytest.fixture
def linked(streaming, third):
    """Each cohort alone says nothing; both together say that s101 and s099 are of one patient, whom
    the third side was trained on."""
    streaming.patients = {'s101': 's101', 's099': 's099'}
    third.patients = {'s101': 'p7', 's099': 'p7'}
    third.splits = {('slide', 's101'): {'train'}}
    return streaming, third


def test_the_cohort_of_the_other_side_is_asked(linked, mil):
    _, third = linked
    assert "slide 's101'" in refusal(compare_sides, mil, third)


def test_patients_of_slides_without_prediction_count(linked):
    streaming, third = linked
    del third.predictions['s101']
    assert "slide 's101'" in refusal(compare_sides, streaming, third, shared=True)


def test_slides_of_a_patient_are_one(streaming, third):
    in_pairs(third)
    assert compare_sides(streaming, third, n_bootstrap=200).n_patients == 40


def test_patients_of_either_side_are_patients(streaming, third):
    in_pairs(third)
    streaming.patients = {slide_id: slide_id for slide_id in streaming.predictions}
    for pair in ((streaming, third), (third, streaming)):
        assert compare_sides(*pair, n_bootstrap=200).n_patients == 40


def test_the_page_names_the_methods_for_patients(streaming, third, tmp_path):
    in_pairs(third)
    sides = streaming, third
    page = comparison_page(compare_sides(*sides, n_bootstrap=200), sides, tmp_path)
    assert 'Obuchowski' in page
    assert 'McNemar' not in page
