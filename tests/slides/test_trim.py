"Biopsies cut out of slides: pixels and masks, settings, runs into one folder, processes."

import dataclasses
import json
import math
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.test import test_close as check_close
from matplotlib import pyplot as plt
from PIL import Image
from refusals import refusal
from scipy import ndimage

from streaming_pathology.core import InputError
from streaming_pathology.io import locked, read_table
from streaming_pathology.slides.cohorts import Case, read_manifest, tiny_cohort
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.slides.tissue import biopsies, draw_tissue, tissue_mask
from streaming_pathology.slides.trim import (
    Trim,
    cut,
    each_apart,
    tasks_of,
    trim_slide,
    trim_slides,
    weights_checksum,
)

SPACING = 4.0
WHITE = (255, 255, 255)
COHORT = Trim(spacing=8.0, min_area_mm2=0.001)  # settings for the small slides of `tiny_cohort`


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def enlarged(mask, shape):
    "A mask with as many pixels as `shape` says, each the nearest one."
    rows, columns = (
        ((np.arange(size) + 0.5) * count / size).astype(int)
        for size, count in zip(shape, mask.shape)
    )
    return mask[np.ix_(rows, columns)]


def painted_core(seed, size=(1100, 230)):
    return paint_biopsy(size, spacing=SPACING, tumour_fraction=0.3 * (seed % 2), seed=seed)


@dataclasses.dataclass
class FourCores:
    "A slide with four painted cores, the second of them broken."

    path: Path
    slide: Slide
    found: list  # the biopsies
    truth: list  # for each core, where it was painted: bool, of the whole slide

    @property
    def pairs(self):
        return list(zip(self.found, self.truth))


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    broken = painted_core(2)
    broken.mask[480:530] = 0
    broken.image[480:530] = 243
    cores = [
        (60, 40, painted_core(1)),
        (90, 330, broken),
        (40, 620, painted_core(3)),
        (1250, 40, painted_core(4, (230, 820))),
    ]
    pixels = np.full((1560, 900, 3), 243, np.uint8)
    truth = []
    for top, left, core in cores:
        height, width = core.mask.shape
        tissue = core.mask > 0
        pixels[top : top + height, left : left + width][tissue] = core.image[tissue]
        where = np.zeros(pixels.shape[:2], bool)
        where[top : top + height, left : left + width] = tissue
        truth.append(where)
    path = tmp_path_factory.mktemp('four') / 'four.tiff'
    write_tiff(pixels, path, SPACING)
    with Slide(path) as slide:
        yield FourCores(path, slide, biopsies(slide), truth)


def trimmed(cases, out, settings=COHORT, **options):
    return trim_slides(cases, out, settings, progress=False, **options)


# ---- cuts


def test_each_biopsy_is_the_core_that_was_painted(four):
    assert len(four.found) == 4
    height, width = four.truth[0].shape
    for biopsy, truth in four.pairs:
        rows, columns = (
            ((np.arange(size) + 0.5) * SPACING / biopsy.spacing).astype(int)
            for size in (height, width)
        )
        assert dice(biopsy.mask[np.ix_(rows, columns)], truth) > 0.9


@pytest.mark.parametrize('number', range(4))
def test_a_cut_holds_all_tissue_unchanged(four, number):
    biopsy, truth = four.pairs[number]
    rows = cut(four.slide, biopsy, SPACING)
    top, left, height, width = biopsy.region(SPACING, 50.0)
    pixels = rows.pixels(0, height)
    assert pixels.shape == (height, width, 3) and rows.shape == (1, 3, height, width)
    tissue = np.zeros((height, width), bool)
    y, x = np.nonzero(truth)
    tissue[y - top, x - left] = True
    on_slide = four.slide.read(SPACING, (top, left, height, width))
    np.testing.assert_array_equal(pixels[tissue], on_slide[tissue])
    np.testing.assert_array_equal(rows.read(40, 70)[0].transpose(1, 2, 0), pixels[40:70])


@pytest.mark.parametrize('number', range(4))
def test_background_is_painted(four, number):
    biopsy = four.found[number]
    height = biopsy.region(SPACING, 50.0)[2]
    plain = cut(four.slide, biopsy, SPACING).pixels(0, height)
    white = cut(four.slide, biopsy, SPACING, background=WHITE).pixels(0, height)
    assert (white == 255).all(-1).mean() > (plain == 255).all(-1).mean()


@pytest.mark.parametrize('number', range(4))
def test_squeezed_cuts_are_no_larger(four, number):
    biopsy = four.found[number]
    _, _, height, width = biopsy.region(SPACING, 50.0)
    squeezed = cut(four.slide, biopsy, SPACING, squeeze=True, margin=10.0)
    assert squeezed.shape[2] <= height and squeezed.shape[3] <= width


def test_a_break_is_left_out(four):
    whole = cut(four.slide, four.found[1], SPACING, margin=16.0)
    squeezed = cut(four.slide, four.found[1], SPACING, margin=16.0, squeeze=True)
    assert squeezed.shape[2] < whole.shape[2] - 20


@pytest.mark.parametrize(
    'options', [{}, dict(upright=True), dict(squeeze=True, margin=0.0)], ids=str
)
@pytest.mark.parametrize('number', range(4))
def test_the_mask_of_a_cut_shows_its_tissue(four, number, options):
    rows = cut(four.slide, four.found[number], SPACING, **options)
    height, width = rows.shape[2:]
    visible, _ = tissue_mask(rows.pixels(0, height), SPACING)
    assert dice(enlarged(rows.pixels.mask(), (height, width)), visible) > 0.93


@pytest.mark.parametrize(
    'wrong',
    [
        dict(margin=-1),
        dict(background=(1, 2)),
        dict(background=(0, 0, 300)),
        dict(spacing=-1.0),
        dict(spacing='4'),
        dict(biopsy=1),
    ],
    ids=str,
)
def test_cuts_that_are_refused(four, wrong):
    arguments = dict(slide=four.slide, biopsy=four.found[0], spacing=SPACING)
    refusal(cut, **(arguments | wrong))


@pytest.mark.parametrize(
    'wrong', [dict(gap=-1), dict(min_area_mm2=math.nan), dict(turn='a')], ids=str
)
def test_biopsies_that_are_refused(four, wrong):
    assert 'must be a number' in refusal(biopsies, four.slide, **wrong)


def test_a_mask_one_pixel_wide_is_drawn(four):
    ax = draw_tissue(four.slide, (four.found[0].mask[:, :1], SPACING))
    plt.close(ax.figure)


def smooth_noise():
    "Three channels of 500 x 500 pixels that vary slowly, so that interpolation is nearly exact."
    channels = []
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(0, 900, (500, 500))
        channels.append(ndimage.gaussian_filter(noise, 6) + 128)
    return np.stack(channels, -1).clip(0, 255)


def tilted_ellipse(degrees):
    "Bool (125, 125): an ellipse that has to be turned by that angle to stand upright."
    y, x = np.mgrid[:125, :125] - 62.0
    angle = math.radians(degrees)
    along = y * math.cos(angle) - x * math.sin(angle)
    across = y * math.sin(angle) + x * math.cos(angle)
    return (along / 50) ** 2 + (across / 12) ** 2 < 1


@pytest.mark.parametrize('degrees', [-80, -45, -10, 25, 90])
def test_a_turned_cut_is_the_whole_slide_turned_at_once(tmp_path, degrees):
    smooth = smooth_noise()
    write_tiff(smooth.astype(np.uint8), tmp_path / 'smooth.tiff', 2.0)
    with Slide(tmp_path / 'smooth.tiff') as slide:
        (biopsy,) = biopsies(slide, min_area_mm2=0.001, mask=(tilted_ellipse(degrees), 8.0))
        check_close(biopsy.angle, degrees, eps=0.5)
        rows = cut(slide, biopsy, 2.0, margin=10.0, upright=True)
        _, _, height, width = rows.shape
        assert height > 2 * width
        pixels, frame = rows.pixels(0, height), rows.pixels.frame
        np.testing.assert_array_equal(rows.image(100).numpy()[:64], rows.image(512).numpy()[:64])
    first_pixel = frame.axes @ np.full(2, 0.5) + frame.origin / 2 - 0.5
    on_slide = np.moveaxis(np.mgrid[:height, :width], 0, -1) @ frame.axes.T + first_pixel
    reference = np.stack(
        [
            ndimage.map_coordinates(smooth[..., channel], np.moveaxis(on_slide, -1, 0), order=3)
            for channel in range(3)
        ],
        -1,
    )
    inside = (np.minimum(on_slide, 499 - on_slide) > 4).all(-1)
    assert inside.mean() > 0.9
    assert abs(pixels - reference)[inside].mean() < 1.5


def test_a_failure_while_pixels_are_read_is_raised_and_leaves_no_file(four, tmp_path):
    rows = cut(four.slide, four.found[0], SPACING)
    whole = rows.pixels

    def fails(top, bottom):
        if top > 200:
            raise InputError('cannot be read')
        return whole(top, bottom)

    rows.pixels = fails
    with pytest.raises(InputError):
        write_tiff(rows.image(64), tmp_path / 'none.tiff', SPACING)
    assert not (tmp_path / 'none.tiff').exists()
    assert isinstance(rows.error, InputError) and 'read' in str(rows.error)


# ---- settings


@pytest.mark.parametrize(
    'wrong',
    [
        dict(upright='no'),
        dict(spacing='4'),
        dict(min_area_mm2=math.nan),
        dict(quality=90.5),
        dict(pen=1),
    ],
    ids=str,
)
def test_settings_that_are_refused(wrong):
    (name,) = wrong
    assert f'{name} of a trimming' in refusal(Trim, **wrong)


def test_a_stain_that_is_not_known():
    assert "stain is 'brown'; use he, ihc, pale" in refusal(Trim, stain='brown')


def test_a_background_that_is_no_color():
    assert 'is no colour' in refusal(Trim, background='white')


@pytest.mark.filterwarnings('ignore:overflow')
def test_settings_of_numpy_can_be_written_as_json():
    settings = Trim(
        spacing=np.float32(1),
        quality=np.int64(90),
        upright=np.True_,
        background=np.array([9, 9, 9]),
    )
    json.dumps(dataclasses.asdict(settings))


# ---- cohorts


@pytest.fixture
def cases(tmp_path):
    "Six slides, of which s01 is truncated and s02 is blank."
    manifest = tiny_cohort(tmp_path / 'cohort', n=6, splits=False)
    slides = tmp_path / 'cohort/slides'
    (slides / 's01.tiff').write_bytes((slides / 's01.tiff').read_bytes()[:900])
    write_tiff(np.full((90, 90, 3), 244, np.uint8), slides / 's02.tiff', SPACING)
    return read_manifest(manifest)


@pytest.fixture
def mended(cases):
    "The same slides, but s02 is a copy of s00, which can be trimmed."
    shutil.copy(cases[0].path, cases[2].path)
    return cases


@pytest.fixture
def marked(cases, tmp_path):
    "One slide with a mask that covers all of it, and a grade."
    Image.fromarray(np.full((96, 64), 255, np.uint8)).save(tmp_path / 'mask.png')
    return [replace(cases[3], mask=tmp_path / 'mask.png', grade='3')]


@pytest.fixture
def four_case(four, tmp_path):
    "A copy of the slide with four cores, without a mask."
    shutil.copy(four.path, tmp_path / 'slide.tiff')
    return Case('four', 1.0, tmp_path / 'slide.tiff')


def test_slides_that_fail_are_named_and_the_others_trimmed(cases, tmp_path):
    summary = trimmed(cases, tmp_path / 'out')
    assert (summary['slides'], summary['biopsies'], summary['skipped']) == (4, 4, 0)
    assert list(summary['failed']) == ['s01', 's02']
    manifest = read_manifest(tmp_path / 'out/manifest.csv')
    assert [case.slide_id for case in manifest] == ['s00_1', 's03_1', 's04_1', 's05_1']
    assert [case.label for case in manifest] == [0, 1, 0, 1]
    assert manifest[0].patient_id == 'p00'
    for case in manifest:
        with Slide(case.path) as slide:
            check_close(slide.spacing, 8.0, eps=0.01)


def test_in_processes_the_same_files_are_written(mended, tmp_path):
    trimmed(mended, tmp_path / 'here')
    summary = trimmed(mended, tmp_path / 'apart', workers=2)
    assert (summary['slides'], list(summary['failed'])) == (5, ['s01'])
    for path in (tmp_path / 'here').rglob('*'):
        if path.is_file() and path.parent.name != 'notes':
            other = tmp_path / 'apart' / path.relative_to(tmp_path / 'here')
            assert path.read_bytes() == other.read_bytes(), path


def test_a_spacing_finer_than_the_slide_writes_nothing(four, tmp_path):
    cases = [Case('four', 1.0, four.path)]
    summary = trimmed(cases, tmp_path / 'fine', Trim(spacing=1.0))
    assert summary['failed'] == {
        'four': f'{four.path} has 4 microns per pixel and cannot be read at 1: that would invent '
        'detail; ask for 4 or more'
    }
    assert [path.name for path in (tmp_path / 'fine').rglob('*') if path.is_dir()] == []


def test_a_second_run_trims_what_is_incomplete(cases, tmp_path):
    trimmed(cases, tmp_path / 'out')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out/biopsies').iterdir()}
    victim = next(iter(before))
    victim.write_bytes(victim.read_bytes()[:100])
    shutil.copy(cases[0].path, cases[2].path)  # s02 can be trimmed now
    again = trimmed(cases, tmp_path / 'out')
    assert (again['slides'], again['skipped'], list(again['failed'])) == (5, 3, ['s01'])
    changed = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {victim}


def test_a_missing_overview_is_made_again(mended, tmp_path):
    trimmed(mended, tmp_path / 'out')
    (tmp_path / 'out/overview/s00.jpg').unlink()
    assert trimmed(mended, tmp_path / 'out')['skipped'] == 4


def test_a_note_that_is_damaged_is_written_again(mended, tmp_path):
    trimmed(mended, tmp_path / 'out')
    (tmp_path / 'out/notes/s00.json').write_text('[1')
    assert trimmed(mended, tmp_path / 'out')['skipped'] == 4


def test_a_slide_that_is_finished_is_not_trimmed_by_itself_either(mended, tmp_path):
    (task,) = tasks_of(mended[:1], tmp_path, COHORT, None).values()
    assert trim_slide(task)['seconds'] > 0
    assert trim_slide(task)['seconds'] is None


def test_a_mask_of_the_slide_is_used(marked, tmp_path):
    trimmed(marked, tmp_path / 'out')
    (whole,) = read_manifest(tmp_path / 'out/manifest.csv', need_label=False)
    with Slide(whole.path) as slide:
        assert max(slide.size) > 50
    assert whole.grade == '3'
    assert trimmed(marked, tmp_path / 'out')['skipped'] == 1


def test_a_new_spacing_or_a_corrected_mask_is_noticed(marked, tmp_path):
    trimmed(marked, tmp_path / 'out')
    assert trimmed([replace(marked[0], spacing=4.05)], tmp_path / 'out')['skipped'] == 0
    assert trimmed(marked, tmp_path / 'out')['skipped'] == 0
    write_tiff(np.full((96, 64), 255, np.uint8), marked[0].mask, SPACING)
    assert trimmed(marked, tmp_path / 'out')['skipped'] == 0


def test_biopsies_that_a_slide_no_longer_has_are_deleted(four_case, tmp_path):
    first = trimmed([four_case], tmp_path / 'out')
    Image.fromarray(np.full((39, 23), 255, np.uint8)).save(tmp_path / 'half.png')
    second = trimmed([replace(four_case, mask=tmp_path / 'half.png')], tmp_path / 'out')
    assert (first['biopsies'], second['biopsies']) == (4, 1)
    images = sorted((tmp_path / 'out').rglob('*.tiff'))
    names = [str(path.relative_to(tmp_path / 'out')) for path in images]
    assert names == ['biopsies/four_1.tiff', 'masks/four_1.tiff']


def dark_is_tissue():
    "A network that finds what is darker than glass."
    network = torch.nn.Conv2d(3, 1, 5, stride=2)
    torch.nn.init.constant_(network.weight, -1 / 75)
    torch.nn.init.constant_(network.bias, 0.9)
    return network


def test_a_network_finds_the_tissue_and_new_weights_are_noticed(four_case, tmp_path):
    network = dark_is_tissue()
    assert trimmed([four_case], tmp_path / 'out', network=network)['biopsies'] == 4
    assert trimmed([four_case], tmp_path / 'out', network=network)['skipped'] == 1
    torch.nn.init.constant_(network.bias, 0.91)
    assert trimmed([four_case], tmp_path / 'out', network=network)['skipped'] == 0


def test_a_network_that_is_no_torch_module(four_case, tmp_path):
    assert 'give a torch.nn.Module' in refusal(
        trimmed, [four_case], tmp_path / 'out', network=lambda pixels: pixels
    )


def test_the_checksum_of_weights_stays_the_same_between_versions():
    "Otherwise, all slides that were trimmed with a network would be trimmed again."
    network = torch.nn.PReLU(3)
    weights = network.weight.detach().numpy().tobytes()
    assert weights_checksum(network) == zlib.crc32(repr(network).encode() + weights)
    assert weights_checksum(None) is None


# ---- several runs into one folder


@pytest.fixture
def parts(mended, tmp_path):
    "A folder into which the slides were trimmed in three parts."
    folder = tmp_path / 'parts'
    folder.mkdir()
    (folder / '.DS_Store').touch()
    (folder / '.trim.json.1a2b.partial').touch()
    for part in (mended[:3], mended[3:4], mended[2:3]):
        trimmed(part, folder)
    return folder


def test_slides_of_former_runs_stay(parts, mended):
    manifest = read_manifest(parts / 'manifest.csv', need_label=False)
    assert [case.slide_id for case in manifest] == ['s00_1', 's03_1', 's02_1']
    assert trimmed(mended[2:3], parts)['others'] == 2
    failed = read_table(parts / 'failed.csv', ['slide_id'])
    assert [row['slide_id'] for row in failed] == ['s01']
    assert not [*parts.rglob('*.partial')]


def test_an_id_that_differs_by_capitals(parts, four_case):
    assert 'capitals' in refusal(trimmed, [replace(four_case, slide_id='S03')], parts)


def test_a_slide_under_two_ids(parts, mended):
    assert "as 's03'" in refusal(trimmed, [replace(mended[3], slide_id='x')], parts)


def test_a_patient_in_two_splits(parts, four_case):
    manifest = parts / 'manifest.csv'
    manifest.write_text(manifest.read_text().replace('p00,', 'p00,train'))
    other = replace(four_case, patient_id='p00', split='test')
    assert 'more than one split' in refusal(trimmed, [other], parts)


def test_an_id_without_room_for_a_number(parts, four_case):
    assert 'could not be named' in refusal(trimmed, [replace(four_case, slide_id='a' * 178)], parts)


def test_a_damaged_manifest(parts, four_case):
    (parts / 'manifest.csv').write_text('x')
    assert 'Delete it and trim' in refusal(trimmed, [four_case], parts)


def test_a_folder_in_use(parts, cases):
    with locked(parts):
        assert 'another process' in refusal(trimmed, cases, parts)


def test_an_id_twice(parts, cases):
    assert "have the id 's00'" in refusal(trimmed, [*cases, cases[0]], parts)


def test_other_settings(parts, cases):
    assert 'other settings' in refusal(trimmed, cases, parts, Trim(spacing=4.0, min_area_mm2=0.001))


def test_settings_of_a_former_version(parts, cases):
    "It called the smallest area otherwise, and knew one stain."
    path = parts / 'trim.json'
    values = json.loads(path.read_text())
    values['least'] = values.pop('min_area_mm2')
    del values['stain']
    path.write_text(json.dumps(values))
    assert trimmed(cases, parts)['skipped'] > 0


def test_damaged_settings(parts, cases):
    (parts / 'trim.json').write_text('1')
    assert 'trim.json is damaged' in refusal(trimmed, cases, parts)


def test_a_folder_of_something_else(cases, tmp_path):
    assert 'not empty' in refusal(trimmed, cases, tmp_path / 'cohort')


def test_settings_must_be_a_trim(cases, tmp_path):
    assert 'give a Trim' in refusal(trimmed, cases, tmp_path / 'out', settings=dict(spacing=8.0))


# ---- tasks in processes


def test_a_task_that_ends_its_process_does_not_harm_others():
    ends_its_process = '__import__("os")._exit(1)'
    results, errors = {}, {}
    for task, result, error in each_apart(eval, ['1', ends_its_process, '1/0', '2', '3'], 2):
        if error is None:
            results[task] = result
        else:
            errors[task] = error
    assert results == {'1': 1, '2': 2, '3': 3}
    assert isinstance(errors['1/0'], ZeroDivisionError)
    assert 'died' in str(errors[ends_its_process])


def test_tasks_in_this_process():
    outcomes = list(each_apart(eval, ['1', '1/0']))
    assert outcomes[0] == ('1', 1, None)
    task, result, error = outcomes[1]
    assert (task, result) == ('1/0', None) and isinstance(error, ZeroDivisionError)


# ---- slides without a biopsy


@pytest.fixture
def brown_case(tmp_path):
    "A slide of which all that is coloured is brown, as by DAB."
    pixels = np.full((300, 300, 3), 243, np.uint8)
    pixels[60:160, 50:150] = (130, 90, 60)
    write_tiff(pixels, tmp_path / 'brown.tiff', SPACING)
    return Case('brown', None, tmp_path / 'brown.tiff', '', '')


def test_what_was_left_out_is_said_and_shown(brown_case, tmp_path):
    out = tmp_path / 'out'
    text = trimmed([brown_case], out)['failed']['brown']
    assert 'brown.tiff has no biopsy of at least 0.001 square mm' in text
    assert '11% was taken for pen marks' in text and '--stain ihc' in text
    assert 'look at failed/brown.jpg' in text
    picture = np.asarray(Image.open(out / 'failed/brown.jpg'))
    height, width = picture.shape[:2]
    red, _, blue = picture[height // 3, width // 3].astype(int)
    assert blue > red + 50  # as what is taken for pen marks is tinted


def test_the_picture_goes_when_biopsies_are_found(brown_case, tmp_path):
    out = tmp_path / 'out'
    trimmed([brown_case], out)
    pixels = np.full((300, 300, 3), 243, np.uint8)
    pixels[60:160, 50:150] = (190, 110, 170)
    write_tiff(pixels, brown_case.path, SPACING)
    assert trimmed([brown_case], out)['biopsies'] == 1
    assert not (out / 'failed/brown.jpg').exists()


def test_a_stain_finds_them(brown_case, tmp_path):
    settings = replace(COHORT, stain='ihc')
    assert trimmed([brown_case], tmp_path / 'out', settings)['biopsies'] == 1
    note = json.loads((tmp_path / 'out/notes/brown.json').read_text())
    assert note['areas']['tissue'] == pytest.approx(0.16, rel=0.2)


def test_biopsies_that_are_too_small_are_said_to_be(brown_case, tmp_path):
    settings = replace(COHORT, stain='ihc', min_area_mm2=0.5)
    text = trimmed([brown_case], tmp_path / 'out', settings)['failed']['brown']
    assert 'its tissue, 0.1' in text and '--min-area-mm2' in text


def test_an_inverted_mask_is_told(four_case, four, tmp_path):
    mask = sum(four.truth) > 0
    Image.fromarray(~mask * np.uint8(255)).save(tmp_path / 'glass.png')
    case = replace(four_case, spacing=None, mask=tmp_path / 'glass.png')
    (text,) = trimmed([case], tmp_path / 'out')['warnings']
    assert 'glass.png marks' in text and 'invert_mask' in text


def test_a_folder_of_a_version_without_stains_is_resumed(brown_case, tmp_path):
    out = tmp_path / 'out'
    trimmed([brown_case], out)
    settings = json.loads((out / 'trim.json').read_text())
    assert settings.pop('stain') == 'he'
    (out / 'trim.json').write_text(json.dumps(settings))
    trimmed([brown_case], out)
    assert "stain was 'he', now 'ihc'" in refusal(
        trimmed, [brown_case], out, replace(COHORT, stain='ihc')
    )
