"Bags of patches: where patches lie, what is cut, and which are positive."

import numpy as np
import pytest
import torch

from streaming_pathology.core import InputError
from streaming_pathology.mil.bags import Bag, BagDataset, PatchGrid, tissue_after
from streaming_pathology.slides.augment import STEP, Augmentation, augment, pixels
from streaming_pathology.slides.cohorts import Case, tiny_cohort
from streaming_pathology.slides.datasets import slide_loader
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import paint_biopsy
from streaming_pathology.slides.tissue import tissue_box

ROWS, COLUMNS = 20, 30  # of a coarse mask
IMAGE = (ROWS * STEP - 7, COLUMNS * STEP - 5)


@pytest.fixture
def tissue():
    return np.random.default_rng(0).random((ROWS, COLUMNS)) < 0.3


def share_in_loops(tissue, top, left, factor, size=64):
    "The share of a patch that is tissue, counted cell by cell."
    side = size * factor
    rows = [i for i in range(ROWS) if top <= i * STEP < top + side]
    columns = [j for j in range(COLUMNS) if left <= j * STEP < left + side]
    return tissue[rows][:, columns].mean()


# ---- the grid


@pytest.mark.parametrize(
    'grid',
    [PatchGrid(64), PatchGrid(64, 24, 0.35), PatchGrid(64, 64, 0, (1, 2, 3))],
    ids=['plain', 'overlapping', 'magnifications'],
)
def test_patches_lie_in_the_image_and_have_enough_tissue(grid, tissue):
    positions = grid.positions(IMAGE, tissue)
    assert len({*map(tuple, positions)}) == len(positions)
    for top, left, factor in positions:
        assert share_in_loops(tissue, top, left, factor) >= max(grid.tissue, 1e-9)
        assert top + 64 * factor <= IMAGE[0]
        assert left + 64 * factor <= IMAGE[1]


def test_a_grid_covers_the_image():
    covered = np.zeros(IMAGE, bool)
    for top, left, _ in PatchGrid(64, 50, 0).positions(IMAGE, np.ones((ROWS, COLUMNS), bool)):
        covered[top : top + 64, left : left + 64] = True
    assert covered.all()


def test_where_no_patch_has_enough_tissue_it_is_the_one_with_the_most(tissue):
    positions = PatchGrid(64, tissue=0.9).positions(IMAGE, tissue)
    assert len(positions) == 1
    shares = [share_in_loops(tissue, *p) for p in PatchGrid(64, tissue=0).positions(IMAGE, tissue)]
    assert share_in_loops(tissue, *positions[0]) == max(shares)


def test_without_tissue_there_is_no_patch(tissue):
    assert PatchGrid(64).positions(IMAGE, tissue & False).shape == (0, 3)


def test_an_image_as_large_as_a_patch_has_one():
    assert PatchGrid(64).positions((64, 64), np.ones((4, 4), bool)).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    'options',
    [
        dict(size=16),
        dict(size=64.0),
        dict(stride=0),
        dict(stride=300),
        dict(tissue=2),
        dict(factors=()),
        dict(factors=(0,)),
        dict(factors=(1, 1)),
        dict(factors=(0.5,)),
    ],
    ids=str,
)
def test_a_grid_that_cannot_be_is_refused(options):
    with pytest.raises(InputError):
        PatchGrid(**options)


# ---- bags


@pytest.fixture(scope='module')
def painted():
    return paint_biopsy((400, 900), spacing=2.0, tumour_fraction=0.3, seed=5)


@pytest.fixture(scope='module')
def folder(painted, tmp_path_factory):
    "A folder with a painted biopsy, and the mask of its classes."
    folder = tmp_path_factory.mktemp('bags')
    write_tiff(painted.image, folder / 'biopsy.tiff', 2.0)
    write_tiff(painted.mask, folder / 'truth.tiff', 2.0, nearest=True)
    return folder


def dataset(folder, label=1, annotation=None, **options):
    options = dict(grid=PatchGrid(64)) | options
    case = Case('biopsy', label, folder / 'biopsy.tiff', annotation=annotation)
    return BagDataset([case], 2.0, **options)


def rotated(folder, **options):
    return dataset(folder, augment=Augmentation(rotate=30), **options)


def geometry_of(item):
    "The record of an augmentation without its changes of colour."
    return item['record'] | dict(hue=0.0, saturation=1.0, brightness=1.0, stain=[0.0] * 3)


def augmented_mask(mask, item):
    "A mask (h, w) augmented as a picture."
    picture = np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255
    shape = item['image'].image.shape[1:]
    return pixels(augment(picture, geometry_of(item), shape, (0, 0, 0)))[0] > 127


def test_another_process_reads_the_same_patches(folder):
    bag = rotated(folder)[0, 3]['image']
    loader = slide_loader(rotated(folder), workers=1)
    loader.sampler.set_epoch(3)
    away = next(iter(loader))['image']
    assert torch.equal(away.patches(), bag.patches())


def test_patches_are_parts_of_the_image(folder):
    bag = rotated(folder)[0, 3]['image']
    assert torch.equal(bag.patches(bag.positions[[2, 0]]), bag.patches()[[2, 0]])
    assert bag.patches([]).shape == (0, 3, 64, 64)
    assert torch.equal(bag.patches(bag.positions[1].tolist()), bag.patches()[1:2])
    for patch, (top, left, _) in zip(bag.patches(), bag.positions.tolist()):
        assert torch.equal(patch, bag.image[:, top : top + 64, left : left + 64])


def test_a_magnification_is_a_mean_of_pixels(folder):
    bag = dataset(folder, grid=PatchGrid(64, factors=(1, 2, 4)))[0]['image']
    assert sorted({*bag.positions[:, 2].tolist()}) == [1, 2, 4]
    for patch, (top, left, factor) in zip(bag.patches(), bag.positions.tolist()):
        side = 64 * factor
        part = bag.image[:, top : top + side, left : left + side].double()
        mean = part.reshape(3, 64, factor, 64, factor).mean((2, 4))
        assert (patch.double() - mean).abs().max() <= 0.5


def test_a_bag_knows_the_shape_of_its_image():
    image, positions = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.tensor([[0, 0, 1]])
    assert Bag(image, positions, 32).shape == (40, 50)
    assert Bag(image, positions, 32, shape=(20, 30)).shape == (20, 30)
    assert len(Bag(image, positions, 32)) == 1


def test_a_slide_smaller_than_a_patch_is_a_bag_of_one_on_its_own_background(tmp_path):
    slide = tiny_cohort(tmp_path / 'tiny', n=2).parent / 'slides/s00.tiff'
    small = BagDataset([Case('s', 0, slide)], 4.0, grid=PatchGrid(256))
    bag = small[0]['image']
    assert bag.positions.tolist() == [[0, 0, 1]]
    assert bag.image.shape == (3, 256, 256)
    assert bag.image[:, -1, -1].tolist() == [255] * 3
    assert max(bag.shape) < 256
    part = small.part('', augment=Augmentation())
    assert (type(part), part.grid, len(part)) == (BagDataset, small.grid, 1)


@pytest.mark.parametrize('options', [dict(canvas=True), dict(augment=lambda x, rng: x)])
def test_what_no_bag_can_be_made_of_is_refused(folder, options):
    with pytest.raises(InputError):
        dataset(folder, **options)


# ---- tissue after augmentation


@pytest.mark.parametrize('epoch', range(4))
def test_tissue_is_where_an_augmented_mask_has_it(folder, epoch):
    data = rotated(folder)
    rgb, where = data.seen(0)
    mask, row, column = where
    item = data[0, epoch]
    expected = augmented_mask(mask[row[:, None], column], item)
    found = tissue_after(where, rgb.shape[:2], expected.shape, item['record'])
    assert found.shape == expected[::STEP, ::STEP].shape
    # half of what lies on the border
    assert (found != expected[::STEP, ::STEP]).mean() < 0.01


def test_tissue_of_an_image_that_is_cropped_and_padded(folder):
    data = dataset(folder, size=(160, 1000))
    rgb, where = data.seen(0)
    mask, row, column = where
    height, width = rgb.shape[:2]
    left, top = (1000 - width) // 2, (height - 160) // 2
    expected = np.zeros((160, 1000), bool)
    expected[:, left : left + width] = mask[row[:, None], column][top : top + 160]
    found = tissue_after(where, rgb.shape[:2], (160, 1000))
    assert np.array_equal(found, expected[::STEP, ::STEP])
    assert data[0]['image'].shape == (160, 1000)


# ---- annotations


def annotated(folder, **options):
    options = dict(grid=PatchGrid(64, stride=32), classes=(3,), draws=12) | options
    return rotated(folder, annotation=folder / 'truth.tiff', **options)


@pytest.mark.parametrize('epoch', range(4))
def test_labels_of_patches_are_those_of_an_augmented_mask(folder, painted, epoch):
    "What is called positive is so, and what is called negative is free of it, but for its border."
    data = annotated(folder)
    rgb, _ = data.seen(0)
    top, left, height, width = tissue_box(Slide(folder / 'biopsy.tiff'), 2.0)
    truth = (painted.mask == 3)[top : top + height, left : left + width]
    assert truth.shape == rgb.shape[:2]
    item = data[0, epoch]
    bag = item['image']
    expected = augmented_mask(truth, item)
    for (top, left, _), positive in zip(*bag.learns):
        share = expected[top : top + 64, left : left + 64].mean()
        if positive:
            assert share > 0.05
        else:
            assert share < 0.01
    assert torch.equal(bag.learns[0], data[0, epoch]['image'].learns[0])


def test_each_epoch_draws_other_patches(folder):
    data = annotated(folder)
    assert not torch.equal(data[0, 1]['image'].learns[0], data[0, 2]['image'].learns[0])


def test_a_negative_slide_needs_no_annotation(folder):
    bag = dataset(folder, label=0, classes=(3,))[0]['image']
    assert bag.learns[1].sum() == 0


def test_where_there_are_fewer_patches_than_asked_for_all_certain_ones_learn(folder):
    data = dataset(folder, annotation=folder / 'truth.tiff', classes=(3,), draws=1000)
    bag = data[0]['image']
    assert len(bag.learns[0]) < len(bag)
    assert 0 < bag.learns[1].mean() < 1


@pytest.mark.parametrize(
    'label, annotation, classes, message',
    [
        (1, None, (3,), 'has no annotation'),
        (1, 'truth.tiff', (9,), 'is positive, and nothing in'),
        (0, 'truth.tiff', (1,), 'truth.tiff is of 1 (it holds 0, 1, 2, 3)'),
    ],
)
def test_an_annotation_that_contradicts_the_label_is_refused(
    folder, label, annotation, classes, message
):
    path = annotation and folder / annotation
    with pytest.raises(InputError) as found:
        dataset(folder, label, path, classes=classes)[0]
    assert message in str(found.value)


def test_a_mask_that_is_none_is_refused(folder, painted, tmp_path):
    for image, message in ((painted.image, 'has colours'), (painted.mask[:50], 'does not fit')):
        write_tiff(image, tmp_path / 'bad.tiff', 2.0)
        with pytest.raises(InputError, match=message):
            dataset(folder, annotation=tmp_path / 'bad.tiff', classes=(3,))[0]
