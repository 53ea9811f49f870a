"""Many machines: a node and a driver are killed, with run directories in place and brought back, and the leaderboard is what it would have been."""
import csv
import io
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from faults import Script, until
from flow_study.rundir import FINAL, read_status
from ray_cluster import EPOCHS, EVAL, GRID, NAMES, REPORT, RUNS, SWEEP, cluster, gone, ray, stat, sweep, under_way


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
                if final and state['progress']['epoch'] < EPOCHS: self.wrong.append(f'{run}: final before its checkpoint')
                self.seen[run.name] += 1
            time.sleep(0.5)


@pytest.mark.parametrize('bring_back', [False, True], ids=['in place', 'brought back'])
def test_a_node_and_the_driver_are_killed(bring_back, cluster, local, sweep):
    "The leaderboard is that of the local engine, whose study nobody disturbed"
    how = dict(address=f'"{cluster.address}"', bring_back=str(bring_back).lower(), publish_seconds=0.2)
    Path('s.toml').write_text('name = "s"\n[grid]\narch = "simple"\nflow = "icfm"\ndataset = "1k"\n[engine_options]\n' + '\n'.join(f'{k} = {v}' for k, v in how.items()))
    options = ['--study', 's.toml']
    first, watch = sweep(*options), Watch()
    watch.start()
    try:
        (name, process), *_ = first.until(under_way, 300, 0.02).items()
        node, = [n for n in cluster.nodes if process['pid'] in {p for p, _ in cluster.workers(n)}]
        cluster.kill(node)
        first.until(lambda: 'handed out again, 1 of 3' in first.said()[0], 180, 0.05)
        first.until(lambda: set(under_way()) - {name} or 'done' in first.said()[0], 300, 0.02)
        below = {p for n in cluster.nodes for p in cluster.workers(n) if stat(p[0]) and Path(f'/proc/{p[0]}/cmdline').read_bytes().find(b'forkserver') >= 0}
        first.send(signal.SIGKILL)
        first.process.wait(30)
        assert below
        until(lambda: gone(below), 90, 0.1)
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
