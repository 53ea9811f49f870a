"""Open every page in a headless Chromium and note what a reader would stumble over: `python .ci/browser.py FOLDER [--pictures FOLDER]`.

Noted are errors in the console, requests that leave the site, files that are missing, pictures that do not show, formulas and
markup that are shown as they were written, and text that is hard to read on its ground, in either theme. With
`--pictures` each page is also photographed in the light and the dark theme, for people to look at.
"""
import argparse, contextlib, functools, shutil, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
# What Chromium would do by itself on a fresh profile is switched off, so that every request is one of the page.
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
HIDDEN = '[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 100))'
# What is left of Markdown in the text of a page, outside of code and formulas: a link, bold type, code, a formula, a fence, a tag.
RAW = r"""(() => {
  const main = document.querySelector('main')?.cloneNode(true)
  main?.querySelectorAll('pre, code, svg, script, style, .katex').forEach(e => e.remove())
  const text = main?.textContent ?? ''
  return [/\]\(\S+\)/, /\*\*\S.*?\*\*/, /`[^`\n]+`/, /\$\S[^$\n]*\$/, /^:::.*/m, /<\/?[a-z]+>/].map(r => text.match(r)?.[0]).filter(Boolean)
})()"""
# The pieces of text whose contrast (WCAG 2, relative luminance) is below 3, with the ground of the nearest ancestor that has an opaque one.
FAINT = """(() => {
  const numbers = c => (c.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number)
  const light = c => c.slice(0, 3).map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length == 3 || c[3] == 1) return c } return [255, 255, 255] }
  const found = new Set(), walk = document.createTreeWalker(document.querySelector('main') ?? document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, s = walk.currentNode.data.trim()
    if (!s || !e.checkVisibility() || e.closest('svg, .code-copy-button, .anchorjs-link, script, style')) continue
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a)
    if ((a + .05)/(b + .05) < 3) found.add(e.tagName.toLowerCase() + ' ' + JSON.stringify(s.slice(0, 40)))
  }
  return [...found].slice(0, 3)
})()"""
# smalldocs notes a change of the theme a moment later, by a class.
SHOWN = "dark => !document.querySelector('link.quarto-color-alternate') || document.documentElement.classList.contains('quarto-dark') == dark"
LOADED = "[...document.images].every(i => i.complete) && document.fonts.status == 'loaded'"
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
            page.wait_for_function(LOADED) # not 'networkidle', which on a busy machine sometimes never comes
            found += [f'picture does not show: {src}' for src in page.evaluate(HIDDEN)]
            if page.evaluate(OVERFULL): found.append('wider than the window')
            if page.locator('.katex-error').count(): found.append('a formula that KaTeX does not understand')
            found += [f'markup shown as it is written: {text}' for text in page.evaluate(RAW)]
            for scheme in ('dark', 'light'):
                switch(page, scheme)
                found += [f'hard to read in the {scheme} theme: {text}' for text in page.evaluate(FAINT)]
            problems += [f'{name}: {line}' for line in dict.fromkeys(found)]
            found.clear()
            if pictures: photograph(page, Path(pictures), name)
    return problems


def switch(page, scheme):
    "Show the page in the light or the dark theme"
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(SHOWN, arg=scheme == 'dark')


def photograph(page, folder, name):
    "The whole page, light and dark"
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ('light', 'dark'):
        switch(page, scheme)
        page.screenshot(path=folder/f"{name.replace('/', '-')[:-5]}-{scheme}.png", full_page=True)
    switch(page, 'light')


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
