"""What must hold on a real GPU: training, exact resume, eager and captured, the frozen step, ensembles, transport. Skipped where there is none."""
import os
import signal

import pytest
import torch

from flow_study import paths
from flow_study.checkpoint import read_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
from flow_study.ensemble import Ensemble, Member, Stack, _Trial, first_job
from flow_study.models import build_model
from flow_study.rundir import read_metrics, read_status
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer, NonFiniteError

pytestmark = pytest.mark.cuda


@pytest.fixture
def make(tmp_path):
    "A function that makes a trainer on the GPU"
    table = torch.randn(1200, 64, generator=keyed_generator(0, 'tests'))*torch.logspace(0.5, -0.5, 64)
    train, val = FlowDataset.from_tensor(table[:1000]), FlowDataset.from_tensor(table[1000:])
    def trainer(name, trackers=(), flow='icfm', compile='auto', kind=FlowTrainer, seed=42, **kw):
        config = TrainingConfig(arch='mlp', flow=flow, dataset='tests', group='tests', epochs=6, batch_size=128, lr=1e-3, warmup_steps=5,
                                checkpoint_dir=str(tmp_path), name=name, compile=compile, seed=seed)
        return kind(build_model(config, train), config, train, val, 'cuda', trackers=list(trackers), log_every=1, **kw)
    return trainer


class Terminate(Tracker):
    "Sends this process SIGTERM at a step"
    def __init__(self, step): self.step = step
    def log(self, metrics):
        if metrics['step'] == self.step: os.kill(os.getpid(), signal.SIGTERM)


def timeless(path): return [{k: v for k, v in d.items() if not k.startswith('time/')} for d in read_metrics(path)[0]]


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
@pytest.mark.parametrize('flow', ['icfm', 'otcfm'])
def test_resume_is_bit_for_bit(make, tmp_path, flow, compile):
    whole = make('whole', flow=flow, compile=compile)
    whole.train()
    assert whole.path == ('eager' if compile == 'off' else 'captured') and (compile == 'off' or whole._captured.graph is not None)
    make('cut', [Terminate(17)], flow=flow, compile=compile).train()
    make('cut', flow=flow, resume_path=tmp_path/'cut', compile=compile).train()
    a, b = (read_checkpoint(tmp_path/name/'last.pt') for name in ('whole', 'cut'))
    assert timeless(tmp_path/'whole') == timeless(tmp_path/'cut')
    assert all(v.equal(b['model'][k]) for k, v in a['model'].items())
    assert all(v.equal(b['ema']['params'][k]) for k, v in a['ema']['params'].items())


def test_the_run_knows_its_gpu(make, tmp_path):
    make('known').train()
    device = read_status(tmp_path/'known')['device']
    assert device['type'] == 'cuda' and device['name'] == torch.cuda.get_device_name() and device['uuid'].startswith('GPU-')


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_a_step_asks_the_device_nothing(make, compile):
    "torch raises at the first synchronisation; capturing, in the fourth step, may wait"
    trainer = make('quiet', compile=compile)
    trainer._setup()
    rows = next(trainer.loader.batches(0))
    for _ in range(5): trainer.train_step(rows)
    torch.cuda.set_sync_debug_mode('error')
    try: trainer.train_step(rows)
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_captured_step_is_the_eager_step(make):
    "Ten steps from the same start, seven of them replayed: the learning rate is read as float32, nothing else differs"
    eager, captured = make('eager', compile='off'), make('captured')
    for t in (eager, captured):
        t._setup()
        for x1 in [*t.loader.batches(0), *t.loader.batches(1)][:10]: t.train_step(x1)
    assert captured._captured.graph is not None and captured._captured.steps == 10
    for a, b in ((eager.params, captured.params), (eager.ema.params, captured.ema.params)):
        for k in a: assert (a[k] - b[k]).norm() <= 1e-4*a[k].norm(), k


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_a_loss_that_is_not_finite_freezes_the_run(make, tmp_path, compile):
    "From a bad row on every step is nothing, replayed ones too"
    trainer = make('nan', compile=compile)
    trainer._setup()
    drawn = trainer._drawn
    trainer._drawn = lambda batches, step, picked=None: drawn([b*float('nan') if step == 20 else b for b in batches], step, picked)
    with pytest.raises(NonFiniteError, match='at step 21'): trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters()) and all(p.isfinite().all() for p in trainer.ema.params.values())
    assert read_status(tmp_path/'nan')['state'] == 'failed'


def test_a_step_of_a_stack_is_that_of_each_run_alone(make):
    "Single steps from equal weights: losses and gradients within the rounding of float32 products in another order"
    members = [make(f'm{s}', kind=Member, seed=s) for s in (1, 2, 3)]
    for m in members: m._setup()
    jobs, trial = [first_job(m) for m in members], _Trial(members[0])
    assert trial.only_masks
    losses, grads = Stack(members, trial.masks).compute(jobs)
    for k, m in enumerate(members):
        m._seed_network()
        torch.testing.assert_close(losses[k], m._loss_and_gradients(*jobs[k])[0], rtol=1e-5, atol=1e-6)
        for name, p in m.params.items(): torch.testing.assert_close(grads[name][k], p.grad, rtol=1e-3, atol=1e-5)


def test_an_ensemble_trains(make):
    results = Ensemble([make(f'e{s}', kind=Member, seed=s) for s in (1, 2, 3)]).train()
    assert [r['state'] for r in results] == ['finished']*3


def test_transport_stays_on_the_gpu_and_is_exact(monkeypatch):
    "The assignment of the auction, as good as scipy's, without a cost on the CPU"
    gen = keyed_generator(0, 'tests')
    for n, d in ((256, 2), (256, 1024), (300, 32)):
        x0, x1 = (torch.randn(n, d, generator=gen) for _ in range(2))
        exact = paths.Transport()(x0, x1)
        with monkeypatch.context() as patch:
            patch.setattr(paths, 'assign', lambda cost: pytest.fail('the cost was copied to the CPU'))
            coupled = paths.Transport()(x0.cuda(), x1.cuda()).cpu()
        total = lambda a: (a.double() - x1.double()).square().sum().item()
        assert abs(total(coupled) - total(exact)) <= 1e-6*total(exact)
