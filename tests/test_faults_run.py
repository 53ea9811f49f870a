"""Rows of `FAULTS.md` about a run on its way: disks, locks, signals, numbers that are not finite, memory; each docstring quotes its row."""
import json, os, re, shutil, signal, socket, subprocess, time
from pathlib import Path

import pytest
import torch

from faults import ENV, LONG, OPTIONS, RUN, files, in_epoch, lines, one_line, same_state, until
from flow_study.checkpoint import read_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import load_all_splits
from flow_study.files import WriteError
from flow_study.models import build_model
from flow_study.rundir import RunDir, RunLockedError, acquire_lock, process_start, read_metrics, read_status, this_process
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer

SLOW = str(Path(__file__).with_name('slow_script.py'))


def fill(disk, leave=0):
    "Use up a disk but for some bytes"
    free = shutil.disk_usage(disk).free
    with open(disk/'filler', 'wb') as f: os.posix_fallocate(f.fileno(), 0, max(free - leave, 1))
    if leave == 0: assert shutil.disk_usage(disk).free == 0


def no_lock(folder): return not list(Path(folder).rglob('lock*'))


# Disk full

@pytest.mark.parametrize('pages', [0, 2, 4, 6, 100, 600], ids=lambda n: f'{4*n} KiB')
def test_disk_full_at_start(pages, train_main, small_disk):
    "disk full in a checkpoint, in metrics, at start"
    disk = small_disk('8m')
    run = disk/'checkpoints'/RUN.name
    assert train_main(*OPTIONS, '--epochs', '1', '--checkpoint-dir', disk/'checkpoints')[0] == 0
    kept = files(run)
    fill(disk, leave=4096*pages)
    code, out, err = train_main(*OPTIONS, '--epochs', '1', '--checkpoint-dir', disk/'checkpoints')
    assert code == 1 and one_line(err) and 'No space left' in err and str(run) in err
    assert re.search(r'needed [\d,]+ bytes', err)
    assert files(run if pages == 0 else run.with_name(f'{run.name}.archived-1')) == kept # nothing was lost
    assert no_lock(disk) and not list(disk.rglob('*.tmp'))
    if pages in (100, 600): # there was room for the status, not for a checkpoint
        assert re.search(r"needed (66\d|1,33\d),\d{3} bytes.*'.*/(last|best).pt'", err) and read_status(run)['state'] == 'failed' and 'No space left' in read_status(run)['reason']


def test_disk_full_at_a_resume(train_main, small_disk):
    "disk full ... at start: the previous checkpoint survives when a run goes on"
    disk = small_disk('8m')
    assert train_main(*OPTIONS, '--epochs', '2', '--checkpoint-dir', disk/'checkpoints')[0] == 0
    run = disk/'checkpoints'/RUN.name
    kept = {k: (run/k).read_bytes() for k in ('last.pt', 'best.pt', 'metrics.jsonl')}
    fill(disk, leave=400_000)
    code, out, err = train_main('--resume', run, '--epochs', '3')
    assert code == 1 and one_line(err) and 'last.pt' in err and no_lock(disk)
    assert {k: (run/k).read_bytes() for k in kept} == kept and read_status(run)['state'] == 'failed'
    (disk/'filler').unlink()
    assert train_main('--resume', run, '--epochs', '3')[0] == 0 and read_status(run)['state'] == 'finished'


def test_disk_full_in_a_checkpoint(script, small_disk, train_main):
    "disk full in a checkpoint: the previous checkpoint survives, the error names the path and the bytes needed"
    disk = small_disk('8m')
    run = disk/'checkpoints'/RUN.name
    p = script(*LONG, '--checkpoint-seconds', 0, '--checkpoint-dir', disk/'checkpoints')
    p.until(lambda: in_epoch(run, 3))
    while p.process.poll() is None and shutil.disk_usage(disk).free > 900_000: # the script writes, too: again until it holds
        with open(disk/'filler', 'ab') as f: f.write(bytes(max(0, shutil.disk_usage(disk).free - 600_000)))
    code, out, err = p.end()
    assert code == 1 and one_line(err) and 'No space left' in err and re.search(r'needed 1,\d{3},\d{3} bytes', err) and re.search(rf"'{run}/(last|best)\.pt'", err)
    assert 'Traceback' not in out and no_lock(disk) and not list(disk.rglob('*.tmp'))
    status = read_status(run)
    assert status['state'] == 'failed' and 'No space left' in status['reason']
    step = read_checkpoint(run/'last.pt')['progress']['step']
    assert step and read_checkpoint(run/'best.pt')
    (disk/'filler').unlink()
    code, out, err = train_main('--resume', run, '--epochs', str(step//25 + 2), '--allow-config-change')
    assert (code, err) == (0, '') and [d['epoch'] for d in lines(run) if 'train/epoch_loss' in d] == list(range(1, step//25 + 3))


def test_disk_full_in_metrics(script, small_disk):
    "disk full in metrics"
    disk = small_disk('8m')
    run = disk/'checkpoints'/RUN.name
    p = script(*LONG, '--checkpoint-dir', disk/'checkpoints', '--val-frequency', '100000', '--checkpoint-seconds', '1000')
    p.until(lambda: in_epoch(run, 2))
    fill(disk)
    code, out, err = p.end()
    assert code == 1 and one_line(err) and 'No space left' in err and re.search(rf"needed [\d,]+ bytes, [\d,]+ are free.*'{run}/(metrics.jsonl|status.json|last.pt)'", err)
    assert no_lock(disk) and not list(disk.rglob('*.tmp')) and read_status(run)['state'] in ('failed', 'stale')
    assert read_checkpoint(run/'last.pt')['progress']['step'] == 0
    assert (run/'metrics.jsonl').read_bytes().endswith(b'}\n') and len(lines(run)) == len(read_metrics(run)[0])


def test_metric_lines_are_whole_on_a_full_disk(small_disk):
    "disk full in metrics: no half line stays, and the next one fits when there is room again"
    disk = small_disk('64k')
    run = RunDir.create(disk/'run')
    fill(disk, leave=8192)
    with pytest.raises(WriteError, match=r"No space left.*needed 310 bytes, 0 are free.*'.*/run/metrics.jsonl'"):
        for step in range(10_000): run.log({'step': step + 10_000, 'text': 'x'*(309 - 27)})
    n = len(lines(disk/'run'))
    assert n == 8192//310 and run.size() == n*310
    (disk/'filler').unlink()
    run.log({'step': 'the next'})
    assert lines(disk/'run')[n:] == [{'step': 'the next'}]
    run.close()


def test_trainer_goes_on_after_a_full_disk(place, small_disk):
    "the previous checkpoint survives: in a notebook, `train()` again goes on from it"
    def trainer(folder):
        config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='faults', epochs=4, batch_size=32, lr=3e-3, warmup_steps=20, checkpoint_dir=str(folder))
        train, val, _ = load_all_splits('1k', config.stats_path, config.data_dir)
        return FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[])
    disk = small_disk('8m')
    whole, t = trainer('whole'), trainer(disk)
    whole.train()
    class FillOnce(Tracker):
        done = False
        def log(self, metrics):
            if metrics['epoch'] == 3 and not self.done: self.done = not fill(disk, leave=300_000)
    t.trackers = [FillOnce()]
    with pytest.raises(WriteError, match='No space left'): t.train()
    assert (t.state, read_status(t.config.run_dir)['state']) == ('failed', 'failed') and no_lock(disk)
    (disk/'filler').unlink()
    assert t.train()['state'] == 'finished'
    assert lines(t.config.run_dir) == lines(whole.config.run_dir)
    assert all(same_state(t.config.run_dir/k, whole.config.run_dir/k) for k in ('last.pt', 'best.pt'))


# The run directory cannot be used

@pytest.mark.parametrize('what', ['new', 'again', 'resume'])
def test_read_only(what, train_main, small_disk):
    "run directory read-only, or path is a file"
    disk = small_disk('16m')
    if what != 'new': assert train_main(*OPTIONS, '--epochs', '1', '--checkpoint-dir', disk/'checkpoints')[0] == 0
    before = files(disk)
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    options = ('--resume', disk/'checkpoints'/RUN.name, '--epochs', '2') if what == 'resume' else (*OPTIONS, '--checkpoint-dir', disk/'checkpoints')
    code, out, err = train_main(*options)
    assert code == 1 and one_line(err) and 'Read-only file system' in err and f"'{disk}/checkpoints/{RUN.name}'" in err
    assert files(disk) == before


@pytest.mark.parametrize('path', [RUN, RUN.parent], ids=['run directory', 'checkpoint folder'])
def test_path_is_a_file(path, train_main):
    "path is a file: an error before the first step"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('my file')
    code, out, err = train_main(*OPTIONS)
    assert code == 1 and one_line(err) and f"'{RUN}'" in err and ('File exists' in err or 'Not a directory' in err)
    assert path.read_text() == 'my file'


# The lock

def test_same_name_twice(script, train_main):
    "the same run name started twice at once"
    first = script(*LONG)
    first.until(lambda: in_epoch(RUN, 2))
    for options in (OPTIONS, ('--resume', RUN)):
        code, out, err = train_main(*options)
        assert code == 1 and one_line(err) and f'process {first.pid} on {socket.gethostname()}' in err and '--name' in err
    n = len(lines(RUN))
    first.until(lambda: len(lines(RUN)) > n)
    assert read_status(RUN)['process']['pid'] == first.pid and [p.name for p in RUN.parent.iterdir()] == [RUN.name]
    first.send()
    assert first.end()[0] == 143 and [d['step'] for d in lines(RUN) if 'train/loss' in d] == list(range(10, read_status(RUN)['step'] + 1, 10))


def test_same_name_at_the_same_moment(script):
    "the second is refused: also when both start at once"
    both = [script(*LONG) for _ in range(2)]
    second = until(lambda: next((p for p in both if p.process.poll() is not None), None))
    code, out, err = second.end()
    first = both[both[0] is second]
    assert code == 1 and one_line(err) and str(RUN) in err
    first.until(lambda: in_epoch(RUN, 2))
    assert read_status(RUN)['process']['pid'] == first.pid
    first.send()
    assert first.end()[0] == 143 and read_status(RUN)['state'] == 'interrupted'


def test_stale_lock_after_kill(script, train_main):
    "a stale lock after kill -9"
    p = script(*LONG)
    p.until(lambda: in_epoch(RUN, 3))
    p.send(signal.SIGKILL)
    assert p.end()[0] == -9
    assert json.loads((RUN/'lock/owner.json').read_text()) == {**this_process(), 'pid': p.pid, 'start': read_status(RUN)['process']['start']}
    assert read_status(RUN)['state'] == 'stale' and not read_status(RUN)['alive']
    shutil.copytree(RUN, RUN.with_name('twin'))
    killed = files(RUN)
    code, out, err = train_main('--resume', 'twin', '--epochs', '5', '--patience', '100000')
    assert (code, err) == (0, '') and no_lock(RUN.with_name('twin')) and read_status(RUN.with_name('twin'))['generation'] == 2
    code, out, err = train_main(*OPTIONS, '--epochs', '5')
    assert (code, err) == (0, '') and no_lock(RUN) and read_status(RUN)['generation'] == 1
    archived = files(RUN.with_name(f'{RUN.name}.archived-1'))
    assert archived == {k: v for k, v in killed.items() if k != Path('lock/owner.json')}


def test_whose_lock_it_is(tmp_path):
    "recognised (host, pid, start time, heartbeat)"
    me = this_process()
    def taken(owner, heartbeat=0.):
        shutil.rmtree(tmp_path/'run', ignore_errors=True)
        (tmp_path/'run/lock').mkdir(parents=True)
        (tmp_path/'run/lock/owner.json').write_text(json.dumps(owner))
        (tmp_path/'run/status.json').write_text(json.dumps(dict(state='running', process=owner, heartbeat=heartbeat)))
        os.utime(tmp_path/'run/lock/owner.json', (heartbeat, heartbeat))  # touched as long as the owner lives
        try: acquire_lock(tmp_path/'run')
        except RunLockedError as e: assert str(owner['pid']) in str(e) and owner['host'] in str(e); return False
        return json.loads((tmp_path/'run/lock/owner.json').read_text()) == me
    gone = subprocess.Popen(['true'])
    gone.wait()
    assert not taken({**me, 'start': process_start(me['pid'])})     # it is alive
    assert taken({**me, 'start': me['start'] - 1})                  # its number belongs to another process now
    assert taken({**me, 'pid': gone.pid, 'start': 1})               # it is gone
    assert not taken({**me, 'host': 'elsewhere'}, time.time() - 10) # no asking there, but it gave a sign of life
    assert taken({**me, 'host': 'elsewhere'}, time.time() - 600)    # ten minutes without one


def test_same_name_again(train_main):
    "the same run name again after it ended"
    made = []
    for seed in (1, 2, 3):
        assert train_main(*OPTIONS, '--epochs', '1', '--name', 'mine', '--seed', seed)[0] == 0
        made.append(files(RUN.with_name('mine')))
    assert [files(RUN.with_name(f'mine{k}')) for k in ('.archived-1', '.archived-2', '')] == made


# Signals

def ended_well(run, code=143):
    "What must hold after a run was interrupted"
    status = read_status(run)
    assert status['state'] == 'interrupted' and no_lock(run) and not list(Path(run).glob('.*'))
    progress = read_checkpoint(Path(run)/'last.pt')['progress']
    assert (progress['epoch'], progress['step']) == (status['epoch'], status['step'])
    return progress


@pytest.mark.parametrize('place_of', ['import', 'options', 'setup', 'opening'])
def test_sigterm_before_training(place_of, script):
    "SIGTERM from `main`'s first line on (the handler is set before torch is imported)"
    p = script(*LONG)
    if place_of == 'import': p.until(lambda: 'libtorch' in Path(f'/proc/{p.pid}/maps').read_text())
    if place_of == 'options': p.until(lambda: 'CUDA_VISIBLE_DEVICES' in p.said()[0])
    if place_of == 'setup': p.printed('normalized by')
    if place_of == 'opening': p.until(RUN.exists)
    p.send()
    code, out, err = p.end()
    assert (code, err) == (143, '')
    if place_of == 'import': assert not RUN.exists() # no more than a few hundred milliseconds had passed
    if RUN.exists(): ended_well(RUN)


def like_never_stopped(options, train_main, name='whole'):
    "Whether the run, resumed, ends like one that was never stopped: every metric but the times, every bit"
    run, whole = Path(RUN), RUN.with_name(name)
    assert train_main('--resume', run)[0] == 0
    assert train_main(*options, '--name', name)[0] == 0
    assert lines(run) == lines(whole)
    return all(same_state(run/k, whole/k) for k in ('last.pt', 'best.pt'))


SHORT = [*OPTIONS, '--epochs', '20']


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_while_training(number, code, script, train_main):
    "SIGTERM: stop at the next step boundary, checkpoint, state `interrupted`, exit code 143"
    p = script(*SHORT)
    p.until(lambda: in_epoch(RUN, 3))
    p.send(number)
    ended, out, err = p.end()
    assert (ended, err) == (code, '') and f'flow_study_train --resume {RUN}' in out
    assert ended_well(RUN)['step'] >= 75
    assert like_never_stopped(SHORT, train_main)


@pytest.mark.parametrize('block', [4, 30, 31], ids=['of the second epoch', 'before that of the raw weights', 'of the raw weights'])
def test_sigterm_in_a_validation(block, script, train_main):
    "SIGTERM: ... a validation is stopped between two blocks, counts for nothing, and is done again"
    split = torch.load('study/datasets/splits/1k/val.pt')
    torch.save(dict(embeddings=split['embeddings'].repeat(30, 1) + torch.randn(3000, 32)/10), 'study/datasets/splits/1k/val.pt') # three blocks
    options = [*OPTIONS, '--arch', 'slow', '--epochs', '10', '--name', RUN.name]
    p = script(*options, script=(SLOW,), SLOW='network')
    p.until(lambda: Path('validations').exists() and len(Path('validations').read_text()) >= block)
    p.send()
    code, out, err = p.end()
    assert (code, err) == (143, '')
    assert ended_well(RUN)['epoch'] >= (2 if block == 4 else 10)
    import slow_script # registers the network here too, where it is not slow
    assert like_never_stopped(options, train_main)


def test_signals_while_writing_a_checkpoint(script, train_main):
    "SIGTERM: ... again and again, while a slow disk takes a checkpoint: the first one counts, nothing is spoiled"
    p = script(*SHORT, script=(SLOW,), SLOW='disk')
    p.until(lambda: in_epoch(RUN, 2))
    writing = Path('writing')
    def at_work():
        try: return 'last.pt' in writing.read_text()
        except OSError: return False
    p.until(at_work)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        p.send(number)
        time.sleep(0.05)
    code, out, err = p.end()
    assert (code, err) == (143, '')
    ended_well(RUN)
    assert like_never_stopped(SHORT, train_main)


CELLS = dict(
    setup="""
import os
from flow_study import *
train, val, test = load_all_splits('1k')
def make(name):
    config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='faults', epochs=24, batch_size=32, lr=3e-3, warmup_steps=20, name=name)
    return FlowTrainer(build_model(config, train), config, train, val, 'cpu', wandb_mode='disabled')
trainer = make('cell')""",
    train='result = trainer.train(); print(result["state"], result["epochs_run"], trainer.global_step)',
    whole='whole = make("whole").train(); print(whole["state"], whole["epochs_run"])',
    loop='while True: pass')


def test_sigint_in_a_cell(place):
    "SIGINT in a cell"
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(env={**os.environ, **ENV})
    def run(cell, until_=None):
        "What a cell prints, and how it ended"
        client.execute(CELLS[cell])
        if until_: until(until_); manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)['content']
        printed = ''
        while (m := client.get_iopub_msg(timeout=20))['content'].get('execution_state') != 'idle':
            if m['msg_type'] == 'stream' and m['content']['name'] == 'stdout': printed += m['content']['text']
        return reply['status'] + ' ' + (reply.get('ename') or printed.strip().splitlines()[-1] if printed or reply.get('ename') else '')
    try:
        assert run('setup') == 'ok '
        first = run('train', lambda: in_epoch(RUN.with_name('cell'), 3)).split()
        assert first[:2] == ['ok', 'interrupted'] and 3 <= int(first[2]) < 24
        assert ended_well(RUN.with_name('cell'))['step'] == int(first[3])
        second = run('train', lambda: in_epoch(RUN.with_name('cell'), int(first[2]) + 3)).split()
        assert second[:2] == ['ok', 'interrupted'] and int(second[3]) > int(first[3])
        assert run('train') == 'ok finished 24 600'
        assert run('whole') == 'ok finished 24'
        begun = time.monotonic() + 0.3
        assert run('loop', lambda: time.monotonic() > begun) == 'error KeyboardInterrupt' # the handler of the kernel is back
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert lines(RUN.with_name('cell')) == lines(RUN.with_name('whole'))
    assert all(same_state(*(RUN.with_name(n)/k for n in ('cell', 'whole'))) for k in ('last.pt', 'best.pt'))


# Numbers and memory

def poison(split, row=77, value=1e16):
    "Put a row into a split that overflows when it is squared, and is finite itself"
    path = f'study/datasets/splits/1k/{split}.pt'
    d = torch.load(path)
    d['embeddings'][row] = value
    torch.save(d, path)


def finite(state): return all(x.isfinite().all() for part in ('model', 'ema') for x in (state[part] if part == 'model' else state[part]['params']).values())


def test_loss_not_finite(train_main):
    "NaN or infinite loss or gradient"
    assert train_main(*OPTIONS, '--epochs', '2')[0] == 0
    poison('train')
    code, out, err = train_main('--resume', RUN, '--epochs', '9', '--allow-config-change')
    assert code == 1 and one_line(err)
    said = re.search(r'not finite at step (\d+) \(epoch 3, learning rate ([\d.e-]+)\)', err)
    assert 50 < int(said[1]) <= 75 and 0 < float(said[2]) <= 3e-3
    status = read_status(RUN)
    assert status['state'] == 'failed' and said[0] in status['reason'] and no_lock(RUN)
    last, best = (read_checkpoint(RUN/k) for k in ('last.pt', 'best.pt'))
    assert last['progress']['step'] == 50 and finite(last) and finite(best)


def test_validation_not_finite(train_main):
    "NaN or infinite loss ...: in the validation too"
    poison('val', value=1e25)
    code, out, err = train_main(*OPTIONS, '--epochs', '9')
    assert code == 1 and one_line(err) and re.search(r'the validation loss is not finite at step 25 \(epoch 1, learning rate 0.00\d+\)', err)
    assert read_status(RUN)['state'] == 'failed' and finite(read_checkpoint(RUN/'last.pt')) and not (RUN/'best.pt').exists()


@pytest.fixture
def hungry(place):
    "A network under the name `hungry` that runs out of memory in its fifth step"
    from flow_study import layers, models
    class Hungry(models.SimpleVelocityNet):
        steps = 0
        def forward(self, x, t):
            self.steps += self.training
            if self.steps == 5: self.eat(x.device)
            return super().forward(x, t)
        def eat(self, device):
            if device.type == 'cuda': return torch.empty(2**46, device=device)
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 65536.00 GiB')
    models.register_model('hungry', Hungry)
    yield
    del layers._models['hungry']


def out_of_memory(train_main, *options):
    "What must hold after memory ran out"
    run = RUN.with_name('hungry-icfm-1k-none')
    code, out, err = train_main(*OPTIONS, '--arch', 'hungry', '--epochs', '2', *options)
    assert code == 1 and one_line(err) and 'out of GPU memory with batch_size=32' in err and '--batch-size' in err
    status = read_status(run)
    assert status['state'] == 'failed' and 'batch_size=32' in status['reason'] and no_lock(run) and finite(read_checkpoint(run/'last.pt'))
    assert train_main(*OPTIONS, '--epochs', '1', *options)[0] == 0 # the next run of a study, in the same process


def test_out_of_memory(hungry, train_main):
    "CUDA out of memory"
    out_of_memory(train_main)


@pytest.mark.cuda
def test_out_of_gpu_memory(hungry, train_main, monkeypatch):
    "CUDA out of memory: the real thing"
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    out_of_memory(train_main, '--device', 'cuda', '--gpu', '0')
