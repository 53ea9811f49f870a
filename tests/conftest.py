"""What all tests share: one thread, so that sums come out the same everywhere, and the data and devices some of them need."""
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# torch reads this when it is imported, so it has to be set before any test module is.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONG = ('test_ray_brought_back.py', 'test_ray.py', 'test_ray_own_cluster.py', 'test_browser.py', 'test_study.py', 'test_kill.py') # Files of minutes, longest first


def pytest_collection_modifyitems(items):
    "Where files go to several processes (`--dist loadfile --no-loadscope-reorder`) a long one is not the last"
    rank = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def same_start():
    "One thread, and torch's global generator from the same seed, whatever the test before it did: the order of tests has no effect"
    if 'torch' not in sys.modules: return
    sys.modules['torch'].set_num_threads(1)
    sys.modules['torch'].manual_seed(0)


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


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    "A folder with `study/datasets`: 1,000 rows of 32 numbers, in splits, and their statistics"
    import torch
    from flow_study.data import make_splits, save_splits
    from flow_study.draws import keyed_generator
    folder = tmp_path_factory.mktemp('small')
    gen = keyed_generator(0, 'tests')
    latent, mix, noise = (torch.randn(*shape, generator=gen) for shape in ((1050, 10), (10, 32), (1050, 32)))
    rows = latent@mix + 0.3*noise # correlated, so that there is something to learn
    save_splits(make_splits(rows, sizes=('1k',)), folder/'study/datasets')
    return folder


@pytest.fixture
def place(small_data, tmp_path, monkeypatch):
    "A fresh folder with a copy of `small_data`, in which the test runs, without W&B and GPU"
    shutil.copytree(small_data, tmp_path/'place')
    monkeypatch.chdir(tmp_path/'place')
    for k, v in dict(WANDB_MODE='disabled', CUDA_VISIBLE_DEVICES='').items(): monkeypatch.setenv(k, v)
    return tmp_path/'place'


@pytest.fixture
def script(place):
    "Start the training script in a process, which ends with the test at the latest"
    from faults import Script
    started = []
    def start(*options, **kwargs):
        started.append(Script(*options, **kwargs))
        return started[-1]
    yield start
    for s in started: s.close()


@pytest.fixture
def train_main(place, capsys):
    "Call the script's `main` in this process; gives exit code, standard output and standard error"
    import logging, warnings
    from flow_study.train import main
    package, show = logging.getLogger('flow_study'), warnings.showwarning
    before = package.handlers[:], package.level, package.propagate
    def call(*options):
        capsys.readouterr()
        try: code = main([str(o) for o in options])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    yield call
    warnings.showwarning = show
    package.handlers[:], package.level, package.propagate = before


@pytest.fixture
def small_disk(tmp_path):
    "Mount a file system of some bytes in memory; gives its folder"
    mounted = []
    def mount(size):
        path = tmp_path/f'disk-{len(mounted)}'
        path.mkdir()
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', path], capture_output=True, text=True)
        if done.returncode: pytest.skip(f'cannot mount a small disk: {done.stderr.strip()}')
        mounted.append(path)
        return path
    yield mount
    for path in mounted: subprocess.run(['umount', '-l', path], check=True)


def pytest_runtest_setup(item):
    "Skip what needs a GPU where there is none; torch is imported only if such a test is run"
    if item.get_closest_marker('cuda') is None: return
    import torch
    if not torch.cuda.is_available(): pytest.skip('needs a GPU: torch finds no CUDA device')
