"""A study as its users meet it: processes that are killed, runs that fail, files that are wrong; and its numbers by hand."""
import csv
import io
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from faults import Script, until
from flow_study.engines import Engine, _engines, carry_out, register_engine, run_state
from flow_study.rundir import FINAL, RunDir, is_alive, process_start, read_status, request
from flow_study.study import Leaderboard, Results, Study, expand_grid, main

GRID = '--group s --arch simple --flow icfm,otcfm --dataset 1k --epochs 12 --batch-size 64 --lr 1e-2 --warmup-steps 5 --device cpu'.split()
EVAL = '--eval-n 200 --eval-steps 3 --eval-draws 20 --workers 2 --seeds 3'.split()
NAMES = [f'simple-{flow}-1k-none{seed}' for seed in ('', '-s43', '-s44') for flow in ('icfm', 'otcfm')]
RUNS, REPORT = Path('study/checkpoints'), Path('study/reports/s')
SWEEP = ('-m', 'flow_study.study')


def descendants(pid):
    "All processes below one, with their starts: together these name them for good"
    parents = {}
    for p in Path('/proc').iterdir():
        try: parents[int(p.name)] = int((p/'stat').read_text().rpartition(')')[2].split()[1])
        except (ValueError, OSError): continue
    below, found = {pid}, set()
    while new := {p for p, parent in parents.items() if parent in below} - found:
        found |= new
        below |= new
    return {(p, process_start(p)) for p in found}


def gone(processes): return not any(start is not None and is_alive(dict(host=os.uname().nodename, pid=p, start=start)) for p, start in processes)


def board(folder, keep_times=False):
    "The leaderboard on disk, without the columns of time"
    rows = list(csv.DictReader(io.StringIO((folder/'leaderboard.csv').read_text())))
    return [{k: v for k, v in r.items() if keep_times or not k.startswith('time_')} for r in rows]


@pytest.fixture
def sweep(place):
    "Start the script in a process, which ends with the test at the latest"
    started = []
    def start(*options, grid=GRID):
        started.append(Script(*grid, *EVAL, *options, script=SWEEP))
        return started[-1]
    yield start
    for s in started: s.close()


def small(**changes):
    "The same study from Python"
    given = dict(seeds=3, workers=2, evaluation=dict(n=200, steps=3, draws=20), options=dict(device='cpu', wandb_mode='disabled'))
    grid = dict(arch='simple', flow=['icfm', 'otcfm'], dataset='1k', epochs=12, batch_size=64, lr=1e-2, warmup_steps=5)
    return Study('s', {**grid, **changes.pop('grid', {})}, **{**given, **changes})


def test_killed_at_random_moments_it_is_the_study_that_was_never_killed(sweep):
    "No process outlives it, nothing is trained twice from its beginning, and the leaderboard is the same"
    code, out, err = sweep('--reports-dir', 'never/reports', '--checkpoint-dir', 'never/runs').end(300)
    assert (code, err) == (0, ''), err
    dice, kills, cut_short = random.Random(0), 0, set()
    while kills < 3 or not cut_short and kills < 12:
        study = sweep(*['--no-measure']*(kills > 0))
        before = len(list(RUNS.glob('*/metrics.jsonl')))
        if kills == 0: study.until(lambda: len(descendants(study.pid)) >= 3, 120) # cells are being built
        else: study.until(lambda: len(list(RUNS.glob('*/metrics.jsonl'))) > min(before, 5) or 'done' in study.said()[0], 120)
        time.sleep(dice.uniform(0, 1))
        below = descendants(study.pid)
        study.send(signal.SIGKILL)
        study.process.wait(30)
        kills += 1
        assert below  # there was something to leave behind
        until(lambda: gone(below), 90)
        cut_short |= {k for k in NAMES if (RUNS/k/'last.pt').exists() and read_status(RUNS/k)['state'] not in FINAL}
    code, out, err = sweep('--no-measure').end(300)
    assert (code, err) == (0, ''), err
    assert {k: read_status(RUNS/k)['state'] for k in NAMES} == dict.fromkeys(NAMES, 'finished')
    assert cut_short and all(read_status(RUNS/k)['generation'] > 1 for k in cut_short)  # one at least was cut short, and went on
    assert board(REPORT) == board(Path('never/reports/s')) and len(board(REPORT)) == 2 + 4
    assert set(board(REPORT, True)[0]) - set(board(REPORT)[0]) == {'time_seconds'}
    for file in ('best.pt', 'config.json'): assert (RUNS/NAMES[0]/file).exists()


def test_two_at_once_are_refused_and_sigterm_stops_in_good_order(sweep):
    study = sweep('--no-measure', grid=[*GRID, '--epochs', '100000', '--patience', '100000', '--compile', 'off'])
    study.until(lambda: sum(read_status(RUNS/k).get('epoch', 0) > 0 for k in NAMES) == 2, 120)
    code, out, err = sweep('--no-measure').end()
    assert code == 1 and f'is being written by process {study.pid}' in err
    below = descendants(study.pid)
    study.send(signal.SIGTERM)
    code, out, err = study.end()
    assert code == 143 and 'the same command goes on' in out
    until(lambda: gone(below), 90)
    assert [read_status(RUNS/k)['state'] for k in NAMES[:2]] == ['interrupted']*2
    assert read_status(REPORT)['state'] == 'interrupted' and not (REPORT/'lock').exists()


def test_a_run_that_fails_does_not_take_the_study_with_it(place, capsys, caplog):
    "One fails by itself and is listed, then retried on request; one is killed, and tried again"
    study = small(grid=dict(batch_size=[64, 5000], flow='icfm', epochs=30), seeds=2)
    names = [c.run_name for c in study.configs]
    with pytest.raises(ValueError, match='batch_size=5000: expected at most the 800 rows.*Nothing was started'): study.plan()
    assert not list(Path('study').glob('checkpoints/*'))
    results = study.run(measure=False)
    states = {r['run']: r['state'] for r in results.runs}
    assert [states[n] for n in names] == ['done', 'new', 'done', 'new']
    assert 'batch_size=5000' in read_status(study.report_dir)['failed'][names[1]]
    assert 'simple-icfm-1k-none-batch_size=5000: new' in (study.report_dir/'report.md').read_text()


def test_samples_are_drawn_as_planned(place):
    "Pushed and centred where the study says so; an evaluation by hand that drew others is not taken for the planned one, nor the other way round"
    from flow_study.metrics import evaluate
    grid, drawn = dict(arch='mlp', size='tiny', flow='icfm', epochs=2, lr=1e-3), dict(n=200, steps=3, draws=20)
    plain = small(seeds=1, grid=grid, evaluation=drawn)
    pushed = small(seeds=1, grid=grid, evaluation=dict(drawn, autoguidance=(1.1, 1.2), centred=True))
    job = plain.job(plain.configs[0])
    first = plain.run(measure=False, test=False).runs[0]['val']
    assert [run_state(s.job(s.configs[0])) for s in (plain, pushed)] == ['done', 'trained']
    second = pushed.run(measure=False, test=False).runs[0]['val']
    report = json.loads((job.run_dir/'evaluation.json').read_text())
    assert (report['autoguidance'], report['centred']) == ([1.1, 1.2], True) and first['metrics'] != second['metrics'] and first['loss'] == second['loss']
    assert [run_state(s.job(s.configs[0])) for s in (plain, pushed)] == ['trained', 'done']
    evaluate(job.run_dir, **drawn, seed=42, autoguidance='auto', nfe_steps=(10,))
    assert run_state(job) == run_state(pushed.job(pushed.configs[0])) == 'trained'


@pytest.mark.parametrize('grid, evaluation, message', [
    (dict(arch='simple'), dict(autoguidance='auto'), "autoguidance='auto': expected 1 for a network that corrects no closed form"),
    (dict(arch='mlp', size='tiny'), dict(autoguidance='much'), "autoguidance='much': expected a number above 0"),
    (dict(arch='mlp', size='tiny'), dict(autoguidance=0.), 'autoguidance=0.0: expected above 0'),
    (dict(arch='simple'), dict(centred=True), 'centred=True')])
def test_how_samples_cannot_be_drawn_is_said_before_a_run_begins(place, grid, evaluation, message):
    study = small(seeds=1, grid=dict(grid, flow='icfm'), evaluation=dict(n=200, steps=3, draws=20, **evaluation))
    with pytest.raises(ValueError, match=re.escape(message)): study.run()
    assert not RUNS.exists()


def test_a_killed_run_is_tried_again(place):
    study = small(seeds=1, grid=dict(epochs=150, patience=150))
    events, engine = [], study._engine()
    killed = study.configs[0].run_dir
    def execute(jobs):
        for event in engine.execute(jobs):
            if event: events.append((event[0].run_dir.name, event[1]))
            elif not events and read_status(killed).get('epoch'): os.kill(read_status(killed)['process']['pid'], signal.SIGKILL)
            yield event
    study._engine = lambda: type('Watched', (), dict(execute=staticmethod(execute), slots=2))()
    results = study.run(measure=False)
    assert (killed.name, -9) in events and (killed.name, 0) in events
    assert {r['state'] for r in results.runs} == {'done'} and read_status(killed)['generation'] > 1


def test_a_run_of_somebody_else_is_waited_for(script, sweep):
    "It is not started twice; when it is stopped, the study goes on with it"
    grid = '--group s --arch simple --flow icfm --dataset 1k --epochs 200 --patience 200 --batch-size 64 --lr 1e-2 --warmup-steps 5 --device cpu'.split()
    other, run = script(*grid), RUNS/NAMES[0]
    other.until(lambda: read_status(run).get('epoch', 0) > 2)
    request(run, 'pause')
    other.until(lambda: read_status(run)['state'] == 'paused')
    study = sweep('--seeds', '1', '--no-measure', grid=grid)
    study.until(lambda: read_status(REPORT).get('running') == [run.name], 120)
    assert read_status(run)['generation'] == 1 and read_status(run)['process']['pid'] == other.pid
    request(run, 'stop')
    assert other.end()[0] == 0
    code, out, err = study.end(120)
    assert (code, err) == (0, '') and read_status(run)['state'] == 'finished' and read_status(run)['generation'] == 2
    assert not list(RUNS.glob('*.archived-*'))


def test_failed_runs_are_listed_and_tried_again_on_request(place):
    study = small(seeds=1, grid=dict(epochs=2))
    failed = RunDir.create(study.configs[0].run_dir)
    failed.write('config.json', study.configs[0].to_dict())
    failed.set_status(state='failed', reason='NonFiniteError: the loss\nis not finite', run_name=study.configs[0].run_name)
    failed.close()
    results = study.run(measure=False)
    assert [r['state'] for r in results.runs] == ['failed', 'done'] and '1 of them failed before' in str(study.plan(measure=False))
    assert 'failed. NonFiniteError: the loss is not finite' in (study.report_dir/'report.md').read_text()
    assert [r['state'] for r in study.run(retry=True, measure=False).runs] == ['done', 'done']


def test_another_engine_is_one_class(place, capsys):
    "Here one that carries out everything in this process"
    class Here(Engine):
        def __init__(self, **kwargs): pass
        def execute(self, jobs): yield from ((job, carry_out(job)) for job in jobs)
    register_engine('here', Here)
    try: results = small(seeds=1, grid=dict(epochs=2), engine='here').run(measure=False)
    finally: del _engines['here']
    assert {r['state'] for r in results.runs} == {'done'}


def test_the_leaderboard_is_a_table_in_wandb(place):
    study = small(seeds=1, grid=dict(epochs=2, flow='icfm'), options=dict(device='cpu', wandb_mode='offline'))
    study.run(measure=False)
    file, = Path('study/reports/s/wandb').glob('offline-run-*/files/media/table/leaderboard*.json')
    table = json.loads(file.read_text())
    assert table['columns'] == list(study.leaderboard()[0]) and len(table['data']) == 1 + 4
    assert list(study.configs[0].run_dir.glob('wandb/offline-run-*/run-*.wandb'))


@pytest.mark.parametrize('options, said', [
    (['--lr', '1e-3,x'], "'1e-3,x': expected float values"),
    (['--lr', '1e-3,-1'], 'lr=-1.0: expected above 0'),
    (['--flw', 'icfm'], "Did you mean '--flow'"),
    (['--reference', 'flow=reflow'], "reference flow='reflow': expected one of icfm, otcfm"),
    (['--reference', 'flow'], 'expected axis=value'),
    (['--engine', 'slurm'], "unknown engine 'slurm'"),
    (['--metric', 'loss'], "unknown metric 'loss'"),
    (['--arch', 'simple,nothing'], "unknown arch 'nothing'"),
    (['--data-dir', 'elsewhere'], 'flow_study_data --data-dir elsewhere'),
    (['--eval-n', '5'], 'n=5'),
])
def test_bad_input_is_one_line_before_anything_runs(place, capsys, options, said):
    try: code = main([*GRID, *EVAL, *options])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and 'Traceback' not in err
    assert not RUNS.exists()


def test_files_of_another_version(place, capsys):
    Path('s.toml').write_text('version = 2\nname = "s"\n[grid]\narch = "simple"\nflow = "icfm"\ndataset = "1k"\n')
    assert main(['--study', 's.toml']) == 2 and 'version=2: expected 1' in capsys.readouterr().err
    Path('s.toml').write_text('version = 1\nname = "s"\nsead = 3\n[grid]\narch = "simple"\n')
    assert main(['--study', 's.toml']) == 2 and "Did you mean 'seeds'" in capsys.readouterr().err
    REPORT.mkdir(parents=True)
    (REPORT/'study.json').write_text('{"schema": 99}')
    assert main([*GRID, *EVAL]) == 2 and 'schema=99: expected 1' in capsys.readouterr().err and not RUNS.exists()


def test_toml_is_the_study(place):
    Path('s.toml').write_text('name = "s"\nseeds = [1, 2]\nmetric = "coverage"\nreference = {flow = "otcfm"}\n[grid]\narch = "simple"\nflow = ["icfm", "otcfm"]\n'
                              'dataset = "1k"\nlr = [1, 0.1]\n[evaluation]\nn = 100\n[options]\ndevice = "cpu"\n')
    study = Study.from_toml('s.toml', seeds=[5])
    assert [c.run_name for c in study.configs] == [f'simple-{f}-1k-none-s5-lr={lr}' for f in ('icfm', 'otcfm') for lr in (1, 0.1)]
    assert (study.metric, study.reference, study.evaluation, study.options['device']) == ('coverage', dict(flow='otcfm', lr=1), dict(n=100), 'cpu')


# What a study says, from results that are made up

def results(values, seeds, better='lower', passed_by=(), axis='flow', test=None):
    "Results with the given scores: arm to a value for each seed"
    entry = lambda v: dict(value=v, floor=0.1, better=better, uninformative=bool(passed_by), passed_by=list(passed_by), null=dict.fromkeys(('zero', 'unit_gaussian', 'shrunk_gaussian', 'memoriser'), 5.))
    measured = lambda v: dict(rows=100, n=100, nfe=10, loss=1., failed=None, metrics=dict(m=entry(v)), losses={})
    run = lambda arm, s, v: dict(run=f'{arm}-{s}', run_dir=f'runs/{arm}-{s}', seed=s, state='done', axes={axis: arm}, task=dict(data_dir='d', dataset='1k'), flow=arm if axis == 'flow' else 'icfm',
        loss_key=arm if axis == 'flow' else 'icfm', best_val_loss=v, parameters=10, epoch=3, time_seconds=1., device='x', curve=[[1, 2.], [2, 1.]], val=measured(v), test=None, reads={}, verdict='')
    return Results(dict(name='s', axes={axis: list(values)}, reference={axis: next(iter(values))}, metric='m', seeds=seeds, grid={}, evaluation={}, engine='local', threads=1),
                   [run(a, s, v) for a, vs in values.items() for s, v in zip(seeds, vs)], Path('reports/s'))


def test_fewer_than_three_seeds_conclude_nothing():
    r = results(dict(a=[1., 1.1], b=[2., 2.1]), [1, 2])
    assert {row['verdict'] for row in r.leaderboard()} == {'nothing can be concluded (2 seeds)'}
    assert r.conclusions(r.tasks()[0]) == ['Nothing can be concluded: 3 seeds are the least, here are 2.']


def test_losses_of_different_flows_rank_nothing():
    a = results(dict(a=[1., 1.1, 1.2], b=[2., 2.1, 2.2]), [1, 2, 3])
    with pytest.raises(ValueError, match='losses of different flows'): a.leaderboard('val_loss')
    with pytest.raises(ValueError, match='losses of different flows'): a.best('val_loss')
    b = results(dict(a=[1., 1.1, 1.2], b=[2., 2.1, 2.2]), [1, 2, 3], axis='arch')
    assert b.best('val_loss') == 'runs/a-1/best.pt'


def test_a_metric_that_a_null_passes_ranks_nothing():
    r = results(dict(a=[1., 1.1, 1.2], b=[2., 2.1, 2.2]), [1, 2, 3], passed_by=['shrunk_gaussian'])
    assert {row['place'] for row in r.leaderboard()} == {None}
    assert 'does not tell shrunk gaussian from real rows' in r.conclusions(r.tasks()[0])[0]


@pytest.mark.parametrize('better, best', [('lower', 'a'), ('higher', 'c'), ('floor', 'a')])
def test_what_better_means(better, best):
    r = results(dict(a=[0.1, 0.11, 0.12], b=[2., 2.1, 2.2], c=[3., 3.1, 3.2]), [1, 2, 3], better)
    assert r.chosen(r.tasks()[0]) == best
    assert [row['arm'] for row in r.leaderboard() if row['place'] == 1] == [best]


def test_a_winner_that_loses_by_another_metric_is_told():
    r = results(dict(a=[1., 1.1, 1.2], b=[0.1, 0.22, 0.31]), [1, 2, 3])
    for run in r.runs: run['val']['metrics']['other'] = dict(run['val']['metrics']['m'], value=run['val']['metrics']['m']['value'] + run['seed'], better='higher')
    assert 'by other metrics it is worse than the reference: other (-' in ' '.join(r.conclusions(r.tasks()[0]))


def test_bright_is_better():
    low, high = (results({k: [v]*3 for k, v in dict(a=1., b=2.).items()}, [1, 2, 3], better) for better in ('lower', 'higher'))
    for r in (low, high):
        for run in r.runs: run['axes'] = dict(arch='x', flow=run['axes']['flow'])
        r.study['axes'], r.study['reference'] = dict(arch=['x'], flow=['a', 'b']), dict(arch='x', flow='a')
    def brightness(r):
        image = r.plot_heatmap(r.tasks()[0]).images[0]
        return [sum(c[:3]) for c in image.cmap(image.norm(image.get_array()))[0]]
    (a, b), (c, d) = brightness(low), brightness(high)
    assert a > b and d > c


def test_an_arm_with_a_missing_run_is_not_chosen():
    r = results(dict(a=[1., 1.1, 1.2], b=[0.1, 0.2, 0.3]), [1, 2, 3])
    r.runs[-1]['val'] = None
    assert r.chosen(r.tasks()[0]) == 'a'
    row = next(row for row in r.leaderboard() if row['arm'] == 'b')
    assert row['seeds'] == 2 and row['verdict'] == 'nothing can be concluded (2 seeds)'


@pytest.mark.parametrize('done', [0, 1, 7, 24, 40, 60])
def test_a_study_that_was_interrupted_has_its_report(done, tmp_path):
    "Of the study of 12 arms, 3 seeds and 2 tasks in the documentation, as many runs as given are done; the one behind them is trained only, those behind that are new"
    r = Results.load(Path(__file__).parents[1]/'nbs/studies/corpus.json')
    new = lambda run: {k: run[k] for k in ('run', 'run_dir', 'seed', 'axes', 'task', 'flow', 'loss_key', 'off_protocol')} | dict(state='new')
    runs = sorted(r.runs, key=lambda run: run['seed']) # the order in which a study carries them out
    r = Results(r.study, [*runs[:done], dict(runs[done], state='trained', val=None, test=None), *map(new, runs[done + 1:])], tmp_path)
    written = (r.report()/'report.md').read_text()
    assert f'72 runs, {done} done' in written and f"- {runs[-1]['run']}: new" in written
    assert all((tmp_path/name).is_file() for name in re.findall(r'\]\((\S+\.png)\)', written))
    assert ('ranks.png' in written) == (done >= 24) # a seed at least of all arms, in one task


def test_the_checkpoint_to_use_is_the_best_seed_of_the_best_arm():
    r = results(dict(a=[1., 5., 6.], b=[3., 2., 4.]), [1, 2, 3])
    assert r.best() == 'runs/b-2/best.pt'


def test_leaderboard_sorts_and_shows():
    board = results(dict(a=[1., 1.1, 1.2], b=[2., 2.1, 2.2]), [1, 2, 3]).leaderboard()
    assert [r['arm'] for r in Leaderboard(board).sort('mean', reverse=True)][-1] == 'a'
    assert list(csv.reader(io.StringIO(board.to_csv())))[0] == list(board[0])
    html = board._repr_html_()
    assert html.count('<tr>') == 1 + len(board) and 'onclick' in html


def test_names_never_collide():
    values = ['a/x.pt', 'b/x.pt', 'c d', 'c:d', '..', 'ü']
    configs = expand_grid('s', dict(arch=['x', 'x-y'], flow=['y-z', 'z'], dataset='1k', stats_path=values, epochs=[1, 11]), 3)
    assert len({c.run_dir for c in configs}) == len(configs) == 2*2*6*2*3


def test_the_seeds_of_a_cell_in_one_program(place):
    "The engine ensemble: the same directories, and losses equal within rounding"
    alone = small(grid=dict(checkpoint_dir='alone', batch_size=16, epochs=4)).run(measure=False, test=False)
    together = small(grid=dict(checkpoint_dir='together', batch_size=16, epochs=4), engine='ensemble', workers=1)
    found = together.run(measure=False, test=False)
    assert {r['state'] for r in found.runs} == {'done'} and [r['run'] for r in found.runs] == [r['run'] for r in alone.runs]
    assert {read_status(c.run_dir)['path'] for c in together.configs} == {'stacked'}
    for a, b in zip(alone.runs, found.runs): assert b['best_val_loss'] == pytest.approx(a['best_val_loss'], rel=1e-3)
    assert [r['arm'] for r in found.leaderboard() if r['place']] == [r['arm'] for r in alone.leaderboard() if r['place']]
