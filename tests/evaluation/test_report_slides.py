"The slides of a report: pictures, maps, cards, pages, and errors with their categories."

import json

import numpy as np
import pytest
from refusals import refusal
from reports import Page

from streaming_pathology.evaluation.evaluation import Prediction
from streaming_pathology.evaluation.heatmaps import FORMAT, save_heatmap
from streaming_pathology.evaluation.report_inputs import read_run
from streaming_pathology.evaluation.report_slides import (
    Maps,
    Review,
    ShownSlide,
    SlideImage,
    category_tables,
    common_vmax,
    error_section,
    gallery_section,
    page_of_slide,
    read_maps,
    slide_file,
    write_image,
)
from streaming_pathology.evaluation.review import Wrong, errors_of
from streaming_pathology.evaluation.viewer import viewer_files
from streaming_pathology.io import write_whole

ABOUT = dict(format=FORMAT, model='0', method='occlusion', region_threshold=0.5)
SCALE = dict(seen=[360, 520], step=32, top=1.0)
EVIL = '"><script>alert(1)</script>\''


@pytest.fixture(scope='module')
def run(small):
    return read_run(small)


@pytest.fixture
def maps(tmp_path):
    "A folder with a map of one slide, as sp_heatmap writes it."
    folder = tmp_path / 'maps'
    write_whole(folder / 'heatmaps.json', json.dumps(ABOUT))
    save_heatmap(folder / 'maps/biopsy_000.npy', np.random.default_rng(0).random((12, 17)))
    write_whole(folder / 'maps/biopsy_000.json', json.dumps(SCALE))
    return folder


@pytest.fixture
def slide(run, tmp_path):
    "A slide with its files."
    prediction = next(each for each in run.predictions if each.slide_id == 'biopsy_000')
    slide = ShownSlide(1, 'biopsy_000', prediction)
    slide.image = write_image(run, slide, tmp_path, 1.0, [])
    return slide


def page_of(section):
    (contents,) = section.contents
    return Page(str(contents))


# ---- files


def test_file_of_a_slide(run):
    assert slide_file(run.folder, 'images', 'sample', '.jpg') == run.folder / 'images/sample.jpg'


@pytest.mark.parametrize('name', ['../heatmaps/sample', 'no', 'x' * 999, '\0'])
def test_no_file_outside_of_its_folder_or_that_is_not_there(run, name):
    assert slide_file(run.folder, 'images', name, '.jpg') is None
    assert slide_file(run.folder, 'images', name, '.npy') is None


def test_files_of_a_slide(slide, tmp_path):
    assert slide.image.picture.size == (360, 520)
    assert [layer.picture for layer in slide.layers] == [
        '../pictures/001-common.webp',
        '../pictures/001-own.webp',
    ]
    for layer in slide.layers:
        assert (tmp_path / 'pictures' / layer.picture).is_file()
    assert slide.layers[1].outline
    assert [layer.shown for layer in slide.layers] == [True, False]
    assert bool(slide.image.tiles) == bool(viewer_files())


def test_a_slide_without_an_image(run, tmp_path):
    slide = ShownSlide(1, 'none', Prediction('none', 1.0, 'test', 0.5))
    assert write_image(run, slide, tmp_path, 1.0, []) is None
    assert not slide.layers and not [*tmp_path.iterdir()]


# ---- maps


def test_common_scale(run):
    heats = [np.load(path) for path in sorted((run.folder / 'heatmaps').glob('*.npy'))]
    percentile = np.percentile(np.concatenate([heat.ravel() for heat in heats]), 99.5)
    assert common_vmax(run, run.predictions) == pytest.approx(percentile)
    assert common_vmax(run, []) == 1


def test_common_scale_where_background_is_skipped(run):
    "Zeros around tissue do not count."
    heats = [np.load(path) for path in sorted((run.folder / 'heatmaps').glob('*.npy'))]
    values = np.concatenate([heat.ravel() for heat in heats])
    run.settings['skip_background'] = True
    try:
        expected = np.percentile(values[values > 0], 99.5)
        assert common_vmax(run, run.predictions) == pytest.approx(expected)
    finally:
        del run.settings['skip_background']


def test_layer_of_a_map(run, maps, slide, tmp_path):
    of_method, picture = read_maps(maps, run), slide.image.picture
    layer = of_method.layer('biopsy_000', picture, tmp_path, 'pictures/001-0.webp', True)
    assert (tmp_path / 'pictures/001-0.webp').is_file()
    assert layer.name == 'occlusion' and layer.picture == '../pictures/001-0.webp'
    assert layer.extent == (12 * 32 / 360, 17 * 32 / 520)
    assert of_method.layer('b', picture, tmp_path, 'pictures/002-0.webp', True) is None


@pytest.mark.parametrize(
    'scale, says',
    [
        (SCALE | dict(seen=[36, 52]), 'of the same network'),
        (dict(seen=5), 'does not say where'),
        (SCALE | dict(seen=[1, 2, 3]), 'does not say where'),
        (SCALE | dict(step=0), 'does not say where'),
        (SCALE | dict(top=float('nan')), 'does not say where'),
    ],
)
def test_maps_of_another_image_are_refused(run, maps, slide, tmp_path, scale, says):
    write_whole(maps / 'maps/biopsy_000.json', json.dumps(scale))
    given = 'biopsy_000', slide.image.picture, tmp_path, 'pictures/001-0.webp', True
    assert says in refusal(read_maps(maps, run).layer, *given)


@pytest.mark.parametrize(
    'change', [dict(region_threshold=float('nan')), dict(method='magic'), dict(format='another')]
)
def test_damaged_folders_of_maps_are_refused(run, maps, change):
    write_whole(maps / 'heatmaps.json', json.dumps(ABOUT | change))
    assert 'maps' in refusal(read_maps, maps, run)


def test_maps_of_a_former_version_are_read(run, maps):
    former = {name: value for name, value in ABOUT.items() if name != 'region_threshold'}
    write_whole(maps / 'heatmaps.json', json.dumps(former))
    assert 'cannot be read' in refusal(read_maps, maps, run)
    write_whole(maps / 'heatmaps.json', json.dumps(former | dict(threshold=0.7)))
    assert read_maps(maps, run).threshold == 0.7


def test_maps_of_another_network_are_refused(part, maps):
    table = part / 'predictions.csv'
    head, *lines = table.read_text().splitlines()
    table.write_text('\n'.join([f'{head},model', *(f'{line},abc' for line in lines)]) + '\n')
    run = read_run(part)
    assert 'another network' in refusal(read_maps, maps, run)
    write_whole(maps / 'heatmaps.json', json.dumps(ABOUT | dict(model='abcdef')))
    assert read_maps(maps, run) == Maps(maps, 'occlusion', 0.5)


# ---- gallery


def test_card_of_a_slide(run, slide):
    page = page_of(gallery_section(run, [slide], 200))
    card = page.all('li')[0]
    assert card['data-name'] == 'biopsy_000' and card['class'].startswith('card ')
    images = [image['src'] for image in page.all('img')]
    assert images == [
        'pictures/001.jpg',
        'pictures/001-common.webp',
        'pictures/001-own.webp',
    ]
    assert page.all('a')[0]['href'] == 'slides/001.html'
    assert len(page.all('fieldset')) == 4


def test_names_in_the_gallery_are_escaped(run):
    slide = ShownSlide(1, EVIL, Prediction(EVIL, 1.0, 'test', 0.5))
    page = page_of(gallery_section(run, [slide], 200))
    assert not page.all('script') and 'no picture' in page.texts
    assert page.texts.count(EVIL) == 1 and page.all('li')[0]['data-name'] == EVIL


def test_gallery_without_slides(run):
    assert 'There are no labelled slides.' in page_of(gallery_section(run, [], 200)).text
    assert 'No slide was asked for' in page_of(gallery_section(run, [], 0)).text


def test_gallery_of_some_of_the_slides(run, slide):
    text = page_of(gallery_section(run, [slide], 1)).text
    assert '4 slides are too many for one page: these are the 1 slide with the largest' in text


# ---- pages


def test_page_of_a_slide_leads_to_its_neighbours(run, slide):
    neighbours = []
    for number in (1, 3):
        shown = ShownSlide(number, EVIL, slide.prediction, slide.image)
        neighbours.append(shown)
    slide.number = 2
    slides = [neighbours[0], slide, neighbours[1]]
    page = Page(page_of_slide(run, slide, slide.image, slides, None))
    assert [link['href'] for link in page.all('a')] == [
        '../index.html#slides',
        '001.html',
        '003.html',
    ]
    assert f'Previous: {EVIL}' in page.texts and f'Next: {EVIL}' in page.texts
    assert 'Toy run · slide 2 of 3' in page.texts
    first = Page(page_of_slide(run, slides[0], slide.image, slides, None))
    assert [link['href'] for link in first.all('a')] == ['../index.html#slides', '002.html']


def test_what_is_said_of_a_slide(run, slide):
    text = Page(page_of_slide(run, slide, slide.image, [slide], None)).text
    assert 'width by height: 520 x 360 pixels, 2.08 x 1.44 mm; the picture has 520 x 360.' in text
    assert 'Over it lie: SmoothGrad, one scale for all slides; SmoothGrad, on its own' in text
    assert 'The first shows where its logit is most sensitive (SmoothGrad).' in text
    slide.image = SlideImage(slide.image.picture)
    text = Page(page_of_slide(run, slide, slide.image, [slide], None)).text
    assert 'There is no map of this slide.' in text


def test_the_verdict_at_another_threshold(run, slide):
    at_none = Page(page_of_slide(run, slide, slide.image, [slide], None)).text
    probability = slide.prediction.probability
    other = probability / 2 if slide.verdict(run.threshold).kind == 'right' else 1.1
    at_other = Page(page_of_slide(run, slide, slide.image, [slide], other)).text
    assert 'the point of maximum accuracy, it is' not in at_none
    assert 'the point of maximum accuracy, it is' in at_other


# ---- errors


def test_tables_of_categories_are_escaped():
    wrong = [Wrong('a', 'false positive', 0.9)]
    (table,) = category_tables({EVIL: (wrong, {'a': EVIL})})
    page = Page(str(table))
    assert f'{EVIL} (1)' in page.texts and EVIL in page.texts and not page.all('script')


def test_errors_have_fields_for_their_categories(toy):
    run = read_run(toy)
    wrong, threshold = errors_of(run.predictions, threshold=0.9)
    assert len(wrong) >= 2
    slides = [ShownSlide(run.numbers[each.slide_id], each.slide_id, each) for each in run.labelled]
    page = page_of(error_section(run, slides, Review(wrong, threshold, {wrong[0].slide_id: EVIL})))
    fields = [field for field in page.all('input') if field.get('class') == 'category']
    assert [field['data-slide'] for field in fields] == [each.slide_id for each in wrong]
    assert [field.get('value') for field in fields] == [EVIL] + [None] * (len(wrong) - 1)
    lists = [element['id'] for element in page.all('datalist')]
    assert lists == ['reasons-0', 'reasons-1'] and {field['list'] for field in fields} <= {*lists}
    assert [button['id'] for button in page.all('button')] == ['save', 'forget']


def test_categories_of_errors_that_are_not_shown_are_kept(toy):
    run = read_run(toy)
    wrong, threshold = errors_of(run.predictions, threshold=0.9)
    review = Review(wrong, threshold, {each.slide_id: 'why' for each in wrong[1:]})
    page = page_of(error_section(run, [], review))
    hidden = [field for field in page.all('input') if field['type'] == 'hidden']
    assert [field['data-slide'] for field in hidden] == [each.slide_id for each in wrong[1:]]
    assert all(field['class'] == 'category' and field['value'] == 'why' for field in hidden)
    assert 'beyond the slides that this page shows' in page.text


def test_without_errors_there_is_nothing_to_save(run):
    page = page_of(error_section(run, [], Review([], 0.5, {})))
    assert not page.all('button') and '0 false positives and 0 false negatives' in page.text
