"""What must hold on a real GPU: training, exact resume within the eager path, the frozen step. Skipped where there is none."""
import os
import signal

import pytest
import torch

from flow_study.checkpoint import read_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
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
    def trainer(name, trackers=(), flow='icfm', **kw):
        config = TrainingConfig(arch='mlp', flow=flow, dataset='tests', group='tests', epochs=6, batch_size=128, lr=1e-3, warmup_steps=5,
                                checkpoint_dir=str(tmp_path), name=name)
        return FlowTrainer(build_model(config, train), config, train, val, 'cuda', trackers=list(trackers), log_every=1, **kw)
    return trainer


class Terminate(Tracker):
    "Sends this process SIGTERM at a step"
    def __init__(self, step): self.step = step
    def log(self, metrics):
        if metrics['step'] == self.step: os.kill(os.getpid(), signal.SIGTERM)


def timeless(path): return [{k: v for k, v in d.items() if not k.startswith('time/')} for d in read_metrics(path)[0]]


@pytest.mark.parametrize('flow', ['icfm', 'otcfm'])
def test_resume_is_bit_for_bit(make, tmp_path, flow):
    make('whole', flow=flow).train()
    make('cut', [Terminate(17)], flow=flow).train()
    make('cut', flow=flow, resume_path=tmp_path/'cut').train()
    a, b = (read_checkpoint(tmp_path/name/'last.pt') for name in ('whole', 'cut'))
    assert timeless(tmp_path/'whole') == timeless(tmp_path/'cut')
    assert all(v.equal(b['model'][k]) for k, v in a['model'].items())
    assert all(v.equal(b['ema']['params'][k]) for k, v in a['ema']['params'].items())


def test_the_run_knows_its_gpu(make, tmp_path):
    make('known').train()
    device = read_status(tmp_path/'known')['device']
    assert device['type'] == 'cuda' and device['name'] == torch.cuda.get_device_name() and device['uuid'].startswith('GPU-')


def test_a_step_asks_the_device_nothing(make):
    "torch raises at the first synchronisation"
    trainer = make('quiet')
    trainer._setup()
    rows = next(trainer.loader.batches(0))
    trainer.train_step(rows)
    torch.cuda.set_sync_debug_mode('error')
    try: trainer.train_step(rows)
    finally: torch.cuda.set_sync_debug_mode('default')


def test_a_loss_that_is_not_finite_freezes_the_run(make, tmp_path):
    trainer = make('nan')
    trainer._setup()
    healthy = trainer.loss_step
    trainer.loss_step = lambda *args: healthy(*args)*(float('nan') if trainer.global_step == 20 else 1.)
    with pytest.raises(NonFiniteError, match='at step 21'): trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters()) and all(p.isfinite().all() for p in trainer.ema.params.values())
    assert read_status(tmp_path/'nan')['state'] == 'failed'
