"Where a map lies on its slide, and the regions in which it is above a threshold."

import json

import numpy as np
import pytest
import shapely
from matplotlib.path import Path as Outline
from scipy import ndimage

from streaming_pathology.core import InputError
from streaming_pathology.evaluation import qupath
from streaming_pathology.evaluation.heatmaps import Grid
from streaming_pathology.evaluation.qupath import (
    Field,
    all_regions,
    as_geojson,
    drawable_regions,
    field_of,
    region_rows,
    regions,
    rounded,
    shown_part,
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
    shape = -(-height // 16), -(-width // 16)  # the last cells may reach beyond the image
    field = field_of(data, 0, Grid.of_cells((height, width), shape, 16))
    assert np.allclose(field.cell, (32, 32)) and field.corner == (0, 0)
    x, y = (round(float(position) / 2) for position in field.at(0, 0))
    image = image[max(-y, 0) :, max(-x, 0) :]  # what is padded may lie outside of the slide
    pixels = Slide(slide).read(4.0)[max(y, 0) :, max(x, 0) :]
    height, width = np.minimum(image.shape[:2], pixels.shape[:2])
    image, pixels = image[:height, :width], pixels[:height, :width].astype(int)
    is_tissue = pixels.min(-1) < 230
    is_equal = abs(pixels - image).mean(-1) < 3
    assert is_equal[is_tissue].mean() >= least_equal


CORNER, PART = (150, 260), (480, 520)  # (top, left) and (height, width) of bounds


def bounds_of(corner, size):
    "The properties by which OpenSlide tells bounds."
    values = dict(y=corner[0], x=corner[1], height=size[0], width=size[1])
    return {f'openslide.bounds-{name}': str(value) for name, value in values.items()}


class Bounded(Slide):
    "A slide with bounds, as MIRAX files have them."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.properties = dict(self.properties) | bounds_of(CORNER, PART)


def test_a_slide_with_bounds_is_counted_from_their_corner(slide, tmp_path, monkeypatch):
    "As QuPath crops it: regions, table and TIFF are of the part within the bounds."
    data = SlideDataset([Case('s', 1, slide)], 4.0)
    size = tuple(data.image(0).shape[1:])
    heat = np.zeros((-(-size[0] // 16), -(-size[1] // 16)), np.float32)
    heat[3, 7] = 1
    grid = Grid.of_cells(size, heat.shape, 16)
    whole = field_of(data, 0, grid)
    monkeypatch.setattr(qupath, 'Slide', Bounded)
    part = field_of(data, 0, grid)
    assert (part.size, part.corner) == (PART, CORNER)
    assert np.allclose(np.add(part.origin, CORNER), whole.origin)
    on_plane = regions(heat, whole, 0.5)[0].peak
    image = np.full((*size, 3), 200, np.uint8)
    (row,) = write_exports(tmp_path, 's', image, heat, part, 0.5, 1.0, grid=grid).rows
    assert abs(int(row['peak_x']) + CORNER[1] - on_plane[0]) < 1
    assert abs(int(row['peak_y']) + CORNER[0] - on_plane[1]) < 1
    collection = json.loads((tmp_path / 'geojson/s.geojson').read_text())
    x, y = np.mean(collection['features'][0]['geometry']['coordinates'][0][:-1], axis=0)
    assert np.allclose([x + CORNER[1], y + CORNER[0]], on_plane, atol=0.2)
    with Slide(tmp_path / 'tiff/s.tiff') as tiff:
        step = round(tiff.spacing / 2.0)
        assert tiff.size == (-(-PART[0] // step), -(-PART[1] // step))
        row, column = np.argwhere(tiff.read(tiff.spacing)[..., 0] > 127).mean(0)
    # the pixel whose middle lies in the cell, which is 32 pixels a side
    assert abs((column + 0.5) * step + CORNER[1] - on_plane[0]) <= 16
    assert abs((row + 0.5) * step + CORNER[0] - on_plane[1]) <= 16


@pytest.mark.parametrize(
    'properties',
    [
        {},
        bounds_of((1, 2), (3, 0)),
        bounds_of((1, 2), ('x', 4)),
        {'openslide.bounds-x': '5', 'openslide.bounds-y': '5'},
    ],
)
def test_without_all_four_bounds_the_whole_plane_is_meant(properties):
    assert shown_part(properties, (700, 900)) == ((0, 0), (700, 900))


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


def polygons_in(collection):
    "All polygons of a GeoJSON text, as shapely reads them."
    read = json.loads(json.dumps(collection))
    shapes = [shapely.geometry.shape(feature['geometry']) for feature in read['features']]
    return shapes, [polygon for shape in shapes for polygon in shapely.get_parts(shape)]


@pytest.mark.parametrize('cell', [0.07, 0.2, 1.7, 16.3])
@pytest.mark.parametrize('seed', range(4))
def test_every_ring_is_valid_after_rounding(seed, cell):
    "Of noise, where many cells touch at corners; what is left out is counted."
    rng = np.random.default_rng(seed)
    heat = ndimage.gaussian_filter(rng.random((40, 50)), rng.choice([0, 0.7, 1.5]))
    heat += rng.choice([0, 1e-7], heat.shape)
    threshold = float(np.quantile(heat, rng.uniform(0.4, 0.9)))
    field = Field((1000, 1000), 0.5, (rng.uniform(0, 99999), rng.uniform(0, 9)), (cell, cell))
    found, n_lost = drawable_regions(heat, field, threshold)
    assert len(found) + n_lost == len(list(all_regions(heat, field, threshold)))
    collection = as_geojson(found)
    shapes, polygons = polygons_in(collection)
    assert len(shapes) == len(found)  # each has a feature
    for shape in shapes:
        assert shape.is_valid, shapely.is_valid_reason(shape)
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.interiors):
            points = list(ring.coords)
            assert points[0] == points[-1] and len(set(points)) == len(points) - 1
            assert shapely.Polygon(ring).area > 0 and ring.is_simple
    if cell > 1:
        areas = [shape.area * field.spacing**2 for shape in shapes]
        assert np.allclose(areas, [region.area for region in found], rtol=0.2, atol=0.5)


def test_regions_that_rounding_empties_are_left_out_and_counted(tmp_path):
    heat = np.zeros((9, 9))
    heat[1, 1] = 1
    heat[4, 4] = heat[7, 7] = 0.5 + 1e-7  # an outline of less than a tenth of a pixel
    found, n_lost = drawable_regions(heat, FLAT, 0.5)
    assert (len(found), n_lost) == (1, 2)
    assert len(as_geojson(regions(heat, FLAT, 0.5))['features']) == 1
    image = np.full((90, 90, 3), 200, np.uint8)
    rows, n_lost = write_exports(tmp_path, 's', image, heat, FLAT, 0.5, 1.0)
    assert (len(rows), n_lost) == (1, 2)


def test_a_region_is_rounded_once(tmp_path, monkeypatch):
    heat = ndimage.gaussian_filter(np.random.default_rng(0).random((30, 30)), 1)
    seen = []

    def counted(region):
        seen.append(id(region))
        return rounded(region)

    monkeypatch.setattr(qupath, 'rounded', counted)
    image = np.full((300, 300, 3), 200, np.uint8)
    rows, n_lost = write_exports(tmp_path, 's', image, heat, FLAT, 0.55, 1.0)
    assert len(rows) > 3
    assert len(seen) == len(set(seen)) == len(rows) + n_lost


def test_a_region_that_rounding_cuts_becomes_several_polygons_of_one_annotation():
    "Two squares that a bridge of a fiftieth of a pixel joins."
    ring = [(0, 0), (9, 0), (9, 4.99), (11, 4.99), (11, 0), (20, 0), (20, 10), (11, 10)]
    ring += [(11, 5.01), (9, 5.01), (9, 10), (0, 10), (0, 0)]
    region = qupath.Region([np.array(ring, float)], 180.0, 1.0, 1.0, (4.0, 4.0))
    assert len(rounded(region)) == 2
    (feature,) = as_geojson([region])['features']
    assert feature['geometry']['type'] == 'MultiPolygon'
    (shape,), _ = polygons_in(dict(features=[feature]))
    assert shape.is_valid and shape.area == 180


def test_holes_stay_and_turn_the_other_way(heat):
    block, _ = regions(heat, FLAT, 0.5)
    ((outer, hole),) = rounded(block)
    assert signed_area(np.array(outer)) > 0 > signed_area(np.array(hole))


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
    assert rows == (region_rows(regions(heat, FLAT, 0.5, 20), 's'), 0)
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.*'))
    assert written == ['geojson/s.geojson', 'overlay/s.png', 'tiff/s.tiff']
