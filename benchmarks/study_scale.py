"""What a study costs beside its runs: many short runs with the local engine and with the engine ray on 1, 2 and 3 nodes of this
machine, and what a run leaves in memory and on the disk, carried forward to 100,000 runs on paper.

    python benchmarks/study_scale.py [--runs 400] [--nodes 1,2,3] [--epochs 25] [--out benchmarks/study_scale.json]

A node is a process of Ray with one slot; the local engine has as many slots. Overhead is what a slot does beside a run's own
seconds (training and evaluation, measured in the run's process): slots x wall time / runs - seconds of a run. Processor seconds count everything, Ray's own processes too,
and hold on a machine that is busy with other things. Starting the cluster is not counted, starting the workers' fork servers is: a first batch pays it, and is told apart.
"""
import argparse, json, os, pickle, secrets, shutil, sys, tempfile, time, tracemalloc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', WANDB_MODE='disabled', CUDA_VISIBLE_DEVICES='', RAY_USAGE_STATS_ENABLED='0', RAY_AUTH_MODE='token')
os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))

import torch

from flow_study.config import TrainingConfig
from flow_study.data import make_splits, save_splits
from flow_study.draws import keyed_generator
from flow_study.engines import Job, carry_out, create_engine, run_state
from flow_study.rundir import read_status
from flow_study.study import Study, _Progress

TICKS = os.sysconf('SC_CLK_TCK')
OPTIONS = dict(device='cpu', wandb_mode='disabled')
EVALUATION = dict(n=100, steps=3, draws=20, nfe_steps=(3,))


def jobs(n, folder, epochs, first=0):
    "Runs that differ by their seeds"
    config = lambda s: TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='scale', epochs=epochs, batch_size=128, lr=1e-2, warmup_steps=5, seed=s, checkpoint_dir=folder)
    return [Job(config(s).to_dict(), EVALUATION, options=OPTIONS) for s in range(first, first + n)]


class Processor:
    """Seconds used by this process and all below it since it was made. A process that has ended is known by when it was last looked at; what it used
    after that is in the children's time of its parent, if that has waited for it (the raylets of Ray do not wait for their workers, fork servers wait for their runs)"""
    def __init__(self):
        self.seen = {} # (number, start) to parent, own time, time of children waited for
        self.begun = self.look()

    def look(self):
        stats = {}
        for p in Path('/proc').iterdir():
            if not p.name.isdecimal(): continue
            try: stats[int(p.name)] = (p/'stat').read_text().rpartition(')')[2].split()
            except OSError: pass
        below, key = {os.getpid()}, lambda p: (p, stats[p][19])
        while new := {p for p, s in stats.items() if int(s[1]) in below} - below: below |= new
        now = {key(p): (int(stats[p][1]), sum(map(int, stats[p][11:13])), sum(map(int, stats[p][13:15]))) for p in below}
        self.seen |= now
        counted = Counter() # of those that have ended, by parent
        for k, (parent, own, children) in self.seen.items():
            if k not in now: counted[parent] += own + children
        return sum(own + max(0, children - counted[k[0]]) for k, (_, own, children) in self.seen.items())/TICKS

    def seconds(self): return self.look() - self.begun


def measured(engine, slots, batch):
    "Seconds for a batch of jobs, and what is over"
    begun, processor, looked = time.monotonic(), Processor(), 0.
    codes = Counter()
    for event in engine.execute(batch):
        if time.monotonic() > looked + 0.5:
            processor.look()
            looked = time.monotonic()
        if event is None: continue
        codes[event[1]] += 1
        wall, used = time.monotonic() - begun, processor.seconds() # the workers end with the call
    assert codes == {0: len(batch)}, codes
    own = [read_status(j.run_dir)['elapsed_seconds'] for j in batch]
    return dict(runs=len(batch), slots=slots, wall_seconds=round(wall, 2), training_seconds=round(sum(own)/len(own), 3), slot_seconds_a_run=round(slots*wall/len(batch), 3),
                processor_seconds_a_run=round(used/len(batch), 3))


@contextmanager
def cluster(nodes):
    "A head without processors and some nodes with one each"
    from ray.cluster_utils import Cluster
    from flow_study.ray_engine import _import_ray, _on_loopback
    os.environ['RAY_TMPDIR'] = folder = tempfile.mkdtemp(prefix='rs-', dir='/tmp')
    (Path(folder)/'ray').mkdir()
    ray, small = _import_ray(), dict(object_store_memory=80_000_000, include_log_monitor=False, include_dashboard=False)
    with _on_loopback():
        c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, no_monitor=True, **small))
        for _ in range(nodes): c.add_node(num_cpus=1, wait=False, **small)
        c.wait_for_nodes()
        ray.init(address=c.address, log_to_driver=False, logging_level='ERROR') # stays over several calls, so that the second finds its workers warm
        try: yield c.address
        finally:
            ray.shutdown()
            c.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def compared(args):
    "The engines, one after the other for each number of nodes"
    for n in args.nodes:
        engine = create_engine('local', workers=n, device='cpu')
        for name, count in (('first', 2*n), ('then', args.runs)):
            yield dict(engine='local', nodes=n, batch=name) | measured(engine, n, jobs(count, f'local-{n}-{name}', args.epochs))
        with cluster(n):
            for bring_back in (False, True):
                engine = create_engine('ray', address='auto', bring_back=bring_back, device='cpu')
                for name, count in (('first', 2*n), ('then', args.runs)):
                    yield dict(engine='ray, brought back' if bring_back else 'ray, in place', nodes=n, batch=name) | measured(engine, n, jobs(count, f'ray-{n}-{bring_back}-{name}', args.epochs))


def system_calls(job):
    "Files that a run opens, makes, renames and removes, as Python reports them"
    counts, on = Counter(), [True]
    watched = {'open': 'open', 'os.mkdir': 'make', 'os.rename': 'rename', 'os.remove': 'remove', 'os.rmdir': 'remove', 'os.scandir': 'list', 'os.listdir': 'list', 'os.utime': 'touch'}
    folder = str(job.run_dir)
    def hook(event, given):
        if on[0] and event in watched and given and folder in str(given[0]): counts[watched[event]] += 1
    sys.addaudithook(hook)
    assert carry_out(job) == 0
    on[0] = False
    return dict(counts)


def footprint(args):
    "What one run leaves behind, and what the driver keeps and does for it"
    n, epochs = 200, args.epochs
    some = jobs(1, 'footprint', epochs)
    torch.set_num_threads(1)
    calls = system_calls(some[0])
    files = [p for p in some[0].run_dir.rglob('*') if p.is_file()]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    many = Study('scale', dict(arch='simple', flow='icfm', dataset='1k', epochs=epochs, batch_size=128, lr=1e-2, warmup_steps=5, checkpoint_dir='paper'), seeds=n, evaluation={k: v for k, v in EVALUATION.items()},
                 options=OPTIONS)
    handed = [many.job(c) for c in many.configs]
    job_bytes = (tracemalloc.get_traced_memory()[0] - before)/n
    for c in many.configs: shutil.copytree(some[0].run_dir, c.run_dir)
    for j in handed: (j.run_dir/'config.json').write_text(json.dumps(j.config))
    before = tracemalloc.get_traced_memory()[0]
    results = many.results()
    row_bytes = (tracemalloc.get_traced_memory()[0] - before)/n
    tracemalloc.stop()
    clock = lambda f: (begun := time.process_time(), f(), time.process_time() - begun)[2]/n
    look = clock(lambda: [run_state(j) for j in handed])
    rows = clock(lambda: many.results())
    many.report_dir.mkdir(parents=True)
    progress = _Progress(many, handed)
    write = clock(lambda: [progress.write('running') for _ in range(10)])/10
    return dict(directory_bytes=sum(p.stat().st_size for p in files), files=len(files), calls=calls, pickled_job_bytes=len(pickle.dumps(handed[0])), job_bytes=round(job_bytes), row_bytes=round(row_bytes),
                report_bytes=round(len(json.dumps(results.to_dict()))/n), look_seconds=look, row_seconds=rows, progress_seconds=write)


def paper(f, runs=100_000):
    "What each part comes to with many runs"
    look, report = f['look_seconds']*runs, f['report_bytes']*runs
    return {'memory of the driver: jobs (GB)': f['job_bytes']*runs/1e9, 'memory of the driver: results (GB)': f['row_bytes']*runs/1e9, 'study.json (GB)': report/1e9,
            'shared folder (GB)': f['directory_bytes']*runs/1e9, 'shared folder (million files)': f['files']*runs/1e6,
            'operations on the shared folder (million)': sum(f['calls'].values())*runs/1e6, 'one look at all runs (s)': look,
            'one write of the progress (s)': f['progress_seconds']*runs, 'a row of the report for every run (s)': f['row_seconds']*runs}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=400)
    p.add_argument('--nodes', type=lambda t: [int(n) for n in t.split(',')], default=[1, 2, 3])
    p.add_argument('--epochs', type=int, default=25, help='of each run; as many as take about a second')
    p.add_argument('--only-paper', action='store_true')
    p.add_argument('--out', help='file for what was measured')
    args = p.parse_args()
    out, place = args.out and Path(args.out).absolute(), tempfile.mkdtemp(prefix='scale-')
    os.chdir(place)
    gen = keyed_generator(0, 'scale')
    save_splits(make_splits(torch.randn(1050, 10, generator=gen)@torch.randn(10, 32, generator=gen) + 0.3*torch.randn(1050, 32, generator=gen), sizes=('1k',)), 'study/datasets')
    found = dict(cores=os.cpu_count(), runs=args.runs, epochs=args.epochs, engines=[])
    for line in [] if args.only_paper else compared(args):
        found['engines'].append(line)
        print(json.dumps(line), flush=True)
    found['footprint'] = footprint(args)
    found['paper'] = {k: float(f'{v:.3g}') for k, v in paper(found['footprint']).items()}
    print(json.dumps(dict(footprint=found['footprint'], paper=found['paper']), indent=1))
    if out: out.write_text(json.dumps(found, indent=1) + '\n')
    os.chdir('/')
    shutil.rmtree(place)


if __name__ == '__main__': main()
