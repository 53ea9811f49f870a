"""Kill a training process again and again, resume it each time, and compare the end with the run that was never killed.

    python benchmarks/kill_campaign.py --kills 200

A *chain* is one run that is killed with SIGKILL and resumed until it ends by itself. The moments of the kills are drawn
from a seed and come in kinds (`KINDS`): within the imports, while the run directory is opened and the checkpoint of step 0
is written, anywhere in training, within a validation, within the writing of a checkpoint, and around the end of the run.
Only kills that hit a living process count: one that was there when the signal was sent, and that died of it.

After every kill: the checkpoint that was there before is there and reads with its checksum, no complete metric line is gone,
and the status says that the run is stale. At the end of a chain: every tensor of `last.pt` and `best.pt` is bitwise the one
of the reference, every other value but the clock's too, and so is every metric line. Whatever is not is *lost*, and the exit
code is 1.

A kill costs 3 to 4 seconds on one core, most of them for importing torch; 200 kills take 12 minutes.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# One thread, here as in the processes that train: this is about exactness, and other work may share the machine.
os.environ['OMP_NUM_THREADS'] = '1'

import torch

from flow_study.checkpoint import CheckpointError, read_checkpoint
from flow_study.data import make_splits, save_splits
from flow_study.rundir import read_metrics, read_status

RUN = 'killed'
EPOCHS, STEPS = 40, 50  # steps of an epoch
OPTIONS = ('--arch simple --flow icfm --dataset 1k --group kills --data-dir ../datasets --checkpoint-dir runs --batch-size 16 '
           f'--lr 1e-3 --warmup-steps 100 --epochs {EPOCHS} --name {RUN}').split()
KINDS = {'imports': 1, 'opening': 2, 'training': 6, 'validation': 3, 'writing': 4, 'end': 2}  # and how often each is chosen
CLOCK = ('elapsed', 'metrics_bytes', 'trackers')  # differ from run to run: times, how many digits they have, and W&B's id


def make_data(folder):
    "Splits of 1,000 rows of 32 numbers that lie near 10 directions, so that every epoch learns something"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 10, generator=g) @ torch.randn(10, 32, generator=g) + 0.3*torch.randn(1200, 32, generator=g)
    save_splits(make_splits(x, sizes=('1k',)), Path(folder)/'datasets')


def start(home, resume=False):
    "A training process with its working directory in `home`, and what it prints in `home/log.txt`"
    home.mkdir(exist_ok=True)
    options = ['--resume', RUN, '--checkpoint-dir', 'runs'] if resume else OPTIONS
    env = {**os.environ, 'WANDB_MODE': 'disabled', 'CUDA_VISIBLE_DEVICES': ''}
    with open(home/'log.txt', 'a') as log:
        return subprocess.Popen([sys.executable, '-m', 'flow_study.train', *options, '--device', 'cpu'], cwd=home, env=env, stdout=log, stderr=log)


def folder(home): return home/'runs'/RUN


# What can be seen of a run from outside, cheaply: it is looked at every half millisecond.

def owner(home):
    "The pid in the lock of the run"
    try: return json.loads((folder(home)/'lock'/'owner.json').read_text())['pid']
    except (OSError, ValueError, KeyError): return None


def at_work(home, pid):
    "Whether a process has opened the run directory and says that it trains"
    return read_status(folder(home)).get('process', {}).get('pid') == pid


def last_line(home):
    "The last complete metric line"
    try:
        with open(folder(home)/'metrics.jsonl', 'rb') as f:
            f.seek(max(0, f.seek(0, 2) - 2000))
            return json.loads(f.read().rpartition(b'\n')[0].rpartition(b'\n')[2] or '{}')
    except (OSError, ValueError): return {}


def in_validation(home):
    "Whether all steps of the epoch are logged, but not the epoch"
    line = last_line(home)
    return line.get('step', 1) % STEPS == 0 and 'train/epoch_loss' not in line


def unfinished(home):
    "Checkpoints that are being written"
    try: return {n for n in os.listdir(folder(home)) if n.startswith(('.last.pt.', '.best.pt.'))}
    except OSError: return set()


@dataclass
class Times:
    "Seconds of a run that is not killed: to its lock, from there to its first step, from there to its end"
    imports:float
    opening:float
    training:float


def wait(process, until, poll=5e-4, limit=300):
    "Wait until something is so, the process has ended, or `limit` seconds are over; whether it is so"
    end = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < end:
        if until(): return True
        time.sleep(poll)
    return False


def reference(home):
    "The run that is never killed, and its times"
    began, process = time.monotonic(), start(home)
    marks = []
    for until in (lambda: owner(home) == process.pid, lambda: last_line(home)): marks += [wait(process, until) and time.monotonic()]
    wait(process, lambda: False)
    process.kill()
    if process.wait() != 0: raise RuntimeError(f"the run that nobody killed failed:\n{(home/'log.txt').read_text()}")
    return Times(marks[0] - began, marks[1] - marks[0], time.monotonic() - marks[1])


def wait_for_moment(process, home, kind, times, rng):
    "Wait for a moment of a kind, or for the end of the process"
    if kind == 'imports': return wait_seconds(process, rng.uniform(0, times.imports))
    wait(process, lambda: owner(home) == process.pid)
    if kind == 'opening': return wait_seconds(process, rng.uniform(0, 1.5*times.opening))
    wait(process, lambda: at_work(home, process.pid))
    if kind == 'end': return wait(process, lambda: last_line(home).get('epoch') == EPOCHS) and wait_seconds(process, rng.uniform(0, 0.15))
    wait_seconds(process, rng.uniform(0, times.training/4))
    if kind == 'validation': wait(process, lambda: in_validation(home), poll=1e-4)
    if kind == 'writing':
        before = unfinished(home)
        wait(process, lambda: unfinished(home) - before, poll=0)
        wait_seconds(process, rng.choice([0, 0, 0, rng.uniform(0, 2e-3)]))


def wait_seconds(process, seconds):
    "Wait, but not longer than the process lives"
    end = time.monotonic() + seconds
    wait(process, lambda: time.monotonic() >= end)


@dataclass
class Tally:
    "What a campaign has seen"
    hits:Counter = field(default_factory=Counter)  # kills that hit, by kind
    missed:int = 0          # the process had ended before
    inside:Counter = field(default_factory=Counter)  # what the kill cut off, as seen on the disk afterwards
    resumes:int = 0
    anew:int = 0            # killed before there was a checkpoint, so started again
    completed:int = 0
    identical:int = 0
    lost:list = field(default_factory=list)

    @property
    def kills(self): return self.hits.total()


def kill(process, home, kind, tally):
    "Kill a process and see that nothing is lost by it; False when it had ended before"
    lines = metric_bytes(home)
    there = [n for n in ('best.pt', 'last.pt') if (folder(home)/n).exists()]
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL or not alive:
        tally.missed += 1
        return False
    tally.hits[kind] += 1
    if any(f'.{process.pid}-' in name for name in unfinished(home)): tally.inside['a checkpoint write'] += 1
    if in_validation(home): tally.inside['a validation'] += 1
    if not (folder(home)/'last.pt').exists(): tally.inside['a run without a checkpoint'] += 1
    for name in there:
        try: read_checkpoint(folder(home)/name)
        except CheckpointError as e: tally.lost.append(f'{home.name}: after a kill in {kind}: {e}')
    if not metric_bytes(home).startswith(lines): tally.lost.append(f'{home.name}: after a kill in {kind}: metric lines changed')
    state = read_status(folder(home)).get('state', 'stale')
    if state not in ('stale', 'finished'): tally.lost.append(f'{home.name}: after a kill in {kind}: status says {state}')
    return True


def metric_bytes(home):
    "The metrics as they lie on the disk, complete lines only"
    try: data = (folder(home)/'metrics.jsonl').read_bytes()
    except OSError: return b''
    return data[:data.rfind(b'\n') + 1]


def kept_lines(home):
    "Every metric line that is kept anywhere: in the run, moved aside by a resume, in an archived run"
    return Counter(line for p in (home/'runs').rglob('metrics*.jsonl') for line in p.read_bytes().splitlines())


def chain(home, kills, times, rng, tally):
    "One run, killed up to so many times, first in its start, and resumed until it ends by itself; the kills that hit"
    seen, hits, process = Counter(), 0, start(home)
    try:
        while hits < kills:
            kind = rng.choices(list(KINDS), KINDS.values())[0] if hits else rng.choice(['imports', 'opening'])
            wait_for_moment(process, home, kind, times, rng)
            if not kill(process, home, kind, tally): break
            hits += 1
            seen |= Counter(metric_bytes(home).splitlines())
            resume = any((folder(home)/n).exists() for n in ('last.pt', 'best.pt'))
            tally.resumes += resume
            tally.anew += not resume
            process = start(home, resume)
        wait(process, lambda: False)
    finally: process.kill()  # does nothing to one that has ended
    if process.wait() == 0: tally.completed += 1
    else: tally.lost.append(f"{home.name}: exit code {process.returncode}: {(home/'log.txt').read_text()[-600:]}")
    if gone := seen - kept_lines(home): tally.lost.append(f'{home.name}: {gone.total()} metric lines are gone, such as {next(iter(gone))}')
    return hits


def timeless(line): return {k: v for k, v in line.items() if not k.startswith('time/')}


def differences(a, b, where=''):
    "The places in which two states differ; tensors are compared bit by bit"
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.shape, a.dtype) == (b.shape, b.dtype) and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in CLOCK and not str(k).startswith('time/')]
        return [d for k in keys for d in (differences(a[k], b[k], f'{where}/{k}') if k in a and k in b else [f'{where}/{k}'])]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}/{i}')]
    return [] if a == b or a != a and b != b else [where]


def compare(home, expected):
    "All in which the end of a chain differs from the reference"
    found = []
    for name in ('last.pt', 'best.pt'):
        found += differences(read_checkpoint(folder(expected)/name), read_checkpoint(folder(home)/name), name)
    for name in ('config.json', 'yardsticks.json'):
        if (folder(expected)/name).read_bytes() != (folder(home)/name).read_bytes(): found.append(name)
    ours, theirs = ([timeless(d) for d in read_metrics(folder(h))[0]] for h in (home, expected))
    if ours != theirs: found.append(f'metrics.jsonl ({len(ours)} lines, expected {len(theirs)})')
    state, wanted = (read_status(folder(h)).get('state') for h in (home, expected))
    if state != wanted: found.append(f'status.json ({state}, expected {wanted})')
    return found


def campaign(work, kills, seed=0, per_chain=12, say=print):
    "Kill `kills` living processes, in chains; gives the tally"
    rng, tally, work = random.Random(seed), Tally(), Path(work)
    make_data(work)
    times = reference(work/'reference')
    say(f'a run that is not killed: {times.imports:.1f} s to its lock, {times.opening:.2f} s to its first metric line, {times.training:.1f} s to its end')
    n = 0
    while tally.kills < kills:
        n += 1
        home, lost = work/f'chain-{n}', len(tally.lost)
        hits = chain(home, min(per_chain, kills - tally.kills), times, rng, tally)
        tally.lost += [f'{home.name}: differs from the reference in {d}' for d in compare_if_there(home, work/'reference')]
        tally.identical += len(tally.lost) == lost
        say(f'chain {n}: {hits} kills, ' + ('bit for bit the reference' if len(tally.lost) == lost else tally.lost[-1]) + f' ({tally.kills} of {kills})')
    return tally


def compare_if_there(home, expected):
    "As `compare`; a checkpoint that is not there or damaged is a difference"
    try: return compare(home, expected)
    except (CheckpointError, OSError) as e: return [str(e)]


def report(tally, seconds):
    "The tally in lines"
    by_kind = ', '.join(f'{k} {tally.hits[k]}' for k in KINDS)
    inside = ', '.join(f'{n} in {k}' for k, n in tally.inside.items())
    return (f'kills that hit       {tally.kills} ({by_kind})\n  seen on the disk   {inside}\n  missed             {tally.missed}\n'
            f'resumes              {tally.resumes}\n  started anew       {tally.anew} (killed before the checkpoint of step 0)\n'
            f'runs completed       {tally.completed}\nbit-identical ends   {tally.identical}\nlost                 {len(tally.lost)}\n'
            f'seconds              {seconds:.0f}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=60, help='kills that hit a living process (default %(default)s)')
    p.add_argument('--seed', type=int, default=0, help='decides kinds and moments of the kills (default %(default)s)')
    p.add_argument('--folder', help='where the runs are kept; by default a temporary folder, removed unless something is lost')
    args = p.parse_args()
    work, began = Path(args.folder or tempfile.mkdtemp(prefix='kills-')), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    tally = campaign(work, args.kills, args.seed, say=lambda s: print(s, flush=True))
    print(report(tally, time.monotonic() - began))
    for line in tally.lost: print(f'LOST {line}')
    if not args.folder and not tally.lost:
        import shutil
        shutil.rmtree(work)
    return 1 if tally.lost else 0


if __name__ == '__main__': sys.exit(main())
