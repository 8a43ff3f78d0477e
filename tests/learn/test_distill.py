"Distillation losses, schedules, gates and teacher memory against closed forms, SciPy and numbers by hand."
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import nn

from fedmpqkd.learn import distill
from fedmpqkd.learn.distill import (
    DIRECTIONS,
    DISTILL_LOSSES,
    GATES,
    SCHEDULES,
    TEACHERS,
    GradRatio,
    dist_loss,
    distill_loss,
    dkd_loss,
    dkd_parts,
    ema_update,
    finite,
    gate,
    kd_loss,
    mse_loss,
    pearson_rows,
    register_distill_loss,
    schedule,
)

torch.set_num_threads(1)
Z_S = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
Z_T = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
Z_T2 = torch.tensor([[0.5, 1.0, -0.5]], dtype=torch.float64)


def logits(
    seed: int, batch: int = 5, classes: int = 7, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))


def gradient(loss, z: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


# --- the divergence -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('teacher, temperature, forward, reverse', [
    (Z_T, 1.0, 0.463214, 0.379738), (Z_T, 2.0, 0.490788, 0.488732), (Z_T, 4.0, 0.478150, 0.491104),
    (Z_T2, 1.0, 0.675992, 0.564776), (Z_T2, 2.0, 0.672077, 0.671223),
])
def test_hand_worked_pairs(teacher, temperature, forward, reverse):
    assert kd_loss(Z_S, teacher, temperature).item() == pytest.approx(forward, abs=1e-6)
    assert kd_loss(Z_S, teacher, temperature, 'reverse').item() == pytest.approx(reverse, abs=1e-6)
    assert kd_loss(Z_S.float(), teacher.float(), temperature).item() == pytest.approx(forward, abs=3e-6)


def test_hand_worked_limit_and_gradient():
    assert kd_loss(Z_S, Z_T, 1000.0).item() == pytest.approx(0.444617, abs=1e-6)
    assert gradient(lambda z: kd_loss(z, Z_T, 2.0), Z_S).tolist()[0] == pytest.approx(
        [0.4898, -0.3049, -0.1849], abs=5e-5
    )


def test_defect_21_the_paper_writes_one_direction_and_its_code_computes_the_other():
    "Formula: KL(student || teacher) = .379738; F.kl_div(log p_s, p_t) = KL(teacher || student) = .463214."
    reference_code = F.kl_div(F.log_softmax(Z_S, 1), F.softmax(Z_T, 1), reduction='batchmean')
    p, q = Z_S.softmax(1)[0].numpy(), Z_T.softmax(1)[0].numpy()
    formula = stats.entropy(p, q)  # SciPy: KL(p || q)
    assert reference_code.item() == pytest.approx(0.463214, abs=1e-6)
    assert formula == pytest.approx(0.379738, abs=1e-6)
    assert kd_loss(Z_S, Z_T, 1.0, 'forward').item() == pytest.approx(reference_code.item(), abs=1e-12)
    assert kd_loss(Z_S, Z_T, 1.0, 'reverse').item() == pytest.approx(formula, abs=1e-12)
    assert kd_loss(Z_S, Z_T, 1.0).item() == kd_loss(Z_S, Z_T, 1.0, 'forward').item()


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_divergences_equal_scipy(seed, temperature):
    s, t = logits(seed)
    p_s, p_t = ((z / temperature).softmax(1).numpy() for z in (s, t))
    known = {'forward': stats.entropy(p_t, p_s, axis=1), 'reverse': stats.entropy(p_s, p_t, axis=1),
             'js': jensenshannon(p_s, p_t, axis=1) ** 2}
    for direction in DIRECTIONS:
        expected = temperature**2 * known[direction].mean()
        assert kd_loss(s, t, temperature, direction).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 8),
    st.floats(0.3, 20.0),
    st.sampled_from(DIRECTIONS),
)
def test_divergence_is_a_divergence(seed, batch, classes, temperature, direction):
    s, t = logits(seed, batch, classes)
    loss = kd_loss(s, t, temperature, direction)
    assert loss >= -1e-12
    assert kd_loss(s, s, temperature, direction).item() == pytest.approx(0, abs=1e-12)
    shift = torch.arange(batch, dtype=torch.float64)[:, None]
    assert kd_loss(s + shift, t - shift, temperature, direction).item() == pytest.approx(
        loss.item(), rel=1e-8, abs=1e-12
    )
    if direction == 'js': assert loss <= temperature**2 * math.log(2)
    other = kd_loss(t, s, temperature, {'forward': 'reverse', 'reverse': 'forward', 'js': 'js'}[direction])
    assert other.item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('temperature', [0.7, 2.0, 5.0])
def test_gradients_have_their_closed_forms(temperature):
    s, t = logits(1)
    p_s, p_t = (s / temperature).softmax(1), (t / temperature).softmax(1)
    forward = gradient(lambda z: kd_loss(z, t, temperature), s)
    assert torch.allclose(forward, temperature * (p_s - p_t) / len(s), atol=1e-12)
    log_ratio = p_s.log() - p_t.log()
    kl = (p_s * log_ratio).sum(1, keepdim=True)
    reverse = gradient(lambda z: kd_loss(z, t, temperature, 'reverse'), s)
    assert torch.allclose(reverse, temperature * p_s * (log_ratio - kl) / len(s), atol=1e-12)
    js = s.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, t, temperature, 'js'), js)


def test_infinite_temperature_is_squared_error_of_centred_logits():
    s, t = logits(2)
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    limit = (gap.square().sum(1) / (2 * s.shape[1])).mean().item()
    assert mse_loss(s, t).item() == pytest.approx(limit, rel=1e-12)
    for direction, share in (('forward', 1), ('reverse', 1), ('js', 1 / 4)):
        assert kd_loss(s, t, 1e4, direction).item() == pytest.approx(share * limit, rel=2e-3)
        g = gradient(lambda z, d=direction: kd_loss(z, t, 1e4, d), s)
        assert torch.allclose(g, share * gap / s.shape[1] / len(s), atol=1e-3)


def test_mse_by_hand():
    assert mse_loss(Z_S, Z_T).item() == pytest.approx(4 / 9)
    weight = torch.tensor([1.0, 0.0])
    assert mse_loss(Z_S.repeat(2, 1), Z_T.repeat(2, 1), weight).item() == pytest.approx(2 / 9)


def test_near_the_teacher_the_loss_is_half_the_variance_of_the_change():
    _, t = logits(3)
    delta, _ = logits(4, scale=1e-3)
    p = (t / 2).softmax(1)
    variance = (p * delta**2).sum(1) - (p * delta).sum(1) ** 2
    for direction, share in (('forward', 1), ('reverse', 1), ('js', 1 / 4)):
        assert kd_loss(t + delta, t, 2.0, direction).item() == pytest.approx(
            share * variance.mean().item() / 2, rel=5e-3
        )


@pytest.mark.parametrize('classes', [2, 3, 10])
def test_mean_over_entries_is_c_times_too_small(classes):
    s, t = logits(5, classes=classes)
    entries = F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), reduction='none', log_target=True).mean()
    assert (kd_loss(s, t, 1.0) / entries).item() == pytest.approx(classes)


def test_weights_scale_rows_and_keep_the_divisor():
    s, t = logits(6, batch=4)
    weight = torch.tensor([0.0, 1.0, 0.5, 2.0])
    rows = [kd_loss(s[i:i + 1], t[i:i + 1]).item() for i in range(4)]
    expected = (rows[1] + 0.5 * rows[2] + 2 * rows[3]) / 4
    for loss in ('forward', 'reverse', 'js', 'dkd', 'mse'):
        one = [distill_loss(s[i:i + 1], t[i:i + 1], torch.tensor([i]), loss).item() for i in range(4)]
        value = distill_loss(s, t, torch.arange(4), loss, weight=weight).item()
        assert value == pytest.approx((one[1] + 0.5 * one[2] + 2 * one[3]) / 4)
    assert kd_loss(s, t, weight=weight).item() == pytest.approx(expected)
    assert kd_loss(s, t, weight=torch.ones(4)).item() == pytest.approx(sum(rows) / 4)
    for loss in DISTILL_LOSSES:
        whole, third = (
            distill_loss(s, t, torch.arange(4), loss, weight=w) for w in (None, torch.tensor(1 / 3))
        )
        assert third.item() == pytest.approx(whole.item() / 3)
    with pytest.raises(ValueError, match=r'shape \[4\], got \[4, 1\]'): kd_loss(s, t, weight=weight[:, None])
    with pytest.raises(ValueError, match='no per-sample weight'):
        distill_loss(s, t, torch.arange(4), 'dist', weight=weight)


def test_only_the_student_receives_a_gradient():
    y = torch.tensor([0, 1, 2, 3, 4])
    for loss in DISTILL_LOSSES:
        s, t, w = *(z.requires_grad_() for z in logits(7)), torch.tensor(0.5, requires_grad=True)
        distill_loss(s, t, y, loss, weight=w).backward()
        assert t.grad is None and w.grad is None and s.grad.norm() > 1e-6, loss


def test_half_precision_logits_are_widened_also_under_autocast():
    s, t = (z.bfloat16() for z in logits(8))
    exact = kd_loss(s.double(), t.double(), 2.0).item()
    assert kd_loss(s, t, 2.0).dtype == torch.float32
    assert kd_loss(s, t, 2.0).item() == pytest.approx(exact, rel=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert kd_loss(s, t.float(), 2.0).item() == pytest.approx(exact, rel=1e-5)


def test_confident_answers_stay_finite():
    s, t = torch.tensor([[500.0, 0.0, -500.0]]), torch.tensor([[-500.0, 0.0, 500.0]])
    for loss in DISTILL_LOSSES:
        g = gradient(lambda z, name=loss: distill_loss(z, t, torch.tensor([0]), name, 1.0), s)
        assert g.isfinite().all(), loss
    assert kd_loss(s, t, 1.0).item() == pytest.approx(1000.0)  # log p_t - log p_s = 0 + 1000 where p_t = 1


def test_temperature_tensor_equals_the_number():
    s, t = logits(9)
    y = torch.arange(5)
    for loss in DISTILL_LOSSES:
        number = distill_loss(s, t, y, loss, 3.0)
        assert distill_loss(s, t, y, loss, torch.tensor(3.0, dtype=torch.float64)).item() == pytest.approx(
            number.item()
        )
    assert kd_loss(s, t, torch.tensor(-2.0)).isnan() and kd_loss(s, t, torch.tensor(0.0)).isnan()


def test_nothing_is_read_back_from_the_device():
    "Fake tensors have no data: any .item() or data-dependent branch raises."
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        s, t, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
        ratio = GradRatio()
        for loss in DISTILL_LOSSES:
            distill_loss(s, t, y, loss, torch.tensor(2.0), gate('teacher-accuracy', t, y)).backward()
        for kind in GATES: kd_loss(s, t, torch.tensor(2.0), weight=gate(kind, t, y)).backward()
        ratio.update(s.grad.norm(), t.norm())
        assert finite(t).shape == ()


@pytest.mark.parametrize('temperature', [0, 0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures(temperature):
    for loss in ('forward', 'reverse', 'js', 'dkd', 'dist'):
        with pytest.raises(ValueError, match='finite number above 0'):
            distill_loss(Z_S, Z_T, torch.tensor([0]), loss, temperature)


def test_bad_inputs_are_named():
    with pytest.raises(
        ValueError, match=r"direction must be one of \('forward', 'reverse', 'js'\), got 'Forward'"
    ):
        kd_loss(Z_S, Z_T, direction='Forward')
    for s, t in ((Z_S, Z_T[:, :2]), (Z_S[0], Z_T[0]), (Z_S[:0], Z_T[:0])):
        with pytest.raises(ValueError, match='same non-empty shape'): kd_loss(s, t)
    with pytest.raises(ValueError, match=r"must be one of \('forward', .*'mse'\), got 'kl'"):
        distill_loss(Z_S, Z_T, torch.tensor([0]), 'kl')


def test_a_broken_teacher_is_not_hidden():
    s, t = logits(10)
    t[2, 3] = math.nan
    assert not finite(t) and finite(s) and not finite(torch.tensor([math.inf]))
    for loss in DISTILL_LOSSES: assert distill_loss(s, t, torch.arange(5), loss).isnan(), loss


# --- DKD and DIST -------------------------------------------------------------------------------------------

def test_dkd_by_hand():
    tckd, nckd = dkd_parts(Z_S, Z_T, torch.tensor([0]), 2.0)
    assert tckd.item() == pytest.approx(0.1227, abs=5e-5) and nckd.item() == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0.5, 10.0))
def test_dkd_identity(seed, classes, temperature):
    "KL(p_t || p_s) = TCKD + (1 - p_t[y]) NCKD, for every label."
    s, t = logits(seed, classes, classes)
    y = torch.arange(classes)
    tckd, nckd = dkd_parts(s, t, y, temperature)
    unsure = 1 - (t / temperature).softmax(1)[y, y]
    whole = kd_loss(s, t, temperature).item() / temperature**2
    assert (tckd + unsure * nckd).mean().item() == pytest.approx(whole, rel=1e-7, abs=1e-11)
    if classes == 2: assert nckd.abs().max() < 1e-12


def test_dkd_equals_the_authors_masking():
    "mdistiller subtracts 1000 from the target logit and sums probabilities by mask."
    s, t = logits(11, batch=6, classes=5)
    y, T = torch.tensor([0, 1, 2, 3, 4, 2]), 4.0
    hot = F.one_hot(y, 5).double()

    def binary(z):
        p = (z / T).softmax(1)
        return torch.stack([(p * hot).sum(1), (p * (1 - hot)).sum(1)], 1)

    tckd = F.kl_div(binary(s).log(), binary(t), reduction='sum') * T**2 / 6
    nckd = (
        F.kl_div((s / T - 1000 * hot).log_softmax(1), (t / T - 1000 * hot).softmax(1), reduction='sum')
        * T**2
        / 6
    )
    assert dkd_loss(s, t, y).item() == pytest.approx((tckd + 8 * nckd).item(), rel=1e-9)
    assert dkd_loss(s, t, y, alpha=3.0, beta=0.0).item() == pytest.approx(3 * tckd.item(), rel=1e-9)


def test_dkd_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='at least 2 classes'):
        dkd_loss(Z_S[:, :1], Z_T[:, :1], torch.tensor([0]))
    with pytest.raises(ValueError, match=r'y must have shape \[1\]'): dkd_loss(Z_S, Z_T, torch.ones(1, 3))


def test_pearson_equals_scipy_and_ignores_positive_affine_maps():
    a, b = logits(12)
    rho = pearson_rows(a, b)
    assert rho.tolist() == pytest.approx(
        [stats.pearsonr(x, z).statistic for x, z in zip(a, b, strict=True)], abs=1e-8
    )
    scale, shift = torch.linspace(0.1, 5, 5)[:, None], torch.linspace(-3, 3, 5)[:, None]
    assert torch.allclose(pearson_rows(scale * a + shift, b), rho, atol=1e-7)
    assert torch.allclose(pearson_rows(a, -b), -rho)


def test_dist_is_the_two_correlations():
    s, t = logits(13)
    p_s, p_t = (s / 2).softmax(1).numpy(), (t / 2).softmax(1).numpy()
    rows = 1 - sum(stats.pearsonr(a, b).statistic for a, b in zip(p_s, p_t, strict=True)) / 5
    columns = 1 - sum(stats.pearsonr(a, b).statistic for a, b in zip(p_s.T, p_t.T, strict=True)) / 7
    assert dist_loss(s, t, 2.0, beta=2.0, gamma=3.0).item() == pytest.approx(2 * rows + 3 * columns, abs=1e-5)
    assert dist_loss(s, s, 2.0).item() == pytest.approx(0, abs=1e-5)


def test_dist_batch_of_one_has_no_columns():
    s, t = logits(14, batch=1)
    assert dist_loss(s, t, beta=0.0, gamma=5.0).item() == 0
    z = s.clone().requires_grad_()
    dist_loss(z, t, gamma=5.0).backward()
    assert z.grad.isfinite().all() and z.grad.norm() > 0


@pytest.mark.parametrize('classes', [3, 10, 100])
def test_dist_constant_answers(classes):
    "An untrained, constant head: correlation 0, loss beta + gamma, and no exploding gradient."
    t = logits(15, classes=classes)[1].float()
    for constant in (torch.zeros_like(t), torch.full_like(t, 0.1), torch.full_like(t, 37.0)):
        g = gradient(lambda z: dist_loss(z, t), constant)
        assert dist_loss(constant, t).item() == pytest.approx(2.0, abs=1e-6)
        assert g.abs().max() < 1, constant[0, 0]
        assert gradient(lambda z, c=constant: dist_loss(z, c), t).abs().max() < 1


# --- the registry -------------------------------------------------------------------------------------------

def test_every_built_in_loss_reaches_its_function():
    s, t = logits(16)
    y = torch.tensor([1, 2, 3, 4, 0])
    known = {
        'forward': kd_loss(s, t, 3.0),
        'reverse': kd_loss(s, t, 3.0, 'reverse'),
        'js': kd_loss(s, t, 3.0, 'js'),
        'dkd': dkd_loss(s, t, y, 3.0),
        'dist': dist_loss(s, t, 3.0),
        'mse': mse_loss(s, t),
    }
    assert {name: distill_loss(s, t, y, name, 3.0).item() for name in DISTILL_LOSSES} == {
        k: v.item() for k, v in known.items()
    }
    assert len({round(v.item(), 9) for v in known.values()}) == 6


def test_users_add_losses(monkeypatch):
    monkeypatch.setattr(distill, 'DISTILL_LOSSES', dict(DISTILL_LOSSES))
    register_distill_loss('constant', lambda s, t, y, temperature, weight: s.sum() * 0 + 7)
    assert distill_loss(Z_S, Z_T, torch.tensor([0]), 'constant').item() == 7
    register_distill_loss('constant', lambda *a: Z_S.sum())  # a name of the user's may be given again
    assert distill_loss(Z_S, Z_T, torch.tensor([0]), 'constant').item() == 1
    with pytest.raises(ValueError, match="'mse' exists already"):
        register_distill_loss('mse', lambda *a: Z_S.sum())
    register_distill_loss('mse', lambda *a: Z_S.sum(), replace=True)
    assert distill_loss(Z_S, Z_T, torch.tensor([0]), 'mse').item() == 1


# --- schedules ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    'kind, start, middle, last', [('const', 4, 4, 4), ('linear', 4, 2.5, 1), ('cosine', 4, 2.5, 1)]
)
def test_schedule_at_start_middle_and_end(kind, start, middle, last):
    end = None if kind == 'const' else 1.0
    assert [schedule(kind, 4.0, t, 11, end=end) for t in (0, 5, 10)] == pytest.approx([start, middle, last])
    assert [schedule(kind, 4.0, t, 12, warmup=1, end=end) for t in (0, 1, 6, 11)] == pytest.approx(
        [0, start, middle, last]
    )
    assert schedule(kind, 0.3, 10, 11, end=None if kind == 'const' else 0.1) == (
        0.3 if kind == 'const' else 0.1
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 40), st.integers(0, 45), st.floats(0, 5), st.floats(0, 5))
def test_schedule_is_monotone_and_silent_during_warmup(kind, rounds, warmup, value, end):
    end = None if kind == 'const' else end
    values = [schedule(kind, value, t, rounds, warmup, end) for t in range(rounds)]
    assert values[:warmup] == [0.0] * min(warmup, rounds)
    after = values[warmup:]
    if not after: return
    assert after[0] == value
    if kind == 'const': assert set(after) == {value}
    elif len(after) > 1:
        assert after[-1] == end
        steps = [b - a for a, b in itertools.pairwise(after)]
        assert all(step * (end - value) >= -1e-12 for step in steps)


def test_cosine_leaves_slowly():
    linear, cosine = ([schedule(k, 1.0, t, 9, end=0.0) for t in range(9)] for k in ('linear', 'cosine'))
    assert cosine[2] == pytest.approx((1 + math.sqrt(0.5)) / 2) and linear[2] == pytest.approx(0.75)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('step', 1, 0, 5), r"one of \('const', 'linear', 'cosine'\), got 'step'"),
        (('const', 1, 0, 0), 'rounds must be at least 1'),
        (('const', 1, 5, 5), r't must be in 0\.\.4, got 5'),
        (('const', 1, -1, 5), 't must be in'),
        (('const', 1, 0, 5, -1), 'warmup must be at least 0'),
        (('linear', 1, 0, 5), 'needs an end'),
        (('const', 1, 0, 5, 0, 2.0), 'takes no end'),
    ],
)
def test_schedule_errors(arguments, message):
    with pytest.raises(ValueError, match=message): schedule(*arguments)


# --- gates --------------------------------------------------------------------------------------------------

def test_gates_by_hand():
    t = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    y = torch.tensor([0, 1, 0, 3])
    assert gate('none', t, y).tolist() == [1, 1, 1, 1]
    assert gate('agree', t, y).tolist() == [1, 1, 0, 0]
    assert gate('teacher-accuracy', t, y).item() == pytest.approx((0.5 - 0.25) / 0.75)
    assert gate('teacher-accuracy', t, torch.tensor([1, 2, 3, 1])).item() == 0  # worse than guessing
    assert gate('teacher-accuracy', t, torch.tensor([0, 1, 2, 0])).item() == 1
    with pytest.raises(ValueError, match="'agree', 'entropy', 'teacher-accuracy'"): gate('trust', t, y)
    with pytest.raises(ValueError, match='at least 2 classes'): gate('entropy', t[:, :1], y)


def test_entropy_gate_equals_scipy():
    t, _ = logits(17)
    expected = 1 - stats.entropy(t.softmax(1).numpy(), axis=1) / math.log(7)
    assert gate('entropy', t, torch.arange(5)).tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    extremes = torch.tensor([[0.0] * 10, [1e4] + [0.0] * 9])
    assert gate('entropy', extremes, torch.zeros(2)).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize('kind', GATES)
def test_gates_are_detached_and_between_0_and_1(kind):
    t = logits(18, batch=50)[0].requires_grad_()
    weight = gate(kind, t, torch.arange(50) % 7)
    assert not weight.requires_grad and (weight >= 0).all() and (weight <= 1).all()
    assert weight.shape == (() if kind == 'teacher-accuracy' else (50,))


# --- gradient ratio -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('rho', [0.0, 0.5, 2.0])
def test_grad_ratio_makes_the_lengths_match(rho):
    s, t = logits(19)
    ce = gradient(lambda z: F.cross_entropy(z, torch.arange(5)), s)
    kd = gradient(lambda z: kd_loss(z, t, 2.0), s)
    alpha = GradRatio(rho).update(ce.norm(), kd.norm())
    assert (alpha * kd).norm().item() == pytest.approx(rho * ce.norm().item(), rel=1e-5)
    both = gradient(lambda z: alpha * kd_loss(z, t, 2.0), s)
    assert both.norm().item() == pytest.approx(rho * ce.norm().item(), rel=1e-5)


def test_grad_ratio_remembers():
    "Two steps with memory 3/4: ce = 1/4 * 3/4 * 8 + 1/4 * 2 = 2, kd = 3/16 * 4 + 1/4 * 1 = 1."
    ratio = GradRatio(rho=0.5, decay=0.75)
    assert ratio.update(torch.tensor(8.0), torch.tensor(4.0)).item() == pytest.approx(1.0)
    assert ratio.update(torch.tensor(2.0), torch.tensor(1.0)).item() == pytest.approx(0.5 * 2 / 1)
    assert ratio.norms.tolist() == pytest.approx([2.0, 1.0])


def test_grad_ratio_corner_cases():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert GradRatio().update(one, zero).item() == 0
    assert GradRatio(maximum=10.0).update(one, torch.tensor(1e-9)).item() == 10
    ratio = GradRatio()
    before = ratio.update(one, one)
    for bad in (math.nan, math.inf):
        assert ratio.update(torch.tensor(bad), one).item() == before.item() == pytest.approx(0.5)
    norm = torch.tensor(2.0, requires_grad=True)
    assert not GradRatio().update(norm, norm).requires_grad
    with pytest.raises(ValueError, match='decay'): GradRatio(decay=1.0)
    with pytest.raises(ValueError, match='rho'): GradRatio(rho=-1.0)


# --- teachers -----------------------------------------------------------------------------------------------

def small_net(seed: int) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data = 0.3 * torch.randn(p.shape, generator=g)
    return net


def test_ema_is_the_geometric_mean_of_what_arrived():
    decay, arrived = 0.8, [torch.tensor([float(i), -2.0 * i]) for i in range(6)]
    average: dict = {}
    for i, value in enumerate(arrived):
        average = ema_update(average, {'w': value, 'n': torch.tensor(i)}, decay)
    weights = [decay**5] + [(1 - decay) * decay ** (5 - i) for i in range(1, 6)]
    assert sum(weights) == pytest.approx(1)
    assert torch.allclose(average['w'], sum(w * v for w, v in zip(weights, arrived, strict=True)), atol=1e-6)
    assert average['n'].item() == 5 and average['n'].dtype == torch.int64


def test_ema_of_a_state_dict():
    a, b = small_net(0).state_dict(), small_net(1).state_dict()
    b['1.num_batches_tracked'] += 9
    kept_a, kept_b = copy.deepcopy(a), copy.deepcopy(b)
    average = ema_update(a, b, 0.5)
    assert torch.allclose(average['4.weight'], (a['4.weight'] + b['4.weight']) / 2)
    assert average['1.num_batches_tracked'].item() == 9
    same = ema_update(ema_update({}, a, 0.9), a, 0.9)
    assert all(
        torch.equal(same[k], a[k]) and same[k].dtype == a[k].dtype for k in a
    )  # a constant stays, bit for bit
    assert all(torch.equal(ema_update(a, b, 0.0)[k], b[k]) for k in b)  # no memory: what arrived
    for value in (*average.values(), *same.values()): value.zero_()
    assert all(torch.equal(a[k], kept_a[k]) and torch.equal(b[k], kept_b[k]) for k in a)  # nothing is shared
    with pytest.raises(ValueError, match=r"differ in \['extra'\]"): ema_update(a, {**b, 'extra': b['4.bias']})
    with pytest.raises(ValueError, match='decay'): ema_update(a, b, 1.0)


def test_teacher_names():
    assert TEACHERS == ('fp', 'delivered', 'q8', 'ema')


def test_delivered_teacher_is_silent_at_the_first_step_in_eval_mode():
    student, teacher = small_net(2).double().eval(), small_net(2).double().eval()
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for direction in DIRECTIONS:
        loss = kd_loss(student(x), teacher(x), 2.0, direction)
        student.zero_grad()
        loss.backward()
        assert abs(loss.item()) < 1e-10
        assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-10
    assert kd_loss(student.train()(x), teacher(x)).item() > 1e-4


def test_defect_3_a_teacher_inside_the_student_does_not_stay_still():
    wrapper = nn.ModuleDict({'student': small_net(3), 'teacher': small_net(3).eval().requires_grad_(False)})
    outside = small_net(3).eval().requires_grad_(False)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wrapper.train()
    with torch.no_grad(): wrapper['teacher'](x), outside(x)
    assert wrapper['teacher'].training and not outside.training
    assert not torch.equal(wrapper['teacher'][1].running_mean, torch.zeros(4))
    assert torch.equal(outside[1].running_mean, torch.zeros(4))
    assert torch.equal(outside[1].running_var, torch.ones(4))
