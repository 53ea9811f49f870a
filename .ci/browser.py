"""Open every page in a headless Chromium and note what a reader would stumble over: `python .ci/browser.py FOLDER [--pictures FOLDER]`.

Noted are errors in the console, requests that leave the site, files that are missing and pictures that do not show. With
`--pictures` each page is also photographed in the light and the dark theme, for people to look at.
"""
import argparse, contextlib, functools, shutil, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
# What Chromium would do by itself on a fresh profile is switched off, so that every request is one of the page.
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
HIDDEN = '[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 100))'
OVERFULL = 'Math.max(0, document.documentElement.scrollWidth - window.innerWidth)'


def find_browser():
    "The path of an installed Chromium, or None"
    return next(filter(None, map(shutil.which, NAMES)), None)


class Quiet(SimpleHTTPRequestHandler):
    "Serves files and prints nothing"
    def log_message(self, *args): pass


@contextlib.contextmanager
def served(folder):
    "The address under which a folder is served to this machine alone"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def chromium(path):
    "A headless browser"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        try: yield browser
        finally: browser.close()


def listen(page, address, found):
    "Collect what goes wrong on a page into the list `found`"
    page.on('console', lambda m: found.append(f'console: {m.text}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: found.append(f'error: {e}'))
    page.on('response', lambda r: found.append(f'{r.status} for {r.url.removeprefix(address)}') if r.status >= 400 else None)
    def outward(route):
        if route.request.url.startswith((address, 'data:', 'blob:')): return route.continue_()
        found.append(f'asks the network for {route.request.url}')
        route.abort()
    page.route('**/*', outward)


def open_pages(folder, browser, pictures=None):
    "A line for each problem of each page"
    problems = []
    with served(folder) as address:
        page, found = browser.new_page(viewport=dict(width=1280, height=900)), []
        listen(page, address, found)
        for name in sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*.html')):
            page.goto(f'{address}/{name}', wait_until='load')
            page.evaluate('document.querySelectorAll("img[loading=lazy]").forEach(i => i.loading = "eager")')
            page.wait_for_load_state('networkidle')
            found += [f'picture does not show: {src}' for src in page.evaluate(HIDDEN)]
            if page.evaluate(OVERFULL): found.append('wider than the window')
            if page.locator('.katex-error').count(): found.append('a formula that KaTeX does not understand')
            problems += [f'{name}: {line}' for line in dict.fromkeys(found)]
            found.clear()
            if pictures: photograph(page, Path(pictures), name)
    return problems


def photograph(page, folder, name):
    "The whole page, light and dark"
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200) # the theme is read again after 50 ms
        page.screenshot(path=folder/f"{name.replace('/', '-')[:-5]}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme='light')


def main(argv=None):
    "The command line; returns the exit code"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='the pages')
    parser.add_argument('--pictures', type=Path, help='where photographs go; none by default')
    args = parser.parse_args(argv)
    path = find_browser()
    if path is None:
        print(f"no browser: none of {', '.join(NAMES)} is installed")
        return 1
    with chromium(path) as browser: problems = open_pages(args.folder, browser, args.pictures)
    for problem in problems: print(problem)
    print(f'{len(problems)} problems in the browser')
    return 1 if problems else 0


if __name__ == '__main__': sys.exit(main())
