"""How long the threads of an operation should spin for each other: a training run alone, and beside a process that keeps one core busy.

    python benchmarks/shared_cores.py               # two threads, as many as the cores of a small machine

Whole commands, the variants one after the other in each round; medians over the rounds, in seconds.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from flow_study.corpus import build_corpus

VARIANTS = {'as it comes': {}, 'spins 30,000': dict(GOMP_SPINCOUNT='30000'), 'spins 5,000': dict(GOMP_SPINCOUNT='5000'),
            'spins 300': dict(GOMP_SPINCOUNT='300'), 'one thread': dict(OMP_NUM_THREADS='1')}
TRAIN = 'from flow_study.train import _run, parse_args; import sys; _run(parse_args(sys.argv[1:]))'  # without what `main` sets


def seconds(folder, name, env, epochs):
    "One run of the training script"
    options = f'--arch mlp --flow icfm --dataset 1k --group g --device cpu --patience 1000 --epochs {epochs}'.split() + ['--name', name]
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_'))} | dict(WANDB_MODE='disabled') | env
    start = time.monotonic()
    subprocess.run([sys.executable, '-Wignore', '-c', TRAIN, *options], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--threads', type=int, default=2)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build_corpus(f'{folder}/study/datasets', sizes=('1k',))
        for load in ('alone', 'beside a busy process'):
            busy = subprocess.Popen([sys.executable, '-c', 'while True: pass']) if load != 'alone' else None
            try:
                found = {v: [] for v in VARIANTS}
                for r in range(args.rounds):
                    for v, env in VARIANTS.items():
                        found[v].append(seconds(folder, f'{load}-{v}-{r}'.translate(str.maketrans(' ', '-', ',')), dict(OMP_NUM_THREADS=str(args.threads)) | env, args.epochs))
            finally:
                if busy: busy.kill()
            for v, s in found.items(): print(f'{load:24}{v:16}{statistics.median(s):8.1f}  ({min(s):.1f} to {max(s):.1f})', flush=True)


if __name__ == '__main__': main()
