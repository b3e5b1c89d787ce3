"Mosaics: what is planted is known, splits stay apart, and planting itself tells nothing."

from dataclasses import replace

import numpy as np
import pytest
from refusals import refusal

from streaming_pathology.evaluation.auc import auc
from streaming_pathology.paper.data import WHITE, paint_stand_in, prepare, read_image, split_of
from streaming_pathology.paper.mosaics import (
    MosaicRunner,
    mapped_mosaics,
    mosaic_split,
    mosaics_of,
    nearest,
    plant,
    tissue_tiles,
    tumour_mask,
    write_png,
)
from streaming_pathology.paper.plan import SMALL_MOSAICS, Job
from streaming_pathology.paper.runner import estimate, read_job_result
from streaming_pathology.slides.cohorts import Case, read_manifest
from streaming_pathology.slides.shortcuts import tissue_places

PLAN = replace(SMALL_MOSAICS, size=64, patch=32, frozen_epochs=1, views=1)
JOB = Job('streaming', 0, 0, size=64)


def canvas(colour, tiles, tile=4, side=8):
    "A white canvas of tiles, of which some have a colour."
    rgb = np.full((side * tile, side * tile, 3), 255, np.uint8)
    for row, column in tiles:
        rgb[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] = colour
    return rgb


ROWS = [(row, column) for row in (1, 2, 5) for column in range(2, 8)]  # 18 tiles
BASE, DONOR = canvas((200, 90, 160), ROWS), canvas((120, 40, 90), ROWS[:7])


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mosaics')
    source = paint_stand_in(folder / 'painted', (8, 4, 2), size=128)
    return read_manifest(prepare(source, folder / 'reduced', 64))


@pytest.fixture(scope='module')
def mosaics(cases, tmp_path_factory):
    return mosaic_split(split_of(cases, PLAN, JOB), PLAN, JOB, tmp_path_factory.mktemp('m'))


# ---- planting


@pytest.mark.parametrize('share, n', [(0.01, 1), (0.25, 4), (0.5, 9), (1.0, 18)])
def test_the_share_is_planted_and_the_rest_stays(share, n):
    image, planted = plant(BASE, DONOR, share, 4, np.random.default_rng(1))
    pixels = planted.repeat(4, 0).repeat(4, 1)
    assert planted.sum() == n
    assert (image[pixels] == (120, 40, 90)).all()
    assert (image[~pixels] == BASE[~pixels]).all()
    assert {tuple(place) for place in np.argwhere(planted)} <= set(ROWS)


def test_what_is_planted_lies_together():
    _, planted = plant(BASE, DONOR, 3 / 18, 4, np.random.default_rng(2))
    places = np.argwhere(planted)
    assert abs(places - places.mean(0)).max() <= 2
    tiles = tissue_tiles(BASE, 4)
    found = nearest(tiles, 18, np.random.default_rng(0))
    assert len({tuple(tile) for tile in found}) == 18
    assert len(nearest(tiles[:5], 12, np.random.default_rng(0))) == 12


def test_tiles_are_tissue_where_half_is_not_white():
    rgb = canvas((100, 100, 100), [(0, 0)])
    rgb[0:4, 8:10] = 50  # half of a tile
    rgb[0:4, 16:17] = 50  # a quarter
    assert tissue_tiles(rgb, 4).tolist() == [[0, 0], [0, 2]]


def test_what_cannot_be_planted():
    rng = np.random.default_rng(0)
    assert 'a share of 0' in refusal(plant, BASE, DONOR, 0, 4, rng)
    white = np.full_like(BASE, 255)
    assert 'need a tile of tissue' in refusal(plant, BASE, white, 0.5, 4, rng)
    assert 'need a tile of tissue' in refusal(plant, white, BASE, 0.5, 4, rng)


# ---- splits


def test_no_slide_is_in_two_splits(cases, tmp_path, monkeypatch):
    "Nor as a base, nor as a donor: every file that is read for a part is of that part."
    split = split_of(cases, PLAN, JOB)
    for name, part in split.parts.items():
        read = []

        def recorded(path, read=read):
            read.append(path)
            return read_image(path)

        monkeypatch.setattr('streaming_pathology.paper.mosaics.read_image', recorded)
        mosaics_of(part, name, PLAN, JOB, tmp_path / name)
        assert read and set(read) <= {case.path for case in part}


def test_each_base_has_one_mosaic_of_each_class_and_share(mosaics, cases):
    labels = {case.slide_id: case.label for case in cases}
    by_base = {}
    for case in mosaics.test:
        by_base.setdefault(case.patient_id, []).append((case.grade, case.label))
    wanted = sorted((f'{share:g}', label) for share in PLAN.planted for label in (0, 1))
    assert all(sorted(pairs) == wanted for pairs in by_base.values())
    assert not any(labels[base] for base in by_base)
    of_training = [case.grade for case in mosaics.train if case.label]
    assert set(of_training) == {'0.1', '0.5'}


def test_truth_is_where_tumour_was_planted(mosaics, cases):
    paths = {case.slide_id: case.path for case in cases}
    for case in mosaics.test:
        truth = read_image(case.annotation)[..., 0]
        base, image = read_image(paths[case.patient_id]), read_image(case.path)
        assert truth.shape == image.shape[:2]
        assert (truth.any()) == bool(case.label)
        changed = (image != base).any(2)
        assert changed.any()  # in both classes
        if case.label:
            assert not changed[truth == 0].any()


def test_both_classes_have_the_same_number_of_planted_tiles(mosaics, cases):
    paths = {case.slide_id: case.path for case in cases}
    counts = {}
    for case in mosaics.test:
        changed = (read_image(case.path) != read_image(paths[case.patient_id])).any(2)
        tiles = changed.reshape(16, 4, 16, 4).any((1, 3)).sum()
        counts.setdefault((case.patient_id, case.grade), {})[case.label] = tiles
    for pair in counts.values():
        assert abs(pair[0] - pair[1]) <= 1  # a tile may be planted with its own colours


def test_mosaics_are_made_once_and_the_same_tomorrow(cases, tmp_path):
    split = split_of(cases, PLAN, JOB)
    first = mosaic_split(split, PLAN, JOB, tmp_path / 'a')
    times = {case.path: case.path.stat().st_mtime_ns for case in first.train}
    assert mosaic_split(split, PLAN, JOB, tmp_path / 'a') == first
    assert {case.path: case.path.stat().st_mtime_ns for case in first.train} == times
    second = mosaic_split(split, PLAN, JOB, tmp_path / 'b')
    for one, other in zip(first.test, second.test, strict=True):
        assert (read_image(one.path) == read_image(other.path)).all()


def test_too_few_biopsies():
    benign = [Case('a', 0, 'none'), Case('b', 0, 'none')]
    assert '2 benign and 0 malignant' in refusal(mosaics_of, benign, 'test', PLAN, JOB, 'x')


# ---- running them


@pytest.mark.usefixtures('small_resnet')
def test_methods_run_on_mosaics(tmp_path):
    source = paint_stand_in(tmp_path / 'painted', (8, 4, 2), size=128)
    runner = MosaicRunner(PLAN, source, tmp_path / 'work', tmp_path / 'out', lambda text: None)
    jobs = [Job(method, 0, 0, size=64) for method in ('colour', 'streaming', 'mil')]
    runner.run(jobs)
    results = [read_job_result(runner.path(job)) for job in jobs]
    assert results[0]['settings']['planted'] == [0.1, 0.5]
    assert set(results[1]['grades'].values()) == {'0.1', '0.5'}
    assert len(results[1]['logits']) == 2 * 2 * 4
    assert results[1]['data'].startswith('mosaics of ')
    assert len({tuple(result['labels'].items()) for result in results}) == 1
    assert 'maps' not in results[0] and results[1]['settings']['mapped'] == PLAN.mapped
    for result in results[1:]:
        maps = result['maps']
        assert 0 < len(maps['slides']) <= PLAN.mapped and maps['side'] == 4
        assert maps['slides'] == results[1]['maps']['slides']
        assert len(maps['trained']['auprc']) == len(maps['slides'])


@pytest.mark.usefixtures('small_resnet')
def test_an_estimate_of_mosaics(tmp_path):
    source = paint_stand_in(tmp_path / 'painted', (8, 4, 2), size=128)
    runner = MosaicRunner(PLAN, source, tmp_path / 'work', tmp_path / 'out', lambda text: None)
    rows = estimate(runner)
    names = [row[0] for row in rows[1:]]
    assert {'streaming, share 1', 'mil, share 1'} <= {*names}
    # of a network so small, the time of a step may vanish in the noise
    assert all(row[2] >= 0 for row in rows[1:]) and not runner.out.exists()


# ---- heatmaps


def test_a_mask_of_whole_tiles_is_of_the_upper_left_part(tmp_path):
    rgb = np.full((18, 20, 3), 90, np.uint8)
    truth = np.zeros((16, 16), np.uint8)
    truth[4:8, 4:8] = 1
    write_png(tmp_path / 'a.png', rgb)
    write_png(tmp_path / 'a-truth.png', truth)
    mosaic = Case('a', 1, tmp_path / 'a.png', annotation=tmp_path / 'a-truth.png')
    mask = tumour_mask(mosaic)
    assert mask.shape == (18, 20) and (mask[:16, :16] >= 3).sum() == 16
    assert (mask > 0).all() and (mask[16:] == 1).all()


def test_one_positive_mosaic_of_each_base_is_mapped(mosaics):
    plan = replace(PLAN, mapped=20)
    mapped = mapped_mosaics(mosaics, plan)
    bases = [case.patient_id for case in mapped]
    assert bases == list(dict.fromkeys(case.patient_id for case in mosaics.test))
    assert all(case.label and case in mosaics.test for case in mapped)
    assert [case.grade for case in mapped] == ['0.1', '0.5', '0.1', '0.5'][: len(mapped)]
    assert mapped_mosaics(mosaics, replace(PLAN, mapped=1)) == mapped[:1]
    assert mapped_mosaics(mosaics, replace(PLAN, mapped=0)) == []


def test_places_are_tiles_and_tumour_is_where_it_was_planted(mosaics):
    for case in mapped_mosaics(mosaics, PLAN):
        mask, truth = tumour_mask(case), read_image(case.annotation)[..., 0] > 0
        rgb = read_image(case.path)
        tissue = (rgb < WHITE).any(2)
        assert ((mask > 0) == tissue).all()
        assert ((mask >= 3) == (truth & tissue)).all() and (mask >= 3).any()
        assert mask.shape == rgb.shape[:2]
    refused = refusal(tumour_mask, replace(case, annotation=None))
    assert 'has no mask of its truth' in refused and case.slide_id in refused


def test_darkness_and_green_of_places():
    rgb = canvas((100, 50, 100), [(0, 0)])
    rgb[4:8, 4:8] = 200, 200, 200
    mask = (rgb < WHITE).any(2).astype(np.uint8)
    places = tissue_places(rgb, mask, 4)
    assert places.position.tolist() == [[0, 0], [4, 4]]
    assert places.density.argmax() == 0
    assert places.color[:, 1].tolist() == pytest.approx([50, 200])
    assert auc([True, False], places.density) == 1
