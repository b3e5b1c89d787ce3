"""The report of a made-up run in headless Chromium: no error, no request to anywhere, and its
controls do what they say."""

import csv
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from streaming_pathology.cli.commands import sp_compare
from streaming_pathology.evaluation.heatmaps import save_heatmap
from streaming_pathology.evaluation.report import write_report
from streaming_pathology.evaluation.report_inputs import toy_run
from streaming_pathology.evaluation.review import errors_of, read_categories
from streaming_pathology.evaluation.viewer import save_picture, viewer_files

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))
from npm import package

CHROMIUM = (
    os.environ.get('CHROMIUM')
    or shutil.which('chromium')
    or shutil.which('chromium-browser')
    or shutil.which('google-chrome')
)
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-first-run',
]
N_LABELLED = 15
WIDTH, SPACING = 6144, 0.5  # of the large picture: pixels, and microns per pixel


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "Of sixteen slides, one of which is as large as one of the paper's at a quarter."
    run = toy_run(tmp_path_factory.mktemp('run'), n=N_LABELLED)
    rng = np.random.default_rng(0)
    blocks = rng.integers(150, 256, (64, WIDTH // 64, 3), np.uint8)
    large = np.kron(blocks, np.ones((64, 64, 1), np.uint8))
    save_picture(run / 'images/biopsy_001.jpg', large, SPACING)
    save_heatmap(run / 'heatmaps/biopsy_001.npy', rng.random((64, 96)))
    return write_report(run)


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM:
        pytest.skip('Chromium is not installed: install it, or set CHROMIUM to its path')
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='Playwright is not installed: pip install playwright'
    )
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def watch(page):
    "The errors and the requests of a page, two lists that grow."
    errors, requests = [], []

    def note_failure(request):
        if request.failure != 'net::ERR_ABORTED':
            errors.append(request.url)

    def note_request(request):
        if not request.url.startswith(('data:', 'blob:')):
            requests.append(request.url)

    page.on('console', lambda message: errors.append(message.text))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('requestfailed', note_failure)
    page.on('request', note_request)
    return errors, requests


@pytest.fixture(params=[1280, 375], ids=['wide', 'narrow'])
def page(browser, report, request):
    "The first page of the report; afterwards there was no error, and no request out of its folder."
    viewport = dict(width=request.param, height=800)
    context = browser.new_context(viewport=viewport, accept_downloads=True)
    page = context.new_page()
    errors, requests = watch(page)
    page.width, page.folder, page.requests = request.param, report.parent, requests
    page.goto(report.as_uri())
    yield page
    assert not errors
    inside = report.parent.as_uri() + '/'
    assert [url for url in requests if not url.startswith(inside)] == []
    context.close()


def shown_names(page):
    "The names of the cards that are shown, in order."
    return page.eval_on_selector_all(
        '#labelled .card',
        'cards => cards.filter(card => !card.hidden).map(card => card.dataset.name)',
    )


def numbers_of_cards(page, key):
    "A number of each card, in order: p or error."
    return page.eval_on_selector_all(
        '#labelled .card', f'cards => cards.map(card => +card.dataset.{key})'
    )


def fits(page):
    "Whether nothing lies beyond the right side, and every picture is there."
    width = page.evaluate('document.documentElement.scrollWidth')
    loaded = '[...document.images].every(image => image.complete && image.naturalWidth > 0)'
    return width <= page.width and page.evaluate(loaded)


def violations(page):
    "What axe-core finds that is serious, or worse."
    axe = package('axe-core')['axe.min.js'].decode()
    found = page.evaluate(axe + ';axe.run(document, {resultTypes: ["violations"]})')
    return [
        (violation['id'], violation['nodes'][0]['html'])
        for violation in found['violations']
        if violation['impact'] in ('serious', 'critical')
    ]


LOADED = (
    '!!window.viewer && !!viewer.world.getItemCount() && viewer.world.getItemAt(0).getFullyLoaded()'
)


def of_slide(page, name='biopsy_001'):
    "Follow the link of a card to the page of its slide, and wait until the picture is there."
    with page.expect_navigation():
        page.locator(f'#labelled .card[data-name={name}] a.view').click()
    until(page, LOADED)


def until(page, condition):
    "Wait for a condition; the page's policy forbids what wait_for_function does."
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f'{condition} did not come true')


def microns_in(text):
    "The length that a scale bar tells: '200 µm' or '1 mm'."
    number, unit = text.split()
    return float(number) * {'µm': 1, 'mm': 1000}[unit]


# ---- the first page


def test_fits_and_shows_every_picture(page):
    assert fits(page)
    assert page.locator('h1').inner_text() == 'Toy run'
    assert 'Synthetic cohort' in page.locator('#result').inner_text()


@pytest.mark.parametrize('key', ['error', 'p'])
def test_order(page, key):
    page.locator(f'input[name=order][value={key}]').check()
    numbers = numbers_of_cards(page, key)
    assert numbers == sorted(numbers, reverse=True)


def test_errors_only(page):
    page.locator('input[name=order][value=name]').check()
    names = shown_names(page)
    assert names == sorted(names) and len(names) == N_LABELLED
    page.locator('input[name=show][value=wrong]').check()
    n_wrong = page.locator('#labelled .card.wrong').count()
    assert len(shown_names(page)) == n_wrong < N_LABELLED
    count = page.locator('#count').inner_text()
    assert count == f'{n_wrong} of the {N_LABELLED} slides of this page shown'


def test_heatmap_fades(page):
    def opacity():
        read = 'heat => { heat.style.transition = "none"; return getComputedStyle(heat).opacity }'
        return float(page.eval_on_selector('#labelled .heat.common', read))

    page.locator('.controls .fade').fill('30')
    assert opacity() == pytest.approx(0.3)
    page.locator('#heat').uncheck()
    assert opacity() == 0
    page.locator('#heat').check()
    assert opacity() == pytest.approx(0.3)


def test_heatmap_changes_its_scale(page):
    def shown():
        common, own = (page.locator(f'#labelled .card .{kind}').first for kind in ('common', 'own'))
        return common.is_visible(), own.is_visible()

    assert shown() == (True, False)
    page.locator('input[name=scale][value=own]').check()
    assert shown() == (False, True)


def test_policy_stops_scripts_of_others(browser, report):
    page = browser.new_page()
    errors, _ = watch(page)
    page.goto(report.as_uri())
    page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.ran = true';
          document.body.append(script);
        }"""
    )
    assert page.evaluate('window.ran') is None
    assert any('Content Security Policy' in error for error in errors)
    page.close()


# ---- the page of a slide


def test_slide_zooms_by_buttons_and_keys(page):
    def zoom():
        return page.evaluate('viewer.viewport.getZoom()')

    assert viewer_files()
    of_slide(page)
    assert fits(page)
    first, bar = zoom(), page.locator('#bar').inner_text()
    for _ in range(3):
        page.get_by_role('button', name='Zoom in').click()
    until(page, LOADED)
    assert zoom() > 3 * first
    assert page.locator('#bar').inner_text() != bar
    page.get_by_role('button', name='Whole slide').click()
    assert zoom() == pytest.approx(first)
    page.locator('.openseadragon-canvas').focus()
    page.keyboard.press('+')
    until(page, f'viewer.viewport.getZoom() > {first}*1.05')
    levels = {int(url.split('/')[-2]) for url in page.requests if '/tiles/' in url}
    assert len(levels) > 1  # finer tiles came


def test_no_key_parts_the_tissue_from_its_maps(page):
    of_slide(page)
    page.locator('.openseadragon-canvas').focus()
    for key in ('f', 'r', 'Shift+R', 'F'):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert page.evaluate('[viewer.viewport.getFlip(), viewer.viewport.getRotation()]') == [False, 0]


def test_scale_bar_tells_the_truth(page):
    of_slide(page)
    page.wait_for_timeout(700)
    microns = microns_in(page.locator('#bar').inner_text())
    length = page.evaluate('getComputedStyle(document.querySelector("#bar"), "::after").width')
    # pixels of the screen from the left of the picture to the right
    left, right = (
        page.evaluate(f'viewer.viewport.pixelFromPoint(new OpenSeadragon.Point({x}, 0)).x')
        for x in (0, 1)
    )
    pixels_per_micron = (right - left) / (WIDTH * SPACING)
    assert float(length.removesuffix('px')) / microns == pytest.approx(pixels_per_micron, rel=0.02)


FIRST, SECOND = '[data-layer="0"]:not(.outline)', '[data-layer="1"]:not(.outline)'
OUTLINE = '.outline[data-layer="0"]'


def test_layers_of_a_slide(page):
    def shown():
        return [
            page.locator(f'#zoom .over{kind}').is_visible() for kind in (FIRST, SECOND, OUTLINE)
        ]

    of_slide(page)
    assert shown() == [True, False, False]
    first, second = (page.locator('.layer').nth(number) for number in (0, 1))
    first.get_by_label('outline').check()
    assert shown() == [True, False, True]
    first.get_by_role('slider').fill('20')
    opacity = page.eval_on_selector(f'#zoom .over{FIRST}', 'map => getComputedStyle(map).opacity')
    assert float(opacity) == pytest.approx(0.2)
    first.get_by_label('shown').uncheck()
    second.get_by_label('shown').check()
    assert shown() == [False, True, True]


DISTANCES = """() => {
  const map = document.querySelector('#zoom .over[data-layer="1"]').getBoundingClientRect();
  const host = document.querySelector('#zoom').getBoundingClientRect();
  const whole = new OpenSeadragon.Rect(0, 0, 1, 2 / 3);
  const picture = viewer.viewport.viewportToViewerElementRectangle(whole);
  return [
    map.left - host.left - picture.x,
    map.top - host.top - picture.y,
    map.width - picture.width,
    map.height - picture.height,
  ];
}"""


def test_a_map_lies_on_the_picture(page):
    of_slide(page)
    page.locator('.layer').nth(1).get_by_label('shown').check()
    assert max(map(abs, page.evaluate(DISTANCES))) < 1.5


UNDER = """share => {
  const picture = viewer.world.getItemAt(0);
  const place = picture.imageToViewerElementCoordinates(
    new OpenSeadragon.Point(share[0] * 4096, share[1] * 4096 * 2 / 3));
  const host = document.querySelector('#zoom').getBoundingClientRect();
  return [host.left + place.x, host.top + place.y];
}"""


def test_position_and_value_are_shown_under_the_cursor(page):
    "Before and after zooming, and of the map that is shown."
    heat = np.load(page.folder.parent / 'heatmaps/biopsy_001.npy')
    of_slide(page)
    page.wait_for_timeout(700)
    words = page.locator('#under')
    assert 'Point at the picture' in words.inner_text()
    for share in [(0.3, 0.2), (0.52, 0.47)]:
        page.mouse.move(*page.evaluate(UNDER, list(share)))
        place, value = words.inner_text().split(' · ')
        x, y = (float(number) for number in place.split('(pixel ')[1].rstrip(')').split(', '))
        assert [x, y] == pytest.approx([share[0] * WIDTH, share[1] * WIDTH * 2 / 3], abs=40)
        microns = [float(number) for number in place.split(' µm')[0].split(', ')]
        assert microns == pytest.approx([x * SPACING, y * SPACING], abs=1)
        row, column = int(y * 64 / (WIDTH * 2 / 3)), int(x * 96 / WIDTH)
        near = heat[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert abs(near - float(value.rpartition(': ')[2])).min() < 0.002
        page.get_by_role('button', name='Zoom in').click()
        page.wait_for_timeout(700)
    page.locator('.layer').first.get_by_label('shown').uncheck()
    page.mouse.move(*page.evaluate(UNDER, [0.5, 0.45]))
    assert ' · ' not in words.inner_text()
    assert fits(page)


def test_from_slide_to_slide(page):
    def heading():
        return page.locator('h1').inner_text()

    first = shown_names(page)[0]
    of_slide(page, first)
    page.get_by_role('link', name='Next').click()
    assert heading() == heading_in(page.folder / 'slides/002.html')
    page.get_by_role('link', name='Previous').click()
    assert heading() == first
    page.get_by_role('link', name='All slides').click()
    page.locator('#slides').wait_for()  # fails if it is not seen


def heading_in(path):
    return path.read_text().partition('<h1>')[2].partition('</h1>')[0]


def test_every_link_leads_somewhere(browser, report):
    page = browser.new_page()
    for path in (report, *sorted((report.parent / 'slides').glob('*.html'))):
        page.goto(path.as_uri())
        for link in page.eval_on_selector_all('a', 'links => links.map(link => link.href)'):
            url, _, part = link.partition('#')
            if url.startswith('https:'):
                assert url.startswith('https://github.com/')
                continue
            target = Path(url.removeprefix('file://'))
            assert target.is_file(), link
            assert not part or f'id="{part}"' in target.read_text(), link
    page.close()


# ---- categories of errors


def test_categories_are_written_kept_and_saved(page, tmp_path):
    fields = page.locator('.category')
    n_errors = fields.count()
    assert n_errors and page.locator('datalist option').count() == 10
    written = ['inflammation, "dense"', '=1+1'][:n_errors]
    fields.first.fill(written[0])
    page.reload()
    assert fields.first.input_value() == written[0]
    for number, category in enumerate(written):
        fields.nth(number).fill(category)
    with page.expect_download() as found:
        page.get_by_role('button', name='Save the categories').click()
    assert 'have a category' in page.locator('#saved').inner_text()
    path = tmp_path / 'categories.csv'
    found.value.save_as(path)
    with path.open(newline='', encoding='utf-8-sig') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == n_errors
    assert not any(row['category'].startswith('=') for row in rows)
    wrong, _ = errors_of(page.folder.parent / 'predictions.csv')
    slide_ids = [row['slide_id'] for row in rows]
    assert read_categories(path, wrong) == dict(zip(slide_ids, written))
    page.get_by_role('button', name='Forget').click()
    assert fields.first.input_value() == ''
    page.reload()
    assert fields.first.input_value() == ''


# ---- who cannot see it, the dark, no script, paper


def test_nothing_serious_for_those_who_cannot_see_it(page):
    assert not violations(page)
    of_slide(page)
    assert not violations(page)


def test_dark(browser, report):
    context = browser.new_context(color_scheme='dark')
    page = context.new_page()
    for path in (report, report.parent / 'slides/001.html'):
        page.goto(path.as_uri())
        assert not violations(page)
    context.close()


def test_without_a_script(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((report.parent / 'slides/001.html').as_uri())
    assert page.locator('.tissue').is_visible()
    assert page.locator('.over').first.is_visible()
    assert not page.locator('.controls').is_visible()
    context.close()


def test_prints(page):
    page.emulate_media(media='print')
    assert not page.locator('.controls').is_visible()
    assert page.locator('#labelled .card').first.is_visible()
    assert page.pdf()[:4] == b'%PDF'


BOXES = """() => {
  const shown = document.querySelectorAll('#stage .tissue, #stage > .over:not([hidden])');
  return [...shown].map(element => {
    const box = element.getBoundingClientRect();
    return [box.left, box.top, box.width, box.height];
  });
}"""


def test_prints_the_page_of_a_slide(page):
    "The whole picture, with its map and its scale bar."
    of_slide(page)
    page.emulate_media(media='print')
    assert not page.locator('.controls').is_visible()
    assert not page.locator('#zoom').is_visible()
    assert page.pdf()[:4] == b'%PDF'
    picture, heatmap = page.evaluate(BOXES)
    assert picture == pytest.approx(heatmap, abs=1)
    bar = 'document.querySelector("#stage .bar")'
    length = page.evaluate(f'getComputedStyle({bar}, "::after").width').removesuffix('px')
    microns = microns_in(page.evaluate(f'{bar}.innerText'))
    pixels_per_micron = picture[2] / (WIDTH * SPACING)
    assert float(length) / microns == pytest.approx(pixels_per_micron, rel=0.02)


def test_a_tile_that_is_lost_is_told(browser, report, tmp_path):
    copy = shutil.copytree(report.parent, tmp_path / 'report')
    shutil.rmtree(copy / 'tiles/001')
    page = browser.new_page()
    page.goto((copy / 'slides/001.html').as_uri())
    page.wait_for_selector('#wrong:visible')
    assert 'cannot be read' in page.locator('#wrong').inner_text()
    page.close()


# ---- the comparison of two runs


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    "Two runs with their reports, and their comparison."
    folder = tmp_path_factory.mktemp('compared')
    for name in 'ab':
        toy_run(folder / name, seed=ord(name), n=16)
        write_report(folder / name, max_slides=2)
    tables = [str(folder / name / 'predictions.csv') for name in 'ab']
    options = ['--n-bootstrap', '200', '--shared']
    assert sp_compare([*tables, str(folder / 'comparison'), *options]) == 0
    return folder


@pytest.mark.parametrize('width', [1280, 375])
def test_a_comparison(browser, compared, tmp_path, width):
    context = browser.new_context(viewport=dict(width=width, height=800))
    page = context.new_page()
    page.width = width
    errors, requests = watch(page)
    path = compared / 'comparison/comparison.html'
    page.goto(path.as_uri())
    assert not errors and requests == [path.as_uri()]
    assert fits(page) and not violations(page)
    links = page.eval_on_selector_all(
        'main a', 'links => links.map(link => link.getAttribute("href"))'
    )
    assert all((path.parent / link).exists() for link in links)
    report = write_report(compared / 'a', tmp_path / 'report', comparison=compared / 'comparison')
    page.goto(report.as_uri())
    assert page.locator('#comparison .note').is_visible() and fits(page)
    context.close()
