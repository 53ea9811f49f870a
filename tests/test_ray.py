"""The engine ray on a real cluster: three nodes in processes of their own, a node and a driver that are killed, both ways for run directories."""
import csv
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from faults import Script, until
from flow_study.engines import run_state
from flow_study.ray_engine import _on_loopback
from flow_study.rundir import FINAL, acquire_lock, is_alive, process_start, read_status, request, this_process
from flow_study.study import Study, main

GRID = '--group s --arch simple --flow icfm,otcfm --dataset 1k --epochs 80 --patience 80 --batch-size 64 --lr 1e-2 --warmup-steps 5 --device cpu --checkpoint-seconds 0'.split()
EVAL = '--eval-n 200 --eval-steps 3 --eval-draws 20 --seeds 3 --no-measure --no-test'.split()
NAMES = [f'simple-{flow}-1k-none{seed}' for seed in ('', '-s43', '-s44') for flow in ('icfm', 'otcfm')]
RUNS, REPORT = Path('study/checkpoints'), Path('study/reports/s')
SWEEP = ('-m', 'flow_study.study')


@pytest.fixture(scope='module')
def ray():
    "Ray with a token and a folder of its own, so that nothing is left behind"
    if find_spec('ray') is None: pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    folder = Path(tempfile.mkdtemp(prefix='rt-', dir='/tmp')) # paths of sockets must be short
    (folder/'ray').mkdir()
    with pytest.MonkeyPatch.context() as m:
        for k, v in dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED='0', RAY_TMPDIR=str(folder), TMPDIR=str(folder)).items(): m.setenv(k, v)
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
    "A head without processors, which is where the driver is, and nodes with one each"
    def __init__(self):
        from ray.cluster_utils import Cluster
        quick = dict(health_check_period_ms=500, health_check_failure_threshold=12, health_check_initial_delay_ms=0)
        with _on_loopback(): self.cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, _system_config=quick, no_monitor=True, **self.small()))
        self.address, self.nodes = self.cluster.address, []

    def small(self): return dict(object_store_memory=80_000_000, include_log_monitor=False, include_dashboard=False)

    def add(self, n=1, **more):
        with _on_loopback():
            for _ in range(n): self.nodes.append(self.cluster.add_node(wait=False, **{**dict(num_cpus=1), **self.small(), **more}))
        self.cluster.wait_for_nodes()
        return self.nodes[-1]

    def raylet(self, node): return node.all_processes['raylet'][0].process.pid

    def workers(self, node):
        "Processes on a node that carry out runs, the runs among them"
        return descendants(self.raylet(node))

    def kill(self, node):
        "As when the power fails: everything of a node at once"
        below = self.workers(node)
        raylet = self.raylet(node)
        for pid in [raylet, *(p for p, _ in below)]:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        return below

    def close(self):
        self.cluster.shutdown()


@pytest.fixture(scope='module')
def cluster(ray):
    before = descendants(os.getpid())
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) # what is started in the background of a script inherits that it is ignored
    try:
        cluster = Cluster()
        cluster.add(3)
    finally: signal.signal(signal.SIGINT, handler)
    yield cluster
    left = descendants(os.getpid()) - before
    cluster.close()
    until(lambda: gone(left), 90)  # no orphan


@pytest.fixture(scope='module')
def local(small_data, tmp_path_factory):
    "The leaderboard of the same study by the local engine"
    folder = tmp_path_factory.mktemp('local')
    shutil.copytree(small_data, folder/'place')
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder/'place')
        study = Script(*GRID, *EVAL, script=SWEEP)
        code, out, err = study.end(300)
        study.close()
        assert (code, err) == (0, ''), err
        return board()


def board():
    "The leaderboard on disk, without the columns of time"
    rows = list(csv.DictReader(io.StringIO((REPORT/'leaderboard.csv').read_text())))
    return [{k: v for k, v in r.items() if not k.startswith('time_')} for r in rows]


@pytest.fixture
def sweep(place):
    "Start the script in a process, which ends with the test at the latest"
    started = []
    def start(*options):
        started.append(Script(*GRID, *EVAL, '--engine', 'ray', *options, script=SWEEP))
        return started[-1]
    yield start
    for s in started: s.close()


class Watch(threading.Thread):
    "Looks all the time whether a published run is whole"
    def __init__(self):
        super().__init__(daemon=True)
        self.over, self.seen, self.wrong = False, Counter(), []

    def run(self):
        from flow_study.checkpoint import read_checkpoint
        while not self.over:
            for run in map(RUNS.absolute().joinpath, NAMES):
                final = read_status(run).get('state') in FINAL  # asked first: what is final now has its checkpoint already
                try: state = read_checkpoint(run/'last.pt')
                except ValueError as e:
                    if (run/'last.pt').exists() and 'cannot be read' not in str(e): self.wrong.append(str(e))
                    continue
                if state['metrics_bytes'] and (run/'metrics.jsonl').stat().st_size < state['metrics_bytes']: self.wrong.append(f'{run}: metrics behind the checkpoint')
                if final and state['progress']['epoch'] < 80: self.wrong.append(f'{run}: final before its checkpoint')
                self.seen[run.name] += 1
            time.sleep(0.2)


def training(name):
    "The process of a run that is well under way; None otherwise"
    status = read_status(RUNS/name)
    return status['process'] if status.get('state') == 'running' and 5 < status.get('epoch', 0) < 70 and status['alive'] and (RUNS/name/'last.pt').exists() else None


def under_way(): return {k: training(k) for k in NAMES if training(k)}


@pytest.mark.parametrize('bring_back', [False, True], ids=['in place', 'brought back'])
def test_a_node_and_the_driver_are_killed(bring_back, cluster, local, sweep):
    "The leaderboard is that of the local engine, whose study nobody disturbed"
    how = dict(address=f'"{cluster.address}"', bring_back=str(bring_back).lower(), publish_seconds=0.2)
    Path('s.toml').write_text('name = "s"\n[grid]\narch = "simple"\nflow = "icfm"\ndataset = "1k"\n[engine_options]\n' + '\n'.join(f'{k} = {v}' for k, v in how.items()))
    options = ['--study', 's.toml']
    first, watch = sweep(*options), Watch()
    watch.start()
    try:
        (name, process), *_ = first.until(under_way, 300).items()
        node, = [n for n in cluster.nodes if process['pid'] in {p for p, _ in cluster.workers(n)}]
        cluster.kill(node)
        first.until(lambda: 'handed out again, 1 of 3' in first.said()[0], 180)
        first.until(lambda: set(under_way()) - {name} or 'done' in first.said()[0], 300)
        below = {p for n in cluster.nodes for p in cluster.workers(n) if stat(p[0]) and Path(f'/proc/{p[0]}/cmdline').read_bytes().find(b'forkserver') >= 0}
        first.send(signal.SIGKILL)
        first.process.wait(30)
        assert below
        until(lambda: gone(below), 90)
        cluster.add()
        code, out, err = sweep(*options).end(240)
        assert (code, err) == (0, ''), err
    finally:
        watch.over = True
        watch.join()
    assert watch.wrong == [] and len(watch.seen) == len(NAMES)
    assert {k: read_status(RUNS/k)['state'] for k in NAMES} == dict.fromkeys(NAMES, 'finished')
    assert read_status(RUNS/name)['generation'] > 1  # it went on elsewhere, and not from its beginning
    assert board() == local
    assert not list(RUNS.glob('*/lock')) and not list(RUNS.glob('.driver-*')) and not [f for k in NAMES for f in (RUNS/k).glob('.*')]
    assert not list(Path(os.environ['TMPDIR']).glob('flow_study-nodes-*/*/data'))


def study(cluster, **changes):
    "A study from Python on the cluster"
    given = dict(seeds=1, engine='ray', evaluation=dict(n=200, steps=3, draws=20), options=dict(device='cpu', wandb_mode='disabled'))
    grid = dict(arch='simple', flow='icfm', dataset='1k', epochs=2, batch_size=64, lr=1e-2, warmup_steps=5)
    options = dict(address=cluster.address, **changes.pop('engine_options', {}))
    return Study('s', {**grid, **changes.pop('grid', {})}, **{**given, **changes}, engine_options=options)


def test_a_run_that_fails_by_itself_is_not_handed_out_again(cluster, place):
    found = study(cluster, grid=dict(batch_size=[64, 5000])).run(measure=False, test=False)
    assert [r['state'] for r in found.runs] == ['done', 'new'] and 'batch_size=5000' in found.runs[1]['reason']
    log = (REPORT/'logs'/f"{found.runs[1]['run']}.log").read_text()
    assert log.count('GPU Device') == 1


def test_what_there_is_no_room_for(cluster, place):
    for options, said in ((dict(resources=dict(gpu_1=1)), 'takes CPU 1, gpu_1 1; there are: (nothing; |CPU 1; )+(nothing|CPU 1)'), (dict(cpus=7), 'takes CPU 7'), (dict(gpus=0.5), 'takes CPU 1, GPU 0.5')):
        with pytest.raises(RuntimeError, match=f'no node has room for a run, which {said}'): study(cluster, engine_options=options).run(measure=False)
    assert not RUNS.exists()


def test_gpu_1_only_is_a_label(cluster, place, monkeypatch):
    "Ray gives the run the GPU of the node with the label"
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
    node = cluster.add(num_gpus=1, resources=dict(gpu_1=1))
    pid = cluster.raylet(node)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    one = study(cluster, options=dict(device='auto', wandb_mode='disabled'), engine_options=dict(gpus=0.5, resources=dict(gpu_1=0.5)))
    assert one._engine().slots == 1 # half a GPU, but one processor
    assert [r['state'] for r in one.run(measure=False, test=False).runs] == ['done']
    assert "asked: CUDA_VISIBLE_DEVICES='1', set before and kept" in (REPORT/'logs'/f'{one.configs[0].run_name}.log').read_text()
    cluster.kill(node)
    until(lambda: gone({(pid, process_start(pid))}))


def test_stopping_in_good_order_and_requests_reach_a_run_that_is_brought_back(cluster, place):
    one = study(cluster, grid=dict(epochs=100_000, patience=100_000, compile='off'), engine_options=dict(bring_back=True, publish_seconds=0.2))
    run, events = one.configs[0].run_dir, one._engine().execute([one.job(c) for c in one.configs])
    def until_state(state, seconds=60):
        end = time.monotonic() + seconds
        while read_status(run).get('state') != state or not read_status(run)['epoch']:
            next(events)
            assert time.monotonic() < end
    until_state('running')
    assert run_state(one.job(one.configs[0])) == 'live'
    request(run, 'pause')
    until_state('paused')
    with pytest.raises(OSError, match='is being written by process'): acquire_lock(run)
    events.close()
    assert read_status(run)['state'] == 'interrupted' and run_state(one.job(one.configs[0])) == 'resume' and not (run/'lock').exists()


def listening(pids):
    "Addresses at which some processes listen, in hexadecimal as the system has them"
    sockets = set()
    for pid in pids:
        try: sockets |= {os.readlink(f) for f in Path(f'/proc/{pid}/fd').iterdir()}
        except OSError: continue
    lines = [l.split() for f in ('tcp', 'tcp6') for l in Path('/proc/net', f).read_text().splitlines()[1:]]
    return {l[1].rpartition(':')[0] for l in lines if l[3] == '0A' and f'socket:[{l[9]}]' in sockets}


def test_a_cluster_of_our_own_is_private_and_ends_with_its_driver(ray, place, sweep):
    "It listens on the loopback interface only, and a killed driver leaves no process behind; the same command goes on"
    first = sweep('--workers', '1')
    first.until(under_way, 300)
    below = descendants(first.pid)
    assert listening(p for p, _ in below) == {'0100007F', '0000000000000000FFFF00000100007F'}
    assert not [p for p, _ in below if stat(p) and b'usage_stats_enabled=true' in Path(f'/proc/{p}/cmdline').read_bytes().lower()]
    first.send(signal.SIGKILL)
    first.process.wait(30)
    until(lambda: gone(below), 90)
    second = sweep('--workers', '1')
    second.until(lambda: 'done' in second.said()[0], 300)
    below = descendants(second.pid)
    second.send(signal.SIGTERM)
    code, out, err = second.end(90)
    assert (code, err) == (143, '') and 'the same command goes on' in out
    until(lambda: gone(below), 90)
    assert {read_status(RUNS/k)['state'] for k in NAMES if (RUNS/k).exists()} <= {'finished', 'interrupted'}


@pytest.mark.parametrize('options, code, said', [
    (['--address', '127.0.0.1:{free}'], 1, 'nobody answers at 127.0.0.1:{free}'),
    (['--address', 'ray://127.0.0.1:{free}'], 2, "expected 'auto' or HOST:PORT"),
    (['--run-resources', 'gpu_1'], 2, "'gpu_1': expected name=number"),
    (['--run-gpus', '1.5'], 2, 'gpus=1.5: expected a share up to 1'),
    (['--bring-back', '--checkpoint-dir', '/elsewhere'], 2, "checkpoint_dir='/elsewhere': expected a folder below the working directory"),
])
def test_bad_input_is_one_line_before_anything_runs(ray, place, capsys, options, code, said):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)) # nobody listens
        free = s.getsockname()[1]
        try: found = main([*GRID, *EVAL, '--engine', 'ray', *(o.format(free=free) for o in options)])
        except SystemExit as e: found = e.code
    err = capsys.readouterr().err
    assert found == code and said.format(free=free) in err and len(err.strip().splitlines()) == 1
    assert not RUNS.exists()


def test_without_ray_the_command_that_installs_it_is_named(place):
    code = ("import sys; sys.modules['ray'] = None\nfrom flow_study.study import main\n"
            f"sys.exit(main({[*GRID, *EVAL, '--engine', 'ray']!r}))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'flow_study[ray]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not RUNS.exists()
