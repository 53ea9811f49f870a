"""The house rules: what a module may import, which names are public, and what stays light."""
import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import flow_study

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT/'flow_study', ROOT/'nbs'
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if p.stem not in ('__init__', '_modidx'))
HEAVY = 'torch numpy scipy sklearn matplotlib wandb ipywidgets IPython pandas tqdm ot torchdiffeq statsmodels ray'.split()


@pytest.fixture(scope='module')
def order(ci_tool):
    "The number of each module, which is the number of its notebook"
    default_exp = ci_tool('orphans').default_exp
    found = {default_exp(nb): int(nb.name[:2]) for nb in sorted(NBS.glob('[0-9][0-9]_*.ipynb'))}
    return {module: number for module, number in found.items() if module}


def imported(tree, package='flow_study'):
    "The names of the package's modules that the code imports, inside functions too; `''` for the package itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.partition('.')[2] for a in node.names if a.name.split('.')[0] == package)
        if isinstance(node, ast.ImportFrom):
            base = ('.' if node.level else '') + (node.module or '')
            if base in ('.', package): yield from (a.name if a.name in MODULES else '' for a in node.names if a.name != '__version__')
            elif base.startswith(('.', f'{package}.')): yield base.removeprefix(package).removeprefix('.')


def public_names(module):
    "`__all__` of a module, read without running it"
    for node in ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__': return ast.literal_eval(node.value)
    return []


def python(code):
    "What a fresh Python prints for some code, run outside the checkout"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_imported_finds_every_form():
    code = 'import flow_study.a, os\nfrom .b import x\ndef f():\n    from flow_study.c import y\n    from flow_study import Z, __version__'
    assert list(imported(ast.parse(code))) == ['a', 'b', 'c', '']


def test_notebook_numbers_are_unique(order):
    assert [n for n, count in Counter(order.values()).items() if count > 1] == []


@pytest.mark.parametrize('module', MODULES)
def test_imports_only_from_rooms_above(module, order):
    used = set(imported(ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8'))))
    assert [other for other in sorted(used) if order.get(other, 99) >= order[module]] == []


def test_no_orphan_module(ci_tool):
    assert ci_tool('orphans').orphans(ROOT) == []


def test_public_names_are_unique():
    counts = Counter(name for module in MODULES for name in public_names(module))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize('module', MODULES)
def test_no_name_is_taken_twice(module):
    "Cells do not see each other: a second function of the same name would silently replace the first in the module"
    body = ast.parse((PACKAGE/f'{module}.py').read_text(encoding='utf-8')).body
    names = Counter(node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list) # a decorated one may be a method, by `patch`
    assert {name for name, times in names.items() if times > 1} == set()


def test_no_public_name_is_a_module():
    assert {name for module in MODULES for name in public_names(module)} & set(MODULES) == set()


def test_package_import_is_light():
    assert python(f'import flow_study, sys; print([m for m in {HEAVY} if m in sys.modules])').strip() == '[]'


def test_lazy_names_are_public_in_their_module():
    assert flow_study._public
    for module, names in flow_study._public.items():
        assert set(names.split()) - set(public_names(module)) == set(), module


def test_lazy_names_are_listed_and_resolve():
    for module, names in flow_study._public.items():
        for name in names.split():
            assert name in dir(flow_study)
            assert getattr(flow_study, name) is getattr(sys.modules[f'flow_study.{module}'], name)


def test_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='TrainingConfg'): flow_study.TrainingConfg


@pytest.mark.parametrize('module', ['config', 'rundir', 'runs', 'sampling', 'metrics', 'device', 'train', 'statistics', 'engines', 'ray_engine', 'study'])
def test_module_imports_without_torch(module):
    assert python(f"import flow_study.{module}, sys; print('torch' in sys.modules)").strip() == 'False'


@pytest.mark.parametrize('script, module', [('flow_study_train', 'train'), ('flow_study_sweep', 'study')])
def test_help_without_torch(script, module):
    code = (f"import sys; sys.argv = ['{script}', '--help']\nfrom flow_study.{module} import main\n"
            "try: code = main()\nexcept SystemExit as e: code = e.code\nprint(code or 0, 'torch' in sys.modules)")
    out = python(code)
    assert out.splitlines()[-1] == '0 False'
    assert '--arch' in out
