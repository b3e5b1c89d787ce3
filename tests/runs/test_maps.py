"Heatmaps of slides in a folder: the record of each method, and folders of former versions."

import json

import numpy as np
import pytest
import torch
from PIL import Image

from streaming_pathology.core import InputError
from streaming_pathology.engine.canvas import Canvas
from streaming_pathology.evaluation.gradients import smoothgrad
from streaming_pathology.evaluation.heatmaps import METHODS
from streaming_pathology.evaluation.predict import dataset, load_model
from streaming_pathology.runs.maps import MapRun, heatmap_methods
from streaming_pathology.runs.settings import HEATMAP_METHODS, HeatmapSettings
from streaming_pathology.slides.cohorts import Case, tiny_cohort
from streaming_pathology.slides.slides import Slide
from streaming_pathology.training.checkpoints import save_checkpoint
from streaming_pathology.training.models import StreamingClassifier

pytestmark = [
    pytest.mark.usefixtures('small_resnet'),
    pytest.mark.filterwarnings('ignore:slide .* the map is zero everywhere'),
]

# a network that each method fits
FITS = dict.fromkeys(HEATMAP_METHODS, 'avg') | dict(attention='attention', patches='patches')
FEW = dict(n_samples=2, n_steps=2, occlusion_size=64)  # of what a method does many times


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A slide, and networks with random weights."
    folder = tmp_path_factory.mktemp('maps')
    tiny_cohort(folder / 'cohort', 2)
    for name in {*FITS.values(), 'canvas'}:
        torch.manual_seed(0)
        pool = 'attention' if name == 'attention' else 'avg'
        network = dict(arch='resnet18', n_out=1, pool=pool, strip=64)
        card = dict(model=network, spacing=4.0, size=None, amp=None, canvas=name == 'canvas')
        if name == 'patches':
            card['bags'] = dict(size=32, stride=None, tissue=0.1, factors=[1], k=1, batch=8)
        weights = dict(StreamingClassifier(**network).state_dict())
        if name == 'patches':
            weights = {f'network.{key}': value for key, value in weights.items()}
        save_checkpoint(folder / f'{name}.pt', model=weights, settings=card)
    return folder


@pytest.fixture
def drawn(place, tmp_path):
    "A function that draws the slide by a method."

    def draw(method, network=None, **more):
        settings = HeatmapSettings(
            checkpoint=str(place / f'{network or FITS[method]}.pt'),
            slides=str(place / 'cohort/slides/s00.tiff'),
            out=str(tmp_path / 'maps'),
            method=method,
            device='cpu',
            **more,
        )
        settings.check()
        assert MapRun(settings).draw()[2] == []
        return tmp_path / 'maps'

    return draw


def test_every_method_has_a_record_and_words():
    assert tuple(heatmap_methods) == HEATMAP_METHODS
    assert {name: method.words for name, method in heatmap_methods.items()} == METHODS


def test_records_use_the_settings_of_maps():
    "All of the group `map` belong to methods, and no others."
    options = HeatmapSettings.options()
    of_maps = {name for name, each in options.items() if each.metadata['option'].group == 'map'}
    used = set()
    for method in heatmap_methods.values():
        used.update(method.uses)
    assert used == of_maps - {'method'}


@pytest.mark.parametrize('method', HEATMAP_METHODS)
def test_every_method_draws_cells_as_large_as_it_says(place, drawn, method):
    more = {name: value for name, value in FEW.items() if name in heatmap_methods[method].uses}
    folder = drawn(method, **more)
    heat = np.load(folder / 'maps/s00.npy')
    note = json.loads((folder / 'maps/s00.json').read_text())
    assert np.isfinite(heat).all() and heat.min() >= 0
    assert heat.shape == tuple(-(-side // note['step']) for side in note['seen'])
    if heatmap_methods[method].full_color is not None:
        assert note['top'] == heatmap_methods[method].full_color
    assert note['lost'] == 0
    with Slide(place / 'cohort/slides/s00.tiff') as slide:
        assert tuple(note['field']['size']) == slide.size
        pixels = note['step'] * 4.0 / slide.spacing  # of the slide, for a cell at 4 microns
    assert np.allclose(note['field']['cell'], pixels)
    assert Image.open(folder / 'overlay/s00.png').size[0] > 0
    with Slide(folder / 'tiff/s00.tiff') as over, Slide(place / 'cohort/slides/s00.tiff') as slide:
        assert over.spacing > slide.spacing


def test_methods_draw_maps_of_their_own(drawn, tmp_path):
    "None is drawn in place of another."
    maps = {}
    for method in HEATMAP_METHODS:
        if heatmap_methods[method].of_patches:
            continue
        uses = heatmap_methods[method].uses
        more = {name: value for name, value in FEW.items() if name in uses}
        folder = drawn(method, network='attention', **more)
        maps[method] = np.load(folder / 'maps/s00.npy')
        folder.rename(tmp_path / method)
    for method, heat in maps.items():
        for other, heat_of_other in maps.items():
            is_same = heat.shape == heat_of_other.shape and np.allclose(heat, heat_of_other)
            assert is_same == (method == other), (method, other)


@pytest.mark.parametrize(
    ('method', 'network', 'says'),
    [
        ('gradient', 'patches', 'use --method patches'),
        ('attention', 'patches', 'use --method patches'),
        ('patches', 'avg', 'sp_mil'),
        ('attention', 'avg', '--pool attention'),
    ],
)
def test_a_method_that_does_not_fit_the_network_is_refused(drawn, tmp_path, method, network, says):
    with pytest.raises(InputError, match=says):
        drawn(method, network=network)
    assert not (tmp_path / 'maps').exists()


def test_a_setting_of_other_methods_is_refused(drawn):
    with pytest.raises(InputError) as refusal:
        drawn('smoothgrad', occlusion_size=64)
    assert str(refusal.value) == (
        '--occlusion-size has no effect with --method smoothgrad, only with occlusion; remove it'
    )


def test_a_network_that_skips_the_background_is_explained_on_tissue(place, drawn, tmp_path):
    "Dense around it by the same weights; 0 where the canvas has no patches."
    heat = np.load(drawn('gradient', network='canvas', cell=1) / 'maps/s00.npy')
    model, card = load_model(place / 'canvas.pt', 'cpu')
    data = dataset(card, [Case('s00', None, place / 'cohort/slides/s00.tiff')])
    canvas = data.as_input(data.image(0))
    assert isinstance(canvas, Canvas) and canvas.patches
    covered = np.zeros(heat.shape, bool)
    for top, left, pixels in canvas.patches:
        height, width = pixels.shape[1:]
        covered[top : top + height, left : left + width] = True
    dense = smoothgrad(model, canvas.dense(), n=1, noise=0)
    assert not covered.all() and not heat[~covered].any() and dense[~covered].any()
    np.testing.assert_allclose(heat[covered], dense[covered], atol=1e-5 * dense.max())


def test_a_canvas_without_tissue_is_explained_as_an_image(place):
    "As where --size crops to the glass between two pieces."
    model, card = load_model(place / 'canvas.pt', 'cpu')
    data = dataset(card, [Case('s00', None, place / 'cohort/slides/s00.tiff')])
    glass = torch.full((3, 64, 96), 255, dtype=torch.uint8)
    shown = data.as_input(glass)
    assert shown is glass
    assert smoothgrad(model, shown, n=1).shape == (64, 96)


def test_full_color_is_of_tissue(drawn):
    "However much glass lies around it."
    folder = drawn('gradient', network='canvas', cell=1)
    heat = np.load(folder / 'maps/s00.npy')
    full = json.loads((folder / 'maps/s00.json').read_text())['top']
    assert full == pytest.approx(np.percentile(heat[heat > 0], 99.5))
    assert full > np.percentile(heat, 99.5)


def test_other_methods_are_shown_the_whole_image(drawn):
    folder = drawn('activation', network='canvas')
    assert 'skip_background' not in json.loads((folder / 'heatmaps.json').read_text())


def test_maps_of_the_whole_image_are_not_mixed_with_those_on_tissue(drawn):
    "A former version drew them of networks that skip the background, too."
    path = drawn('gradient', network='canvas', cell=8) / 'heatmaps.json'
    values = json.loads(path.read_text())
    assert values.pop('skip_background')
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match='other settings'):
        drawn('gradient', network='canvas', cell=8)


def test_a_folder_of_a_former_version_is_drawn_on(drawn):
    "Its settings have their former names, and its maps stay."
    folder = drawn('gradient', cell=8)
    path = folder / 'heatmaps.json'
    values = json.loads(path.read_text())
    former = dict(region_threshold='threshold', min_area_um2='least', region_class='name')
    former |= dict(cell='place')
    path.write_text(json.dumps({former.get(name, name): value for name, value in values.items()}))
    before = (folder / 'maps/s00.npy').stat().st_mtime_ns
    drawn('gradient', cell=8)
    assert (folder / 'maps/s00.npy').stat().st_mtime_ns == before
    assert json.loads(path.read_text()) == values
    with pytest.raises(InputError, match='other settings'):
        drawn('gradient', cell=4)
