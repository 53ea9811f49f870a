"""A cluster of Ray for tests, in processes of their own, and a study to carry out on it."""
import csv
import io
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from faults import Script, lines, same_state, until
from flow_study.ray_engine import _on_loopback
from flow_study.rundir import FINAL, is_alive, process_start, read_status, this_process

EPOCHS = 60 # So many that a run which is published from time to time is seen under way on a quick machine too
GRID = f'--group s --arch simple --flow icfm,otcfm --dataset 1k --epochs {EPOCHS} --patience {EPOCHS} --batch-size 64 --lr 1e-2 --warmup-steps 5 --device cpu --checkpoint-seconds 0.1'.split()
EVAL = '--eval-n 200 --eval-steps 3 --eval-draws 20 --seeds 3 --no-measure --no-test'.split()
NAMES = [f'simple-{flow}-1k-none{seed}' for seed in ('', '-s43', '-s44') for flow in ('icfm', 'otcfm')]
RUNS, REPORT = Path('study/checkpoints'), Path('study/reports/s')
SWEEP = ('-m', 'flow_study.study')
TOKEN = secrets.token_hex(32) # One for all files: a process that has used Ray goes on with the token it had first


@pytest.fixture(scope='module')
def ray():
    "Ray with a token and a folder of its own, so that nothing is left behind"
    if find_spec('ray') is None: pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    folder = Path(tempfile.mkdtemp(prefix='rt-', dir='/tmp')) # paths of sockets must be short
    (folder/'ray').mkdir()
    with pytest.MonkeyPatch.context() as m:
        for k, v in dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED='0', RAY_TMPDIR=str(folder), TMPDIR=str(folder)).items(): m.setenv(k, v)
        import ray  # reads them
        yield ray
    shutil.rmtree(folder, ignore_errors=True)


def stat(pid):
    "State, parent and group of a process"
    try: fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError: return None
    return fields[0], int(fields[1]), int(fields[2])


def descendants(pid):
    "All processes below one, with their starts: together these name them for good"
    parents = {int(p.name): s[1] for p in Path('/proc').iterdir() if p.name.isdecimal() and (s := stat(p.name))}
    below = {pid}
    while new := {p for p, parent in parents.items() if parent in below} - below: below |= new
    return {(p, process_start(p)) for p in below - {pid}}


def gone(processes): return not any(start is not None and is_alive({**this_process(), 'pid': p, 'start': start}) for p, start in processes)


class Cluster:
    "Three nodes: a head without processors, which is where the driver is, and two with one each, the second with a GPU that it says is number 1"
    def __init__(self):
        from ray.cluster_utils import Cluster
        quick = dict(health_check_period_ms=500, health_check_failure_threshold=12, health_check_initial_delay_ms=0)
        with _on_loopback(): self.cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, _system_config=quick, no_monitor=True, **self.small()))
        self.address, self.nodes = self.cluster.address, {}

    def small(self): return dict(object_store_memory=80_000_000, include_log_monitor=False, include_dashboard=False)

    def add(self, gpus=(None,)):
        "Nodes, each with its GPU if it has one"
        with _on_loopback():
            for gpu in gpus:
                has = {} if gpu is None else dict(num_gpus=1, resources={f'gpu_{gpu}': 1})
                with pytest.MonkeyPatch.context() as m:
                    m.setenv('CUDA_VISIBLE_DEVICES', '' if gpu is None else str(gpu))
                    self.nodes[self.cluster.add_node(wait=False, num_cpus=1, **has, **self.small())] = gpu
        self.cluster.wait_for_nodes()

    def raylet(self, node): return node.all_processes['raylet'][0].process.pid

    def workers(self, node):
        "Processes on a node that carry out runs, the runs among them"
        return descendants(self.raylet(node))

    def kill(self, node):
        "As when the power fails: everything of a node at once; gives its GPU"
        below = self.workers(node)
        raylet = self.raylet(node)
        for pid in [raylet, *(p for p, _ in below)]:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.cluster.remove_node(node, allow_graceful=False)
        return self.nodes.pop(node)

    def close(self):
        self.cluster.shutdown()


@pytest.fixture(scope='module')
def cluster(ray):
    before = descendants(os.getpid())
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) # what is started in the background of a script inherits that it is ignored
    try:
        cluster = Cluster()
        cluster.add([None, 1])
    finally: signal.signal(signal.SIGINT, handler)
    yield cluster
    left = descendants(os.getpid()) - before
    cluster.close()
    until(lambda: gone(left), 90, 0.1)  # no orphan


@pytest.fixture
def sweep(place):
    "Start the script in a process, which ends with the test at the latest"
    started = []
    def start(*options):
        started.append(Script(*GRID, *EVAL, '--engine', 'ray', *options, script=SWEEP))
        return started[-1]
    yield start
    for s in started: s.close()


def training(name):
    "The process of a run that is well under way; None otherwise"
    status = read_status(RUNS/name)
    return status['process'] if status.get('state') == 'running' and 1 < status.get('epoch', 0) < EPOCHS - 15 and status['alive'] and (RUNS/name/'last.pt').exists() else None


def under_way(): return {k: process for k in NAMES if (process := training(k))}


@pytest.fixture(scope='module')
def local(small_data, tmp_path_factory):
    "Carry out the same study by the local engine, or wait for the test process that does; gives its folder"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    def carry_out():
        folder = shared/'ray-local'
        try: folder.mkdir()
        except FileExistsError: return until(lambda: (folder/'done').exists() and folder, 300, 0.1)
        shutil.copytree(small_data, folder, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as m:
            m.chdir(folder)
            study = Script(*GRID, *EVAL, script=SWEEP)
            code, out, err = study.end(300)
            study.close()
        assert (code, err) == (0, ''), err
        (folder/'done').touch()
        return folder
    return carry_out


def board(place=Path()):
    "The leaderboard on disk, without the columns of time"
    rows = csv.DictReader(io.StringIO((place/REPORT/'leaderboard.csv').read_text()))
    return [{k: v for k, v in r.items() if not k.startswith('time_')} for r in rows]


class Watch(threading.Thread):
    "Looks all the time whether a published run is whole"
    def __init__(self):
        super().__init__(daemon=True)
        self.runs, self.over, self.seen, self.wrong = [(RUNS/k).absolute() for k in NAMES], False, Counter(), []

    def run(self):
        from flow_study.checkpoint import read_checkpoint
        while not self.over:
            for run in self.runs:
                final = read_status(run).get('state') in FINAL  # asked first: what is final now has its checkpoint already
                try: state = read_checkpoint(run/'last.pt')
                except ValueError as e:
                    if (run/'last.pt').exists() and 'cannot be read' not in str(e): self.wrong.append(str(e))
                    continue
                if state['metrics_bytes'] and (run/'metrics.jsonl').stat().st_size < state['metrics_bytes']: self.wrong.append(f'{run}: metrics behind the checkpoint')
                if final and state['progress']['epoch'] < EPOCHS: self.wrong.append(f'{run}: final before its checkpoint')
                self.seen[run.name] += 1
            time.sleep(1.)


def _driver_killed(first, cluster, name, again):
    "Kill a driver while another run is under way; the same command once more, when its runs have noticed"
    first.until(lambda: set(under_way()) - {name} or 'done' in first.said()[0], 300, 0.1)
    below = {p for n in cluster.nodes for p in cluster.workers(n) if stat(p[0]) and Path(f'/proc/{p[0]}/cmdline').read_bytes().find(b'forkserver') >= 0}
    first.send(signal.SIGKILL)
    first.process.wait(30)
    assert below
    until(lambda: gone(below), 90, 0.1)
    return again()


def a_node_is_killed(cluster, local, sweep, bring_back, driver_too):
    "And the driver, if it is to be: every run and the leaderboard are those of the local engine, whose study nobody disturbed"
    how = dict(address=f'"{cluster.address}"', bring_back=str(bring_back).lower(), publish_seconds=0.2)
    Path('s.toml').write_text('name = "s"\n[grid]\narch = "simple"\nflow = "icfm"\ndataset = "1k"\n[engine_options]\n' + '\n'.join(f'{k} = {v}' for k, v in how.items()))
    options = ['--study', 's.toml']
    first, watch = sweep(*options), Watch()
    watch.start()
    try:
        (name, process), *_ = first.until(under_way, 300, 0.1).items()
        node, = [n for n in cluster.nodes if process['pid'] in {p for p, _ in cluster.workers(n)}]
        gpu = cluster.kill(node)
        first.until(lambda: 'handed out again, 1 of 3' in first.said()[0], 180, 0.1)
        last = _driver_killed(first, cluster, name, lambda: sweep(*options)) if driver_too else first
        cluster.add([gpu])
        code, out, err = last.end(240)
        assert (code, err) == (0, ''), err
    finally:
        watch.over = True
        watch.join()
    assert watch.wrong == [] and len(watch.seen) == len(NAMES)
    assert {k: read_status(RUNS/k)['state'] for k in NAMES} == dict.fromkeys(NAMES, 'finished')
    assert read_status(RUNS/name)['generation'] > 1  # it went on elsewhere, and not from its beginning
    assert not list(RUNS.glob('*/lock')) and not list(RUNS.glob('.driver-*')) and not [f for k in NAMES for f in (RUNS/k).glob('.*')]
    assert not list(Path(os.environ['TMPDIR']).glob('flow_study-nodes-*/*/data'))
    undisturbed = local()
    for k in NAMES: assert same_state(RUNS/k/'last.pt', undisturbed/RUNS/k/'last.pt') and lines(RUNS/k) == lines(undisturbed/RUNS/k)
    assert board() == board(undisturbed)
