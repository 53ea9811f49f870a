"""`flow_study_runs` as its users meet it: a process over a folder of run directories."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flow_study.checkpoint import save_checkpoint
from flow_study.rundir import RunDir
from flow_study.runs import list_runs, prune_runs

SCRIPT = [sys.executable, '-c', 'import sys; from flow_study.runs import main; sys.exit(main())']


def flow_study_runs(*args, cwd):
    "Exit code, standard output and standard error of the script"
    run = subprocess.run([*SCRIPT, *args], cwd=cwd, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stdout, run.stderr


def make_run(path, state='finished', step=100, run_name=None, good=True):
    "A run directory with a small checkpoint, and with a damaged one where it shall not be good"
    run = RunDir.create(path)
    run.set_status(state=state, run_name=run_name or path.name.partition('.archived-')[0], epochs=40, epoch=10, best_val_loss=1.25, verdict='fine')
    save_checkpoint(path/'last.pt', model=torch.nn.Linear(4, 4), progress=dict(step=step))
    if not good: os.truncate(path/'last.pt', (path/'last.pt').stat().st_size - 1)
    run.close()
    return path


@pytest.fixture
def runs(tmp_path):
    "A run with two archived directories, in the default place"
    folder = tmp_path/'study'/'checkpoints'
    for name in ('mlp', 'mlp.archived-1', 'mlp.archived-2'): make_run(folder/name)
    return folder


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_table_in_the_default_place(runs, tmp_path):
    code, out, err = flow_study_runs(cwd=tmp_path)
    assert (code, err) == (0, '')
    head, *rows = out.splitlines()
    assert head.split() == ['run', 'state', 'epoch', 'best', 'size', 'verdict']
    assert [r.split()[0] for r in rows] == ['mlp', 'mlp.archived-2', 'mlp.archived-1']
    assert rows[0].split()[1:4] == ['finished', '10/40', '1.2500'] and rows[0].endswith('fine')
    assert len({r.index('finished') for r in rows}) == 1


def test_json(runs, tmp_path):
    code, out, err = flow_study_runs('--json', '--checkpoint-dir', str(runs), cwd=tmp_path)
    rows = json.loads(out)
    assert (code, err) == (0, '')
    assert [(r['name'], r['archived'], r['run']) for r in rows] == [('mlp', False, 'mlp'), ('mlp.archived-2', True, 'mlp'), ('mlp.archived-1', True, 'mlp')]
    assert rows[0]['bytes'] == sum(p.stat().st_size for p in (runs/'mlp').rglob('*') if p.is_file())


def test_prune_asks_first(runs, tmp_path):
    code, out, err = flow_study_runs('--prune', cwd=tmp_path)
    assert (code, err) == (0, '') and out.count('would be removed') == 3 and '--prune --yes' in out
    assert names(runs) == ['mlp', 'mlp.archived-1', 'mlp.archived-2']


def test_prune(runs, tmp_path):
    code, out, err = flow_study_runs('--prune', '--keep', '1', '--yes', cwd=tmp_path)
    assert (code, err) == (0, '') and '1 removed' in out
    assert names(runs) == ['mlp', 'mlp.archived-2']
    assert flow_study_runs('--prune', '--yes', cwd=tmp_path)[0] == 0
    assert names(runs) == ['mlp']
    assert flow_study_runs('--prune', '--yes', cwd=tmp_path)[1].strip() == 'no archived directories in study/checkpoints'


@pytest.mark.parametrize('current', ['damaged', 'just begun', 'gone'])
def test_the_last_good_checkpoint_stays(runs, tmp_path, current):
    if current == 'gone': shutil.rmtree(runs/'mlp')
    else:
        shutil.rmtree(runs/'mlp')
        make_run(runs/'mlp', good=current != 'damaged', step=0 if current == 'just begun' else 100)
    make_run(runs/'mlp.archived-3', good=False)
    code, out, err = flow_study_runs('--prune', '--yes', cwd=tmp_path)
    assert (code, err) == (0, '') and 'kept: the last good checkpoint of this run' in out
    assert [n for n in names(runs) if 'archived' in n] == ['mlp.archived-2']


def test_no_good_checkpoint_anywhere(tmp_path):
    for name in ('mlp', 'mlp.archived-1'): make_run(tmp_path/name, good=False)
    assert [r['fate'] for r in prune_runs(tmp_path, yes=True)] == ['removed']


def test_a_live_lock_protects_a_stale_one_does_not(runs, tmp_path):
    "Held by another process, which then is killed"
    code = f'import time; from flow_study.rundir import RunDir; RunDir.resume({str(runs/"mlp.archived-1")!r}); print(1, flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            out = flow_study_runs('--prune', '--yes', cwd=tmp_path)[1]
            assert 'kept: in use' in out and names(runs) == ['mlp', 'mlp.archived-1']
        finally: holder.send_signal(signal.SIGKILL)
    assert prune_runs(runs, yes=True)[0]['fate'] == 'removed'


def test_links_are_not_followed(runs, tmp_path):
    outside = make_run(tmp_path/'outside'/'mlp.archived-7')
    (runs/'mlp.archived-7').symlink_to(outside)
    (runs/'mlp.archived-1'/'more').symlink_to(tmp_path/'outside')
    rows = prune_runs(runs, yes=True)
    assert {r['name']: r['fate'] for r in rows} == {'mlp.archived-1': 'removed', 'mlp.archived-2': 'removed'}
    assert (outside/'last.pt').exists() and (runs/'mlp.archived-7').is_symlink()


def test_a_run_that_is_called_like_an_archive_is_none(tmp_path):
    make_run(tmp_path/'mlp.archived-1', run_name='mlp.archived-1')
    assert prune_runs(tmp_path, yes=True) == [] and [r['archived'] for r in list_runs(tmp_path)] == [False]


def test_other_folders_are_none_of_its_business(runs, tmp_path):
    (runs/'mlp.archived-9').mkdir()
    (runs/'mlp.archived-9'/'thesis.txt').write_text('precious')
    prune_runs(runs, yes=True)
    assert (runs/'mlp.archived-9'/'thesis.txt').exists()


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may remove everything')
def test_what_cannot_be_removed_is_said(runs, tmp_path):
    (runs/'mlp.archived-1').chmod(0o500)
    try: code, out, err = flow_study_runs('--prune', '--yes', cwd=tmp_path)
    finally: (runs/'mlp.archived-1').chmod(0o700)
    assert code == 1 and 'not removed' in out


@pytest.mark.parametrize('options, words', [
    (['--yes'], 'belong to --prune'), (['--keep', '1'], 'belong to --prune'), (['--prune', '--keep', '-1'], 'at least 0'),
    (['--prun'], "Did you mean '--prune'"), (['--checkpoint-dir', 'nowhere'], 'nowhere')])
def test_bad_options(tmp_path, options, words):
    code, out, err = flow_study_runs(*options, cwd=tmp_path)
    assert (code, out, err.count('\n')) == (2, '', 1) and err.startswith('flow_study_runs: error: ') and words in err


def test_nothing_there(tmp_path):
    assert flow_study_runs('--checkpoint-dir', '.', cwd=tmp_path)[:2] == (0, 'no runs in .\n')


def test_hostile_names_stay_on_their_line(tmp_path):
    make_run(tmp_path/'a\x1b[31m\nb')
    out = flow_study_runs('--checkpoint-dir', '.', cwd=tmp_path)[1]
    assert len(out.splitlines()) == 2 and '\x1b' not in out


def test_damaged_files_do_not_stop_the_list(runs):
    (runs/'mlp'/'status.json').write_text('{"state": "fin')
    (runs/'mlp.archived-1'/'status.json').write_text('[]')
    (runs/'mlp.archived-2'/'metrics.jsonl').write_text('{"epo')
    assert {r['name']: r['state'] for r in list_runs(runs)} == {'mlp': 'unknown', 'mlp.archived-1': 'unknown', 'mlp.archived-2': 'finished'}


def test_two_hundred_runs_are_listed_without_torch(tmp_path):
    make_run(tmp_path/'one')
    for n in range(200): shutil.copytree(tmp_path/'one', tmp_path/'runs'/f'run-{n}')
    code = "import sys; from flow_study.runs import main; main(['--checkpoint-dir', 'runs']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) == 202 and out.splitlines()[-1] == 'False'
