"""The samples of the pages' prose, which no notebook runs: Python as it stands there, commands up to the point where they would begin."""
import importlib
import re
import shlex
from pathlib import Path

import nbformat
import pytest

NBS = sorted((Path(__file__).resolve().parents[1]/'nbs').glob('*.ipynb'))
PROGRAMS = dict(flow_study_train='train', flow_study_data='corpus', flow_study_runs='runs', flow_study_sample='sampling', flow_study_eval='metrics', flow_study_sweep='study')


def prose(path):
    "The Markdown of a notebook"
    return '\n\n'.join(c.source for c in nbformat.read(path, as_version=nbformat.NO_CONVERT).cells if c.cell_type == 'markdown')


def fences(text):
    "Language and text of each block of code"
    return re.findall(r'^```(\w*)\n(.*?)^```', text, flags=re.M | re.S)


def commands(text):
    "The calls of this project's programs, in blocks and within lines, as lists of words; `...` ends one that is not whole"
    spans = re.findall(r'(?<!`)`(flow_study_[a-z]+ [^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))
    lines = [line for lang, block in fences(text) if lang != 'python' for line in block.replace('\\\n', ' ').splitlines()]
    for part in [*spans, *(part for line in lines for part in line.split('&&'))]:
        words = shlex.split(part, comments=True)
        if words and words[0] in PROGRAMS: yield words


def refused(words):
    "Why a program does not accept these arguments; None where it does"
    module = importlib.import_module(f'flow_study.{PROGRAMS[words[0]]}')
    whole = module.__name__ == 'flow_study.train' and '...' not in words
    try: (module.parse_args if whole else module._parser().parse_args)([w for w in words[1:] if w != '...'])
    except SystemExit as e: return f"{' '.join(words)}: exit code {e.code}" if e.code else None  # 0: help was asked for


def test_commands_are_found():
    text = ('Use `flow_study_eval x` or `flow_study_eval`.\n```sh\npip install x && flow_study_data a --b  # c\nflow_study_train \\\n  -d ...\n```\n'
            '```\nflow_study_runs          what is there\n```\n```python\nx\n```')
    assert list(commands(text)) == [['flow_study_eval', 'x'], ['flow_study_data', 'a', '--b'], ['flow_study_train', '-d', '...'], ['flow_study_runs', 'what', 'is', 'there']]
    assert fences(text)[-1] == ('python', 'x\n')


def test_wrong_arguments_are_refused(capsys):
    for line in ('flow_study_eval x --nn 3', 'flow_study_train --flow icfm', 'flow_study_sweep --nearest 1 ...'): assert refused(line.split()), line
    for line in ('flow_study_eval x --n 3', 'flow_study_train --flow icfm ...'): assert refused(line.split()) is None, line


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_commands_are_accepted(path, capsys):
    assert [r for r in map(refused, commands(prose(path))) if r] == []


@pytest.mark.slow
def test_python_runs_as_it_stands(place, monkeypatch):
    "In one folder, the trainer's first: it makes the run that others ask for"
    import torch
    import flow_study
    for k in ('CUDA_DEVICE_ORDER', 'CUDA_VISIBLE_DEVICES'): monkeypatch.setenv(k, '')  # what a sample sets is taken back
    known = dict(velocity=lambda x, t: -x, x0=torch.ones(3, 2))  # what the text around a sample has
    samples = [(p.stem, code) for p in NBS for lang, code in fences(prose(p)) if lang == 'python']
    for name, code in sorted(samples, key=lambda s: s[0] != '28_trainer'):
        try: exec(compile(code, name, 'exec'), {**{k: getattr(flow_study, k) for k in flow_study.__all__}, **known})
        except Exception as e: raise AssertionError(f'{name}: {e!r}') from e
    assert len(samples) > 5
