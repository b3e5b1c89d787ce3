"""Every page of the site in _docs, opened in headless Chromium from a server on this machine.

    python tools/check_site.py               # CHROMIUM=/path/to/chromium and --screenshots FOLDER if wanted

An error: anything on the console, a failed request, a request off the site, a link or anchor that leads nowhere, maths left unset,
a page wider than the screen, a search that does not find `stream`.
"""

import argparse
import functools
import http.server
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

from playwright.sync_api import TimeoutError, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
SIZES = {'wide': dict(width=1400, height=900), 'narrow': dict(width=390, height=844)}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder):
    "Serve a folder on a free port of this machine; returns the server and its address."
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}/'


def find_chromium():
    "The path of Chromium; ends the program where there is none."
    for path in (os.environ.get('CHROMIUM'), 'chromium', 'chromium-browser', 'google-chrome'):
        found = path and shutil.which(path)
        if found:
            return found
    sys.exit(
        "error: no Chromium found; install Debian's package chromium, or name one with CHROMIUM=/path"
    )


class Check:
    "One browser, one site, and what was found wrong."

    def __init__(self, context, base, shots=None):
        self.context, self.base, self.shots = context, base, shots
        self.wrong, self.links, self.ids = [], {}, {}

    def say(self, where, what):
        self.wrong.append(f'{where}: {what}')

    def open(self, path):
        "A page of the site that reports what goes wrong on it."
        page = self.context.new_page()
        page.set_viewport_size(SIZES['wide'])
        page.on(
            'console',
            lambda m: (
                m.type in ('error', 'warning') and self.say(path, f'console {m.type}: {m.text}')
            ),
        )
        page.on('pageerror', lambda e: self.say(path, f'error: {e}'))
        page.on('requestfailed', lambda r: self.say(path, f'request failed: {r.url}'))
        page.on(
            'request',
            lambda r: (
                r.url.startswith((self.base, 'data:', 'blob:', 'about:'))
                or self.say(path, f'request off the site: {r.url}')
            ),
        )
        page.on(
            'response', lambda r: r.status >= 400 and self.say(path, f'status {r.status}: {r.url}')
        )
        page.goto(self.base + path, wait_until='networkidle')
        return page

    def look(self, path):
        "Open a page wide, and make it narrow; gather its links and anchors."
        page = self.open(path)
        if n := page.locator('.math:not(:has(.katex))').count():
            self.say(path, f'{n} formulas are not set')
        if n := page.locator('.katex-error').count():
            self.say(path, f'{n} formulas have errors')
        self.ids[path] = set(
            page.evaluate('[...document.querySelectorAll("[id],a[name]")].map(e => e.id || e.name)')
        )
        self.links[path] = page.evaluate(
            '[...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href"))'
        )
        for size, shape in SIZES.items():
            page.set_viewport_size(shape)
            page.evaluate(
                'new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))'
            )
            if page.evaluate('document.documentElement.scrollWidth > innerWidth + 1'):
                self.say(path, f'wider than the {size} screen')
            if n := page.evaluate(
                '[...document.images].filter(i => !i.complete || !i.naturalWidth).length'
            ):
                self.say(path, f'{n} pictures do not show on the {size} screen')
            if self.shots:
                page.screenshot(
                    path=self.shots / f'{Path(path).stem}_{size}.png',
                    full_page=True,
                    animations='disabled',
                )
        page.close()

    def follow(self, folder):
        "Every link within the site leads to a file, and its anchor to a place in it; links elsewhere are not followed."
        for path, links in self.links.items():
            for link in set(links):
                url, anchor = urldefrag(urljoin(self.base + path, link))
                if not url.startswith(self.base):
                    if urlparse(url).scheme not in ('http', 'https', 'mailto'):
                        self.say(path, f'a link that leads nowhere: {link}')
                    continue
                target = unquote(urlparse(url).path).lstrip('/') or 'index.html'
                if target.endswith('/'):
                    target += 'index.html'
                if not (folder / target).is_file():
                    self.say(path, f'broken link: {link}')
                elif anchor and target in self.ids and unquote(anchor) not in self.ids[target]:
                    self.say(path, f'broken anchor: {link}')

    def search(self, word):
        "Type a word into the search: the place of that name is among what it finds, and a click leads there."
        page = self.open('index.html')
        page.locator('.smalldocs-search input').first.fill(word)
        found = page.locator('a.search-result')
        try:
            found.first.wait_for(timeout=5000)
        except TimeoutError:
            return self.say('search', f'nothing found for {word!r}')
        if self.shots:
            page.screenshot(path=self.shots / 'search.png')
        hrefs = [
            h.removeprefix('./')
            for h in found.evaluate_all('links => links.map(a => a.getAttribute("href"))')
        ]
        homes = [
            f'{path}#{word}'
            for path, ids in self.ids.items()
            if word in ids and f'{path}#{word}' in hrefs
        ]
        if not homes:
            self.say('search', f'no place called {word!r} is among what it finds: {hrefs[:5]}')
        else:
            found.nth(hrefs.index(homes[0])).click()
            page.wait_for_url(f'**/{homes[0]}', timeout=5000)
        page.close()


def main():
    parser = argparse.ArgumentParser(
        description='Open every page of the site in headless Chromium.'
    )
    parser.add_argument(
        'folder', nargs='?', type=Path, default=ROOT / '_docs', help='the built site'
    )
    parser.add_argument(
        '--screenshots', type=Path, help='a folder for pictures of every page, wide and narrow'
    )
    args = parser.parse_args()
    pages = sorted(p.relative_to(args.folder).as_posix() for p in args.folder.rglob('*.html'))
    if 'index.html' not in pages:
        sys.exit(f'error: no site in {args.folder}; run python tools/build_site.py')
    chromium = find_chromium()
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    server, base = serve(args.folder)
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=FLAGS
        )
        check = Check(context, base, args.screenshots)
        for path in pages:
            check.look(path)
        check.follow(args.folder)
        check.search('stream')
        context.close()
    server.shutdown()
    for line in dict.fromkeys(check.wrong):
        print(f'error: {line}', file=sys.stderr)
    print(
        f'{len(pages)} pages, {sum(map(len, check.links.values()))} links, {len(set(check.wrong))} errors'
    )
    sys.exit(bool(check.wrong))


if __name__ == '__main__':
    main()
