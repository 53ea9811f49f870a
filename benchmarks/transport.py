"""What minibatch transport costs, and what makes it cheaper.

    python benchmarks/transport.py            # both tables, a minute or two
    python benchmarks/transport.py --steps 20000   # train that many steps in full, instead of 200

First table: processor time of one coupling by scipy alone, POT's network simplex, and `assign` (scipy after guessed dual potentials), all
exact and checked to give the same cost; beside them the plans that are not exact. Second table: a step of training in two
dimensions with and without transport, on the clock and in processor time of all threads, and what 20,000 of them take.
"""
import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment

from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
from flow_study.models import build_model
from flow_study.paths import Transport, assign, squared_distances
from flow_study.trainer import FlowTrainer


def eight_gaussians(n, gen):
    "Eight clusters on a circle, normalised"
    angle = torch.randint(8, (n,), generator=gen)*torch.pi/4
    return (5*torch.stack([angle.cos(), angle.sin()], 1) + 0.3*torch.randn(n, 2, generator=gen))/3.55


def two_moons(n, gen):
    "Two interleaved half circles, normalised"
    angle, upper = torch.rand(n, generator=gen)*torch.pi, torch.rand(n, generator=gen) < 0.5
    x = torch.stack([torch.where(upper, angle.cos(), 1 - angle.cos()), torch.where(upper, angle.sin(), 0.5 - angle.sin())], 1)
    return (x + 0.05*torch.randn(n, 2, generator=gen) - torch.tensor([0.5, 0.25]))/torch.tensor([0.87, 0.5])


def milliseconds(function, repeats):
    "The median processor time of a call, which other work on the machine disturbs less than the time on the clock"
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return 1000*statistics.median(times)


def one_assignment(repeats):
    "Times of the ways to couple one batch"
    data = {'8 gaussians, d=2': eight_gaussians, 'moons, d=2': two_moons,
            'normal, d=32': lambda n, gen: torch.randn(n, 32, generator=gen), 'normal, d=1024': lambda n, gen: torch.randn(n, 1024, generator=gen)}
    print(f"{'milliseconds':18}{'n':>6}{'cost':>8}{'scipy':>8}{'POT':>8}{'assign':>8}{'entropic':>10}{'unbalanced':>12}")
    for name, make in data.items():
        for n in (256, 512, 1024):
            gen = keyed_generator(0, 'benchmark')
            x1 = make(n, gen)
            x0 = torch.randn(x1.shape, generator=gen)
            c, w, rows = squared_distances(x1, x0), np.full(n, 1/n), np.arange(n)
            best = c[rows, linear_sum_assignment(c)[1]].mean()
            assert np.isclose(c[rows, assign(c)].mean(), best, rtol=1e-12) and np.isclose(ot.emd2(w, w, c), best, rtol=1e-9)
            ways = [lambda: squared_distances(x1, x0), lambda: linear_sum_assignment(c), lambda: ot.emd(w, w, c), lambda: assign(c)]
            soft = [lambda p=p: Transport(p).matrix(x0, x1) for p in ('entropic', 'unbalanced')]
            times = [milliseconds(f, repeats) for f in ways] + [milliseconds(f, 1) for f in soft]
            print(f'{name:18}{n:6}{times[0]:8.1f}{times[1]:8.1f}{times[2]:8.1f}{times[3]:8.1f}{times[4]:10.1f}{times[5]:12.1f}', flush=True)


def training(steps):
    "Times of a step of training in two dimensions"
    gen = keyed_generator(0, 'benchmark')
    print(f"\n{'flow':8}{'batch':>7}{'ot_batch':>10}{'ms a step':>12}{'of processor':>14}{'20,000 steps':>16}")
    for flow, batch, ot_batch in (('icfm', 1024, None), ('otcfm', 1024, None), ('otcfm', 256, None), ('otcfm', 256, 1024)):
        train, val = (FlowDataset.from_tensor(eight_gaussians(n, gen)) for n in (steps*batch if steps <= 1000 else 10*batch, 1000))
        with tempfile.TemporaryDirectory() as folder:
            config = TrainingConfig(arch='simple', flow=flow, dataset='8gaussians', group='benchmark', batch_size=batch, ot_batch=ot_batch, epochs=10**6, checkpoint_dir=folder)
            trainer, done = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[]), 0
            trainer.validate()  # sets up
            start, busy = time.perf_counter(), time.process_time()
            while done < steps:
                trainer.train_epoch()
                done += len(trainer.loader)
        seconds, busy = (time.perf_counter() - start)/done, (time.process_time() - busy)/done
        print(f"{flow:8}{batch:7}{ot_batch or '':>10}{1000*seconds:12.1f}{1000*busy:14.1f}{20_000*seconds/60:11.1f} min", flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--repeats', type=int, default=5, help='calls whose median is taken (default 5)')
    p.add_argument('--steps', type=int, default=200, help='steps trained for a line of the second table (default 200)')
    args = p.parse_args()
    torch.set_num_threads(1)
    one_assignment(args.repeats)
    training(args.steps)
