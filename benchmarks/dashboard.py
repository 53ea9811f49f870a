"""What the dashboard costs with many runs.

    python benchmarks/dashboard.py                    # 200 runs of 10,000 lines (about 250 MB, removed afterwards)
    python benchmarks/dashboard.py --runs 1000 --lines 1000

The bars: a table with 200 best losses and the curves of five runs within 3 seconds from nothing, one refresh within 0.3 seconds.
A refresh is measured as the dashboard of a study that is going on has it: five selected runs have each written new lines, so their
curves are read on and drawn again. The times are those on the clock and those of the processor, which other work disturbs less.
"""
import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

from flow_study.config import TrainingConfig
from flow_study.dashboard import Dashboard
from flow_study.rundir import RunDir

YARDSTICKS = dict(zero=dict(loss=2.01), unit_gaussian=dict(loss=1.578), shrunk_gaussian=dict(loss=1.11))


def lines(first, last, floor, rng):
    "Metric lines of a run: nine of ten about a step, one about an epoch"
    for i in range(first, last):
        step, epoch, loss = 10*(i + 1), i//10 + 1, floor + (2 - floor)*0.999**i + rng.random()*0.05
        head = f'{{"step": {step}, "epoch": {epoch}, "time/elapsed_seconds": {step/50}, '
        if i % 10 < 9: yield f'{head}"train/loss": {loss}, "train/grad_norm": {rng.random()}, "train/lr": {3e-3*0.9999**i}}}\n'
        else: yield f'{head}"train/epoch_loss": {loss}, "time/samples_per_second": {4000 + 500*rng.random()}, "val/loss": {loss}, "val/best_loss": {loss}, "patience_left": 20}}\n'


def make(folder, runs, n):
    "Run directories as a trainer leaves them; every fifth is said to go on, by this process"
    open_runs = []
    for r in range(runs):
        rng, name = random.Random(r), f'run-{r:04}'
        run = RunDir.create(folder/name)
        config = TrainingConfig(arch=('mlp', 'simple')[r % 2], flow=('icfm', 'otcfm', 'spherical')[r % 3], dataset='1k', group='bench', seed=r, name=name)
        run.write('config.json', config.to_dict())
        run.write('yardsticks.json', YARDSTICKS)
        (run.path/'metrics.jsonl').write_text(''.join(lines(0, n, 1.1 + rng.random()*0.4, rng)))
        going = r % 5 == 0
        run.set_status(state='running' if going else 'finished', epochs=n//5, steps_per_epoch=100, patience=20, epoch=n//10, step=10*n, best_val_loss=1.2,
                       verdict=None if going else 'beats the Gaussian by 0.1000 ± 0.0100', device=dict(type='cuda', index=1, uuid='GPU-bench'))
        if going: open_runs.append(run)
        else: run.close()
    return open_runs


def timed(action):
    "Seconds on the clock and of the processor"
    clock, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - clock, time.process_time() - processor


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--runs', type=int, default=200)
    p.add_argument('--lines', type=int, default=10_000)
    p.add_argument('--refreshes', type=int, default=20)
    args = p.parse_args()
    from flow_study.views import Curves, Trace, curves_svg  # loaded, and fonts found, before the clock starts
    curves_svg([Trace('warm', Curves())], smoothing=.8)
    with tempfile.TemporaryDirectory() as tmp:
        going = make(Path(tmp), args.runs, args.lines)
        print(f'{args.runs} runs of {args.lines:,} lines\n{"":34}{"clock, s":>10}{"processor, s":>14}')
        def report(what, times): print(f'{what:34}{times[0]:10.3f}{times[1]:14.3f}', flush=True)
        board = None
        def fill():
            nonlocal board
            board = Dashboard(tmp, every=0)
            rows = board.runs()
            assert len(rows) == args.runs and all(r['best_val_loss'] for r in rows)
        first = timed(fill)
        report('table filled', first)
        names = [r.path.name for r in going[:5]]
        second = timed(lambda: board.select(*names))
        assert board._picture.value.count('<svg') == 1
        report('curves of five runs drawn', second)
        report('both (the bar: 3)', (first[0] + second[0], first[1] + second[1]))
        busy, idle = [], []
        for k in range(args.refreshes):
            before = board._picture.value
            for r, run in enumerate(going[:5]):
                with open(run.path/'metrics.jsonl', 'a') as f: f.writelines(lines(args.lines + 10*k, args.lines + 10*(k + 1), 1.2, random.Random(r + k)))
            busy.append(timed(board.refresh))
            assert board._picture.value != before
            idle.append(timed(board.refresh))
        report('refresh, new lines (the bar: 0.3)', tuple(statistics.median(t) for t in zip(*busy)))
        report('the slowest of these', tuple(max(t) for t in zip(*busy)))
        report('refresh, nothing new', tuple(statistics.median(t) for t in zip(*idle)))
        for run in going: run.close()


if __name__ == '__main__': main()
