"""How good the networks are, on real embeddings and on the built-in corpus: the whole table, run by run.

    python benchmarks/quality.py --sonar ../shared/data/sonar          # runs what is missing, then prints the table
    python benchmarks/quality.py --runs 1                              # the next missing run only; call it again to go on
    python benchmarks/quality.py --runs 0                              # the table of what is there
    python benchmarks/quality.py --runs 0 --samples                    # and samples of those in `SAMPLED`, one run at a time
    python benchmarks/quality.py --runs 0 --samples --test             # at the very end, once: the same on the test rows

Each run is a run directory in `--out`, made by the trainer itself, with a `quality.json` beside its checkpoints; one that was interrupted
goes on where it stopped. Losses are on a bank of 32 draws a row that early stopping never sees; gains are over the shrunk Gaussian, paired
by row, with 95 % intervals over rows. Without SONAR files their rows are left out; the built-in corpus is made where it is missing.
"""
import argparse
import json
import logging
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

from flow_study.checkpoint import load_model
from flow_study.closed_form import HeldOutLoss, ShrunkGaussianVelocity, ValidationBank, held_out_loss, loss_by_t, yardsticks
from flow_study.config import TrainingConfig
from flow_study.corpus import build_corpus
from flow_study.data import load_all_splits
from flow_study.files import publish_json
from flow_study.metrics import evaluate
from flow_study.models import build_model, parameter_counts
from flow_study.paths import create_flow
from flow_study.trainer import FlowTrainer, choose_average

SEEDS = (42, 43, 44)
DRAWS = 32
# Rows whose samples are evaluated, on validation as the network gives them too, and how they are drawn then: with spread and mean of the training rows
SAMPLED = {'mlp': dict(autoguidance='auto', centred=True), 'mlp, base': dict(autoguidance='auto', centred=True), 'mlp, base, long': dict(autoguidance='axes', centred=True)}
# What suits the number of rows. 800: 1,800 steps, rows mixed, dropout. 8,000: 5,890 steps, and neither, since nothing is learned by heart in that time.
BEST = {'1k': dict(arch='mlp', aug='mixup', lr=2e-3, warmup_steps=150, ema_snapshots=6, epochs=600, val_frequency=10),
        '10k': dict(arch='mlp', lr=1e-3, warmup_steps=150, ema_snapshots=6, net_dropout=0., epochs=190, val_frequency=4)}
# The rows of the table, for all seeds: a name, and what it changes
ROWS = {split: {
    'mlp': {},
    'mlp, base': dict(size='base', lr=lr),
    'unet': dict(arch='unet'),
    'dit, tiny': dict(arch='dit', size='tiny'),
    'mamba, tiny': dict(arch='mamba', size='tiny'),
    'mlp-plain': dict(arch='mlp-plain', net_dropout=None),
} for split, lr in {'1k': 1e-3, '10k': 5e-4}.items()}
# With 8,000 rows a wide network is far from done after 5,890 steps. Four times as many learn rows by heart, and want dropout again.
LONG = dict(size='base', lr=5e-4, epochs=760, net_dropout=0.2, precision='bf16')
ROWS['10k']['mlp, base, long'] = LONG
# One choice at a time, for the first seed, on the first data set of a size
CHOICES = {'1k': {
    'mlp, tiny': dict(size='tiny'),
    'mlp, no precond': dict(precond='none'),
    'mlp, unit precond': dict(precond='unit'),
    'mlp, out of the box': dict(aug='none', lr=1e-3, epochs=100, val_frequency=1, warmup_steps=1000, ema_snapshots=0),
    'no mixup': dict(aug='none'),
    'mixup-plain': dict(aug='mixup-plain'),
    'noise 0.1 instead': dict(aug='noise'),
    'dropout 0': dict(net_dropout=0.),
    'dropout 0.5': dict(net_dropout=0.5),
    'lr 1e-3': dict(lr=1e-3),
    'lr 4e-3': dict(lr=4e-3),
    'weight decay 0.01': dict(weight_decay=0.01),
    'weight decay 1': dict(weight_decay=1.),
}, '10k': {
    'mixup': dict(aug='mixup'),
    'dropout 0.3': dict(net_dropout=None),
    'lr 2e-3': dict(lr=2e-3),
    'lr 5e-4': dict(lr=5e-4),
    'mlp, base, lr 1e-3': dict(size='base'),
    'mlp, base, long, dropout 0': LONG | dict(net_dropout=0.),
    'mlp, base, long, dropout 0.1': LONG | dict(net_dropout=0.1),
}}


def data_sets(args, every=False):
    "Name to folder and split, of the data that are there and, unless `every`, asked for"
    corpus = Path(args.out)/'corpus'
    if not (corpus/'normalization_stats.pt').exists(): build_corpus(corpus, sizes=('1k', '10k'))
    found = {'corpus-1k': (corpus, '1k'), 'corpus-10k': (corpus, '10k')}
    if (Path(args.sonar)/'splits'/'1k').is_dir(): found = {'sonar-1k': (Path(args.sonar), '1k')} | found
    return {k: v for k, v in found.items() if every or not args.data or k in args.data}


def plan(args):
    "(data set, row, seed, config) of every run: seeds of the main rows first, the choices last"
    def config(data, row, seed, change):
        folder, split = data_sets(args)[data]
        kw = BEST[split] | change
        return TrainingConfig(flow='icfm', dataset=split, group='quality', seed=seed, data_dir=str(folder), checkpoint_dir=str(Path(args.out)/'runs'),
                              name=f"{data}-{row.replace(', ', '-').replace(' ', '-')}-s{seed}", **kw)
    rows = [(data, row, seed, change) for data, (_, split) in data_sets(args).items() for row, change in ROWS[split].items() for seed in SEEDS]
    first = dict(reversed([(split, data) for data, (_, split) in data_sets(args, every=True).items()]))
    rows += [(data, row, SEEDS[0], change) for data, (_, split) in data_sets(args).items() if first[split] == data for row, change in CHOICES[split].items()]
    wanted = lambda row: not args.rows or row in args.rows
    return [(data, row, seed, config(data, row, seed, change)) for data, row, seed, change in rows if wanted(row) and (not args.seeds or seed in args.seeds)]


def report_file(config): return config.run_dir/'quality.json'


def done(config):
    "The report of a run that has ended, if it is of this very config"
    file = report_file(config)
    if not file.exists(): return None
    report = json.loads(file.read_text(encoding='utf-8'))
    return report if report['config'] == config.to_dict() else None


def carry_out(data, row, seed, config):
    "Train, or go on, and measure; the report"
    train, val, _ = load_all_splits(config.dataset, config.stats_path, config.data_dir)
    began = config.run_dir.exists() and json.loads((config.run_dir/'config.json').read_text(encoding='utf-8')) == config.to_dict()
    model = build_model(config, train)
    trainer = FlowTrainer(model, config, train, val, trackers=[], resume_path=config.run_dir if began else None, checkpoint_seconds=60., log_every=50)
    cpu = time.process_time()
    result = trainer.train()
    if result['state'] == 'interrupted': raise KeyboardInterrupt
    report = dict(data=data, row=row, seed=seed, config=config.to_dict(), state=result['state'], best_epoch=result['best_epoch'], steps=trainer.global_step,
                  seconds=round(trainer.elapsed_seconds), cpu_seconds=None if began else round(time.process_time() - cpu), **parameter_counts(model),
                  **losses(load_model(config.run_dir), train, val))
    if config.ema_snapshots:
        tried = choose_average(config.run_dir, val)
        chosen = losses(load_model(config.run_dir/'chosen.pt'), train, val)
        report['chosen'] = dict(zip(('length', 'end'), min(tried, key=lambda k: tried[k].mean)), loss=chosen['loss'], gain=chosen['gain'], per_row_gain=chosen['per_row_gain'])
    publish_json(report_file(config), report)
    return report


def losses(model, train, val):
    "Loss and paired gain on the report's bank, and what the closed forms give there"
    flow = create_flow('icfm')
    bank = ValidationBank(val, flow, draws=DRAWS, stream='report')
    ys = yardsticks(train, val, flow, bank)
    run = held_out_loss(model, bank)
    by_t = {k: loss_by_t(v, bank).loss.tolist() for k, v in dict(run=model, shrunk_gaussian=ShrunkGaussianVelocity.fit(train.x)).items()}
    gain = HeldOutLoss(ys['shrunk_gaussian'].per_row - run.per_row)
    return dict(loss=run.mean, gain=gain.mean, half_width=1.96*gain.se, per_row_gain=gain.per_row.tolist(),
                by_t=by_t, closed_forms={k: v.mean for k, v in ys.losses.items()}, shrinkage=ys.shrinkage)


def collect(args):
    "Everything that is known: the report of each run, and what `evaluate` said of samples"
    found = dict(reports=[], samples=[], missing=0, torch=str(torch.__version__))
    for data, row, seed, config in plan(args):
        report = done(config)
        if report is None:
            found['missing'] += 1
            continue
        found['reports'].append({k: v for k, v in report.items() if k != 'config'} | dict(changes=config.diff(TrainingConfig(**{k: getattr(config, k) for k in ('arch', 'flow', 'dataset', 'group')}))))
        found['samples'] += [dict(data=data, row=row, seed=seed, **{**r, 'samples': shown(r['samples'])}) for r in sampled(config).values()]
    for r in found['reports']: r['changes'] = {k: v[0] for k, v in r['changes'].items() if k not in ('data_dir', 'checkpoint_dir', 'stats_path', 'name', 'seed', 'group')}
    for r in found['reports']:
        for kept in (r, r.get('chosen', {})):
            if 'per_row_gain' in kept: kept['per_row_gain'] = [round(v, 5) for v in kept['per_row_gain']] # enough for every figure shown, at two thirds of the size
    return found


def shown(samples):
    "Of all metrics and nulls those in the table"
    return {k: {**samples[k], 'null': {'shrunk_gaussian': samples[k]['null']['shrunk_gaussian']}}
            for k in ('energy_distance', 'nn_accuracy', 'nn_asymmetry', 'coverage', 'memorisation', 'copies')}


def sampled(config):
    "What is known of the samples of a run, by split and how they were drawn"
    file = config.run_dir/'samples.json'
    return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}


def key(split, drawn): return ', '.join([split, *(f'{k} {v}' for k, v in drawn.items())])


def judge_samples(config, split, drawn):
    "Evaluate samples of a run, of the average that was chosen afterwards, and keep what the table needs"
    r = evaluate(config.run_dir/'chosen.pt', split, nfe_steps=(5,), **drawn)
    kept = {k: {a: v[a] for a in ('value', 'low', 'high', 'floor', 'null')} for k, v in r['samples'].items()}
    found = dict(split=split, reads=r['reads'][split], run=r['run'], n=r['n'], autoguidance=r['autoguidance'], centred=r['centred'], samples=kept)
    publish_json(config.run_dir/'samples.json', sampled(config) | {key(split, drawn): found})


def line(row, reports, parameters, seconds):
    "A row of the table; the interval is over validation rows, of the gain averaged over the seeds"
    gain = HeldOutLoss(torch.tensor([r['per_row_gain'] for r in reports], dtype=torch.float64).mean(0))
    losses = ' / '.join(f"{r['loss']:.4f}" for r in reports)
    return f"| {row} | {parameters:,} | {losses} | {gain.mean:+.4f} ± {1.96*gain.se:.4f} | {seconds:.0f} |"


def table(found):
    "All that was collected, as Markdown"
    lines = []
    for data in dict.fromkeys(r['data'] for r in found['reports']):
        mine = [r for r in found['reports'] if r['data'] == data]
        lines += [f'\n### {data}\n', f"| | parameters | loss on held-out rows, seeds {', '.join(map(str, SEEDS))} | gain over the shrunk Gaussian | CPU seconds a run |", '|---|---:|---|---|---:|']
        forms = mine[0]['closed_forms']
        for k, v in forms.items(): lines.append(f"| *{k.replace('_', ' ')}* | 0 | {v:.4f} | {forms['shrunk_gaussian'] - v:+.4f} | |")
        for row in dict.fromkeys(r['row'] for r in mine):
            rs = sorted((r for r in mine if r['row'] == row), key=lambda r: r['seed'])
            name = row if len(rs) == len(SEEDS) else f"{row} (seed {', '.join(str(r['seed']) for r in rs)})"
            lines.append(line(name, rs, rs[0]['learned'], statistics.median([r['cpu_seconds'] for r in rs if r['cpu_seconds']] or [0])))
            if row in SAMPLED and all('chosen' in r for r in rs): lines.append(line(f'{name}, average chosen afterwards', [r['chosen'] for r in rs], rs[0]['learned'], 0))
        for split in ('val', 'test'):
            for row in SAMPLED: lines += sample_lines(row, split, [s for s in found['samples'] if (s['data'], s['row'], s['split']) == (data, row, split)])
    cost = sum(r['cpu_seconds'] or 0 for r in found['reports'])
    return '\n'.join([*lines, f"\n{len(found['reports'])} runs, {cost/3600:.2f} hours of one core, torch {found['torch']}; {found['missing']} runs of the plan are missing."])


def sample_lines(row, split, samples):
    "What `evaluate` said of the samples of a network"
    if not samples: return []
    head = 'seed|drawn with auto\u00adguidance|loss, gain|energy dis\u00adtance|less the Gaus\u00adsian\'s, paired|1-NN accu\u00adracy|less the Gaus\u00adsian\'s, paired|of real rows, of sam\u00adples|dis\u00adtance of both to ½|cover\u00adage|memori\u00adsation|copies'.split('|') # soft hyphens: the table is as wide as a page
    lines = [f"\n{samples[0]['n']} samples of {row}, average chosen afterwards, against the {split} rows, with 95 % intervals.\n", as_row(head), '|---'*len(head) + '|']
    cell = lambda m: f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})"
    for s in samples:
        g, found = s['run']['paired_gain'], s['samples']
        lines.append(as_row([s['seed'], how(s), f"{s['run']['loss']:.4f}, {g['mean']:+.4f} ± {1.96*g['se']:.4f}", cell(found['energy_distance']), less(found['energy_distance']), cell(found['nn_accuracy']), less(found['nn_accuracy']),
                             *apart(found['nn_accuracy'], found['nn_asymmetry']), *(cell(found[k]) for k in ('coverage', 'memorisation', 'copies'))]))
    return lines + [as_row(reference_cells(name, {k: value(m) for k, m in samples[0]['samples'].items()}))
                    for name, value in {'*shrunk Gaussian*': lambda m: m['null']['shrunk_gaussian']['value'], '*real rows*': lambda m: m['floor']}.items()]


def as_row(cells): return f"| {' | '.join(map(str, cells))} |"


def reference_cells(name, v):
    "What the Gaussian's samples or real rows have, in the columns of samples; the same for all seeds, since they are compared with the same rows"
    a, s = v['nn_accuracy'], v['nn_asymmetry']
    return [name, '', '', f"{v['energy_distance']:.3f}", '', f'{a:.3f}', '', f'{a + s/2:.2f}, {a - s/2:.2f}', f'{max(abs(a - 0.5), abs(s)/2):.3f}', *(f'{v[k]:.3f}' for k in ('coverage', 'memorisation', 'copies'))]


def how(s):
    "How samples were drawn, and of test rows which reading it was"
    scales = s['autoguidance'] if isinstance(s['autoguidance'], list) else [s['autoguidance']]
    return ' '.join(f'{scale:.3g}' for scale in scales) + ', centred'*s.get('centred', False) + (f", read {s['reads']}" if s['split'] == 'test' else '')


def less(metric):
    "The paired difference to the Gaussian's samples; reports of before it was there lack it"
    d = metric['null']['shrunk_gaussian'].get('difference')
    return f"{d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d else ''


def apart(accuracy, asymmetry):
    """Cells: the 1-NN accuracy of real rows and of samples, and the mean distance of the two to one half, in which opposite errors do not cancel.
    The mean of |a + s/2 - 1/2| and |a - s/2 - 1/2| is the larger one of |a - 1/2| and |s|/2; its interval is made of theirs, and too wide rather than too narrow"""
    a, s = accuracy['value'], asymmetry['value']
    ends = [(m['low'] - shift, m['high'] - shift, scale) for m, shift, scale in ((accuracy, 0.5, 1), (asymmetry, 0, 0.5))]
    low = max(scale*max(lo, -hi, 0) for lo, hi, scale in ends)
    high = max(scale*max(-lo, hi) for lo, hi, scale in ends)
    return [f'{a + s/2:.2f}, {a - s/2:.2f}', f'{max(abs(a - 0.5), abs(s)/2):.3f} ({low:.3f} to {high:.3f})']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sonar', default='../shared/data/sonar', help='folder of the SONAR splits')
    p.add_argument('--out', default='study/quality', help='folder of the runs')
    p.add_argument('--data', nargs='*', help='data sets, of sonar-1k, corpus-1k and corpus-10k (default all)')
    p.add_argument('--rows', nargs='*', help='rows of the table (default all)')
    p.add_argument('--seeds', nargs='*', type=int, help='seeds (default all)')
    p.add_argument('--runs', type=int, help='missing runs to carry out (default all)')
    p.add_argument('--samples', action='store_true', help='evaluate samples on validation rows, of one run that has not been')
    p.add_argument('--test', action='store_true', help='with --samples: on test rows instead, once a run')
    p.add_argument('--save', metavar='FILE', help='keep the numbers in a JSON file, for the page')
    args = p.parse_args()
    logging.basicConfig(level=logging.WARNING)
    left = [q for q in plan(args) if not done(q[3])]
    for q in left[:args.runs]:
        r = carry_out(*q)
        print(f"{r['data']:12}{r['row']:24}{r['seed']}  loss {r['loss']:.4f}  gain {r['gain']:+.4f} ± {r['half_width']:.4f}  {r['state']}, best epoch {r['best_epoch']}, {r['cpu_seconds'] or 'resumed,'} CPU seconds", flush=True)
    if args.samples:
        split = 'test' if args.test else 'val'
        left = [(c, drawn) for _, row, _, c in plan(args) if row in SAMPLED and done(c) for drawn in ({}, SAMPLED[row])[args.test:] if key(split, drawn) not in sampled(c)]
        for config, drawn in left[:1]:
            judge_samples(config, split, drawn)
            print(f'{config.run_name}: samples evaluated, {key(split, drawn)}', flush=True)
    found = collect(args)
    if args.save: publish_json(args.save, found)
    print(table(found))


if __name__ == '__main__': main()
