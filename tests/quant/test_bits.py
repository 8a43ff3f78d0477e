"Bit planes against NumPy and autograd, the rules against torch.optim, pruning-growing by its invariants."

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fedmpqkd.core.config import RunConfig
from fedmpqkd.data.images import from_tensors
from fedmpqkd.federation.server import Server, aggregate, downlink, receive
from fedmpqkd.learn.client import ClientRound, local_round, starting_planes
from fedmpqkd.learn.replica import Replica
from fedmpqkd.learn.vision import VisionTask, image_task
from fedmpqkd.models.vision import layout
from fedmpqkd.quant.bits import (
    RULES,
    IntegerSR,
    Latent,
    Official,
    SignedPlanes,
    as_fraction,
    bit_statistics,
    emptied_share,
    group_lasso,
    kappa,
    lasso_moved,
    moved_share,
    msb_hinge,
    official_move,
    plane_weights,
    prune_grow,
    reduce_precision,
    to_planes,
    uniform_bits,
)
from fedmpqkd.quant.quantize import Planes, fake_quantize, quantize
from fedmpqkd.wire.format import Message, decode, encode
from fedmpqkd.wire.messages import downlink_entries, manifest_of

torch.set_num_threads(1)
many = settings(max_examples=50, deadline=None, derandomize=True)
RESNET20 = [432] + [2304] * 6 + [4608] + [9216] * 5 + [18432] + [36864] * 5 + [640]


def draw(seed: int, *shape: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planes_of(levels: list[int], bits: int, scale: float = 1.0) -> Planes:
    r = torch.tensor(levels, dtype=torch.uint8)
    return Planes(r, torch.ones(len(r), dtype=torch.int8), scale, bits)


# --- planes -------------------------------------------------------------------------------------------------


def test_t1_worked_example():
    q = quantize(torch.tensor([0.7, -1.0, 0.2, 0.05]), 3)
    B = to_planes(q.levels, 3)
    assert B.T.tolist() == [[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]]
    W = q.scale * q.sign * (plane_weights(3) @ B)
    assert W.tolist() == pytest.approx([0.7143, -1, 0.1429, 0], abs=5e-5)


@many
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_planes_are_binary_digits(seed, bits):
    r = np.random.default_rng(seed).integers(0, 2**bits, (3, 5)).astype(np.uint8)
    digits = np.unpackbits(r[..., None], axis=-1)[..., 8 - bits :]  # NumPy's, most significant first
    assert np.array_equal(to_planes(torch.from_numpy(r), bits).numpy(), np.moveaxis(digits, -1, 0))
    sign = np.where(r % 3 == 0, -1, 1).astype(np.int8)
    signed = to_planes(torch.from_numpy(r), bits, torch.from_numpy(sign))
    assert np.array_equal(signed.numpy(), np.moveaxis(digits, -1, 0).astype(np.float32) * sign)


@pytest.mark.parametrize('bits', range(1, 9))
def test_t3_effective_learning_rate(bits):
    "kappa = sum of c_i squared; an SGD step on planes of a random loss moves W by eta * S**2 * kappa * g."
    c = [Fraction(2**i, 2**bits - 1) for i in range(bits)]
    assert sum(c) == 1 and kappa(bits) == pytest.approx(float(sum(x * x for x in c)), rel=1e-12)
    w, g, eta = draw(bits, 30, size=0.3), draw(bits + 50, 30), 0.1
    start, shown = quantize(w, bits), torch.empty(30)
    config = RunConfig(
        update='signed-planes', bit_lr='plain', scale_update='fixed', lambda_b=0, lr=eta * 0.01
    )
    rule = SignedPlanes(config, [start], [shown])
    rule.receive([g])
    move = start.dequantize() - rule.layers[0].value
    assert torch.allclose(move, eta * 0.01 * start.scale**2 * kappa(bits) * g, atol=1e-6)


def test_t2_group_lasso_value():
    B = to_planes(torch.tensor([5, 7, 1, 0]), 3)
    assert group_lasso(B).item() == pytest.approx(49.755, abs=5e-4)


@many
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 40))
def test_group_lasso_counts_ones(seed, bits, d):
    "Binary planes: N d times the sum of roots of the counts of ones; the gradient has length N d or is zero."
    levels = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, d))
    B = to_planes(levels, bits).requires_grad_(True)
    value = group_lasso(B)
    roots = sum(max(n, 1e-8) ** 0.5 for n in B.sum(1).tolist())
    assert value.item() == pytest.approx(bits * d * roots, rel=1e-5)
    value.backward()
    for plane, slope in zip(B.detach(), B.grad, strict=True):
        assert slope.norm().item() == pytest.approx(bits * d if plane.any() else 0, rel=1e-5)


# --- signed planes against the thing written out ------------------------------------------------------------


def by_autograd(
    start: Planes, gradients: list[torch.Tensor], c: RunConfig, total: int
) -> tuple[torch.Tensor, float]:
    "B~ and S as leaves, task loss <g, W_q>, lasso in the loss, momentum by hand, in double precision."
    N, d, k = start.bits, start.levels.numel(), plane_weights(start.bits).double()
    B = (to_planes(start.levels.reshape(-1), N) * start.sign.reshape(-1)).double().requires_grad_(True)
    S = torch.tensor(start.scale, dtype=torch.float64, requires_grad=True)
    momentum_buffer, scale_speed = torch.zeros_like(B), 0.0
    for g in gradients:
        u = k @ B
        q = (u.clamp(-1, 1) * (2**N - 1)).round() / (2**N - 1)
        work = (S * (u + (q - u).detach()) * g.double().reshape(-1)).sum()
        lasso = c.lambda_b / total * N * d * (1e-8 + B.square().sum(1)).sqrt().sum()
        slope, scale_slope = torch.autograd.grad(work, (B, S))
        if c.bit_lr == 'precond':
            slope = slope / (S.detach() ** 2 * kappa(N))
        momentum_buffer = c.momentum * momentum_buffer + slope + torch.autograd.grad(lasso, B)[0]
        scale_speed = c.momentum * scale_speed + scale_slope
        with torch.no_grad():
            B -= c.lr * momentum_buffer
            if c.scale_update == 'sgd':
                S -= c.lr * scale_speed
            if c.scale_update != 'overflow':
                B.clamp_(-2, 2)
            elif (over := (k @ B).abs().max()) > 1:
                S *= over
                B /= over
                momentum_buffer /= over
    return (S * (k @ B)).detach(), S.item()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from(['precond', 'plain']),
    st.sampled_from(['overflow', 'fixed', 'sgd']),
    st.sampled_from([0, 0.01, 2.0]),
)
def test_signed_planes_equal_autograd(seed, shape, bits, steps, bit_lr, scale_update, lambda_b):
    start, other = quantize(draw(seed, *shape, size=0.3), bits), quantize(draw(seed + 1, 7), 3)
    gradients = [draw(seed + 2 + i, *shape, size=0.3) for i in range(steps)]
    lr = 0.05 if bit_lr == 'precond' else 0.5
    config = RunConfig(
        update='signed-planes', bit_lr=bit_lr, scale_update=scale_update, lambda_b=lambda_b, lr=lr
    )
    shown = [torch.empty(shape), torch.empty(7)]
    rule = SignedPlanes(config, [start, other], shown)
    assert torch.allclose(shown[0], start.dequantize(), rtol=1e-6)
    for g in gradients:
        rule.receive([g, torch.zeros(7)])
        rule.show()
    value, scale = by_autograd(start, gradients, config, start.levels.numel() + 7)
    assume(scale > 1e-4)  # a scale that SGD drives through zero is stopped there; the reference goes on
    layer, step = rule.layers[0], scale / (2**bits - 1)
    assert float(layer.scale) == pytest.approx(scale, rel=1e-3)
    assert torch.allclose(layer.value.double(), value, atol=2e-3 * step + 1e-5 * scale)
    levels = shown[0].reshape(-1).double() / step
    assert torch.allclose(levels, levels.round(), atol=1e-2 * 2**bits)  # on the grid
    sure = ((value / step) % 1 - 0.5).abs() > 1e-2
    expected = (value / step).round().clamp(-(2**bits) + 1, 2**bits - 1)
    assert torch.allclose(levels[sure], expected[sure], atol=1e-2 * 2**bits)


def test_without_lasso_they_are_torch_sgd():
    "Preconditioned, growing scale, no lasso: the latent weight is that of torch.optim.SGD with momentum."
    for bits, seed in itertools.product((1, 2, 4, 8), range(3)):
        start, shown = quantize(draw(seed, 40), bits), torch.empty(40)
        rule = SignedPlanes(RunConfig(update='signed-planes', lambda_b=0, lr=0.1), [start], [shown])
        w = nn.Parameter(start.dequantize())
        sgd = torch.optim.SGD([w], 0.1, 0.9)
        for i in range(6):
            w.grad = draw(seed + i + 9, 40)
            rule.receive([w.grad.clone()])
            sgd.step()
        assert torch.allclose(rule.layers[0].value, w, atol=2e-5)


def test_two_positive_planes_at_half_the_rate():
    "BSQ's p and n both receive the gradient, so p - n moves twice as fast."
    start, eta = quantize(draw(3, 20, size=0.3), 3), 0.02
    B = to_planes(start.levels, 3)
    p = (B * (start.sign > 0)).clone().requires_grad_(True)
    n = (B * (start.sign < 0)).clone().requires_grad_(True)
    config = RunConfig(
        update='signed-planes', bit_lr='plain', scale_update='fixed', lambda_b=0, momentum=0, lr=2 * eta
    )
    rule = SignedPlanes(config, [start], [torch.empty(20)])
    for i in range(4):
        g = draw(i, 20)
        loss = (start.scale * (plane_weights(3) @ (p - n)) * g).sum()
        for leaf, slope in zip((p, n), torch.autograd.grad(loss, (p, n)), strict=True):
            leaf.data -= eta * slope
        rule.receive([g])
    weights = (start.scale * (plane_weights(3) @ (p - n))).detach()
    assert torch.allclose(rule.layers[0].value, weights, atol=1e-6)


@pytest.mark.parametrize('update', ['signed-planes', 'latent', 'int-sr'])
def test_a_weight_crosses_zero(update):
    start, shown = quantize(torch.tensor([0.5, 1.0]), 4), torch.empty(2)
    config = RunConfig(update=update, lambda_b=0, lr=0.1)
    rule = RULES[update](config, [start], [shown], torch.Generator().manual_seed(0))
    for _ in range(12):
        rule.receive([torch.tensor([0.6, 0.0])])
        if rule.shadows():
            rule.layers[0].value.sub_(0.1 * rule.layers[0].value.grad)
        rule.show()
    assert shown[0] < 0


@pytest.mark.parametrize('update', list(RULES))
@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_every_rule_starts_from_what_arrived_and_returns_it(update, bits):
    start, shown = quantize(draw(bits, 4, 3, 3, 3, size=0.2), bits), torch.empty(4, 3, 3, 3)
    rule = RULES[update](RunConfig(update=update), [start], [shown], torch.Generator())
    assert torch.allclose(shown, start.dequantize(), rtol=1e-6, atol=0)
    (back,) = rule.finish()
    assert torch.equal(back.levels, start.levels) and torch.equal(back.sign, start.sign)
    assert (back.scale, back.bits, back.delta) == (pytest.approx(start.scale, rel=1e-6), bits, 0)
    assert torch.equal(rule.finish(torch.Generator().manual_seed(0))[0].sign, start.sign)


def test_what_the_scale_does():
    "overflow: grows with the largest weight, never shrinks; fixed: stays, and weights saturate on its grid."
    start, push = quantize(torch.tensor([0.5, -1.0]), 2), torch.tensor([-4.0, 4.0])
    for scale_update, scale, shown_max in (('overflow', 1.4, 1.4), ('fixed', 1.0, 1.0)):
        shown = torch.empty(2)
        config = RunConfig(update='signed-planes', scale_update=scale_update, lambda_b=0, lr=0.1)
        rule = SignedPlanes(config, [start], [shown])
        rule.receive([push])
        rule.show()
        assert float(rule.layers[0].scale) == pytest.approx(scale)
        assert shown.abs().max().item() == pytest.approx(shown_max)
        for _ in range(30):
            rule.receive([-push])
            rule.show()
        if scale_update == 'fixed':
            assert rule.layers[0].state['planes'].abs().max() <= 2
        assert rule.layers[0].scale >= scale - 1e-6


# --- the other rules ----------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0, 5.0]))
def test_latent_equals_a_parameter_behind_fake_quantisation(seed, bits, lambda_b):
    start, shown = quantize(draw(seed, 12, size=0.3), bits), torch.empty(12)
    config = RunConfig(update='latent', lambda_b=lambda_b, lr=0.05)
    rule, w = Latent(config, [start], [shown]), nn.Parameter(start.dequantize())
    ours, theirs = torch.optim.SGD(rule.shadows(), 0.05, 0.9), torch.optim.SGD([w], 0.05, 0.9)
    for i in range(4):
        g = draw(seed + i + 1, 12)
        theirs.zero_grad()
        limit = (2 ** (bits - 1) - 1) / (2**bits - 1)
        hinge = torch.linalg.vector_norm((w.abs() / w.detach().abs().max() - limit).clamp_min(0))
        ((fake_quantize(w, bits) * g).sum() + lambda_b * bits * hinge).backward()
        rule.receive([g])
        ours.step()
        rule.show()
        theirs.step()
        assert torch.allclose(rule.layers[0].value, w, atol=1e-4)


@many
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_hinge_is_zero_iff_the_first_plane_is_empty(seed, bits):
    r = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, 6)).to(torch.uint8)
    r[::2] = r[::2] % 2 ** (bits - 1)
    q = replace(planes_of([0] * 6, bits), levels=r)
    empty = to_planes(r, bits)[0] == 0
    assert torch.equal(msb_hinge(q.dequantize(), torch.tensor(1.0), bits) < 1e-6, empty)


@many
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(-0.4, 0.4))
def test_integer_steps_are_whole_bounded_and_right_on_average(seed, bits, g):
    n, top, config = 4000, 2**bits - 1, RunConfig(update='int-sr', lambda_b=0, lr=0.1, momentum=0)
    level = int(np.random.default_rng(seed).integers(0, top + 1))
    start, shown = planes_of([level] * n, bits, 0.5), torch.empty(n)
    rule = IntegerSR(config, [start], [shown], torch.Generator().manual_seed(seed))
    rule.receive([torch.full((n,), g)])
    rule.show()
    levels = shown.double() * top / 0.5
    assert torch.allclose(levels, levels.round(), atol=1e-3) and levels.abs().max() <= top + 1e-3
    move = 0.1 * g * top / 0.5
    if level - np.ceil(move) < -top or level - np.floor(move) > top:
        return  # would saturate
    f = move % 1
    assert abs(level - levels.mean().item() - move) <= 5.5 * (f * (1 - f) / n) ** 0.5 + 1e-4


def test_integer_momentum_is_that_of_sgd():
    config, start = RunConfig(update='int-sr', lambda_b=0, lr=0.1), planes_of([100] * 5000, 8, 1.0)
    rule = IntegerSR(config, [start], [torch.empty(5000)], torch.Generator().manual_seed(0))
    w = nn.Parameter(torch.tensor(100 / 255))
    sgd = torch.optim.SGD([w], 0.1, 0.9)
    for i in range(4):
        w.grad = torch.tensor(0.1 * (-1) ** i + 0.05)
        sgd.step()
        rule.receive([w.grad.expand(5000)])
    assert rule.layers[0].value.mean().item() == pytest.approx(w.item(), abs=5e-4)


def test_the_published_rule_drops_large_updates_and_has_a_dead_zone():
    move = official_move(torch.ones(8, 1), 0.1, torch.Generator().manual_seed(0))
    assert (move != 0).flatten().tolist() == [False] * 4 + [True] * 4
    g = torch.Generator().manual_seed(1)
    w = 0.3 * (2 * torch.rand(5000, generator=g) - 1)
    slope = 0.03 * (2 * torch.rand(5000, generator=g) - 1)
    for bits in (2, 4, 8):
        start = quantize(w, bits)
        rule = Official(RunConfig(update='official', lr=0.1, lambda_b=0.001), [start], [torch.empty(5000)], g)
        rule.receive([slope])
        assert torch.equal(rule.layers[0].state['planes'], to_planes(start.levels, bits))
    # levels that plain SGD would move the largest at 8 bits
    assert 0.1 * 0.03 * 255 / 0.3 == pytest.approx(2.55)


# --- who moved ----------------------------------------------------------------------------------------------


def test_moved_share_by_hand():
    a, b = planes_of([1, 2, 0, 3], 2), planes_of([1, 1, 0, 3], 2)
    flipped = replace(b, sign=torch.tensor([-1, 1, -1, 1], dtype=torch.int8))
    assert moved_share([a], [b]) == 1 / 4
    assert moved_share([a], [flipped]) == 2 / 4  # the sign of a zero does not count
    assert moved_share([a, a], [b, planes_of([0] * 4, 1)]) == 1 / 4 and moved_share([], []) == 0


@many
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.01, 0.1, 0.5]), st.integers(1, 5))
def test_lasso_moved_equals_a_rule_without_gradients(seed, bits, penalty, steps):
    start, shown = quantize(draw(seed, 60, size=0.3), bits), torch.empty(60)
    first = to_planes(start.levels, bits) * start.sign
    config = RunConfig(update='signed-planes', scale_update='fixed', lambda_b=penalty, lr=0.1)
    rule = SignedPlanes(config, [start], [shown])
    for _ in range(steps):
        rule.receive([torch.zeros(60)])
        rule.show()
    distance = (rule.layers[0].value * (2**bits - 1) / start.scale % 1 - 0.5).abs().min()
    if distance < 1e-3:
        return  # a weight stands on the threshold
    if (rule.layers[0].state['planes'] * first < 0).any():
        return  # a plane went past zero: the next test
    alone = lasso_moved(start, penalty * bits, config, steps)
    assert alone == pytest.approx(moved_share([start], rule.finish()), abs=1e-6)


def test_lasso_moved_beyond_zero():
    "One step of a huge lasso: +3 becomes -3."
    start, shown = planes_of([3] * 4, 2), torch.empty(4)  # two planes of length 2, shortened by 0.1 * 40
    config = RunConfig(update='signed-planes', scale_update='fixed', lambda_b=20.0, lr=0.1)
    rule = SignedPlanes(config, [start], [shown])
    rule.receive([torch.zeros(4)])
    rule.show()
    assert shown.tolist() == pytest.approx([-1] * 4) and moved_share([start], rule.finish()) == 1
    assert lasso_moved(start, 40.0, config, 1) == 1


# --- a client drops planes ----------------------------------------------------------------------------------


def test_t4_carry():
    layer = planes_of([8, 4] + [3, 2, 1, 0] * 50, 4)
    small, theirs = reduce_precision(layer), reduce_precision(layer, compat='official')
    assert (small.bits, small.delta, small.levels[:2].tolist()) == (2, 2, [3, 3])
    assert small.scale == pytest.approx(0.2)
    assert theirs.levels[:2].tolist() == [0, 3]  # the second drop loses the first carry
    assert small.dequantize()[2].item() == pytest.approx(3 / 15)
    assert layer.dequantize()[2].item() == pytest.approx(3 / 15)


def reference_reduction(
    levels: list[int], bits: int, threshold: Fraction, lsb: bool
) -> tuple[list[int], int, int]:
    "The loop in whole numbers."
    r, n, shift, d = list(levels), bits, 0, len(levels)
    while n > 1 and 100 * sum(v >> (n - 1) & 1 for v in r) < threshold * d:
        r, n = [min(v, 2 ** (n - 1) - 1) for v in r], n - 1
    while lsb and n > 1 and 100 * sum(v & 1 for v in r) <= threshold * d:
        r, n, shift = [v >> 1 for v in r], n - 1, shift + 1
    return r, (0 if n == 1 and not any(r) else n), shift


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 300),
    st.sampled_from([0, 2, 3.7, 30]),
    st.booleans(),
)
def test_reduction_equals_whole_numbers(seed, bits, d, threshold, lsb):
    g = np.random.default_rng(seed)
    levels = np.minimum(g.geometric(min(0.99, g.uniform(0.02, 1)), d) - 1, 2**bits - 1).astype(np.uint8)
    p = Planes(torch.from_numpy(levels), torch.from_numpy(g.choice([-1, 1], d).astype(np.int8)), 0.37, bits)
    counts = 100 * np.unpackbits(levels[:, None], axis=1).sum(0)
    if (np.abs(counts - threshold * d) < 1e-6 * d).any():
        return  # exactly on the threshold: a test of its own
    want, n, shift = reference_reduction(levels.tolist(), bits, Fraction(str(threshold)), lsb)
    got = reduce_precision(p, threshold, lsb)
    assert (got.levels.tolist(), got.bits, got.delta) == (want, n, bits - n)
    assert 0 <= got.bits <= bits and int(got.levels.max()) < 2 ** max(got.bits, 1)
    before, after = p.dequantize(), got.dequantize()
    assert torch.isfinite(after).all()
    if shift == 0:
        kept = levels < 2 ** max(n, 1)
        assert torch.equal(after[kept], before[kept])  # not one bit different
    assert (after.abs() <= before.abs() * (1 + 1e-6)).all() and (after * before >= 0).all()


def test_a_plane_at_the_threshold_stays():
    "The rule is: dropped if *fewer* than 2 % are ones. Here exactly 2 % are."
    assert reduce_precision(planes_of([8] + [7] * 49, 4), 2.0).bits == 4


def test_empty_single_and_constant_layers():
    for bits in range(1, 9):
        gone = reduce_precision(planes_of([0] * 5, bits, 0.0))
        assert (gone.bits, gone.delta, gone.scale) == (0, bits, 0.0)
        assert torch.equal(gone.dequantize(), torch.zeros(5))
        assert reduce_precision(gone) is gone
        single = reduce_precision(quantize(torch.tensor([-0.3]), bits))
        assert (single.bits, single.delta) == (bits, 0) and single.dequantize().item() == pytest.approx(-0.3)
    assert reduce_precision(planes_of([1] * 5, 8)).bits == 1  # seven empty planes
    top_digit = reduce_precision(planes_of([128] * 5, 8), prune_lsb=True)
    assert top_digit.levels.tolist() == [1] * 5
    assert top_digit.dequantize()[0].item() == pytest.approx(128 / 255)


# --- the server redistributes -------------------------------------------------------------------------------


def test_t5_assignments():
    bits = [[b] * 20 for b in (2, 2, 4, 4, 4, 6, 6, 6, 8, 8)]
    mean, loss = bit_statistics(bits, [[0] * 20] * 10, [100] * 10, [b[0] for b in bits])
    assert (mean, loss) == ([6] * 20, [1] * 20)

    def assign(budget, over=True, exact=True):
        return prune_grow(mean, RESNET20, RESNET20, budget, over, exact)

    def average(b):
        return sum(x * y for x, y in zip(b, RESNET20, strict=True)) / sum(RESNET20)

    assert assign(2) == [8, 8, 6, 6, 6, 6, 6, 6, 1, 4, 6, 6, 6, 1, 1, 1, 1, 1, 1, 8]
    assert assign(4) == [8, 8, 8, 8, 7, 6, 6, 6, 6, 6, 6, 6, 6, 6, 1, 1, 1, 6, 6, 8]
    assert assign(6) == [6] * 20 and assign(8) == [8] * 20
    assert assign(6, exact=False) == [8] * 8 + [6] * 6 + [5, 6, 6, 6, 6, 8]
    assert assign(2, over=False) == [8, 7, 6, 6, 6, 6, 6, 6, 1, 4, 6, 6, 6, 1, 1, 1, 1, 1, 1, 8]
    assert assign(4, over=False) == [8, 8, 8, 8, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 1, 1, 1, 6, 6, 8]
    got = [average(assign(*a)) for a in ((2,), (4,), (6, True, False), (2, False), (4, False))]
    assert got == pytest.approx([2.0068, 4.0074, 6.008, 1.9982, 3.9988], abs=5e-4)
    d = [100, 300, 600]
    assert prune_grow([4] * 3, d, d, 3) == [6, 4, 2] and prune_grow([4] * 3, d, d, 5) == [8, 6, 4]
    assert prune_grow([4] * 3, d, d, 5, overshoot=True, exact=False) == [8, 7, 4]
    assert prune_grow([4, 4], [1, 10], [1, 10], Fraction(40, 11)) == [8, 3]
    assert prune_grow([4, 4], [1, 10], [1, 10], Fraction(40, 11), overshoot=True) == [8, 4]


problems = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 8), min_size=n, max_size=n),
        st.permutations(range(n)),
        st.lists(st.integers(1, 5000), min_size=n, max_size=n),
        st.integers(100, 800).map(lambda x: x / 100),
    )
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems)
def test_assignments_keep_their_promises(problem):
    start, priority, d, budget = problem
    goal, strict = Fraction(str(budget)) * sum(d), prune_grow(start, priority, d, budget)
    loose = prune_grow(start, priority, d, budget, overshoot=True)

    def total(b):
        return sum(x * y for x, y in zip(b, d, strict=True))

    assert all(1 <= b <= 8 for b in strict + loose)
    assert goal - max(d) < total(strict) <= goal <= total(loose) < goal + max(d)

    order = np.random.default_rng(len(d)).permutation(len(d))  # renumbering the layers renumbers their bits

    def pick(values):
        return [values[i] for i in order]

    assert prune_grow(pick(start), pick(priority), pick(d), budget) == pick(strict)
    even = uniform_bits(d, budget)
    assert goal - max(d) < total(even) <= goal and max(even) - min(even) <= 1


def test_ties_are_broken_by_position():
    assert prune_grow([4, 4, 4], [1, 1, 1], [10, 10, 10], 3) == [1, 4, 4]
    assert prune_grow([4, 4, 4], [1, 1, 1], [10, 10, 10], 5) == [7, 4, 4]
    assert uniform_bits([10, 10, 10], Fraction(7, 3)) == [3, 2, 2]


def test_fractional_and_impossible_budgets():
    assert prune_grow([4] * 10, [1] * 10, [10] * 10, 2.1) == [1] * 6 + [3, 4, 4, 4]  # 21 bits in all, exactly
    assert as_fraction(3.4) == Fraction(17, 5) and as_fraction(np.float64(0.1)) == Fraction(1, 10)
    assert uniform_bits([100, 300, 600], 3.4) == [4, 4, 3] and uniform_bits([5, 5], 8) == [8, 8]
    for budget in (0, 0.99, 8.01, -1, float('nan')):
        with pytest.raises(ValueError, match='budget'):
            prune_grow([4], [1], [1], budget)
        with pytest.raises(ValueError, match='bits'):
            RunConfig(bits=budget)


@pytest.mark.parametrize('budget', [0.5, 9])
def test_impossible_budgets_of_uniform_assignments(budget):
    with pytest.raises(ValueError):
        uniform_bits([10, 20], budget)


@many
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5))
def test_bit_statistics_are_weighted_means(seed, participants, layers):
    g = np.random.default_rng(seed)
    bits, lost = g.integers(0, 9, (2, participants, layers))
    samples, budgets = g.integers(1, 500, participants), g.integers(1, 9, participants) / 1.0
    omega = samples * budgets / (samples * budgets).sum()
    mean, loss = bit_statistics(bits.tolist(), lost.tolist(), samples.tolist(), budgets.tolist())
    for got, exact in ((mean, omega @ bits), (loss, omega @ lost + 1)):
        sure = np.abs(exact % 1 - 0.5) > 1e-9
        assert np.array_equal(np.array(got)[sure], np.round(exact)[sure])


# --- through bytes ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def world():
    "A replica, its data, its manifest and a state whose weights are all different."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(48) % 10
    replica = Replica(RunConfig(model='resnet8'), image_task(10))
    state = {n: t.clone().contiguous() for n, t in replica.state.items()}
    data = VisionTask(from_tensors('noise', x, y, x[:20], y[:20], flip=False))
    return replica, data, manifest_of(replica.layout), state


def client_round(world, state, bits, images=32, **fields):
    replica, data, manifest, _ = world
    usual = dict(model='resnet8', update='signed-planes', assignment='prune-grow', batch_size=16)
    config = RunConfig(**usual | fields)
    down = encode(Message(0, 0, 0, 0, downlink_entries(state, replica.layout, bits)), manifest)
    result = local_round(replica, config, data, ClientRound(0, 0, torch.arange(images)), [down], manifest)
    return decode(down, manifest), result, config


VARIANTS = {
    'overflow': {},
    'fixed': dict(scale_update='fixed'),
    'sgd': dict(scale_update='sgd'),
    'plain': dict(bit_lr='plain'),
    'latent': dict(update='latent'),
    'int-sr': dict(update='int-sr'),
    'official': dict(update='official', compat='official'),
}


@pytest.mark.parametrize('name', list(VARIANTS))
@pytest.mark.parametrize('layer', ['fc.weight', 'conv1.weight'])
def test_a_layer_of_zeros_goes_through_a_round(world, name, layer):
    state = world[3] | {layer: torch.zeros_like(world[3][layer])}
    sent, result, _ = client_round(world, state, [4] * 8, **VARIANTS[name])
    assert sent.entries[layer].bits == 4 and sent.entries[layer].scale == 0  # N is kept on the way down
    assert result.message is not None, result.log
    back = decode(result.message, world[2]).entries[layer]
    assert back.bits + back.delta == 4 and torch.isfinite(back.dequantize()).all()
    if name in ('overflow', 'latent') and layer == 'fc.weight':
        assert back.bits and back.dequantize().any()  # it has grown again


def test_the_server_gives_an_emptied_layer_bits_again(world):
    replica, _, manifest, state = world
    config = RunConfig(model='resnet8', update='signed-planes', assignment='prune-grow', clients=2)
    server = Server(config, replica.layout, state)
    entries = decode(downlink(server, 0, 0)[0], manifest).entries
    last = entries['fc.weight']
    gone = reduce_precision(replace(last, levels=torch.zeros_like(last.levels)))
    assert gone.bits == 0
    message = encode(Message(0, 0, 0, 10, entries | {'fc.weight': gone}), manifest)
    assert len(message) == len(downlink(server, 0, 0)[0]) - 5 * 80  # nothing but the scale crosses for it
    server.expect(0, {0: 10})
    receive(server, message, 0)
    aggregate(server)
    at = replica.layout.quantized.index('fc.weight')
    assert server.mean_bits[at] == 0 and not server.state['fc.weight'].any() and server.mean_loss[at] == 5
    assert all(1 <= b <= 8 for b in server.assignment(4)) and server.assignment(4)[at] >= 1
    again = decode(downlink(server, 0, 1)[0], manifest).entries['fc.weight']
    assert again.bits == server.assignment(4)[at] and not again.dequantize().any()


@pytest.mark.parametrize('update', list(RULES))
def test_a_client_accepts_a_layer_without_bits(world, update):
    replica, data, manifest, state = world
    entries = downlink_entries(state, replica.layout, [4] * 8)
    q = entries['fc.weight']
    entries['fc.weight'] = Planes(torch.zeros_like(q.levels), torch.ones_like(q.sign), 0.0, 0)
    config = RunConfig(model='resnet8', update=update, assignment='prune-grow', batch_size=16)
    down = encode(Message(0, 0, 0, 0, entries), manifest)
    result = local_round(replica, config, data, ClientRound(0, 0, torch.arange(16)), [down], manifest)
    back = decode(result.message, manifest).entries['fc.weight']
    assert (back.bits, back.delta) == (0, 0) and not back.dequantize().any()


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('bits', [1, 4, 8])
def test_with_a_rate_of_zero_everything_comes_back(world, name, bits):
    "Server -> three clients -> server: the weights are exactly those that were sent."
    replica, _, manifest, state = world
    config = RunConfig(model='resnet8', clients=3, bits=bits, assignment='prune-grow', update='signed-planes')
    server = Server(config, replica.layout, state)
    server.expect(0, dict(enumerate((5, 200, 31))))
    for k, n in enumerate((5, 200, 31)):
        sent, result, _ = client_round(
            world, state, [bits] * 8, images=16, lr=0, prune_threshold=0, **VARIANTS[name]
        )
        back = decode(result.message, manifest)
        for layer in replica.layout.quantized:
            assert torch.equal(back.entries[layer].levels, sent.entries[layer].levels)
            came, went = back.entries[layer].dequantize(), sent.entries[layer].dequantize()
            grows = name in ('overflow', 'plain')  # the scale is at least the sum of the planes, which rounds
            assert torch.equal(came, went) or (grows and torch.allclose(came, went, rtol=2**-22, atol=0))
        receive(server, encode(Message(0, 0, k, n, back.entries), manifest), k)
    assert aggregate(server) == 3
    values = sent.dense()
    for layer in (*replica.layout.quantized, *replica.layout.others):
        rtol = 2**-22 if name in ('overflow', 'plain') else 0
        assert torch.allclose(server.state[layer], values[layer], rtol=rtol, atol=0)
    assert server.mean_bits == [bits] * 8
    again = decode(downlink(server, 0, 1)[0], manifest)
    for layer in replica.layout.quantized:
        assert torch.equal(again.entries[layer].levels, sent.entries[layer].levels)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_stochastic_messages_are_right_on_average(bits):
    "The mean of 300 downlinks is the server's model; a client that quantises fp32 itself gets the same."
    model, rounds = Tiny(), 300
    shape = layout(model)
    state = {n: draw(i, *t.shape, size=0.3) for i, (n, t) in enumerate(model.state_dict().items())}
    fields = dict(update='signed-planes', assignment='prune-grow', bits=bits, rounds=rounds + 1)
    config = RunConfig(**fields, rounding_down='stochastic')
    server, paid = Server(config, shape, state), Server(replace(config, alpha=0.5), shape, state)
    total = {n: torch.zeros(shape.shapes[n], dtype=torch.float64) for n in shape.quantized}
    for t in range(1, rounds + 1):
        message = decode(downlink(server, 3, t)[0], server.manifest)
        for n in total:
            total[n] += message.entries[n].dequantize()
        if t > 5:
            continue
        full = decode(downlink(paid, 3, t)[0], paid.manifest)
        own = starting_planes(full.entries, shape, paid.config, t, 3)
        for n, p in zip(shape.quantized, own, strict=True):
            assert torch.equal(p.levels, message.entries[n].levels)
            assert torch.equal(p.sign, message.entries[n].sign)
    for n in total:
        step = float(state[n].abs().max()) / (2**bits - 1)
        u = state[n].double().abs() / step % 1
        error, sigma = (total[n] / rounds - state[n]).abs(), step * (u * (1 - u) / rounds).sqrt()
        assert (error <= 5 * sigma + 1e-5 * step).all()


def test_stochastic_uplinks_are_right_on_average():
    "What a rule holds behind its grid is what its messages say on average."
    start, shown = quantize(draw(0, 30, size=0.3), 2), torch.empty(30)
    rule = SignedPlanes(RunConfig(update='signed-planes', lambda_b=0, lr=0.1), [start], [shown])
    rule.receive([draw(1, 30, size=0.3)])
    g, layer = torch.Generator().manual_seed(0), rule.layers[0]
    mean = torch.stack([rule.finish(g)[0].dequantize() for _ in range(400)]).double().mean(0)
    step = float(layer.scale) / 3
    u = layer.value.double().abs() / step % 1
    assert ((mean - layer.value).abs() <= 5 * step * (u * (1 - u) / 400).sqrt() + 1e-5).all()
    assert not torch.allclose(rule.finish()[0].dequantize(), layer.value, atol=0.1 * step)  # nearest is not


# --- layers that start at zero ------------------------------------------------------------------------------


@pytest.mark.parametrize('fields', [
    dict(update='int-sr'), dict(update='latent'), dict(update='signed-planes'),
    dict(update='signed-planes', bit_lr='plain'), dict(update='signed-planes', scale_update='fixed'),
    dict(update='signed-planes', bit_lr='plain', scale_update='sgd')], ids=lambda f: '-'.join(f.values()))
@pytest.mark.parametrize('shape', [(8, 2, 3, 3), (8, 18), (18,)])
def test_a_layer_of_zeros_learns(fields, shape):
    "Against the gradient, visibly; its first scale is that of a layer that PyTorch initialises."
    g, shown = draw(4, *shape), torch.empty(shape)
    config = RunConfig(lr=0.1, lambda_b=0.01, **fields)
    rule = RULES[config.update](config, [quantize(torch.zeros(shape), 4)], [shown],
                                torch.Generator().manual_seed(0))
    assert not shown.any()
    usual = nn.Linear(18, 500).weight.abs().max().item()  # uniform up to one over the root of the inputs
    if config.update == 'int-sr' or len(fields) > 1:
        assert rule.layers[0].scale.item() == pytest.approx(usual, rel=1e-3)
    optimizer = torch.optim.SGD(rule.shadows(), 0.1) if rule.shadows() else None
    for _ in range(10):
        rule.receive([g])
        if optimizer: optimizer.step()
        rule.show()
    assert shown.abs().max() > 0.01 and (shown * g).sum() < 0
    (sent,) = rule.finish()
    assert torch.allclose(sent.dequantize(), shown, atol=1e-6) and sent.levels.any()


def test_a_layer_that_is_not_zero_keeps_its_scale():
    for update in ('int-sr', 'signed-planes'):
        config = RunConfig(update=update, bit_lr='plain')
        rule = RULES[update](config, [quantize(torch.tensor([[1e-6, -2e-6]]), 4)], [torch.empty(1, 2)],
                             torch.Generator())
        assert rule.layers[0].scale.item() == pytest.approx(2e-6)


# --- the largest layer's last bit ---------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_first_plane_is_what_exceeds_half_of_the_largest_weight(seed, bits):
    "So its share, and with it whether a layer loses a bit, is the same at every number of bits."
    w = draw(seed, 400).double()
    half = w.abs().max() / 2
    assume(((w.abs() - half).abs() > 1e-4).all())
    assert torch.equal(to_planes(quantize(w, bits).levels, bits)[0].bool(), w.abs() > half)


def test_bits_that_the_largest_layer_gave_do_not_come_back():
    sizes, held, path = [432, 4608, 5120], [4, 4, 4], []
    for round in range(8):
        left = [*held[:2], max(1, held[2] - 1) if round < 4 else held[2]]  # no losses from round 4 on
        losses = [b - n for b, n in zip(held, left, strict=True)]
        mean_bits, mean_loss = bit_statistics([left], [losses], [100], [4])
        held = prune_grow(mean_bits, [d * n for d, n in zip(sizes, mean_loss, strict=True)], sizes, 4)
        path.append(held)
    assert path[:3] == [[8, 4, 3], [8, 5, 2], [8, 6, 1]] and path[3:] == [[8, 6, 1]] * 5


def test_emptied_share_by_hand():
    def layer(zeros: int, of: int, bits: int = 1) -> Planes:
        return planes_of([0] * zeros + [1] * (of - zeros), bits)

    assert emptied_share([layer(96, 100), layer(10, 300)]) == 0.25
    assert emptied_share([layer(95, 100), layer(95, 100, 0)]) == 0.5  # 95 % is not over 95 %; no bits are
    assert emptied_share([]) == 0


def test_adamw_asks_the_rule_whether_it_steps_itself():
    assert {name for name, rule in RULES.items() if not rule.own_step} == {'latent'}
    assert RunConfig(update='latent', optimizer='adamw', lr=0.01).optimizer == 'adamw'
    with pytest.raises(ValueError, match='int-sr has a step of its own'):
        RunConfig(update='int-sr', optimizer='adamw')
