"The report of a made-up run in headless Chromium: no error, no request to anywhere, and its controls do what they say"

import csv
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from streaming_pathology.cli.commands import sp_compare
from streaming_pathology.evaluation.heatmaps import save_heatmap
from streaming_pathology.evaluation.report import toy_run, write_report
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


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "Of 40 slides, one of which is as large as one of the paper's at a quarter."
    run = toy_run(tmp_path_factory.mktemp('run'), n=39)
    rng = np.random.default_rng(0)
    large = np.kron(rng.integers(150, 256, (64, 96, 3), np.uint8), np.ones((64, 64, 1), np.uint8))
    save_picture(run / 'images/biopsy_001.jpg', large, 0.5)
    save_heatmap(run / 'heatmaps/biopsy_001.npy', rng.random((64, 96)))
    return write_report(run)


@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM:
        pytest.skip('Chromium is not installed: install it, or set CHROMIUM to its path')
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='Playwright is not installed: pip install playwright'
    )
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture(params=[1280, 375], ids=['wide', 'narrow'])
def page(browser, report, request):
    context = browser.new_context(
        viewport=dict(width=request.param, height=800), accept_downloads=True
    )
    page, errors, requests = context.new_page(), [], []
    page.on('console', lambda m: errors.append(m.text))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on(
        'requestfailed', lambda r: errors.append(r.url) if r.failure != 'net::ERR_ABORTED' else None
    )
    page.on(
        'request',
        lambda r: requests.append(r.url) if not r.url.startswith(('data:', 'blob:')) else None,
    )
    page.goto(report.as_uri())
    page.width, page.folder, page.requests = request.param, report.parent, requests
    yield page
    assert not errors and all(u.startswith(report.parent.as_uri() + '/') for u in requests), (
        errors,
        requests,
    )
    context.close()


names = lambda page: page.eval_on_selector_all(
    '#labelled .card', 'cs => cs.filter(c => !c.hidden).map(c => c.dataset.name)'
)
data = lambda page, key: page.eval_on_selector_all(
    '#labelled .card', f'cs => cs.map(c => +c.dataset.{key})'
)


def fits(page):
    return page.evaluate('document.documentElement.scrollWidth') <= page.width and page.evaluate(
        '[...document.images].every(i => i.complete && i.naturalWidth > 0)'
    )


def violations(page):
    "What axe-core finds that is serious, or worse."
    found = page.evaluate(
        package('axe-core')['axe.min.js'].decode()
        + ';axe.run(document, {resultTypes: ["violations"]})'
    )
    return [
        (v['id'], v['nodes'][0]['html'])
        for v in found['violations']
        if v['impact'] in ('serious', 'critical')
    ]


def of_slide(page, name='biopsy_001'):
    "Follow the link of a card to the page of its slide, and wait until the picture is there."
    with page.expect_navigation():
        page.locator(f'#labelled .card[data-name={name}] a.view').click()
    until(page, LOADED)


LOADED = (
    '!!window.viewer && !!viewer.world.getItemCount() && viewer.world.getItemAt(0).getFullyLoaded()'
)


def until(page, says):  # the page's policy forbids what wait_for_function does
    for _ in range(300):
        if page.evaluate(says):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f'{says} did not come true')


def test_fits_and_shows_every_picture(page):
    assert (
        fits(page)
        and page.locator('h1').inner_text() == 'Toy run'
        and 'Synthetic cohort' in page.locator('#result').inner_text()
    )


def test_order_and_errors_only(page):
    for key in ('error', 'p'):
        page.locator(f'input[name=order][value={key}]').check()
        assert data(page, key) == sorted(data(page, key), reverse=True)
    page.locator('input[name=order][value=name]').check()
    assert names(page) == sorted(names(page)) and len(names(page)) == 39
    page.locator('input[name=show][value=wrong]').check()
    wrong = page.locator('#labelled .card.wrong').count()
    assert (
        len(names(page)) == wrong < 39
        and page.locator('#count').inner_text() == f'{wrong} of the 39 slides of this page shown'
    )


def test_heatmap_fades_and_changes_its_scale(page):
    opacity = lambda: float(
        page.eval_on_selector(
            '#labelled .heat.common',
            'e => { e.style.transition = "none"; return getComputedStyle(e).opacity }',
        )
    )
    page.locator('.controls .fade').fill('30')
    assert opacity() == pytest.approx(0.3)
    page.locator('#heat').uncheck()
    assert opacity() == 0
    page.locator('#heat').check()
    shown = lambda c: page.locator(f'#labelled .card .{c}').first.is_visible()
    assert shown('common') and not shown('own')
    page.locator('input[name=scale][value=own]').check()
    assert shown('own') and not shown('common')


def test_slide_zooms_by_buttons_and_keys(page):
    assert viewer_files()
    of_slide(page)
    assert fits(page)
    zoom = lambda: page.evaluate('viewer.viewport.getZoom()')
    first, bar = zoom(), page.locator('#bar').inner_text()
    for _ in range(3):
        page.get_by_role('button', name='Zoom in').click()
    until(page, LOADED)
    near = zoom()
    assert near > 3 * first and page.locator('#bar').inner_text() != bar
    page.get_by_role('button', name='Whole slide').click()
    assert zoom() == pytest.approx(first)
    page.locator('.openseadragon-canvas').focus()
    page.keyboard.press('+')
    until(page, f'viewer.viewport.getZoom() > {first}*1.05')
    assert max(int(u.split('/')[-2]) for u in page.requests if '/tiles/' in u) > min(
        int(u.split('/')[-2]) for u in page.requests if '/tiles/' in u
    )  # finer tiles came


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
    said = page.locator('#bar').inner_text().split()
    micron = float(said[0]) * {'µm': 1, 'mm': 1000}[said[1]]
    length = float(
        page.evaluate('getComputedStyle(document.querySelector("#bar"), "::after").width')[:-2]
    )
    whole = page.evaluate(
        'viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0)).x - viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0)).x'
    )  # pixels of the screen, of 6144 at half a micron
    assert length / micron == pytest.approx(whole / (6144 * 0.5), rel=0.02)


def test_layers_of_a_slide(page):
    of_slide(page)
    shown = lambda s: page.locator(f'#zoom .over{s}').is_visible()
    assert (
        shown('[data-layer="0"]:not(.outline)')
        and not shown('[data-layer="1"]:not(.outline)')
        and not shown('.outline[data-layer="0"]')
    )
    one = page.locator('.layer').first
    one.get_by_label('outline').check()
    assert shown('.outline[data-layer="0"]')
    one.get_by_role('slider').fill('20')
    assert float(
        page.eval_on_selector('#zoom .over[data-layer="0"]', 'e => getComputedStyle(e).opacity')
    ) == pytest.approx(0.2)
    one.get_by_label('shown').uncheck()
    assert not shown('[data-layer="0"]:not(.outline)')
    page.locator('.layer').nth(1).get_by_label('shown').check()
    assert shown('[data-layer="1"]:not(.outline)')
    at = page.evaluate(
        '(() => { const r = document.querySelector("#zoom .over[data-layer=\'1\']").getBoundingClientRect(), p = viewer.viewport.viewportToViewerElementRectangle(new OpenSeadragon.Rect(0, 0, 1, 2/3)), h = document.querySelector("#zoom").getBoundingClientRect(); return [r.left-h.left-p.x, r.top-h.top-p.y, r.width-p.width, r.height-p.height] })()'
    )
    assert max(map(abs, at)) < 1.5  # it lies on the picture


def test_from_slide_to_slide(page):
    first = names(page)[0]
    of_slide(page, first)
    page.get_by_role('link', name='Next').click()
    assert page.locator('h1').inner_text() == names_of(page)[1]
    page.get_by_role('link', name='Previous').click()
    assert page.locator('h1').inner_text() == first
    page.get_by_role('link', name='All slides').click()
    assert page.locator('#slides').is_visible()


def names_of(page):
    return [
        r['name']
        for r in sorted(
            (dict(name=p.stem, of=p) for p in (page.folder / 'slides').glob('*.html')),
            key=lambda r: r['name'],
        )
        for r['name'] in [r['of'].read_text().partition('<h1>')[2].partition('</h1>')[0]]
    ]


def test_every_link_leads_somewhere(browser, report):
    page = browser.new_page()
    for p in (report, *sorted((report.parent / 'slides').glob('*.html'))):
        page.goto(p.as_uri())
        for l in page.eval_on_selector_all('a', 'l => l.map(a => a.href)'):
            url, _, part = l.partition('#')
            if url.startswith('https:'):
                assert url.startswith('https://github.com/')
                continue
            assert Path(url.removeprefix('file://')).is_file() and (
                not part or f'id="{part}"' in Path(url.removeprefix('file://')).read_text()
            ), l
    page.close()


def test_categories_are_written_kept_and_saved(page, tmp_path):
    fields = page.locator('.category')
    n = fields.count()
    assert n and page.locator('datalist option').count() == 10
    fields.first.fill('inflammation, "dense"')
    page.reload()
    assert fields.first.input_value() == 'inflammation, "dense"'
    fields.nth(1).fill('=1+1') if n > 1 else None
    with page.expect_download() as found:
        page.get_by_role('button', name='Save the categories').click()
    found.value.save_as(tmp_path / 'c.csv')
    rows = list(csv.DictReader((tmp_path / 'c.csv').open(newline='', encoding='utf-8-sig')))
    assert (
        len(rows) == n
        and 'have a category' in page.locator('#saved').inner_text()
        and not any(r['category'].startswith('=') for r in rows)
    )
    wrong, _ = errors_of(page.folder.parent / 'predictions.csv')
    assert read_categories(tmp_path / 'c.csv', wrong) == {
        rows[0]['slide_id']: 'inflammation, "dense"'
    } | ({rows[1]['slide_id']: '=1+1'} if n > 1 else {})
    page.get_by_role('button', name='Forget').click()
    assert fields.first.input_value() == ''
    page.reload()
    assert fields.first.input_value() == ''


def test_nothing_serious_for_those_who_cannot_see_it(page):
    assert not violations(page)
    of_slide(page)
    assert not violations(page)


def test_dark(browser, report):
    context = browser.new_context(color_scheme='dark')
    page = context.new_page()
    for p in (report, report.parent / 'slides/001.html'):
        page.goto(p.as_uri())
        assert not violations(page)
    context.close()


def test_without_a_script(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((report.parent / 'slides/001.html').as_uri())
    assert (
        page.locator('.tissue').is_visible()
        and page.locator('.over').first.is_visible()
        and not page.locator('.controls').is_visible()
    )
    context.close()


def test_prints(page):
    page.emulate_media(media='print')
    assert (
        not page.locator('.controls').is_visible()
        and page.locator('#labelled .card').first.is_visible()
        and page.pdf()[:4] == b'%PDF'
    )
    page.emulate_media(media='screen')
    of_slide(page)
    page.emulate_media(media='print')
    assert not page.locator('.controls').is_visible() and page.pdf()[:4] == b'%PDF'
    inside = page.evaluate(
        '[...document.querySelectorAll("#stage .tissue, #stage > .over:not([hidden])")].map(e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height] })'
    )  # on paper too a map lies on its picture
    assert (
        len(inside) == 2
        and max(abs(a - b) for a, b in zip(*inside)) < 1
        and not page.locator('#zoom').is_visible()
    )
    bar, length = page.evaluate(
        '[parseFloat(getComputedStyle(document.querySelector("#stage .bar"), "::after").width), document.querySelector("#stage .bar").innerText]'
    )
    said = length.split()
    assert bar / (float(said[0]) * {'µm': 1, 'mm': 1000}[said[1]]) == pytest.approx(
        inside[0][2] / (6144 * 0.5), rel=0.02
    )


def test_a_tile_that_is_lost_is_told(browser, report, tmp_path):
    at = shutil.copytree(report.parent, tmp_path / 'report')
    shutil.rmtree(at / 'tiles/001')
    page = browser.new_page()
    page.goto((at / 'slides/001.html').as_uri())
    page.wait_for_selector('#wrong:visible')
    assert 'cannot be read' in page.locator('#wrong').inner_text()
    page.close()


@pytest.mark.parametrize('width', [1280, 375])
def test_a_comparison(browser, tmp_path, width):
    for k in 'ab':
        toy_run(tmp_path / k, seed=ord(k), n=16)
        write_report(tmp_path / k, most=2)
    assert (
        sp_compare(
            [str(tmp_path / k / 'predictions.csv') for k in 'ab']
            + [str(tmp_path / 'compared'), '--draws', '200', '--shared']
        )
        == 0
    )
    context = browser.new_context(viewport=dict(width=width, height=800))
    page, errors, requests = context.new_page(), [], []
    page.on('console', lambda m: errors.append(m.text))
    page.on('request', lambda r: requests.append(r.url) if not r.url.startswith('data:') else None)
    page.goto((at := tmp_path / 'compared/comparison.html').as_uri())
    page.width = width
    assert not errors and requests == [at.as_uri()] and fits(page) and not violations(page)
    assert all(
        (at.parent / a).exists()
        for a in page.eval_on_selector_all('main a', 'l => l.map(a => a.getAttribute("href"))')
    )
    page.goto(write_report(tmp_path / 'a', comparison=tmp_path / 'compared').as_uri())
    assert page.locator('#comparison .note').is_visible() and fits(page)
    context.close()
