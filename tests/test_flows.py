"""Flows from outside: transport against POT, what stays with its row, keyed draws, and training with each of them."""
import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flow_study.closed_form import GaussianVelocity, ValidationBank, ZeroVelocity, held_out_loss, loss_by_t, verdict, yardsticks
from flow_study.config import TrainingConfig
from flow_study.data import DataError, FlowDataset, NormalizationStats, save_plain
from flow_study.draws import keyed_generator
from flow_study.models import build_model
from flow_study.paths import Transport, assign, build_flow, create_flow, independent_coupling, linear, squared_distances, transport_report
from flow_study.trainer import FlowTrainer


def rows(n, d, seed=0): return torch.randn(n, d, generator=keyed_generator(seed, 'tests'))


def clusters(n, d, seed=0):
    gen = keyed_generator(seed, 'tests')
    return 3*torch.randn(5, d, generator=gen)[torch.randint(5, (n,), generator=gen)] + 0.3*torch.randn(n, d, generator=gen)


PAIRS = dict(x0=rows(400, 8, 5), x1=2*rows(400, 8, 5) + 1, source='tests', stats=NormalizationStats(torch.zeros(8), torch.ones(8), 1, '').state_dict())
FLOWS = {'icfm': {}, 'icfm-sigma': dict(sigma=0.1), 'otcfm': {}, 'otcfm-sigma': dict(sigma=0.1), 'otcfm-entropic': dict(plan='entropic'),
         'otcfm-unbalanced': dict(plan='unbalanced', reg=0.1), 'sbcfm': {}, 'si-linear': {}, 'si-gvp': {}, 'spherical': {}, 'spherical-ot': {}, 'reflow': dict(pairs=PAIRS)}


def make(key, **options):
    name = key if key in ('si-linear', 'si-gvp', 'spherical-ot') else key.partition('-')[0]
    return create_flow(name, **FLOWS[key], **options)


# ---- transport

@pytest.mark.parametrize('n, d', [(1, 2), (2, 1), (127, 2), (128, 2), (300, 2), (300, 64), (700, 2), (256, 1024)])
@pytest.mark.parametrize('data', [rows, clusters])
def test_assignment_costs_what_the_exact_plan_costs(n, d, data):
    x0, x1 = rows(n, d, 1), data(n, d)
    cost, w = squared_distances(x1, x0), np.full(n, 1/n)
    p = assign(cost)
    assert sorted(p) == list(range(n))
    assert cost[np.arange(n), p].mean() == pytest.approx(ot.emd2(w, w, cost), rel=1e-9)  # both in float64
    assert Transport()(x0, x1).equal(x0[torch.from_numpy(p)])


@pytest.mark.parametrize('cost', [np.zeros((200, 200)), np.ones((200, 200))*1e30, np.random.default_rng(0).integers(0, 3, (200, 200)), np.eye(200)*1e-300,
                                  np.outer(np.arange(200.), np.arange(200.)), np.random.default_rng(0).random((200, 200))**8*1e12])
def test_a_bad_guess_of_potentials_does_no_harm(cost):
    "Constant, tied, huge, tiny and badly scaled costs: still a permutation, still the best"
    p, (r, c) = assign(cost), linear_sum_assignment(cost)
    assert sorted(p) == list(range(200))
    assert cost[np.arange(200), p].sum() == pytest.approx(cost[r, c].sum(), rel=1e-9, abs=1e-12*cost.max())  # the potentials are rounded at the size of the largest cost


def test_distances_are_exact_far_from_the_origin():
    "In float64, so that normalised rows of 1,024 numbers lose nothing"
    x1, x0 = rows(50, 1024) + 100, rows(50, 1024, 1) + 100
    expected = (x1.double()[:, None] - x0.double()).square().sum(2).numpy()
    assert np.allclose(squared_distances(x1, x0), expected, rtol=1e-9)


@pytest.mark.parametrize('plan', ['exact', 'entropic', 'unbalanced'])
def test_x1_keeps_its_rows_and_x0_is_a_selection_of_its_own(plan):
    x1 = clusters(100, 3)
    before, flow = x1.clone(), create_flow('otcfm', plan=plan)
    draws, alone = (f.draw(x1, keyed_generator(42, 'noise', 3)) for f in (flow, create_flow('icfm')))
    assert x1.equal(before) and draws.x1 is None
    at_end, _ = flow.at(draws.x0, x1, torch.ones(100))
    assert torch.allclose(at_end, x1, atol=1e-6)  # row i of the batch is where path i ends: labels stay aligned
    assert (draws.x0[:, None] == alone.x0).all(2).any(1).all()
    if plan == 'exact': assert draws.x0.sort(0).values.equal(alone.x0.sort(0).values)


def test_entropic_plan_goes_from_exact_to_uniform():
    x0, x1 = rows(100, 2, 1), clusters(100, 2)
    cost = squared_distances(x1, x0)
    values = [(Transport('entropic', reg=r).matrix(x0, x1)*cost).sum() for r in (0.003, 0.03, 0.3, 30.)]
    exact = (Transport().matrix(x0, x1)*cost).sum()
    assert exact <= values[0] < values[1] < values[2] < values[3] and values[0] < 1.05*exact and values[3] == pytest.approx(cost.mean(), rel=0.02)


def test_entropic_plan_is_the_log_domain_solution_in_many_dimensions():
    x0, x1 = rows(64, 1024, 1), rows(64, 1024)
    w, cost = np.full(64, 1/64), squared_distances(x1, x0)
    for reg in (0.002, 0.05):
        expected = ot.sinkhorn(w, w, cost, reg*cost.mean(), method='sinkhorn_log', numItermax=20_000, stopThr=1e-10, warn=False)
        assert np.abs(Transport('entropic', reg=reg).matrix(x0, x1) - expected).max() < 0.02/64  # stopped at 1 % of a marginal


def test_drawn_pairs_follow_the_plan():
    x0, x1 = rows(20, 2, 1), rows(20, 2)
    coupling = Transport('entropic', reg=0.2)
    p = torch.from_numpy(coupling.matrix(x0, x1))
    count, n = torch.zeros(20, 20), 4000
    for k in range(n): count += (coupling(x0, x1, keyed_generator(k, 'tests'))[:, None] == x0).all(2)
    assert (count/n - p/p.sum(1, keepdim=True)).abs().max() < 5*0.5/math.sqrt(n)  # five standard deviations of a share


def test_a_plan_that_draws_wants_a_generator():
    with pytest.raises(DataError, match='give a generator'): Transport('entropic')(rows(4, 2), rows(4, 2))


@pytest.mark.parametrize('d, n, low, high', [(2, 256, 0.9, 1), (1024, 256, 0.07, 0.09)])
def test_saving(d, n, low, high):
    "At 1,024 dimensions and batch 256 transport saves 7 to 9 %, and the user is told"
    report = transport_report(rows(1024, d), batch=n)
    assert low < report.saving < high and report.entropy == 0 and report.unique == 1
    assert ('next to nothing' in str(report)) == (d == 1024)


# ---- every flow

@pytest.mark.parametrize('key', FLOWS)
def test_draws_are_keyed(key):
    x1, flow = clusters(60, 8), make(key)
    a, b, c = (flow.draw(x1, keyed_generator(*k)) for k in ((42, 'noise', 1), (42, 'noise', 1), (42, 'noise', 2)))
    assert all(x is None and y is None or x.equal(y) for x, y in zip(a, b)) and not a.x0.equal(c.x0)
    assert ((a.t >= 0) & (a.t < 1)).all() and (a.eps is not None) == ('sigma' in key or key == 'sbcfm')


@pytest.mark.parametrize('key', FLOWS)
def test_target_is_the_derivative_of_the_position(key):
    "By central differences, which share nothing with automatic differentiation"
    x1, flow = clusters(60, 8).double(), make(key)
    draws = flow.draw(x1, keyed_generator(0, 'noise'))
    draws, h = draws._replace(t=0.02 + 0.96*draws.t), 1e-6
    ahead, behind = (flow.example(x1, draws._replace(t=draws.t + s))[0] for s in (h, -h))
    assert torch.allclose(flow.example(x1, draws)[1], (ahead - behind)/(2*h), atol=1e-6)  # error h² times a third derivative of up to 1e5


@pytest.mark.parametrize('key', FLOWS)
def test_bank_is_fixed_and_has_yardsticks(key):
    train, val, flow = FlowDataset.from_tensor(clusters(300, 8)), FlowDataset.from_tensor(clusters(90, 8, 1)), make(key)
    bank = ValidationBank(val, flow)
    for a, b in zip(bank, ValidationBank(val, flow), strict=True): assert all(x.equal(y) for x, y in zip(a, b))
    assert not next(iter(bank))[1].equal(next(iter(ValidationBank(val, flow, stream='other')))[1])
    ys = yardsticks(train, val, flow, bank)
    assert list(ys.losses)[0] == 'zero' and all(math.isfinite(v.mean) for v in ys.losses.values())
    assert (len(ys.losses) == 1) == key.startswith('spherical')
    assert ys['zero'].mean == pytest.approx(sum(u.square().mean(1).sum().item() for _, _, u in bank)/len(bank), rel=1e-5)
    assert str(verdict(held_out_loss(ZeroVelocity(), bank), ys)).startswith('not trained')
    by_t = loss_by_t(ZeroVelocity(), bank)
    assert by_t.n.sum() == len(bank) and float((by_t.loss*by_t.n).sum()/len(bank)) == pytest.approx(ys['zero'].mean, rel=1e-5)


@pytest.mark.parametrize('key', ['spherical', 'spherical-ot'])
def test_spherical_examples_stay_on_the_sphere(key):
    x1, flow = 3*clusters(60, 8), make(key)
    _, x_t, u_t = flow.sample(x1, keyed_generator(0, 'noise'))
    assert torch.allclose(x_t.norm(dim=1), torch.ones(60), atol=1e-5) and (x_t*u_t).sum(1).abs().max() < 1e-5
    assert torch.allclose(flow.project(5*x_t), x_t, atol=1e-6)


def test_zero_vectors_are_refused_by_spherical_flows(tmp_path):
    bad = rows(200, 8)
    bad[3] = 0
    with pytest.raises(DataError, match=r'1 of 200 rows are zero vectors \(rows \[3\]\)'): trainer(tmp_path, 'spherical', x=bad).train()
    assert not (tmp_path/'runs').exists()


# ---- the optimum of training is known for Gaussian data

@pytest.mark.parametrize('key', ['icfm', 'icfm-sigma', 'si-gvp', 'sbcfm'])
def test_gaussian_optimum_is_the_conditional_mean(key):
    "The formula's error has no correlation with any linear function of x_t, at any time: the mark of a conditional mean"
    mean, scale, gen = torch.tensor([1., -2.]), torch.tensor([0.5, 2.]), keyed_generator(0, 'tests')
    flow = make(key)
    flow = flow if flow.coupling is independent_coupling else type(flow)(flow.name, linear, noise=flow.noise)
    x1 = mean + scale*torch.randn(200_000, 2, generator=gen)
    best = GaussianVelocity(mean, torch.eye(2), scale**2, torch.tensor(1.), flow.marginal)
    for time in (0.1, 0.5, 0.9):
        draws = flow.draw(x1, gen, t=torch.full((len(x1),), time))
        x_t, u_t = flow.example(x1, draws)
        error, z = u_t - best(x_t, draws.t), (x_t - x_t.mean(0))/x_t.std(0)
        assert error.mean(0).abs().max() < 5*3/math.sqrt(len(x1))  # errors have a standard deviation of at most 3
        assert (error*z).mean(0).abs().max() < 5*3/math.sqrt(len(x1))


# ---- training

def trainer(folder, flow, x=None, **kw):
    x = clusters(260, 8) if x is None else x
    config = TrainingConfig(**{**dict(arch='simple', flow=flow, dataset='x', group='g', epochs=4, batch_size=50, lr=3e-3, warmup_steps=2, checkpoint_dir=str(folder/'runs')), **kw})
    train, val = FlowDataset.from_tensor(x[:200]), FlowDataset.from_tensor(x[200:] if len(x) > 200 else x[:50])
    return FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[], log_every=1)


@pytest.mark.parametrize('flow', ['icfm', 'otcfm', 'sbcfm', 'si-linear', 'si-gvp', 'spherical', 'spherical-ot', 'reflow'])
def test_training_lowers_the_loss_of_every_flow(flow, tmp_path):
    kw = dict(pairs=str(save_plain(tmp_path/'pairs.pt', PAIRS))) if flow == 'reflow' else {}
    t = trainer(tmp_path, flow, epochs=40, lr=1e-2, **kw)
    result = t.train()
    assert result['best_val_loss'] < 0.95*t.yardsticks["zero"].mean
    assert not result['verdict'].startswith(('not trained', 'diverged'))


def test_rows_coupled_together_stop_and_go_on(tmp_path):
    "`ot_batch`: stopped in the middle of a group, the rest is what it would have been"
    def losses(t): return [d['train/loss'] for d in t.history if 'train/loss' in d]
    x = clusters(260, 8)
    whole = trainer(tmp_path, 'otcfm', x, ot_batch=100, name='whole')
    whole.train()
    assert losses(whole) != losses_of_plain(tmp_path, x)
    for stop in (1, 2, 3):
        a = trainer(tmp_path, 'otcfm', x, ot_batch=100, name=f'a{stop}')
        a._setup()
        steps = a._examples()
        for _ in range(stop):
            a.train_step(*next(steps))
            a._batch += 1
        steps.close()
        rest = list(a._examples())
        b = trainer(tmp_path, 'otcfm', x, ot_batch=100, name=f'b{stop}')
        b._setup()
        expected = list(b._examples())[stop:]
        assert len(rest) == len(expected) == 4 - stop
        for (x1, d), (y1, e) in zip(rest, expected): assert x1.equal(y1) and d.x0.equal(e.x0) and d.t.equal(e.t)


def losses_of_plain(folder, x):
    plain = trainer(folder, 'otcfm', x, name='plain')
    plain.train()
    return [d['train/loss'] for d in plain.history if 'train/loss' in d]


def test_a_source_that_is_not_noise(tmp_path):
    "From one table to another: training, bank and yardsticks"
    path = save_plain(tmp_path/'source.pt', dict(embeddings=clusters(100, 8, 7)))
    t = trainer(tmp_path, 'otcfm', source=str(path), epochs=40, lr=1e-2)
    result = t.train()
    assert list(t.yardsticks.losses) == ['zero'] and 'not N(0, I)' in t.yardsticks.note
    assert 'below predicting zero' in result['verdict']
    assert (t.flow.draw(clusters(9, 8), keyed_generator(0, 'a')).x0[:, None] == clusters(100, 8, 7)).all(2).any(1).all()


def test_a_reflow_run_needs_its_pairs(tmp_path):
    with pytest.raises(ValueError, match='flow_study_sample RUN --pairs FILE'): trainer(tmp_path, 'reflow').train()
    with pytest.raises(DataError, match='none.pt does not exist'): trainer(tmp_path, 'reflow', pairs=str(tmp_path/'none.pt')).train()
    path = save_plain(tmp_path/'pairs.pt', PAIRS)
    with pytest.raises(ValueError, match="aug='noise'"): trainer(tmp_path, 'reflow', pairs=str(path), aug='noise').train()
    with pytest.raises(DataError, match='vectors of 8 numbers'): trainer(tmp_path, 'reflow', rows(260, 6), pairs=str(path)).train()
    assert not (tmp_path/'runs').exists()


def test_lengths_go_through_the_checkpoint(tmp_path):
    from flow_study.checkpoint import load_model
    x = clusters(260, 8)
    t = trainer(tmp_path, 'spherical', x)
    model = load_model(t.train()['run_dir'])
    flow = build_flow(model.config, model.stats, state=model.flow_state)
    back = flow.restore(rows(5000, 8), keyed_generator(0, 'lengths')).norm(dim=1)
    for p in (0.1, 0.5, 0.9): assert back.quantile(p).item() == pytest.approx(x[:200].norm(dim=1).quantile(p).item(), rel=0.05)  # 5,000 draws know a quantile to 2 %
