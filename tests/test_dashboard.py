"""The dashboard and the progress display without a browser: real runs, real kernels, and folders that change under the reader."""
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from faults import LONG, OPTIONS, RUN, in_epoch, until
from flow_study.dashboard import Dashboard, Gauge
from flow_study.reader import Run, RunFolder
from flow_study.rundir import RunDir, read_metrics, read_status

CHECKPOINTS = Path('study/checkpoints')


@pytest.fixture
def board(place):
    "Make dashboards, which are closed with the test"
    made = []
    def make(folder=CHECKPOINTS, **kwargs):
        made.append(Dashboard(folder, **{'gpu': None, 'every': 0, **kwargs}))
        return made[-1]
    yield make
    for b in made: b.close()


def values(run, name): return run.curves.series(name)[1].tolist()
def written(path, name): return [d[name] for d in read_metrics(path)[0] if name in d]


def test_curves_are_the_metrics_also_after_a_resume(train_main):
    "Watched from the first epoch on; stopped, continued from an older checkpoint, and never a line twice"
    assert train_main(*OPTIONS, '--epochs', 4)[0] == 0
    run = Run(RUN)
    assert values(run, 'train/loss') == written(RUN, 'train/loss') and values(run, 'val/loss') == written(RUN, 'val/loss')
    assert train_main('--resume', RUN, '--epochs', 7)[0] == 0
    assert run.refresh()
    assert values(run, 'val/loss') == written(RUN, 'val/loss') and len(values(run, 'val/loss')) == 7
    assert (run.state, run.row()['epoch'], run.status['generation']) == ('finished', 7, 2)
    at, _ = run.curves.series('val/loss', 'epoch')
    assert np.allclose(at, range(1, 8), atol=1e-9)  # whole epochs, up to rounding


def test_run_made_anew_is_another_run(train_main, board):
    assert train_main(*OPTIONS, '--epochs', 3)[0] == 0
    b = board()
    b.select(RUN.name)
    assert train_main(*OPTIONS, '--epochs', 2)[0] == 0
    b.refresh()
    run = b.folder.runs[str(RUN)]
    assert len(values(run, 'val/loss')) == 2
    assert [r['run'] for r in b.runs()] == [RUN.name]
    b.choose(archived=True)
    assert sorted(r['run'] for r in b.runs()) == [RUN.name, f'{RUN.name}.archived-1']


def test_steers_a_process_and_hears_of_it(script, board):
    "As the buttons do, on a real process"
    going = script(*LONG)
    going.until(lambda: in_epoch(RUN, 2))
    b = board()
    def answered(text):
        b.refresh()
        return any(text in line for line in b._said)
    b.select(RUN.name)
    b.ask('pause')
    until(lambda: answered(f'{RUN.name}: paused, paused at step'))
    b.ask('continue')
    until(lambda: answered(f'{RUN.name}: goes on'))
    b.ask('stop')
    until(lambda: answered(f'{RUN.name}: stopped'))
    assert going.end()[0] == 0 and read_status(RUN)['state'] == 'interrupted'
    assert 'refused' in b.ask('pause')[0]


def test_asked_of_a_process_that_dies(script, board):
    going = script(*LONG)
    going.until(lambda: in_epoch(RUN, 2))
    b = board()
    going.process.send_signal(19)  # SIGSTOP: it is there, and does not answer
    b.ask('pause', RUN.name)
    going.process.kill()
    going.process.wait()
    b.refresh()
    assert 'ended before it could pause' in b._said[0]
    assert [r['state'] for r in b.runs()] == ['stale']


def test_runs_that_vanish_while_they_are_watched(place, board):
    for name in 'abc':
        run = RunDir.create(CHECKPOINTS/name)
        run.log({'step': 1, 'epoch': 1, 'time/elapsed_seconds': 1., 'val/loss': 1., 'val/best_loss': 1.})
        run.set_status(state='finished')
        run.close()
    b = board()
    b.select('a', 'b')
    shutil.rmtree(CHECKPOINTS/'a')
    run = b.folder.runs[str(CHECKPOINTS/'b')]
    shutil.rmtree(CHECKPOINTS/'b')
    run.refresh()
    assert run.state == 'no status'
    b.refresh()
    assert [r['run'] for r in b.runs()] == ['c'] and not b.selected
    shutil.rmtree(CHECKPOINTS)
    b.refresh()
    assert 'No runs in' in b._note.value


@pytest.mark.parametrize('junk', [b'', b'\0'*500, b'{"state": "running", "process": {"pid": "x"}}', b'[' * 1500, b'{"state": "finished", "device": []}', b'\xff\xfe'])
def test_damaged_files_do_no_harm(place, board, junk):
    for name in ('status.json', 'config.json', 'yardsticks.json', 'metrics.jsonl', 'evaluation.json'):
        (CHECKPOINTS/name.partition('.')[0]).mkdir(parents=True)
        (CHECKPOINTS/name.partition('.')[0]/name).write_bytes(junk)
    good = RunDir.create(CHECKPOINTS/'good')
    good.set_status(state='finished')
    good.close()
    b = board()
    b.select(*[r['run'] for r in b.runs()])
    for tab in (1, 2, 0): b._tab.selected_index = tab
    for key in ('state', 'epoch', 'best_val_loss', 'verdict', 'age_seconds'): b.order_by(key)
    assert {'good', 'status'} <= {r['run'] for r in b.runs()}


def test_live_while_a_run_writes(place, board):
    "The thread of the dashboard and the writer at once; every line arrives, once"
    run = RunDir.create(CHECKPOINTS/'busy')
    run.set_status(state='running')
    b = board(every=1)
    b.select('busy')
    def write():
        for step in range(1, 2001):
            run.log({'step': step, 'epoch': 1, 'time/elapsed_seconds': step/100, 'train/loss': float(step)})
            if step % 100 == 0: time.sleep(0.1)
    writer = threading.Thread(target=write)
    writer.start()
    until(lambda: len(values(b.folder.runs[str(CHECKPOINTS/'busy')], 'train/loss')) == 2000)
    writer.join()
    assert values(b.folder.runs[str(CHECKPOINTS/'busy')], 'train/loss') == [float(s) for s in range(1, 2001)]
    b.close()
    until(lambda: not any(t.name == 'dashboard' for t in threading.enumerate()))
    run.close()


def test_many_runs_are_all_in_the_table(place, board):
    for i in range(210):
        folder = CHECKPOINTS/f'run-{i:03}'
        folder.mkdir(parents=True)
        (folder/'status.json').write_text(json.dumps(dict(state='finished', best_val_loss=1 + i/1000)))
    b = board()
    b.order_by('best_val_loss')
    assert [r['best_val_loss'] for r in b.runs()] == [1 + i/1000 for i in range(210)]
    assert b._body.value.count('class="fs-row"') == 200 and 'first 200 of 210' in b._note.value
    assert len(RunFolder(CHECKPOINTS).refresh()) == 210


CELL = """
import sys
{before}
from flow_study import FlowTrainer, TrainingConfig, build_model, load_all_splits
config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='kernel', batch_size=32, epochs=3)
train, val, test = load_all_splits(config.dataset)
trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', wandb_mode='disabled')
result = trainer.train()
"""


@pytest.fixture
def kernel(place):
    "Run code in a real kernel; gives what it shows: all messages of the cell"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name='python3')
    def run(code):
        shown = []
        reply = client.execute_interactive(code, timeout=120, output_hook=shown.append)
        assert reply['content']['status'] == 'ok', reply['content']
        return shown
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_training_in_a_kernel_leaves_a_picture_and_a_table(kernel):
    shown = kernel(CELL.format(before=''))
    first, = (m['content'] for m in shown if m['msg_type'] == 'display_data')
    last = [m['content'] for m in shown if m['msg_type'] == 'update_display_data'][-1]
    assert last['transient']['display_id'] == first['transient']['display_id']  # in place of the widget
    assert '<svg' in last['data']['text/html'] and 'finished' in last['data']['text/html'] and 'application/vnd.jupyter.widget-view+json' not in last['data']
    assert 'finished' in last['data']['text/plain']


def test_training_in_a_kernel_without_ipywidgets_falls_back_to_text(kernel):
    shown = kernel(CELL.format(before="sys.modules['ipywidgets'] = None"))
    assert not [m for m in shown if m['msg_type'] == 'display_data']
    text = ''.join(m['content']['text'] for m in shown if m['msg_type'] == 'stream')
    assert 'epoch 3/3' in text and 'Losses to beat: zero' in text and 'stopped tracking' not in text


@pytest.mark.cuda
def test_gauge_reads_a_real_gpu():
    gauge = Gauge(0, 'GPU 0')
    for _ in range(2): gauge.read()
    shown = gauge.html()
    assert 'NVIDIA' in shown and ' GiB of ' in shown and '°C' in shown and '<polyline' in shown
