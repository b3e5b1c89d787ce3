"The report of a made-up run in headless Chromium: no error, no request, and its controls do what they say"
import io, os, shutil, pytest
import numpy as np
from PIL import Image
from streaming_pathology.files import write_whole
from streaming_pathology.compare import sp_compare
from streaming_pathology.report import toy_run, write_report

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']

@pytest.fixture(scope='module')
def report(tmp_path_factory): return write_report(toy_run(tmp_path_factory.mktemp('run'), n=12))

@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM: pytest.skip('Chromium is not installed: install it, or set CHROMIUM to its path')
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: pip install playwright')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

@pytest.fixture(params=[1280, 375], ids=['wide', 'narrow'])
def page(browser, report, request):
    context = browser.new_context(viewport=dict(width=request.param, height=800))
    page, errors, requests = context.new_page(), [], []
    page.on('console', lambda m: errors.append(m.text))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: requests.append(r.url) if not r.url.startswith('data:') else None)
    page.goto(report.as_uri())
    page.width = request.param
    yield page
    assert not errors and requests == [report.as_uri()]
    context.close()

names = lambda page: page.eval_on_selector_all('#labelled .card', 'cs => cs.filter(c => !c.hidden).map(c => c.dataset.name)')
data = lambda page, key: page.eval_on_selector_all('#labelled .card', f'cs => cs.map(c => +c.dataset.{key})')

def test_fits_and_shows_every_picture(page):
    assert page.evaluate('document.documentElement.scrollWidth') <= page.width
    assert page.eval_on_selector_all('img', 'is => is.every(i => i.complete && i.naturalWidth > 0)')
    assert page.locator('h1').inner_text() == 'Toy run' and 'Synthetic cohort' in page.locator('#result').inner_text()

def test_order_and_errors_only(page):
    for key in ('error', 'p'):
        page.locator(f'input[name=order][value={key}]').check()
        assert data(page, key) == sorted(data(page, key), reverse=True)
    page.locator('input[name=order][value=name]').check()
    assert names(page) == sorted(names(page)) and len(names(page)) == 12
    page.locator('input[name=show][value=wrong]').check()
    wrong = page.locator('#labelled .card.wrong').count()
    assert len(names(page)) == wrong < 12 and page.locator('#count').inner_text() == f'{wrong} of 12 slides shown'

def test_heatmap_fades_and_changes_its_scale(page):
    opacity = lambda: float(page.eval_on_selector('.heat.common', 'e => { e.style.transition = "none"; return getComputedStyle(e).opacity }'))
    page.locator('.controls .fade').fill('30')
    assert opacity() == pytest.approx(.3)
    page.locator('#heat').uncheck()
    assert opacity() == 0
    page.locator('#heat').check()
    shown = lambda c: page.locator(f'.card .{c}').first.is_visible()
    assert shown('common') and not shown('own')
    page.locator('input[name=scale][value=own]').check()
    assert shown('own') and not shown('common')

def test_enlarged_with_the_keyboard(page):
    page.locator('button.view').first.focus()
    page.keyboard.press('Enter')
    what = page.locator('#what')
    assert names(page)[0] in what.inner_text()
    page.keyboard.press('ArrowRight'); assert names(page)[1] in what.inner_text()
    page.keyboard.press('ArrowLeft'); page.keyboard.press('ArrowLeft'); assert 'sample' in what.inner_text()      # round to the unlabelled one
    page.get_by_role('button', name='Next').click(); assert names(page)[0] in what.inner_text()
    assert page.locator('dialog .heat').first.is_visible()
    page.keyboard.press('Escape')
    assert not page.locator('dialog').is_visible()

def test_everything_has_a_name(page):
    for role in ('button', 'radio', 'checkbox', 'slider', 'region', 'img', 'link'):
        for e in page.get_by_role(role).all():
            assert page.evaluate('e => (e.getAttribute("aria-label") || e.alt || e.getAttribute("aria-labelledby") || (e.labels && e.labels[0] && e.labels[0].innerText) || e.innerText || "").trim()', e.element_handle()), e

def test_prints(page):
    page.emulate_media(media='print')
    assert not page.locator('.controls').is_visible() and page.locator('#labelled .card').first.is_visible()
    assert page.pdf()[:4] == b'%PDF'

def test_forty_slides_stay_small(tmp_path):
    run, rng = toy_run(tmp_path/'run', n=39), np.random.default_rng(0)
    f = io.BytesIO(); Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)).save(f, 'JPEG', quality=90)        # noise compresses worst
    for i in (run/'images').iterdir(): write_whole(i, f.getvalue())
    for h in (run/'heatmaps').iterdir(): np.save(h, rng.random((128, 128), dtype=np.float32))
    assert write_report(run).stat().st_size < 5e6

@pytest.mark.parametrize('width', [1280, 375])
def test_a_comparison(browser, tmp_path, width):
    for k in 'ab': toy_run(tmp_path/k, seed=ord(k), n=40)
    assert sp_compare([str(tmp_path/k/'predictions.csv') for k in 'ab']+[str(tmp_path/'compared'), '--draws', '200', '--shared']) == 0
    context = browser.new_context(viewport=dict(width=width, height=800)); page, errors, requests = context.new_page(), [], []
    page.on('console', lambda m: errors.append(m.text)); page.on('request', lambda r: requests.append(r.url) if not r.url.startswith('data:') else None)
    page.goto((at := tmp_path/'compared/comparison.html').as_uri())
    assert not errors and requests == [at.as_uri()] and page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth)') and all((at.parent/a).exists() for a in page.eval_on_selector_all('main a', 'l => l.map(a => a.getAttribute("href"))'))
    context.close()
