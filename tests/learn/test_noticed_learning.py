"Small changes of losses, steps and a client's round that other tests let pass."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedmpqkd.core.config import RunConfig
from fedmpqkd.learn import client, step
from fedmpqkd.learn.client import ClientRound, finished_planes, local_round, uplink_entries
from fedmpqkd.learn.distill import GradRatio, dkd_loss, ema_update, gate, kd_loss, schedule
from fedmpqkd.learn.replica import Clock, Replica
from fedmpqkd.learn.step import (
    TrainState,
    add_proximal_grad,
    distillation,
    make_optimizer,
    objective,
    take_step,
)
from fedmpqkd.learn.teacher import refreshed, remembers
from fedmpqkd.learn.vision import image_task
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.bits import RULES, Rule
from fedmpqkd.quant.quantize import Planes
from fedmpqkd.wire.format import Message, decode, encode
from fedmpqkd.wire.messages import downlink_entries, manifest_of

STUDENT = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
TEACHER = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
LABELS = torch.tensor([0, 2])


def grid(levels: list[int], bits: int) -> Planes:
    r = torch.tensor(levels)
    return Planes(r.abs().to(torch.uint8), (r.sign() + (r == 0)).to(torch.int8), 1.0, bits)


class Fixed:
    "A teacher that says what it was told, batch by batch."
    def __init__(self, *answers): self.answers = list(answers)
    def __call__(self, x): return self.answers.pop(0)


def state_with(teacher=None, alpha: float = 0.0, **fields) -> TrainState:
    config = RunConfig(model="resnet8", kd_warmup_rounds=0, alpha=alpha, **fields)
    return TrainState(config, image_task(3), alpha, 2.0, teacher, None, SimpleNamespace(), Clock())


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# --- losses -----------------------------------------------------------------------------------------------

def test_label_smoothing_reaches_the_loss():
    "A fifth of each target is spread over the three classes."
    log_p = np.log(softmax(STUDENT.double().numpy()))
    target = 0.8 * np.eye(3)[LABELS] + 0.2 / 3
    for smoothing, q in ((0.2, target), (0.0, np.eye(3)[LABELS])):
        state = state_with(label_smoothing=smoothing)
        loss = objective(state, None, LABELS, STUDENT)
        assert loss.item() == pytest.approx(-(q * log_p).sum(1).mean(), rel=1e-5)
        assert float(state.totals["loss"]) == pytest.approx(loss.item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_teacher_that_is_no_number_teaches_nothing(bad):
    "One broken logit: the batch learns from its labels alone, with their gradient, and is counted."
    broken = TEACHER.clone()
    broken[1, 2] = bad
    state = state_with(Fixed(broken, TEACHER), alpha=0.5)
    z = STUDENT.clone().requires_grad_(True)
    loss = objective(state, None, LABELS, z)
    slope, = torch.autograd.grad(loss, z)
    alone = torch.nn.functional.cross_entropy(STUDENT, LABELS)
    closed = (torch.from_numpy(softmax(STUDENT.double().numpy())) - torch.eye(3)[LABELS]) / 2
    assert loss.item() == pytest.approx(alone.item())
    assert torch.allclose(slope.double(), closed, atol=1e-6)
    assert (int(state.totals["skipped"]), float(state.totals["kd"])) == (1, pytest.approx(0, abs=1e-7))

    p, q = softmax(TEACHER.double().numpy() / 2), softmax(STUDENT.double().numpy() / 2)
    kl = 4 * (p * np.log(p / q)).sum(1).mean()
    loss = objective(state, None, LABELS, STUDENT)
    assert loss.item() == pytest.approx(alone.item() + 0.5 * kl, rel=1e-5)  # the next batch teaches
    assert (int(state.totals["skipped"]), float(state.totals["kd"])) == (1, pytest.approx(kl, rel=1e-5))


def test_a_gate_is_asked_about_the_teacher():
    "The teacher is right on the first image only; its tie goes to the first class."
    state = state_with(Fixed(TEACHER), alpha=1.0, kd_gate="agree")
    p, q = softmax(TEACHER.double().numpy() / 2), softmax(STUDENT.double().numpy() / 2)
    rows = 4 * (p * np.log(p / q)).sum(1)
    assert distillation(state, None, LABELS, STUDENT).item() == pytest.approx(rows[0] / 2, rel=1e-5)


def test_gates_by_the_letter():
    third = torch.full((1, 3), 0.0)
    assert gate("entropy", third, LABELS[:1]).item() == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [3.0, 0, 0], [0, 3.0, 0]])
    # right in three of four; chance is a third: (3/4 - 1/3) / (2/3)
    assert gate("teacher-accuracy", logits, torch.tensor([0, 0, 0, 0])).item() == pytest.approx(0.625)
    # worse than chance is none
    assert gate("teacher-accuracy", logits, torch.tensor([2, 2, 2, 2])).item() == 0


def test_dkd_weighs_its_two_parts():
    "alpha for the label against the rest, beta for the rest among itself, times the squared temperature."
    T = 2.0
    p, q = (softmax(z.double().numpy() / T) for z in (TEACHER, STUDENT))
    label, parts = LABELS.numpy(), []
    for i, y in enumerate(label):
        a, b = p[i, y], q[i, y]
        target = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
        rest = [(np.delete(v[i], y) / (1 - v[i, y])) for v in (p, q)]
        parts.append((target, (rest[0] * np.log(rest[0] / rest[1])).sum()))
    tckd, nckd = np.mean(parts, 0)
    found = dkd_loss(STUDENT, TEACHER, LABELS, T, alpha=3.0, beta=5.0).item()
    assert found == pytest.approx(T**2 * (3 * tckd + 5 * nckd), rel=1e-5)


def test_js_is_half_of_each():
    p, q = (softmax(z.double().numpy()) for z in (TEACHER, STUDENT))
    m = (p + q) / 2
    js = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)).mean() / 2
    assert kd_loss(STUDENT, TEACHER, 1.0, "js").item() == pytest.approx(js, rel=1e-5)


def test_schedules_hit_their_ends_after_a_warm_up():
    "From round 2 of 0..6: four steps from .8 to .4, the warm-up silent."
    found = [schedule("linear", 0.8, t, 7, warmup=2, end=0.4) for t in range(7)]
    assert found == pytest.approx([0, 0, 0.8, 0.7, 0.6, 0.5, 0.4])
    cosine = [schedule("cosine", 0.8, t, 7, warmup=2, end=0.4) for t in (2, 3, 4, 6)]
    assert cosine == pytest.approx([0.8, 0.6 + 0.2 * math.cos(math.pi / 4), 0.6, 0.4])


def test_the_ratio_of_gradients_by_hand():
    "rho .5, running means of .9: (4, 1) gives (.4, .1), and (4, 2) after it (.76, .29)."
    ratio = GradRatio(0.5, decay=0.9)
    def one(ce, kd): return ratio.update(torch.tensor(ce), torch.tensor(kd)).item()
    assert one(4.0, 1.0) == pytest.approx(2.0)
    assert one(4.0, 2.0) == pytest.approx(0.5 * 0.76 / 0.29)
    assert one(math.nan, 2.0) == pytest.approx(0.5 * 0.76 / 0.29)  # what is no number is not remembered
    assert GradRatio(0.5).update(torch.tensor(4.0), torch.tensor(1e-9)).item() == 10.0  # bounded


def test_an_averaged_teacher_keeps_nine_tenths():
    old, new = dict(w=torch.tensor(1.0), n=torch.tensor(3)), dict(w=torch.tensor(2.0), n=torch.tensor(7))
    moved = ema_update(old, new)
    assert moved["w"].item() == pytest.approx(1.1) and moved["n"].item() == 7
    assert (old["w"].item(), new["w"].item()) == (1, 2)


# --- steps ------------------------------------------------------------------------------------------------

def test_the_proximal_gradient_pulls_back():
    p, a = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 2.0])
    p.grad = torch.tensor([0.5, 0.5])
    still = torch.tensor([5.0], requires_grad=True)  # without a gradient: left alone
    add_proximal_grad([p, still], [a, torch.zeros(1)], 0.1)
    assert p.grad.tolist() == pytest.approx([0.7, 0.4]) and still.grad is None


@pytest.mark.parametrize("fields, expected", [
    (dict(lr=0.1, momentum=0.5), 1 - 0.1 * 2 - 0.1 * (2 + 0.5 * 2)),
    (dict(lr=0.1, momentum=0.0, weight_decay=0.1), (1 - 0.1 * 2.1) - 0.1 * (2 + 0.1 * (1 - 0.21))),
    (dict(lr=0.1, optimizer="adamw", weight_decay=0.1, update="fp32"), (1 * 0.99 - 0.1) * 0.99 - 0.1)])
def test_two_steps_of_the_optimiser_by_hand(fields, expected):
    "The gradient is 2 at both steps; AdamW's step is then exactly its rate, and its decay apart from it."
    p = torch.ones(1, requires_grad=True)
    optimizer = make_optimizer(RunConfig(**fields), [p])
    for _ in range(2):
        p.grad = torch.tensor([2.0])
        optimizer.step()
    assert p.item() == pytest.approx(expected, rel=1e-5)


def test_a_step_forgets_its_gradients_and_feeds_zeros_for_none():
    heard = []

    class Listener(Rule):
        def receive(self, grads): heard.append([g.clone() for g in grads])
        def show(self): heard.append("shown")

    weights = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    others = [torch.ones(1, requires_grad=True)]
    weights[0].grad, others[0].grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    rule = Listener(RunConfig(), [grid([1] * n, 2) for n in (2, 1)], [w.data for w in weights])
    heard.clear()
    state = state_with()
    state.rule, state.optimizer = rule, torch.optim.SGD(others, 1.0)
    take_step(SimpleNamespace(weights=weights, others=others), state)
    assert [g.tolist() for g in heard[0]] == [[1, 2], [0]] and heard[1:] == ["shown"]
    assert others[0].item() == -2 and all(p.grad is None for p in (*weights, *others))


@pytest.mark.parametrize("images, mode", [(2, True), (1, False)])
def test_a_single_image_has_no_statistics(images, mode):
    "Batch normalisation trains on two images and more; on one it uses what it has."
    seen = []
    model = nn.Linear(1, 3)
    model.register_forward_hook(lambda m, x, y: seen.append(m.training))
    replica = SimpleNamespace(model=model, device=torch.device("cpu"), weights=[],
                              others=list(model.parameters()))
    state = state_with()
    state.optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step.local_step(replica, state, torch.ones(images, 1), torch.zeros(images, dtype=torch.int64))
    assert seen == [mode]


# --- a client's round -------------------------------------------------------------------------------------

def test_a_stochastic_uplink_is_stochastic():
    "Latent weights .3 of a level above the grid: three in ten go up, others at each client and round."
    n = 4000
    drawn = []
    for rounding, work in (("nearest", (0, 0)), ("stochastic", (0, 0)), ("stochastic", (0, 0)),
                           ("stochastic", (1, 0)), ("stochastic", (0, 1))):
        config = RunConfig(update="latent", rounding_up=rounding)
        rule = RULES["latent"](config, [grid([1] * n, 3)], [torch.zeros(n)])
        rule.layers[0].value.fill_(2.3 / 7)
        rule.layers[0].scale.fill_(1.0)
        state = state_with()
        state.config, state.rule = config, rule
        up, = finished_planes(state, ClientRound(*work, torch.arange(1)))
        drawn.append(up.levels)
    assert set(drawn[0].tolist()) == {2}
    sigma = (0.3 * 0.7 / n) ** 0.5
    for levels in drawn[1:]: assert levels.float().mean().item() == pytest.approx(2.3, abs=4.5 * sigma)
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[1], drawn[3]) and not torch.equal(drawn[1], drawn[4])


def small(classes: int, act=nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4), act(), nn.Flatten(),
                         nn.Linear(256, classes))


@pytest.fixture
def world():
    "A replica of a small network, what it received at four bits, a task of twenty images."
    register_model("noticed", small)
    from fedmpqkd.data.images import from_tensors
    from fedmpqkd.learn.vision import VisionTask
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(20) % 10
    task = VisionTask(from_tensors("noise", x, y, x, y, flip=False))
    config = dict(model="noticed", update="signed-planes", batch_size=10, lr=0.01)
    replica = Replica(RunConfig(**config), task)
    manifest = manifest_of(replica.layout)
    state = {n: t.detach().clone().contiguous() for n, t in replica.state.items()}
    bits = [4] * len(replica.layout.quantized)
    down = encode(Message(0, 0, 0, 0, downlink_entries(state, replica.layout, bits)), manifest)
    return SimpleNamespace(task=task, config=config, replica=replica, manifest=manifest, down=down)


@pytest.mark.parametrize("assignment, bits, delta", [
    ("uniform", 4, 0), ("random", 4, 0), ("prune-grow", 2, 2)])
def test_planes_are_dropped_only_where_bits_are_assigned_by_them(world, assignment, bits, delta):
    "All levels at three and less: two of four planes are empty."
    sent = [grid([3, -2, 1, 0] * (w.numel() // 4), 4) for w in world.replica.weights]
    config = RunConfig(**world.config, assignment=assignment)
    entries = uplink_entries(world.replica, config, sent)
    for name in world.replica.layout.quantized:
        assert (entries[name].bits, entries[name].delta) == (bits, delta)


@pytest.mark.parametrize("epochs", [1, 3])
def test_each_epoch_has_an_order_of_its_own(world, monkeypatch, epochs):
    "Every image once an epoch, in another order."
    seen = []
    real = type(world.task).batch
    def batch(self, index, *view):
        seen.append(index.tolist())
        return real(self, index, *view)
    monkeypatch.setattr(type(world.task), "batch", batch)
    config = RunConfig(**world.config, local_epochs=epochs)
    index = torch.arange(0, 20, 2)  # ten images: one batch an epoch
    work = ClientRound(0, 0, index)
    result = local_round(world.replica, config, world.task, work, [world.down], world.manifest)
    assert len(seen) == epochs == result.log["steps"]
    assert all(sorted(order) == index.tolist() for order in seen)
    assert len({tuple(order) for order in seen}) == epochs


@pytest.mark.parametrize("fails", [True, False])
def test_a_client_that_fails_keeps_its_memory(world, monkeypatch, fails):
    "Its model cannot be encoded: no message, the reason in the log, and what it knew before."
    config = RunConfig(**world.config, alpha=0.5, teacher="ema", kd_warmup_rounds=0)
    assert remembers(config)
    old = {n: t + 1 for n, t in decode(world.down, world.manifest).dense().items()}
    if fails:
        def overflow(*args): raise client.WireError("fc.weight: NaN or infinity")
        monkeypatch.setattr(client, "encode", overflow)
    work = ClientRound(0, 0, torch.arange(20), dict(old))
    result = local_round(world.replica, config, world.task, work, [world.down], world.manifest)
    if fails:
        assert result.message is None and "NaN" in result.log["failed"]
        assert all(torch.equal(result.memory[n], old[n]) for n in old)
        return
    sent = decode(world.down, world.manifest).dense()  # otherwise nine tenths of the old and one of what came
    for n in world.replica.layout.others:
        assert torch.allclose(result.memory[n], 0.9 * old[n] + 0.1 * sent[n], atol=1e-6)


def test_a_message_says_whose_it_is_and_how_many(world):
    config = RunConfig(**world.config)
    work = ClientRound(7, 5, torch.arange(12))
    result = local_round(world.replica, config, world.task, work, [world.down], world.manifest)
    message = decode(result.message, world.manifest)
    assert (message.client, message.round, message.samples) == (7, 5, 12)
    assert result.log["steps"] == 2


def test_a_teacher_that_stays_comes_with_the_rounds_that_are_named():
    "Two rounds without, then a new one every third round."
    config = RunConfig(alpha=0.5, kd_warmup_rounds=2, teacher_refresh=3, update="signed-planes", rounds=12)
    assert [t for t in range(2, 12) if refreshed(config, t)] == [2, 5, 8, 11]
    assert remembers(config) and not remembers(RunConfig(alpha=0.5, update="signed-planes"))
