"Importance of coordinates: closed forms, and whole runs in which it is measured."
import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from samples import dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmpqkd.core.config import RunConfig
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import open_run, run_round
from fedmpqkd.learn.importance import SquaredGradients, example_fisher
from fedmpqkd.learn.vision import VisionTask
from fedmpqkd.models.vision import register_model
from fedmpqkd.wire.format import WireError, decode, encode
from fedmpqkd.wire.mixed import Mixed

torch.set_num_threads(1)


def logistic(classes): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, classes))


def tiny(classes):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 8, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(32, classes))


register_model('logistic', logistic)
register_model('tiny', tiny)


def test_logistic_regression_has_a_closed_form():
    "Mean of (p_k - y_k)^2 x^2, and for the bias without x."
    task, g = VisionTask(dataset()), torch.Generator().manual_seed(0)
    model = logistic(4)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.05 * torch.randn(p.shape, generator=g))
    index = torch.arange(21)
    weight, bias = example_fisher(model, task, ['1.weight', '1.bias'], index, chunk=8)
    x, y = task.plain(index)
    with torch.no_grad(): gap = (model(x).softmax(1) - F.one_hot(y, 4)).double().square()  # [n, C]
    assert torch.allclose(weight.double(), gap.T @ x.flatten(1).double().square() / 21, rtol=1e-4, atol=1e-9)
    assert torch.allclose(bias.double(), gap.mean(0), rtol=1e-4)


def test_examples_one_by_one():
    "With normalisation and convolution: the same as a loop of single backward passes in eval mode."
    task = VisionTask(dataset())
    torch.manual_seed(0)
    model = tiny(4).train()
    x, y = task.plain(torch.arange(6))
    model(x)  # running statistics that are not those of a fresh network
    names = [n for n, _ in model.named_parameters()]
    found = example_fisher(model, task, names, torch.arange(6), chunk=4)
    assert model.training
    model.eval()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(6):
        model.zero_grad()
        task.loss(model(x[i:i + 1]), y[i:i + 1]).backward()
        for t, p in zip(total, model.parameters(), strict=True): t += p.grad.square() / 6
    for name, a, b in zip(names, found, total, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-8), name


@pytest.mark.parametrize('decay', [.5, .9, 1.0])
def test_a_constant_gradient_is_its_own_mean(decay):
    gathered, g = SquaredGradients(decay), torch.tensor([1., -2, 0])
    for _ in range(7):
        gathered.add([g])
        assert torch.allclose(gathered.value()[0], g.square(), rtol=1e-5)


FIELDS = dict(model='tiny', clients=3, rounds=2, batch_size=8, lr=.05, dirichlet=5.0, eval_images=0)


@pytest.mark.parametrize('method, more', [
    ('fedavg-fstq', {}), ('fedavg-oracle', {}), ('fedavg-example', {}), ('fedavg-magnitude', {}),
    ('fedavg-adam-v', dict(lr=.003)), ('fedavg-topk', {}), ('fedavg-random', {}), ('qat-uniform-fstq', {})])
def test_every_control_costs_the_same(method, more):
    run = open_run(make_config(method, **FIELDS | more, update_share=.15), dataset(), workers=1)
    before = {n: t.clone() for n, t in run.server.state.items()}
    lines = [run_round(run, r) for r in range(2)]
    run.pool.close()
    sizes = {b for up in [run.meter.total['up']] for b in [up / 6]}
    coded, others = 8 * 27 + 128, 4 * (8 * 2 + 4 + 16) + 8 + 6 * 6 + 35
    assert not any(line['failed'] for line in lines)
    assert int(.15 * 4 * coded) - 16 <= sizes.pop() - others <= int(.15 * 4 * coded) + 16
    assert any(not torch.equal(before[n], t) for n, t in run.server.state.items())


def test_a_full_budget_of_halves_is_fedavg():
    "To half precision of the updates."
    one = make_config('fedavg', **FIELDS)
    other = dataclasses.replace(make_config('fedavg-topk', **FIELDS), update_share=.7)
    states = []
    for config in (one, other):
        run = open_run(config, dataset(), workers=1)
        run_round(run, 0)
        run.pool.close()
        states.append(run.server.state)
    for n, t in states[0].items():
        near = float(t.float().abs().max()) * 2**-11
        assert torch.allclose(t.float(), states[1][n].float(), rtol=0, atol=near), n


def test_gradients_that_are_not_numbers_end_a_clients_round_and_nothing_else():
    run = open_run(make_config('fedavg-fstq', **FIELDS), dataset(), workers=1)
    run_round(run, 0)
    real = SquaredGradients.value
    memory = {k: run.memories.load(k, 1) for k in range(3)}
    state = {n: t.clone() for n, t in run.server.state.items()}
    try:
        SquaredGradients.value = lambda self: [t * float('nan') for t in real(self)]
        line = run_round(run, 1)
    finally: SquaredGradients.value = real
    assert len(line['failed']) == 3 and 'NaN' in str(line['failed'])
    for n, t in state.items(): assert torch.equal(t, run.server.state[n])
    for k, m in memory.items():
        assert m and all(torch.equal(t, run.memories.load(k, 9)[n]) for n, t in m.items())
    run.pool.close()


@pytest.mark.parametrize('fields, why', [
    (dict(uplink='mixed', importance='adam-v'), 'adamw'),
    (dict(uplink='mixed', update='signed-planes'), 'full-precision'),
    (dict(uplink='mixed', update='latent', assignment='prune-grow'), 'quantised models'),
    (dict(uplink='low-rank', update='latent'), 'full-precision'), (dict(update_share=1.5), 'update_share'),
    (dict(update_classes='8'), 'allowed are mixed, 4, 16'), (dict(update_rank=0), 'update_rank')])
def test_combinations_that_are_refused(fields, why):
    with pytest.raises(ValueError, match=why): RunConfig(**fields)


@pytest.mark.parametrize('share', [.001, 1e-9])
def test_a_budget_below_the_metadata_opens_no_run(share):
    with pytest.raises(ValueError, match=f'update_share={share:g} is a budget of .* takes update_share='):
        open_run(make_config('fedavg-magnitude', **FIELDS, update_share=share), dataset(), workers=1)


def test_a_budget_below_the_metadata_prepares_nothing(monkeypatch):
    "A warm start can take hours: what cannot work is refused in front of it."
    import fedmpqkd.federation.warmstart as warmstart
    monkeypatch.setattr(warmstart, 'cached', lambda *a: pytest.fail('the start was computed'))
    c = make_config('fedavg-magnitude', **FIELDS, update_share=.001, warm_start='fedavg:1')
    with pytest.raises(ValueError, match='update_share=0.001 is a budget of'):
        warmstart.starting_point(c, dataset(), workers=1)


def test_the_server_refuses_what_was_not_agreed():
    from fedmpqkd.federation.rounds import visit
    from fedmpqkd.federation.server import receive
    run = open_run(make_config('fedavg-magnitude', **FIELDS), dataset(), workers=1)
    sizes = {k: len(p) for k, p in enumerate(run.partition.parts)}
    run.server.expect(0, sizes)
    data = visit(run, 0, 0, False)[1].message
    message = decode(data, run.server.manifest)
    name = run.server.layout.quantized[0]
    entry = message.entries[name]
    assert isinstance(entry, Mixed)
    n = entry.tags.numel()
    threes, zeros = torch.full_like(entry.tags, 3), torch.zeros_like(entry.levels)
    greedy = message.entries | {name: Mixed(threes, zeros, torch.ones(n).half(), (0.0, 0.0))}
    forged = encode(dataclasses.replace(message, entries=greedy), run.server.manifest)
    with pytest.raises(WireError, match='were agreed'): receive(run.server, forged, 0)
    plain = dataclasses.replace(message, entries=message.entries | {name: entry.dequantize()})
    with pytest.raises(WireError, match='Mixed of 16 bits is due'):
        receive(run.server, encode(plain, run.server.manifest), 0)
    receive(run.server, data, 0)
    run.pool.close()


class Peak(TorchDispatchMode):
    "Bytes of tensors that are alive at once, as far as operators make them."
    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.seen: continue
            self.seen.add(key)
            self.now, self.most = self.now + size, max(self.most, self.now + size)
            weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def test_the_meter_of_memory():
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
    assert peak.most == 8000 and peak.now == 8000 and len(c) == 10


def test_peak_memory_stays_below_one_and_a_half_steps():
    task, model = VisionTask(dataset()), tiny(4)
    names = [n for n, p in model.named_parameters()]
    index = torch.arange(16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with Peak() as step:
        x, y = task.plain(index)
        task.loss(model.train()(x), y).backward()
        optimizer.step()
    with Peak() as fisher: example_fisher(model, task, names, torch.arange(21), chunk=16)
    assert fisher.most < 1.5 * step.most


def test_texts_whose_positions_count_differently_take_turns():
    "Only some positions of a text are predicted: torch.func cannot, and a run with the oracle goes on."
    pytest.importorskip('transformers')
    pytest.importorskip('peft')
    from fedmpqkd.learn.language import LanguageTask, load_language
    fields = dict(dataset='almanac', text_kind='answer', model='gpt-tiny', tokenizer='byte-bpe:300',
                  lora_rank=2, clients=2, rounds=1, batch_size=4, update_share=.2, eval_images=0)
    config = make_config('fedavg-oracle', **fields)
    data = load_language(config)
    run = open_run(config, data, workers=1)
    assert run_round(run, 0)['failed'] == {}
    task, model = LanguageTask(data), run.pool.replica.model
    names = list(run.pool.replica.layout.quantized)
    found = example_fisher(model, task, names, torch.arange(3))
    total, own = [0.] * len(names), dict(model.named_parameters())
    model.eval()
    for i in range(3):
        model.zero_grad()
        x, y = task.plain(torch.tensor([i]))
        task.loss(model(x), y).backward()
        total = [t + own[n].grad.square() / 3 for t, n in zip(total, names, strict=True)]
    for a, b in zip(found, total, strict=True): assert torch.allclose(a, b, rtol=1e-4, atol=1e-12)
    with Peak() as step:
        x, y = task.plain(torch.arange(4))
        task.loss(model.train()(x), y).backward()
    with Peak() as fisher: example_fisher(model, task, names, torch.arange(8), chunk=4)
    assert fisher.most < 1.5 * step.most
