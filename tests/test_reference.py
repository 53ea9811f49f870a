"""The reference is made from docstrings and the comments beside parameters and fields: none may be missing."""
import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from fastcore.docments import docments

PACKAGE = Path(__file__).resolve().parents[1]/'flow_study'
MODULES = sorted(p.stem for p in PACKAGE.glob('*.py') if not p.stem.startswith('_'))


def own_doc(o):
    "The docstring of an object itself: not inherited, and not the signature that a dataclass makes up"
    doc = vars(o).get('__doc__') if inspect.isclass(o) else getattr(o, '__doc__', None)
    return '' if not doc or inspect.isclass(o) and doc.startswith((f'{o.__name__}(', 'Alias for field')) else doc


def undescribed(o):
    "The parameters of a function or of making an instance, and the fields, without a comment; of `*args` and `**kwargs` docments cannot tell"
    if inspect.isclass(o) and hasattr(o, '_fields'):  # of these docments sees no comment
        return [k for k in o._fields if not re.search(rf'^ +{k}: ?\S.* # \S', inspect.getsource(o), flags=re.M)]
    if inspect.isclass(o) and (issubclass(o, BaseException) or '__init__' not in vars(o)): return []
    named = [k for k, p in inspect.signature(o).parameters.items() if k != 'self' and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = docments(o, full=True)
    return [k for k in named if not found.get(k, {}).get('docment')]


def patched(source):
    "Class and name of each public method that a cell of its own adds, and that the pages therefore describe by itself"
    for node in ast.parse(source).body:
        marks = [getattr(d.func if isinstance(d, ast.Call) else d, 'id', '') for d in getattr(node, 'decorator_list', [])]
        if 'patch' in marks and not node.name.startswith('_'): yield node.args.args[0].annotation.id, node.name


def gaps(name, o):
    "What is missing in the description of one object"
    o = o.fget if isinstance(o, property) else inspect.unwrap(o) if inspect.isfunction(o) else o
    if not callable(o): return []
    return ([] if own_doc(o) else [f'{name}: no docstring']) + [f'{name}: {k} is not described' for k in undescribed(o)]


def test_gaps_are_found():
    def bare(x, y=1): pass
    def half(x, # Described
             y=1): "Does nothing"
    assert gaps('bare', bare) == ['bare: no docstring', 'bare: x is not described', 'bare: y is not described']
    assert gaps('half', half) == ['half: y is not described']


class _Pair(NamedTuple):
    "Two numbers"
    a:int # The first
    b:int=0


@dataclass
class _Record:
    a:int # The first
    b:int=0


def test_gaps_of_fields_are_found():
    assert gaps('_Pair', _Pair) == ['_Pair: b is not described']
    assert gaps('_Record', _Record) == ['_Record: no docstring', '_Record: b is not described']


def test_patched_methods_are_found():
    source = '@patch\ndef f(self:A, x): pass\n@patch(as_prop=True)\ndef g(self:B): pass\n@patch\ndef _h(self:A): pass\ndef k(): pass'
    assert list(patched(source)) == [('A', 'f'), ('B', 'g')]


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_is_described(module):
    mod = importlib.import_module(f'flow_study.{module}')
    assert [gap for name in getattr(mod, '__all__', []) for gap in gaps(name, getattr(mod, name))] == []


@pytest.mark.parametrize('module', MODULES)
def test_every_method_of_the_pages_is_described(module):
    mod = importlib.import_module(f'flow_study.{module}')
    methods = [(c, k) for c, k in patched((PACKAGE/f'{module}.py').read_text(encoding='utf-8')) if not c.startswith('_')]
    assert [gap for c, k in methods for gap in gaps(f'{c}.{k}', inspect.getattr_static(getattr(mod, c), k))] == []


@pytest.mark.parametrize('module', MODULES)
def test_public_methods_have_docstrings(module):
    "Their own, or that of the method they replace"
    mod = importlib.import_module(f'flow_study.{module}')
    classes = [o for o in (getattr(mod, n) for n in getattr(mod, '__all__', [])) if inspect.isclass(o)]
    methods = [(c, k) for c in classes for k, f in vars(c).items() if inspect.isfunction(f) and not k.startswith('_')]
    assert [f'{c.__name__}.{k}' for c, k in methods if not inspect.getdoc(getattr(c, k))] == []
