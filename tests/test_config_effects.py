"""Every field of the config has an effect that can be seen; one that has none must not exist."""
import json
from dataclasses import fields

import pytest
import torch

from flow_study.config import TrainingConfig
from flow_study.data import NormalizationStats, load_all_splits, make_splits, save_plain, save_splits
from flow_study.draws import keyed_generator
from flow_study.models import build_model
from flow_study.paths import Flow, register_flow, trigonometric
from flow_study.tracking import Tracker, WandbTracker
from flow_study.trainer import FlowTrainer

register_flow('trigonometric', Flow('trigonometric', trigonometric))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Two data folders with two sizes each"
    folder = tmp_path_factory.mktemp('data')
    for name, shift in (('a', 0.), ('b', 1.)):
        x = torch.randn(1300, 32, generator=keyed_generator(0, 'tests'))*torch.logspace(0, -0.5, 32) + shift
        splits = make_splits(x, sizes=('500', '1k'))
        for d in (d for parts in splits.values() for d in parts.values()): d['cond'] = (d['embeddings'][:, 0] > 0).long()
        save_splits(splits, folder/name)
    NormalizationStats(torch.zeros(32), torch.ones(32), 1, 'other').save(folder/'other.pt')
    for name, slope in (('pairs-a.pt', 1.), ('pairs-b.pt', 2.)):
        x0 = torch.randn(300, 32, generator=keyed_generator(1, 'tests'))
        save_plain(folder/name, dict(x0=x0, x1=slope*x0, source='tests'))
    save_plain(folder/'source.pt', dict(embeddings=torch.ones(5, 32)))
    return folder


@pytest.fixture
def config(data, tmp_path):
    return TrainingConfig(arch='simple', flow='icfm', dataset='500', group='g', epochs=4, batch_size=100, lr=3e-3, warmup_steps=3,
                          data_dir=str(data/'a'), checkpoint_dir=str(tmp_path/'runs'))


class Listener(Tracker):
    "Keeps what it is told"
    def __init__(self): self.lines = []
    def start(self, run): self.run = run
    def log(self, metrics): self.lines.append({k: v for k, v in metrics.items() if not k.startswith('time/')})


def outcome(config):
    "Train as the script does; what can be seen of it"
    train, val, _ = load_all_splits(config.dataset, config.stats_path, config.data_dir)
    listener = Listener()
    trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', trackers=[listener], log_every=1)
    result = trainer.train()
    average = torch.cat([p.flatten() for p in trainer.ema.params.values()]).tolist()
    return dict(lines=listener.lines, average=average, snapshots=len(list((config.run_dir/'averages').glob('*.pt'))), epochs=result['epochs_run'], run_dir=result['run_dir'],
                vals=sum('val/loss' in d for d in listener.lines), first=listener.lines[0]['train/loss'], rows=len(train), name=listener.run['run_name'], path=trainer.path)


# Field to another value, what else to set for both, and what then differs.
EFFECTS = {
    'arch': ('mlp', {}, 'first'),
    'flow': ('trigonometric', {}, 'first'),
    'dataset': ('1k', {}, 'rows'),
    'aug': ('mixup+noise', {}, 'first'),
    'size': ('base', {'arch': 'mlp', 'size': 'tiny'}, 'average'),
    'precond': ('unit', {'arch': 'mlp'}, 'first'),
    'net_dropout': (0.9, {'arch': 'mlp'}, 'average'),
    'cond': (True, {'arch': 'mlp'}, 'average'),
    'cond_dropout': (0.9, {'arch': 'mlp', 'cond': True}, 'average'),
    'weight_decay': (1., {}, 'average'),
    'ema_snapshots': (4, {'ema_snapshots': 2}, 'snapshots'),
    'epochs': (5, {}, 'epochs'),
    'batch_size': (50, {}, 'first'),
    'lr': (1e-3, {}, 'average'),
    'warmup_steps': (10, {}, 'average'),
    'ema_decay': (0.5, {'ema_warmup': False}, 'average'),
    'grad_clip': (1e-3, {}, 'average'),
    'patience': (1, {'min_delta': 1., 'epochs': 6}, 'epochs'),
    'min_delta': (1., {'patience': 6, 'epochs': 12, 'lr': 2e-2}, 'epochs'),
    'val_frequency': (2, {}, 'vals'),
    'seed': (7, {}, 'first'),
    'data_dir': ('b', {'stats_path': 'other.pt'}, 'first'),
    'checkpoint_dir': ('elsewhere', {}, 'run_dir'),
    'stats_path': ('other.pt', {}, 'first'),
    'time_law': ('logit-normal', {}, 'first'),
    'weighting': ('x1', {}, 'first'),
    'source': ('source.pt', {}, 'first'),
    'sigma': (0.5, {}, 'first'),
    'plan': ('entropic', {'flow': 'otcfm'}, 'first'),
    'ot_reg': (1., {'flow': 'otcfm', 'plan': 'entropic'}, 'first'),
    'ot_batch': (200, {'flow': 'otcfm'}, 'first'),
    'pairs': ('pairs-b.pt', {'flow': 'reflow', 'pairs': 'pairs-a.pt'}, 'first'),
    'mixup_share': (0.9, {'aug': 'mixup'}, 'first'),
    'noise_std': (0.5, {'aug': 'noise'}, 'first'),
    'dropout_p': (0.5, {'aug': 'dropout'}, 'first'),
    'ema_warmup': (False, {}, 'average'),
    'shorten_warmup': (False, {'warmup_steps': 500}, 'average'),
    'precision': ('bf16', {}, 'first'),
    'compile': ('on', {'compile': 'off'}, 'path'),
    'name': ('mine', {}, 'name'),
}
PATHS = {'data_dir', 'stats_path', 'pairs', 'source'}


def test_every_field_is_here():
    assert EFFECTS.keys() | {'group'} == {f.name for f in fields(TrainingConfig)}


@pytest.mark.parametrize('field', EFFECTS)
@pytest.mark.filterwarnings('ignore::flow_study.config.ProtocolWarning')
def test_field_has_an_effect(field, config, data, tmp_path):
    value, both, seen = EFFECTS[field]
    folders = {**dict.fromkeys(PATHS, data), 'checkpoint_dir': tmp_path}
    def placed(values): return {k: str(folders[k]/v) if k in folders else v for k, v in values.items()}
    base = config.replace(**placed(both))
    other = base.replace(**placed({field: value}))
    a, b = outcome(base), outcome(other)
    assert a[seen] != b[seen]
    again = outcome(base)
    assert again == a  # and without the change nothing differs


def test_group_is_the_group_in_wandb(config, tmp_path, monkeypatch):
    "The group of a run is what W&B groups by"
    monkeypatch.setenv('WANDB_MODE', 'offline')
    tracker = WandbTracker()
    tracker.start(dict(run_name='x', run_dir=str(tmp_path), config=config.replace(group='study-1').to_dict(), overrides={}))
    try: assert tracker.run.group == 'study-1'
    finally: tracker.run.finish()


def test_statistics_come_from_the_file(config, data):
    "What `stats_path` names is what rows are normalised by"
    train, *_ = load_all_splits('500', data/'other.pt', data/'a')
    raw = load_all_splits('500', data_dir=data/'a', return_normalized=False)[0]
    assert train.x.equal(raw.x) and train.stats.source == 'other'


def test_config_on_disk_is_the_config(config):
    run_dir = outcome(config)['run_dir']
    with open(f'{run_dir}/config.json') as f: assert TrainingConfig.from_dict(json.load(f)) == config
