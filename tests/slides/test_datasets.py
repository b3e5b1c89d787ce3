"Images, datasets, the check of a cohort, samplers, loaders and channel statistics."

import json
import math
import pickle
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import pyvips
import torch
from PIL import Image
from refusals import refusal
from small import Small

from streaming_pathology.core import one_line, worker_died
from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.slides.augment import Augmentation, slide_rng
from streaming_pathology.slides.cohorts import read_manifest, tiny_cohort
from streaming_pathology.slides.datasets import (
    EpochSampler,
    SlideDataset,
    channel_statistics,
    check_cohort,
    cropped,
    fit_canvas,
    flips,
    message_lines,
    sample_patches,
    slide_loader,
    turned_out,
)
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.tissue import tissue_mask
from streaming_pathology.training.loop import fit
from streaming_pathology.training.models import StreamingClassifier

# ---- images


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((9, 9, 3)),
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 3), np.uint16),
    ],
)
def test_pixels_of_another_type_are_refused(image):
    assert 'uint8' in refusal(fit_canvas, image)


RAMP = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)


@pytest.mark.parametrize(
    'size, rows, columns, padding',
    [
        ((3, 3), slice(1, 4), slice(1, 4), ((0, 0), (0, 0))),
        ((6, 4), slice(0, 6), slice(0, 4), ((0, 0), (0, 0))),
        ((9, 5), slice(0, 6), slice(0, 5), ((1, 2), (0, 0))),
        ((8, 9), slice(0, 6), slice(0, 5), ((1, 1), (2, 2))),
        ((4, 8), slice(1, 5), slice(0, 5), ((0, 0), (1, 2))),
        ((9, 2), slice(0, 6), slice(1, 3), ((1, 2), (0, 0))),
    ],
)
def test_an_image_is_laid_around_the_middle_of_a_canvas(size, rows, columns, padding):
    expected = np.pad(RAMP[rows, columns], (*padding, (0, 0)), constant_values=250)
    np.testing.assert_array_equal(fit_canvas(RAMP, size, color=(250, 250, 250)), expected)


def test_flips_reach_all_four_images():
    image = torch.arange(6).reshape(1, 2, 3)
    flipped = torch.stack([flips(image, slide_rng(0, epoch, 's')) for epoch in range(40)])
    assert len(flipped.unique(dim=0)) == 4


def test_half_the_resolution_is_rounded_up_to_32(cases):
    assert SlideDataset(cases, 8)[0]['image'].shape == (3, 32, 32)


def test_an_unknown_label_is_nan(cases):
    assert math.isnan(SlideDataset([replace(cases[0], label=None)], 4)[0]['label'])


def test_an_empty_module_augments(cases):
    "What is given as augmentation is called, also if it counts as false."

    class Unchanged(list):
        def __call__(self, image, rng):
            return image + 1

    plain, changed = SlideDataset(cases, 4), SlideDataset(cases, 4, augment=Unchanged())
    assert torch.equal(changed[0]['image'], plain[0]['image'] + 1)


# ---- what is kept in memory


@pytest.fixture
def with_cache(cases):
    "A dataset of 80 x 64 pixels whose cache has room for three of its slides, all of them read."
    image_bytes = SlideDataset(cases, 4).read(0).nbytes
    data = SlideDataset(cases, 4, (80, 64), cache=int(3.5 * image_bytes))
    for index in range(len(data)):
        data[index]
    return data


def test_the_cache_has_a_limit(with_cache):
    assert 2 <= len(with_cache.kept) <= 4


def test_parts_share_the_cache(with_cache):
    part = with_cache.part('test')
    assert part.kept is with_cache.kept
    assert [case.slide_id for case in part.cases] == ['s06', 's07']


def test_an_item_is_the_callers_own(with_cache):
    with_cache[0]['image'][:] = 0
    assert with_cache[0]['image'].any()


def test_kept_images_stay_in_their_process(with_cache):
    assert len(pickle.loads(pickle.dumps(with_cache)).kept) == 0


# ---- canvases


@pytest.mark.parametrize('index', [0, 5])
def test_a_canvas_has_the_pixels_of_the_image_and_holds_few(cases, index):
    plain, painted = (
        SlideDataset(cases, 4, (256, 256), Augmentation(), canvas=canvas, clean=50.0)
        for canvas in (False, True)
    )
    image, canvas = plain[index, 3], painted[index, 3]
    assert torch.equal(image['image'], canvas['image'].dense()[0])
    assert image['color'] == canvas['color']
    record = Augmentation().draw(0, 3, cases[index].slide_id)
    assert image['record'] == canvas['record'] == record
    held = sum(patch.numel() for *_, patch in canvas['image'].patches)
    assert held < 0.25 * image['image'].numel()
    copy = pickle.loads(pickle.dumps(canvas))['image']
    assert torch.equal(copy.dense(), canvas['image'].dense())


def test_patches_of_a_canvas_do_not_hold_the_image(cases):
    canvas = SlideDataset(cases, 4, (256, 256), canvas=True)[0]['image']
    stored = sum(patch.untyped_storage().nbytes() for *_, patch in canvas.patches)
    assert stored == sum(patch.numel() for *_, patch in canvas.patches)


@pytest.mark.parametrize('augment', [None, Augmentation(stain=0.05)])
def test_canvases_train_as_images_do(tmp_path, augment, monkeypatch):
    """Losses and weights of a training on canvases are those on the same pixels as tensors, also
    from workers."""
    monkeypatch.setattr('torchvision.models.resnet18', Small)
    cases = read_manifest(tiny_cohort(tmp_path / 'cohort', n=4, splits=False))

    def trained(canvas, workers):
        "The losses of two epochs, and the weights after them."
        torch.manual_seed(0)
        # in double precision: a maximum over background is reached in many places
        model = StreamingClassifier('resnet18', strip=64).double()
        data = SlideDataset(cases, 4.0, (128, 192), augment, canvas=canvas, clean=30.0)
        assert isinstance(data[0]['image'], Canvas) == canvas
        rows = fit(
            model,
            slide_loader(data, train=True, workers=workers),
            slide_loader(data),
            epochs=2,
            lr=1e-3,
            batch=2,
            progress=False,
        )
        losses = [row[name] for row in rows for name in ('train_loss', 'tuning_loss')]
        return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    losses, weights = trained(canvas=False, workers=0)
    assert len(set(losses)) == 4
    for workers in (0, 1):
        canvas_losses, canvas_weights = trained(canvas=True, workers=workers)
        np.testing.assert_allclose(canvas_losses, losses, rtol=1e-5)
        assert (canvas_weights - weights).abs().max() < 1e-6 * weights.abs().max()


# ---- settings that do not fit


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(augment=flips, canvas=True), 'Augmentation'),
        (dict(augment='paper'), "augment 'paper'"),
        (dict(size=512), '512 is no size'),
        (dict(size=(0, 5)), 'is no size'),
        (dict(spacing=0), 'spacing of a dataset'),
        (dict(spacing=None), 'spacing of a dataset'),
        (dict(clean=-1), 'clean of a dataset'),
        (dict(cache='1GB'), 'cache of a dataset'),
        (dict(color=(300, 0, 0)), 'is no colour'),
        (dict(seed=-1), 'is no seed'),
    ],
)
def test_bad_settings_are_refused(cases, settings, says):
    assert says in refusal(SlideDataset, cases, **{'spacing': 4, **settings})


def test_two_slides_of_one_id_are_refused(cases):
    twice = [*cases, replace(cases[1], path=cases[0].path)]
    assert "have the id 's01'" in refusal(SlideDataset, twice, 4)


# ---- looking at every slide before training


def test_a_cohort_is_checked_at_a_spacing(cases):
    assert 'spacing of a dataset is None' in refusal(check_cohort, cases, progress=False)


def white_slide(path):
    white = pyvips.Image.black(90, 90, bands=3).copy(interpretation='srgb').linear(0, 255)
    white.cast('uchar').tiffsave(str(path), xres=250, yres=250)


def test_all_bad_slides_are_named(folder, tmp_path):
    "One is truncated, one is text, one is white, one has no spacing, one is missing."
    spoilt = tmp_path / 'spoilt'
    shutil.copytree(folder, spoilt)
    slides = spoilt / 'slides'
    (slides / 's01.tiff').write_bytes((slides / 's01.tiff').read_bytes()[:900])
    (slides / 's02.tiff').write_text('these are not the pixels you are looking for')
    white_slide(slides / 's03.tiff')
    pyvips.Image.new_from_file(str(slides / 's04.tiff')).pngsave(str(slides / 'flat.png'))
    cases = read_manifest(spoilt / 'manifest.csv')
    cases[4] = replace(cases[4], path=slides / 'flat.png')
    (slides / 's05.tiff').unlink()
    text = refusal(check_cohort, cases, 4, progress=False)
    for part in ('5 of 12', 's01', 's02', 's03', 's04', 's05', 'spacing', 'tissue'):
        assert part in text, part


def test_the_check_fills_the_cache(cases):
    checked = check_cohort(cases, 4, (80, 64), progress=False, workers=2, cache=10**8)
    assert len(checked.kept) == len(cases)


def test_the_check_warns_of_a_small_canvas(cases):
    with pytest.warns(UserWarning, match='12 of 12 slides are larger than the canvas of 32 x 32'):
        check_cohort(cases, 4, (32, 32), progress=False)


def test_the_check_warns_of_two_spacings(cases, monkeypatch):
    "Of each file that has two, by what it says."
    look = SlideDataset.look

    def look_and_find_two(data, index):
        data.contradictions[data.cases[index].slide_id] = [f'file {index} says 4 and 8']
        return look(data, index)

    monkeypatch.setattr(SlideDataset, 'look', look_and_find_two)
    with pytest.warns(UserWarning, match='2 of 2 slides have two spacings: file 0 says 4 and 8; '):
        check_cohort(cases[:2], 4, progress=False)


def test_slides_that_are_left_out_are_not_warned_of(cases, recwarn):
    data = SlideDataset(cases[:3], 4)
    for number, case in enumerate(cases[:3]):
        data.contradictions[case.slide_id] = [f'file {number} says 4 and 8']
    left = data.without([cases[0].slide_id])
    check_cohort(left, progress=False)
    (warned,) = [str(each.message) for each in recwarn if 'two spacings' in str(each.message)]
    assert warned.startswith('2 of 2 slides have two spacings: file 1 says 4 and 8; ')


def test_the_check_warns_of_inverted_masks(cases, tmp_path):
    path = tmp_path / 'glass.png'
    with Slide(cases[0].path) as slide:
        tissue, _ = tissue_mask(slide)
    Image.fromarray(~tissue * np.uint8(255)).save(path)
    inverted = [replace(cases[0], mask=path), cases[1]]
    with pytest.warns(UserWarning, match='1 of 2 slides have a mask that looks inverted: .*glass'):
        check_cohort(inverted, 4, progress=False)


def test_a_stain_says_what_is_tissue(cases, tmp_path):
    "What is brown is taken for ink but in immunohistochemistry."
    rgb = np.full((90, 90, 3), 243, np.uint8)
    rgb[20:60, 20:70] = (130, 90, 60)
    write_tiff(rgb, tmp_path / 'brown.tiff', 4.0)
    brown = [replace(cases[0], path=tmp_path / 'brown.tiff', mask=None)]
    assert 'was taken for pen marks' in refusal(check_cohort, brown, 4, progress=False)
    image = check_cohort(brown, 4, progress=False, stain='ihc').read(0)
    assert abs(np.array(image.shape[:2]) - (40, 50)).max() <= 8
    assert "stain is 'x'" in refusal(SlideDataset, brown, 4, stain='x')


@pytest.mark.filterwarnings('ignore:.*larger than the canvas')
def test_what_is_cropped_of_a_part_is_that_of_its_slides(cases):
    part = check_cohort(cases[:2], 4, (32, 32), progress=False).part('train')
    assert cropped(part) == cropped(check_cohort(cases[:2], 4, (32, 32), progress=False))


def test_slides_that_fit_but_not_when_turned(cases):
    "Turned by 45 degrees they need more, and have it in what is said to hold them."
    fits = check_cohort(cases[:2], 4, (64, 64), progress=False)
    assert cropped(fits) is None
    text = turned_out(fits, Augmentation())
    assert '2 of 2 slides beyond' in text
    sides = text.split('one of ')[1].split(' holds')[0].split(' x ')
    size = tuple(int(side) for side in sides)
    turn = Augmentation(elastic=0, hue=0, saturation=0, brightness=0)
    assert turned_out(check_cohort(cases[:2], 4, size, progress=False), turn) is None

    def tissue_in(canvas, epoch):
        image = SlideDataset(cases[:1], 4, canvas, turn)[0, epoch]['image']
        return (image < 200).any(0).sum().item()

    smallest = min(tissue_in(size, epoch) for epoch in range(20))
    assert smallest > 0.98 * max(tissue_in((256, 256), epoch) for epoch in range(20))


@pytest.mark.parametrize('augment', [None, flips])
def test_only_an_augmentation_turns_slides_out(cases, augment):
    assert turned_out(check_cohort(cases[:2], 4, (64, 64), progress=False), augment) is None


def test_without_a_canvas_nothing_is_lost(cases):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = check_cohort(cases[:2], 4, progress=False, augment=Augmentation())
    assert cropped(data) is None and turned_out(data, Augmentation()) is None


# ---- exceptions as one line


def test_one_line():
    assert message_lines(KeyError()) == ['KeyError']
    assert one_line(ValueError('a\n  b\n')) == 'a b'
    wrapped = (
        'Caught InputError in DataLoader worker process 0.\nTraceback:\n  x\ncore.InputError: s'
    )
    assert one_line(RuntimeError(wrapped)) == 's'


def test_worker_died():
    assert worker_died(RuntimeError('DataLoader worker (pid 7) is killed by signal'))
    assert not worker_died(RuntimeError('no memory')) and not worker_died(None)


# ---- the order of slides


def test_the_smaller_class_is_drawn_as_often_as_the_larger():
    sampler = EpochSampler([0] * 3 + [1] * 10, seed=5)
    first = [index for index, _ in sampler]
    counts = np.bincount(first)
    assert counts[3:].tolist() == [1] * 10
    assert sorted(counts[:3]) == [3, 3, 4]
    assert first == [index for index, _ in sampler]
    sampler.set_epoch(1)
    assert [index for index, _ in sampler] != first


def test_ranks_share_an_epoch():
    whole = list(EpochSampler([0] * 3 + [1] * 10, seed=5))
    ranks = [EpochSampler([0] * 3 + [1] * 10, seed=5, rank=rank, ranks=3) for rank in range(3)]
    assert sorted(key for rank in ranks for key in rank) == sorted(whole)
    assert [len(rank) for rank in ranks] == [7, 7, 6]


def test_an_epoch_continues_where_it_was_interrupted():
    sampler = EpochSampler([0] * 3 + [1] * 10, seed=5)
    whole = list(sampler)
    sampler.set_epoch(0, start=4)
    assert list(sampler) == whole[4:] and len(sampler) == len(whole) - 4
    sampler.set_epoch(0, start=99)
    assert list(sampler) == [] and len(sampler) == 0


def test_some_classes_are_oversampled():
    assert len(EpochSampler([0] * 3 + [1] * 10 + [2] * 4, oversample=(0,))) == 24


def test_without_shuffling_the_order_is_that_of_the_cases():
    sampler = EpochSampler([1, 0, 1], oversample=False, shuffle=False)
    assert [index for index, _ in sampler] == [0, 1, 2]
    sampler = EpochSampler([1, 0, 1, 1], shuffle=False)
    assert [index for index, _ in sampler] == [0, 1, 1, 1, 2, 3]


def test_no_slides():
    assert list(EpochSampler([])) == [] and len(EpochSampler([])) == 0


@pytest.mark.parametrize(
    'oversample, length',
    [
        (True, 4),
        (False, 3),
        (0, 4),
        (np.array([0, 1]), 4),
        (None, 3),
        (np.True_, 4),
        (np.False_, 3),
    ],
)
def test_forms_of_oversample(oversample, length):
    assert len(EpochSampler([0, 1, 1], oversample=oversample)) == length


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(oversample='x'), "oversample 'x'"),
        (dict(oversample=['x']), "oversample ['x']"),
        (dict(oversample=(7,)), 'no slide of label 7'),
        (dict(rank=0.5, ranks=2), 'rank and ranks'),
        (dict(rank=2, ranks=2), 'rank 2 is none of 2 ranks'),
        (dict(labels=['a', 'b']), 'one number a slide'),
        (dict(labels=[0, 1, math.nan]), 'slide 2 has no label'),
        (dict(labels=[0, None]), 'slide 1 has no label'),
        (dict(seed=-1), 'is no seed'),
    ],
)
def test_bad_settings_of_a_sampler_are_refused(settings, says):
    assert says in refusal(EpochSampler, **{'labels': [0, 1], **settings})


@pytest.mark.parametrize('start', [-1, 0.5, None])
def test_a_bad_start_is_refused(start):
    assert 'start' in refusal(EpochSampler([0, 1]).set_epoch, 0, start)


# ---- loaders


def test_a_record_stays_as_it_is(cases):
    data = SlideDataset(cases[:2], 4, augment=Augmentation())
    for index, item in enumerate(slide_loader(data)):
        assert json.loads(json.dumps(item['record'])) == data[index]['record']
        assert item['color'] == data[index]['color']


def test_slides_to_train_on_need_labels(cases):
    data = SlideDataset([replace(cases[0], label=None), *cases[1:]], 4)
    assert 'have no label; leave them out: s00' in refusal(slide_loader, data, train=True)
    assert len(slide_loader(data)) == len(cases)


def test_several_numbers_are_no_classes(cases):
    data = SlideDataset([replace(case, label=(case.label, 1.0)) for case in cases], 4)
    assert 'oversample=False' in refusal(slide_loader, data, train=True)
    loader = slide_loader(data, train=True, oversample=False)
    assert sorted(index for index, _ in loader.sampler) == list(range(len(cases)))


def test_workers_give_the_same_slides_in_the_same_order(cases):
    data = SlideDataset(cases[:6], 4, (80, 64), augment=flips)
    loaders = [slide_loader(data, train=True, seed=1, workers=workers) for workers in (0, 2)]
    for loader in loaders:
        loader.sampler.set_epoch(2)
    here, apart = map(list, loaders)
    assert len(here) == 6 and here[0]['image'].shape == (3, 80, 64)
    for one, other in zip(here, apart, strict=True):
        assert one['slide_id'] == other['slide_id']
        assert torch.equal(one['image'], other['image'])


# ---- patches and statistics


def test_small_images_are_padded_for_patches(cases):
    assert sample_patches(SlideDataset(cases, 4), 1, 128).shape == (1, 3, 128, 128)


def test_patches_that_cannot_be_taken(cases):
    assert 'no slide' in refusal(sample_patches, SlideDataset([], 4))
    assert 'at least 1' in refusal(sample_patches, SlideDataset(cases, 4), 0)


def test_statistics_over_tissue_are_those_of_its_pixels(cases):
    data = SlideDataset(cases, 4)
    chosen = []
    for index in range(len(data)):
        rgb, (mask, rows, columns) = data.look(index)
        chosen.append(rgb[mask[rows[:, None], columns]])
    pixels = np.concatenate(chosen) / 255
    mean, std = channel_statistics(data, progress=False)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_statistics_of_nothing_are_refused():
    assert 'no pixels' in refusal(channel_statistics, SlideDataset([], 4), progress=False)
