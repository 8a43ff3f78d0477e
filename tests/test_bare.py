"The exported package on a bare training machine: without any notebook package a round still runs."
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'fedmpqkd'
MODULES = ('core.config', 'core.journal', 'data.images', 'data.partition', 'models.vision', 'quant.quantize',
           'quant.bits', 'learn.distill', 'learn.client', 'wire.format', 'wire.messages',
           'federation.server', 'federation.methods',
           'federation.run', 'evaluate.metrics')
FORBIDDEN = ('fastcore', 'papermill', 'IPython', 'matplotlib', 'sklearn', 'nbdev', 'ipywidgets', 'ipykernel')
PROGRAM = f'''
import sys

class Without:
    "A finder that does not find some packages."
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split('.')[0] in {FORBIDDEN!r} else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import fastcore.test
    raise SystemExit('the blocker does not block')
except ModuleNotFoundError: pass

import importlib
for name in {MODULES!r}: importlib.import_module('fedmpqkd.' + name)

import json
import torch
torch.set_num_threads(1)
from fedmpqkd.data.images import from_tensors
from fedmpqkd.federation.run import run
from fedmpqkd.federation.watch import Progress
from fedmpqkd.federation.methods import make_config

g = torch.Generator().manual_seed(0)
x, y = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(40) % 4
data = from_tensors('mine', x, y, x[:20], y[:20])
config = make_config('fedmpq-kd', model='resnet8', clients=2, rounds=1, partition='iid', batch_size=10,
                     eval_images=0, alpha=0.5, kd_warmup_rounds=0)
record = run(config, data, workers=1, progress=Progress('bare', 1))
line = record['curve'][0]
print(json.dumps([line['arrived'], line['bytes_down'] > line['bytes_up'] > 0, line['kd'] > 0,
                  record['data']['name'],
                  [m for m in {FORBIDDEN!r} if m in sys.modules]]))
'''


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    "Run in an empty folder, with nothing but a link to the package on the path."
    folder = tmp_path_factory.mktemp('bare')
    (folder / 'fedmpqkd').symlink_to(PACKAGE)
    env = dict(PATH='/usr/bin:/bin', PYTHONPATH=str(folder), OMP_NUM_THREADS='1', HOME=str(folder))
    program = [sys.executable, '-c', PROGRAM]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=600, env=env)


def test_a_round_without_notebook_tools(outcome):
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.splitlines()[-1] == '[2, true, true, "mine", []]'


def test_progress_speaks_without_ipython(outcome):
    assert outcome.stdout.startswith('bare: round 1/1, accuracy '), outcome.stdout
