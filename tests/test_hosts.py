"""Locks between hosts: a process with another host name and another table of processes, in the same folder."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from faults import until
from flow_study import rundir
from flow_study.rundir import RunDir, RunLockedError, acquire_lock, read_metrics, read_status, this_process

WRITER = '''
import sys, time
from flow_study import rundir
rundir.LEASE_SECONDS = 0.2
run = rundir.RunDir.create(sys.argv[1])
run.set_status(state='running')
print('mine', flush=True)
try:
    for step in range(10**9):
        run.log(dict(step=step))
        time.sleep(0.02)
except rundir.RunLockedError as e:
    run.close()
    print(e, flush=True)
'''


@pytest.fixture
def elsewhere(tmp_path):
    "Start code on a host of its own; gives the process, and a function that signals it"
    alone = ['unshare', '--uts', '--pid', '--fork', '--kill-child', '--mount-proc', 'sh', '-c', 'hostname elsewhere && exec "$@"', 'sh']
    if os.name != 'posix' or subprocess.run([*alone, 'true'], capture_output=True).returncode: pytest.skip('no host names of our own: unshare is not allowed here')
    started = []
    def start(code, *args):
        started.append(subprocess.Popen([*alone, sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True))
        return started[-1]
    yield start
    for p in started:
        p.kill()
        p.wait()
        p.stdout.close()


def send(process, number):
    "A signal to what runs on the other host"
    child, = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    os.kill(int(child), number)


def refused(path):
    try: acquire_lock(path)
    except RunLockedError as e: return str(e)


def test_a_lock_of_another_host_holds_while_it_is_renewed_and_no_longer(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, 'HEARTBEAT_SECONDS', 3)
    path = tmp_path/'run'
    writer = elsewhere(WRITER, path)
    assert writer.stdout.readline() == 'mine\n'
    assert 'on elsewhere' in refused(path)
    time.sleep(4) # longer than a sign of life lasts: it is the lease that counts
    assert 'on elsewhere' in refused(path)

    send(writer, signal.SIGSTOP) # as when a machine sleeps
    stopped = time.monotonic()
    assert 'on elsewhere' in refused(path)
    until(lambda: refused(path) is None, 20)
    time.sleep(max(0, 6 - (time.monotonic() - stopped))) # it looks every five seconds
    lines = read_metrics(path)[0]
    shutil.rmtree(path/'lock')
    mine = RunDir.resume(path)
    mine.set_status(state='running')

    send(writer, signal.SIGCONT)
    assert 'was taken over by another process' in writer.stdout.readline()
    assert writer.wait(10) == 0
    assert read_metrics(path)[0] == lines and read_status(path)['process'] == this_process()
    mine.sync() # the lock is still here
    mine.close()


def test_a_killed_owner_on_another_host_is_taken_for_dead_after_its_lease(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, 'HEARTBEAT_SECONDS', 2)
    writer = elsewhere(WRITER, tmp_path/'run')
    assert writer.stdout.readline() == 'mine\n'
    writer.kill()
    writer.wait()
    assert 'on elsewhere' in refused(tmp_path/'run')
    until(lambda: refused(tmp_path/'run') is None, 20)
