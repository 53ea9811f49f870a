"""What the tests of `FAULTS.md` share: the training script in a process and in this one, and the comparison of two runs."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

OPTIONS = '--arch simple --flow icfm --dataset 1k --group faults --batch-size 32 --lr 3e-3 --warmup-steps 20 --device cpu'.split()
LONG = [*OPTIONS, '--epochs', '100000', '--patience', '100000', '--compile', 'off'] # Runs until somebody stops it
RUN = Path('study/checkpoints/simple-icfm-1k-none') # Where it lies, seen from the folder of the data
ENV = dict(WANDB_MODE='disabled', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONUNBUFFERED='1')


def until(condition, seconds=60, every=0.005):
    "Ask again and again until the answer is true; give it"
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f'not within {seconds} s'
        time.sleep(every)
    return answer


class Script:
    "The training script, or another, in a process of its own"
    def __init__(self, *options, script=('-m', 'flow_study.train'), **env):
        self.out, self.err = (open(f'{time.monotonic_ns()}.{k}', 'w+') for k in ('out', 'err'))
        env = {k: v for k, v in {**os.environ, **ENV, **env}.items() if v is not None}
        self.process = subprocess.Popen([sys.executable, *script, *map(str, options)], stdout=self.out, stderr=self.err, env=env)
        self.pid = self.process.pid

    def until(self, condition, seconds=60, every=0.005):
        "Wait until a condition holds; the process must live that long"
        def look():
            assert self.process.poll() is None, f'ended early: {self.said()}'
            return condition()
        return until(look, seconds, every)

    def said(self): return tuple(Path(f.name).read_text() for f in (self.out, self.err))
    def printed(self, text): return self.until(lambda: text in self.said()[0])
    def send(self, number=signal.SIGTERM): self.process.send_signal(number)

    def end(self, seconds=60):
        "Exit code, standard output and standard error"
        code = self.process.wait(seconds)
        return code, *self.said()

    def close(self):
        if self.process.poll() is None: self.process.kill()
        self.process.wait()
        for f in (self.out, self.err): f.close()


def lines(run):
    "All metric lines of a run, without the times"
    return [{k: v for k, v in json.loads(l).items() if not k.startswith('time/')} for l in (Path(run)/'metrics.jsonl').read_text().splitlines()]


def in_epoch(run, n):
    "Whether the metrics of `n` epochs are written: the run is in the next one"
    path = Path(run)/'metrics.jsonl'
    return path.exists() and path.read_text().count('"train/epoch_loss"') >= n


def same_state(a, b):
    "Whether two checkpoints hold the same bits, but for times and names"
    from flow_study.checkpoint import read_checkpoint
    def flat(o):
        return [x for v in (o.values() if isinstance(o, dict) else o) for x in flat(v)] if isinstance(o, (dict, list, tuple)) else [o]
    def parts(path):
        state = read_checkpoint(path)
        progress = {k: v for k, v in state['progress'].items() if k not in ('elapsed', 'epoch_line')}
        return flat([progress, *(state[k] for k in ('model', 'ema', 'optimizer', 'scheduler', 'early_stopping', 'stats', 'data'))])
    return all(x.equal(y) if hasattr(x, 'equal') else x == y or x != x and y != y for x, y in zip(parts(a), parts(b), strict=True))


def files(folder):
    "Name and content of every file, to see whether anything changed"
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


def one_line(err): return len(err.strip().splitlines()) == 1 and 'Traceback' not in err
