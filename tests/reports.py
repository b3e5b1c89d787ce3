"Reports in tests: pages taken apart, and whether they are in order."

import re
from html.parser import HTMLParser
from pathlib import Path

from streaming_pathology.evaluation.report_sections import CODE


class Page(HTMLParser):
    "Tags, ids and texts of a page; fails where tags do not match."

    VOID = {'meta', 'link', 'img', 'input', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        "The attributes of each element of a kind."
        return [attributes for name, attributes, _ in self.tags if name == tag]

    @property
    def text(self):
        "All its text, with single spaces."
        return ' '.join(' '.join(self.texts).split())

    @property
    def policy(self):
        "Its content security policy: {directive: values}."
        metas = self.all('meta')
        policy = next(each['content'] for each in metas if 'http-equiv' in each)
        directives = [directive.split() for directive in policy.split('; ')]
        return {name: values for name, *values in directives}


def check_page(path):
    """A page, if it is in order: every tag is closed, ids are unique, pictures have a text and
    fields of forms a label, links and pictures lead to what is there, and nothing points out of the
    folder but the link to the code."""
    text = path.read_text()
    page = Page(text)
    ids = [attributes['id'] for _, attributes, _ in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    for target in targets(page):
        assert (path.parent / target.partition('#')[0]).is_file(), target
    assert all('alt' in image for image in page.all('img'))
    for link in page.all('a'):
        if link['href'].startswith('#'):
            assert link['href'][1:] in ids
    for tag, attributes, within in page.tags:
        if tag == 'input' and attributes.get('type') != 'hidden':
            assert 'label' in within
        assert not [name for name in attributes if name.startswith('on')]
    own = re.sub(r'data:image/[^"\']*', '', text).replace(CODE, '')
    assert not re.search(r'https?:|url\(|@import', own)
    return page


def targets(page):
    "Where links, pictures and scripts of a page lead, without those to itself and to the code."
    images = [image['src'] for image in page.all('img')]
    scripts = [script['src'] for script in page.all('script') if 'src' in script]
    links = [link['href'] for link in page.all('a')]
    return [
        target
        for target in (*images, *scripts, *links)
        if not target.startswith(('data:image/', '#', CODE))
    ]


def check_report(index: Path):
    "The first page of a report, and the pages of its slides, if they are all in order."
    slides = [check_page(path) for path in sorted((index.parent / 'slides').glob('*.html'))]
    return check_page(index), slides
