"""Metrics of samples: against other libraries and by hand, their marks, and `flow_study_eval` as a user meets it."""
import json
import logging
import math
import tracemalloc
import warnings

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as scipy_energy, mannwhitneyu
from sklearn.neighbors import NearestNeighbors

import flow_study.metrics as metrics
from flow_study.checkpoint import CheckpointError, load_model, save_checkpoint
from flow_study.closed_form import ValidationBank, held_out_loss
from flow_study.config import TrainingConfig
from flow_study.data import DataError, load_all_splits, make_splits, save_splits
from flow_study.draws import keyed_generator
from flow_study.ema import EMAModel
from flow_study.metrics import (bootstrap_counts, compare_samples, energy_distance, evaluate, evaluation_table, exact_w2, measure, memorisation,
                                mmd, nn_two_sample_accuracy, null_samples, precision_recall_density_coverage, register_metric, sliced_wasserstein)
from flow_study.layers import Architecture, _models
from flow_study.models import create_model
from flow_study.paths import create_flow
from flow_study.sampling import main as sample_main, sample


def table(n, d, key=0, scale=1., shift=0.): return (scale*torch.randn(n, d, generator=keyed_generator(key, 'tests')) + shift).double().numpy()


@pytest.fixture
def registry():
    "Metrics registered in a test end with it"
    before = dict(metrics._metrics)
    yield
    metrics._metrics.clear()
    metrics._metrics.update(before)


# against other libraries

def test_energy_distance_is_scipys_without_the_pairs_of_a_row_with_itself():
    x, y = table(150, 1), table(90, 1, 1, 2., .3)
    within = sum(cdist(z, z).mean()/(len(z) - 1) for z in (x, y))
    assert energy_distance(x, y) == pytest.approx(scipy_energy(x[:, 0], y[:, 0])**2 - within, abs=1e-10)


@pytest.mark.parametrize('n, m', [(100, 100), (150, 90), (23, 100)])
def test_sliced_wasserstein_is_pots(n, m):
    x, y = table(n, 7), table(m, 7, 1, 2.)
    theirs = ot.sliced_wasserstein_distance(x, y, projections=metrics._directions(7, 200, 0))**2
    assert sliced_wasserstein(x, y) == pytest.approx(theirs, rel=1e-10)


def test_exact_w2_is_the_best_assignment():
    x, y = table(80, 5), table(80, 5, 1, 2.)
    cost = cdist(x, y, 'sqeuclidean')
    assert exact_w2(x, y)**2 == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-10)
    assert exact_w2(x[:, :1], y[:, :1])**2 == pytest.approx(((np.sort(x[:, 0]) - np.sort(y[:, 0]))**2).mean(), rel=1e-10)


def test_mmd_by_the_definition():
    x, y, h = table(50, 4), table(40, 4, 1, 2.), 1.7
    k = lambda a, b: np.exp(-cdist(a, b, 'sqeuclidean')/(2*h*h))
    off = lambda m: m[~np.eye(len(m), dtype=bool)].mean()
    assert mmd(x, y, width=h) == pytest.approx(off(k(x, x)) + off(k(y, y)) - 2*k(x, y).mean(), abs=1e-12)


def test_nearest_neighbours_are_sklearns():
    x, y = table(60, 5), table(60, 5, 1, 1.5)
    z = np.concatenate([x, y])
    nearest = NearestNeighbors(n_neighbors=2).fit(z).kneighbors(z)[1][:, 1]
    own = (nearest < 60) == (np.arange(120) < 60)
    assert nn_two_sample_accuracy(x, y) == pytest.approx((own.mean(), own[60:].mean() - own[:60].mean()))


def test_balls_by_the_definition():
    x, y, k = table(60, 3), table(60, 3, 1, 1.5), 4
    radius = lambda z: np.sort(cdist(z, z), axis=1)[:, k]
    in_y, in_x = cdist(x, y) <= radius(y), cdist(x, y).T <= radius(x)
    expected = in_y.any(1).mean(), in_x.any(1).mean(), in_y.sum(1).mean()/k, in_y.any(0).mean()
    assert precision_recall_density_coverage(x, y, k=k) == pytest.approx(expected)


def test_memorisation_is_mann_whitney():
    x, y, train = table(70, 4), table(50, 4, 1, 1.2), table(90, 4, 2)
    x[:9] = y[:9]  # ties
    near = [cdist(z, train).min(1) for z in (x, y)]
    u = mannwhitneyu(near[1], near[0]).statistic
    assert memorisation(x, y, train).share == pytest.approx(u/(70*50), abs=1e-9)


# invariances, sizes, memory

def test_a_motion_of_both_tables_changes_nothing():
    x, y = table(100, 6), table(80, 6, 1, 1.3)
    turn = np.linalg.qr(table(6, 6, 3))[0]
    before, after = (measure(a, b, y, draws=20) for a, b in ((x, y), (x @ turn + 1e3, y @ turn + 1e3)))
    for k in before:
        if k not in ('sliced_wasserstein', 'memorisation', 'copies'): assert after[k].value == pytest.approx(before[k].value, abs=1e-7), k
    assert energy_distance(3*x, 3*y) == pytest.approx(3*energy_distance(x, y))


def test_types_of_tables():
    x, y = table(40, 3), table(30, 3, 1)
    assert energy_distance(torch.tensor(x), torch.tensor(y)) == energy_distance(x, y) == energy_distance(x.tolist(), y.tolist())
    assert energy_distance(torch.tensor(x).float(), torch.tensor(y).float()) == pytest.approx(energy_distance(x, y), abs=1e-6)
    assert math.isfinite(energy_distance(torch.tensor(x).bfloat16(), torch.tensor(y).bfloat16()))


def test_the_larger_table_may_be_either():
    x, y = table(100, 3), table(330, 3, 1)
    for a, b in ((x, y), (y, x)):
        assert abs(nn_two_sample_accuracy(a, b).accuracy - .5) < .1
        assert precision_recall_density_coverage(a, b).coverage == pytest.approx(1 - math.prod((100 - i)/(200 - i) for i in range(1, 6)), abs=.05)


def test_whole_distance_matrix_never_in_memory():
    x = table(6000, 8)
    counts = bootstrap_counts(6000, 20), bootstrap_counts(6000, 20, stream='y')
    tracemalloc.start()
    energy_distance(x, x + .1, counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < .9*6000*6000*8


# bootstrap

def test_counts_stand_for_rows_drawn_anew():
    "Where copies of a row do no harm, counts give what the resampled tables give"
    x, y = table(50, 3), table(40, 3, 1)
    wx, wy = bootstrap_counts(50, 3), bootstrap_counts(40, 3, stream='y')
    a, b = (np.repeat(z, w[2].astype(int), 0) for z, w in ((x, wx), (y, wy)))
    assert sliced_wasserstein(x, y, (wx[:4], wy[:4]))[2] == pytest.approx(sliced_wasserstein(a, b))
    train = table(60, 3, 2)
    assert memorisation(x, y, train, (wx, wy)).share[2] == pytest.approx(memorisation(a, b, train).share)
    assert metrics._mean_between(np.sqrt, x, y, wx, wy)[2] == pytest.approx(cdist(a, b).mean())


def test_a_row_is_no_pair_with_its_copy():
    x, y = table(50, 3), table(40, 3, 1)
    w = bootstrap_counts(50, 2)[:3]
    d = cdist(x, x)
    pairs = np.outer(w[1], w[1])*(1 - np.eye(50))
    assert metrics._mean_within(np.sqrt, x, w)[1] == pytest.approx((pairs*d).sum()/pairs.sum())


def test_the_same_seed_gives_the_same_interval():
    x, y = table(60, 3), table(40, 3, 1)
    a, b, c = (measure(x, y, draws=50, seed=s)['energy_distance'] for s in (1, 1, 2))
    assert (a.value, a.low, a.high) == (b.value, b.low, b.high)
    assert a.value == c.value and a.low != c.low


def test_interval_of_a_mean_is_that_of_textbooks():
    "For a mean over rows: 1.96 standard errors, within the error of 1,000 resamples"
    x, y = table(400, 1), table(300, 1, 1)
    values = x[:, 0] > 0
    counts = bootstrap_counts(400, 1000)
    f = metrics._weighted(values[None].astype(float), counts)[:, 0]
    m = metrics.Measured(f[0], f[1:1001], f[1001:])
    assert m.high - m.low == pytest.approx(2*1.96*values.std()/20, rel=.1)


# marks

def test_the_metric_that_crowned_noise_is_refused(registry):
    "Unpaired mean squared difference: real rows score 2, collapse and noise less, so its nulls pass"
    train, held = (torch.tensor(table(n, 16, k)).float() for n, k in ((300, 0), (100, 1)))
    register_metric('distribution_mse', lambda a, b: float(((a[:len(b)] - b)**2).mean()))
    m = compare_samples(torch.zeros(100, 16), held, train, draws=50)['distribution_mse']
    assert m['value'] == pytest.approx(1, abs=.1) and m['floor'] == pytest.approx(2, abs=.2)
    assert m['uninformative'] and 'unit_gaussian' in m['passed_by']


def test_a_metric_that_takes_counts_is_resampled_by_them(registry):
    x, y = table(60, 3), table(40, 3, 1)
    register_metric('mine', lambda a, b, counts: energy_distance(a, b, counts), counted=True)
    mine, own = measure(x, y, only='mine')['mine'], measure(x, y, only='energy_distance')['energy_distance']
    assert mine.value == own.value and (mine.resamples == own.resamples).all()


def test_on_data_that_are_normal_every_metric_is_uninformative():
    train, held = (torch.tensor(table(n, 4, k)).float() for n, k in ((400, 0), (200, 1)))
    c = compare_samples(null_samples(train, 200, seed=5)['unit_gaussian'], held, train)
    marked = {k for k, m in c.items() if m['uninformative']}
    assert marked >= {'energy_distance', 'sliced_wasserstein', 'mmd', 'nn_accuracy', 'precision', 'recall', 'coverage'}
    assert not c['memorisation']['uninformative'] and c['memorisation']['null']['memoriser']['value'] == 1


def test_memoriser_is_seen_by_memorisation_only():
    gen = keyed_generator(0, 'tests')
    rows = lambda n: torch.randn(n, 4, generator=gen) @ torch.randn(4, 32, generator=keyed_generator(1, 'tests')) + 6*(torch.rand(n, 1, generator=gen) < .5)
    train, held = rows(500), rows(200)
    c = compare_samples(null_samples(train, 300, seed=9)['memoriser'], held, train)
    assert c['energy_distance']['at_floor'] and not c['energy_distance']['uninformative']
    assert not c['memorisation']['at_floor'] and c['copies']['value'] == 1


# bad input

@pytest.mark.parametrize('metric', [energy_distance, mmd, sliced_wasserstein, nn_two_sample_accuracy, precision_recall_density_coverage,
                                    lambda x, y: memorisation(x, y, y)])
def test_bad_tables(metric):
    x, y = table(60, 3), table(40, 3, 1)
    bad = x.copy()
    bad[[3, 5], 1] = np.nan, np.inf
    for a, b, message in ((x[:0], y, 'samples is empty'), (x, y[:0], 'reference is empty'), (x, y[:19], 'reference has 19 rows; below 20'),
                          (bad, y, 'samples has NaN or infinite numbers in 2 of 60 rows'), (x[:, :2], y, '2 dimensions, the reference 3'),
                          (x[0], y, 'expected numbers'), (np.array([['a']*3]*30), y, 'expected numbers')):
        with pytest.raises(DataError, match=message): metric(a, b)


def test_nothing_moves():
    still = np.zeros((5, 30, 2))
    assert math.isnan(metrics.path_straightness(still, np.linspace(0, 1, 5)))
    with pytest.raises(DataError, match='expected'): metrics.path_energy(still, np.linspace(0, 1, 4))


# a report, as a user meets it

class Breaks(torch.nn.Module):
    "Gives NaN from the middle of the way on"
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        t = torch.as_tensor(t).reshape(-1, 1)
        return torch.where(t > .5, math.nan, self.scale*x)


def save(net, folder, **changes):
    "A run directory with this network as its best, made for the `1k` rows below `study/datasets`"
    train, val, _ = load_all_splits('1k')
    config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='tests', name=folder)
    save_checkpoint(f'study/checkpoints/{folder}/best.pt', **(dict(model=net, ema=EMAModel(net), config=config.to_dict(), stats=train.stats,
        model_spec=getattr(net, 'spec', None), data=dict(train=train.fingerprint, val=val.fingerprint)) | changes))
    return f'study/checkpoints/{folder}'


@pytest.fixture
def run(place):
    torch.manual_seed(0)
    return save(create_model('simple', dim=32, hidden=16), 'untrained')


@pytest.fixture
def eval_main(place, capsys):
    "Call the script's `main`; gives exit code, standard output and standard error"
    package, show = logging.getLogger('flow_study'), warnings.showwarning
    before = package.handlers[:], package.level, package.propagate
    def call(*options):
        capsys.readouterr()
        try: code = metrics.main([str(o) for o in options])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    yield call
    warnings.showwarning = show
    package.handlers[:], package.level, package.propagate = before


quick = dict(n=100, steps=5, draws=20, nfe_steps=(1, 2))


def test_report_has_what_was_promised(run):
    evaluate(run, **quick)
    r = json.loads(open(f'{run}/evaluation.json').read(), parse_constant=lambda c: pytest.fail(c))
    assert set(r['baselines']) == {'zero', 'unit_gaussian', 'shrunk_gaussian', 'memoriser'}
    assert all(set(v) == {'loss', 'se'} for v in (*r['baselines'].values(), {k: r['run'][k] for k in ('loss', 'se')}))
    assert set(r['run']['paired_gain']) == {'mean', 'se', 'over'}
    assert r['run']['paired_gain']['mean'] == pytest.approx(r['baselines']['shrunk_gaussian']['loss'] - r['run']['loss'])
    for m in r['samples'].values():
        assert {'value', 'low', 'high', 'floor', 'null', 'uninformative'} <= set(m)
        assert set(m['null']) == {'zero', 'unit_gaussian', 'shrunk_gaussian', 'memoriser'}
        assert m['low'] <= m['high']
    assert r['nfe'] == 10 and [q['nfe'] for q in r['quality_by_nfe']] == [2, 4]
    assert 'not trained' in r['run']['verdict']
    assert r['paths']['uninformative'] and r['paths']['path_straightness'] < .1  # very straight, to nowhere
    assert r['paths']['null']['zero']['path_straightness'] is None


def test_the_same_report_twice_but_for_the_count(run):
    a, b = (evaluate(run, **quick) for _ in range(2))
    assert (a['reads'], b['reads']) == (dict(val=1, test=0), dict(val=2, test=0))
    a, b = (json.dumps({k: v for k, v in r.items() if k not in ('reads', 'other')}) for r in (a, b)) # as text, for a NaN is unequal to itself
    assert a == b


def test_the_report_has_draws_of_its_own(run):
    "Not those that chose the epoch"
    from flow_study.checkpoint import load_model
    from flow_study.closed_form import ValidationBank, held_out_loss
    from flow_study.paths import create_flow
    _, val, _ = load_all_splits('1k')
    model = load_model(run)
    mine, stopping = (held_out_loss(model, ValidationBank(val, create_flow('icfm'), **kw)).mean for kw in (dict(stream='report', draws=32), {}))
    assert evaluate(run, **quick)['run']['loss'] == mine != stopping


def test_reading_test_again_is_said(run, eval_main):
    options = '--n 100 --steps 5 --no-plots --split test'.split()
    first, second = eval_main('untrained', *options), eval_main('untrained', *options)
    assert (first[0], second[0]) == (0, 0)
    assert 'read once so far' in first[1] and 'have now been read' not in first[1]
    assert 'have now been read 2 times' in second[1]
    assert json.load(open(f'{run}/evaluation.json'))['reads'] == dict(val=0, test=2)


def test_a_report_that_failed_has_looked(run, monkeypatch):
    def fails(*args): raise KeyboardInterrupt
    monkeypatch.setattr(metrics, '_losses', fails)
    with pytest.raises(KeyboardInterrupt): evaluate(run, split='test', **quick)
    assert json.load(open(f'{run}/evaluation.json')) == dict(reads=dict(val=0, test=1))


def test_samples_that_are_not_finite_are_counted_and_no_metric_is_given(place):
    folder = save(Breaks(), 'breaks')
    r = evaluate(folder, model=Breaks(), **quick)
    assert r['samples'] == {} and 'in 100 of 100 rows' in r['failed'] and r['run']['verdict'].startswith('diverged')
    assert json.load(open(f'{folder}/evaluation.json'))['run']['loss'] is None
    assert 'no metric of any' in evaluation_table(r)


def test_a_failed_report_ends_with_1(place, eval_main, monkeypatch):
    save(Breaks(), 'breaks', model_spec=dict(name='breaks', dim=32, kwargs={}))
    monkeypatch.setitem(_models, 'breaks', Architecture(lambda dim: Breaks()))
    code, out, _ = eval_main('breaks', '--n', '100', '--steps', '5')
    assert code == 1 and 'in 100 of 100 rows' in out


def test_plots_are_pictures(run, eval_main, place):
    assert eval_main('untrained', '--n', '100', '--steps', '5')[0] == 0
    for name in ('components', 'spectrum', 'nfe'):
        assert (place/run/f'evaluation-{name}.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


def test_data_that_do_not_belong_to_the_checkpoint(run, place):
    rows = lambda d, key: make_splits(torch.tensor(table(1000, d, key)).float(), sizes=('1k',), max_cosine=1.)
    save_splits(rows(16, 0), place/'narrow')
    save_splits(rows(32, 1), place/'other')
    with pytest.raises(CheckpointError, match='they have 32 dimensions, those in use 16'): evaluate(run, data_dir='narrow', **quick)
    with pytest.raises(CheckpointError, match='dimensions differ'): evaluate(run, data_dir='other', **quick)
    import shutil
    shutil.copytree(place/'study/datasets', place/'swapped')
    split = place/'swapped/splits/1k'
    (split/'val.pt').rename(split/'x.pt'); (split/'test.pt').rename(split/'val.pt'); (split/'x.pt').rename(split/'test.pt')
    with pytest.raises(CheckpointError, match='other val rows'): evaluate(run, data_dir=place/'swapped', **quick)
    assert not (place/run/'evaluation.json').exists()


def test_autoguidance_of_samples_and_paths(place, eval_main):
    "Other samples and other paths, the same losses; the scale that was chosen is in the report"
    from flow_study.train import main
    run = 'study/checkpoints/mlp-icfm-1k-none'
    assert main('--arch mlp --size tiny --flow icfm --dataset 1k --group tests --epochs 20 --lr 2e-3 --device cpu --wandb-mode disabled'.split()) == 0
    plain, pushed = evaluate(run, **quick), evaluate(run, **quick, autoguidance=1.5)
    assert plain['run'] == pushed['run'] and (plain['autoguidance'], pushed['autoguidance']) == (1., 1.5)
    assert pushed['paths']['path_energy'] != plain['paths']['path_energy'] and pushed['nfe'] == plain['nfe']
    assert pushed['samples']['energy_distance']['value'] != plain['samples']['energy_distance']['value']
    assert 'autoguidance 1.5' in evaluation_table(pushed) and 'autoguidance' not in evaluation_table(plain)
    chosen = evaluate(run, **quick, autoguidance='auto')['autoguidance']
    assert 1 <= chosen <= 1.5 and evaluate(run, **quick, autoguidance=chosen)['samples'] == evaluate(run, **quick, autoguidance='auto')['samples']
    code, out, _ = eval_main(run, '--n', 100, '--steps', 5, '--autoguidance', 1.25, '--centred', '--no-plots')
    assert code == 0 and 'autoguidance 1.25, centred' in out


def test_autoguidance_along_axes(place, eval_main):
    "Four scales in the report, which draw the same samples again when they are given as numbers"
    from flow_study.train import main
    run = 'study/checkpoints/mlp-icfm-1k-none'
    assert main('--arch mlp --size tiny --flow icfm --dataset 1k --group tests --epochs 20 --lr 2e-3 --device cpu --wandb-mode disabled'.split()) == 0
    one = evaluate(run, **quick, autoguidance=1.2)['samples']
    for same in ((1.2,), [1.2]*4): # one scale for all is one scale, up to the order of sums
        several = evaluate(run, **quick, autoguidance=same)['samples']
        assert several['energy_distance']['value'] == pytest.approx(one['energy_distance']['value'], abs=1e-4)
    chosen = evaluate(run, **quick, autoguidance='axes')
    assert len(chosen['autoguidance']) == 4 and all(1 <= s <= 3 for s in chosen['autoguidance'])
    assert evaluate(run, **quick, autoguidance=chosen['autoguidance'])['samples'] == chosen['samples']
    assert json.loads((place/run/'evaluation.json').read_text())['autoguidance'] == list(chosen['autoguidance'])
    code, out, _ = eval_main(run, '--n', 100, '--steps', 5, '--autoguidance', '1.25,1.5', '--no-plots')
    assert code == 0 and 'autoguidance 1.25 1.5' in out


def test_centred_samples_have_the_mean_of_the_training_rows(place):
    "Also those of a network that is pushed to one side; its losses stay"
    from flow_study.train import main
    run = 'study/checkpoints/mlp-icfm-1k-none'
    assert main('--arch mlp --size tiny --flow icfm --dataset 1k --group tests --epochs 20 --lr 2e-3 --device cpu --wandb-mode disabled'.split()) == 0
    model, mean = load_model(run), load_all_splits('1k')[0].x.mean(0)
    model.register_forward_hook(lambda module, args, v: v + 0.2)
    off = {centred: (sample(model, 2000, seed=1, normalized=True, centred=centred).mean(0) - mean).square().sum().item() for centred in (False, True)}
    assert off[False] > 0.2**2*len(mean)/2 and off[True] < 4*len(mean)/2000 # the second is what 2,000 samples leave to chance, and as much for the offset
    assert sample_main(f'{run} --n 2000 --seed 1 --centred --out kept.npy'.split()) == 0
    rows = load_model(run).stats.normalize(torch.from_numpy(np.load('kept.npy')))
    assert (rows.mean(0) - mean).square().sum() < 4*len(mean)/2000
    plain, kept = evaluate(run, **quick), evaluate(run, **quick, centred=True)
    assert plain['run'] == kept['run'] and (plain['centred'], kept['centred']) == (False, True)
    assert plain['paths']['path_energy'] != kept['paths']['path_energy']


def test_too_few_held_out_rows(place):
    save_splits(make_splits(torch.tensor(table(100, 4)).float(), sizes=('100',), max_cosine=1.), place/'few')
    config = TrainingConfig(arch='simple', flow='icfm', dataset='100', group='tests', data_dir='few')
    train, _, _ = load_all_splits('100', data_dir='few')
    folder = save(create_model('simple', dim=4, hidden=4), 'few-rows', stats=train.stats, data=None, config=config.to_dict())
    with pytest.raises(DataError, match='has 10 rows; below 20'): evaluate(folder)


@pytest.mark.parametrize('flow', ['otcfm', 'si-gvp', 'spherical'])
def test_other_flows(place, flow):
    "Losses where closed forms exist; metrics of samples for all, since only they compare flows"
    config = TrainingConfig(arch='simple', flow=flow, dataset='1k', group='tests')
    r = evaluate(save(create_model('simple', dim=32, hidden=16), 'run', config=config.to_dict()), **quick)
    assert set(r['baselines']) == ({'zero'} if flow == 'spherical' else {'zero', 'unit_gaussian', 'shrunk_gaussian', 'memoriser'})
    assert r['run']['paired_gain']['over'] == ('zero' if flow == 'spherical' else 'shrunk_gaussian') and bool(r['note']) == (flow != 'si-gvp')
    assert not r['samples']['energy_distance']['at_floor'] and bool(r['paths']) == (flow != 'spherical')
    assert evaluation_table(r)


def test_dopri5(run):
    r = evaluate(run, **quick | dict(method='dopri5'))
    assert r['nfe'] > 0 and r['quality_method'] == 'heun'


def test_help_needs_no_torch():
    import subprocess, sys
    code = "import sys; sys.argv = ['flow_study_eval', '--help']\nfrom flow_study.metrics import main\ntry: main()\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.splitlines()[-1] == 'False'


# real embeddings

@pytest.fixture(scope='module')
def compared(sonar):
    "Training rows against the validation and test rows, with their nulls; only closed forms and rows, no network"
    train, val, test = load_all_splits('1k', data_dir=sonar)
    return compare_samples(train.x, torch.cat([val.x, test.x]), train.x)


def test_known_energy_distances_on_sonar(compared):
    """Of 800 samples to 1,000 held-out rows: real rows -0.01, shrunk Gaussian 0.055, N(0, I) 0.087. There are 200 rows here, which move all
    three together by some 0.03; the differences are known better."""
    m = compared['energy_distance']
    gaussian, unit = (m['null'][k] for k in ('shrunk_gaussian', 'unit_gaussian'))
    assert m['floor'] < gaussian['value'] < unit['value']
    assert m['floor_low'] < -.01 < m['floor_high'] and gaussian['low'] < .055 < gaussian['high'] and unit['low'] < .087 < unit['high']
    assert gaussian['value'] - m['floor'] == pytest.approx(.065, abs=.03)
    assert unit['value'] - m['floor'] == pytest.approx(.097, abs=.04)
    assert not m['uninformative']


def test_known_neighbours_on_sonar(compared):
    "Real 0.504, shrunk Gaussian 0.63 (with 1,000 rows; 0.57 with 200). N(0, I) has 0.5 as well, for it lies around the data: only the asymmetry sees it"
    m, a = compared['nn_accuracy'], compared['nn_asymmetry']
    assert m['floor'] == pytest.approx(.504, abs=.03)
    assert .54 < m['null']['shrunk_gaussian']['value'] < .66
    assert m['null']['unit_gaussian']['value'] == pytest.approx(.5, abs=.01) and m['uninformative']
    assert a['null']['unit_gaussian']['value'] > .95 and not a['uninformative']


def test_memoriser_on_sonar(compared):
    assert compared['memorisation']['null']['memoriser']['value'] == 1 and not compared['memorisation']['uninformative']
    assert compared['copies']['null']['shrunk_gaussian']['value'] < .01


def test_a_conditional_run_is_evaluated_under_the_conditions_of_its_rows(tmp_path, monkeypatch):
    "Two clusters with labels, through the data folder: told the label, the network knows the cluster; its samples come from both"
    import numpy as np
    from flow_study.corpus import build_corpus
    from flow_study.train import main
    monkeypatch.chdir(tmp_path)
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 4 // 3  # a quarter has label 1
    np.save('x.npy', (torch.randn(600, 6, generator=gen) + 6*labels[:, None]).numpy())
    np.save('labels.npy', labels.numpy())
    build_corpus('data', 'x.npy', sizes=['500'], max_cosine=1., cond='labels.npy')
    run = '--arch mlp --size tiny --flow icfm --dataset 500 --group cond --cond --data-dir data --epochs 60 --batch-size 100 --lr 2e-3 --device cpu --wandb-mode disabled'
    assert main(run.split()) == 0
    report = evaluate('study/checkpoints/mlp-icfm-500-none', n=400, steps=20, draws=20, nfe_steps=(5,))
    model = load_model('study/checkpoints/mlp-icfm-500-none')
    _, val, _ = load_all_splits('500', data_dir='data')
    bank = ValidationBank(val, create_flow('icfm'), draws=32, stream='report')
    assert report['run']['loss'] == held_out_loss(model, bank, cond=True).mean < held_out_loss(model, bank).mean
    from flow_study.metrics import _draw, _subject
    x, _ = _draw(_subject('study/checkpoints/mlp-icfm-500-none', 'val', None, None), 400, 'heun', 20, 0)
    share = (x.mean(1) > val.x[val.cond == 1].mean()/2).double().mean().item()
    assert abs(share - 0.25) < 0.06  # 400 draws of a quarter: a standard error of 0.02
