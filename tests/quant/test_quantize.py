"Quantisers against PyTorch's own, brute force over the grid, and closed forms of random rounding."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.quant.quantize import (
    Planes,
    QuantAct,
    check_bits,
    choose_qparams_affine,
    dequantize_affine,
    dequantize_all,
    fake_quantize,
    nearest_level,
    nearest_levels,
    peaks,
    quantize,
    quantize_activation,
    quantize_affine,
    quantize_all,
    round_stochastic,
)

torch.set_num_threads(1)
EPS = 2.0**-23  # one unit in the last place of fp32, relative
many = settings(max_examples=60, deadline=None, derandomize=True)


def draw(seed: int, shape: tuple[int, ...], size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
sizes = st.floats(-6, 6).map(lambda e: 10.0**e)


# --- sign and magnitude -------------------------------------------------------------------------------------


def test_the_worked_example():
    q = quantize(torch.tensor([0.7, -1.0, 0.2, 0.05]), 3)
    assert (q.levels.tolist(), q.sign.tolist(), q.scale, q.bits) == ([5, 7, 1, 0], [1, -1, 1, 1], 1.0, 3)
    assert q.dequantize().tolist() == pytest.approx([0.7143, -1, 0.1429, 0], abs=5e-5)


@many
@given(st.integers(0, 10**6), shapes, sizes, st.integers(1, 8))
def test_each_weight_goes_to_the_nearest_of_all_levels(seed, shape, size, bits):
    "Brute force: the grid has 2**(bits+1) - 1 values; none is closer than the chosen one."
    w = draw(seed, shape, size)
    q = quantize(w, bits)
    top = 2**bits - 1
    grid = np.arange(-top, top + 1) * (float(w.abs().max()) / top)
    closest = np.abs(w.double().numpy().reshape(-1, 1) - grid).min(1)
    error = (q.dequantize().double() - w.double()).abs().numpy().reshape(-1)
    assert np.all(error <= closest + 4 * EPS * q.scale)
    assert error.max() <= q.scale / (2 * top) * (1 + 1e-5)
    assert q.levels.shape == w.shape and int(q.levels.max()) == top


@many
@given(st.integers(0, 10**6), shapes, sizes, st.integers(1, 8))
def test_pytorch_agrees(seed, shape, size, bits):
    "The same grid as PyTorch's quantiser with zero point 0 and levels -top to top."
    w, top = draw(seed, shape, size), 2**bits - 1
    theirs = torch.fake_quantize_per_tensor_affine(w, float(w.abs().max()) / top, 0, -top, top)
    ours = quantize(w, bits).dequantize()
    step = float(w.abs().max()) / top
    near_tie = ((w.abs() / step) % 1 - 0.5).abs() < 1e-4  # may fall to either side in fp32
    assert torch.allclose(ours[~near_tie], theirs[~near_tie], rtol=1e-5, atol=0)
    assert torch.allclose(ours[~near_tie], fake_quantize(w, bits)[~near_tie], rtol=1e-6, atol=0)


@many
@given(st.integers(0, 10**6), shapes, sizes, st.integers(1, 8))
def test_quantising_again_changes_nothing(seed, shape, size, bits):
    q = quantize(draw(seed, shape, size), bits)
    for scale in (None, torch.tensor(q.scale)):
        again = quantize(q.dequantize(), bits, scale=scale)
        assert torch.equal(again.levels, q.levels) and torch.equal(again.sign, q.sign)
        assert again.scale == pytest.approx(q.scale, rel=2 * EPS)


@many
@given(st.integers(0, 10**6), shapes, st.integers(1, 8), st.integers(-20, 20))
def test_symmetries(seed, shape, bits, exponent):
    "A mirrored tensor has mirrored signs; a power of two goes into the scale alone."
    w = draw(seed, shape)
    q, mirrored, grown = quantize(w, bits), quantize(-w, bits), quantize(w * 2.0**exponent, bits)
    assert torch.equal(mirrored.levels, q.levels) and torch.equal(mirrored.dequantize(), -q.dequantize())
    assert torch.equal(grown.levels, q.levels) and grown.scale == q.scale * 2.0**exponent


@pytest.mark.parametrize('bits', range(1, 9))
def test_corner_cases(bits):
    top = 2**bits - 1
    for value in (0.3, -0.3, 1e-20, -1e20):  # constants and single elements sit at the last level
        for shape in ((), (1,), (2, 3)):
            q = quantize(torch.full(shape, value), bits)
            assert (q.levels == top).all() and q.scale == pytest.approx(abs(value), rel=EPS)
            assert torch.allclose(q.dequantize(), torch.full(shape, value), rtol=2 * EPS, atol=0)
    zeros = quantize(torch.zeros(3, 2), bits)
    assert (zeros.scale, zeros.bits, int(zeros.levels.sum())) == (0.0, bits, 0)
    assert torch.equal(zeros.dequantize(), torch.zeros(3, 2))
    assert torch.equal(fake_quantize(torch.zeros(3, 2), bits), torch.zeros(3, 2))
    small = quantize(torch.tensor([1.0, -1e-4, -0.0]), bits)
    assert small.sign.tolist() == [1, 1, 1] and not torch.signbit(small.dequantize()).any()  # one zero only


@pytest.mark.parametrize('bits', range(1, 9))
def test_values_beyond_a_given_scale_saturate(bits):
    w = torch.tensor([2.0, -3.0, 0.5, 0.0])
    q = quantize(w, bits, scale=torch.tensor(0.5))
    assert q.levels.tolist() == [2**bits - 1] * 3 + [0]
    assert q.dequantize().tolist() == pytest.approx([0.5, -0.5, 0.5, 0.0], rel=1e-6)
    nearest = nearest_level(w, torch.tensor(0.5), bits)
    assert nearest.tolist() == pytest.approx([0.5, -0.5, 0.5, 0.0], rel=1e-6)


@pytest.mark.parametrize('bits', [0, 9, -1, 2.5, float('nan')])
def test_impossible_precisions(bits):
    with pytest.raises(ValueError):
        check_bits(bits)
    with pytest.raises(ValueError):
        quantize(torch.ones(2), bits)
    with pytest.raises(ValueError):
        fake_quantize(torch.ones(2), bits)


# --- straight through ---------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), shapes, st.sampled_from([1, 2, 3, 4, 8, 32]))
def test_the_gradient_is_that_of_the_identity(seed, shape, bits):
    w, g = draw(seed, shape).requires_grad_(True), draw(seed + 1, shape)
    fake_quantize(w, bits).backward(g)
    assert torch.equal(w.grad, g)


# --- stochastic rounding ------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), st.floats(-20, 20))
def test_random_rounding_is_a_coin_with_the_right_bias(seed, x):
    n, fraction = 4000, x - np.floor(x)
    r = round_stochastic(torch.full((n,), x), torch.Generator().manual_seed(seed)).double()
    assert set(r.tolist()) <= {np.floor(x), np.ceil(x), np.floor(np.float32(x)), np.ceil(np.float32(x))}
    assert abs(r.mean().item() - x) <= 5.5 * (fraction * (1 - fraction) / n) ** 0.5 + 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 8), sizes)
def test_a_whole_tensor_is_right_on_average(seed, bits, size):
    "Each weight's mean over 200 draws, and the error of a single draw: never a whole level."
    w, g = draw(seed, (12,), size), torch.Generator().manual_seed(seed)
    draws = torch.stack([quantize(w, bits, g).dequantize() for _ in range(200)]).double()
    step = float(w.abs().max()) / (2**bits - 1)
    assert ((draws - w).abs() < step * (1 + 1e-5)).all()
    u = w.double().abs() / step % 1
    sigma = (u * (1 - u) / 200).sqrt() * step
    assert ((draws.mean(0) - w).abs() <= 5.5 * sigma + 1e-5 * step).all()


def test_the_stream_decides():
    w = draw(0, (500,))
    one, same, other = (quantize(w, 3, torch.Generator().manual_seed(s)).levels for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_whole_numbers_stay_where_they_are():
    x = torch.full((1_000_000,), 254.0)
    assert torch.equal(round_stochastic(x, torch.Generator().manual_seed(0)), x)


# --- affine -------------------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), shapes, sizes, st.integers(1, 8), st.floats(-3, 3))
def test_affine_agrees_with_pytorch(seed, shape, size, bits, shift):
    x = draw(seed, shape, size) + shift * size
    scale, zero = choose_qparams_affine(x, bits)
    q = quantize_affine(x, scale, zero, bits)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 2**bits - 1)
    ours = dequantize_affine(q, scale, zero)
    tie = ((x / scale) % 1 - 0.5).abs() < 1e-3
    assert torch.allclose(ours[~tie], theirs[~tie], rtol=1e-5, atol=1e-5 * float(scale))
    assert ((ours - x).abs() <= 0.5 * scale * (1 + 1e-3)).all()
    assert 0 <= int(zero) <= 2**bits - 1
    assert q.max() - q.min() >= 2**bits - 2 or float(x.min()) * float(x.max()) > 0
    assert dequantize_affine(quantize_affine(torch.zeros(1), scale, zero, bits), scale, zero).item() == 0.0


def test_affine_constants():
    for value in (0.0, 2.5, -2.5):
        x = torch.full((4,), value)
        scale, zero = choose_qparams_affine(x, 4)
        back = dequantize_affine(quantize_affine(x, scale, zero, 4), scale, zero)
        assert back.tolist() == pytest.approx([value] * 4)


# --- activations --------------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), shapes, st.integers(1, 8))
def test_activations_use_the_range_of_the_batch(seed, shape, bits):
    x = draw(seed, shape).abs().requires_grad_(True)
    y = quantize_activation(x, bits)
    top, peak = 2**bits - 1, float(x.detach().max())
    assert torch.allclose(y / peak * top, (y / peak * top).round(), atol=1e-3)
    assert y.max().item() == pytest.approx(peak)
    assert ((y - x).abs() <= peak / top / 2 * (1 + 1e-5)).all() and len(y.unique()) <= top + 1
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(shape))


def test_silent_activations_stay_silent():
    for bits in (1, 2, 4, 8):
        act = QuantAct(bits)
        y = act(torch.full((3, 2), -1.0))
        assert torch.equal(y, torch.zeros(3, 2))


def test_pact_learns_its_bound_and_relu6_has_none():
    x = torch.tensor([-1.0, 3.0, 12.0, 20.0], requires_grad=True)
    pact = QuantAct(2)
    pact(x).sum().backward()
    assert pact.bound.grad.item() == 2.0  # one for each value that it cuts off
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert not list(QuantAct(4).parameters())
    assert QuantAct(4)(torch.tensor([50.0])).item() == pytest.approx(6.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 8), st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1e20])),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_many_tensors_at_once_are_each_tensor_alone(shapes, seed, own_scale):
    "To the last bit, layers of zeros and values beyond a given scale included."
    g = torch.Generator().manual_seed(seed)
    ws, bits = [torch.randn(d, generator=g) * size for d, _, size in shapes], [n for _, n, _ in shapes]
    scales = [torch.rand((), generator=g) + 0.1 for _ in ws] if own_scale else None
    alone = [
        quantize(w, n, scale=scales[i] if scales else None)
        for i, (w, n) in enumerate(zip(ws, bits, strict=True))
    ]
    for a, b in zip(quantize_all(ws, bits, scales), alone, strict=True):
        assert torch.equal(a.levels, b.levels) and torch.equal(a.sign, b.sign)
        assert (a.scale, a.bits) == (b.scale, b.bits)
    at = scales or list(peaks(ws).unbind())
    for shown, w, S, n in zip(nearest_levels(ws, at, bits), ws, at, bits, strict=True):
        top = 2**n - 1
        step = S.clamp_min(torch.finfo(torch.float32).tiny) / top
        assert torch.equal(shown, (w / step).round().clamp(-top, top) * step)
    for value, q in zip(dequantize_all(alone), alone, strict=True):
        assert torch.equal(value, q.dequantize())
    assert quantize_all([], []) == dequantize_all([]) == []


def test_a_layer_without_bits_has_the_value_zero():
    gone = Planes(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.int8), 7.0, 0)
    kept = quantize(torch.tensor([1.0, -0.5]), 2)
    for value, q in zip(dequantize_all([gone, kept]), (gone, kept), strict=True):
        assert torch.equal(value, q.dequantize())
    assert not dequantize_all([gone])[0].any()
