"""Many seeds in one program: each equals its run alone, whoever else is there, through kills, stops and failures."""
import shutil, signal
from pathlib import Path

import pytest
import torch

from faults import Script, in_epoch, lines, same_state
from flow_study import ensemble as module
from flow_study.checkpoint import read_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
from flow_study.ensemble import Ensemble, Member, Stack
from flow_study.layers import _models
from flow_study.models import SimpleVelocityNet, build_model, register_model
from flow_study.rundir import read_metrics, read_status
from flow_study.trainer import FlowTrainer
from test_faults_checkpoint import StopAt

ARCHS = ['mlp', 'mlp-plain', 'dit', 'unet', 'mamba']


@pytest.fixture(scope='module')
def rows():
    "800 training rows and 100 held-out rows of 16 numbers, with labels"
    gen = keyed_generator(0, 'tests')
    x = torch.randn(900, 8, generator=gen) @ torch.randn(8, 16, generator=gen) + 0.3*torch.randn(900, 16, generator=gen)
    label = (x[:, 0] > 0).long()
    return FlowDataset.from_tensor(x[:800], cond=label[:800]), FlowDataset.from_tensor(x[800:], cond=label[800:])


@pytest.fixture
def make(rows, tmp_path):
    "A function that makes a trainer or a member"
    def trainer(seed, kind=Member, trackers=(), resume_path=None, folder='runs', **kw):
        kw = {'size': 'tiny', **kw} if kw.get('arch', 'mlp') in ('mlp', 'dit', 'unet', 'mamba') else kw
        config = TrainingConfig(**{**dict(arch='mlp', flow='icfm', dataset='tests', group='tests', epochs=13, batch_size=100, lr=3e-3, warmup_steps=5,
                                          checkpoint_dir=str(tmp_path/folder), seed=seed), **kw})
        return kind(build_model(config, rows[0]), config, *rows, 'cpu', trackers=list(trackers), log_every=1, resume_path=resume_path)
    return trainer


@pytest.fixture
def stack_all(monkeypatch): monkeypatch.setattr(module, 'STACK_WORK', 1e12)


def ensembled(make, seeds, **kw):
    "The ensemble of some seeds, trained"
    e = Ensemble([make(s, **kw) for s in seeds])
    e.train()
    return e


def close(a, b):
    "Weights and averages of two trainers within the rounding of a hundred steps; a number whose gradient is itself rounding may be moved by AdamW, so lengths are compared"
    for x, y in ((a.params, b.params), (a.ema.params, b.ema.params)):
        for k in x: assert (x[k] - y[k]).norm() <= 1e-3*x[k].norm(), k


@pytest.mark.parametrize('arch', ARCHS)
def test_a_member_is_its_run_alone(arch, make, stack_all):
    "100 steps with dropout, each network: the same losses and weights within rounding, whatever the size of the ensemble"
    kw = dict(arch=arch, epochs=4, batch_size=32)
    alone = make(2, FlowTrainer, folder='alone', **kw)
    alone.train()
    large = ensembled(make, (1, 2, 3), **kw)
    assert large.why_not == '' and alone.global_step == 100
    small = ensembled(make, (2, 3), folder='small', **kw)
    close(alone, large.members[1])
    assert all(a.equal(b) for a, b in zip(large.members[1].params.values(), small.members[0].params.values()))
    losses = [[d['train/loss'] for d in t.history if 'train/loss' in d] for t in (alone, large.members[1])]
    assert len(losses[0]) == 100 and all(abs(a - b) < 1e-4*a for a, b in zip(*losses))  # float32 rounding, carried on by AdamW


@pytest.mark.parametrize('options', [dict(flow='spherical'), dict(flow='si-gvp', aug='mixup+noise'), dict(cond=True), dict(weighting='x1'),
                                     dict(sigma=0.1), dict(ema_snapshots=2), dict(flow='otcfm', ot_batch=200)],
                         ids=lambda o: '-'.join(map(str, o.values())))
def test_options(options, make, stack_all):
    alone, both = make(2, FlowTrainer, folder='alone', epochs=4, **options), ensembled(make, (1, 2), epochs=4, **options)
    alone.train()
    assert both.why_not == ''
    close(alone, both.members[1])
    if 'ema_snapshots' in options: assert (both.members[1].run_dir.path/'chosen.pt').exists()


def test_bfloat16(make, stack_all):
    "Products of eight bits: the losses stay near those of the run alone"
    alone, both = make(2, FlowTrainer, folder='alone', precision='bf16', epochs=4), ensembled(make, (1, 2), precision='bf16', epochs=4)
    alone.train()
    losses = [[d['train/loss'] for d in t.history if 'train/loss' in d] for t in (alone, both.members[1])]
    assert both.why_not == '' and all(abs(a - b) < 0.02*a for a, b in zip(*losses))


def test_large_products_are_not_stacked(make):
    "Then members are runs alone, bit for bit, and their checkpoints say so"
    alone, both = make(2, FlowTrainer, arch='simple', batch_size=400, epochs=4, folder='alone'), ensembled(make, (1, 2), arch='simple', batch_size=400, epochs=4)
    alone.train()
    assert 'operations are large' in both.why_not and read_status(both.members[1].config.run_dir)['path'] == 'eager'
    assert all(a.equal(b) for a, b in zip(alone.params.values(), both.members[1].params.values()))


class Noisy(SimpleVelocityNet):
    "Draws in a way of its own"
    def forward(self, x, t): return super().forward(x + 0.01*torch.rand_like(x), t)


class Remembering(SimpleVelocityNet):
    "Has a buffer that changes"
    def __init__(self, dim):
        super().__init__(dim, 32)
        self.register_buffer('mean', torch.zeros(dim))

    def forward(self, x, t):
        if self.training: self.mean.lerp_(x.mean(0).detach(), 0.1)
        return super().forward(x - self.mean, t)


class Asking(SimpleVelocityNet):
    "Looks at its numbers, which vmap does not allow"
    def forward(self, x, t): return super().forward(x if x.abs().max().item() < 1e9 else x*0, t)


@pytest.mark.parametrize('kind, why', [(Noisy, 'other random numbers'), (Remembering, 'buffers that change'), (Asking, 'does not run under vmap')])
def test_what_cannot_be_stacked_takes_turns(kind, why, make, stack_all):
    register_model('odd', kind)
    try:
        alone, both = make(2, FlowTrainer, arch='odd', epochs=2, folder='alone'), ensembled(make, (1, 2), arch='odd', epochs=2)
        alone.train()
    finally: del _models['odd']
    assert why in both.why_not
    assert all(a.equal(b) for a, b in zip(alone.model.state_dict().values(), both.members[1].model.state_dict().values()))


def checkpoints_equal(a, b): return all(same_state(a/k, b/k) for k in ('last.pt', 'best.pt'))
def timeless(path): return [{k: v for k, v in d.items() if not k.startswith('time/')} for d in read_metrics(path)[0]]


def test_members_that_stand_at_different_steps_go_on_together(make, tmp_path, stack_all):
    "Bit for bit as if nobody had stopped: one stopped at 31, one at 12, one never begun, one finished; and each alone within rounding"
    whole = ensembled(make, (1, 2, 3, 4), folder='whole')
    ensembled(make, (3, 4), folder='runs')
    shutil.rmtree(tmp_path/'runs'/make(3).config.run_name)
    first = Ensemble([make(1, trackers=[StopAt(31)]), make(9, folder='other')])
    assert first.train()[0]['state'] == 'interrupted'
    second = Ensemble([make(2, trackers=[StopAt(12)]), make(9, folder='other2')])
    second.train()
    names = [m.config.run_dir for m in whole.members]
    again = Ensemble([make(s, resume_path=path if path.exists() else None) for s, path in ((s, tmp_path/'runs'/names[s - 1].name) for s in (1, 2, 3, 4))])
    assert sorted({read_checkpoint(m.resume_path/'last.pt')['progress']['step'] for m in again.members if m.resume_path}) == [12, 31, 104]
    assert [r['state'] for r in again.train()] == ['finished']*4
    for m, path in zip(again.members, names):
        assert timeless(m.config.run_dir) == timeless(path)
        assert checkpoints_equal(m.config.run_dir, path)


def test_a_failed_member_ends_alone(make, stack_all):
    "A loss that is not finite freezes and ends its member; the others do not differ by a bit from a run without it"
    bad = make(2)
    freeze = bad._freeze_unless_finite
    bad._freeze_unless_finite = lambda loss, norm: freeze(loss*(float('nan') if bad.global_step == 20 else 1.), norm)
    e = Ensemble([make(1), bad, make(3)])
    results = e.train()
    assert [r['state'] for r in results] == ['finished', 'failed', 'finished'] and 'not finite at step 21' in results[1]['reason']
    assert read_status(bad.config.run_dir)['state'] == 'failed' and all(p.isfinite().all() for p in bad.params.values())
    calm = ensembled(make, (1, 3), folder='calm')
    assert all(checkpoints_equal(e.members[k].config.run_dir, m.config.run_dir) for k, m in zip((0, 2), calm.members))


def test_memory_that_runs_out_is_said_by_every_member(make, monkeypatch, stack_all):
    e = Ensemble([make(1), make(2)])
    compute, calls = Stack.compute, []
    def hungry(self, jobs, generator=None):
        calls.append(1)
        if len(calls) == 5: raise torch.OutOfMemoryError('out of memory')
        return compute(self, jobs, generator)
    monkeypatch.setattr(Stack, 'compute', hungry)
    with pytest.raises(RuntimeError, match='batch_size=100'): e.train()
    assert [read_status(m.config.run_dir)['state'] for m in e.members] == ['failed']*2
    assert [r['state'] for r in e.train()] == ['finished']*2  # from their checkpoints


def test_a_directory_in_use_concerns_its_member_alone(make):
    holder, e = make(1, FlowTrainer), Ensemble([make(1, epochs=2), make(2, epochs=2)])
    holder._setup(), holder._open()
    results = e.train()
    holder.run_dir.close()
    assert results[0]['state'] == 'failed' and 'RunLockedError' in results[0]['reason'] and results[1]['state'] == 'finished'


def test_early_stopping_is_each_members_own(make):
    "Members end at their own epochs, as alone; those that stay are computed in a smaller stack"
    kw = dict(epochs=200, patience=2, lr=1e-2)
    with pytest.warns(UserWarning, match='off protocol'): e = ensembled(make, (1, 2, 3, 4), **kw)
    ends = [m.current_epoch for m in e.members]
    assert len(set(ends)) > 1 and {m.state for m in e.members} == {'early_stopped'}
    with pytest.warns(UserWarning, match='off protocol'): alone = make(1 + ends.index(max(ends)), FlowTrainer, folder='alone', **kw)
    alone.train()
    assert alone.current_epoch == max(ends)


# Real processes

SCRIPT = str(Path(__file__).with_name('ensemble_script.py'))
SEEDS = (1, 2, 3)
def run_of(seed, folder='runs'): return Path(folder)/f'mlp-icfm-1k-none-s{seed}'


@pytest.fixture
def start(place):
    "Start an ensemble in a process"
    started = []
    def start(folder, *options):
        started.append(Script(folder, *options, script=(SCRIPT,)))
        return started[-1]
    yield start
    for s in started: s.close()


def test_a_killed_ensemble_ends_like_one_that_was_never_killed(start, train_main):
    "SIGKILL, then SIGTERM; and one of its members goes on alone, by the training script, within rounding"
    assert start('whole').end(120)[0] == 0
    for number, epochs in ((signal.SIGKILL, 2), (signal.SIGTERM, 5)):
        p = start('runs', '--resume')
        p.until(lambda: in_epoch(run_of(2), epochs))
        p.send(number)
        assert p.end()[0] == (-9 if number == signal.SIGKILL else 143)
    assert {read_status(run_of(s))['state'] for s in SEEDS} == {'interrupted'} and not list(Path('runs').rglob('lock'))
    shutil.copytree(run_of(2), run_of(2, 'alone'))
    assert start('runs', '--resume').end(120)[0] == 0
    for s in SEEDS:
        assert read_status(run_of(s))['path'] == 'stacked' and lines(run_of(s)) == lines(run_of(s, 'whole'))
        assert checkpoints_equal(run_of(s), run_of(s, 'whole'))
    code, out, err = train_main('--resume', run_of(2, 'alone'), '--device', 'cpu')
    assert code == 0 and 'the step was stacked, is eager' in out + err
    a, b = (read_checkpoint(run_of(2, f)/'last.pt') for f in ('alone', 'whole'))
    assert a['progress']['step'] == b['progress']['step']
    for k, x in a['model'].items(): assert (x - b['model'][k]).norm() <= 1e-3*x.norm(), k
