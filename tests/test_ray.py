"""The engine ray, run directories in place: a node that is killed, what is asked for and what there is, stopping."""
import os
import signal
import time

import pytest

import flow_study.ray_engine as ray_engine
from faults import until
from flow_study.engines import run_state
from flow_study.ray_engine import _on_loopback
from flow_study.rundir import acquire_lock, read_status, request
from flow_study.study import Study
from ray_cluster import REPORT, RUNS, a_node_is_killed, cluster, descendants, gone, local, ray, stat, sweep


def test_a_node_is_killed(cluster, local, sweep): a_node_is_killed(cluster, local, sweep, bring_back=False, driver_too=False)


@pytest.fixture(scope='module')
def connected(ray, cluster):
    "One connection for several studies, so that they find its workers ready"
    with _on_loopback(): ray.init(address=cluster.address, log_to_driver=False, logging_level='ERROR')
    yield cluster
    ray.shutdown()


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
    for options, said in ((dict(resources=dict(gpu_0=1)), 'takes CPU 1, gpu_0 1; there are: (nothing; )?CPU 1.*; CPU 1'), (dict(cpus=7), 'takes CPU 7'), (dict(gpus=2), 'takes CPU 1, GPU 2')):
        with pytest.raises(RuntimeError, match=f'no node has room for a run, which {said}'): study(connected, engine_options=options).run(measure=False)
    assert not RUNS.exists()


def test_gpu_1_only_is_a_label(connected, place):
    "Ray gives the run the GPU of the node with the label"
    one = study(connected, options=dict(device='auto', wandb_mode='disabled'), engine_options=dict(gpus=0.5, resources=dict(gpu_1=0.5)))
    assert one._engine().slots == 1 # half a GPU, but one processor
    assert [r['state'] for r in one.run(measure=False, test=False).runs] == ['done']
    assert "asked: CUDA_VISIBLE_DEVICES='1', set before and kept" in (REPORT/'logs'/f'{one.configs[0].run_name}.log').read_text()


def test_a_worker_that_is_lost_again_and_again_is_given_up(connected, place, monkeypatch):
    "Killed with its node alive it is handed out again, counted, and goes on from its last checkpoint, as often as it may"
    monkeypatch.setattr(ray_engine, 'LOSSES', 1)
    one = study(connected, grid=dict(epochs=100_000, patience=100_000, compile='off'), options=dict(device='cpu', wandb_mode='disabled', checkpoint_seconds=0.1))
    run, engine = one.configs[0].run_dir, one._engine()
    events, raylets = engine.execute([one.job(c) for c in one.configs]), {connected.raylet(n) for n in connected.nodes}
    end = time.monotonic() + 120
    for lost in (1, 2):
        while (status := read_status(run)).get('generation') != lost or status['state'] != 'running' or not status['epoch'] or not (run/'last.pt').exists():
            assert next(events) is None and time.monotonic() < end
        worker = status['process']['pid']
        while stat(worker)[1] not in raylets: worker = stat(worker)[1]
        below = descendants(worker)
        os.kill(worker, signal.SIGKILL)
        until(lambda: gone(below)) # nothing goes on without it
    while not (ended := next(events)): assert time.monotonic() < end
    assert ended[1] == 1 and engine.losses == {run.name: 2} and run_state(one.job(one.configs[0])) == 'resume'
    assert 'given up after 2 losses' in (REPORT/'logs'/f'{run.name}.log').read_text()
    events.close()


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
