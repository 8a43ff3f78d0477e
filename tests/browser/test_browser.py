"""JupyterLab and voila in a headless Chromium: sliders move figures, and a stopped run can be taken up.

    pip install -e '.[dev,browser]'        # and a Chromium: apt-get install chromium, or from playwright
    pytest -m browser tests/browser        # all of it, with pictures in $FEDMPQKD_SHOTS if that is set
    pytest -m 'browser and short' tests/browser
"""
import os
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

sync_api = pytest.importorskip('playwright.sync_api')
pytestmark = pytest.mark.browser
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update']
SLOW = 1000 * int(os.environ.get('FEDMPQKD_PATIENCE', '240'))  # milliseconds for anything that computes


@pytest.fixture
def lab_folder(tmp_path):
    "A copy of what the pages need, so that nothing is written into the checkout."
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
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
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


def nudge(page, box, keys: int = 2) -> tuple[str, str]:
    "Move the first slider of a widget, and return its picture before and after."
    image = box.locator('.jp-OutputArea-output img, .jp-RenderedImage img').first
    image.wait_for()
    before = image.get_attribute('src')
    handle = box.locator('.noUi-handle').first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(keys): page.keyboard.press('ArrowRight')
    deadline = time.monotonic() + SLOW / 1000
    while time.monotonic() < deadline:
        now = box.locator('img').first
        if now.count() and now.get_attribute('src') != before: return before, now.get_attribute('src')
        page.wait_for_timeout(200)
    return before, before


def press(page, name: str) -> None:
    page.get_by_role('button', name=name, exact=True).first.click()


def every_slider_moves_its_figure(page) -> None:
    boxes = page.locator('.widget-interact')
    page.wait_for_function("document.querySelectorAll('.widget-interact img').length >= 5")
    assert boxes.count() == 5
    for i in range(5):
        before, after = nudge(page, boxes.nth(i))
        assert before != after, f'slider {i} moved nothing'
        shot(page, f'slider-{i}')


def stopped_run_is_taken_up(page, folder: Path) -> None:
    "Stop after some rounds; the checkpoint lies there, and Start goes on after it to a later round."
    label = page.locator('.widget-label', has_text='fedmpq:').first
    label.scroll_into_view_if_needed()
    press(page, 'Start')
    page.get_by_text('fedmpq: runs, 1 of').wait_for()
    press(page, 'Pause')
    page.get_by_text('fedmpq: paused').wait_for()
    shot(page, 'paused')
    press(page, 'Go on')
    press(page, 'Stop')
    page.get_by_text('fedmpq: stopped').wait_for()
    shot(page, 'stopped')
    done = int(label.inner_text().split('stopped, ')[1].split()[0])
    work = list((folder / 'runs' / 'live' / 'watched' / '_work').glob('*/checkpoint.pt'))
    assert len(work) == 1 and 1 <= done < 20
    press(page, 'Start')
    page.get_by_text(f'fedmpq: runs, {done + 1} of').wait_for()
    press(page, 'Stop')


@pytest.mark.short
def test_explore_in_jupyterlab(lab_folder):
    "Each slider moves its figure; the explorer shows committed records; a run pauses and stops."
    with lab(lab_folder, 'nbs/explore.ipynb') as page:
        run_all(page)
        every_slider_moves_its_figure(page)
        drawing = page.locator('.jp-RenderedHTMLCommon svg').first
        drawing.scroll_into_view_if_needed()
        assert 'round' in drawing.locator('title').first.text_content()
        shot(page, 'explorer')
        stopped_run_is_taken_up(page, lab_folder)
        assert page.errors == []


def test_the_walkthrough_runs(lab_folder):
    "Every cell of the first page, in a browser, without an error."
    with lab(lab_folder, 'nbs/00_walkthrough.ipynb') as page:
        run_all(page)
        page.get_by_text('Python 3 (ipykernel) | Busy').wait_for()
        page.get_by_text('Python 3 (ipykernel) | Busy').wait_for(state='detached')
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
        shot(page, 'walkthrough')
        assert page.get_by_text('Traceback').count() == 0


def test_explore_under_voila(lab_folder):
    "The same page without its code."
    pytest.importorskip('voila')
    port = free_port()
    command = [sys.executable, '-m', 'voila', 'nbs/explore.ipynb', '--no-browser', f'--port={port}',
               '--Voila.ip=127.0.0.1']
    with served(command, lab_folder, port, '/voila/static/favicon.ico'), browser_page() as page:
        page.goto(f'http://127.0.0.1:{port}/')
        page.locator('.widget-interact img').first.wait_for()
        before, after = nudge(page, page.locator('.widget-interact').first)
        shot(page, 'voila')
        assert before != after
        assert page.get_by_text('interact(').count() == 0
