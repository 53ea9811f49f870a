"""The dashboard and the progress display as a person sees them: a real browser, Voila and JupyterLab, real training processes.

With `FLOW_STUDY_SAVE_IMAGES` set to a folder, pictures of the pages are saved there.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from faults import ENV, LONG, Script, in_epoch, until
from flow_study.rundir import read_status

playwright = pytest.importorskip('playwright.sync_api', reason="no playwright: `pip install -e '.[browser]'`")
pytest.importorskip('voila', reason="no Voila: `pip install -e '.[browser]'`")
pytest.importorskip('jupyterlab', reason="no JupyterLab: `pip install -e '.[browser]'`")
CHROMIUM = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='no Chromium: `apt-get install chromium`, or CHROMIUM=its path')]

QUIET = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
RUNS = Path('study/checkpoints')
BOARD = 'from flow_study import Dashboard\nboard = Dashboard(gpu=None)\nboard'
TRAIN = """from flow_study import FlowTrainer, TrainingConfig, build_model, load_all_splits
config = TrainingConfig(arch='simple', flow='icfm', dataset='1k', group='cell', name='in-a-cell', batch_size=32, lr=3e-3, epochs=100000, patience=100000)
train, val, test = load_all_splits(config.dataset)
trainer = FlowTrainer(build_model(config, train), config, train, val, 'cpu', wandb_mode='disabled')
result = trainer.train()"""


def notebook(name, *sources):
    "A notebook with these code cells"
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=s) for i, s in enumerate(sources)]
    kernel = dict(name='python3', display_name='python3', language='python')
    Path(f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


@pytest.fixture(scope='module')
def home(small_data, tmp_path_factory):
    "The folder in which everything happens: data, notebooks, a run that has finished and something that is no run"
    home = tmp_path_factory.mktemp('browser')/'home'
    shutil.copytree(small_data, home)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(home)
        for k, v in ENV.items(): m.setenv(k, v)
        (RUNS/'half').mkdir(parents=True)
        (RUNS/'half/status.json').write_text('{"state": "runn')
        done = Script(*LONG, '--name', 'done', '--epochs', '12')
        notebook('board', BOARD)
        notebook('restart', f"import os\nprint('kernel', os.getpid())\n{BOARD}")
        notebook('train', BOARD, TRAIN)
        assert done.end()[0] == 0
        done.close()
        yield home


@pytest.fixture
def going(home):
    "Start a run that goes on until somebody stops it; gives its process, once it has trained for some epochs"
    started = []
    def start(name):
        started.append(Script(*LONG, '--name', name))
        started[-1].until(lambda: in_epoch(RUNS/name, 3))
        return started[-1]
    yield start
    for s in started: s.close()


@pytest.fixture(scope='module')
def serve(home):
    "Start a server of notebooks; gives its address once it answers"
    started = []
    def start(*command):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        log = open(f'server-{port}.log', 'w+')
        process = subprocess.Popen([sys.executable, '-m', *(c.format(port=port) for c in command)], stdout=log, stderr=log, env={**os.environ, 'JUPYTER_CONFIG_DIR': str(home/'config')})
        started.append(process)
        def answers():
            assert process.poll() is None, Path(log.name).read_text()
            try: return urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=5).status
            except OSError: return time.sleep(0.1)
        until(answers)
        return f'http://127.0.0.1:{port}'
    yield start
    for p in started: p.terminate()
    for p in started: p.wait(20)


@pytest.fixture(scope='module')
def voila(serve):
    return serve('voila', 'board.ipynb', '--no-browser', '--port={port}', '--Voila.ip=127.0.0.1', '--VoilaConfiguration.allow_theme_override=YES')


@pytest.fixture(scope='module')
def lab(serve, home):
    "JupyterLab without questions"
    for name, values in (('apputils-extension/notification', dict(fetchNews='false', checkForUpdates=False)),
                         ('notebook-extension/tracker', dict(windowingMode='none'))):  # cells out of sight stay in the page
        settings = home/f'config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings'
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(values))
    return serve('jupyter', 'lab', '--no-browser', '--port={port}', '--ip=127.0.0.1', '--allow-root', '--IdentityProvider.token=',
                 '--LabApp.extension_manager=readonly', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate')


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "Open an address in a fresh page; gives the page once the dashboard is there"
    opened = []
    def open_page(address, ready='.fs-row'):
        opened.append(browser.new_page(viewport=dict(width=1280, height=1150 if ready == '.fs-row' else 1900)))  # JupyterLab hides cells that do not fit
        opened[-1].set_default_timeout(40_000)
        opened[-1].goto(address)
        opened[-1].wait_for_selector(ready)
        return opened[-1]
    yield open_page
    for p in opened: p.close()


def picture(page, name):
    "Save what the page shows, where that is wanted"
    if folder := os.environ.get('FLOW_STUDY_SAVE_IMAGES'): page.screenshot(path=f'{folder}/{name}.png')


def table(page):
    "The rows of the table: name to the texts by column"
    heads = [h.rstrip(' ▲▼') for h in page.locator('.fs-head button').all_inner_texts()]
    rows = page.evaluate("[...document.querySelectorAll('.fs-row')].map(r => [...r.children].map(c => c.innerText.trim()))")
    return {r[heads.index('run') + 1]: dict(zip(heads, r[1:])) for r in rows}


def says(page, name, head, text):
    "Wait until a cell of the table has a text"
    try: until(lambda: text in table(page).get(name, {}).get(head, '') or page.wait_for_timeout(100), 120)
    except AssertionError as e: raise AssertionError(f"{head} {text!r} of {name}: {e}. Said: {page.locator('.fs-said').all_inner_texts()}; on disk {read_status(RUNS/name)}; shown {table(page)}") from None


def click_row(page, name): page.locator('.fs-hit', has_text=name).first.click()
def press(page, name): page.locator('.fs button:not(.fs-hit)', has_text=name).first.click()
def said(page, text): page.locator('.fs-said', has_text=text).first.wait_for()
def state(name): return read_status(RUNS/name).get('state')


def test_table_sort_and_filter(home, voila, page, going):
    going('sorted')
    p = page(voila)
    rows = table(p)
    assert {k: rows[k]['state'] for k in ('done', 'sorted', 'half')} == {'done': '✓ finished', 'sorted': '● running', 'half': '⚠ damaged'}
    assert rows['done'] | dict(arch='simple', flow='icfm', data='1k', seed='42', epoch='12/12', device='CPU') == rows['done']
    assert rows['done']['best loss'] == f"{read_status(RUNS/'done')['best_val_loss']:.4f}"
    press(p, 'run')
    p.locator('.fs-head button', has_text='run ▲').wait_for()
    up = list(table(p))
    assert up == sorted(up)
    press(p, 'run')
    p.locator('.fs-head button', has_text='run ▼').wait_for()
    assert list(table(p)) == up[::-1]
    p.get_by_placeholder('filter').fill('done')
    until(lambda: list(table(p)) == ['done'] or p.wait_for_timeout(50))
    p.get_by_placeholder('filter').fill('-done seed=42')
    until(lambda: 'sorted' in table(p) and 'done' not in table(p) or p.wait_for_timeout(50))


def test_curves_move(home, voila, page, going):
    going('moving')
    p = page(voila)
    click_row(p, 'moving')
    click_row(p, 'done')
    line = lambda: p.evaluate("[...document.querySelectorAll('.fs svg [id^=line2d] path')].map(x => x.getAttribute('d')).join()")
    until(lambda: p.locator('.fs svg').count() and len(line()) > 500 or p.wait_for_timeout(100))
    until(lambda: [t.strip('●◆■ ') for t in p.locator('.fs-legend > span').all_inner_texts()][:2] == ['moving', 'done'] or p.wait_for_timeout(100))
    first, epoch = line(), table(p)['moving']['epoch']
    until(lambda: line() != first and table(p)['moving']['epoch'] != epoch or p.wait_for_timeout(100))
    picture(p, 'dashboard')


def test_pause_continue_stop(home, voila, page, going):
    process = going('steered')
    p, beside = page(voila), page(voila)
    click_row(p, 'steered')
    press(p, 'Pause')
    says(p, 'steered', 'state', 'paused')
    assert state('steered') == 'paused'
    step = read_status(RUNS/'steered')['step']
    said(p, 'steered: paused')
    says(beside, 'steered', 'state', 'paused')  # two dashboards may be open at once
    time.sleep(0.5)
    assert read_status(RUNS/'steered')['step'] == step
    click_row(beside, 'steered')
    press(beside, 'Continue')
    says(p, 'steered', 'state', 'running')
    until(lambda: read_status(RUNS/'steered')['step'] > step)
    before = (RUNS/'steered/last.pt').stat().st_mtime_ns
    press(p, 'Checkpoint')
    said(p, 'steered: checkpoint written')
    assert (RUNS/'steered/last.pt').stat().st_mtime_ns > before
    press(p, 'Stop')
    says(p, 'steered', 'state', 'interrupted')
    assert process.end()[0] == 0
    assert state('steered') == 'interrupted'


def test_killed_process_turns_stale(home, voila, page, going):
    process = going('killed')
    p = page(voila)
    says(p, 'killed', 'state', 'running')
    process.send(signal.SIGKILL)
    process.process.wait()
    says(p, 'killed', 'state', 'stale')
    click_row(p, 'killed')
    press(p, 'Pause')
    said(p, 'killed: refused. Nobody can pause this run, it is stale')


CONTRAST = """selector => {
  const parse = c => { const v = c.match(/[0-9.]+/g).map(Number); return {rgb: v.slice(0, 3), a: v.length > 3 ? v[3] : 1} };
  const light = rgb => { const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v/12.92 : ((v + 0.055)/1.055)**2.4); return 0.2126*r + 0.7152*g + 0.0722*b };
  const e = document.querySelector(selector);
  let n = e;
  while (n && parse(getComputedStyle(n).backgroundColor).a < 1) n = n.parentElement;
  const back = n ? parse(getComputedStyle(n).backgroundColor).rgb : [255, 255, 255];
  const [a, b] = [light(parse(getComputedStyle(e).color).rgb), light(back)];
  return (Math.max(a, b) + 0.05)/(Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_legible(home, voila, page, theme):
    "Text against its ground: 4.5 is what the Web Content Accessibility Guidelines ask for"
    p = page(f'{voila}/?theme={theme}')
    click_row(p, 'done')
    p.locator('.fs svg').last.wait_for()
    for selector in ('.fs-title', '.fs-row > div:nth-child(3)', '.fs-head button', '.fs svg'): assert p.evaluate(CONTRAST, selector) > 4.5, selector
    ink = p.evaluate("getComputedStyle(document.querySelector('.fs-title')).color.match(/[0-9]+/g).slice(0, 3).map(Number)")
    assert (sum(ink) > 384) == (theme == 'dark')  # or the theme would not have been that
    picture(p, f'dashboard-{theme}')


def test_lab_restart_loses_nothing(home, lab, page, going):
    going('restarted')
    p = page(f'{lab}/lab/tree/restart.ipynb?reset', '.jp-Notebook .cm-content')
    run_all(p)
    p.wait_for_selector('.fs-row')
    before, kernel = set(table(p)), p.locator('.jp-OutputArea-output', has_text='kernel').inner_text()
    assert {'done', 'half', 'restarted'} <= before
    menu(p, 'Kernel', 'Restart Kernel and Run All Cells')
    p.locator('.jp-Dialog button.jp-mod-accept').click()
    p.locator('.jp-OutputArea-output', has_text='kernel').filter(has_not_text=kernel).wait_for()
    p.wait_for_selector('.fs-row')
    assert set(table(p)) == before
    click_row(p, 'restarted')
    p.locator('.fs svg').last.wait_for()
    picture(p, 'lab')


def test_lab_training_in_the_next_cell(home, lab, page):
    "The kernel is busy training; the dashboard in the cell above sees it, pauses it and stops it"
    p = page(f'{lab}/lab/tree/train.ipynb?reset', '.jp-Notebook .cm-content')
    run_all(p)
    p.wait_for_selector('.fs-row')
    says(p, 'in-a-cell', 'state', 'running')
    live = p.locator('.jp-CodeCell').nth(1).locator('.jp-OutputArea-output').last
    live.locator('svg').wait_for()
    until(lambda: all(word in live.inner_text() for word in ('epoch', 'train', 'validation', 'best', 'left')) or p.wait_for_timeout(100))
    before = live.inner_text()
    until(lambda: live.inner_text() != before or p.wait_for_timeout(100))
    picture(p, 'training')
    click_row(p, 'in-a-cell')
    press(p, 'Pause')
    says(p, 'in-a-cell', 'state', 'paused')
    press(p, 'Stop')
    says(p, 'in-a-cell', 'state', 'interrupted')
    live.locator('table').wait_for()  # what stays: a picture and a table, and no widget
    assert live.locator('svg').count() == 1 and live.locator('.widget-html').count() == 0
    assert 'interrupted' in live.locator('table').inner_text()
    live.scroll_into_view_if_needed()
    picture(p, 'trained')


def menu(page, *items):
    "Choose from JupyterLab's menus"
    page.locator('.lm-MenuBar-itemLabel', has_text=items[0]).first.click()
    page.locator('.lm-Menu-itemLabel', has_text=items[1]).first.click()


def run_all(page):
    page.get_by_text('| Idle').wait_for()  # before the kernel is connected, JupyterLab asks which one to run on
    menu(page, 'Run', 'Run All Cells')
