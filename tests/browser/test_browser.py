"""JupyterLab and voila in a headless Chromium: sliders move figures, and a stopped run can be taken up.

    pip install -e '.[dev,browser]'        # and a Chromium: apt-get install chromium, or from playwright
    pytest -m browser tests/browser        # all of it, with pictures in $FEDMPQKD_SHOTS if that is set
    pytest -m 'browser and short' tests/browser
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # the tests are skipped one by one, and say why

pytestmark = pytest.mark.browser
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update']
CHROMIUM = ('chromium', 'chromium-browser', 'google-chrome')
SLOW = 1000 * int(os.environ.get('FEDMPQKD_PATIENCE', '240'))  # milliseconds for anything that computes


@pytest.fixture
def lab_folder(tmp_path):
    "A copy of what the pages need, so that nothing is written into the checkout."
    if sync_api is None: pytest.skip("no playwright: pip install -e '.[browser]'")
    for name in ('nbs', 'results', 'examples'):
        ignore = shutil.ignore_patterns('_work', '.ipynb_*')
        shutil.copytree(ROOT / name, tmp_path / 'lab' / name, ignore=ignore)
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / name, tmp_path / 'lab' / name)
    return tmp_path / 'lab'


@contextmanager
def served(command: list[str], folder: Path, port: int, path: str):
    "A server on the loopback, with settings of its own, up and then down."
    own = {f'JUPYTER_{n}_DIR': str(folder / f'.{n}') for n in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= {f'JUPYTERLAB_{n}_DIR': str(folder / f'.{n}') for n in ('SETTINGS', 'WORKSPACES')}
    quiet = folder / '.SETTINGS' / '@jupyterlab' / 'apputils-extension' / 'notification.jupyterlab-settings'
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    whole = folder / '.SETTINGS' / '@jupyterlab' / 'notebook-extension' / 'tracker.jupyterlab-settings'
    whole.parent.mkdir(parents=True)
    whole.write_text('{"windowingMode": "none"}')  # cells out of sight have prompts, too
    paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = os.environ | own | dict(PYTHONPATH=paths, OMP_NUM_THREADS='1')
    with (folder / 'server.log').open('w') as log:
        quietly = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server = subprocess.Popen(command, cwd=folder, env=env, **quietly)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f'http://127.0.0.1:{port}{path}')
                    break
                except OSError: time.sleep(0.5)
            else: pytest.fail((folder / 'server.log').read_text()[-2000:])
            yield
        finally:
            server.terminate()
            server.wait()


@contextmanager
def browser_page():
    "A page of a headless Chromium, and the errors of its scripts."
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)  # None: playwright's own
    with sync_api.sync_playwright() as play:
        try: browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        except sync_api.Error as why: pytest.skip(f'no Chromium: {why}')
        page = browser.new_page(viewport=dict(width=1200, height=1400))
        page.set_default_timeout(SLOW)
        page.errors = []
        page.on('pageerror', lambda e: page.errors.append(str(e)))
        yield page
        browser.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def lab(folder: Path, notebook: str):
    "A notebook in JupyterLab, its kernel idle."
    port = free_port()
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', f'--port={port}',
               '--ip=127.0.0.1', '--IdentityProvider.token=t', f'--ServerApp.root_dir={folder}',
               '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with served(command, folder, port, '/api?token=t'), browser_page() as page:
        page.goto(f'http://127.0.0.1:{port}/lab/tree/{notebook}?token=t&reset')
        page.wait_for_selector('.jp-Notebook .jp-Cell')
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
        page.wait_for_timeout(1000)
        yield page


def run_all(page) -> None:
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()


def shot(page, name: str) -> None:
    "A picture, for whoever wants to look."
    if folder := os.environ.get('FEDMPQKD_SHOTS'): page.screenshot(path=f'{folder}/{name}.png')


def changed(page, what, before: str) -> bool:
    "Wait until a function of the page returns something else than before."
    deadline = time.monotonic() + SLOW / 1000
    while time.monotonic() < deadline:
        if (now := what()) and now != before: return True
        page.wait_for_timeout(100)
    return False


def nudge(page, box, number: int = 0, key: str = 'ArrowRight') -> bool:
    "Move a slider of a widget by one step: does its picture change?"
    image = box.locator('img').first
    image.wait_for()
    before = image.get_attribute('src')
    handle = box.locator('.noUi-handle').nth(number)
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press(key)
    return changed(page, lambda: image.get_attribute('src') if image.count() else '', before)


def press(page, name: str) -> None:
    page.get_by_role('button', name=name, exact=True).first.click()


def sliders_move_their_figures(page, all_of_them: bool = True) -> int:
    "The first slider of each widget, or each of them; how many."
    boxes, moved = page.locator('.widget-interact'), 0
    page.wait_for_function("document.querySelectorAll('.widget-interact img').length >= 5")
    assert boxes.count() == 5
    for i in range(5):
        for j in range(boxes.nth(i).locator('.noUi-handle').count() if all_of_them else 1):
            assert nudge(page, boxes.nth(i), j), f'slider {j} of widget {i} moved nothing'
            moved += 1
        shot(page, f'slider-{i}')
    return moved


def explorer_shows_records(page) -> None:
    "Points have words, and other records over other axes are another drawing."
    drawing = page.locator('.jp-RenderedHTMLCommon svg').first
    drawing.scroll_into_view_if_needed()
    def first() -> str:
        title = drawing.locator('title').first
        return title.text_content() if title.count() else ''

    before = first()
    assert re.match(r'.+, round 1: \d+\.\d\d % \(std \d+\.\d\d, n = \d+\), \d+\.\d\d MB', before)
    records, x, y = (page.get_by_label(name, exact=True) for name in ('records', 'x', 'y'))
    assert y.input_value() == 'accuracy'
    shot(page, 'explorer')
    records.select_option('exp1/study')
    assert changed(page, first, before)
    x.select_option('MB')
    y.select_option('loss')
    assert changed(page, lambda: '' if '%' in first() else first(), '')
    shot(page, 'explorer-study')


def rounds_of(label) -> int:
    "How many rounds a run has, by its label; a quick one may skip numbers between two looks."
    return int(re.search(r'(\d+) of', label.inner_text())[1])


def stopped_run_is_taken_up(page, folder: Path) -> None:
    "Stop after some rounds; the checkpoint lies there, and Start goes on after it to a later round."
    label = page.locator('.widget-label', has_text='fedmpq:').first
    label.scroll_into_view_if_needed()
    press(page, 'Start')
    assert changed(page, lambda: rounds_of(label) or '', ''), 'no round has ended'
    press(page, 'Pause')
    page.get_by_text('fedmpq: paused').wait_for()
    shot(page, 'paused')
    press(page, 'Go on')
    press(page, 'Stop')
    page.get_by_text('fedmpq: stopped').wait_for()
    shot(page, 'stopped')
    done = rounds_of(label)
    work = list((folder / 'runs' / 'live' / 'watched' / '_work').glob('*/checkpoint.pt'))
    assert len(work) == 1 and 1 <= done < 20
    press(page, 'Start')
    seen = []
    assert changed(page, lambda: seen.append(rounds_of(label)) or seen[-1] > done, False), 'it does not go on'
    assert min(seen) >= done, f'it began again: {seen}'
    press(page, 'Stop')


@pytest.mark.short
def test_explore_in_jupyterlab(lab_folder):
    "A slider of each widget moves its figure; the explorer shows committed records; a run pauses and stops."
    with lab(lab_folder, 'nbs/explore.ipynb') as page:
        run_all(page)
        sliders_move_their_figures(page, all_of_them=False)
        explorer_shows_records(page)
        stopped_run_is_taken_up(page, lab_folder)
        assert page.errors == []


def test_the_walkthrough_runs(lab_folder):
    "Every cell of the first page, in a browser, without an error."
    with lab(lab_folder, 'nbs/00_walkthrough.ipynb') as page:
        run_all(page)
        cells = json.loads((lab_folder / 'nbs' / '00_walkthrough.ipynb').read_text())['cells']
        last = sum(1 for cell in cells if cell['cell_type'] == 'code')
        prompt = page.locator('.jp-CodeCell .jp-InputPrompt').last
        assert changed(page, lambda: re.sub(r'\D', '', prompt.inner_text()), ''), 'the last cell has not run'
        shot(page, 'walkthrough')
        assert page.get_by_text('Traceback').count() == 0
        assert prompt.inner_text() == f'[{last}]:'


def test_explore_under_voila(lab_folder):
    "The same page without its code: every slider, the records, and a run."
    pytest.importorskip('voila')
    port = free_port()
    command = [sys.executable, '-m', 'voila', 'nbs/explore.ipynb', '--no-browser', f'--port={port}',
               '--Voila.ip=127.0.0.1']
    with served(command, lab_folder, port, '/voila/static/favicon.ico'), browser_page() as page:
        page.goto(f'http://127.0.0.1:{port}/')
        page.locator('.widget-interact img').first.wait_for()
        assert sliders_move_their_figures(page) == 10
        shot(page, 'voila')
        explorer_shows_records(page)
        stopped_run_is_taken_up(page, lab_folder)
        assert page.get_by_text('interact(').count() == 0 and page.errors == []
