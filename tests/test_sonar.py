"""Real SONAR sentence embeddings: the known numbers, and a run on them. Skipped where the files are not."""
import json
import subprocess
import sys

import pytest
import torch

from flow_study.checkpoint import load_model
from flow_study.closed_form import ValidationBank, held_out_loss, yardsticks
from flow_study.data import load_all_splits
from flow_study.paths import create_flow
from flow_study.rundir import read_metrics, read_status


@pytest.fixture(scope='module')
def splits(sonar): return load_all_splits('1k', data_dir=sonar)


def test_files_are_read_as_they_are(splits):
    train, val, test = splits
    assert [len(s) for s in splits] == [800, 100, 100] and train.dim == 1024
    assert train.stats.source == '10k_train' and isinstance(train.texts[0], str)
    assert abs(train.x.mean()) < 0.01 and abs(train.x.var() - 1) < 0.02


def test_yardsticks_are_the_known_ones(splits):
    "Zero 2.01, unit Gaussian 1.58, shrunk Gaussian 1.11 to 1.12, memoriser in the hundreds or more"
    ys = yardsticks(*splits[:2])
    assert ys['zero'].mean == pytest.approx(2.01, abs=0.01)
    assert ys['unit_gaussian'].mean == pytest.approx(1.58, abs=0.01)
    assert 1.105 < ys['shrunk_gaussian'].mean < 1.125
    assert ys['memoriser'].mean > 200


def test_held_out_rows_decide_nothing(splits):
    "Other validation rows leave everything that was fitted as it was"
    from flow_study.closed_form import ShrunkGaussianVelocity
    a, b = (ShrunkGaussianVelocity.fit(splits[0].x) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(a.buffers(), b.buffers()))
    assert a.shrinkage == yardsticks(splits[0], splits[2]).shrinkage == yardsticks(splits[0], splits[1]).shrinkage


@pytest.fixture(scope='module')
def run(sonar, tmp_path_factory):
    "The command of the issue, twice, shortened to 12 epochs"
    folder = tmp_path_factory.mktemp('sonar')
    command = [sys.executable, '-m', 'flow_study.train', *'--arch mlp --flow icfm --dataset 1k --group demo --epochs 12 --lr 1e-3 --wandb-mode disabled --device cpu'.split()]
    outs = [subprocess.run([*command, '--data-dir', str(sonar)], cwd=folder, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    return folder/'study'/'checkpoints'/'mlp-icfm-1k-none', outs


def test_a_line_for_every_epoch_and_a_verdict(run):
    folder, outs = run
    assert [d['epoch'] for d in read_metrics(folder)[0] if 'val/loss' in d] == list(range(1, 13))
    assert outs[0].splitlines()[-1].startswith('Verdict: ')
    assert read_status(folder)['state'] == 'finished' and read_status(folder)['stats_source'] == '10k_train'


def test_the_same_command_twice_gives_the_same_numbers(run):
    folder, _ = run
    timeless = lambda p: [{k: v for k, v in d.items() if not k.startswith('time/')} for d in read_metrics(p)[0]]
    assert timeless(folder) == timeless(folder.with_name(folder.name + '.archived-1'))
    a, b = (torch.load(p/'best.pt', weights_only=True) for p in (folder, folder.with_name(folder.name + '.archived-1')))
    assert all(a['ema']['params'][k].equal(v) for k, v in b['ema']['params'].items())


def test_best_is_what_was_validated(run, splits):
    folder, _ = run
    best = min(d['val/loss'] for d in read_metrics(folder)[0] if 'val/loss' in d)
    torch.set_num_threads(1)
    assert held_out_loss(load_model(folder), ValidationBank(splits[1], create_flow('icfm'))).mean == pytest.approx(best, abs=1e-6)
    assert json.loads((folder/'yardsticks.json').read_text())['zero']['loss'] == pytest.approx(2.01, abs=0.01)
