"""What every notebook must look like for nbdev, the pages and the next reader."""
import ast
import re
from pathlib import Path

import nbformat
import pytest

NBS = sorted((Path(__file__).resolve().parents[1]/'nbs').glob('*.ipynb'))
# nbdev runs these cells for the pages anyway, so an import beside other code does no harm there.
EXPORTS = {'export', 'exports', 'exporti', 'exec_doc'}
WIDGET = 'application/vnd.jupyter.widget-view+json'


def directives(source):
    "The `#|` lines of a cell as `{name: value}`"
    return {k: v.lower() for k, v in re.findall(r'^#\|\s*(\w+):?[ \t]*(.*?)\s*$', source, flags=re.M)}


def trees(source):
    "All nodes of a cell's code; none for a cell of another language or one that starts with a magic"
    return [] if source.lstrip()[:1] in ('%', '!') else list(ast.walk(ast.parse(source)))


def mixes(source):
    "Whether nbdev would run more than an import when it runs this cell's imports for the pages"
    flags = directives(source)
    if EXPORTS & set(flags) or flags.get('eval') == 'false': return False
    kinds = {type(node) for node in trees(source)}
    return bool(kinds & {ast.Import, ast.ImportFrom}) and bool(kinds & {ast.Expr, ast.Assign})


def has_docs(cells):
    "Whether nbdev runs any cell of the notebook for the pages: it does where something is exported or shown"
    return any({'export', 'exports', 'exec_doc'} & set(directives(c.source)) or 'show_doc(' in c.source for c in cells)


def slug(heading):
    "The anchor of a heading, as far as it could be a symbol's"
    return re.sub(r'\s+', '-', heading.replace('`', '').strip()).lower()


def symbols(cells):
    "The functions and classes that export cells define, lower case, as in their anchors"
    nodes = [node for c in cells if 'export' in directives(c.source) for node in ast.parse(c.source).body]
    return {n.name.lower() for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


@pytest.fixture(params=NBS, ids=lambda path: path.stem)
def nb(request):
    "Each notebook"
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def code(nb):
    "Its code cells"
    return [cell for cell in nb.cells if cell.cell_type == 'code']


def test_there_are_notebooks():
    assert {'index', '00_config'} <= {path.stem for path in NBS}


def test_sidebar_has_every_notebook_once():
    "The order of the pages is made by hand, so a new notebook has to be put into it"
    listed = re.findall(r'- ([\w-]+)\.ipynb$', (NBS[0].parent/'sidebar.yml').read_text(encoding='utf-8'), flags=re.M)
    assert sorted(listed) == sorted(path.stem for path in NBS)


def test_format_is_valid(nb):
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    nbformat.validate(nb)


def test_first_cell_is_title_and_subtitle_only(nb):
    "nbdev turns this cell into the page's head and drops whatever else is in it"
    first = next(cell for cell in nb.cells if cell.cell_type == 'markdown').source.strip()
    assert re.fullmatch(r'# \S.*\n+> \S.*(\n+(- \w.*: .*\n?)+)?', first), first


def test_no_heading_takes_the_anchor_of_a_symbol(nb, code):
    "Of two equal anchors the first wins, and links to the symbol would lead to the prose above it"
    headings = [h for c in nb.cells if c.cell_type == 'markdown' for h in re.findall(r'^##+ (.+)$', c.source, flags=re.M)]
    assert [h for h in headings if slug(h) in symbols(code)] == []


def test_no_saved_errors(code):
    assert [o.evalue for cell in code for o in cell.outputs if o.output_type == 'error'] == []


def test_no_widget_state(nb, code):
    "A saved widget is a dead one on the pages"
    assert 'widgets' not in nb.metadata
    assert [cell.source for cell in code for o in cell.outputs if WIDGET in o.get('data', {})] == []


def test_no_execution_counts(code):
    assert [cell.source for cell in code if cell.execution_count is not None] == []
    assert [cell.source for cell in code for o in cell.outputs if o.get('execution_count') is not None] == []


def test_export_cells_are_short(code):
    "One idea a cell: 45 lines without blank ones and directives are the very end of that"
    def length(source): return sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())
    exported = [cell.source for cell in code if EXPORTS & set(directives(cell.source))]
    assert [source[:80] for source in exported if length(source) > 45] == []


def test_imports_have_cells_of_their_own(code):
    "For the pages nbdev runs the cells with an import, and nothing that the rest of such a cell needs"
    if has_docs(code): assert [cell.source for cell in code if mixes(cell.source)] == []


def test_annotations_name_what_is_known(code):
    "For the pages nbdev evaluates them: a quoted name that a later cell defines ends the build"
    quoted = [(i, name) for i, c in enumerate(code) for name in re.findall(r"""\)\s*->\s*['"](\w+)['"]""", c.source)]
    assert [name for i, name in quoted if any(re.search(rf'^class {name}\b', c.source, flags=re.M) for c in code[i + 1:])] == []


@pytest.mark.parametrize('source, wanted', [
    ('import os', False), ('import os\nos.getcwd()', True), ('#| export\nimport os\nx = 1', False),
    ('#| eval: false\nimport os\nx = 1', False), ('def f():\n    import os\n    return os.sep', False),
    ('def f():\n    import os\n    x = 1', True), ('x = 1', False), ('%time import os', False)])
def test_mixes(source, wanted):
    assert mixes(source) == wanted
