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
from flow_study.ensemble import Ensemble, Member, Stack, StackedStep, _draw_mask, _Trial, first_job
from flow_study.models import build_model
from flow_study.rundir import read_metrics, read_status
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer, NonFiniteError

pytestmark = pytest.mark.cuda


@pytest.fixture
def make(tmp_path):
    "A function that makes a trainer on the GPU; 7 steps an epoch"
    table = torch.randn(1200, 64, generator=keyed_generator(0, 'tests'))*torch.logspace(0.5, -0.5, 64)
    label = (table[:, 0] > 0).long()
    train, val = FlowDataset.from_tensor(table[:1000], cond=label[:1000]), FlowDataset.from_tensor(table[1000:], cond=label[1000:])
    def trainer(name, trackers=(), kind=FlowTrainer, resume_path=None, log_every=1, **kw):
        config = TrainingConfig(**{**dict(arch='mlp', flow='icfm', dataset='tests', group='tests', epochs=6, batch_size=128, lr=1e-3, warmup_steps=5,
                                          checkpoint_dir=str(tmp_path), name=name, compile='auto', seed=42), **kw})
        return kind(build_model(config, train), config, train, val, 'cuda', trackers=list(trackers), log_every=log_every, resume_path=resume_path)
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
    assert_same(tmp_path/'whole', tmp_path/'cut')


def assert_same(one, other):
    "Metrics, weights and averages of two runs, bit for bit"
    a, b = (read_checkpoint(path/'last.pt') for path in (one, other))
    assert timeless(one) == timeless(other)
    assert all(v.equal(b['model'][k]) for k, v in a['model'].items())
    assert all(v.equal(b['ema']['params'][k]) for k, v in a['ema']['params'].items())


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_an_ensemble_resumes_bit_for_bit(make, tmp_path, compile):
    "All members stop and go on together; then a stack has the same members at each step"
    def start(name, trackers=(), resume=False):
        members = [make(f'{name}{s}', trackers, Member, tmp_path/f'{name}{s}' if resume else None, seed=s, compile=compile) for s in (1, 2, 3)]
        return members, Ensemble(members).train()
    members, results = start('whole')
    assert [r['state'] for r in results] == ['finished']*3 and members[0].path == ('stacked' if compile == 'off' else 'stacked, captured')
    assert [r['state'] for r in start('cut', [Terminate(17)])[1]] == ['interrupted']*3
    start('cut', resume=True)
    for s in (1, 2, 3): assert_same(tmp_path/f'whole{s}', tmp_path/f'cut{s}')


def test_the_run_knows_its_gpu(make, tmp_path):
    make('known').train()
    device = read_status(tmp_path/'known')['device']
    assert device['type'] == 'cuda' and device['name'] == torch.cuda.get_device_name() and device['uuid'].startswith('GPU-')


def quietly(steps):
    "Make steps; torch raises at the first synchronisation"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for step in steps: step()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('options', [dict(compile='off'), dict(), dict(cond=True, aug='mixup+noise', ema_snapshots=2, time_law='stratified')], ids=['eager', 'captured', 'captured-options'])
def test_steps_ask_the_device_nothing(make, options):
    "Rows, draws and updates of several steps, as the loop makes them; capturing, before the fourth, may wait"
    trainer = make('quiet', **options)
    trainer._setup()
    trainer.model.train()
    examples = trainer._examples()
    for _ in range(4): trainer.train_step(*next(examples))
    assert options.get('compile') == 'off' or trainer._captured.graph is not None
    quietly([lambda: trainer.train_step(*next(examples))]*3)


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_steps_of_an_ensemble_ask_the_device_nothing(make, compile):
    "Three members, between two lines of metrics"
    members = [make(f'quiet{s}', kind=Member, seed=s, compile=compile, log_every=100) for s in (1, 2, 3)]
    for m in members: m._setup()
    e = Ensemble(members)
    e._share(members)
    courses = {m: m._epoch() for m in members}
    jobs = {m: next(course) for m, course in courses.items()}
    def step():
        e._make_steps(jobs)
        for m in members: jobs[m] = next(courses[m])
    for _ in range(4): step()
    assert e.why_not == '' and (compile == 'off' or e.step.graph is not None)
    quietly([step]*2)


@pytest.mark.parametrize('options', [dict(), dict(arch='dit', size='tiny'), dict(arch='unet', size='tiny'), dict(arch='mamba', size='tiny'), dict(flow='otcfm'), dict(flow='spherical'),
                                     dict(cond=True, aug='mixup+noise', ema_snapshots=2, time_law='stratified'), dict(precision='bf16')], ids=lambda o: '-'.join(map(str, o.values())) or 'mlp')
def test_a_captured_step_is_the_eager_step(make, options):
    "Ten steps from the same start, seven of them replayed: the same draws and masks; the learning rate is read as float32, nothing else differs"
    eager, captured = make('eager', **{**options, 'compile': 'off'}), make('captured', **options)
    for t in (eager, captured):
        t._setup()
        t.model.train()
        for t.current_epoch in range(2):
            for job in t._examples():
                if t.global_step < 10: t.train_step(*job)
    assert captured._captured.graph is not None and captured._captured.steps == 10, captured._captured.why_not
    averages = lambda t: [t.ema.params, *(t.averages.params if t.averages else ())]
    for a, b in [(eager.params, captured.params), *zip(averages(eager), averages(captured))]:
        for k in a: assert (a[k] - b[k]).norm() <= 1e-4*a[k].norm(), k
    for a, b in zip(eager._readings(), captured._readings()): assert abs(a - b) <= 1e-4*abs(a)


class Spoil(Tracker):
    "Makes what `numbers` gives bad after a step, where it lies"
    def __init__(self, step): self.step = step
    def log(self, metrics):
        if metrics['step'] == self.step: self.numbers().fill_(float('nan'))


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_a_loss_that_is_not_finite_freezes_the_run(make, tmp_path, compile):
    "From then on every step is nothing, replayed ones too: the looks are four steps apart"
    spoil = Spoil(20)
    trainer = make('nan', [spoil], compile=compile, log_every=4)
    spoil.numbers = lambda: trainer.loader.x
    with pytest.raises(NonFiniteError, match='at step 21'): trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters()) and all(p.isfinite().all() for p in trainer.ema.params.values())
    assert read_status(tmp_path/'nan')['state'] == 'failed'


@pytest.mark.parametrize('compile', ['off', 'auto'], ids=['eager', 'captured'])
def test_a_member_that_freezes_leaves_the_others_alone(make, compile):
    spoil = Spoil(20)
    members = [make(f'm{s}', [spoil] if s == 2 else (), Member, seed=s, compile=compile) for s in (1, 2, 3)]
    spoil.numbers = lambda: next(iter(members[1].params.values())).data
    results = Ensemble(members).train()
    assert [r['state'] for r in results] == ['finished', 'failed', 'finished'] and 'not finite at step 21' in results[1]['reason']


class Asking(torch.nn.Linear):
    "Looks at its numbers, which cannot be captured"
    def forward(self, x, t): return super().forward(x if x.abs().max().item() < 1e9 else x*0)


def test_a_step_that_cannot_be_captured_is_made_all_the_same(make, caplog):
    "With a reason; and what is drawn after the failure are the numbers of the eager run"
    runs = []
    for name, compile in (('usual', 'off'), ('other', 'auto')):
        t = make(name, compile=compile, epochs=2)
        torch.manual_seed(0)
        t.model = torch.nn.ModuleDict(dict(net=Asking(64, 64), drop=torch.nn.Dropout(0.2)))
        t.model.forward = lambda x, time, m=t.model: m['net'](m['drop'](x), time)
        t.train()
        runs.append(t)
    usual, other = runs
    assert other._captured.graph is None and other._captured.steps == 14 and f'not captured: {other._captured.why_not}' in caplog.text
    for k in usual.params: assert (usual.params[k] - other.params[k]).norm() <= 1e-4*usual.params[k].norm()


def test_masks_are_those_of_dropout():
    "From a generator of their own, what the global one in the same state gives"
    x, gen = torch.ones(40, 64, device='cuda'), torch.Generator('cuda').manual_seed(3)
    torch.cuda.manual_seed(3)
    for _ in range(2): assert _draw_mask(torch.empty_like(x), 0.3, gen).equal(torch.nn.functional.dropout(x, 0.3))


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


@pytest.mark.parametrize('options', [dict(), dict(arch='dit', size='tiny'), dict(arch='unet', size='tiny'), dict(arch='mamba', size='tiny')], ids=lambda o: o.get('arch', 'mlp'))
def test_a_captured_step_of_a_stack_is_the_eager_one(make, options):
    "Six steps, three of them replayed; then a step beside those of the runs alone: losses and norms"
    two = {}
    for compile in ('off', 'auto'):
        members = [make(f'{compile}{s}', kind=Member, seed=s, compile=compile, **options) for s in (1, 2, 3)]
        for m in members: m._setup()
        e = Ensemble(members)
        e._share(members)
        courses = {m: m._epoch() for m in members}
        jobs = {m: next(course) for m, course in courses.items()}
        for _ in range(6):
            e._make_steps(jobs)
            for m in members: jobs[m] = next(courses[m])
        assert e.why_not == '' and (e.step is not None) == (compile == 'auto')
        two[compile] = members
    assert isinstance(two['auto'][0]._captured, StackedStep) and two['auto'][0]._captured.graph is not None, two['auto'][0]._captured.why_not
    for a, b in zip(*two.values()):
        for x, y in ((a.params, b.params), (a.ema.params, b.ema.params)):
            for k in x: assert (x[k] - y[k]).norm() <= 1e-4*x[k].norm(), k
        for p, q in zip(a._readings(), b._readings()): assert abs(p - q) <= 1e-4*abs(p)


def test_an_ensemble_trains(make):
    "With averages of any length"
    members = [make(f'e{s}', kind=Member, seed=s, ema_snapshots=2) for s in (1, 2, 3)]
    assert [r['state'] for r in Ensemble(members).train()] == ['finished']*3
    assert all((m.run_dir.path/'chosen.pt').exists() for m in members)


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
