"""The reference is made from docstrings and the comments beside parameters: none may be missing."""
import importlib
import inspect
from pathlib import Path

import pytest
from fastcore.docments import docments

MODULES = sorted(p.stem for p in (Path(__file__).resolve().parents[1]/'flow_study').glob('*.py') if not p.stem.startswith('_'))


def own_doc(o):
    "The docstring of an object itself: not inherited, and not the signature that a dataclass makes up"
    doc = vars(o).get('__doc__') if inspect.isclass(o) else getattr(o, '__doc__', None)
    return '' if not doc or inspect.isclass(o) and doc.startswith((f'{o.__name__}(', 'Alias for field')) else doc


def undescribed(o):
    "The parameters of a function, or of making an instance, without a comment; of `*args` and `**kwargs` docments cannot tell"
    if inspect.isclass(o) and (issubclass(o, BaseException) or '__init__' not in vars(o)): return []
    named = [k for k, p in inspect.signature(o).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = docments(o, full=True)
    return [k for k in named if not found[k].get('docment')]


def gaps(module):
    "What is missing in the reference of one module"
    found = []
    for name in getattr(module, '__all__', []):
        o = getattr(module, name)
        if callable(o) and not own_doc(o): found.append(f'{name}: no docstring')
        if callable(o): found += [f'{name}: {k} is not described' for k in undescribed(o)]
    return found


def test_gaps_are_found():
    def bare(x, y=1): pass
    def half(x, # Described
             y=1): "Does nothing"
    module = type('module', (), dict(__all__=['bare', 'half'], bare=bare, half=half))
    assert gaps(module) == ['bare: no docstring', 'bare: x is not described', 'bare: y is not described', 'half: y is not described']


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_is_described(module):
    assert gaps(importlib.import_module(f'flow_study.{module}')) == []


@pytest.mark.parametrize('module', MODULES)
def test_public_methods_have_docstrings(module):
    "Their own, or that of the method they replace"
    mod = importlib.import_module(f'flow_study.{module}')
    classes = [o for o in (getattr(mod, n) for n in getattr(mod, '__all__', [])) if inspect.isclass(o)]
    methods = [(c, k) for c in classes for k, f in vars(c).items() if inspect.isfunction(f) and not k.startswith('_')]
    assert [f'{c.__name__}.{k}' for c, k in methods if not inspect.getdoc(getattr(c, k))] == []
