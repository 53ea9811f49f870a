"""The real W&B: what it keeps, and that no trouble of its reaches the training.

Everything runs in processes of its own, offline unless a test says otherwise; the only server is one of this file."""
import base64
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from flow_study.checkpoint import read_checkpoint
from flow_study.data import make_splits, save_splits
from flow_study.rundir import read_metrics, read_status
from flow_study.tracking import WandbTracker

RUN = '--arch simple --flow icfm --dataset 1k --group a-group --data-dir {data} --checkpoint-dir runs --batch-size 16 --lr 1e-3 --warmup-steps 50 --name tracked --device cpu'

# The script with a tracker of one's own making, for what the command line cannot set.
SCRIPT = '''
import os, signal, sys
from flow_study.config import TrainingConfig
from flow_study.console import setup_logging
from flow_study.data import load_all_splits
from flow_study.device import set_seed
from flow_study.models import build_model
from flow_study.tracking import Tracker, WandbTracker
from flow_study.trainer import FlowTrainer
setup_logging()
set_seed(42)
config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='a-group', data_dir={data!r}, checkpoint_dir='runs', batch_size=16, lr=1e-3,
                        warmup_steps=50, name='tracked', epochs={epochs})
train, val, _ = load_all_splits(config.dataset, config.stats_path, config.data_dir)
def trainer(*trackers, model=None): return FlowTrainer(model or build_model(config, train), config, train, val, 'cpu', trackers=list(trackers))
'''


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A data folder: 800 rows of 32 numbers to train on, so that an epoch has 50 steps and 6 lines of metrics"
    folder, g = tmp_path_factory.mktemp('data'), torch.Generator().manual_seed(0)
    save_splits(make_splits(torch.randn(1200, 10, generator=g) @ torch.randn(10, 32, generator=g) + 0.3*torch.randn(1200, 32, generator=g), sizes=('1k',)), folder)
    return folder


class Home:
    "A working directory whose processes know nothing of W&B but what they are told"
    def __init__(self, path, data):
        self.path, self.data, self.run = path, data, path/'runs'/'tracked'
        (path/'home').mkdir()

    def env(self, **more):
        kept = {k: v for k, v in os.environ.items() if not k.startswith('WANDB') and k != 'NETRC'}
        return {**kept, 'HOME': str(self.path/'home'), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **more}

    def start(self, *args, **env):
        "A process with a group of its own, and nobody to answer it"
        return subprocess.Popen([sys.executable, *args], cwd=self.path, env=self.env(**env), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def finish(self, process, limit=60):
        "Exit code and what was printed; kills what does not end in time"
        try: out, err = process.communicate(timeout=limit)
        finally: process.kill()
        return process.returncode, out, err

    def train(self, options, epochs=2, limit=60, **env):
        run = [] if '--resume' in options else [*RUN.format(data=self.data).split(), '--epochs', str(epochs)]
        return self.finish(self.start('-m', 'flow_study.train', *run, *options.split(), **env), limit)

    def script(self, code, epochs=2, limit=60, **env):
        return self.finish(self.start('-c', SCRIPT.format(data=str(self.data), epochs=epochs) + code, **env), limit)


@pytest.fixture
def home(tmp_path, data): return Home(tmp_path, data)


def records(run, folders='offline-run-*'):
    "The records of each segment of a run, as W&B's own command reads them"
    files = sorted(run.glob(f'wandb/{folders}/*.wandb'))
    inspect = [sys.executable, '-m', 'wandb', 'leet', 'inspect', '--json']
    return [list(map(json.loads, subprocess.run([*inspect, f], capture_output=True, text=True, check=True).stdout.splitlines())) for f in map(str, files)]


def of(segment, kind): return [r[kind] for r in segment if r['type'] == kind]


def history(segment):
    "The metric lines of a segment, without what W&B adds to them"
    return [{k: v for k, v in h['item'].items() if k[0] != '_'} for h in of(segment, 'history')]


def summary(segment):
    res = {}
    for s in of(segment, 'summary'): res |= s.get('update', {})
    return res


def mirrored(run): return [{('global_step' if k == 'step' else k): v for k, v in line.items()} for line in read_metrics(run)[0]]


def complete(run, epochs=2, state='finished'):
    "That a run directory has all that it should have, whatever became of W&B"
    assert read_status(run)['state'] == state
    lines = read_metrics(run)[0]
    assert [d['step'] for d in lines if 'train/loss' in d] == list(range(10, 50*epochs + 1, 10))
    assert [d['epoch'] for d in lines if 'val/loss' in d] == list(range(1, epochs + 1))
    assert read_checkpoint(run/'last.pt')['progress']['step'] == 50*epochs and read_checkpoint(run/'best.pt')
    assert all((run/n).exists() for n in ('config.json', 'yardsticks.json')) and not (run/'lock').exists()


def warnings(out): return [line for line in out.splitlines() if 'W&B' in line or 'wandb' in line]


def nothing_of_its_own(out, err):
    "W&B has printed nothing of itself"
    assert err == '' and not any(line.lstrip().startswith('wandb:') for line in out.splitlines()), (out, err)


def children(pid, name):
    "Processes below a process, by the start of their name"
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: comm, _, rest = stat.read_text().partition('(')[2].rpartition(')')
        except OSError: continue
        if int(rest.split()[1]) == pid and comm.startswith(name): found.append(int(stat.parent.name))
    return found


def wait_for_lines(process, run, n, limit=30):
    "Wait until a run that is going on has so many metric lines"
    end = time.monotonic() + limit
    while len(read_metrics(run)[0]) < n:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope='module')
def offline(tmp_path_factory, data):
    "A run that W&B tracked offline, off protocol; with its output"
    home = Home(tmp_path_factory.mktemp('offline'), data)
    code, *printed = home.train('--wandb-mode offline --patience 10')
    assert code == 0, printed
    return home, *printed


# What is kept

def test_offline_run_equals_the_run_directory(offline):
    "Every number of every line, against an own step"
    home, out, err = offline
    complete(home.run)
    nothing_of_its_own(out, err)
    segment, = records(home.run)
    assert history(segment) == mirrored(home.run) and len(history(segment)) == 12
    assert all(math.isfinite(v) for line in history(segment) for v in line.values())


def test_offline_run_says_what_it_is(offline):
    home, *_ = offline
    segment, = records(home.run)
    run = of(segment, 'run')[0]
    assert (run['display_name'], run['run_group'], run['project'], run['tags']) == ('tracked', 'a-group', 'flow-matching-study', ['simple', 'icfm', '1k', 'none', 'off-protocol'])
    given = lambda config: {k: v for k, v in config.items() if k != '_wandb' and v is not None}  # W&B keeps only some fields that are None
    assert given(run['config']['update']) == given(json.loads((home.run/'config.json').read_text()))
    assert run['run_id'] == read_checkpoint(home.run/'last.pt')['trackers']['wandb']['id']
    assert of(segment, 'exit')[-1].get('exit_code', 0) == 0


def test_metrics_stand_against_the_global_step(offline):
    metrics = {m.get('name') or m.get('glob_name'): m for m in of(records(offline[0].run)[0], 'metric')}
    assert metrics['*']['step_metric'] == 'global_step' and metrics['global_step']['options']['hidden']
    for name in ('train/loss', 'train/epoch_loss', 'val/loss', 'val/raw_loss'):
        assert metrics[name]['step_metric'] == 'global_step' and metrics[name]['summary'] == {'min': True}


def test_summary(offline):
    home, *_ = offline
    got, status = summary(records(home.run)[0]), read_status(home.run)
    assert (got['final_epoch'], got['checkpoint_path']) == (2, 'runs/tracked/best.pt')
    assert (got['best_val_loss'], got['verdict']) == (status['best_val_loss'], status['verdict'])
    assert got['val/loss'] == {'min': min(d['val/loss'] for d in read_metrics(home.run)[0] if 'val/loss' in d)}


def test_artifact_is_a_reference_with_its_digest(offline):
    home, *_ = offline
    artifact, = of(records(home.run)[0], 'artifact')
    best = home.run/'best.pt'
    entry, = artifact['manifest']['contents']
    assert artifact['type'] == 'model' and entry['ref'] == best.as_uri() and int(entry['size']) == best.stat().st_size
    assert entry['digest'] == base64.b64encode(hashlib.md5(best.read_bytes()).digest()).decode()


def test_upload_takes_the_file(home):
    code, out, err = home.train('--wandb-mode offline --wandb-upload', epochs=1)
    assert code == 0
    nothing_of_its_own(out, err)
    artifact, = of(records(home.run)[0], 'artifact')
    entry, = artifact['manifest']['contents']
    staged = Path(entry['local_path'])
    assert 'ref' not in entry and staged.read_bytes() == (home.run/'best.pt').read_bytes()


def test_failed_run_has_its_tag_and_the_reason(home):
    code, out, err = home.script('''
import torch
class Doomed(torch.nn.Module):
    "NaN from the 60th step on"
    def __init__(self): super().__init__(); self.net, self.n = build_model(config, train), 0
    def forward(self, x, t):
        self.n += self.training
        return self.net(x, t)*(float('nan') if self.n > 60 else 1)
trainer(WandbTracker(mode='offline'), model=Doomed()).train()''')
    assert code == 1 and 'NonFiniteError' in err
    assert read_status(home.run)['state'] == 'failed'
    segment, = records(home.run)
    run = of(segment, 'run')[-1]
    assert run['tags'][-1] == 'failed' and 'not finite at step' in run['notes'] and run['notes'] == read_status(home.run)['reason']
    assert of(segment, 'exit')[-1]['exit_code'] == 1 and of(segment, 'artifact') == []


def test_resumed_run_keeps_its_id_and_its_segments(home):
    "Interrupted by SIGTERM, to the whole group as a terminal or a scheduler sends it"
    process = home.start('-m', 'flow_study.train', *RUN.format(data=home.data).split(), '--epochs', '10', '--wandb-mode', 'offline')
    wait_for_lines(process, home.run, 9)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = home.finish(process)
    assert code == 143 and read_status(home.run)['state'] == 'interrupted'
    nothing_of_its_own(out, err)
    code, out, err = home.train('--resume tracked --checkpoint-dir runs --device cpu --wandb-mode offline')
    assert code == 0, err
    complete(home.run, epochs=10)
    first, second = records(home.run)
    assert of(first, 'run')[0]['run_id'] == of(second, 'run')[0]['run_id']
    assert len(history(first)) >= 9 and history(first) + history(second) == mirrored(home.run)
    assert summary(second)['final_epoch'] == 10 and of(first, 'artifact') == []


# What goes wrong

def test_no_key_and_no_terminal(home):
    code, out, err = home.train('')
    assert code == 0
    nothing_of_its_own(out, err)
    assert [line for line in warnings(out)] == ['W&B: no key found, so this run is tracked offline (`wandb login` for online, `--wandb-mode disabled` for neither)']
    complete(home.run)
    assert len(records(home.run)) == 1


def test_no_key_on_a_terminal_is_no_prompt(home):
    "A pseudo-terminal that nobody types on"
    pty = pytest.importorskip('pty')
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, '-c', 'from flow_study.tracking import wandb_mode; print(wandb_mode())'],
                               cwd=home.path, env=home.env(), stdin=slave, stdout=slave, stderr=slave)
    try: assert process.wait(timeout=30) == 0
    finally: process.kill()
    os.close(slave)
    assert os.read(master, 1000).decode().split() == ['offline']


@pytest.mark.parametrize('how', ['environment', 'netrc', 'netrc of an own server', 'settings file', 'a bad one', 'none'])
def test_key_is_found_where_wandb_looks(home, how):
    key, env, expected = 'a'*40, {}, 'online'
    if how == 'environment': env['WANDB_API_KEY'] = key
    if how == 'netrc': (home.path/'home'/'.netrc').write_text(f'machine api.wandb.ai\n  login user\n  password {key}\n')
    if how == 'netrc of an own server':
        (home.path/'home'/'.netrc').write_text(f'machine localhost:8080\n  login user\n  password {key}\n')
        env['WANDB_BASE_URL'] = 'http://localhost:8080'
    if how == 'settings file':
        (home.path/'home'/'.netrc').write_text(f'machine wandb.example.com\n  login user\n  password {key}\n')
        (home.path/'home'/'.config'/'wandb').mkdir(parents=True)
        (home.path/'home'/'.config'/'wandb'/'settings').write_text('[default]\nbase_url = https://wandb.example.com\n')
    if how == 'a bad one': env['WANDB_API_KEY'], expected = 'short', 'offline'
    if how == 'none': expected = 'offline'
    code, out, err = home.finish(home.start('-c', 'from flow_study.tracking import wandb_mode; print(wandb_mode())', **env))
    assert (code, out, err) == (0, f'{expected}\n', '')


class Hanging:
    "A server on this machine that accepts, and never answers"
    def __enter__(self):
        self.socket, self.held = socket.create_server(('127.0.0.1', 0)), []
        threading.Thread(target=self.accept, daemon=True).start()
        return f'http://127.0.0.1:{self.socket.getsockname()[1]}'

    def accept(self):
        try:
            while True: self.held.append(self.socket.accept()[0])
        except OSError: pass

    def __exit__(self, *_):
        for s in (self.socket, *self.held): s.close()


def test_server_that_hangs(home):
    "The time limits are said, the rest is a run that is tracked offline"
    began = time.monotonic()
    with Hanging() as url:
        code, out, err = home.script("print(trainer(WandbTracker(mode='online', timeout=3.)).train()['state'])", WANDB_BASE_URL=url, WANDB_API_KEY='a'*40)
    assert code == 0 and out.splitlines()[-1] == 'finished'
    assert time.monotonic() - began < 3*3 + 12
    nothing_of_its_own(out, err)
    warning, = warnings(out)
    assert warning.startswith('W&B cannot be reached (') and warning.endswith('this run is tracked offline')
    complete(home.run)
    assert history(records(home.run)[-1]) == mirrored(home.run)


class Silenced(ThreadingHTTPServer):
    "A server that knows enough of W&B to begin a run, and then never answers again; `asked` holds what it was asked to begin"
    daemon_threads, block_on_close = True, False

    def __init__(self): super().__init__(('127.0.0.1', 0), Silenced.Handler); self.asked, self.over = {}, threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_): self.over.set(); self.shutdown(); self.server_close()
    def handle_error(self, *_): pass

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        bucket = dict(id='x', name='x', displayName='x', config='{}', project=dict(id='p', name='p', entity=dict(id='e', name='e')))
        answers = dict(RunResumeStatus=dict(model=None), UpsertBucket=dict(upsertBucket=dict(bucket=bucket, inserted=True)))

        def do_POST(self):
            body = self.rfile.read(int(self.headers['Content-Length']))
            query = json.loads(body) if self.path == '/graphql' else {}
            what = query.get('operationName')
            if what not in self.answers: return self.server.over.wait()
            self.server.asked.setdefault(what, query['variables'])
            answer = json.dumps(dict(data=self.answers[what])).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_): pass


def test_server_that_falls_silent(home):
    "Online as far as the run can see; what could not be sent stays, for `wandb sync`"
    began = time.monotonic()
    with Silenced() as server:
        code, out, err = home.script("print(trainer(WandbTracker(timeout=3.)).train()['state'])", WANDB_BASE_URL=f'http://127.0.0.1:{server.server_port}', WANDB_API_KEY='a'*40)
    assert code == 0 and out.splitlines()[-1] == 'finished', (out, err)
    assert time.monotonic() - began < 3*3 + 12
    nothing_of_its_own(out, err)
    assert warnings(out) == ['wandb stopped tracking at finish: TimeoutError: Timed out finishing run. Training goes on, the run directory is complete']
    asked = server.asked['UpsertBucket']
    assert (asked['displayName'], asked['groupName'], asked['project']) == ('tracked', 'a-group', 'flow-matching-study')
    assert server.asked['RunResumeStatus']['name'] == asked['name'] == read_checkpoint(home.run/'last.pt')['trackers']['wandb']['id']
    complete(home.run)
    assert history(records(home.run, 'run-*')[0]) == mirrored(home.run)


def test_no_network(home):
    "A port where nobody listens"
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    code, out, err = home.script("trainer(WandbTracker(mode='online', timeout=3.)).train()", epochs=1, WANDB_BASE_URL=f'http://127.0.0.1:{port}', WANDB_API_KEY='a'*40)
    assert code == 0 and len(warnings(out)) == 1
    nothing_of_its_own(out, err)
    complete(home.run, epochs=1)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc to find the service of W&B')
def test_service_that_is_killed(home):
    process = home.start('-m', 'flow_study.train', *RUN.format(data=home.data).split(), '--epochs', '10', '--wandb-mode', 'offline')
    wait_for_lines(process, home.run, 9)
    service, = children(process.pid, 'wandb-core')
    os.kill(service, signal.SIGKILL)
    code, out, err = home.finish(process)
    assert code == 0, (out, err)
    warning, = warnings(out)
    assert warning.startswith('wandb stopped tracking at log: ') and warning.endswith('the run directory is complete')
    nothing_of_its_own(out, err)
    complete(home.run, epochs=10)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can mount a small disk')
def test_disk_of_wandb_is_full(home):
    "A disk of 64 kB at the folder of W&B, and there only; W&B says nothing of it, so what counts is the run directory"
    mounted = home.run/'wandb'
    code = '''
import subprocess
class SmallDisk(Tracker):
    name = 'small disk'
    def start(self, run):
        os.mkdir(run['run_dir'] + '/wandb')
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', run['run_dir'] + '/wandb']).returncode: sys.exit(77)
print(trainer(SmallDisk(), WandbTracker(mode='offline')).train()['state'])'''
    try:
        code, out, err = home.script(code, epochs=20)
        if code == 77: pytest.skip(f'nothing can be mounted here: {err}')
        disk = os.statvfs(mounted)
        assert disk.f_blocks*disk.f_frsize == 65536 and disk.f_bavail <= 1, 'the disk did not fill up'
    finally: subprocess.run(['umount', mounted], capture_output=True)
    assert code == 0 and out.splitlines()[-1] == 'finished', (out, err)
    complete(home.run, epochs=20)


# What is switched off or wrong

def test_disabled_leaves_no_trace(home):
    code, out, err = home.train('--wandb-mode disabled', epochs=1)
    assert (code, err, warnings(out)) == (0, '', [])
    complete(home.run, epochs=1)
    assert not (home.run/'wandb').exists() and not (home.path/'home'/'.cache').exists() and not (home.path/'wandb').exists()


def test_bad_mode_is_refused(home):
    code, out, err = home.train('--wandb-mode of-line')
    assert code == 2 and 'of-line' in err and 'offline' in err and not (home.path/'runs').exists()
    with pytest.raises(ValueError, match="wandb mode='of-line'.*offline"): WandbTracker(mode='of-line')
