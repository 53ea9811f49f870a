"""The engine ray: a cluster of its own, bad input, no Ray."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from faults import until
from flow_study.rundir import read_status
from flow_study.study import main
from ray_cluster import EVAL, GRID, NAMES, RUNS, descendants, gone, ray, stat, sweep, under_way


@pytest.fixture(scope='session')
def ending():
    "Processes that must be gone in the end: two of Ray's take a minute to tell a cluster that is gone of its end, and other tests need not wait for them"
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
    first.until(under_way, 300, 0.1)
    below = descendants(first.pid)
    assert listening(p for p, _ in below) == {'0100007F', '0000000000000000FFFF00000100007F'}
    assert not [p for p, _ in below if stat(p) and b'usage_stats_enabled=true' in Path(f'/proc/{p}/cmdline').read_bytes().lower()]
    first.send(signal.SIGKILL)
    first.process.wait(30)
    ending |= below
    second = sweep('--workers', '1')
    second.until(lambda: {p['pid'] for p in under_way().values()} & {p for p, _ in descendants(second.pid)}, 300, 0.2)
    below = descendants(second.pid)
    second.send(signal.SIGTERM)
    code, out, err = second.end(90)
    assert (code, err) == (143, '') and 'the same command goes on' in out
    until(lambda: gone(below), 90, 0.1)
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
