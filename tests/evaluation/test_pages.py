"Templates, tables, figures, and the content security policy of pages."

import base64
import hashlib
import math
import re

import pytest
from fastcore.xml import Div, P
from jinja2 import UndefinedError
from markupsafe import Markup
from reports import Page

from streaming_pathology.evaluation.pages import (
    Section,
    content_policy,
    figure_uri,
    html_page,
    plural,
    render,
    spent,
    table,
    template_text,
    templates,
)
from streaming_pathology.outputs import REPORT

EVIL = '"><img src=x onerror=alert(1)>\'</title></style></script><script>alert(2)</script>&amp;'


def page_of(text):
    return Page(str(text))


# ---- words


@pytest.mark.parametrize(
    'seconds, text',
    [
        (1.26, '1.3 s'),
        (42, '42 s'),
        (75, '1 min 15 s'),
        (3700, '1 h 1 min'),
        (math.nan, '–'),
        (math.inf, '–'),
    ],
)
def test_times_in_words(seconds, text):
    assert spent(seconds) == text


@pytest.mark.parametrize('number, text', [(0, '0 slides'), (1, '1 slide'), (1000, '1,000 slides')])
def test_numbers_with_their_noun(number, text):
    assert plural(number, 'slide') == text


# ---- templates


@pytest.mark.parametrize('name', ['page.html', 'table.html', 'slide.html', 'report/result.html'])
def test_a_template_refuses_what_is_not_given(name):
    with pytest.raises(UndefinedError):
        render(name)


def test_every_template_can_be_read():
    names = templates().list_templates()
    assert len(names) > 15
    for name in names:
        if name.endswith('.html'):
            templates().get_template(name)
        else:
            assert template_text(name)


@pytest.mark.parametrize('text', [EVIL, '<b>', '&', '"', "'"])
def test_texts_of_a_table_are_escaped(text):
    page = page_of(table(text, (text, 'number'), [(text, text)]))
    assert page.texts.count(text) == 4
    assert page.all('div')[0]['aria-label'] == text
    assert not page.all('img') and not page.all('script') and not page.all('b')


def test_a_table_has_a_dash_for_none_and_no_title_where_none_is_given():
    page = page_of(table('Names', ('', 'n'), [('a', None), ('b', 3)], hide=True, cls='numbers'))
    assert page.texts.count('–') == 1
    assert [each.get('scope') for each in page.all('th')] == ['col', 'row', 'row']
    assert page.all('caption') == [{'class': 'hidden'}]
    assert page.all('table') == [{'class': 'numbers'}]


def test_a_table_without_titles_has_no_head():
    assert not page_of(table('Names', (), [('a', 1)])).all('thead')


# ---- figures


def test_the_same_figure_gives_the_same_bytes():
    def draw(ax):
        ax.plot([0, 1], [0, 1])

    uri = figure_uri(draw)
    assert uri == figure_uri(draw)
    assert len(uri) < 30_000
    svg = base64.b64decode(uri.partition('base64,')[2]).decode()
    assert 'system-ui' in svg


# ---- pages


def test_a_page_is_a_report_to_those_who_replace_it(tmp_path):
    (tmp_path / REPORT.mark).write_text(html_page('t', 'A page', [], 'Its end.'))
    assert REPORT.is_marked(tmp_path)


def test_texts_of_a_page_are_escaped():
    nav = [(EVIL, EVIL)]
    page = Page(html_page(EVIL, EVIL, [('one', EVIL, [EVIL])], EVIL, nav, tab=EVIL))
    assert [text.strip('\n') for text in page.texts].count(EVIL) == 7
    assert not page.all('img') and not page.all('script')


def test_a_page_leads_to_its_sections():
    sections = [Section('one', 'First', [Markup('<p>text</p>')]), Section('two', '', [None])]
    page = Page(html_page('<b>', 'A page', sections, 'Its end.'))
    assert page.all('a') == [dict(href='#one')]
    assert page.all('nav') == [{'aria-label': 'Sections'}]
    assert [each['id'] for each in page.all('section')] == ['one', 'two']
    assert page.all('section')[1]['aria-label'] == '<b>'
    assert 'text' in page.texts and 'None' not in page.texts


def test_a_page_takes_components_of_fastcore():
    rows = table('Names', (), [('<i>', 1)])
    text = html_page('t', 'A page', [('one', 'First', (Div(P('<a>'), rows),))], 'Its end.')
    assert '<p>&lt;a&gt;</p>' in text and '&lt;i&gt;' in text and '<table>' in text


# ---- the content security policy


def test_policy_of_a_page_without_scripts():
    page = Page(html_page('<b>', 'A page', [], 'Its end.'))
    assert page.policy == {
        'default-src': ["'none'"],
        'img-src': ['data:'],
        'style-src': ["'unsafe-inline'"],
        'form-action': ["'none'"],
        'base-uri': ["'none'"],
    }
    assert not page.all('script')


def test_policy_allows_the_script_of_the_page_by_its_hash():
    script = "let x = '</scr' + 'ipt>';\nlet y = `${1 < 2 && 'a'}`;\n"
    text = html_page('t', 'A page', [], 'Its end.', script=script, script_files=['x.js'])
    (in_page,) = re.findall('<script>(.*?)</script>', text, re.S)
    assert in_page == script
    digest = base64.b64encode(hashlib.sha256(in_page.encode()).digest()).decode()
    page = Page(text)
    assert page.policy['script-src'] == ["'self'", 'file:', f"'sha256-{digest}'"]
    assert page.all('script') == [dict(src='x.js'), {}]
    assert page.policy['img-src'] == ['data:']


def test_policy_allows_pictures_beside_the_page():
    page = Page(html_page('t', 'A page', [], 'Its end.', beside=True))
    assert page.policy['img-src'] == ['data:', "'self'", 'file:']
    assert 'script-src' not in page.policy


def test_policy_stands_in_the_page_as_it_is():
    script = template_text('report/index.js')
    page = html_page('t', 'A page', [], 'Its end.', script=script, beside=True)
    policy = content_policy(script, has_script_files=False, beside=True)
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
