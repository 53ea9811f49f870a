"""The two-dimensional experiments of Tong et al. (2024), with this library's flows and with torchcfm's, through one loop.

    pip install --no-deps torchcfm      # the peer; --no-deps, since it names packages that its flows do not need
    python benchmarks/cfm_table.py --short                 # 2 seeds, 500 steps: minutes on 2 cores
    python benchmarks/cfm_table.py --seeds 5 --steps 20000 # the set-up of the paper: many hours, nearly all in the peer's transport

The set-up: a SELU network of three hidden layers of 64 over (x, t), AdamW at 1e-3, batches of 512, 10,000 rows to train on and 1,000 to
test, sigma 0.1 (Schroedinger bridge: 1.0), Euler with 100 steps. Both libraries see the same rows in the same order and start from the
same weights; they differ in how they pair x0 with x1, draw t and noise, and form x_t and u_t. Reported are the exact 2-Wasserstein distance
of samples to test rows and the normalised path energy, mean and standard deviation over seeds, and whether the two agree within that
spread. Finished cells are kept in `--out` and are not computed again.
"""
import argparse
import json
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch import nn

from flow_study.draws import draw_key, keyed_generator
from flow_study.metrics import exact_w2, normalised_path_energy
from flow_study.paths import create_flow
from flow_study.sampling import solve, uniform_grid

TASKS = ('normal > 8gaussians', 'normal > moons', 'moons > 8gaussians', '8gaussians > moons')
FLOWS = {'icfm': 0.1, 'otcfm': 0.1, 'sbcfm': 1.0}  # name to sigma
BATCH, TRAIN, TEST = 512, 10_000, 1_000


def normal(n, gen): return torch.randn(n, 2, generator=gen)


def eight_gaussians(n, gen):
    "Eight clusters on a circle of radius 5, variance 0.1 each (its square root is the variance torchcfm uses)"
    angle = torch.randint(8, (n,), generator=gen)*math.pi/4
    return 5*torch.stack([angle.cos(), angle.sin()], 1) + 0.1**0.25*torch.randn(n, 2, generator=gen)


def moons(n, gen):
    "Two interleaved half circles with noise 0.2, times 3 less 1"
    angle, upper = math.pi*torch.rand(n, generator=gen), torch.rand(n, generator=gen) < 0.5
    x = torch.stack([torch.where(upper, angle.cos(), 1 - angle.cos()), torch.where(upper, angle.sin(), 0.5 - angle.sin())], 1)
    return 3*(x + 0.2*torch.randn(n, 2, generator=gen)) - 1


MAKE = {'normal': normal, '8gaussians': eight_gaussians, 'moons': moons}


class Net(nn.Module):
    "The network of the paper: x and t in, three hidden layers of 64, SELU"
    def __init__(self):
        super().__init__()
        hidden = [m for _ in range(2) for m in (nn.Linear(64, 64), nn.SELU())]
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SELU(), *hidden, nn.Linear(64, 2))

    def forward(self, x, t): return self.layers(torch.cat([x, torch.as_tensor(t).to(x).reshape(-1, 1).expand(len(x), 1)], 1))


def ours(name, seed):
    "Examples of a step, by this library"
    flow = create_flow(name, sigma=FLOWS[name])
    def examples(x0, x1, step):
        gen = keyed_generator(seed, 'noise', step)
        draws = flow.draw(x1, gen, x0=flow.couple(x0, x1, gen))
        return draws.t, *flow.example(x1, draws)
    return examples


def torchcfm(name, seed):
    "Examples of a step, by torchcfm; it draws from the global generators"
    import numpy as np
    from torchcfm import conditional_flow_matching as cfm
    sigma = FLOWS[name]
    matcher = {'icfm': lambda: cfm.ConditionalFlowMatcher(sigma), 'otcfm': lambda: cfm.ExactOptimalTransportConditionalFlowMatcher(sigma),
               'sbcfm': lambda: cfm.SchrodingerBridgeConditionalFlowMatcher(sigma, ot_method='sinkhorn')}[name]()
    def examples(x0, x1, step):
        key = draw_key(seed, 'noise', step)
        torch.manual_seed(key)
        np.random.seed(key % 2**32)
        return matcher.sample_location_and_conditional_flow(x0, x1)
    return examples


LIBRARIES = {'flow_study': ours, 'torchcfm': torchcfm}


def cell(task, name, library, seed, steps):
    "Train and measure one cell of the table"
    torch.set_num_threads(1)
    source, target = (MAKE[k] for k in task.split(' > '))
    gen = keyed_generator(seed, f'data/{task}')
    x0, x1, x0_test, x1_test = source(TRAIN, gen), target(TRAIN, gen), source(TEST, gen), target(TEST, gen)
    torch.manual_seed(draw_key(seed, 'init'))
    net = Net()
    optimizer, examples, start = torch.optim.AdamW(net.parameters(), lr=1e-3), LIBRARIES[library](name, seed), time.process_time()
    for step in range(steps):
        gen = keyed_generator(seed, 'rows', step)
        rows = [torch.randint(TRAIN, (BATCH,), generator=gen) for _ in range(2)]
        t, x_t, u_t = examples(x0[rows[0]], x1[rows[1]], step)
        optimizer.zero_grad()
        (net(x_t, t) - u_t).square().mean().backward()
        optimizer.step()
    seconds, times = time.process_time() - start, uniform_grid(100)
    with torch.no_grad(): found = solve(net, x0_test, times, 'euler', trajectory=True)
    return dict(task=task, flow=name, library=library, seed=seed, steps=steps, w2=exact_w2(found.x, x1_test),
                npe=normalised_path_energy(found.trajectory, times, x1_test), seconds=seconds)


def key(d): return tuple(d[k] for k in ('task', 'flow', 'library', 'seed', 'steps'))


def compute(wanted, out, workers):
    "The cells that are wanted, those not in the file computed and added to it"
    done = {key(d): d for d in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    with ProcessPoolExecutor(workers) as pool, open(out, 'a') as f:
        jobs = [pool.submit(cell, *k) for k in wanted if k not in done]
        for n, job in enumerate(as_completed(jobs), 1):
            d = job.result()
            done[key(d)] = d
            print(json.dumps(d), file=f, flush=True)
            print(f"{n}/{len(jobs)} {d['task']}, {d['flow']}, {d['library']}, seed {d['seed']}: W2 {d['w2']:.3f}, {d['seconds']:.0f} s", flush=True)
    return [done[k] for k in wanted]


def spread(values): return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def here(cells, task, flow, library):
    "The cells of one place in the table, of all seeds"
    return [c for c in cells if (c['task'], c['flow'], c['library']) == (task, flow, library)]


def agree(cells, task, flow):
    "Whether the means of both libraries lie within twice the larger spread, for both numbers"
    def near(m):
        (a, s), (b, r) = (spread([c[m] for c in here(cells, task, flow, lib)]) for lib in LIBRARIES)
        return abs(a - b) <= 2*max(s, r)
    return near('w2') and near('npe')


def table(cells):
    "A row for each task and flow, both libraries side by side"
    print(f"\n{'task':22}{'flow':8}" + ''.join(f'{m + " " + lib:>26}' for m in ('W2', 'NPE') for lib in LIBRARIES) + '   agree   processor ms a step')
    for task in TASKS:
        for name in FLOWS:
            values = [spread([c[m] for c in here(cells, task, name, lib)]) for m in ('w2', 'npe') for lib in LIBRARIES]
            ms = [1000*statistics.median(c['seconds']/c['steps'] for c in here(cells, task, name, lib)) for lib in LIBRARIES]
            print(f'{task:22}{name:8}' + ''.join(f'{a:17.3f} ± {b:.3f} ' for a, b in values) + f"{'yes' if agree(cells, task, name) else 'no':>8}   {ms[0]:.1f} and {ms[1]:.1f}")


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--short', action='store_true', help='2 seeds and 500 steps')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--steps', type=int, default=20_000)
    p.add_argument('--workers', type=int, default=os.cpu_count())
    p.add_argument('--out', type=Path, default=Path('study/cfm_table.jsonl'))
    args = p.parse_args()
    seeds, steps = (2, 500) if args.short else (args.seeds, args.steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [(task, name, lib, seed, steps) for seed in range(seeds) for task in TASKS for name in FLOWS for lib in LIBRARIES]
    table(compute(wanted, args.out, args.workers))
