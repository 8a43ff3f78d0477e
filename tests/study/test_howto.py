"The examples of the how-to page, used from files outside the package, as a user would."

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = sorted((ROOT / 'examples').glob('*.py'))
METHODS = ['my-fedmpq', 'fedavg-focal', 'fedmpq-kd-tv', 'feddyn', 'fedsign', 'fedmedian']


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_on_the_page(path):
    assert len(path.read_text().splitlines()) < 30
    assert f"show('{path.stem}')" in (ROOT / 'nbs' / '94_howto.ipynb').read_text()


def test_all_examples_in_one_command(tmp_path):
    "Eight plug-ins, six methods, a network and a data set, by name; every image of the data set is used."
    names = [shutil.copy(p, tmp_path) for p in EXAMPLES]
    command = [sys.executable, '-m', 'fedmpqkd', 'exp1', '--preset', 'smoke', '--plugins', ','.join(names),
               '--methods', ','.join(METHODS), '--dataset', 'small-digits', '--model', 'my-network',
               '--rounds', '2', '--results-dir', str(tmp_path / 'results'), '--workers', '1']
    paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=paths), text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'results' / 'exp1' / 'smoke-small-digits'
    records = [json.loads(p.read_text()) for p in folder.glob('*.json')]
    assert not (folder.parent / 'smoke').exists()  # where the digits' are
    assert {r['config']['method'] for r in records} == set(METHODS)
    for r in records:
        facts = r['data']['name'], r['data']['image'], r['data']['train']
        assert facts == ('small-digits', [1, 8, 8], 1400)
        assert not any(line['failed'] for line in r['curve'])
    parts = [p for r in records for p in r["config"]["extension"].split("+")]
    named = {p.partition(":")[0] for p in parts}
    assert {'model', 'task_loss', 'kd_loss', 'client_term', 'server_rule', 'aggregate'} <= named
