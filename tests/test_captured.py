"""The step on memory that stays where it is, alone and for an ensemble: bit for bit the usual one, also when one recorded step is repeated in place of all later ones."""
import pytest
import torch

from flow_study import ensemble as module
from flow_study.checkpoint import read_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset
from flow_study.draws import keyed_generator
from flow_study.ensemble import Ensemble, Member
from flow_study.models import build_model
from flow_study.paths import Flow
from flow_study.rundir import read_metrics, read_status
from flow_study.tracking import Tracker
from flow_study.trainer import CapturedStep, FlowTrainer
from recorded import Operations, Recorded
from test_faults_checkpoint import StopAt


@pytest.fixture(scope='module')
def rows():
    "400 training rows and 100 held-out rows of 16 numbers, with labels"
    gen = keyed_generator(0, 'tests')
    x = torch.randn(500, 8, generator=gen) @ torch.randn(8, 16, generator=gen) + 0.3*torch.randn(500, 16, generator=gen)
    label = (x[:, 0] > 0).long()
    return FlowDataset.from_tensor(x[:400], cond=label[:400]), FlowDataset.from_tensor(x[400:], cond=label[400:])


@pytest.fixture
def make(rows, tmp_path):
    "A function that makes a trainer or a member; 8 steps an epoch"
    def trainer(seed=2, kind=FlowTrainer, trackers=(), resume_path=None, folder='usual', log_every=1, **kw):
        config = TrainingConfig(**{**dict(arch='mlp', size='tiny', flow='icfm', dataset='tests', group='tests', epochs=2, batch_size=50, lr=3e-3, warmup_steps=5,
                                          checkpoint_dir=str(tmp_path/folder), seed=seed), **kw})
        return kind(build_model(config, rows[0]), config, *rows, 'cpu', trackers=list(trackers), log_every=log_every, resume_path=resume_path)
    return trainer


def together(make, seeds, **kw):
    "The ensemble of some seeds, trained"
    e = Ensemble([make(s, Member, **kw) for s in seeds])
    e.train()
    return e


@pytest.fixture
def static(monkeypatch):
    "Within a call of this, steps are made as on a GPU; with `record` one is recorded after the first three, and repeated"
    made, begin = [], CapturedStep.__init__
    monkeypatch.setattr(module, 'STACK_WORK', 1e12)
    monkeypatch.setattr(Flow, 'check', lambda self, x1: None)  # which a GPU is not asked
    def no_reason(self, *args):
        begin(self, *args)
        self.why_not = None
        made.append(self)
    def switch(record=None):
        monkeypatch.setattr(FlowTrainer, '_wants_graph', property(lambda self: True))
        if record is None: return made
        monkeypatch.setattr(CapturedStep, '__init__', no_reason)
        monkeypatch.setattr(CapturedStep, '_record', record)
        return made
    return switch


def record(self): return Recorded(self.work)
def timeless(path): return [{k: v for k, v in d.items() if not k.startswith('time/')} for d in read_metrics(path)[0]]


def equal(a, b):
    "Every metric but the timings, weights and averages of two runs, bit for bit"
    assert timeless(a.config.run_dir) == timeless(b.config.run_dir)
    x, y = (read_checkpoint(t.config.run_dir/'last.pt') for t in (a, b))
    for k in ('model', 'ema', 'optimizer', 'scheduler', *(['averages'] if 'averages' in x else [])): assert same(x[k], y[k]), k


def same(a, b):
    "Of two nested dicts or lists"
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


OPTIONS = [dict(), dict(arch='unet', precision='bf16'), dict(cond=True, aug='mixup+noise', ema_snapshots=2, time_law='stratified'), dict(flow='otcfm', ot_batch=100), dict(flow='spherical', size=None, arch='simple')]


@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: '-'.join(map(str, o.values())) or 'dropout')
def test_one_recorded_step_stands_for_all(options, make, static):
    "12 of 16 steps repeat what was recorded, with nothing from Python: the numbers of rows, keys, rate and weights of averages are read from memory"
    usual, both = make(**options), together(make, (2, 3), folder='usual-both', **options)
    usual.train()
    static(record)
    alone, stacked = make(folder='static', **options), together(make, (2, 3), folder='static-both', **options)
    alone.train()
    assert alone._captured.graph.replays == 13 and alone._captured.by_number == (options.get('flow') != 'otcfm')
    equal(usual, alone)
    assert (both.why_not, stacked.why_not) == ('', '') and read_status(stacked.members[0].config.run_dir)['path'] == 'stacked, captured'
    for a, b in zip(both.members, stacked.members): equal(a, b)


def test_steps_that_are_given_rows_are_made_too(make, static):
    "By somebody who calls `train_step` himself, before and after one was recorded"
    usual = make()
    usual._setup()
    static(record)
    other = make(folder='static')
    other._setup()
    for t in (usual, other):
        batches = list(t.loader.batches(0))
        for k in range(8): t.train_step(*((t.loader.order(0)[k], None) if k in (1, 2, 3, 5, 7) and t is other else (batches[k],)))
    assert other._captured.graph.replays == 2 and other._captured.steps == 8
    assert all(a.equal(b) for a, b in zip(usual.params.values(), other.params.values())) and usual._readings() == other._readings()


def test_a_resume_does_not_know_which_steps_were_recorded(make, static, tmp_path):
    "Alone and together, stopped in the first epoch and in the second"
    static(record)
    whole, all_whole = make(folder='whole'), together(make, (2, 3), folder='all-whole')
    whole.train()
    for at in (6, 13):
        folder = f'cut{at}'
        make(folder=folder, trackers=[StopAt(at)]).train()
        cut = make(folder=folder, resume_path=tmp_path/folder/whole.config.run_name)
        cut.train()
        equal(whole, cut)
        assert Ensemble([make(s, Member, trackers=[StopAt(at)][:s == 2], folder=f'all-{folder}') for s in (2, 3)]).train()[0]['state'] == 'interrupted'
        rest = Ensemble([make(s, Member, folder=f'all-{folder}', resume_path=tmp_path/f'all-{folder}'/m.config.run_name) for s, m in zip((2, 3), all_whole.members)])
        rest.train()
        for a, b in zip(all_whole.members, rest.members): equal(a, b)


def test_a_member_that_freezes_leaves_and_the_rest_is_recorded_again(make, static):
    class Spoil(Tracker):
        "Makes the weights of a member bad after its fifth step"
        def log(self, metrics):
            if metrics['step'] == 5: next(iter(bad.params.values())).data.view(-1)[0] = float('nan')

    made = static(record)
    calm = together(make, (2, 4), folder='calm')
    before, bad = len(made), make(3, Member, trackers=[Spoil()])
    e = Ensemble([make(2, Member), bad, make(4, Member)])
    results = e.train()
    assert [r['state'] for r in results] == ['finished', 'failed', 'finished'] and 'not finite at step 6' in results[1]['reason']
    assert [len(s.trainers) for s in made[before:]] == [3, 2] and all(s.graph.replays > 1 for s in made[before:])
    for k, m in zip((0, 2), calm.members): equal(e.members[k], m)


def test_what_cannot_be_recorded_is_made_step_by_step_and_says_why(make, static, caplog):
    def refuse(self): raise RuntimeError('operation not permitted when stream is capturing\nand more')
    usual = make()
    usual.train()
    static(refuse)
    other = make(folder='static')
    other.train()
    assert other._captured.why_not == 'operation not permitted when stream is capturing' and f'not captured: {other._captured.why_not}' in caplog.text
    equal(usual, other)


def test_the_host_asks_once_for_all(make, static, monkeypatch):
    "An epoch of 8 steps with a line at every fourth: two questions, whoever many members there are, and two of each at the end of the epoch"
    static(record)
    asked = []
    for name in ('item', 'tolist', '__bool__', '__float__', '__int__', 'cpu', 'numpy'):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, ask=ask, name=name: (asked.append(name), ask(self, *args))[1])
    alone = make(log_every=4)
    alone._setup()
    asked.clear()
    alone.train_epoch()
    assert sorted(asked) == ['item', 'item', 'tolist', 'tolist'] and alone._captured.graph.replays == 5
    members = [make(s, Member, log_every=4) for s in (2, 3, 4)]
    for m in members: m._setup()
    e = Ensemble(members)
    e._share(members)
    courses = {m: m._epoch() for m in members}
    jobs = {m: next(course) for m, course in courses.items()}
    asked.clear()
    while jobs:
        e._make_steps(jobs)
        jobs = {m: job for m in jobs if (job := next(courses[m], None)) is not None}
    assert sorted(asked) == ['item']*6 + ['tolist']*2


def test_a_recorded_step_makes_nothing_of_its_own(make, static):
    "Nothing in it waits for the device, or would: the list of operations holds no question and no constant made by the host"
    static(record)
    t = make()
    t.train()
    names = {func._schema.name for func, *_ in t._captured.graph.calls}
    assert {'aten::normal_', 'aten::index_select', 'aten::_fused_adamw_', 'aten::lerp_', 'aten::bernoulli_'} <= names
    with pytest.raises(RuntimeError, match='makes the device wait'), Operations(): torch.ones(3)[torch.ones(3) > 0]
    with pytest.raises(RuntimeError, match='makes the device wait'), Operations(): torch.tensor([1.])
    with pytest.raises(RuntimeError, match='makes the device wait'), Operations(): float(torch.ones(()))
