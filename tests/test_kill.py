"""A training process killed at random moments, resumed each time, ends as if nobody had killed it.

The campaign of `benchmarks/kill_campaign.py`, small; there hundreds of kills can be had."""
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1]/'benchmarks'/'kill_campaign.py'
KILLS = 6


@pytest.fixture(scope='module')
def tool():
    "The campaign as a module"
    spec = spec_from_file_location('kill_campaign', PATH)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('kills')


@pytest.fixture(scope='module')
def tally(tool, work): return tool.campaign(work, KILLS, seed=1, per_chain=KILLS)


def test_kill_9_at_any_moment_loses_nothing(tally, tool):
    print(tool.report(tally, 0))
    assert tally.lost == []
    assert tally.kills == KILLS
    assert tally.completed == tally.identical >= 1
    assert tally.resumes + tally.anew == KILLS


def test_the_campaign_sees_a_difference(tally, tool, work):
    "Else it could find none: one bit of a weight, one number of a metric line, a checkpoint cut short"
    reference, other = work/'reference', work/'chain-1'
    assert tool.compare(other, reference) == []
    state = tool.read_checkpoint(reference/'runs'/tool.RUN/'last.pt')
    changed = tool.read_checkpoint(reference/'runs'/tool.RUN/'last.pt')
    weight = changed['model']['layers.0.weight']
    weight.view(tool.torch.int32)[0, 0] ^= 1
    assert tool.differences(state, changed) == ['/model/layers.0.weight']
    metrics = other/'runs'/tool.RUN/'metrics.jsonl'
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(''.join(lines[:-1]))
    assert 'metrics.jsonl' in tool.compare(other, reference)[0]
    last = other/'runs'/tool.RUN/'last.pt'
    last.write_bytes(last.read_bytes()[:-100])
    assert 'checksum' in tool.compare_if_there(other, reference)[0]
