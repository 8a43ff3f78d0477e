"""Whole runs on a pretended device.

PyTorch's `meta` device has shapes but no numbers, and a mode says what a GPU would: tensors of host and
device never meet in one operator, a number that Python asks for is counted as a wait, and a step that is
being recorded uses nothing of the host. It says nothing about speed or about the kernels' arithmetic.
"""
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation import pool
from fedmpqkd.federation import run as run_module
from fedmpqkd.federation.methods import RECIPES, make_config
from fedmpqkd.learn import client, graphs

FIELDS = dict(model='resnet8', clients=2, rounds=2, partition='iid', lr=0.1, batch_size=16, alpha=0.5,
              temperature=2.0, kd_warmup_rounds=0)
SHARED = dict(public_images=20)  # what some recipes cannot do without
EXTRA = {'fedkd': SHARED, 'fedmd': SHARED, 'feddf': SHARED}
# a choice, for its time; FEDMPQKD_SLOW=1 plays every recipe
DISTINCT = ['fedprox', 'uveqfed', 'fedpq', 'aqfl', 'fedkd', 'fedmd', 'feddf', 'fedmpq-official',
            *('fedmpq-kd' + end for end in ('', '-co', '-batch', '-ema', '-ratio', '-q8', '-sr', '-moshpit'))]
RARER = [dict(stress='all'), dict(label_noise=0.2), dict(validation=0.2, act_bits=4),
         dict(warm_start='fedavg:1')]
aten = torch.ops.aten
ASKS = aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default  # for a number


class Elsewhere(TorchDispatchMode):
    "Plays the device's part: zeros come back where numbers are fetched."
    def __init__(self) -> None:
        super().__init__()
        self.waits, self.recording = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if self.recording and any(not t.is_meta for t in tensors):
            raise AssertionError(f'{func} uses memory of the host while recording')
        if func in ASKS and tensors[0].is_meta:
            return self.wait(tensors[0].dtype != torch.bool)
        if func is aten._to_copy.default:
            home = kwargs.get('device') is not None and torch.device(kwargs['device']).type == 'cpu'
            if tensors[0].is_meta and home:
                return self.wait(torch.zeros(tensors[0].shape, dtype=kwargs.get('dtype') or tensors[0].dtype))
        elif func is aten.copy_.default:
            if tensors[1].is_meta and not tensors[0].is_meta: return self.wait(tensors[0].zero_())
        elif func is not aten._foreach_copy_.default and len({t.is_meta for t in tensors if t.dim()}) > 1:
            places = [(t.device.type, *t.shape) for t in tensors]
            raise AssertionError(f'{func}: host and device meet: {places}')
        return func(*args, **kwargs)

    def wait(self, value: Any) -> Any:
        if self.recording: raise AssertionError('the host waits for the device while recording')
        self.waits += 1
        return value

    @contextmanager
    def recorded(self) -> Iterator[None]:
        self.recording = True
        try: yield
        finally: self.recording = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    "A pretended GPU; a mode belongs to one thread, so the pool works in this one."
    mode, real = Elsewhere(), graphs.recordable
    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        with mode.recorded(): step()
        return lambda: None
    monkeypatch.setattr(graphs, 'capture', capture)
    monkeypatch.setattr(client, 'recordable', lambda config, _: real(config, torch.device('cuda')))
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: nullcontext())  # `meta` has none
    monkeypatch.setattr(pool.WorkerPool, 'map', lambda self, function, items: map(function, items))
    return mode


def waits(device: Elsewhere, method: str, **fields: Any) -> int:
    "How often a run on the device waits for a number."
    before, data = device.waits, load_dataset('digits').subset(train=50, test=20)
    config = make_config(method, **FIELDS | EXTRA.get(method, {}) | fields)
    with device: record = run_module.run(config, data, device='meta')
    assert len(record['curve']) == FIELDS['rounds']
    return device.waits - before


@pytest.mark.parametrize('method', RECIPES if os.environ.get('FEDMPQKD_SLOW') else DISTINCT)
@pytest.mark.filterwarnings('ignore:.*no-op')  # a state dictionary cannot be loaded into `meta`
def test_a_run_keeps_host_and_device_apart(device, method): assert waits(device, method)


@pytest.mark.parametrize('fields', RARER, ids=str)
@pytest.mark.filterwarnings('ignore:.*no-op')
def test_so_do_the_rarer_fields(device, fields): assert waits(device, 'fedmpq-kd', **fields)


@pytest.mark.parametrize('method', ['qat-uniform', 'fedmpq-kd'])
@pytest.mark.filterwarnings('ignore:.*no-op')
def test_more_steps_are_no_more_waits(device, method):
    assert waits(device, method, local_epochs=3) == waits(device, method, local_epochs=1)


@pytest.mark.filterwarnings('ignore:.*no-op')
def test_a_step_that_cannot_be_recorded_is_said_once_and_launched(device, monkeypatch, capsys):
    "The driver refuses: one line for the worker, the run goes on, and its record counts no replayed step."
    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError('operation not permitted when stream is capturing\nmore about it')
    data = load_dataset('digits').subset(train=50, test=20)
    config = make_config('fedmpq', **FIELDS)
    with device: whole = run_module.run(config, data, device='meta')
    assert all(line['replayed'] > 0 for line in whole['curve'])
    assert 'could not be recorded' not in capsys.readouterr().out
    monkeypatch.setattr(graphs, 'capture', refuse)
    with device: plain = run_module.run(config, data, device='meta')
    said = capsys.readouterr().out
    assert said.count('could not be recorded') == 1 and 'more about it' not in said
    assert not any('replayed' in line for line in plain['curve'])
    assert [line['steps'] for line in plain['curve']] == [line['steps'] for line in whole['curve']]


@pytest.mark.filterwarnings('ignore:.*no-op')
def test_the_environment_chooses_the_plain_path(device, monkeypatch):
    monkeypatch.setenv('FEDMPQKD_GRAPHS', '0')
    data = load_dataset('digits').subset(train=50, test=20)
    with device: record = run_module.run(make_config('fedmpq', **FIELDS), data, device='meta')
    assert not any('replayed' in line for line in record['curve'])


def test_the_pretence_is_strict():
    near, far = torch.ones(3), torch.ones(3, device='meta')
    with Elsewhere() as mode:
        with pytest.raises(AssertionError, match='meet'): far.gather(0, near.long())
        with pytest.raises(AssertionError, match='meet'): torch.nn.functional.linear(far[None], near[None])
        assert far.cpu().tolist() == [0, 0, 0] and float(far.sum()) == 1 and mode.waits == 2
        with mode.recorded(), pytest.raises(AssertionError, match='waits'): far.cpu()
        with mode.recorded(), pytest.raises(AssertionError, match='memory of the host'): far.copy_(near)
