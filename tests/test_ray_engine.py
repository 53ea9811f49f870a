"""The engine ray: its own cluster, what is asked for and what there is, stopping, bad input."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults import until
from flow_study.engines import run_state
from flow_study.ray_engine import _on_loopback
from flow_study.rundir import acquire_lock, process_start, read_status, request
from flow_study.study import Study, main
from ray_cluster import EVAL, GRID, NAMES, REPORT, RUNS, cluster, descendants, gone, ray, stat, sweep, under_way


@pytest.fixture(scope='module')
def connected(ray, cluster):
    "One connection for several studies, so that they find its workers ready"
    with _on_loopback(): ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')
    yield cluster
    ray.shutdown()


@pytest.fixture(scope='module')
def ending():
    "Processes that must be gone in the end: two of Ray's take a minute to tell a cluster that is gone of its end, and nobody waits for them"
    processes = set()
    yield processes
    until(lambda: gone(processes), 90, 0.1)


def listening(pids):
    "Addresses at which some processes listen, in hexadecimal as the system has them"
    sockets = set()
    for pid in pids:
        try: sockets |= {os.readlink(f) for f in Path(f'/proc/{pid}/fd').iterdir()}
        except OSError: continue
    lines = [l.split() for f in ('tcp', 'tcp6') for l in Path('/proc/net', f).read_text().splitlines()[1:]]
    return {l[1].rpartition(':')[0] for l in lines if l[3] == '0A' and f'socket:[{l[9]}]' in sockets}


def test_a_cluster_of_our_own_is_private_and_ends_with_its_driver(ray, ending, place, sweep):
    "It listens on the loopback interface only, and a killed driver leaves no process behind; the same command goes on at once"
    first = sweep('--workers', '1')
    first.until(under_way, 300, 0.05)
    below = descendants(first.pid)
    assert listening(p for p, _ in below) == {'0100007F', '0000000000000000FFFF00000100007F'}
    assert not [p for p, _ in below if stat(p) and b'usage_stats_enabled=true' in Path(f'/proc/{p}/cmdline').read_bytes().lower()]
    first.send(signal.SIGKILL)
    first.process.wait(30)
    ending |= below
    second = sweep('--workers', '1')
    second.until(lambda: {p['pid'] for p in under_way().values()} & {p for p, _ in descendants(second.pid)}, 300, 0.05)
    below = descendants(second.pid)
    second.send(signal.SIGTERM)
    code, out, err = second.end(90)
    assert (code, err) == (143, '') and 'the same command goes on' in out
    until(lambda: gone(below), 90, 0.1)
    assert {read_status(RUNS/k)['state'] for k in NAMES if (RUNS/k).exists()} <= {'finished', 'interrupted'}


def study(cluster, **changes):
    "A study from Python on the cluster"
    given = dict(seeds=1, engine='ray', evaluation=dict(n=200, steps=3, draws=20), options=dict(device='cpu', wandb_mode='disabled'))
    grid = dict(arch='simple', flow='icfm', dataset='1k', epochs=2, batch_size=64, lr=1e-2, warmup_steps=5)
    options = dict(address=cluster.address, **changes.pop('engine_options', {}))
    return Study('s', {**grid, **changes.pop('grid', {})}, **{**given, **changes}, engine_options=options)


def test_a_run_that_fails_by_itself_is_not_handed_out_again(connected, place):
    found = study(connected, grid=dict(batch_size=[64, 5000])).run(measure=False, test=False)
    assert [r['state'] for r in found.runs] == ['done', 'new'] and 'batch_size=5000' in found.runs[1]['reason']
    log = (REPORT/'logs'/f"{found.runs[1]['run']}.log").read_text()
    assert log.count('GPU Device') == 1


def test_what_there_is_no_room_for(connected, place):
    for options, said in ((dict(resources=dict(gpu_1=1)), 'takes CPU 1, gpu_1 1; there are: (nothing; |CPU 1; )+(nothing|CPU 1)'), (dict(cpus=7), 'takes CPU 7'), (dict(gpus=0.5), 'takes CPU 1, GPU 0.5')):
        with pytest.raises(RuntimeError, match=f'no node has room for a run, which {said}'): study(connected, engine_options=options).run(measure=False)
    assert not RUNS.exists()


def test_gpu_1_only_is_a_label(connected, place, monkeypatch):
    "Ray gives the run the GPU of the node with the label"
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')
    node = connected.add(num_gpus=1, resources=dict(gpu_1=1))
    pid = connected.raylet(node)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    one = study(connected, options=dict(device='auto', wandb_mode='disabled'), engine_options=dict(gpus=0.5, resources=dict(gpu_1=0.5)))
    assert one._engine().slots == 1 # half a GPU, but one processor
    assert [r['state'] for r in one.run(measure=False, test=False).runs] == ['done']
    assert "asked: CUDA_VISIBLE_DEVICES='1', set before and kept" in (REPORT/'logs'/f'{one.configs[0].run_name}.log').read_text()
    connected.kill(node)
    until(lambda: gone({(pid, process_start(pid))}))


def test_stopping_in_good_order_and_requests_reach_a_run_that_is_brought_back(connected, place):
    one = study(connected, grid=dict(epochs=100_000, patience=100_000, compile='off'), engine_options=dict(bring_back=True, publish_seconds=0.2))
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
