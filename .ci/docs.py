"""Build the documentation pages and check them: `python .ci/docs.py [FOLDER]`, by default into `_docs`.

nbdev renders its pages with Quarto. This is a stand-in for machines without it: nbdev prepares the notebooks exactly as it
does for Quarto, then smalldocs, which reads the same `_quarto.yml`, makes the pages. They look alike, but cross references
(`@fig-x`) work in Quarto only. Formulas are drawn by KaTeX from a folder (Debian's packages libjs-katex and fonts-katex put it where
it is looked for), so that no page asks the network for anything. Then a headless Chromium opens every page; see `browser.py`.
"""
import argparse, configparser, inspect, json, os, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parents[1]
KATEX = Path('/usr/share/javascript/katex')


def process(root):
    "Let nbdev run what the pages need of every notebook, and write the result to `_proc`"
    os.chdir(root)
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    _build_modidx()
    nbdev_sidebar.__wrapped__(file_re=r'\.(?:ipynb|qmd|html)$')
    # `nbdev_proc_nbs` would do all this too, but installs Quarto first.
    return Path(proc_nbs(force=True))


def page_of(notebook):
    "The stem of the page that a processed notebook asks for by `output-file`"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    front = ''.join(cells[0]['source']) if cells and cells[0]['cell_type'] == 'raw' else ''
    found = re.search(r'^output-file:\s*(\S+)\.html\s*$', front, flags=re.M)
    return found.group(1) if found else notebook.stem


def rename(folder):
    "Give each notebook the name of its page, which smalldocs goes by, and let links and the sidebar follow"
    pages = {notebook.name: page_of(notebook) for notebook in sorted(folder.glob('*.ipynb'))}
    for name, stem in pages.items():
        text = re.sub(r'"output-file: \S+\\n",?\s*', '', (folder/name).read_text(encoding='utf-8'))
        text = re.sub(r'\]\(([\w-]+\.ipynb)', lambda m: f"]({pages.get(m[1], m[1][:-6])}.ipynb", text)
        (folder/name).unlink()
        (folder/f'{stem}.ipynb').write_text(text, encoding='utf-8')
    sidebar = (folder/'sidebar.yml').read_text(encoding='utf-8')
    entry = re.compile(r'(- )([\w-]+\.ipynb)$', flags=re.M)
    (folder/'sidebar.yml').write_text(entry.sub(lambda m: f'{m[1]}{pages.get(m[2], m[2][:-6])}.ipynb', sidebar), encoding='utf-8')


def render(processed, out):
    "Make the pages from a copy, since the notebooks are renamed on the way"
    with tempfile.TemporaryDirectory() as tmp:
        site = Path(tmp)/'site'
        shutil.copytree(processed, site)
        rename(site)
        subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', '--quiet', str(site)], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site/'_docs', out)


def draw_formulas_from(folder, out):
    "Let the pages load KaTeX from a copy of its folder beside them"
    shutil.copytree(folder, out/'site_libs/katex', ignore=shutil.ignore_patterns('*.mjs', '*.ttf'))
    for path in out.rglob('*.html'):
        text, home = path.read_text(encoding='utf-8'), '../'*len(path.relative_to(out).parents[1:])
        text = re.sub(r'https://[^"]+/katex@[\d.]+/dist/([\w./-]+)', lambda m: f"{home}site_libs/katex/{m[1].replace('auto-render.min', 'auto-render')}", text)
        path.write_text(text, encoding='utf-8')


class Page(HTMLParser):
    "What one page offers (`ids`), what it asks for (`links`), what it says (`text`) and what of it is shown as it is written (`code`)"
    def __init__(self, path):
        super().__init__()
        self.ids, self.twice, self.links, self.text, self.code, self._drawing, self._written = set(), [], [], '', '', 0, 0
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        "Note the anchors and the addresses of one tag; drawings name their parts, and several may do it alike"
        self._drawing += tag == 'svg'
        self._written += tag == 'pre'
        for name, value in attrs:
            if name == 'id' and value in self.ids and not self._drawing: self.twice.append(value)
            if name == 'id' or (tag == 'a' and name == 'name'): self.ids.add(value)
            if name in ('href', 'src') and value: self.links.append(value)

    def handle_endtag(self, tag):
        "Note where a drawing or a block of code ends"
        self._drawing -= tag == 'svg'
        self._written -= tag == 'pre'
        if tag == 'pre': self.code += '\n'

    def handle_data(self, data):
        "Keep the text, and apart from it that of code"
        self.text += data
        if self._written: self.code += data


def missing_pages(notebooks, pages):
    "A line for each notebook without a page"
    stems = {re.sub(r'^\d+[a-zA-Z0-9]*_', '', notebook.stem.lower()): notebook for notebook in notebooks}
    return [f'{notebook.name}: no page {stem}.html' for stem, notebook in stems.items() if f'{stem}.html' not in pages]


def target_of(link, page, site_url):
    "The file below the site and the anchor that a link leads to; None for a link that leaves the site"
    # Links to symbols are written with the site's own address, wherever the pages lie.
    local = re.sub(rf'^{re.escape(site_url)}(?=[/#]|$)/?', '/', link)
    if urlsplit(local).scheme or local.startswith('//'): return None
    path, anchor = urldefrag(local)
    path = unquote(path.split('?')[0])
    base = '' if path.startswith('/') else os.path.dirname(page)
    file = os.path.join(base, path.lstrip('/'), 'index.html' if path.endswith('/') else '').rstrip('/') if path else page
    return os.path.normpath(file), unquote(anchor)


def broken_links(out, pages, site_url):
    "A line for each link, picture or anchor within the site that leads nowhere, and for each line of source that was not found"
    problems = []
    for name, page in pages.items():
        for link in page.links:
            target = target_of(link, name, site_url)
            if link.endswith('#LNone'): problems.append(f'{name}: {link}: no such line') # what nbdev writes where it did not find one
            if target is None: continue
            path, anchor = target
            if not (out/path).is_file(): problems.append(f'{name}: {link}: no such file')
            elif anchor and path in pages and anchor not in pages[path].ids: problems.append(f'{name}: {link}: no such anchor')
    return problems


def stolen_anchors(pages):
    "A line for each anchor that a page has twice: links to the second one, often a symbol's, lead to the first"
    return [f'{name}: #{anchor} is there twice' for name, page in pages.items() for anchor in page.twice]


def links_in_code(pages, site_url):
    "A line for each link to a symbol that became part of a block of code, where it is shown as it is written"
    found = re.compile(rf'\[`[^`]+`\]\({re.escape(site_url)}\S*\)')
    return [f'{name}: link in code: {link}' for name, page in pages.items() for link in dict.fromkeys(found.findall(page.code))]


def borrowed_docs(pages):
    "A line for each symbol that says of itself what Python says of every other one, since it has no docstring of its own"
    sayings = [inspect.getdoc(call) for call in (type.__call__, object.__repr__, object.__init__, object.__str__)]
    return [f'{name}: no docstring of its own: {saying}' for name, page in pages.items() for saying in sayings if saying in page.text]


def site_url(root):
    "The address of the published pages, from `settings.ini`"
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']['doc_host'] + parser['DEFAULT']['doc_baseurl']


def main(argv=None):
    "The command line; returns the exit code"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', type=Path, help='where the pages go (default: _docs)')
    parser.add_argument('--root', type=Path, default=ROOT, help='the project (default: this one)')
    parser.add_argument('--katex', type=Path, default=KATEX, help=f'folder of KaTeX (default: {KATEX})')
    parser.add_argument('--browser', choices=['must', 'may', 'no'], default='may', help='open the pages: where a browser is missing, fail or say so')
    parser.add_argument('--pictures', type=Path, help='where photographs of all pages go, light and dark; none by default')
    args = parser.parse_args(argv)
    root, out = args.root.resolve(), (args.folder or args.root/'_docs').resolve()
    print('pages by smalldocs, a stand-in for Quarto', flush=True)
    render(process(root), out)
    if args.katex.is_dir(): draw_formulas_from(args.katex, out)
    pages = {path.relative_to(out).as_posix(): Page(path) for path in sorted(out.rglob('*.html'))}
    problems = [*missing_pages(sorted((root/'nbs').glob('[!_]*.ipynb')), pages), *broken_links(out, pages, site_url(root)), *stolen_anchors(pages),
                *links_in_code(pages, site_url(root)), *borrowed_docs(pages)]
    problems += in_browser(out, args)
    for problem in problems: print(problem)
    print(f'{len(pages)} pages, {len(problems)} problems')
    return 1 if problems else 0


def in_browser(out, args):
    "What is wrong with the pages once they are opened"
    import browser
    path = None if args.browser == 'no' else browser.find_browser()
    if path is None or not args.katex.is_dir():
        missing = 'no Chromium' if path is None else f'no KaTeX in {args.katex}'
        print('pages not opened in a browser' + ('' if args.browser == 'no' else f': {missing}'), flush=True)
        return ['pages were not opened, and must be'] if args.browser == 'must' else []
    print('pages opened in a browser', flush=True)
    with browser.chromium(path) as opened: return browser.open_pages(out, opened, args.pictures)


# The guard matters: nbdev starts processes that import this file again.
if __name__ == '__main__': sys.exit(main())
