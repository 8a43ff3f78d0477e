"Low-bit quantisers: worked tables, numerical derivatives, and PyTorch, torchao and brevitas as witnesses."

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from fedmpqkd.models.vision import build_model
from fedmpqkd.quant.lowbit import (
    QUANTIZERS,
    EwgsRound,
    dorefa_act,
    dorefa_weight,
    ewgs,
    ewgs_delta,
    ewgs_normal,
    ewgs_out,
    ewgs_range,
    hutchinson,
    layer_inputs,
    lowbit_student,
    lsq,
    lsq_range,
    lsq_step,
    parameter_groups,
    quantizers,
    update_delta,
)

torch.set_num_threads(1)
methods = st.sampled_from(sorted(QUANTIZERS))
many = settings(max_examples=40, deadline=None, derandomize=True)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the tables ---------------------------------------------------------------------------------------------


def test_lsq_table():
    x = torch.tensor([-5, -1.2, 0.3, 0.6, 2.4], requires_grad=True)
    s = torch.ones(5, requires_grad=True)
    y = lsq(x, s, 2, scale_grad=False)
    assert y.tolist() == [-2, -1, 0, 1, 1]
    y.sum().backward()
    assert s.grad.tolist() == pytest.approx([-2, 0.2, -0.3, 0.4, 1])
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_ewgs_table():
    x = torch.tensor([-0.2, 0.1, 0.3, 0.49, 0.51, 0.9, 1.3])
    n = x.clamp(0, 1).requires_grad_()
    q = EwgsRound.apply(n, 4, torch.tensor(0.1))
    assert q.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 1, 1])
    q.backward(-torch.ones(7))
    assert n.grad.tolist() == pytest.approx([-1, -0.99, -1.0033, -0.9843, -1.0157, -1.01, -1], abs=5e-5)


def test_dorefa_table():
    assert dorefa_weight(torch.tensor([-2, -0.5, 0, 0.5, 2]), 2).tolist() == pytest.approx(
        [-1, -1 / 3, 1 / 3, 1 / 3, 1])
    a = torch.tensor([-1, 0.1, 0.4, 0.6, 2])
    assert dorefa_act(a, 2).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert dorefa_act(torch.tensor([-2, -0.4, 0.4, 2]), 2, signed=True).tolist() == pytest.approx(
        [-1, -1 / 3, 1 / 3, 1])


def test_where_the_quantisers_start():
    w = draw(0, 50, 20)
    assert float(lsq_step(w, 3)) == pytest.approx(2 * float(w.abs().mean()) / math.sqrt(3))
    a = w.relu()
    assert float(lsq_step(a, 3, signed=False)) == pytest.approx(2 * float(a.mean()) / math.sqrt(7))
    low, high = ewgs_range(w, True)
    assert [float(low), float(high)] == pytest.approx([-3 * float(w.std()), 3 * float(w.std())])
    low, high = ewgs_range(a + 1, False)
    assert float(low) == 1.0 and float(high) == pytest.approx(3 * float(a.std()) / math.sqrt(1 - 2 / math.pi))
    for bits in range(1, 9):
        ends = ewgs_range(w, True, 0)
        out = ewgs_out(w, *ends, bits, True, 0)
        size = ewgs(w, *ends, out, bits).abs().mean(1)
        torch.testing.assert_close(size, w.abs().mean(1))


# --- derivatives --------------------------------------------------------------------------------------------
# Rounding has no useful derivative, so the straight-through rule is the derivative of a surrogate: the same
# function with the rounding error frozen where it is. Its numerical derivative is what backward must give.


def away(x: torch.Tensor, levels: torch.Tensor, margin: float = 0.01) -> torch.Tensor:
    "Values whose position in levels is not near a tie of rounding."
    return x[((levels - levels.floor()) - 0.5).abs() > margin]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_gradients_are_those_of_the_surrogate(bits, signed):
    low, high = lsq_range(bits, signed)
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    x = draw(bits, 300) * 0.37 * max(high, 1)
    u = x / 0.37
    x = x[(((u - u.floor()) - 0.5).abs() > 0.01) & ((u - low).abs() > 0.01) & ((u - high).abs() > 0.01)]
    x.requires_grad_()
    clipped = (x / step).clamp(low, high).detach()
    error = clipped.round() - clipped

    def surrogate(x, step): return ((x / step).clamp(low, high) + error) * step

    assert torch.autograd.gradcheck(surrogate, (x, step))
    mine = torch.autograd.grad(lsq(x, step, bits, signed, scale_grad=False).pow(2).sum(), (x, step))
    theirs = torch.autograd.grad(surrogate(x, step).pow(2).sum(), (x, step))
    for a, b in zip(mine, theirs, strict=True): torch.testing.assert_close(a, b)


def test_gradcheck_of_the_step_outside():
    "Outside the range there is no rounding error, and the derivative is a true one."
    x, step = torch.tensor([-9.0, 9.0]).double(), torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: lsq(x, s, 3, scale_grad=False), (step,))


@pytest.mark.parametrize("signed", [True, False])
def test_ewgs_gradients_are_those_of_the_surrogate(signed):
    x = draw(1, 200)
    params = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.9, 1.3, -0.7)]
    normal = ((x + 0.9) / 2.2)
    x = x[(((normal * 3) % 1 - 0.5).abs() > 0.01) & (normal.abs() > 0.01) & ((normal - 1).abs() > 0.01)]
    x.requires_grad_()
    frozen = ((x.detach() + 0.9) / 2.2).clamp(0, 1)
    error = (frozen * 3).round() / 3 - frozen

    def surrogate(x, lower, upper, out):
        rounded = ((x - lower) / (upper - lower)).clamp(0, 1) + error
        return (2 * rounded - 1 if signed else rounded) * out.abs()

    assert torch.autograd.gradcheck(surrogate, (x, *params))
    torch.testing.assert_close(ewgs(x, *params, 2, signed), surrogate(x, *params))
    mine = torch.autograd.grad(ewgs(x, *params, 2, signed).pow(2).sum(), (x, *params))
    theirs = torch.autograd.grad(surrogate(x, *params).pow(2).sum(), (x, *params))
    for a, b in zip(mine, theirs, strict=True): torch.testing.assert_close(a, b)


def test_ewgs_without_delta_is_straight_through():
    n = draw(2, 100).abs().remainder(1).requires_grad_()
    upstream = draw(3, 100)
    plain, = torch.autograd.grad(EwgsRound.apply(n, 4, torch.tensor(0.0)), n, upstream)
    assert torch.equal(plain, upstream)
    scaled, = torch.autograd.grad(EwgsRound.apply(n, 4, torch.tensor(1e-3).double()), n, upstream)
    error = n.detach() - (n.detach() * 3).round() / 3
    torch.testing.assert_close(scaled, upstream * (1 + 1e-3 * upstream.sign() * error))


def test_dorefa_gradients_are_those_of_the_surrogate():
    w = draw(4, 60)
    top, largest = 3, w.tanh().abs().max()
    position = (w.tanh() / (2 * largest) + 0.5) * top
    w = torch.cat([w[((position % 1) - 0.5).abs() > 0.01], w[w.abs().argmax()][None]]).requires_grad_()
    frozen = ((w.detach().tanh() / (2 * largest) + 0.5) * top)
    error = frozen.round() - frozen

    def surrogate(w): return 2 * ((w.tanh() / (2 * largest) + 0.5) * top + error) / top - 1

    assert torch.autograd.gradcheck(surrogate, (w,))
    mine, = torch.autograd.grad(dorefa_weight(w, 2).pow(2).sum(), w)
    theirs, = torch.autograd.grad(surrogate(w).pow(2).sum(), w)
    torch.testing.assert_close(mine, theirs)


def test_hutchinson_finds_the_trace():
    "Of a quadratic form with a dense Hessian, on average; the exact trace is known."
    a = draw(5, 6, 6)
    hessian, b = a @ a.T, draw(6, 6)
    x, z = draw(7, 6).requires_grad_(), draw(8, 2).requires_grad_()
    loss = x @ hessian @ x / 2 + b @ x + z.pow(3).sum() + x[0] * z[0]
    (tx, tz), (gx, gz) = hutchinson(loss, [x, z], torch.Generator().manual_seed(0), probes=4000)
    torch.testing.assert_close(gx, (hessian @ x + b + z[0] * torch.eye(6)[0]).detach(), atol=1e-9, rtol=1e-9)
    # the cross term x0 z0 adds noise but nothing on average
    assert float(tx) == pytest.approx(float(hessian.trace()), rel=0.05)
    want = float(6 * z.detach().sum())
    assert float(tz) == pytest.approx(want, rel=0.05, abs=0.1)
    assert float(ewgs_delta(tx, gx)) == pytest.approx(float(tx) / 6 / 3 / float(gx.std()))


# --- properties ---------------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), st.integers(1, 8), methods, st.booleans(), st.booleans())
def test_few_levels_and_no_nan(seed, bits, name, weight, channels):
    x = draw(seed, 4, 50, dtype=torch.float32) * 10.0 ** (seed % 7 - 3)
    x = (x if weight else x.relu()).requires_grad_()
    quantizer = QUANTIZERS[name](x, bits, weight, 0 if channels else None)
    y = quantizer(x)
    rows = y if channels else y.flatten()[None]
    assert all(len(row.unique()) <= 2**bits for row in rows) and torch.isfinite(y).all()
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [x, *quantizer.parameters()])


@many
@given(st.integers(0, 10**6), st.sampled_from(["lsq", "ewgs"]), st.integers(2, 8))
def test_channels_are_quantised_apart(seed, name, bits):
    w = draw(seed, 3, 4, 2)
    whole = QUANTIZERS[name](w, bits, True, 0)(w)
    apart = torch.cat([QUANTIZERS[name](row, bits, True)(row) for row in w.split(1)])
    torch.testing.assert_close(whole, apart)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_zeros_are_harmless(name):
    "A layer that was pruned, or a batch behind a dead ReLU."
    x = torch.zeros(3, 4, requires_grad=True)
    for weight in (True, False):
        y = QUANTIZERS[name](x, 2, weight, 0 if weight else None)(x)
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5])
def test_bits_outside_the_range(bits):
    x, one = torch.ones(2), torch.tensor(1.0)
    calls = [lambda: lsq(x, one, bits), lambda: ewgs(x, -one, one, one, bits), lambda: dorefa_weight(x, bits),
             lambda: dorefa_act(x, bits), *[lambda k=k: k(x, bits, True) for k in QUANTIZERS.values()],
             lambda: lowbit_student(nn.Linear(2, 2), x[None], weight_bits=bits),
             lambda: lowbit_student(nn.Linear(2, 2), x[None], act_bits=bits)]
    for call in calls:
        with pytest.raises(ValueError, match="from 1 to 8"): call()


# --- witnesses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_agrees_with_pytorchs_learnable_fake_quantisation(bits, signed):
    """Values, and gradients of values and step, per tensor and per channel.

    PyTorch calls a value inside if its *level* is, LSQ if the value is: half a level apart at the ends."""
    low, high = lsq_range(bits, signed)
    steps = torch.linspace(0.2, 1.2, 6)
    x = draw(bits, 6, 40, dtype=torch.float32) * 3
    x = x if signed else x.abs()
    for step in (0.5, steps.view(6, 1)):
        u = x / step
        between = ((u > high) & (u < high + 0.51)) | ((u < low) & (u > low - 0.51))
        x = torch.where(between, 0.1, x)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    s, t = (torch.tensor([0.5], requires_grad=True) for _ in range(2))
    factor = 1 / math.sqrt(x.numel() * high)
    a = lsq(mine, s, bits, signed)
    b = torch._fake_quantize_learnable_per_tensor_affine(theirs, t, torch.zeros(1), low, high, factor)
    torch.testing.assert_close(a, b)
    weight = draw(9, 6, 40, dtype=torch.float32)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(s.grad, t.grad, rtol=1e-4, atol=1e-5)

    s, t = steps.clone().view(6, 1).requires_grad_(), steps.clone().requires_grad_()
    a = lsq(x, s, bits, signed)
    b = torch._fake_quantize_learnable_per_channel_affine(
        x, t, torch.zeros(6), 0, low, high, 1 / math.sqrt(40 * high))
    torch.testing.assert_close(a, b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(s.grad.flatten(), t.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_agrees_with_torchao(bits):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    low, high = lsq_range(bits, True)
    x = draw(bits, 6, 40, dtype=torch.float32)
    for step, block in ((torch.tensor(0.3), (6, 40)), (torch.linspace(0.1, 0.9, 6).view(6, 1), (1, 40))):
        zero = torch.zeros_like(step.flatten(), dtype=torch.int32)
        q = primitives.quantize_affine(x, block, step.flatten(), zero, torch.int8, low, high)
        back = primitives.dequantize_affine(q, block, step.flatten(), zero, torch.int8, low, high)
        torch.testing.assert_close(lsq(x, step, bits), back)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_agrees_with_brevitas(bits, signed):
    """brevitas' integer quantiser with a straight-through rounding: values, and gradients of values and step.

    It rounds before it cuts: the derivative at the outermost levels is that of cutting, and is left out."""
    pytest.importorskip("brevitas")
    from brevitas.core.bit_width import BitWidthConst
    from brevitas.core.function_wrapper import RoundSte, TensorClamp
    from brevitas.core.quant import IntQuant

    theirs = IntQuant(narrow_range=False, signed=signed, input_view_impl=nn.Identity(),
                      float_to_int_impl=RoundSte(), tensor_clamp_impl=TensorClamp())
    low, high = lsq_range(bits, signed)
    x = torch.cat([draw(bits, 300, dtype=torch.float32), torch.tensor([-99.0, 99.0])]) * 0.1 * 2**bits
    u = x / 0.3
    torch.testing.assert_close(
        lsq(x, torch.tensor(0.3), bits, signed),
        theirs(torch.tensor(0.3), torch.tensor(0.0), BitWidthConst(bits)(), x))
    x = x[((u.round() > low) & (u.round() < high)) | (u < low - 1) | (u > high + 1)]
    a, b = (x.clone().requires_grad_() for _ in range(2))
    s, t = (torch.tensor(0.3, requires_grad=True) for _ in range(2))
    left = lsq(a, s, bits, signed, scale_grad=False)
    right = theirs(t, torch.tensor(0.0), BitWidthConst(bits)(), b)
    torch.testing.assert_close(left, right)
    (left * x.cos()).sum().backward()
    (right * x.cos()).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(s.grad, t.grad, rtol=1e-4, atol=1e-4)


# --- the student --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    "A small network whose batch statistics are not the initial ones."
    model = build_model("resnet8", 10, seed=0).train()
    for k in range(3): model(draw(k, 32, 3, 32, 32, dtype=torch.float32))
    return model.eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return draw(9, 32, 3, 32, 32, dtype=torch.float32)


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
def test_a_student_has_few_levels_and_leaves_its_teacher_alone(teacher, example, method):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = lowbit_student(teacher, example, method, 2, 3)
    names = list(layer_inputs(teacher, example))
    seen: dict[str, int] = {}
    for name in names:
        student.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, len(args[0].unique())))
    student(example)
    for name in names:
        layer = student.get_submodule(name)
        if name in (names[0], names[-1]):
            assert not parametrize.is_parametrized(layer)
            assert torch.equal(layer.weight, teacher.get_submodule(name).weight)
        else:
            assert len(layer.weight.unique()) <= 4
            assert torch.equal(layer.parametrizations.weight.original, teacher.get_submodule(name).weight)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not student.training and not any(hasattr(m, "act_quantizer") for m in teacher.modules())


def test_inputs_of_layers_are_quantised(teacher, example):
    student = lowbit_student(teacher, example, "lsq", 32, 2)
    levels = []
    for m in student.modules():
        if hasattr(m, "act_quantizer"):
            m.act_quantizer.register_forward_hook(lambda _, args, out: levels.append(len(out.unique())))
            assert not parametrize.is_parametrized(m)
    student(example)
    assert levels and max(levels) <= 4


@pytest.mark.parametrize("method", ["lsq", "ewgs"])
def test_many_bits_are_close_to_the_teacher(teacher, example, method):
    "LSQ's start clips little at 8 bits; EWGS' clips beyond three deviations."
    with torch.no_grad():
        student = lowbit_student(teacher, example, method, 8, 8)
        pair = torch.stack([student(example).flatten(), teacher(example).flatten()])
    assert pair.corrcoef()[0, 1] > 0.97


def test_full_precision_everywhere_is_the_teacher(teacher, example):
    student = lowbit_student(teacher, example, "lsq", 32, 32)
    assert torch.equal(student(example), teacher(example)) and not quantizers(student)


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
def test_a_student_learns_and_can_be_kept(teacher, example, method):
    student = lowbit_student(teacher, example, method, 2, 2, per_channel=True).train()
    optimiser = torch.optim.Adam(parameter_groups(student, 3e-3, 1e-3))
    targets = torch.arange(32) % 10
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(student(example), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in student.parameters())

    fresh = lowbit_student(teacher, example, method, 2, 2, per_channel=True).train()
    fresh.load_state_dict(student.state_dict())
    twin = copy.deepcopy(student)
    student.eval(), fresh.eval(), twin.eval()
    with torch.no_grad():
        assert torch.equal(student(example), fresh(example)) and torch.equal(student(example), twin(example))


def test_parameter_groups_hold_each_parameter_once(teacher, example):
    student = lowbit_student(teacher, example, "ewgs")
    weights, learnt = parameter_groups(student, 1.0, 0.01, weight_decay=0.1)
    ids = [id(p) for g in (weights, learnt) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters()) and len(set(ids)) == len(ids)
    assert len(learnt["params"]) == 3 * len(quantizers(student)) and learnt["weight_decay"] == 0
    assert len(parameter_groups(lowbit_student(teacher, example, "dorefa"), 1.0, 1.0)) == 1


def test_names_of_layers_and_methods(teacher, example):
    whole = lowbit_student(teacher, example, full_precision=())
    assert len(quantizers(whole)) == 2 * len(layer_inputs(teacher, example))
    assert quantizers(whole)[0].signed and quantizers(lowbit_student(teacher, example, full_precision=["fc"]))
    for bad, message in ((dict(method="pact"), "unknown quantiser 'pact'"),
                         (dict(full_precision=["conv9"]), "no layer 'conv9'"),
                         (dict(full_precision=list(layer_inputs(teacher, example))), "no layer is left")):
        with pytest.raises(ValueError, match=message): lowbit_student(teacher, example, **bad)
    with pytest.raises(ValueError, match="no convolution"): lowbit_student(nn.ReLU(), example)


def test_negative_inputs_get_signed_quantisers():
    "A linear bottleneck has no ReLU behind it."
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    student = lowbit_student(model, draw(0, 64, 4, dtype=torch.float32), "lsq", 2, 2)
    assert [student[k].act_quantizer.signed for k in (2, 3)] == [False, True]


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet20-A"])
def test_other_networks(name):
    x = draw(1, 4, 3, 32, 32, dtype=torch.float32)
    student = lowbit_student(build_model(name, 10), x, "lsq", 4, 4)
    student(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_deltas_come_from_the_curvature(teacher, example):
    "Against the definition, with the trace of one small layer summed from its full Hessian."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = draw(3, 40, 3), torch.arange(40) % 2
    student = lowbit_student(model, x, "ewgs", 2, 32, delta=0.5).train()
    q, = quantizers(student)
    layer, training = student[2], student.training

    def loss_of(normal: torch.Tensor) -> torch.Tensor:
        weight = (2 * (normal.view(2, 4) - 0.5)) * q.out.abs()
        h = F.linear(torch.tanh(student[0](x)), weight, layer.bias)
        return F.cross_entropy(student[4](torch.tanh(h)), y)

    normal = ewgs_normal(layer.parametrizations.weight.original, q.lower, q.upper, 2).detach().flatten()
    hessian = torch.autograd.functional.hessian(loss_of, normal)
    grad = torch.autograd.functional.jacobian(loss_of, normal)
    want = max(0.0, float(hessian.trace() / 8 / (3 * grad.std())))
    losses = [lambda net: F.cross_entropy(net(x), y)] * 600
    got = update_delta(student, losses, torch.Generator().manual_seed(0))
    assert got[0] == pytest.approx(want, rel=0.1, abs=1e-3) and float(q.delta) == pytest.approx(got[0])
    assert student.training == training and q.normal.numel() == 0


def test_updating_deltas_leaves_batch_statistics(teacher, example):
    student = lowbit_student(teacher, example, "ewgs", 2, 2).train()
    before = {k: v.clone() for k, v in student.state_dict().items() if not k.endswith("delta")}
    y = torch.arange(32) % 10
    losses = [lambda net: F.cross_entropy(net(example), y)] * 2
    deltas = update_delta(student, losses, torch.Generator().manual_seed(0))
    assert student.training and len(deltas) == len(quantizers(student)) and all(d >= 0 for d in deltas)
    assert all(torch.equal(student.state_dict()[k], v) for k, v in before.items())
