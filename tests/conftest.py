"""What all tests share: one thread, so that sums come out the same everywhere, and the data and devices some of them need."""
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# torch reads this when it is imported, so it has to be set before any test module is.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    "Keep torch at one thread in every test that uses it, whatever the test before it did"
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(1)


@pytest.fixture(scope='session')
def sonar():
    "The folder with the SONAR splits and statistics, which are too large to be part of the project"
    path = Path(os.environ.get('FLOW_STUDY_SONAR', ROOT.parent/'shared'/'data'/'sonar'))
    if (path/'splits').is_dir(): return path
    pytest.skip(f'no SONAR files in {path}; FLOW_STUDY_SONAR names their folder')


@pytest.fixture(scope='session')
def ci_tool():
    "A function that imports `.ci/{name}.py`, which is no package"
    def load(name):
        spec = spec_from_file_location(f'ci_{name}', ROOT/'.ci'/f'{name}.py')
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


def pytest_runtest_setup(item):
    "Skip what needs a GPU where there is none; torch is imported only if such a test is run"
    if item.get_closest_marker('cuda') is None: return
    import torch
    if not torch.cuda.is_available(): pytest.skip('needs a GPU: torch finds no CUDA device')
