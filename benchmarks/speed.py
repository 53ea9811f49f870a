"""What a step, an epoch, a row and a sample cost, beside other loops around the same network and beside the matrix products alone.

    python benchmarks/speed.py                     # everything but the million rows, about ten minutes
    python benchmarks/speed.py --only step epoch   # some sections; the others keep their numbers in the JSON
    python benchmarks/speed.py --only scale --million FOLDER   # a table of 1,000,000 x 1,024 is made in FOLDER (12 GB for a while) and trained on

Contenders of a section take turns, a short round each, so that whatever else the machine does hits all of them; a number is
the median of its rounds, a ratio is the median over rounds of the ratio within a round. Everything runs on one thread, and times are
processor times of the process (`--clock wall` for those on the wall, on a machine that does nothing else). Each contender counts its steps and rows, and these must be equal; paths of this library must end at equal weights within rounding.

torchcfm, Lightning and Accelerate come from PyPI (`pip install torchcfm lightning accelerate`); what is not installed is left out.
"""
import argparse
import copy
import itertools
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ['OMP_NUM_THREADS'] = '1'

import torch
from torch import nn
from torch.nn.functional import mse_loss

from flow_study.closed_form import ValidationBank
from flow_study.config import ProtocolWarning, TrainingConfig
from flow_study.data import FlowDataset, NormalizationStats
from flow_study.draws import keyed_generator
from flow_study.ensemble import Ensemble, Member
from flow_study.models import build_model, create_model, register_model
from flow_study.sampling import sample, solve, uniform_grid
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer, _carry_out, norm_of

DIM, BATCH, LR = 1024, 256, 1e-4
CLOCKS = dict(cpu=time.process_time, wall=time.perf_counter)
clock = CLOCKS['cpu'] # Of all threads of this process
HERE = Path(__file__).resolve().parent


# The network of the other loops: x and the embedded time side by side

class PlainNet(nn.Module):
    "An MLP over x and a learned embedding of t, concatenated: 5 hidden layers of 256. It can represent what `mlp-plain` can"
    constant_buffers = True # For the library: the frequencies stay as they are

    def __init__(self, dim, hidden=256, layers=5):
        super().__init__()
        self.register_buffer('frequencies', 1000*torch.exp(-9.21*torch.arange(hidden//2)/(hidden//2)), persistent=False)
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        sizes = [dim + hidden] + [hidden]*layers
        self.layers = nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())), nn.Linear(hidden, dim))

    def forward(self, x, t):
        angle = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)*self.frequencies
        return self.layers(torch.cat([x, self.time(torch.cat([angle.cos(), angle.sin()], 1))], 1))


register_model('plain-net', PlainNet)


def library_mlp():
    "The name of the library's plain MLP"
    try: create_model('mlp-plain', 8)
    except ValueError: return 'mlp'
    return 'mlp-plain'


def linear_layers(model):
    "(inputs, outputs, whether the gradient of the input is needed) of each linear layer: not for those that read x or t alone"
    first = {id(m) for m in [getattr(model, 'from_x', None)] if m is not None}
    if hasattr(model, 'from_t'): first.add(id(next(m for m in model.from_t.modules() if isinstance(m, nn.Linear))))
    if isinstance(model, PlainNet): first |= {id(model.layers[0]), id(model.time[0])}
    return [(m.in_features, m.out_features, id(m) not in first) for m in model.modules() if isinstance(m, nn.Linear)]


def floor_step(model, dtype=torch.float32):
    "The matrix products of a step of a network: forward, gradient of the weights, and of the input where it is needed"
    g = torch.Generator().manual_seed(0)
    jobs = [(*(torch.randn(s, generator=g).to(dtype) for s in ((BATCH, i), (o, i), (BATCH, o))), need) for i, o, need in linear_layers(model)]
    def step():
        for x, w, dy, need in jobs:
            x @ w.T
            dy.T @ x
            if need: dy @ w
    return step


# Data

def table(n, seed=0):
    "Rows with a covariance worth learning, normalised"
    g = keyed_generator(seed, 'speed')
    x = torch.empty(n, DIM)
    scale = torch.logspace(0.5, -0.5, DIM)
    for b in x.split(65_536): b.normal_(generator=g)
    return x.mul_(scale/scale.square().mean().sqrt())


def datasets(n):
    "Training rows (four fifths of `n`) and held-out rows, as the library's splits of `n` rows have them"
    x = table(n)
    return FlowDataset.from_tensor(x[:n - n//5], name='train'), FlowDataset.from_tensor(x[n - n//5:n - n//10], name='val')


# Contenders of the section `step`: each trains an epoch and counts what it did

class Ours:
    "This library, its training loop without a run directory"
    def __init__(self, name, train, val, arch=None, folder=None, **kw):
        config = TrainingConfig(**{**dict(arch=arch or library_mlp(), flow='icfm', dataset='speed', group='speed', epochs=1000, patience=1000, batch_size=BATCH, lr=LR,
                                warmup_steps=100, compile='off', checkpoint_dir=str(folder or tempfile.mkdtemp()), name=name.replace(' ', '-').replace(',', '')), **kw})
        self.name, self.seen = name, 0
        self.trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[])
        began = time.perf_counter()
        self.trainer._setup()
        self.trainer._loss_and_gradients(*self.trainer._drawn([next(self.trainer.loader.batches(0))], 0)[0])  # compiles; no step is made
        self.first_step_seconds = time.perf_counter() - began

    def epoch(self):
        before = self.trainer.global_step
        self.trainer.train_epoch()
        self.seen += (self.trainer.global_step - before)*BATCH

    @property
    def steps(self): return self.seen//BATCH


def rows_of(train): return torch.utils.data.TensorDataset(train.x)
def plain_loader(train): return torch.utils.data.DataLoader(rows_of(train), batch_size=BATCH, shuffle=True, drop_last=True)


def warmed_up(optimizer): return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1., step/100))


class Plain:
    "The loop that one writes first: DataLoader, AdamW, `.item()` at every step, the average one parameter at a time"
    name = 'plain loop'

    def __init__(self, train, val):
        self.net, self.loader, self.steps, self.seen = PlainNet(DIM), plain_loader(train), 0, 0
        self.average = copy.deepcopy(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR, weight_decay=0.01)
        self.scheduler, self.losses = warmed_up(self.optimizer), []

    def epoch(self):
        for x1, in self.loader:
            t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
            x_t, u_t = (1 - t)*x0 + t*x1, x1 - x0
            loss = ((self.net(x_t, t) - u_t)**2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
            self.optimizer.step()
            self.scheduler.step()
            with torch.no_grad():
                for a, p in zip(self.average.parameters(), self.net.parameters()): a.mul_(0.9999).add_(p, alpha=1e-4)
            self.losses.append(loss.item())
            self.steps, self.seen = self.steps + 1, self.seen + len(x1)

    def state(self): return dict(model=self.net.state_dict(), ema=self.average.state_dict(), optimizer=self.optimizer.state_dict())


class TorchCFM(Plain):
    "The loop of torchcfm's examples, its average and schedule included"
    name = 'torchcfm'

    def __init__(self, train, val):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
        super().__init__(train, val)
        self.matcher, self.stream = ConditionalFlowMatcher(sigma=0.), (x for _ in itertools.count() for x, in self.loader)

    def epoch(self):
        for _ in range(len(self.loader)):
            self.optimizer.zero_grad()
            x1 = next(self.stream)
            x0 = torch.randn_like(x1)
            t, x_t, u_t = self.matcher.sample_location_and_conditional_flow(x0, x1)
            loss = torch.mean((self.net(x_t, t) - u_t)**2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
            self.optimizer.step()
            self.scheduler.step()
            source, target = self.net.state_dict(), self.average.state_dict()
            for key in source: target[key].data.copy_(target[key].data*0.9999 + source[key].data*(1 - 0.9999))
            self.steps, self.seen = self.steps + 1, self.seen + len(x1)


class Accelerated(Plain):
    "Accelerate around the plain network, with the average of the plain loop"
    name = 'Accelerate'

    def __init__(self, train, val):
        from accelerate import Accelerator
        super().__init__(train, val)
        self.accelerator = Accelerator(cpu=True)
        self.net, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(self.net, self.optimizer, self.loader, self.scheduler)

    def epoch(self):
        for x1, in self.loader:
            t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
            loss = mse_loss(self.net((1 - t)*x0 + t*x1, t), x1 - x0)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.net.parameters(), 1.)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for a, p in zip(self.average.parameters(), self.net.parameters()): a.mul_(0.9999).add_(p, alpha=1e-4)
            self.steps, self.seen = self.steps + 1, self.seen + len(x1)


class Lightninged:
    "Lightning around the plain network, without an average; its own logging every 50 steps"
    name = 'Lightning'

    def __init__(self, train, val, **kw):
        import lightning
        logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
        warnings.filterwarnings('ignore')
        self.lightning, self.loader, self.kw, self.epochs, self.seconds = lightning, plain_loader(train), kw, 0, None
        self.module, self.trainer = _lightning_module(lightning), None

    @property
    def steps(self): return self.trainer.global_step
    @property
    def seen(self): return self.module.rows

    def epoch(self):
        "Goes on in the same trainer; setting it up again is not counted"
        if self.trainer is None:
            self.clock = _lightning_clock(self.lightning)
            self.trainer = self.lightning.Trainer(max_epochs=0, accelerator='cpu', devices=1, gradient_clip_val=1., enable_progress_bar=False, enable_model_summary=False,
                                                  callbacks=[self.clock], **{**dict(logger=False, enable_checkpointing=False), **self.kw})
        self.epochs += 1
        self.trainer.fit_loop.max_epochs = self.epochs
        self.trainer.fit(self.module, self.loader)
        self.seconds = self.clock.seconds


def _lightning_clock(lightning):
    "A callback that times an epoch"
    class Clock(lightning.pytorch.Callback):
        def on_train_epoch_start(self, *args): self.began = clock()
        def on_train_epoch_end(self, *args): self.seconds = clock() - self.began
    return Clock()


def _lightning_module(lightning):
    "The plain network with its loss"
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.rows = PlainNet(DIM), 0

        def training_step(self, batch, k):
            x1, = batch
            self.rows += len(x1)
            t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
            loss = mse_loss(self.net((1 - t)*x0 + t*x1, t), x1 - x0)
            self.log('train/loss', loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR, weight_decay=0.01)
            return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=warmed_up(optimizer), interval='step'))
    return Module()


class Floor:
    "The matrix products alone, as many steps as an epoch has"
    def __init__(self, name, model, steps, dtype=torch.float32):
        self.name, self.n, self.work, self.steps = name, steps, floor_step(model, dtype), 0
    @property
    def seen(self): return self.steps*BATCH

    def epoch(self):
        for _ in range(self.n): self.work()
        self.steps += self.n


# Taking turns

def installed(*kinds):
    "Those whose package is there"
    for make in kinds:
        try: yield make()
        except ImportError as e: print(f'left out: {e}', flush=True)


def timed(contender):
    "Seconds of one epoch, as the contender counts them or as they are"
    began = clock()
    contender.epoch()
    took = clock() - began
    return getattr(contender, 'seconds', None) or took


def take_turns(contenders, rounds, warm=1):
    "Seconds of each contender in each round; the order turns with the round"
    times = {c.name: [] for c in contenders}
    for r in range(warm + rounds):
        for k in range(len(contenders)):
            c = contenders[(k + r) % len(contenders)]
            took = timed(c)
            if r >= warm: times[c.name].append(took)
    return times


def median_ratio(times, a, b):
    "The median over rounds of a / b"
    return statistics.median(x/y for x, y in zip(times[a], times[b]))


def summary(times, steps):
    "Milliseconds a step: median, and the quartiles"
    return {k: dict(ms=1000*statistics.median(v)/steps, quartiles_ms=[1000*q/steps for q in statistics.quantiles(v, n=4)[::2]], rounds=len(v)) for k, v in times.items()}


def largest_difference(a, b):
    "Of the weights of two trainers"
    return max((x.detach() - y.detach()).abs().max().item() for x, y in zip(a.trainer.params.values(), b.trainer.params.values(), strict=True))


# The section `step`

def step(args):
    "A step at 8,000 x 1,024 rows, batch 256"
    x = table(8000 + 100)
    train, val = FlowDataset.from_tensor(x[:8000]), FlowDataset.from_tensor(x[8000:])
    net = create_model(library_mlp(), DIM)
    n = len(train)//BATCH
    ours = [Ours('ours', train, val), Ours('ours, compiled', train, val, compile='on'), Ours('ours, plain network', train, val, arch='plain-net'),
            Ours('ours, bf16', train, val, precision='bf16'), Ours('ours, bf16, compiled', train, val, precision='bf16', compile='on')]
    others = list(installed(lambda: Plain(train, val), lambda: TorchCFM(train, val), lambda: Accelerated(train, val), lambda: Lightninged(train, val)))
    floors = [Floor('floor', net, n), Floor('floor, plain network', PlainNet(DIM), n), Floor('floor, bf16', net, n, torch.bfloat16)]
    contenders = [*ours, *others, *floors]
    times = take_turns(contenders, args.rounds)
    for c in contenders: assert (c.steps, c.seen) == (n*(args.rounds + 1), n*(args.rounds + 1)*BATCH), f'{c.name} made {c.steps} steps over {c.seen} rows'
    assert largest_difference(*ours[:2]) < 1e-3, 'compiled and eager steps have drifted apart'
    ratio = lambda a, b: median_ratio(times, a, b)
    peers = [c.name for c in others if c.name != 'plain loop']
    result = dict(rows=8000, batch=BATCH, steps_a_round=n, shapes=linear_layers(net), parameters=sum(p.numel() for p in net.parameters()),
        first_step_seconds={c.name: c.first_step_seconds for c in ours}, weights_compiled_minus_eager=largest_difference(*ours[:2]), rows_ms=summary(times, n),
        ratios={'plain loop / ours': ratio('plain loop', 'ours'), 'plain loop / ours, compiled': ratio('plain loop', 'ours, compiled'),
                'ours / floor': ratio('ours', 'floor'), 'ours, compiled / floor': ratio('ours, compiled', 'floor'),
                'plain loop / ours, plain network': ratio('plain loop', 'ours, plain network'), 'plain loop / floor, plain network': ratio('plain loop', 'floor, plain network'),
                'plain loop / ours, bf16': ratio('plain loop', 'ours, bf16'), 'plain loop / ours, bf16, compiled': ratio('plain loop', 'ours, bf16, compiled'),
                **{f'{p} / ours': ratio(p, 'ours') for p in peers}})
    result['pieces_ms'] = pieces(Ours('pieces', train, val))
    return result


def pieces(ours):
    "What the parts of a step take, each on its own, in milliseconds"
    t = ours.trainer
    x1 = next(t.loader.batches(0))
    (x1, draws), = t._drawn([x1], 0)
    def forward_backward():
        for p in t.params.values(): p.grad = None
        t.loss_step(None, x1, draws).backward()
    one, work = torch.ones(()), floor_step(t.model)
    rows = t.loader.order(0)[0]
    parts = {'matrix products': work, 'forward and backward': forward_backward, 'selecting the rows': lambda: t.loader.x.index_select(0, rows),
             'drawing noise and times': lambda: t._drawn([x1], 0), 'norm of the gradient': lambda: norm_of([p.grad for p in t.params.values()]),
             'fused AdamW, clipping': t.optimizer.step, 'average of the weights': lambda: t.ema.update(t.model, live=t.live),
             'schedule, counters, freezing': lambda: (t._freeze_unless_finite(one, one), t.scheduler.step(), t._seed_network())}
    times = {k: [] for k in parts}
    for _ in range(80):
        for k, f in parts.items():
            began = clock()
            f()
            times[k].append(1000*(clock() - began))
    return {k: statistics.median(v) for k, v in times.items()}


# The section `epoch`: everything included

class Accounts(Tracker):
    "Times blocks of epochs of a run, and between them what their steps and their validations' forward passes take alone"
    name = 'accounts'

    def __init__(self, block, reference): self.block, self.reference, self.ours, self.theirs, self.began = block, reference, [], [], None

    def log(self, metrics):
        if 'train/epoch_loss' not in metrics or metrics['epoch'] % self.block: return
        self.trainer._writer.join()  # what is still to be written belongs to the epochs before
        if self.began is not None:
            self.ours.append((clock() - self.began)/self.block)
            self.theirs.append(self.reference(self.block))
        self.began = clock()


def reference_of(trainer):
    "Seconds an epoch of the steps alone and of the forward passes of a validation alone, on a twin that writes nothing"
    def measure(block):
        steps = passes = 0.
        for _ in range(block):
            began = clock()
            for x1, draws in trainer._examples(): trainer.train_step(x1, draws)
            steps += clock() - began
            trainer.current_epoch += 1
            trainer.model.eval()
            began = clock()
            with torch.no_grad():
                for t, x_t, u_t in trainer.bank: trainer.model(x_t, t)
            passes += clock() - began
            trainer.model.train()
        return steps/block, passes/block
    return measure


class PeerEpochs:
    "A peer's whole epoch: its training, a validation of the same bank, a line of metrics, a checkpoint"
    def __init__(self, peer, bank, folder):
        self.peer, self.bank, self.folder, self.name, self.best = peer, bank, Path(folder), peer.name, float('inf')

    def epoch(self):
        self.peer.epoch()
        net = getattr(self.peer, 'average', None)
        with torch.no_grad(): loss = sum(((net(x_t, t) - u_t)**2).mean().item()*len(t) for t, x_t, u_t in self.bank)/len(self.bank)
        with open(self.folder/'metrics.csv', 'a') as f: f.write(f'{self.peer.steps},{loss}\n')
        torch.save(self.peer.state(), self.folder/'last.pt')
        if loss < self.best: torch.save(self.peer.state(), self.folder/'best.pt')
        self.best = min(loss, self.best)


def lightning_epochs(train, bank, folder):
    "Lightning with its own validation loop, CSV logger and checkpoints"
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    peer = Lightninged(train, None, enable_checkpointing=True, logger=CSVLogger(folder))
    held_out = [tuple(b) for b in bank]

    def validation_step(module, batch, k):
        t, x_t, u_t = batch
        module.log('val/loss', mse_loss(module.net(x_t, t), u_t), batch_size=len(t))
    type(peer.module).validation_step = validation_step
    type(peer.module).val_dataloader = lambda module: torch.utils.data.DataLoader(held_out, batch_size=None)
    clock = _lightning_clock(lightning)
    peer.clock, peer.trainer = clock, lightning.Trainer(max_epochs=0, accelerator='cpu', devices=1, gradient_clip_val=1., enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, logger=peer.kw['logger'], callbacks=[clock, ModelCheckpoint(folder, monitor='val/loss', save_last=True)])
    return peer


def epoch(args):
    "Whole epochs at 1k and 10k rows: ours beside its own steps and validations, and beside the best peer"
    result = {}
    rounds = max(2, args.rounds//2)
    for n, block in ((1000, 40), (10_000, 4)):
        train, val = datasets(n)
        folder = Path(tempfile.mkdtemp())
        twin = Ours('twin', train, val)
        accounts = Accounts(block, reference_of(twin.trainer))
        run = Ours('run', train, val, epochs=block*(rounds + 1), folder=folder)
        accounts.trainer, run.trainer.trackers = run.trainer, [accounts]
        bank = run.trainer.bank
        peers = list(installed(lambda: PeerEpochs(Plain(train, val), bank, _made(folder/'plain')), lambda: PeerEpochs(TorchCFM(train, val), bank, _made(folder/'torchcfm')),
                               lambda: PeerEpochs(Accelerated(train, val), bank, _made(folder/'accelerate')), lambda: lightning_epochs(train, bank, _made(folder/'lightning'))))
        peer_times, own = {p.name: [] for p in peers}, accounts.reference
        def turns(block):
            for p in peers: peer_times[p.name].append(statistics.mean(timed(p) for _ in range(max(2, block//8))))
            return own(block)
        accounts.reference = turns
        report = run.trainer.train()
        assert report['epochs_run'] == block*(rounds + 1)  and run.trainer.global_step == len(run.trainer.loader)*block*(rounds + 1)
        ratios = {f'{k} / ours': statistics.median(p/o for p, o in zip(v, accounts.ours)) for k, v in peer_times.items()}
        best = min((r for k, r in ratios.items() if not k.startswith('plain')), default=None)
        result[f'{n}'] = dict(train_rows=len(train), steps=len(run.trainer.loader), ms=1000*statistics.median(accounts.ours),
            steps_ms=1000*statistics.median(s for s, _ in accounts.theirs), passes_ms=1000*statistics.median(p for _, p in accounts.theirs),
            checkpoint_bytes=(run.trainer.config.run_dir/'last.pt').stat().st_size, peers_ms={k: 1000*statistics.median(v) for k, v in peer_times.items()},
            ratios={'ours / (steps + validation passes)': statistics.median(o/(s + p) for o, (s, p) in zip(accounts.ours, accounts.theirs)), **ratios, 'best peer / ours': best},
            shares=shares(train, val, block))
    return result


def _made(path):
    path.mkdir(parents=True)
    return path


def shares(train, val, epochs):
    "Shares of a run's time on the training thread: steps, validation, metric lines, checkpoints; and the writer's processor time beside it"
    run = Ours('shares', train, val, epochs=3*epochs)
    t, spent = run.trainer, dict.fromkeys(('training', 'validation', 'metric lines', 'snapshots'), 0.)
    def clocked(name, function):
        def f(*args, **kw):
            began = clock()
            try: return function(*args, **kw)
            finally: spent[name] += clock() - began
        return f
    t.train_epoch, t.validate, t._log, t._save = (clocked(k, f) for k, f in zip(spent, (t.train_epoch, t.validate, t._log, t._save)))
    epoch = t._epoch
    def whole_epoch():
        "An epoch that makes its steps itself, so that they are counted with it"
        t._epoch = epoch
        t.train_epoch()
        t._epoch = whole_epoch
        yield from ()
    t._epoch = whole_epoch
    t._open(), t._start(False, False)
    started = clock()
    for k in spent: spent[k] = 0.
    _carry_out(t._loop(), t.train_step)
    total = clock() - started
    t._writer.join()
    return dict(seconds_an_epoch=total/(3*epochs), **{k: v/total for k, v in spent.items()})


# The section `scale`: cost of a row, in memory and in a file

def anonymous_bytes():
    "Memory of this process that no file backs"
    return 1024*int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])


class Partial:
    "A number of steps of an epoch, going on where it was left"
    def __init__(self, name, ours, steps): self.name, self.ours, self.n, self.steps, self.stream = name, ours, steps, 0, None

    def examples(self):
        t = self.ours.trainer
        while True:
            yield from t._examples()
            t.current_epoch += 1

    def epoch(self):
        self.stream = self.stream or self.examples()
        for x1, draws in itertools.islice(self.stream, self.n): self.ours.trainer.train_step(x1, draws)
        self.steps += self.n

    @property
    def seen(self): return self.steps*BATCH


def scale(args):
    "The cost of a row at 1k to 1M rows"
    runs = []
    for n in (1000, 10_000, 100_000):
        train, val = datasets(n)
        runs.append(Partial(f'{n}', Ours(f'rows {n}', train, val), 60))
    million = million_rows(args.million) if args.million else None
    if million:
        cold, resident, mapped, rows = million
        runs += [Partial('1000000', mapped, 60), Partial('1000000, in memory', resident, 60)]
    times = take_turns(runs, args.rounds, warm=2)
    us = {k: 1e6*statistics.median(v)/(60*BATCH) for k, v in times.items()}
    result = dict(us_a_row=us, relative_to_1k={k: median_ratio(times, k, '1000') for k in us})
    if million:
        assert largest_difference(mapped, resident) == 0., 'the mapped table did not give the same run'
        result |= dict(mapped_throughput_against_resident=median_ratio(times, '1000000, in memory', '1000000'), cold=cold)
        result |= dict(alone=alone(args.million))
    return result


def million_splits(folder):
    "The splits of 1,000,000 rows (800,000 to train on), made of a file of vectors by `flow_study_data`"
    import numpy as np
    folder, n = Path(folder), 1_000_000
    if not (folder/'datasets/normalization_stats.pt').exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = np.lib.format.open_memmap(folder/'vectors.npy', 'w+', np.float32, (n, DIM))
        g = np.random.default_rng(0)
        for k in range(0, n, 8192): rows[k:k + 8192] = g.standard_normal((min(8192, n - k), DIM), dtype=np.float32)
        rows.flush()
        subprocess.run([sys.executable, '-m', 'flow_study.corpus', str(folder/'vectors.npy'), '--data-dir', str(folder/'datasets'), '--sizes', '1m'], check=True)
        (folder/'vectors.npy').unlink()
    return [folder/f'datasets/splits/1m/{k}.pt' for k in ('train', 'val')]


def million_rows(folder):
    "The same table twice, in its file and in memory, and the speed of the file when none of it is in memory"
    train, val = million_splits(folder)
    few = FlowDataset.from_tensor(FlowDataset(val).rows(slice(0, 1000)))
    forget(train)
    began = time.perf_counter()
    mapped_data = FlowDataset(train)
    opening = time.perf_counter() - began
    mapped = Ours('mapped', mapped_data, few)
    forget(train)
    cold = Partial('cold', mapped, 60)
    cold_times = []
    for _ in range(4):
        began = time.perf_counter()
        cold.epoch()
        cold_times.append(time.perf_counter() - began)
    resident = Ours('resident', FlowDataset(train, mapped=False), few)
    again = Ours('mapped', mapped_data, few)
    return dict(seconds_to_open=opening, us_a_row=1e6*statistics.median(cold_times)/(60*BATCH)), resident, again, len(mapped_data)


def forget(path):
    "Drop a file from memory, so that it is read from the disk"
    with open(path, 'rb') as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(folder):
    "The largest anonymous memory of a process that trains on the million rows"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import speed; speed.train_alone({str(folder)!r})"
    return json.loads(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def train_alone(folder, steps=400):
    "Train on the mapped table and its whole validation split, and watch the memory"
    torch.set_num_threads(1)
    peak, done = [0], threading.Event()
    def watch():
        while not done.wait(0.05): peak[0] = max(peak[0], anonymous_bytes())
    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    train, val = (FlowDataset(p) for p in million_splits(folder))
    ours = Ours('alone', train, val)
    first = time.perf_counter() - began
    part = Partial('alone', ours, steps)
    seconds = timed(part)
    ours.trainer.validate()
    done.set()
    print(json.dumps(dict(seconds_to_first_step=first, us_a_row=1e6*seconds/(steps*BATCH), peak_anonymous_gb=peak[0]/1e9)))


# The section `start`

def start(args):
    "Processor seconds of `--help` and of imports, and seconds on the wall to the first metric line of a run"
    def python(code, *more): return [sys.executable, '-c', code, *more]
    help = "import sys; sys.argv = ['flow_study_train', '--help']\nfrom flow_study.train import main\nmain()"
    commands = {'python': python('pass'), 'flow_study_train --help': python(help), 'import torch': python('import torch'),
                'import flow_study': python('import flow_study'), 'import torch, flow_study': python('import torch, flow_study'),
                'import flow_study.trainer': python('import flow_study.trainer')}
    times = {k: [] for k in commands}
    for _ in range(args.starts):
        for k, c in commands.items(): times[k].append(spent_in(c))
    seconds = {k: statistics.median(v) for k, v in times.items()}
    beyond = {k: statistics.median(a - b for a, b in zip(times[k], times['import torch'])) for k in ('import torch, flow_study', 'import flow_study.trainer')}
    return dict(seconds=seconds, import_beyond_torch=beyond['import torch, flow_study'], trainer_beyond_torch=beyond['import flow_study.trainer'], first_line_seconds=first_line())


def spent_in(command):
    "Processor seconds of a process, those of the system included"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line():
    "Seconds from the start of `flow_study_train` on 1,000 rows to its first metric line"
    from flow_study.data import make_splits, save_splits
    folder = Path(tempfile.mkdtemp())
    save_splits(make_splits(table(1000), sizes=('1k',)), folder/'datasets')
    options = ['--arch', library_mlp(), '--flow', 'icfm', '--dataset', '1k', '--group', 'speed', '--data-dir', 'datasets', '--checkpoint-dir', 'runs', '--device', 'cpu', '--epochs', '4']
    found = []
    for k in range(3):
        began = time.perf_counter()
        p = subprocess.Popen([sys.executable, '-m', 'flow_study.train', *options, '--name', f'run-{k}', '--wandb-mode', 'disabled'], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while p.poll() is None and not (folder/f'runs/run-{k}/metrics.jsonl').exists(): time.sleep(0.005)
        found.append(time.perf_counter() - began)
        p.wait()
    return statistics.median(found)


# The section `sampling`

def sampling(args):
    "Heun's method, 50 steps, 10,000 x 1,024 from a trained network's shape, beside torchdiffeq, which gets all rows at once or batch by batch as ours; the first call compiles"
    from torchdiffeq import odeint
    n, steps = args.samples, 50
    model = create_model(library_mlp(), DIM).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(2)
    model.config, model.stats, model.flow_state = None, None, None
    x0 = torch.cat([torch.empty(256, DIM).normal_(generator=keyed_generator(0, 'sample', k)) for k in range(-(-n//256))])[:n]
    times, calls = uniform_grid(steps), [0]
    def field(t, x):
        calls[0] += 1
        return model(x, t)
    def theirs(batch):
        with torch.no_grad(): return torch.cat([odeint(field, b, times.float(), method='heun2')[-1] for b in x0.split(batch)])
    ours = lambda compile: sample(model, n, flow='icfm', steps=steps, normalized=True, compile=compile)
    began = clock()
    ours('auto')  # compiles, and keeps it
    first = clock() - began
    ways = {'ours': lambda: ours('auto'), 'ours, not compiled': lambda: ours('off'), 'torchdiffeq, our batches': lambda: theirs(256), 'torchdiffeq': lambda: theirs(n)}
    seconds, ends = {k: [] for k in ways}, {}
    for r in range(args.sampling_rounds):
        for k, f in ways.items():
            began = clock()
            ends[k] = f()
            seconds[k].append(clock() - began)
    for k in ends: torch.testing.assert_close(ends[k], ends['ours'], rtol=1e-4, atol=1e-4)
    assert calls[0] == args.sampling_rounds*(-(-n//256) + 1)*2*steps
    passes = []
    for _ in range(args.sampling_rounds):
        began = clock()
        with torch.no_grad():
            for b in x0[:2560].split(256): model(b, times[7].float())
        passes.append((clock() - began)*n/len(x0[:2560])*2*steps)
    return dict(n=n, nfe=2*steps, forward_passes_seconds=statistics.median(passes), first_call_seconds=first, seconds={k: statistics.median(v) for k, v in seconds.items()},
                ratios={f'{k} / ours': median_ratio(seconds, k, 'ours') for k in ways if k != 'ours'})


# The section `ensemble`: some seeds in one program against as many runs alone

def small(n, dim):
    "Training and held-out rows of `dim` numbers"
    x = torch.randn(n, dim, generator=keyed_generator(0, 'speed'))*torch.logspace(0.5, -0.5, dim)
    return FlowDataset.from_tensor(x[:n - n//5]), FlowDataset.from_tensor(x[n - n//5:])


class Seeds:
    "The training loops of some seeds, without run directories: one after the other, or in one program"
    def __init__(self, name, seeds, together, data, device='cpu', **kw):
        config = TrainingConfig(**{**dict(flow='icfm', dataset='speed', group='speed', epochs=1000, patience=1000, lr=LR, warmup_steps=100, compile='off', checkpoint_dir=tempfile.mkdtemp()), **kw})
        configs = [config.replace(seed=s) for s in range(seeds)]
        self.name, self.seen = name, 0
        self.trainers = [(Member if together else FlowTrainer)(build_model(c, data[0]), c, *data, device, trackers=[]) for c in configs]
        for t in self.trainers: t._setup()
        self.ensemble = Ensemble(self.trainers) if together else None
        if together: self.ensemble._share(self.trainers)

    def epoch(self):
        before = self.steps
        if self.ensemble is None:
            for t in self.trainers: t.train_epoch()
        else: self._together()
        self.seen += (self.steps - before)*self.trainers[0].config.batch_size

    def _together(self):
        e, jobs = self.ensemble, {}
        e.courses, e.results, e.errors = {t: t._epoch() for t in self.trainers}, {}, {}
        for t in self.trainers:
            t._writer = SimpleNamespace()
            e._advance(t, jobs)
        while jobs:
            e._make_steps(jobs)
            for t in list(jobs): e._advance(t, jobs)
        assert not e.errors

    @property
    def steps(self): return sum(t.global_step for t in self.trainers)

    @property
    def path(self):
        "How steps are made, and why not as one graph where that was wanted"
        first = self.trainers[0]
        return first.path if first._captured is None or first._captured.graph else f'{first.path}, step by step: {first._captured.why_not}'


ENSEMBLES = {'mlp tiny, 32 numbers, batch 32': (32, dict(arch='mlp', size='tiny', batch_size=32), (1, 4, 16)), 'unet tiny, 32 numbers, batch 32': (32, dict(arch='unet', size='tiny', batch_size=32), (4,)),
             'mlp small, 256 numbers, batch 256': (256, dict(arch='mlp', size='small', batch_size=256), (4,)), 'mlp-plain, 1024 numbers, batch 256': (1024, dict(arch='mlp-plain', batch_size=256), (1, 4, 16))}


def ensemble(args):
    "Ensembles against as many runs alone"
    result = {}
    for name, (dim, kw, sizes) in ENSEMBLES.items():
        data = small(1000 if dim < 1024 else 2000, dim)
        for n in sizes:
            pair = [Seeds('alone', n, False, data, **kw), Seeds('together', n, True, data, **kw)]
            times = take_turns(pair, args.rounds)
            assert pair[0].steps == pair[1].steps
            steps = pair[0].steps/n/(args.rounds + 1)
            result[f'{name}, {n} seeds'] = dict(ratio=median_ratio(times, 'together', 'alone'), stacked=not pair[1].ensemble.why_not, why_not=pair[1].ensemble.why_not,
                rows_ms=summary({k: [x/n for x in v] for k, v in times.items()}, steps))
            print(f'  {name}, {n} seeds: together / alone {result[f"{name}, {n} seeds"]["ratio"]:.3f}', flush=True)
    return result


# The section `cuda`: everything on a GPU, timed with device events

def device_ms(work, device):
    "Milliseconds between two events on the device, before and after some work; on a CPU, for trying this section out, those of the wall"
    if device == 'cpu':
        began = time.perf_counter()
        work()
        return 1000*(time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class PlainOnGPU:
    "The plain loop with everything on the GPU"
    name = 'plain loop'

    def __init__(self, train, device):
        self.device, self.x, self.net, self.steps = device, train.x.to(device), PlainNet(DIM).to(device), 0
        self.average = copy.deepcopy(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR, weight_decay=0.01)
        self.scheduler, self.path = warmed_up(self.optimizer), 'plain'

    def epoch(self):
        for rows in torch.randperm(len(self.x), device=self.device).split(BATCH)[:len(self.x)//BATCH]:
            x1 = self.x[rows]
            t, x0 = torch.rand(len(x1), 1, device=self.device), torch.randn_like(x1)
            loss = ((self.net((1 - t)*x0 + t*x1, t[:, 0]) - (x1 - x0))**2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
            self.optimizer.step()
            self.scheduler.step()
            with torch.no_grad():
                for a, p in zip(self.average.parameters(), self.net.parameters()): a.mul_(0.9999).add_(p, alpha=1e-4)
            loss.item()
            self.steps += 1


def launches(contender, steps):
    "What one epoch asks of the device: operations on it a step, and microseconds a step that it is busy"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as found: contender.epoch()
    took = [e.time_range.elapsed_us() for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return dict(operations=len(took)/steps, busy_us=sum(took)/steps)


def device_speed(device, rounds=5):
    "What the device reaches: float32 operations a second in a large product, bytes a second in a large copy"
    n = 8192 if device == 'cuda' else 512
    a, b, out = (torch.ones(n, n, device=device) for _ in range(3))
    product, copying = (min(device_ms(work, device) for _ in range(rounds))/1000 for work in (lambda: torch.mm(a, b, out=out), lambda: out.copy_(a)))
    return dict(operations_per_second=2*n**3/product, bytes_per_second=8*n*n/copying)


def floor_of(model, speed):
    "Milliseconds that the products of a step would take at the speed of a large one, and its passes over weights at that of a large copy"
    weights = sum(p.numel() for p in model.parameters())
    operations = sum(2*BATCH*i*o*(3 if need else 2) for i, o, need in linear_layers(model))
    passes = 4*weights*(3 + 1 + 8 + 3)  # weights and gradients in the products; the norm; the optimizer; the average
    return dict(operations=operations, bytes=passes, operations_ms=1000*operations/speed['operations_per_second'], bytes_ms=1000*passes/speed['bytes_per_second'])


CUDA_PAIRS = [('plain loop', 'captured'), ('eager', 'captured'), ('compiled', 'captured'), ('alone, 16 seeds', 'together, 16 seeds'), ('eager, 16 seeds', 'together, 16 seeds'),
              ('together, eager, 16 seeds', 'together, 16 seeds')]


def cuda_contenders(data, device, sizes):
    "Everything that is timed on a GPU"
    kw = dict(device=device, arch='plain-net', batch_size=BATCH)
    yield PlainOnGPU(data[0], device)
    for name, how in (('eager', 'off'), ('compiled', 'on'), ('captured', 'auto')): yield Seeds(name, 1, False, data, **kw, compile=how)
    for n in sizes:
        yield Seeds(f'alone, {n} seeds', n, False, data, **kw, compile='auto')
        yield Seeds(f'together, {n} seeds', n, True, data, **kw, compile='auto')
    yield Seeds(f'eager, {n} seeds', n, False, data, **kw, compile='off')
    yield Seeds(f'together, eager, {n} seeds', n, True, data, **kw, compile='off')


def cuda(args, device='cuda', rows=10_000, sizes=(4, 16)):
    "Plain loop, eager, compiled and captured steps, and runs alone and together, on one GPU; nothing where there is none"
    if device == 'cuda' and not torch.cuda.is_available(): return dict(left_out='no CUDA device')
    data = datasets(rows)
    contenders, n = list(cuda_contenders(data, device, sizes)), len(data[0])//BATCH
    times = {c.name: [] for c in contenders}
    for r in range(args.rounds + 1):
        for k in range(len(contenders)):
            c = contenders[(k + r) % len(contenders)]
            took = device_ms(c.epoch, device)
            if r: times[c.name].append(took/1000)
    seeds = {c.name: len(getattr(c, 'trainers', [c])) for c in contenders}
    for c in contenders:
        assert c.steps == (args.rounds + 1)*n*seeds[c.name], c.name
        assert not (why := getattr(getattr(c, 'ensemble', None), 'why_not', '')), f'{c.name}: {why}'
    floor, found = floor_of(PlainNet(DIM), device_speed(device)), summary(times, n)
    for c in contenders: found[c.name] |= dict(path=c.path, floor_share=seeds[c.name]*(floor['operations_ms'] + floor['bytes_ms'])/found[c.name]['ms'])
    if device == 'cuda':
        for c in contenders: found[c.name] |= (asked := launches(c, n)) | dict(busy_share=asked['busy_us']/1000/found[c.name]['ms'])
    return dict(device=torch.cuda.get_device_name() if device == 'cuda' else device, rows_ms=found, floor=floor,
                ratios={f'{a} / {b}': median_ratio(times, a, b) for a, b in CUDA_PAIRS if {a, b} <= times.keys()})


# The report

def machine():
    "What it ran on"
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = re.search(r'model name\s*: (.*)', flags)
    return dict(processor=name[1] if name else '', bfloat16=[f for f in ('amx_bf16', 'avx512_bf16') if re.search(rf'\b{f}\b', flags)], threads=torch.get_num_threads(),
                torch=str(torch.__version__), python=sys.version.split()[0])


BARS = [('step, fp32: plain loop / ours', 'step', lambda d: d['ratios']['plain loop / ours'], '>=', 1.6),
        ('step, fp32, compiled: plain loop / ours', 'step', lambda d: d['ratios']['plain loop / ours, compiled'], '>=', 1.6),
        ('step, fp32: ours / floor', 'step', lambda d: d['ratios']['ours / floor'], '<=', 1.6),
        ('step, fp32, compiled: ours / floor', 'step', lambda d: d['ratios']['ours, compiled / floor'], '<=', 1.6),
        ('step, bf16: plain loop / ours', 'step', lambda d: d['ratios']['plain loop / ours, bf16'], '>=', 2.5),
        ('step, bf16, compiled: plain loop / ours', 'step', lambda d: d['ratios']['plain loop / ours, bf16, compiled'], '>=', 2.5),
        ('epoch, 1k rows: ours / (steps + validation passes)', 'epoch', lambda d: d['1000']['ratios']['ours / (steps + validation passes)'], '<=', 1.15),
        ('epoch, 1k rows: best peer / ours', 'epoch', lambda d: d['1000']['ratios']['best peer / ours'], '>=', 1.3),
        ('epoch, 10k rows: best peer / ours', 'epoch', lambda d: d['10000']['ratios']['best peer / ours'], '>=', 1.3),
        ('1M rows in a file: throughput against memory', 'scale', lambda d: d['mapped_throughput_against_resident'], '>=', 0.9),
        ('1M rows in a file: anonymous memory, GB', 'scale', lambda d: d['alone']['peak_anonymous_gb'], '<=', 1.5),
        ('cost of a row, 1k to 1M, farthest from 1k', 'scale', lambda d: max(d['relative_to_1k'].values(), key=lambda r: abs(r - 1)), '+-', 0.15),
        ('flow_study_train --help, s', 'start', lambda d: d['seconds']['flow_study_train --help'], '<=', 0.4),
        ('import of flow_study beyond torch, s', 'start', lambda d: d['import_beyond_torch'], '<=', 0.1),
        ('sampling: torchdiffeq / ours', 'sampling', lambda d: d['ratios']['torchdiffeq / ours'], '>=', 1.3),
        ('sampling: torchdiffeq with our batches / ours', 'sampling', lambda d: d['ratios']['torchdiffeq, our batches / ours'], '>=', 1.3),
        ('ensemble of 4 / 4 runs alone, the dearest', 'ensemble', lambda d: max(v['ratio'] for k, v in d.items() if k.endswith(', 4 seeds')), '<=', 1.05),
        ('ensemble of 4 / 4 runs alone, small networks', 'ensemble', lambda d: max(v['ratio'] for k, v in d.items() if 'tiny' in k and k.endswith(', 4 seeds')), '<=', 1.),
        ('H100: plain loop / captured', 'cuda', lambda d: d['ratios']['plain loop / captured'], '>=', 8),
        ('H100: 16 captured runs / ensemble of 16', 'cuda', lambda d: d['ratios']['alone, 16 seeds / together, 16 seeds'], '>=', 3),
        ('H100: 16 eager runs / ensemble of 16', 'cuda', lambda d: d['ratios']['eager, 16 seeds / together, 16 seeds'], '>=', 12)]


def bars(results):
    "Name, value, relation, bar, and whether it is met, as far as there are numbers"
    rows = []
    for name, section, get, relation, bar in BARS:
        try: value = get(results[section])
        except KeyError: continue
        met = {'>=': value >= bar, '<=': value <= bar, '+-': abs(value - 1) <= bar}[relation]
        rows.append(dict(name=name, value=value, relation=relation, bar=bar, met=bool(met)))
    return rows


def plot(results, path):
    "Milliseconds of a step by contender, the floor as a line"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = results['step']['rows_ms']
    names = sorted((k for k in rows if not k.startswith('floor')), key=lambda k: rows[k]['ms'])
    fig, ax = plt.subplots(figsize=(7, 0.36*len(names) + 1), layout='constrained')
    ax.barh(names, [rows[k]['ms'] for k in names], color=['#0072B2' if k.startswith('ours') else '#999999' for k in names])
    for k, style in (('floor', '--'), ('floor, bf16', ':')): ax.axvline(rows[k]['ms'], color='#D55E00', ls=style, label=f'matrix products alone{k[5:]}')
    ax.invert_yaxis()
    ax.set(xlabel='milliseconds a step, median of rounds')
    ax.legend(frameon=False, loc='upper right')
    fig.savefig(path, dpi=120)


SECTIONS = dict(step=step, epoch=epoch, scale=scale, start=start, sampling=sampling, ensemble=ensemble, cuda=cuda)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=SECTIONS, default=list(SECTIONS), help='sections to measure (default all)')
    p.add_argument('--rounds', type=int, default=11, help='rounds of a section (default %(default)s)')
    p.add_argument('--samples', type=int, default=10_000, help='rows sampled (default %(default)s)')
    p.add_argument('--sampling-rounds', type=int, default=3, help='(default %(default)s)')
    p.add_argument('--starts', type=int, default=15, help='times that each process is started (default %(default)s)')
    p.add_argument('--clock', choices=CLOCKS, default='cpu', help='processor time of the process, or time on the wall (default %(default)s)')
    p.add_argument('--million', metavar='FOLDER', help='where the table of 1,000,000 rows is, or is made')
    p.add_argument('--out', default=str(HERE/'speed.json'), help='results, those of sections not measured now are kept (default beside this file)')
    args = p.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', category=ProtocolWarning)
    globals()['clock'] = CLOCKS[args.clock]
    logging.getLogger('flow_study').setLevel(logging.WARNING)
    out = Path(args.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in args.only:
        began = time.perf_counter()
        results[name] = SECTIONS[name](args) | dict(machine=machine(), clock=args.clock)
        print(f'{name}: {time.perf_counter() - began:.0f} s', flush=True)
        results['bars'] = bars(results)
        out.write_text(json.dumps(results, indent=1) + '\n')
    if 'step' in results: plot(results, out.with_suffix('.png'))
    for b in results['bars']: print(f"{'met   ' if b['met'] else 'missed'} {b['name']:52} {b['value']:8.3f}  {b['relation']} {b['bar']}")


if __name__ == '__main__': main()
