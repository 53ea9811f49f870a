"""Solvers beside torchdiffeq, likelihoods beside closed forms, samples of checkpoints, and what must stop with an error."""
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from flow_study.checkpoint import load_model, save_checkpoint
from flow_study.closed_form import GaussianVelocity, MemoriserVelocity
from flow_study.config import TrainingConfig
from flow_study.data import NormalizationStats, save_plain
from flow_study.draws import keyed_generator
from flow_study.ema import EMAModel
from flow_study.models import VelocityMLP, create_model, keyed_init
from flow_study.paths import linear, trigonometric
from flow_study.paths import load_pairs
from flow_study.sampling import (CompiledStep, CountedVelocity, SolverError, cfg_zero_star, guided, log_likelihood, main, make_pairs, nearest_texts,
                                 sample, shifted_grid, solve, uniform_grid)

FIXED = dict(euler=('euler', 1), midpoint=('midpoint', 2), heun=('heun2', 2), rk4=('rk4', 4)) # torchdiffeq's name, evaluations a step
METHODS = [*FIXED, 'dopri5']


def normal(*shape, stream='tests', dtype=torch.float64):
    return torch.randn(*shape, generator=keyed_generator(0, stream), dtype=dtype)


def grid_for(method, steps=50): return [0., 1.] if method == 'dopri5' else uniform_grid(steps)


def gaussian(d=6, dtype=torch.float64, interpolant=linear, axes=True):
    "A Gaussian field in axes of its own, and its distribution"
    basis = torch.linalg.qr(normal(d, d, stream='axes'))[0] if axes else torch.eye(d, dtype=torch.float64)
    variances, mean = torch.logspace(0.6, -1.4, d, dtype=torch.float64), torch.linspace(-1, 1, d, dtype=torch.float64)
    v = GaussianVelocity(mean, basis, variances, torch.ones((), dtype=torch.float64), interpolant).to(dtype)
    return v, torch.distributions.MultivariateNormal(mean, basis*variances @ basis.T)


def network(dtype):
    "A network with weights that bend its paths"
    with keyed_init(0): net = VelocityMLP(6, hidden=32, layers=3)
    with torch.no_grad(): net.out.weight.mul_(300)
    return net.to(dtype).requires_grad_(False)


FIELDS = dict(gaussian=lambda dtype: gaussian(dtype=dtype)[0], trigonometric=lambda dtype: gaussian(dtype=dtype, interpolant=trigonometric)[0],
              network=network, time_only=lambda dtype: lambda x, t: torch.cos(9*t).expand_as(x))


# --- solvers beside torchdiffeq

@pytest.mark.parametrize('grid', [uniform_grid(17), shifted_grid(17, 3.)], ids=['uniform', 'shifted'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('field', FIELDS)
@pytest.mark.parametrize('method', FIXED)
def test_fixed_steps_are_those_of_torchdiffeq(method, field, dtype, grid):
    "Equal evaluations, type and points at every time of the grid, within the rounding of 17 steps"
    v, x0, (name, stages) = FIELDS[field](dtype), normal(20, 6, dtype=dtype), FIXED[method]
    theirs = CountedVelocity(v)
    expected = odeint(lambda t, x: theirs(x, t), x0, grid.to(dtype), method=name)
    mine = solve(v, x0, grid, method, trajectory=True)
    assert mine.nfe == theirs.nfe == 17*stages
    assert mine.x.dtype == mine.trajectory.dtype == dtype
    eps = torch.finfo(dtype).eps*200*expected.abs().max()
    assert (mine.trajectory - expected).abs().max() < eps
    assert mine.x.equal(mine.trajectory[-1])


@pytest.mark.parametrize('field', FIELDS)
def test_dopri5_is_that_of_torchdiffeq_but_ends_at_the_end(field):
    "The same points within the tolerance; torchdiffeq alone asks for times beyond 1"
    v, x0, seen, raw = FIELDS[field](torch.float64), normal(20, 6), [], []

    def noted(times): return lambda x, t: (times.append(float(t)), v(x, t))[1]

    theirs = noted(raw)
    expected = odeint(lambda t, x: theirs(x, t), x0, torch.tensor([0., 1.], dtype=torch.float64), rtol=1e-7, atol=1e-7)[-1]
    found = solve(noted(seen), x0, [0., 1.], 'dopri5', rtol=1e-7, atol=1e-7)
    assert (found.x - expected).abs().max() < 1e-5
    assert found.nfe == len(seen) and abs(found.nfe - len(raw)) <= 12  # two steps more or less: the last one is cut
    assert max(raw) > 1 >= max(seen)


def test_the_first_guess_of_a_step_does_not_look_beyond_the_end():
    "Where almost nothing moves torchdiffeq guesses a first step of thousands"
    seen = []
    solve(lambda x, t: (seen.append(float(t)), 1e-6*x)[1], normal(5, 2), [0., 1.], 'dopri5')
    assert max(seen) <= 1


@pytest.mark.parametrize('method', METHODS)
def test_only_the_grid_says_where_it_ends(method):
    v, _ = gaussian()
    x0 = normal(20, 6)
    half = solve(v, x0, [0., .25, .5] if method == 'dopri5' else uniform_grid(400)[:201], method).x
    exact = 0.5*v.mean + (x0 @ v.basis*(0.25*v.variances + 0.25).sqrt()) @ v.basis.T
    assert (half - exact).abs().max() < (0.02 if method == 'euler' else 1e-4)


@pytest.mark.parametrize('method, order', dict(euler=1, midpoint=2, heun=2, rk4=4).items())
def test_order_on_a_field_that_bends_in_x_and_t(method, order):
    "x' = x(1 - x) cos t has the solution of the logistic equation at time sin t"
    v = lambda x, t: x*(1 - x)*torch.cos(t)
    x0 = torch.rand(50, 1, generator=keyed_generator(1, 'tests'), dtype=torch.float64)*3 + 0.1
    e = math.exp(math.sin(1))
    exact = x0*e/(1 + x0*(e - 1))
    errors = [(solve(v, x0, uniform_grid(n), method).x - exact).abs().max().item() for n in (80, 160)]
    assert math.log2(errors[0]/errors[1]) == pytest.approx(order, abs=0.15)


def test_trajectory_callback_and_last_state_agree():
    v, x0 = gaussian()[0], normal(20, 6)
    for method in METHODS:
        seen = []
        found = solve(v, x0, uniform_grid(8), method, trajectory=True, callback=lambda i, t, x: seen.append((i, t, x)))
        assert found.trajectory.shape == (9, 20, 6) and found.trajectory[0].equal(x0)
        assert [i for i, _, _ in seen] == list(range(1, len(seen) + 1))
        assert seen[-1][1] == 1 and seen[-1][2].equal(found.x)
        assert solve(v, x0, uniform_grid(8), method).trajectory is None


# --- what stops a solver

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize('time', [0., 0.3, 0.97])
@pytest.mark.parametrize('method', METHODS)
def test_a_number_that_is_not_finite_stops_every_solver(method, time, bad):
    "Whenever it comes, in however few rows, the error has step, time and count"
    def v(x, t): return torch.where((t >= time) & (torch.arange(len(x)) == 3), bad, 1.)[:, None].expand_as(x)
    counted = CountedVelocity(v)
    with pytest.raises(SolverError, match=r'in step \d+.*t=.*in 1 of 20 rows') as e: solve(counted, normal(20, 6), grid_for(method), method)
    assert counted.nfe <= 300  # no endless loop
    if method == 'euler': assert f'in step {math.ceil(time*50) + 1} of 50' in str(e.value)


def test_a_state_that_recovers_is_not_forgiven():
    "The step at which a number was lost counts, not whether one is there at the end"
    lost = lambda x: torch.where(x > 0.45, math.inf, x)
    healed = CountedVelocity(lambda x, t: torch.where(x.isinf(), -math.inf, 1.))
    steps = iter(range(99))
    def project(x): return lost(x) if next(steps) < 9 else torch.zeros_like(x)
    with pytest.raises(SolverError, match='in step 5 of 10'): solve(healed, torch.zeros(2, 1), uniform_grid(10), 'euler', project=project)


def test_a_solution_that_explodes_is_an_error_and_not_an_early_end():
    "x' = x^2 from 2 is infinite at t = 1/2"
    for method in METHODS:
        counted = CountedVelocity(lambda x, t: x*x)
        with pytest.raises(SolverError): solve(counted, torch.full((3, 1), 2.), grid_for(method, 400), method)
        assert counted.nfe < 5000


@pytest.mark.parametrize('method', METHODS)
def test_bad_start(method):
    x0 = normal(5, 2)
    x0[1] = math.nan
    with pytest.raises(SolverError, match='x0 has NaN or infinite numbers in 1 of 5 rows'): solve(lambda x, t: x, x0, grid_for(method), method)


def test_an_early_end_is_noticed(monkeypatch):
    "A solver that goes half of the way and says that it arrived"
    half = lambda f, x, t, options, **kw: odeint(f, x, t/2, **kw)
    monkeypatch.setattr('torchdiffeq.odeint', half)
    with pytest.raises(SolverError, match='dopri5 ended at t=0.[5-9].*, expected 1'): solve(lambda x, t: 20*x*torch.cos(40*t), normal(5, 2), [0., 1.], 'dopri5')


@pytest.mark.parametrize('times', [[0.], [], [0., 0.], [1., 0.], [0., .6, .5, 1.], [0., math.nan], None, 10, 'times'], ids=str)
@pytest.mark.parametrize('method', ['euler', 'dopri5'])
def test_bad_grids(method, times):
    with pytest.raises(ValueError, match='times='): solve(lambda x, t: x, normal(5, 2), times, method)


def test_bad_options():
    x0, v = normal(5, 2), lambda x, t: x
    for kw, message in [(dict(method='rk'), "Did you mean 'rk4'"), (dict(rtol=1e-3), 'Only dopri5'), (dict(method='dopri5', atol=-1.), 'atol=-1'),
                        (dict(method='dopri5', rtol=math.nan), 'rtol=nan')]:
        with pytest.raises(ValueError, match=message): solve(v, x0, uniform_grid(4), **kw)
    for bad in (0, -1, 1.5, True, '5'):
        with pytest.raises(ValueError, match='steps='): uniform_grid(bad)
    for bad in (torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match='x0='): solve(v, bad, uniform_grid(4))
    with pytest.raises(ValueError, match='velocity='): solve(lambda x, t: x.sum(1), x0, uniform_grid(4))


@pytest.mark.parametrize('wrap', [lambda v: v, lambda v: guided(v, lambda x, t: -(x**2).sum(1), clip=1.), lambda v: cfg_zero_star(v, v, 2.)],
                         ids=['plain', 'guided', 'cfg'])
@pytest.mark.parametrize('method', FIXED)
def test_the_device_is_asked_every_16_steps_only(method, wrap):
    "On torch's `meta` device every question for a number is an error: the first one comes after step 16"
    seen = []
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'):
        solve(wrap(lambda x, t: t*x), torch.zeros(4, 3, device='meta'), uniform_grid(50), method, callback=lambda i, t, x: seen.append(i))
    assert seen == list(range(1, 16))


# --- likelihood

def test_likelihood_of_a_mixture():
    "Halfway to its points the memoriser's flow is a mixture of Gaussians"
    rows, end = normal(5, 3, stream='rows')*2, 0.8
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(5).double()),
        torch.distributions.MultivariateNormal(end*rows, (1 - end)**2*torch.eye(3).double().expand(5, 3, 3)))
    torch.manual_seed(0)
    x = mixture.sample((40,))
    for method, grid, eps in (('rk4', uniform_grid(200)*end, 1e-3), ('dopri5', [0., end], 1e-3)):
        kw = dict(rtol=1e-7, atol=1e-7) if method == 'dopri5' else {}
        assert (log_likelihood(MemoriserVelocity(rows), x, grid, method, **kw).log_prob - mixture.log_prob(x)).abs().max() < eps


def test_exact_trace_agrees_with_torch_func():
    net, x = network(torch.float64), normal(7, 6)
    t = torch.tensor(0.4, dtype=torch.float64)
    from flow_study.sampling import divergence
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None], t)[0]))(x)
    v, div = divergence(net, x, t)
    assert (div[:, 0] - jacobians.diagonal(dim1=1, dim2=2).sum(1)).abs().max() < 1e-10
    assert v.equal(net(x, t)) and not v.requires_grad and not div.requires_grad


def test_hutchinson_in_1024_dimensions():
    "Within its own standard error of the truth: 12 rows, none beyond 5"
    d, r = 1024, 40
    basis, variances = torch.linalg.qr(normal(d, r))[0], torch.logspace(1.5, -0.5, r, dtype=torch.float64)
    rest, mean = torch.tensor(0.3, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    v = GaussianVelocity(mean, basis, variances, rest)
    truth = torch.distributions.MultivariateNormal(mean, basis*(variances - rest) @ basis.T + rest*torch.eye(d).double())
    x = normal(12, d, stream='rows') @ truth.scale_tril.T
    found = log_likelihood(v, x, uniform_grid(40), trace='hutchinson', probes=8, generator=keyed_generator(0, 'probes'))
    assert (found.se > 0).all() and found.nfe == 160
    z = (found.log_prob - truth.log_prob(x))/found.se
    assert z.abs().max() < 5 and 0.4 < z.square().mean().sqrt() < 2.5
    one = log_likelihood(v, x[:2], uniform_grid(4), trace='hutchinson', probes=1, generator=keyed_generator(0, 'probes'))
    assert one.se.isnan().all() and one.log_prob.isfinite().all()


def test_likelihood_stops_on_nan():
    with pytest.raises(SolverError): log_likelihood(lambda x, t: x/(t - t), normal(5, 2))


# --- samples

def checkpoint(folder, v, flow='icfm', stats=None, name='best.pt'):
    "A checkpoint of a network of 6 numbers"
    stats = stats or NormalizationStats(torch.linspace(-5, 5, 6), torch.linspace(0.5, 3, 6), 100, 'tests')
    with keyed_init(0): net = create_model('mlp-plain', 6, hidden=32, layers=3)
    net.load_state_dict(v.state_dict())
    return save_checkpoint(folder/name, model=net, ema=EMAModel(net), stats=stats, model_spec=net.spec,
                           config=TrainingConfig(arch='mlp', flow=flow, dataset='1k', group='tests').to_dict())


@pytest.fixture
def saved(tmp_path): return checkpoint(tmp_path/'run', network(torch.float32))


@pytest.mark.parametrize('method', METHODS)
def test_samples_do_not_depend_on_batch_or_number(saved, method):
    kw, eps = (dict(rtol=1e-6, atol=1e-6), 1e-3) if method == 'dopri5' else (dict(steps=10), 1e-4)
    x = sample(saved, 600, method, **kw)
    assert x.shape == (600, 6) and x.dtype == torch.float32
    for n, batch in ((600, 600), (600, 100), (257, 256), (300, 7)):
        assert (sample(saved, n, method, batch=batch, **kw) - x[:n]).abs().max() < eps*x.abs().max()
    assert sample(saved, 600, method, **kw).equal(x)
    assert not torch.isclose(sample(saved, 600, method, seed=1, **kw), x).all(1).any()
    assert len(x.unique(dim=0)) == 600  # no two blocks share their noise


def test_samples_are_the_solution_in_the_datas_units(saved):
    "Nothing is done but to solve and to denormalise"
    model = load_model(saved)
    pairs = make_pairs(saved, 100)
    expected = solve(model, pairs['x0'], uniform_grid(50), 'heun').x
    assert (pairs['x1'] - expected).abs().max() < 1e-4
    assert not sample(saved, 100, normalized=True).isclose(pairs['x1']).all(1).any()  # another stream
    assert model.stats.denormalize(sample(model, 100, normalized=True)).equal(sample(model, 100))
    assert sample(saved.parent, 100).equal(sample(saved, 100))


def test_samples_of_the_gaussian_field():
    "Mean and covariance within the Monte Carlo error of 20,000 samples"
    v, truth = gaussian(dtype=torch.float32)
    v.spec = dict(dim=6)
    x = sample(v, 20_000, 'rk4', steps=20, batch=4096, flow='icfm', normalized=True).double()
    sd = truth.variance.sqrt()
    assert ((x.mean(0) - truth.mean)/sd*math.sqrt(20_000)).abs().max() < 4.5
    white = torch.linalg.solve_triangular(truth.scale_tril, (x - truth.mean).T, upper=False)
    assert (white @ white.T/20_000 - torch.eye(6)).abs().max() < 4.5*math.sqrt(2/20_000)


def test_flows_with_a_source_and_a_manifold_of_their_own(saved):
    "Samples start from the flow's source and stay on its manifold"
    unit = lambda x: nn.functional.normalize(x, dim=-1)
    seen = []
    def source(x1, generator):
        assert x1.shape[1] == 6 and generator.device.type == 'cpu'
        return unit(torch.randn(x1.shape, generator=generator))
    def wrap(v):
        def tangent(x, t):
            seen.append(x.norm(dim=1))
            u = v(x, t)
            return u - (u*x).sum(1, keepdim=True)*x
        return tangent
    for method, kw in (('euler', dict(steps=10)), ('dopri5', {})):
        x = sample(saved, 300, method, flow=SimpleNamespace(restore=lambda x, generator: x, source=source, interpolant=None, project=unit), wrap=wrap, normalized=True, **kw)
        assert (x.norm(dim=1) - 1).abs().max() < 1e-5
    assert (torch.cat(seen) - 1).abs().max() < 1e-5


def test_dimensions_that_do_not_fit(tmp_path, saved):
    wrong = checkpoint(tmp_path/'wrong', network(torch.float32), stats=NormalizationStats(torch.zeros(5), torch.ones(5), 9, 'other'))
    with pytest.raises(ValueError, match='vectors of 6 numbers, its statistics 5'): sample(wrong, 3)
    from flow_study.data import FlowDataset
    rows = FlowDataset.from_tensor(torch.randn(9, 5), texts=list('abcdefghi'))
    with pytest.raises(ValueError, match='samples have 6 numbers'): nearest_texts(sample(saved, 3), rows)


def test_nan_samples_are_counted(saved):
    "The second batch breaks in 2 rows; the error says which samples were under way"
    def wrap(v):
        def broken(x, t):
            u = v(x, t).clone()
            u[(x.abs() > 3.2).any(1)] = math.nan
            return u
        return broken
    with pytest.raises(SolverError, match=r'in \d+ of 256 rows \(samples \d+ to \d+ of 600\)'): sample(saved, 600, batch=256, wrap=wrap)


def test_pairs_survive_the_disk_and_are_checked(tmp_path, saved):
    pairs = make_pairs(saved, 300, seed=3, method='rk4', steps=5)
    again = load_pairs(save_plain(tmp_path/'pairs.pt', pairs))
    assert again['x0'].equal(pairs['x0']) and again['x1'].equal(pairs['x1']) and again['source'] == str(saved)
    assert NormalizationStats.from_state_dict(again['stats']).same_as(load_model(saved).stats)
    assert abs(again['x0'].std() - 1) < 0.05
    (tmp_path/'cut.pt').write_bytes((tmp_path/'pairs.pt').read_bytes()[:500])
    with pytest.raises(ValueError, match='cut.pt is refused'): load_pairs(tmp_path/'cut.pt')


# --- the script

def test_help_without_torch():
    code = ("import sys; sys.argv = ['flow_study_sample', '--help']\nfrom flow_study.sampling import main\n"
            "try: code = main()\nexcept SystemExit as e: code = e.code\nprint(code or 0, 'torch' in sys.modules)")
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == '0 False' and 'CHECKPOINT_OR_RUN' in run.stdout


def test_script_on_a_run_that_was_trained(train_main, capsys):
    "From `flow_study_train` to a file, to pairs, and to errors"
    code, _, err = train_main('--arch', 'simple', '--flow', 'icfm', '--dataset', '1k', '--group', 'tests', '--epochs', '2', '--batch-size', '100')
    assert code == 0, err

    def call(*options):
        capsys.readouterr()
        try: code = main([str(o) for o in options])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()

    run = 'simple-icfm-1k-none'
    code, out, err = call(run, '--n', 300, '--out', 'x.npy', '--steps', 10)
    assert (code, err) == (0, '') and '300 samples of 32 numbers in x.npy' in out
    x = np.load('x.npy')
    assert x.shape == (300, 32) and x.dtype == np.float32
    assert np.array_equal(x, sample(f'study/checkpoints/{run}', 300, steps=10).numpy())
    assert call(run, '--n', 300, '--pairs', 'pairs.pt')[0] == 0 and len(load_pairs('pairs.pt')['x1']) == 300
    code, _, err = call(run, '--nearest')
    assert code == 1 and 'no texts' in err
    assert call(run, '--out', 'y.pt', '--steps', 0)[0] == 2 and call('other', '--out', 'y.pt')[0] == 2
    from pathlib import Path
    assert not Path('y.pt').exists()


# --- compiled steps

@pytest.mark.parametrize('method', ['heun', 'rk4'])
def test_a_compiled_step_is_the_plain_one(saved, method):
    model = load_model(saved)
    x = sample(model, 70, method, steps=5, batch=32, compile='off')
    assert (sample(model, 70, method, steps=5, batch=32, compile='on') - x).abs().max() < 1e-4*x.abs().max()


def test_when_a_step_is_compiled(saved, monkeypatch):
    "For so many calls in whole batches; once for a network, until its weights change"
    compiled = []
    monkeypatch.setattr(CompiledStep, '_compile', lambda self, x, t, s: (compiled.append(tuple(x.shape)), setattr(self, 'shape', x.shape)))
    model, few = load_model(saved), dict(steps=15, batch=10)
    monkeypatch.setattr('flow_study.sampling.COMPILE_CALLS', 3*15*2)
    sample(model, 29, **few)
    assert compiled == []
    sample(model, 30, **few), sample(model, 39, **few)
    assert compiled == [(10, 6)]
    sample(model, 30, compile='off', **few), sample(model, 30, wrap=lambda v: lambda x, t: v(x, t), **few)
    assert len(compiled) == 1
    with torch.no_grad(): next(model.parameters()).mul_(2)
    sample(model, 30, **few)
    assert len(compiled) == 2
    sample(model, 30, steps=30, batch=15)  # another shape
    assert compiled[2:] == [(15, 6)]
    with pytest.raises(ValueError, match="'auto', 'on' or 'off'"): sample(model, 3, compile=True)
    with pytest.raises(ValueError, match='have steps to compile'): sample(model, 3, 'dopri5', compile='on')


def test_a_step_that_cannot_be_compiled(saved, monkeypatch, caplog):
    "Only who asks for it is told by an error"
    def refuse(*args, **kwargs): raise OSError('no compiler')
    monkeypatch.setattr(torch, 'compile', refuse)
    monkeypatch.setattr('flow_study.sampling.COMPILE_CALLS', 1)
    model = load_model(saved)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='no compiler'): sample(model, 5, steps=2, batch=5, compile='on')
    assert sample(model, 5, steps=2, batch=5).equal(sample(model, 5, steps=2, batch=5, compile='off'))
    with pytest.raises(RuntimeError, match='no compiler'): sample(model, 5, steps=2, batch=5, compile='on')  # also after one that went on without
