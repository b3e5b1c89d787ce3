"Subgroups: how slides are sorted into them, and the metrics of each."

import json

import matplotlib
import numpy as np
import pytest

from streaming_pathology.core import InputError
from streaming_pathology.evaluation.auc import auc
from streaming_pathology.evaluation.subgroups import Subgroup, as_groups, by_group, plot_groups

matplotlib.use('Agg')


@pytest.fixture
def slides():
    "Labels, scores, and how much tumour there is, which is known of positive slides only."
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    burden = np.where(labels == 1, rng.random(300), np.nan)
    return labels, rng.normal(labels * (1.0 + 2 * np.nan_to_num(burden)), 1), burden


# ---- subgroups of a column


@pytest.mark.parametrize(
    ('values', 'names'),
    [
        (['b', 'a', None], ['a', 'b']),
        (['1000001', '1000002'], ['1000001', '1000002']),
        ([0.12345, 0.12346], ['0.12345', '0.12346']),
        (range(9), ['0 to 2', '3 to 5', '6 to 8']),
        ([1, 'x'], ['1', 'x']),
        (['007', '7', '7'], ['007', '7']),
        (['7', '7.0'], ['7']),
        ([], []),
    ],
)
def test_names_of_subgroups(values, names):
    assert as_groups(values)[1] == names


def test_equal_numbers_are_one_subgroup_and_missing_ones_none():
    of_slides, _ = as_groups([3, 3.0, '3', None, '', float('nan'), 5])
    assert of_slides == ['3', '3', '3', None, None, None, '5']
    assert as_groups([1] * 20) == (['1'] * 20, ['1'])


def test_thirds_are_of_one_size():
    of_slides, names = as_groups(range(9))
    assert [of_slides.count(name) for name in names] == [3, 3, 3]


def test_thirds_of_years_have_all_slides():
    of_slides, names = as_groups([str(year) for year in range(2008, 2018)] * 6)
    assert len(set(names)) == 3 and sum(of_slides.count(name) for name in names) == 60


# ---- their metrics


def test_subgroup_of_positive_slides_is_compared_with_all_negative_ones(slides):
    labels, scores, burden = slides
    subgroup = by_group(labels, scores, burden, 1.0)[0]
    inside = (labels == 1) & (burden <= np.nanquantile(burden, 1 / 3))
    compared = np.r_[scores[inside], scores[labels == 0]]
    assert abs(subgroup.auc.value - auc(np.repeat([1, 0], [inside.sum(), 150]), compared)) < 1e-12
    assert (subgroup.specificity, subgroup.n, subgroup.n_positive) == (None, 50, 50)
    assert subgroup.against_all


def test_subgroup_of_one_class():
    first, second = by_group([0, 1, 1], [0.1, 0.2, 0.3], ['a', 'a', 'b'], 0.25)
    assert (first.auc.value, first.sensitivity.value, first.specificity.value) == (1, 0, 1)
    assert (second.auc, second.sensitivity.value, second.specificity) == (None, 1, None)


def test_subgroups_in_json():
    for subgroup in by_group([0, 1, 1], [0.1, 0.2, 0.3], ['a', 'a', 'b'], 0.25, level=0.9):
        values = json.loads(json.dumps(subgroup.as_json()))
        assert [*values] == [
            'group',
            'n',
            'positives',
            'auc',
            'low',
            'high',
            'against',
            'sensitivity',
            'sensitivity_low',
            'sensitivity_high',
            'specificity',
            'specificity_low',
            'specificity_high',
        ]
        assert values['against'] == 'its own'
        again = Subgroup.from_json(values, 0.9)
        assert again.as_json() == values
        assert (again.name, again.against_all) == (subgroup.name, subgroup.against_all)


def test_no_subgroups():
    assert by_group([0, 1], [0, 1], [None, None], 1) == []


def test_values_and_patients_have_to_be_given_for_each_slide(slides):
    labels, scores, burden = slides
    with pytest.raises(InputError, match='1 values for 300'):
        by_group(labels, scores, [1], 0)
    with pytest.raises(InputError, match='1 patients for 300'):
        by_group(labels, scores, burden, 0, patient_ids=[1])


def test_subgroups_are_drawn_into_a_new_axis_or_the_one_given(slides):
    labels, scores, burden = slides
    subgroups = by_group(labels, scores, burden, 1.0)
    ax = plot_groups(subgroups)
    assert plot_groups(subgroups, ax, auc(labels, scores)) is ax
    assert [text.get_text() for text in ax.get_yticklabels()][0].endswith(' (50)')
