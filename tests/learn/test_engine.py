"The engine: a recorded step equals a plain one, and no step asks the device for a number."
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run
from fedmpqkd.federation.server import Server, downlink
from fedmpqkd.learn import client, graphs
from fedmpqkd.learn.client import ClientRound, prepare
from fedmpqkd.learn.replica import Clock, Replica
from fedmpqkd.learn.step import local_step
from fedmpqkd.learn.vision import VisionTask, image_task
from fedmpqkd.wire.format import decode
from fedmpqkd.wire.messages import manifest_of

FIELDS = dict(model='resnet8', clients=3, rounds=3, dirichlet=1.0, lr=0.1, batch_size=16, eval_images=50,
              alpha=0.5, temperature=2.0)
ALONE = ['fedavg', 'fedprox', 'qat-uniform', 'fedmpq', 'fedmpq-plain']  # without a teacher
METHODS = [*ALONE, 'fedmpq-kd', 'fedmpq-kd-delivered', 'fedmpq-kd-linear', 'fedmpq-kd-dkd', 'fedavg-kd']
QUIET = [*ALONE, *('fedmpq-kd' + end for end in ('', '-dkd', '-agree', '-ratio', '-js', '-mse'))]


def memory(t: Any) -> int:
    "Where a tensor's numbers lie; 0 for anything else."
    return t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) else 0


class Tape(TorchDispatchMode):
    """A CUDA graph played on the CPU: the operators of one step, and the memory they used.

    A replay runs the operators and no Python; a result goes where it was written when the step was recorded.
    So a step that binds a name to new memory, or chooses by a number, is found out.
    """
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = {0, *map(memory, tree_leaves((args, kwargs)))}
        # None: a view, or written in place
        places = [None if memory(t) in inputs else t for t in tree_leaves(out)]
        if func._schema.is_mutable or any(place is not None for place in places):
            self.calls.append((func, args, kwargs, places))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, places in self.calls:
            for place, value in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
                if place is not None: place.copy_(value)


def taped(step):
    "In the place of `capture`: some steps to warm up, one to record."
    for _ in range(3): step()
    tape = Tape()
    with tape: step()
    return tape.replay


def curve(method: str, train: int = 150, **more: Any) -> list[tuple]:
    data = load_dataset('digits').subset(train=train, test=100)
    lines = run(make_config(method, **FIELDS | more), data, workers=2)['curve']
    keys = ('accuracy', 'accuracy_fp', 'loss', 'kd', 'moved', 'steps', 'bytes_up')
    return [tuple(line.get(key) for key in keys) for line in lines]


@pytest.mark.parametrize('method, fields', [
    *((m, {}) for m in METHODS),
    ('fedmpq-kd', dict(precision='bf16', rounds=2, kd_warmup_rounds=0, train=70))])
def test_a_recorded_step_gives_the_curve_of_the_plain_one(method, fields, monkeypatch):
    plain = curve(method, **fields)
    count = []
    monkeypatch.setattr(client, 'recordable', lambda config, device: True)
    monkeypatch.setattr(graphs, 'capture', lambda step: count.append(1) or taped(step))
    assert curve(method, **fields) == plain
    kinds = {'fedmpq-kd-linear': 3}.get(method, 1 if method in ALONE else 2)
    # one recording for each worker and weight of distillation, not one for each client
    assert 1 <= len(count) <= 2 * kinds


@pytest.mark.parametrize('method,field', [
    ('fedmpq-int-sr', {}), ('fedmpq-kd-co', {}), ('fedmpq-kd-ratio', {}),
    ('fedavg', dict(optimizer='adamw'))])
def test_steps_with_a_mind_of_their_own_are_not_recorded(method, field):
    cuda = torch.device('cuda')
    assert not graphs.recordable(make_config(method, **FIELDS | field), cuda)
    assert graphs.recordable(make_config('fedmpq-kd', **FIELDS), cuda)
    assert not graphs.recordable(make_config('fedmpq-kd', **FIELDS), torch.device('cpu'))


class NoQuestions(TorchDispatchMode):
    "Raises where a tensor becomes a Python number, which makes a GPU wait."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError('a number was read back from the device')
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('method', QUIET)
def test_a_step_reads_nothing_back(method):
    config = make_config(method, **FIELDS | dict(kd_warmup_rounds=0))
    data, replica = VisionTask(load_dataset('digits').subset(100, 50)), Replica(config, image_task(10))
    server = Server(config, replica.layout, replica.state)
    down = [decode(m, manifest_of(replica.layout)) for m in downlink(server, 0, 1)]
    train_state, _ = prepare(replica, config, ClientRound(0, 1, torch.arange(40)), down, Clock())
    middle = torch.full((16,), 4)
    x, y = data.batch(torch.arange(16), middle, middle, torch.zeros(16, dtype=torch.bool))
    local_step(replica, train_state, x, y)  # the first step may build what later ones use
    with NoQuestions(): local_step(replica, train_state, x, y)
    with pytest.raises(AssertionError, match='read back'), NoQuestions(): float(y.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('method', ['fedavg', 'fedmpq', 'fedmpq-kd'])
def test_a_cuda_graph_agrees_with_launching_every_kernel(method, monkeypatch):
    data = load_dataset('digits').subset(train=300, test=100)
    config = make_config(method, **FIELDS)
    graph = run(config, data, device='cuda')['curve']
    monkeypatch.setattr(client, 'recordable', lambda config, device: False)
    launched = run(config, data, device='cuda')['curve']
    for a, b in zip(graph, launched, strict=True): assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
