"""Every fast path equals the slow one: clipping within the optimizer, the step compiled or in bfloat16, a table left in its file."""
import copy
import shutil

import pytest
import torch

from flow_study import data
from flow_study.checkpoint import read_checkpoint
from flow_study.closed_form import ValidationBank, yardsticks
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset, MappedLoader, NormalizationStats, ResidentLoader, load_all_splits, make_splits, save_splits
from flow_study.draws import keyed_generator
from flow_study.ema import ema_decay
from flow_study.models import build_model
from flow_study.paths import create_flow
from flow_study.rundir import read_metrics, read_status
from flow_study.trainer import FlowTrainer, decay_groups, make_loss_step
from test_faults_checkpoint import StopAt

compiles = pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A data folder of 1,000 rows of 32 numbers"
    folder = tmp_path_factory.mktemp('speed')
    x = torch.randn(1300, 32, generator=keyed_generator(0, 'tests'))*torch.logspace(0.5, -0.5, 32) + 1
    save_splits(make_splits(x, sizes=('1k',)), folder)
    return folder


@pytest.fixture
def make(folder, tmp_path):
    "A function that makes a trainer"
    def trainer(name='run', trackers=(), splits=None, resume_path=None, **kw):
        config = TrainingConfig(**{**dict(arch='mlp-plain', flow='icfm', dataset='1k', group='tests', epochs=4, batch_size=100, lr=3e-3, warmup_steps=3, name=name,
                                          data_dir=str(folder), checkpoint_dir=str(tmp_path)), **kw})
        train, val, _ = splits or load_all_splits(config.dataset, config.stats_path, config.data_dir)
        return FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=list(trackers), log_every=1, resume_path=resume_path)
    return trainer


def weights(trainer): return [*trainer.params.values(), *trainer.ema.params.values()]
def largest_difference(a, b): return max((x - y).abs().max().item() for x, y in zip(weights(a), weights(b), strict=True))


def slow_steps(trainer, n):
    "What the trainer does in `n` steps, as one would write it at first: one parameter at a time, torch's own clipping, a loop for the average"
    c, model = trainer.config, trainer.model
    step, average = make_loss_step(model, trainer.flow), copy.deepcopy(trainer.ema.params)
    optimizer = torch.optim.AdamW(decay_groups(model, c.weight_decay), lr=c.lr, foreach=False, fused=False)
    batches = (x for epoch in range(c.epochs) for x in trainer.loader.batches(epoch))
    for k, x1 in zip(range(n), batches):
        for group in optimizer.param_groups: group['lr'] = c.lr*trainer.scheduler.lr_lambdas[0](k)
        draws = trainer.flow.draw(x1, keyed_generator(c.seed, 'noise', k))
        optimizer.zero_grad()
        step(dict(model.named_parameters()), x1, draws).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters(): average[name] += (1 - ema_decay(k, c.ema_decay, c.ema_warmup))*(p - average[name])
    return [*model.parameters(), *average.values()]


@pytest.mark.filterwarnings('ignore::flow_study.config.ProtocolWarning')
@pytest.mark.parametrize('grad_clip', [1., 1e-3, 1e3], ids=['as usual', 'always clipped', 'never clipped'])
def test_the_step_is_the_plain_step(make, grad_clip):
    fast, slow = make(grad_clip=grad_clip), make('slow', grad_clip=grad_clip)
    fast._setup(), slow._setup()
    for epoch in range(2): fast.train_epoch()
    slowly = slow_steps(slow, fast.global_step)
    assert fast.global_step == 16
    for a, b in zip(weights(fast), slowly, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)  # the rounding of 16 steps through AdamW's square roots


@pytest.mark.filterwarnings('ignore::flow_study.config.ProtocolWarning')
def test_a_clipped_gradient_is_clipped(make):
    "The gradient is divided on its way, and the norm that is logged is the one before"
    trainer = make(grad_clip=1e-3)
    trainer._setup()
    rows = next(trainer.loader.batches(0))
    trainer.train_step(rows)
    norm, scale = trainer._last[1], trainer.optimizer.grad_scale
    torch.testing.assert_close(scale, ((norm + 1e-6)/trainer.config.grad_clip).clamp(min=1))
    assert scale > 1


@compiles
def test_compiled_is_eager_within_rounding(make):
    eager, compiled = make(compile='off'), make('compiled', compile='on')
    eager.train(), compiled.train()
    assert (eager.path, compiled.path, read_status(compiled.config.run_dir)['path']) == ('eager', 'compiled', 'compiled')
    assert 0 < largest_difference(eager, compiled) < 1e-4  # float32 rounding over 32 steps; zero would mean that nothing was compiled


@compiles
@pytest.mark.parametrize('kw', [{}, dict(arch='mlp', size='tiny')], ids=['plain', 'with dropout'])
def test_compiled_resumes_bit_for_bit(make, tmp_path, kw):
    "Also where the network draws, which recording the step does as well"
    make('whole', compile='on', **kw).train()
    make('cut', [StopAt(13)], compile='on', **kw).train()
    make('cut', compile='on', resume_path=tmp_path/'cut', **kw).train()
    a, b = (read_checkpoint(tmp_path/name/'last.pt') for name in ('whole', 'cut'))
    assert all(v.equal(b['model'][k]) for k, v in a['model'].items()) and all(v.equal(b['ema']['params'][k]) for k, v in a['ema']['params'].items())


def test_auto_compiles_long_runs_and_stays_with_its_choice(make, tmp_path, monkeypatch):
    "A short run is over before compiling has paid; a run that goes on, also a longer one, stays on its path"
    from flow_study import trainer as module
    short = make('short', [StopAt(9)], epochs=2)
    short.train()
    monkeypatch.setattr(module, 'COMPILE_STEPS', 20)
    longer = make('short', epochs=6, resume_path=tmp_path/'short')
    longer._setup()
    assert (short.path, longer.path) == ('eager', 'eager')
    new = make('new', epochs=6)
    new._setup()  # nothing is compiled before the first step
    assert new.path == ('compiled' if shutil.which('g++') else 'eager')


def test_without_a_compiler(make, monkeypatch, caplog):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(ValueError, match="compile='on': expected 'off' or 'auto' here, because there is no C.. compiler"): make(compile='on').train()
    from flow_study import trainer as module
    monkeypatch.setattr(module, 'COMPILE_STEPS', 1)
    caplog.set_level('INFO', 'flow_study')
    trainer = make()
    assert trainer.train()['state'] == 'finished' and trainer.path == 'eager'
    assert [r.message for r in caplog.records if 'compiled' in r.message] == ['not compiled: there is no C++ compiler (no-such-compiler)']


def test_a_step_that_cannot_be_compiled(make, monkeypatch, caplog):
    "`auto` goes on without, `on` is an error that says what to do"
    from flow_study import trainer as module
    import torch._inductor
    def broken(*args, **kw): raise RuntimeError('no header\nand much more')
    monkeypatch.setattr(torch._inductor, 'compile', broken)
    monkeypatch.setattr(module, 'COMPILE_STEPS', 1)
    trainer = make()
    assert trainer.train()['state'] == 'finished' and trainer.path == 'eager'
    assert 'not compiled: no header' in caplog.messages
    if shutil.which('g++'):
        with pytest.raises(RuntimeError, match='--compile off'): make(compile='on').train()


def test_bfloat16_trains_float32_weights(make):
    "The loss is near that of float32, weights and averages are float32, and validation does not depend on the precision"
    full, half = make(), make('half', precision='bf16')
    full.train(), half.train()
    assert {p.dtype for p in weights(half)} == {torch.float32}
    losses = [[d['train/loss'] for d in t.history if 'train/loss' in d] for t in (full, half)]
    assert losses[0] != losses[1]
    assert all(abs(a - b) < 0.02*a for a, b in zip(*losses))  # 8 bits: each product errs by up to 2**-8, their sum by less
    assert not half.params['out.weight'].equal(half.params['out.weight'].bfloat16().float())
    half.model.load_state_dict(full.model.state_dict())
    half.ema.load_state_dict(full.ema.state_dict())
    assert half.validate() == full.validate()


@pytest.fixture
def small_limits(monkeypatch):
    "Tables of more than 50 kB count as large; blocks of 10 rows"
    monkeypatch.setattr(data, 'RESIDENT_BYTES', 50_000)
    monkeypatch.setattr(data, 'BLOCK_BYTES', 10*32*4)
    monkeypatch.setattr(data, 'MAPPED_FILE', 10_000)


def split_paths(folder): return [folder/f'splits/1k/{k}.pt' for k in ('train', 'val', 'test')]


def test_a_mapped_table_gives_the_same_run(make, folder, small_limits, tmp_path):
    "Bit for bit, also when stopped within an epoch"
    for name, mapped in (('resident', False), ('mapped', None)):
        splits = [FlowDataset(path, mapped=mapped if path.name == 'train.pt' else False) for path in split_paths(folder)]
        trainer = make(name, splits=splits)
        trainer.train()
        assert type(trainer.loader) is (MappedLoader if mapped is None else ResidentLoader) and trainer.loader.block == 10
    make('cut', [StopAt(13)]).train()
    make('cut', resume_path=tmp_path/'cut').train()
    a, b, c = (read_checkpoint(tmp_path/name/'last.pt')['model'] for name in ('resident', 'mapped', 'cut'))
    assert all(v.equal(b[k]) and v.equal(c[k]) for k, v in a.items())
    assert [len(read_metrics(tmp_path/name)[0]) for name in ('resident', 'mapped', 'cut')] == [36]*3


def test_held_out_rows_in_a_file(make, folder, small_limits):
    "Are not read as a whole, and give the same validation loss and closed forms, bit for bit"
    resident, mapped = ([FlowDataset(path, mapped=m) for path in split_paths(folder)] for m in (False, True))
    a, b = ValidationBank(resident[1], create_flow('icfm'), draws=20), ValidationBank(mapped[1], create_flow('icfm'), draws=20)
    b._kept = None  # as where there are too many to keep
    assert b.x is None and all(x.equal(y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q))
    one, two = make(splits=resident), make('mapped', splits=mapped)
    assert one.validate() == two.validate()
    assert yardsticks(*resident[:2]).to_dict() == yardsticks(*mapped[:2]).to_dict()


def test_a_mapped_table_is_checked_like_any_other(folder, small_limits, tmp_path):
    mapped = FlowDataset(split_paths(folder)[0])
    resident = FlowDataset(split_paths(folder)[0], mapped=False)
    assert mapped.mapped and mapped.fingerprint == resident.fingerprint and mapped.x.equal(resident.x) and mapped[3].equal(resident[3])
    bad = torch.load(split_paths(folder)[0])
    bad['embeddings'][777, 3] = float('inf')
    data.save_plain(tmp_path/'splits/1k/train.pt', bad)
    with pytest.raises(data.DataError, match='in 1 of 800 rows .rows 777.'): FlowDataset(tmp_path/'splits/1k/train.pt', folder/'normalization_stats.pt')


def test_statistics_and_splits_of_a_table_larger_than_memory(small_limits, tmp_path):
    "The same file as without the limit, and nothing left of what was written on the way"
    import numpy as np
    x = torch.randn(3000, 32, generator=keyed_generator(0, 'tests')) + 1
    np.save(tmp_path/'x.npy', x.numpy())
    mapped = np.load(tmp_path/'x.npy', mmap_mode='c')
    (tmp_path/'scratch').mkdir()
    large = make_splits(mapped, sizes=('3k',), near_duplicate_rows=100, scratch=tmp_path/'scratch')
    assert list((tmp_path/'scratch').iterdir()) == []
    stats = save_splits(large, tmp_path/'large')
    data.MAPPED_FILE = 2**26
    small = make_splits(x, sizes=('3k',), near_duplicate_rows=100)
    assert all(a['embeddings'].equal(b['embeddings']) and a['indices'] == b['indices'] for a, b in zip(large['3k'].values(), small['3k'].values()))
    assert stats.same_as(NormalizationStats.fit(small['3k']['train']['embeddings']))
