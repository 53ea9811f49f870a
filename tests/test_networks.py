"""Every network, bare and behind a closed form: shapes, gradients, types, transformations, files, conditions; and what may be fitted to."""
import math
import os
import signal

import pytest
import torch

from flow_study.checkpoint import load_model, read_checkpoint, save_checkpoint
from flow_study.closed_form import ValidationBank
from flow_study.config import TrainingConfig
from flow_study.data import DataError, FlowDataset, NormalizationStats
from flow_study.draws import keyed_generator
from flow_study.ema import EMAModel, changing_buffers
from flow_study.models import build_model, create_model, keyed_init
from flow_study.sampling import main as sample_main, sample
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer, choose_average

ARCHS = ('mlp', 'dit', 'unet', 'mamba')
BARE = (*ARCHS, 'mlp-plain', 'simple')


def size_of(arch): return {'size': 'tiny'} if arch in ARCHS else {}


def awake(model):
    "Random numbers in every parameter, so that nothing is zero as it was made"
    gen = keyed_generator(0, 'tests')
    with torch.no_grad():
        for p in model.parameters(): p.copy_(p + 0.05*torch.randn(p.shape, generator=gen))
    return model.eval()


def network(arch, dim=12, **kw):
    with keyed_init(0): return awake(create_model(arch, dim, **size_of(arch), **kw))


def table(n=300, d=12, seed=0):
    mix = torch.randn(d, d, generator=keyed_generator(99, 'tests'))*torch.logspace(0, -1.5, d)
    return torch.randn(n, d, generator=keyed_generator(seed, 'tests')) @ mix.T + 0.3


@pytest.fixture
def config(tmp_path):
    return TrainingConfig(arch='mlp', flow='icfm', dataset='tests', group='tests', size='tiny', epochs=4, batch_size=50, lr=3e-3, warmup_steps=2,
                          checkpoint_dir=str(tmp_path/'runs'))


def behind(arch, config, **kw): return awake(build_model(config.replace(arch=arch, **kw), FlowDataset.from_tensor(table())))


x, t = torch.randn(9, 12, generator=keyed_generator(1, 'tests')), torch.linspace(0, 1, 9)


@pytest.mark.parametrize('arch', BARE)
@pytest.mark.parametrize('dim', [1, 2, 7, 33, 130])
def test_widths(arch, dim):
    net = network(arch, dim)
    for b in (1, 5): assert net(torch.randn(b, dim), torch.rand(b)).shape == (b, dim)


@pytest.mark.parametrize('arch', BARE)
def test_times_in_every_form(arch):
    net = network(arch)
    with torch.no_grad():
        assert net(x, t).equal(net(x, t[:, None]))
        assert net(x, 0.25).equal(net(x, torch.tensor(0.25)))
        torch.testing.assert_close(net(x, 0.25), net(x, torch.full((9,), 0.25)), rtol=1e-4, atol=1e-5)  # features of a shared time are made once: a product of another shape
        assert not net(x, 0.25).equal(net(x, 0.75))
        with pytest.raises(ValueError, match='one for each of the 9 rows'): net(x, torch.rand(4))


@pytest.mark.parametrize('arch', BARE)
def test_rows_do_not_see_each_other(arch):
    "The velocity of a row is that of the row alone, up to the order of sums in a larger product"
    net = network(arch)
    with torch.no_grad(): torch.testing.assert_close(net(x, t)[3:4], net(x[3:4], t[3:4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('arch', BARE)
def test_gradients_reach_every_parameter(arch, config):
    "A step later for each thing on the way that starts at zero: output, gates, levels"
    model = build_model(config.replace(arch=arch, **({} if arch in ARCHS else {'size': None})), FlowDataset.from_tensor(table()))
    reached, optimizer = set(), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        optimizer.zero_grad()
        (model(x, t) - x).square().mean().backward()
        reached |= {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    assert {k for k, _ in model.named_parameters()} - reached == set()


@pytest.mark.parametrize('precond', ['unit', 'gaussian'])
@pytest.mark.parametrize('arch', ARCHS)
def test_before_training_it_is_the_closed_form(arch, precond, config):
    model = build_model(config.replace(arch=arch, precond=precond), FlowDataset.from_tensor(table()))
    with torch.no_grad(): assert model(x, t).equal(model.base(x, t)) and model.net(x, t).abs().sum() == 0


@pytest.mark.parametrize('arch', ARCHS)
def test_bfloat16_agrees(arch, config):
    "8 bits are 0.4 % of a number; some layers deep that stays below 5 % of the size of the output"
    model = behind(arch, config)
    with torch.no_grad():
        full = model(x, t)
        with torch.autocast('cpu', dtype=torch.bfloat16): mixed = model(x, t).float()
        half = model.bfloat16()(x.bfloat16(), t.bfloat16()).float()
    for v in (mixed, half): assert (v - full).square().mean().sqrt() < 0.05*full.square().mean().sqrt()


@pytest.mark.parametrize('arch', ARCHS)
def test_compiled_it_gives_the_same(arch, config):
    "One graph without a break, and the same velocities and gradients up to rounding"
    torch._dynamo.reset()
    model = behind(arch, config)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    results = []
    for f in (model, compiled):
        model.zero_grad()
        v = f(x, t)
        v.square().mean().backward()
        results.append((v.detach(), *(p.grad.clone() for p in model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiled_by_the_default_backend(config):
    "Code generated for the processor, of the default network"
    torch._dynamo.reset()
    model = behind('mlp', config)
    with torch.no_grad(): torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, t), model(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('arch', ARCHS)
def test_mapped_over_stacked_weights(arch, config):
    "What an ensemble does: one call for many sets of weights, dropout with other dice for each"
    models = [awake(build_model(config.replace(arch=arch, seed=s), FlowDataset.from_tensor(table()))) for s in (1, 2)]
    params, buffers = torch.func.stack_module_state(models)
    call = lambda p, b, x: torch.func.functional_call(models[0], (p, b), (x, t))
    with torch.no_grad():
        together = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
        torch.testing.assert_close(together, torch.stack([m(x, t) for m in models]), rtol=1e-4, atol=1e-5)
        models[0].train()
        same = {k: v[:1].expand_as(v) for k, v in params.items()}
        a, b = torch.func.vmap(call, in_dims=(0, 0, None), randomness='different')(same, buffers, x)
    assert not a.equal(b)


@pytest.mark.parametrize('flow', ['icfm', 'si-gvp', 'spherical'])
@pytest.mark.parametrize('arch', ARCHS)
def test_through_a_checkpoint(arch, flow, config, tmp_path):
    model = behind(arch, config, flow=flow)
    save_checkpoint(tmp_path/'best.pt', model=model, ema=EMAModel(model), model_spec=model.spec, config=config.replace(arch=arch, flow=flow).to_dict())
    with torch.no_grad(): assert load_model(tmp_path/'best.pt')(x, t).equal(model(x, t))


def test_what_is_fitted_is_not_averaged(config):
    model = behind('mlp', config)
    assert changing_buffers(model) == {} and {k for k in model.state_dict() if k.startswith('base.')}
    assert not any(k.startswith('base.') for k, _ in model.named_parameters())


def test_coordinates_turned_give_velocities_turned(config):
    "Behind principal axes it does not matter in which coordinates a table comes"
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=keyed_generator(2, 'tests')))
    a, b = (awake(build_model(config, FlowDataset.from_tensor(rows))) for rows in (table(), table() @ turn))
    sign = (a.base.basis.T @ turn @ b.base.basis).diagonal().sign()  # an axis has no direction; give both the same
    b.base.basis.mul_(sign)
    with torch.no_grad(): torch.testing.assert_close(a(x, t) @ turn, b(x @ turn, t), rtol=1e-3, atol=1e-3)


# Conditions

@pytest.mark.parametrize('kind', ['labels', 'vectors'])
@pytest.mark.parametrize('arch', ARCHS)
def test_conditions(arch, kind):
    net = network(arch, **({'classes': 3} if kind == 'labels' else {'cond_dim': 2}))
    cond = torch.tensor([0, 1, 2]*3) if kind == 'labels' else torch.randn(9, 2, generator=keyed_generator(3, 'tests'))
    hidden = cond.clone()
    hidden[4] = -1 if kind == 'labels' else math.nan
    with torch.no_grad():
        with_it, without, one_hidden = net(x, t, cond), net(x, t), net(x, t, hidden)
    assert not with_it.equal(without)
    same = (one_hidden == with_it).all(1)
    assert not same[4] and same.sum() == 8
    torch.testing.assert_close(one_hidden[4], without[4])


def labelled(n=400, seed=0):
    "Two clusters far apart, and which one a row is from"
    gen = keyed_generator(seed, 'tests/labels')
    label = torch.randint(2, (n,), generator=gen)
    rows = torch.randn(n, 4, generator=gen)*0.3 + torch.where(label == 1, 1., -1.)[:, None]
    return FlowDataset.from_tensor(rows, NormalizationStats(torch.zeros(4), torch.ones(4), 1, 'tests'), cond=label)


def conditional(config, trackers=(), **kw):
    config = config.replace(cond=True, **kw)
    train = labelled()
    return FlowTrainer(build_model(config, train), config, train, labelled(100, seed=1), 'cpu', trackers=list(trackers), log_every=1)


def test_a_condition_lowers_the_loss(config):
    "Who knows the cluster of a row knows its velocity better; hidden from every row, it is no help"
    losses = [conditional(config, epochs=12, cond_dropout=p, name=f'p{p}').train()['best_val_loss'] for p in (0.1, 0.99)]
    assert losses[0] < losses[1] - 0.02


@pytest.mark.parametrize('ot', [None, 100])
def test_conditions_stay_with_their_rows(ot, config):
    "What a step is given: the label of each row, whatever the coupling, and -1 where it is hidden"
    trainer = conditional(config, cond_dropout=0.3, flow='otcfm' if ot else 'icfm', ot_batch=ot)
    trainer._setup()
    label_of = {tuple(r): int(c) for r, c in zip(trainer.train_dataset.x.tolist(), trainer.train_dataset.cond)}
    seen = [(label_of[tuple(r)], int(c)) for x1, draws in trainer._examples() for r, c in zip(x1.tolist(), draws.cond)]
    assert len(seen) == 400 and all(c in (a, -1) for a, c in seen)
    assert 0.2 < sum(c == -1 for _, c in seen)/400 < 0.4


class Stop(Tracker):
    "A signal after a step"
    def __init__(self, step): self.at = step
    def log(self, metrics):
        if metrics['step'] == self.at: os.kill(os.getpid(), signal.SIGTERM)


def test_a_conditional_run_goes_on_bit_for_bit(config):
    whole, part = (conditional(config, name=name, trackers=trackers) for name, trackers in (('whole', ()), ('part', [Stop(13)])))
    whole.train()
    assert part.train()['state'] == 'interrupted' and part.global_step == 13
    other = conditional(config, name='part')
    other.resume_path = part.config.run_dir
    other.train()
    a, b = (read_checkpoint(p.config.run_dir/'last.pt') for p in (whole, other))
    assert all(v.equal(b['ema']['params'][k]) for k, v in a['ema']['params'].items())
    assert [d.get('train/loss') for d in whole.history] == [d.get('train/loss') for d in other.history]


def test_samples_under_a_condition(config, capsys, tmp_path):
    "Each label's samples lie in its cluster, also through the console script, and guidance pushes them further"
    run = conditional(config, epochs=40, ema_snapshots=2).train()['run_dir']
    drawn = {g: sample(run, 200, cond=1, guidance=g, normalized=True) for g in (1., 2.)}
    assert (drawn[1.].mean(1) > 0).float().mean() > 0.95 > (sample(run, 200, normalized=True).mean(1) > 0).float().mean()
    assert drawn[2.].mean() > drawn[1.].mean() + 0.02
    assert choose_average(run, labelled(100, seed=1))                  # on the loss under the conditions, too
    for options, code in ((['--label', '1'], 0), (['--guidance', '2'], 2)):
        assert sample_main([run, '--n', '50', '--steps', '5', '--out', str(tmp_path/'x.npy'), *options]) == code, options


@pytest.mark.parametrize('cond, message', [(None, 'missing'), (torch.tensor([0, 7]*50), 'label 7'), (torch.zeros(100, 3), 'shape')])
def test_other_conditions_are_refused(cond, message, config):
    config = config.replace(cond=True)
    train, val = labelled(), FlowDataset.from_tensor(labelled(100, seed=1).x, labelled().stats, cond=cond)
    with pytest.raises(DataError, match=message): FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[]).train()


@pytest.mark.parametrize('cond, message', [(torch.zeros(7), 'labels'), (torch.tensor([-1]*300), 'whole numbers'), (torch.full((300, 2), math.nan), 'NaN')])
def test_bad_conditions_are_refused(cond, message):
    with pytest.raises(DataError, match=message): FlowDataset.from_tensor(table(), cond=cond)


# What may be fitted to

def trained(config, val):
    train = FlowDataset.from_tensor(table(), name='train')
    trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[])
    trainer.train()
    return read_checkpoint(config.run_dir/'last.pt')


def test_validation_rows_decide_nothing_that_is_fitted(config):
    "Permuted or replaced, they leave every tensor of the network and of the closed form as it was"
    val = table(100, seed=5)
    permuted, others = val[torch.randperm(100, generator=keyed_generator(4, 'tests'))], 3*table(100, seed=6)
    states = [trained(config.replace(name=f'v{k}'), FlowDataset.from_tensor(v, name='val')) for k, v in enumerate((val, permuted, others))]
    for s in states[1:]:
        assert s['model'].keys() == states[0]['model'].keys()
        assert all(v.equal(states[0]['model'][k]) for k, v in s['model'].items())
        assert all(v.equal(states[0]['ema']['params'][k]) for k, v in s['ema']['params'].items())


def test_the_bank_of_the_report_is_not_that_of_early_stopping(config):
    "They share no noise; of their times some may be equal by chance, among 16 million"
    train, val = FlowDataset.from_tensor(table()), FlowDataset.from_tensor(table(100, seed=5))
    trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[])
    trainer._setup()
    report = ValidationBank(val, trainer.flow, draws=32, stream='report')
    (ta, xa, _), (tb, xb, _) = ([torch.cat(p) for p in zip(*bank)] for bank in (trainer.bank, report))
    assert len(set(ta.tolist()) & set(tb.tolist())) < 5
    x0 = lambda t, x_t, bank: (x_t - t[:, None]*bank.x[bank.row])/(1 - t[:, None]).clamp(min=1e-6)
    early = (ta < 0.9), (tb < 0.9)
    assert torch.cdist(x0(ta, xa, trainer.bank)[early[0]], x0(tb, xb, report)[early[1]]).min() > 0.1
