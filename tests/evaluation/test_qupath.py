"Where a map lies on its slide, and the regions in which it is above a threshold."

import json

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from scipy import ndimage

from streaming_pathology.core import InputError
from streaming_pathology.evaluation.qupath import (
    Field,
    as_geojson,
    field_of,
    region_rows,
    regions,
    signed_area,
    whole_map,
    write_exports,
)
from streaming_pathology.slides.cohorts import Case
from streaming_pathology.slides.datasets import SlideDataset
from streaming_pathology.slides.readers import write_tiff
from streaming_pathology.slides.slides import Slide
from streaming_pathology.slides.synthetic import paint_biopsy

FLAT = Field((1000, 1000), 0.5, (100, 200), (10, 10))


@pytest.fixture(scope='module')
def slide(tmp_path_factory):
    "A slide at 2 microns with a biopsy on it."
    path = tmp_path_factory.mktemp('slide') / 's.tiff'
    pixels = np.full((700, 900, 3), 245, np.uint8)
    pixels[200:500, 300:720] = paint_biopsy((300, 420), 2.0, tumour_fraction=0.3, seed=3).image
    write_tiff(pixels, path, 2.0)
    return path


@pytest.fixture
def heat():
    "A block with a hole, and one cell alone."
    heat = np.zeros((12, 20))
    heat[2:7, 3:9] = 1
    heat[4, 5] = 0
    heat[9, 15] = 0.8
    return heat


# ---- where a map lies


@pytest.mark.parametrize(
    'size, least_equal',
    [
        (None, 1.0),
        ((96, 400), 0.98),  # cropped along one side and padded along the other
        ((400, 96), 0.98),
    ],
)
def test_the_image_lies_where_its_field_says(slide, size, least_equal):
    data = SlideDataset([Case('s', 1, slide)], 4.0, size)
    image = data.image(0).permute(1, 2, 0).numpy().astype(int)
    height, width = image.shape[:2]
    field = field_of(data, 0, (height, width), (height / 16, width / 16))
    assert np.allclose(field.cell, (32, 32))
    x, y = (round(float(position) / 2) for position in field.at(0, 0))
    image = image[max(-y, 0) :, max(-x, 0) :]  # what is padded may lie outside of the slide
    pixels = Slide(slide).read(4.0)[max(y, 0) :, max(x, 0) :]
    height, width = np.minimum(image.shape[:2], pixels.shape[:2])
    image, pixels = image[:height, :width], pixels[:height, :width].astype(int)
    is_tissue = pixels.min(-1) < 230
    is_equal = abs(pixels - image).mean(-1) < 3
    assert is_equal[is_tissue].mean() >= least_equal


# ---- regions


def test_a_block_with_a_hole_and_a_single_cell(heat):
    block, dot = regions(heat, FLAT, 0.5)
    assert len(block.rings) == 2 and len(dot.rings) == 1
    assert block.highest == 1.0
    assert np.allclose(block.rings[0].min(0), [230, 120])
    assert np.allclose(block.rings[0].max(0), [290, 170])
    assert dot.peak == (355.0, 195.0)
    assert abs(block.area - (60 * 50 - 4 * 12.5 - 50) * 0.25) < 1
    assert abs(dot.area - 2 * (10 * 0.375) ** 2 * 0.25) < 0.01


def test_rings_are_closed_and_holes_turn_the_other_way(heat):
    block, dot = regions(heat, FLAT, 0.5)
    assert signed_area(block.rings[0]) > 0 > signed_area(block.rings[1])
    for ring in (*block.rings, *dot.rings):
        assert (ring[0] == ring[-1]).all()


def test_small_regions_are_left_out(heat):
    assert len(regions(heat, FLAT, 0.5, min_area_um2=20)) == 1
    assert regions(heat, FLAT, 2) == []


def test_regions_at_the_border_are_closed_and_corners_do_not_join():
    heat = np.zeros((4, 5))
    heat[0, 0] = heat[3, 4] = heat[1, 1] = 1
    assert len(regions(heat, FLAT, 0.5)) == 3


@pytest.mark.parametrize('seed', range(30))
def test_each_cell_belongs_to_the_region_that_holds_its_middle(seed):
    heat = ndimage.gaussian_filter(np.random.default_rng(seed).random((20, 26)), 1.5)
    heat -= heat.min()
    threshold = np.quantile(heat, 0.7)
    rows, columns = np.mgrid[:20, :26]
    x, y = FLAT.at(rows + 0.5, columns + 0.5)
    middles = np.stack([x.ravel(), y.ravel()], 1)
    times = np.zeros(heat.shape, int)  # that a middle lies in a region
    for region in regions(heat, FLAT, threshold):
        for ring in region.rings:
            inside = Outline(ring).contains_points(middles).reshape(heat.shape)
            times += inside * int(np.sign(signed_area(ring)))
    assert np.array_equal(times, (heat > threshold).astype(int))


@pytest.mark.parametrize('threshold', [0, -1, np.nan, np.inf])
def test_thresholds_are_above_zero(heat, threshold):
    with pytest.raises(InputError, match='has to be above 0'):
        regions(heat, FLAT, threshold)


# ---- files


def test_geojson_is_json_and_ids_are_those_of_the_regions(heat):
    found = regions(heat, FLAT, 0.5)
    collection = as_geojson(found, 'tumour', slide_id='s')
    assert json.loads(json.dumps(collection)) == collection
    assert collection == as_geojson(regions(heat, FLAT, 0.5), 'tumour', slide_id='s')
    other = as_geojson(found, 'tumour', slide_id='t')
    ids = {f['id'] for part in (collection, other) for f in part['features']}
    assert len(ids) == 4


def test_a_whole_map_has_the_cell_below_each_pixel():
    heat = np.arange(1, 13.0).reshape(3, 4)
    field = Field((60, 50), 0.5, (-10, 20), (10, 10))  # its first row lies above the slide
    whole, spacing = whole_map(heat, field)
    assert spacing == 5.0
    expected = np.zeros((6, 5))
    expected[:2, 2:] = heat[1:, :3]
    assert np.array_equal(whole, expected)
    smaller, spacing = whole_map(heat, field, max_side=3)
    assert smaller.shape == (3, 3) and spacing == 10.0


def test_exports_are_written_and_their_rows_returned(heat, tmp_path):
    image = np.full((120, 200, 3), 200, np.uint8)
    rows = write_exports(tmp_path, 's', image, heat, FLAT, 0.5, 1.0, 'tumour', 20)
    assert rows == region_rows(regions(heat, FLAT, 0.5, 20), 's')
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.*'))
    assert written == ['geojson/s.geojson', 'overlay/s.png', 'tiff/s.tiff']
