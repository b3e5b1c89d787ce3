"Painted biopsies have the truth that was asked for; a cohort resumes and refuses foreign folders."

import csv
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_pathology.core import InputError
from streaming_pathology.slides import synthetic
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import TUMOUR, paint_biopsy, write_cohort
from streaming_pathology.slides.tissue import tissue_box

SMALL = dict(n=4, size=(128, 256), spacing=4.0, progress=False)  # a cohort

# ---- one biopsy


@pytest.mark.parametrize(
    'wrong',
    [
        dict(size=(10, 500)),
        dict(size=(64.5, 64)),
        dict(size=(64,)),
        dict(spacing=0.0),
        dict(spacing=math.nan),
        dict(tumour_fraction=-0.1),
        dict(tumour_fraction=math.nan),
        dict(crowded_fraction=2.0),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match='must be'):
        paint_biopsy(**wrong)


def test_an_image_too_small_for_a_biopsy_is_refused():
    with pytest.raises(InputError, match='too small'):
        paint_biopsy(size=(40, 40), spacing=1.0)


@settings(max_examples=8, deadline=None, database=None)
@given(
    st.integers(100, 400),
    st.integers(100, 400),
    st.floats(2.05, 8.0),
    st.sampled_from([0, 0.01, 0.2, 0.7, 1.0]),
    st.integers(-5, 10**9),
)
def test_any_biopsy_has_the_tumour_asked_for(height, width, spacing, fraction, seed):
    biopsy = paint_biopsy((height, width), spacing, fraction, seed)
    assert biopsy.image.shape == (height, width, 3) and biopsy.image.dtype == np.uint8
    assert biopsy.mask.shape == (height, width) and biopsy.mask.dtype == np.uint8
    tissue = np.count_nonzero(biopsy.mask)
    assert 0.08 < tissue / biopsy.mask.size < 0.8
    assert abs(biopsy.tumour_fraction - fraction) < 1.5 / tissue
    assert (biopsy.mask == TUMOUR).any() == (fraction > 0)
    assert biopsy.image[biopsy.mask == 0].mean() > 225
    assert biopsy.image[biopsy.mask > 0].mean() < 225


# ---- a cohort


@pytest.fixture
def manifest(tmp_path):
    return write_cohort(tmp_path / 'cohort', **SMALL)


def test_each_slide_has_its_truth_beside_it(manifest):
    names = {path.name for path in manifest.parent.rglob('*.tiff')}
    assert len(names) == 4  # a slide and its mask have one name
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        with Slide(manifest.parent / row['path']) as slide:
            assert slide.size == (128, 256)
            assert abs(slide.spacing - 4.0) < 0.02
            tissue_box(slide, 4.0)
        with Slide(manifest.parent / row['truth']) as truth:
            mask = truth.read(4.0)[..., 0]
            coarse = truth.read(8.0, (0, 0, 64, 128))
        share = (mask == TUMOUR).sum() / (mask > 0).sum()
        assert abs(share - float(row['tumour_fraction'])) < 1e-3
        assert set(np.unique(coarse)) <= {0, 1, 2, 3}


def test_a_second_call_paints_what_is_missing(manifest):
    "In another process, and with the same pixels; what is there is not written again."
    lost = manifest.parent / 'slides' / 'synthetic_0002.tiff'
    before = {path: path.read_bytes() for path in manifest.parent.rglob('*.tiff')}
    times = {path: path.stat().st_mtime_ns for path in before}
    table = manifest.read_bytes()
    lost.unlink()
    manifest.unlink()
    assert write_cohort(manifest.parent, **SMALL, workers=1) == manifest
    assert manifest.read_bytes() == table
    assert {path: path.read_bytes() for path in manifest.parent.rglob('*.tiff')} == before
    written = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in written} == {lost.name}


def test_a_folder_with_something_else_is_refused(manifest, tmp_path):
    with pytest.raises(InputError, match='other settings'):
        write_cohort(manifest.parent, n=5, progress=False)
    full = tmp_path / 'full'
    full.mkdir()
    (full / 'notes.txt').touch()
    with pytest.raises(InputError, match='not empty'):
        write_cohort(full, n=2, progress=False)
    with pytest.raises(InputError, match='cannot be written'):
        write_cohort(full / 'notes.txt', n=2, progress=False)
    for damaged in ('{', '3', 'null'):
        (manifest.parent / 'cohort.json').write_text(damaged)
        with pytest.raises(InputError, match='is damaged'):
            write_cohort(manifest.parent, **SMALL)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(n=0),
        dict(tumour_fractions=(0, 0.5)),
        dict(tumour_fractions=(0.5, 0.2)),
        dict(splits=dict(train=0.5)),
        dict(splits=dict(train=0.5, valid=0.5)),
        dict(compression='png'),
        dict(workers=-1),
        dict(positive=2),
        dict(size=(5, 5)),
    ],
    ids=str,
)
def test_wrong_settings_leave_no_folder(wrong, tmp_path):
    with pytest.raises(InputError):
        write_cohort(tmp_path / 'new', progress=False, **wrong)
    assert not (tmp_path / 'new').exists()


def test_a_stop_ends_the_processes_that_paint(tmp_path):
    "A pool that is shut down in the middle of a stop may wait for ever."
    pools = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            pools.append([*pool.return_value._processes.values()])
            raise KeyboardInterrupt

    with (
        mock.patch.object(synthetic, 'tqdm', lambda **_: Bar()),
        mock.patch.object(synthetic, 'worker_pool', return_value=synthetic.worker_pool(1)) as pool,
        pytest.raises(KeyboardInterrupt),
    ):
        write_cohort(tmp_path / 'a', **{**SMALL, 'n': 2}, workers=1)
    (processes,) = pools
    assert processes and all(process.exitcode == -9 for process in processes)
