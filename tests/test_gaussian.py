"""The Gaussian case end to end: everything about it is known in closed form, so nothing can hide."""
import pytest
import torch

from flow_study.checkpoint import load_model
from flow_study.closed_form import GaussianVelocity, ValidationBank, held_out_loss
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
from flow_study.models import build_model
from flow_study.paths import create_flow
from flow_study.sampling import sample
from flow_study.trainer import FlowTrainer

MEAN = torch.tensor([0.5, -1., 0.])
ROOT = torch.tensor([[1.2, 0., 0.], [0.6, 0.5, 0.], [0., -0.3, 0.8]])  # of the covariance
COV = ROOT @ ROOT.T


def rows(n, index): return MEAN + torch.randn(n, 3, generator=keyed_generator(0, 'tests', index)) @ ROOT.T


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A network trained on 20,000 rows of a Gaussian"
    torch.set_num_threads(1)
    train, val = FlowDataset.from_tensor(rows(20_000, 0)), FlowDataset.from_tensor(rows(2_000, 1))
    config = TrainingConfig(arch='mlp', flow='icfm', dataset='gaussian', group='tests', epochs=20, batch_size=512, lr=3e-3, warmup_steps=100,
                            checkpoint_dir=str(tmp_path_factory.mktemp('runs')))
    with_more_dice = ValidationBank(val, create_flow('icfm'), draws=16, stream='report')
    result = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[]).train()
    return load_model(result['checkpoint_path']), with_more_dice


def test_trained_loss_reaches_the_analytic_minimum(run):
    "Within 2 % of the loss of the optimal velocity, on the same dice"
    model, bank = run
    variances, basis = torch.linalg.eigh(COV)
    least = held_out_loss(GaussianVelocity(MEAN, basis, variances, torch.tensor(1.)), bank).mean
    trained = held_out_loss(model, bank).mean
    assert least*0.995 < trained < least*1.02


def test_samples_have_the_mean_and_covariance(run):
    "Within four standard errors of 10,000 samples, plus 3 % for the network's own error"
    n = 10_000
    x = sample(run[0], n, method='heun', steps=20, seed=0, normalized=True).double()
    scale = COV.diagonal().sqrt()
    assert ((x.mean(0) - MEAN).abs() < scale*(4/n**0.5 + 0.03)).all()
    outer = scale[:, None]*scale
    assert ((x.T.cov() - COV).abs() < outer*(4*(2/n)**0.5 + 0.06)).all()
