"""Rows of `FAULTS.md` about checkpoints: damaged, hostile, of another schema, of another run; each docstring quotes its row."""
import hashlib, io, os, pickle, shutil, signal

import pytest
import torch

from faults import RUN, files, lines, one_line, same_state
from flow_study import checkpoint as checkpoints
from flow_study.checkpoint import CheckpointError, find_checkpoint, load_model, read_checkpoint, save_checkpoint
from flow_study.config import TrainingConfig
from flow_study.data import FlowDataset, NormalizationStats, load_all_splits
from flow_study.models import build_model
from flow_study.rundir import read_metrics, read_status
from flow_study.tracking import Tracker
from flow_study.trainer import FlowTrainer


class StopAt(Tracker):
    "Sends this process SIGTERM at a step"
    def __init__(self, step): self.step = step
    def log(self, metrics):
        if metrics['step'] == self.step: os.kill(os.getpid(), signal.SIGTERM)


def trainer(stop=None, **changes):
    "A trainer of the run that all tests here resume"
    kw = {k: changes.pop(k) for k in ('resume_path', 'allow_config_change') if k in changes}
    config = TrainingConfig(**{**dict(arch='simple', flow='icfm', dataset='1k', group='faults', epochs=6, batch_size=32, lr=3e-3, warmup_steps=20), **changes})
    train, val, _ = load_all_splits(config.dataset, config.stats_path, config.data_dir)
    return FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[StopAt(stop)] if stop else [], **kw)


@pytest.fixture(scope='session')
def made(small_data, tmp_path_factory):
    "A run stopped in its fifth epoch of six, and under `whole` the same run never stopped"
    folder = tmp_path_factory.mktemp('made')
    shutil.copytree(small_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        stopped, whole = trainer(stop=110).train(), trainer(name='whole').train()
    assert (stopped['state'], stopped['epochs_run'], stopped['best_epoch']) == ('interrupted', 4, 4) and whole['state'] == 'finished'
    return folder


@pytest.fixture
def stopped(made, place):
    "The run directory of the stopped run, in the folder where the test runs"
    shutil.copytree(made/'study/checkpoints', 'study/checkpoints')
    return RUN


def like_whole(run=RUN, whole='study/checkpoints/whole'):
    "Whether a run ended like the one never stopped: state, every metric but the times, every bit"
    assert read_status(run)['state'] == 'finished'
    assert lines(run) == lines(whole)
    assert same_state(run/'last.pt', f'{whole}/last.pt') and same_state(run/'best.pt', f'{whole}/best.pt')
    return True


def cut(share): return lambda data: data[:int(len(data)*share)]
def flip(place): return lambda data: data[:(i := int(len(data)*place))] + bytes([data[i] ^ 4]) + data[i + 1:]

DAMAGE = {'cut to 0 %': cut(0), 'cut to 1 %': cut(.01), 'cut to 10 %': cut(.1), 'cut to 50 %': cut(.5), 'cut to 99.9 %': cut(.999),
          'garbage': lambda data: hashlib.shake_128(b'x').digest(len(data)), 'zero-filled': lambda data: bytes(len(data)),
          'bit flipped in front': flip(0.001), 'bit flipped in a tensor': flip(.5), 'bit flipped in the checksum': lambda data: flip(1 - 9/len(data))(data),
          'a line appended': lambda data: data + b'\n'}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(damage, stopped, train_main):
    "newest checkpoint truncated at 0, 1, 10, 50, 99.9 % / garbage / zero-filled / one bit flipped"
    bad = damage((stopped/'last.pt').read_bytes())
    (stopped/'last.pt').write_bytes(bad)
    with pytest.raises(CheckpointError, match=f'{stopped}/last.pt: (no checksum at its end|its bytes are not those that were written)'): read_checkpoint(stopped/'last.pt')
    before = files('study')
    code, out, err = train_main('--resume', stopped/'last.pt')
    assert code == 1 and one_line(err) and f'{stopped}/last.pt' in err and files('study') == before
    code, out, err = train_main('--resume', stopped.name)
    assert code == 0 and err == ''
    warning = next(l for l in out.splitlines() if 'last.pt' in l)
    assert 'Going on from best.pt' in warning
    assert like_whole()
    assert (stopped/'last.replayed-1.pt').read_bytes() == bad


def test_last_checkpoint_missing(stopped, train_main):
    "`last.pt` falls back to `best.pt` with a warning when resuming a run by name"
    (stopped/'last.pt').unlink()
    code, out, err = train_main('--resume', stopped)
    assert code == 0 and 'No such file' in out and 'Going on from best.pt' in out and like_whole()


@pytest.mark.parametrize('best', ['damaged', 'missing'])
def test_no_checkpoint_is_good(best, stopped, train_main):
    "training never silently restarts at epoch 0"
    for name in ('last.pt', 'best.pt'): (stopped/name).write_bytes(b'PK damaged')
    if best == 'missing': (stopped/'best.pt').unlink()
    before = files('study')
    code, out, err = train_main('--resume', stopped.name)
    assert code == 1 and one_line(err) and 'last.pt no checksum' in err and 'best.pt' in err and str(stopped) in err
    assert files('study') == before


def test_not_a_checkpoint_of_a_run(place, train_main):
    "a named error that says which file and why: a file of weights alone is nothing to go on from"
    save_checkpoint('weights.pt', model=torch.nn.Linear(2, 2))
    code, out, err = train_main('--resume', 'weights.pt')
    assert code == 1 and one_line(err) and 'weights.pt' in err
    save_checkpoint('weights.pt', model=torch.nn.Linear(2, 2), config=trainer().config.to_dict(), stats=trainer().train_dataset.stats)
    code, out, err = train_main('--resume', 'weights.pt')
    assert code == 1 and one_line(err) and 'weights.pt' in err and 'lacks progress' in err
    assert not RUN.exists()


class Bomb:
    "Makes a folder when it is unpickled carelessly"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


def packed(kind, content):
    "`content` as an archive of torch or as a bare pickle"
    if kind == 'pickle': return pickle.dumps(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize('kind', ['archive', 'pickle'])
@pytest.mark.parametrize('target', ['checkpoint', 'split', 'stats'])
def test_pickle_bomb(target, kind, stopped, train_main):
    "a pickle bomb as a checkpoint, a split or a stats file"
    boom = stopped.absolute()/'boom'
    content = packed(kind, {'mean': torch.zeros(32), 'std': torch.ones(32), 'embeddings': torch.zeros(9, 32), 'schema': 1, 'model': Bomb(str(boom))})
    torch.load(io.BytesIO(content), weights_only=False) if kind == 'archive' else pickle.loads(content)
    boom.rmdir() # it works
    path = {'checkpoint': stopped/'last.pt', 'split': 'study/datasets/splits/1k/train.pt', 'stats': 'study/datasets/normalization_stats.pt'}[target]
    sealed = content + checkpoints._magic + hashlib.sha256(content).hexdigest().encode() + b'\n' # with a checksum that is right
    with open(path, 'wb') as f: f.write(sealed if target == 'checkpoint' else content)
    code, out, err = train_main('--resume', path if target == 'checkpoint' else stopped)
    assert code == 1 and one_line(err) and str(path) in err and not boom.exists()
    if target == 'checkpoint': # by name the best one serves
        assert train_main('--resume', stopped.name)[0] == 0 and not boom.exists() and like_whole()


def test_newer_schema(stopped, train_main):
    "a checkpoint of a newer schema"
    state = read_checkpoint(stopped/'last.pt')
    checkpoints.write_checkpoint(stopped/'last.pt', {**state, 'schema': checkpoints.SCHEMA + 1})
    code, out, err = train_main('--resume', stopped/'last.pt')
    assert code == 1 and one_line(err) and f'has schema {checkpoints.SCHEMA + 1}, this version reads up to {checkpoints.SCHEMA}: update flow_study' in err


def test_older_schema(stopped, train_main, monkeypatch):
    "of an older one: migrated"
    state = read_checkpoint(stopped/'last.pt')
    older = {k: v for k, v in state.items() if k not in ('schema', 'progress')} | {'counts': state['progress'], 'schema': checkpoints.SCHEMA - 1}
    checkpoints.write_checkpoint(stopped/'last.pt', older)
    with pytest.raises(CheckpointError, match='cannot be brought to'): read_checkpoint(stopped/'last.pt')
    monkeypatch.setitem(checkpoints._migrations, checkpoints.SCHEMA - 1, lambda s: {**s, 'progress': s['counts']})
    code, out, err = train_main('--resume', stopped/'last.pt')
    assert code == 0 and like_whole()


def test_resume_with_another_config(stopped, train_main):
    "resume with a different config"
    before = files('study')
    code, out, err = train_main('--resume', stopped, '--lr', '1e-4', '--seed', '7', '--batch-size', '64')
    assert code == 1 and 'Traceback' not in err and '--allow-config-change' in err
    told = {l.split(':')[0].strip(): l.split(': ')[1] for l in err.splitlines()[1:]}
    assert told == {'batch_size': '32 in the checkpoint, 64 now', 'lr': '0.003 in the checkpoint, 0.0001 now', 'seed': '42 in the checkpoint, 7 now'}
    assert files('study') == before
    code, out, err = train_main('--resume', stopped, '--lr', '1e-3', '--allow-config-change')
    assert code == 0 and 'lr: 0.003 in the checkpoint, 0.001 now' in out
    assert read_checkpoint(stopped/'last.pt')['config']['lr'] == 1e-3


def test_resume_with_more_epochs(stopped, train_main):
    "more epochs is allowed and keeps the learning rate continuous at the seam"
    code, out, err = train_main('--resume', stopped, '--epochs', '9')
    assert code == 0 and read_status(stopped)['epoch'] == 9
    rates = {d['step']: d['train/lr'] for d in lines(stopped) if 'train/lr' in d}
    assert all(abs(rates[s] - r) < 1e-12 for s, r in {d['step']: d['train/lr'] for d in lines('study/checkpoints/whole') if 'train/lr' in d}.items() if s <= 110)
    steps = sorted(rates) # 10 apart; a cosine over 130 steps falls by 0.11 of the peak in 10 where it is steepest
    falls = [rates[a] - rates[b] for a, b in zip(steps, steps[1:]) if a >= 30]
    assert min(falls) >= 0 and max(falls) < 0.12*3e-3 and rates[steps[-1]] < 0.35*3e-3


def test_resume_of_a_renamed_run(stopped, train_main):
    "a resume by path needs nothing else: the run is called what its directory is called, wherever that was moved"
    (stopped.parents[1]/'elsewhere').mkdir()
    moved = stopped.rename(stopped.parents[1]/'elsewhere'/'my run')
    code, out, err = train_main('--resume', moved)
    assert (code, err) == (0, '') and like_whole(moved) and not stopped.exists()


def test_resume_under_another_name(stopped, train_main):
    "nothing overwritten: a run that goes on under another name takes its best checkpoint along and leaves the old directory alone"
    before = files(stopped)
    code, out, err = train_main('--resume', stopped, '--name', 'fork', '--lr', '1e-9', '--allow-config-change')
    fork = stopped.with_name('fork')
    assert code == 0 and files(stopped) == before and read_status(fork)['state'] == 'finished'
    load_model(fork)


@pytest.mark.parametrize('change', ['permuted', 'rescaled', 'of another dataset', 'other rows'])
def test_other_stats(change, stopped, train_main):
    "stats permuted, rescaled or of another dataset"
    path = 'study/datasets/normalization_stats.pt'
    old = NormalizationStats.load(path)
    mean, std = {'permuted': (old.mean.flip(0), old.std.flip(0)), 'rescaled': (old.mean, old.std*2),
                 'of another dataset': (torch.randn(32), torch.rand(32) + 1), 'other rows': (old.mean, old.std)}[change]
    NormalizationStats(mean, std, old.n_samples, old.source).save(path)
    if change == 'other rows':
        split = torch.load('study/datasets/splits/1k/train.pt', weights_only=True)
        torch.save({**split, 'embeddings': split['embeddings'].flip(0)}, 'study/datasets/splits/1k/train.pt')
    before = files('study')
    for more in ((), () if change == 'other rows' else ('--allow-config-change',)): # that option is not about statistics
        code, out, err = train_main('--resume', stopped, *more)
        assert code == 1 and 'Traceback' not in err and 'last.pt' in err
        assert ('train rows' if change == 'other rows' else 'statistics (1k_train) are not those in use') in err
    assert files('study') == before


def test_stats_missing_on_resume(stopped):
    "stats ... refused on resume: rows that are not normalized at all"
    again = trainer(resume_path=stopped/'last.pt')
    again.train_dataset, again.val_dataset = (FlowDataset.from_tensor(torch.load(f'study/datasets/splits/1k/{k}.pt')['embeddings']) for k in ('train', 'val'))
    with pytest.raises(CheckpointError, match='were normalized'): again.train()


def test_leftovers_of_a_killed_write(stopped, train_main):
    "kill -9 inside a checkpoint write: the file that was being written does not stay for ever"
    left = stopped/f'.last.pt.{os.getpid()}-0a0b0c0d.tmp'
    left.write_bytes((stopped/'last.pt').read_bytes()[:1000])
    assert train_main('--resume', stopped)[0] == 0 and not left.exists() and like_whole()
