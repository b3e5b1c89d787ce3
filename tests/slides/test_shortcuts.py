"Painted cohorts: neither darkness nor colour finds tumour, and no patch tells some labels."

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
from refusals import refusal
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from streaming_pathology.slides.shortcuts import tissue_places
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import (
    LABELS,
    NAMED_PATTERNS,
    SECOND,
    TUMOUR,
    CohortLook,
    Growth,
    paint_biopsy,
    plan_cohort,
    write_cohort,
)
from streaming_pathology.slides.tissue import optical_density

FEW = dict(n=4, size=(128, 256), spacing=4.0, progress=False)  # a cohort
SIZES = [((128, 256), 2.0), ((192, 384), 2.0), ((256, 512), 2.0), ((128, 256), 4.0)]


# ---- places


def test_places_are_means_over_their_tissue():
    rgb = np.full((64, 96, 3), 240, np.uint8)
    mask = np.zeros((64, 96), np.uint8)
    rgb[:32, :20], mask[:32, :20] = (10, 20, 30), 1
    mask[:32, 10:20] = TUMOUR
    rgb[32:, 64:], mask[32:, 64:] = (50, 60, 70), SECOND
    mask[32:, 32:40] = 2  # too little tissue
    places = tissue_places(rgb, mask, side=32)
    assert places.position.tolist() == [[0, 0], [32, 64]]
    np.testing.assert_allclose(places.color, [(10, 20, 30), (50, 60, 70)])
    np.testing.assert_allclose(places.tumour, [0.5, 1.0])
    expected = [-np.log10(np.array(color) / 245).mean() for color in places.color]
    np.testing.assert_allclose(places.density, expected, rtol=1e-5)


def test_places_need_an_image_and_its_mask():
    rgb, mask = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), np.uint8)
    assert 'one size' in refusal(tissue_places, rgb, mask[1:])
    assert 'at least 128' in refusal(tissue_places, rgb, mask, 128)
    assert 'side is 0' in refusal(tissue_places, rgb, mask, 0)


def place_aucs(biopsies, is_tumour, side=32):
    "AUC of density, red, green and blue over the places of biopsies."
    values, tumour = [], []
    for biopsy in biopsies:
        places = tissue_places(biopsy.image, biopsy.mask, side)
        values.append(np.column_stack([places.density, places.color]))
        tumour.append(is_tumour(biopsy, places))
    values, tumour = np.concatenate(values), np.concatenate(tumour)
    return np.array([roc_auc_score(tumour, column) for column in values.T])


def mostly_tumour(biopsy, places):
    return places.tumour >= 0.5


def painted(seeds, size, spacing, fraction=0.3, **options):
    return [paint_biopsy(size, spacing, fraction, seed, **options) for seed in seeds]


@pytest.mark.parametrize('first_seed', [0, 100])
@pytest.mark.parametrize('size, spacing', SIZES)
def test_darkness_and_colour_do_not_find_matched_tumour(size, spacing, first_seed):
    side = round(64 / spacing)
    seeds = range(first_seed, first_seed + 16)
    aucs = place_aucs(painted(seeds, size, spacing, look='matched'), mostly_tumour, side)
    assert 0.45 <= aucs[0] <= 0.6, aucs
    assert np.all((aucs[1:] > 0.4) & (aucs[1:] < 0.6)), aucs


@pytest.mark.parametrize('fraction', [0.1, 0.7])
def test_darkness_and_colour_do_not_find_little_or_much_tumour(fraction):
    aucs = place_aucs(
        painted(range(20), (128, 256), 4.0, fraction, look='matched'), mostly_tumour, 16
    )
    assert 0.45 <= aucs[0] <= 0.6, aucs
    assert np.all((aucs[1:] > 0.4) & (aucs[1:] < 0.6)), aucs


def test_darkness_finds_natural_tumour():
    aucs = place_aucs(painted(range(8), (192, 384), 2.0), mostly_tumour)
    assert aucs[0] > 0.7
    assert aucs[1] < 0.3


@pytest.mark.parametrize('growth', [dict(second_share=0.5), dict(ends=(0, 1))], ids=str)
def test_darkness_and_colour_do_not_tell_one_pattern_from_the_other(growth):
    def second(biopsy, places):
        "Of places that are tumour, which are of the second pattern."
        share = [
            (biopsy.mask[top : top + 32, left : left + 32] == SECOND).mean()
            for top, left in places.position
        ]
        return np.array(share) >= 0.3

    growth = Growth(NAMED_PATTERNS, **growth)
    biopsies = painted(range(12), (192, 384), 2.0, 0.5, look='matched', growth=growth)
    aucs = place_aucs(biopsies, second)
    assert np.all((aucs > 0.36) & (aucs < 0.64)), aucs


# ---- texture


def texture(biopsy, places, side):
    "Mean detail of each place, darker and brighter, in bands from 2 to 32 microns: (n, 20)."
    maps = []
    for density in np.moveaxis(optical_density(biopsy.image)[..., :2], -1, 0):
        scales = [density]
        for microns in (2, 4, 8, 16, 32):
            scales.append(gaussian_filter(density, microns / biopsy.spacing))
        for fine, coarse in pairwise(scales):
            maps += [np.maximum(fine - coarse, 0) ** 2, np.maximum(coarse - fine, 0) ** 2]
    squares = [
        [detail[top : top + side, left : left + side].mean() for detail in maps]
        for top, left in places.position
    ]
    return np.array(squares)


def told_by(features, target, slides):
    "AUC of a logistic regression over places, on slides that it was not fitted to."
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    options = dict(groups=slides, cv=GroupKFold(4), method='decision_function')
    return roc_auc_score(target, cross_val_predict(model, features, target, **options))


def measured(biopsies, side):
    "Means and texture of all places, their share of tumour, and the number of their slide."
    means, details, tumour, slides = [], [], [], []
    for number, biopsy in enumerate(biopsies):
        places = tissue_places(biopsy.image, biopsy.mask, side)
        means.append(np.column_stack([places.density, places.color]))
        details.append(texture(biopsy, places, side))
        tumour.append(places.tumour)
        slides.append(np.full(len(places), number))
    return [np.concatenate(each) for each in (means, details, tumour, slides)]


def test_texture_tells_matched_tumour_and_the_means_together_do_not():
    biopsies = painted(range(16), (192, 384), 2.0, 0.35, look='matched')
    means, details, tumour, slides = measured(biopsies, 32)
    assert told_by(means, tumour >= 0.5, slides) < 0.6
    assert told_by(details, tumour >= 0.5, slides) > 0.9


def test_texture_of_single_places_does_not_tell_the_label_two_patterns():
    "But it tells the label tumour."
    found = {}
    for label_means in ('two-patterns', 'tumour'):
        common = CohortLook((128, 256), 4.0, 'matched', None)
        rows = planned(label_means, n=32, areas=(0.4, 0.5))
        biopsies = [paint_biopsy(**common.biopsy(row)) for row in rows]
        _, details, tumour, slides = measured(biopsies, 16)
        label = np.array([row['label'] for row in rows])[slides]
        found[label_means] = told_by(details, label, slides)
    assert 0.4 < found['two-patterns'] < 0.6, found
    assert found['tumour'] > 0.65, found


# ---- growth


@pytest.mark.parametrize('ends', [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_patterns_lie_at_both_ends_far_apart(ends):
    biopsy = paint_biopsy((128, 320), 4.0, 0.4, 3, growth=Growth(NAMED_PATTERNS, ends=ends))
    tissue = np.count_nonzero(biopsy.mask)
    found = [np.count_nonzero(biopsy.mask == value) / tissue for value in (TUMOUR, SECOND)]
    expected = [0.2 * (2 - sum(ends)), 0.2 * sum(ends)]
    np.testing.assert_allclose(found, expected, atol=0.005)
    columns = np.flatnonzero((biopsy.mask >= TUMOUR).any(0))
    assert np.diff(columns).max() * 4.0 > 200  # microns without tumour between the ends


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_the_second_pattern_has_the_share_asked_for(share):
    growth = Growth(NAMED_PATTERNS, second_share=share)
    mask = paint_biopsy((128, 256), 4.0, 0.4, 5, growth=growth).mask
    tumour = np.count_nonzero(mask >= TUMOUR)
    assert np.count_nonzero(mask == SECOND) / tumour == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(look='dark'), "look 'dark'"),
        (dict(growth=Growth(('small', 'large'))), 'must be two of'),
        (dict(growth=Growth(ends=(0, 1))), 'give those'),
        (dict(growth=Growth(NAMED_PATTERNS, second_share=1.5)), 'between 0 and 1'),
        (dict(growth=Growth(NAMED_PATTERNS, 0.5, (0, 1))), 'one of the two'),
        (dict(growth=Growth(NAMED_PATTERNS, ends=(0, 2))), 'each 0 or 1'),
        (dict(growth=Growth(NAMED_PATTERNS, ends=(0, 1)), tumour_fraction=0.7), 'at most 0.6'),
        (dict(painted_at=0.7), 'whole number of times'),
        (dict(painted_at=3.0), 'whole number of times'),
        (dict(painted_at=0.0), 'whole number of times'),
        (dict(painted_at=float('nan')), 'whole number of times'),
        (dict(painted_at=0.05), 'between 0.1 and 20'),
    ],
)
def test_what_cannot_be_painted_is_refused(wrong, says):
    assert says in refusal(paint_biopsy, (128, 256), **wrong)


# ---- several spacings


def test_the_same_slide_at_several_spacings():
    options = dict(tumour_fraction=0.3, seed=4, look='matched', painted_at=1.0)
    options['growth'] = Growth(NAMED_PATTERNS, second_share=0.4)
    finest = paint_biopsy((224, 320), 1.0, **options)
    for factor in (2, 4):
        biopsy = paint_biopsy((224 // factor, 320 // factor), float(factor), **options)
        squares = finest.image.reshape(224 // factor, factor, 320 // factor, factor, 3)
        assert np.abs(squares.mean((1, 3)) - biopsy.image).max() <= 0.51
        middle = factor // 2
        np.testing.assert_array_equal(biopsy.mask, finest.mask[middle::factor, middle::factor])
        assert biopsy.spacing == factor


# ---- cohorts


def planned(label_means, n=40, seed=0, **options):
    areas = options.pop('areas', (0.2, 0.5))
    return plan_cohort(n, 0.5, areas, dict(train=0.5, test=0.5), seed, label_means, **options)


@pytest.mark.parametrize('label_means', LABELS)
def test_a_plan_is_a_function_of_the_seed(label_means):
    assert planned(label_means) == planned(label_means)
    assert planned(label_means) != planned(label_means, seed=1)


def test_slides_of_either_label_have_as_much_of_either_pattern():
    rows = planned('two-patterns')
    for split in ('train', 'test'):
        for label in (0, 1):
            of_label = [row for row in rows if (row['label'], row['split']) == (label, split)]
            ends = [row['growth'].ends for row in of_label]
            assert {sum(pair) == 1 for pair in ends} == {bool(label)}
            for end in (0, 1):  # at either end too
                assert sum(pair[end] for pair in ends) * 2 == len(ends)


@pytest.mark.parametrize('label_means', ['two-patterns', 'primary', 'share'])
def test_every_slide_has_tumour(label_means):
    rows = planned(label_means, areas=(0.05, 0.6))
    assert all(0.05 <= row['tumour_fraction'] <= 0.6 for row in rows)
    assert {row['label'] for row in rows} == {0, 1}


def test_primary_and_share_are_what_the_label_says():
    for row in planned('primary'):
        assert (row['second_share'] > 0.5) == row['label']
        assert abs(row['second_share'] - 0.5) >= 0.1
    for row in planned('share', areas=(0.05, 0.6), threshold=0.2):
        assert (row['tumour_fraction'] > 0.2) == row['label']


def test_the_total_of_tumour_does_not_tell_labels_about_patterns():
    for label_means in ('two-patterns', 'primary'):
        rows = planned(label_means, n=400, areas=(0.1, 0.6))
        labels, areas = ([row[name] for row in rows] for name in ('label', 'area'))
        assert 0.42 < roc_auc_score(labels, areas) < 0.58


def test_places_of_one_pattern_are_as_often_in_either_label():
    """Two patterns: pooled over slides, the number of places of each pattern is the same for both
    labels, so no ranking of single patches can tell them."""
    common = CohortLook((96, 256), 4.0, 'matched', None)
    shares = {0: np.zeros(2), 1: np.zeros(2)}
    for row in planned('two-patterns', n=16, areas=(0.4, 0.4)):
        mask = paint_biopsy(**common.biopsy(row)).mask
        counts = np.array([np.count_nonzero(mask == value) for value in (TUMOUR, SECOND)])
        shares[row['label']] += counts / np.count_nonzero(mask)
    np.testing.assert_allclose(shares[0], shares[1], atol=0.05)


@pytest.mark.parametrize('label_means', LABELS)
def test_a_cohort_on_disk_has_its_truth(label_means, tmp_path):
    options = dict(FEW, label_means=label_means, tumour_fractions=(0.1, 0.5))
    manifest = write_cohort(tmp_path / 'cohort', **options)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert ('second_share' in rows[0]) == (label_means in ('two-patterns', 'primary'))
    for row in rows:
        with Slide(manifest.parent / row['truth']) as slide:
            mask = slide.read(4.0)[..., 0]
        tissue, tumour = np.count_nonzero(mask), np.count_nonzero(mask >= TUMOUR)
        assert tumour / tissue == pytest.approx(float(row['tumour_fraction']), abs=0.005)
        second = float(row.get('second_share', 0)) * tumour
        assert np.count_nonzero(mask == SECOND) == pytest.approx(second, abs=0.02 * tumour + 1)
    assert write_cohort(tmp_path / 'cohort', **options) == manifest  # resumes


def test_a_cohort_of_a_former_version_resumes_with_its_look(tmp_path):
    manifest = write_cohort(tmp_path / 'cohort', **FEW, look='natural')
    note = manifest.parent / 'cohort.json'
    settings = json.loads(note.read_text())
    for name in ('look', 'painted_at', 'label_means', 'threshold'):
        del settings[name]
    note.write_text(json.dumps(settings))
    assert write_cohort(tmp_path / 'cohort', **FEW, look='natural') == manifest
    note.write_text(json.dumps(settings))
    assert 'other settings' in refusal(write_cohort, tmp_path / 'cohort', **FEW)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(look='dark'), "look 'dark'"),
        (dict(label_means='grade'), "label_means 'grade'"),
        (dict(label_means='two-patterns', tumour_fractions=(0.1, 0.7)), 'at most 0.6'),
        (dict(label_means='share', threshold=0.6), 'threshold 0.6'),
        (dict(label_means='share', threshold=0.05), 'threshold 0.05'),
        (dict(painted_at=3.0), 'whole number of times'),
    ],
)
def test_cohorts_that_cannot_be_painted_leave_no_folder(wrong, says, tmp_path):
    assert says in refusal(write_cohort, tmp_path / 'new', **FEW | wrong)
    assert not (tmp_path / 'new').exists()
