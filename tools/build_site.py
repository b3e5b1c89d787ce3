"""The site, built into _docs without Quarto: nbdev prepares the notebooks in _proc, smalldocs lays them out as _quarto.yml says.

python tools/build_site.py               # ends with an error for a broken link or a warning
"""

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

from api import public_names
from nbdev.serve import proc_nbs
from npm import PACKAGES, package
from smalldocs import layout
from smalldocs.config import load
from smalldocs.site import Site

from streaming_pathology._modidx import d

ROOT = Path(__file__).resolve().parent.parent
CDN = layout.KATEX  # where smalldocs would have the reader's browser fetch KaTeX from


@cache
def hidden_links():
    "Where nbdev would link what is not public: 'engine/ledger.html#size'."
    links = set()
    for module, symbols in d['syms'].items():
        names = public_names(ROOT / f'{module.replace(".", "/")}.py')
        for name, (link, _) in symbols.items():
            top = name.removeprefix(f'{module}.').partition('.')[0]
            if top not in names:
                links.add(link)
    return links


class NbdevSite(Site):
    "smalldocs' site, with pages where nbdev says they are: 00_geometry.ipynb is geometry.html."

    def read(self, src):
        page = super().read(src)
        if name := page.front.get('output-file'):
            page.out = page.out.with_name(str(name))
        return page

    def warn(self, msg):
        if 'output-file' in msg:  # read() above reads it
            return
        outside = re.search(r'broken link ([^ #]+).* \(outside the project\)', msg)
        if outside and (ROOT / 'nbs' / outside[1]).exists():  # render_page() below takes it out
            return
        super().warn(msg)

    def find_page(self, target):
        if target.suffix == '.html':
            for page in self.pages.values():
                if page.out == target:
                    return page
        return super().find_page(target)

    def render_page(self, page):
        """nbdev links the name of a helper too, whose documentation it does not show, and names in
        the comments of signatures, where a link is only its text: those names stay plain. So do
        links to files of the repository, which are not on the site."""
        super().render_page(page)
        page.html = re.sub(r'\[(`[^`<]+`)\]\(/[^)<\s]*\)', r'\1', page.html)
        page.html = re.sub(
            r'<a href="(?:\.\./)+[A-Z]+(?:\.md)?(?:#[^"]*)?"[^>]*>(.*?)</a>', r'\1', page.html
        )
        folder = page.out.parent

        def plain_if_hidden(link):
            target = os.path.normpath(os.path.join(folder, link[1]))
            is_private = link[1].partition('#')[2].startswith('_')
            return link[2] if is_private or target in hidden_links() else link[0]

        page.html = re.sub(
            r'<a href="([^"]*\.html#[^"]*)"[^>]*>(.*?)</a>', plain_if_hidden, page.html
        )


def own_katex(out):
    "Put KaTeX into the site, and have the pages fetch it from there."
    keep = re.compile(
        r'(LICENSE|dist/(katex\.min\.(css|js)|contrib/auto-render\.min\.js|fonts/[\w-]+\.woff2))'
    )
    pages = [p for p in out.rglob('*.html') if CDN in p.read_text(encoding='utf-8')]
    if not pages:
        return
    if (asked := CDN.partition('katex@')[2].partition('/')[0]) != PACKAGES['katex'][0]:
        raise SystemExit(
            f'error: smalldocs asks for KaTeX {asked}; tools/npm.py knows that of {PACKAGES["katex"][0]}'
        )
    try:
        files = package('katex')
    except OSError as e:
        raise SystemExit(f'error: {e}')
    for name, data in files.items():
        if not keep.fullmatch(name):
            continue
        target = out / 'site_libs' / 'katex' / name.removeprefix('dist/')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for page in pages:
        here = os.path.relpath(out / 'site_libs' / 'katex', page.parent).replace(os.sep, '/')
        page.write_text(page.read_text(encoding='utf-8').replace(CDN, here), encoding='utf-8')


def build():
    "Build the site into _docs; returns what is wrong with it."
    os.chdir(ROOT)
    proc = proc_nbs(n_workers=min(2, os.cpu_count() or 1), force=True)
    site = NbdevSite(load(proc), quiet=True)
    site.build()
    own_katex(site.out)
    shutil.rmtree(ROOT / '_docs', ignore_errors=True)
    shutil.move(site.out, ROOT / '_docs')
    print(f'{len(site.pages)} pages in {ROOT / "_docs"}')
    return site.warnings


if __name__ == '__main__':  # proc_nbs starts processes, which import this file
    if wrong := build():
        sys.exit('\n'.join(f'error: {w}' for w in wrong))
