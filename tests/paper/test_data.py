"The biopsies of the comparison: folder, checksums, reduction, splits, and what the networks see."

import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from streaming_pathology.mil.bags import PatchGrid
from streaming_pathology.paper.data import (
    DATA_VARIABLE,
    GLEASON,
    ImageBags,
    ImageSlides,
    check_sums,
    data_folder,
    paint_stand_in,
    prepare,
    read_image,
    reduced,
    slides_of,
    split_of,
    tissue_of,
)
from streaming_pathology.paper.plan import REAL, SMALL, Job, jobs_of
from streaming_pathology.slides.augment import STEP, Augmentation
from streaming_pathology.slides.cohorts import Case, read_manifest


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "A folder of painted biopsies, which tests do not change."
    return paint_stand_in(tmp_path_factory.mktemp('paper') / 'painted', (5, 3, 2), size=128)


@pytest.fixture
def changed(source, tmp_path):
    "A copy of that folder, which a test may change."
    return shutil.copytree(source, tmp_path / 'copy')


@pytest.fixture(scope='module')
def cases(source, tmp_path_factory):
    return read_manifest(prepare(source, tmp_path_factory.mktemp('reduced') / 'images', 64))


def cohort():
    "The real cohort's ids and patterns, without images."
    return [
        Case(f'{gleason[0]}-{number:03}', GLEASON[gleason], 'none', grade=gleason)
        for gleason, count in zip(GLEASON, (91, 24, 8), strict=True)
        for number in range(count)
    ]


def reseal(folder):
    "Make SHA256SUMS say what is in the folder."
    names = [line.split('  ')[1] for line in (folder / 'SHA256SUMS').read_text().splitlines()]
    lines = [
        f'{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}' for name in names
    ]
    (folder / 'SHA256SUMS').write_text('\n'.join(lines) + '\n')


# ---- the folder


def test_the_folder_is_given_or_set(source, monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert DATA_VARIABLE in refusal(data_folder)
    monkeypatch.setenv(DATA_VARIABLE, str(source))
    assert data_folder() == source
    assert 'has no labels.csv' in refusal(data_folder, tmp_path)


def test_files_are_what_their_checksums_say(changed):
    before = check_sums(changed)
    image = next((changed / 'images').iterdir())
    image.write_bytes(image.read_bytes() + b'\0')
    next(reversed([*(changed / 'images').iterdir()])).unlink()
    said = refusal(check_sums, changed)
    assert 'is another file' in said and 'is missing' in said
    shutil.rmtree(changed / 'images')
    assert len(before) == 64


def test_a_label_that_is_not_that_of_its_pattern(changed, tmp_path):
    text = (changed / 'labels.csv').read_text()
    (changed / 'labels.csv').write_text(text.replace(',1,3+3', ',0,3+3', 1))
    reseal(changed)
    assert "label '0' with the pattern '3+3'" in refusal(prepare, changed, tmp_path / 'r', 64)


# ---- reduction


def test_reduction_is_the_mean_of_squares():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert abs(reduced(image, 8) - expected).max() <= 0.5
    assert (reduced(image, 32) == image).all()
    assert 'cannot be reduced to 24 x 24' in refusal(reduced, image, 24)
    assert 'cannot be reduced' in refusal(reduced, image[:16], 8)


def test_prepared_images_are_those_of_the_source(source, cases):
    for case in cases:
        image = read_image(source / 'images' / f'{case.slide_id}.jpg')
        assert (read_image(case.path) == reduced(image, 64)).all()
        assert case.label == GLEASON[case.grade]
        assert case.spacing == pytest.approx(0.96 * 2)


def test_a_prepared_folder_is_used_again_and_never_for_other_data(source, tmp_path, changed):
    manifest = prepare(source, tmp_path / 'r', 64)
    image = tmp_path / 'r/images' / f'{read_manifest(manifest)[0].slide_id}.png'
    before = image.stat().st_mtime_ns
    assert prepare(source, tmp_path / 'r', 64) == manifest
    assert image.stat().st_mtime_ns == before
    assert 'give another folder' in refusal(prepare, source, tmp_path / 'r', 32)
    Image.new('RGB', (128, 128)).save(next((changed / 'images').iterdir()))
    reseal(changed)
    assert 'give another folder' in refusal(prepare, changed, tmp_path / 'r', 64)


def test_a_preparation_that_was_cut_short_is_done_again(source, tmp_path):
    manifest = prepare(source, tmp_path / 'r', 64)
    (tmp_path / 'r/prepared.json').unlink()
    next((tmp_path / 'r/images').iterdir()).unlink()
    assert len(read_manifest(prepare(source, tmp_path / 'r', 64))) == 10
    assert manifest.exists()


def test_an_image_that_cannot_be_read(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    assert 'a.png cannot be read as an image' in refusal(read_image, tmp_path / 'a.png')


# ---- splits


def test_every_slide_is_tested_once_a_seed_and_never_trained_on():
    for seed in REAL.seeds:
        tested = []
        for fold in range(REAL.folds):
            split = split_of(cohort(), REAL, Job('mil', seed, fold))
            ids = [case.slide_id for part in split.parts.values() for case in part]
            assert len(ids) == len(set(ids)) == 123
            tested += [case.slide_id for case in split.test]
        assert sorted(tested) == sorted(case.slide_id for case in cohort())


def test_smaller_training_sets_have_the_same_tuning_and_test_slides():
    jobs = [Job('mil', 0, 1, share) for share in (1.0, 0.5, 0.25)]
    whole, half, quarter = [split_of(cohort(), REAL, job) for job in jobs]
    assert whole.test == half.test == quarter.test
    assert whole.tuning == half.tuning == quarter.tuning
    ids = [{case.slide_id for case in split.train} for split in (whole, half, quarter)]
    assert ids[0] > ids[1] > ids[2]
    assert {case.grade for case in quarter.train} == set(GLEASON)


def test_methods_have_the_same_slides():
    by_name = {}
    for job in jobs_of(REAL):
        split = split_of(cohort(), REAL, job)
        key = (job.seed, job.fold, job.share)
        assert by_name.setdefault(key, split) == split


# ---- what the networks see


def test_tissue_is_what_is_not_white():
    rgb = np.full((4 * STEP, 3 * STEP, 3), 255, np.uint8)
    rgb[STEP : 2 * STEP, : STEP // 2 + 1] = 100
    found = tissue_of(rgb)
    assert np.argwhere(found.mask).tolist() == [[1, 0]]
    assert (found.mask[found.rows[:, None], found.columns].shape) == rgb.shape[:2]


def test_images_are_turned_by_quarters_where_they_are_augmented(cases):
    still = Augmentation(False, 0, elastic=0, hue=0, saturation=0, brightness=0)
    data = ImageSlides(cases, 2.0, (64, 64), still, seed=3)
    plain = ImageSlides(cases, 2.0, (64, 64))[0]['image']
    seen = set()
    for epoch in range(16):
        image = data[0, epoch]['image']
        (turns,) = [k for k in range(4) if (image == plain.rot90(k, (1, 2))).all()]
        seen.add(turns)
    assert seen == {0, 1, 2, 3}
    assert (data[0, 3]['image'] == data[0, 3]['image']).all()


def test_bags_are_turned_with_their_tissue(cases):
    still = Augmentation(False, 0, elastic=0, hue=0, saturation=0, brightness=0)
    grid = PatchGrid(size=32, stride=16, tissue=0.5)
    plain = ImageBags(cases, 2.0, (64, 64), grid=grid)[0]['image']
    data = ImageBags(cases, 2.0, (64, 64), augment=still, grid=grid)
    for epoch in range(6):
        bag = data[0, epoch]['image']
        means = sorted(bag.patches().float().mean((1, 2, 3)).tolist())
        expected = sorted(plain.patches().float().mean((1, 2, 3)).tolist())
        assert means == pytest.approx(expected)


def test_augmented_images_keep_their_size_and_differ_by_epoch(cases):
    data = slides_of(cases, SMALL.__class__(**{**SMALL.__dict__, 'size': 64}), augmented=True)
    first, second = data[0, 0]['image'], data[0, 1]['image']
    assert first.shape == second.shape == (3, 64, 64)
    assert (first != second).any()
    assert (data[0, 0]['image'] == first).all()
