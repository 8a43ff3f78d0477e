"Small changes of quantisers, rules and assignments that pass elsewhere; the numbers are worked out by hand."
import numpy as np
import pytest
import torch

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.streams import rng
from fedmpqkd.quant.bits import (
    IntegerSR,
    Latent,
    SignedPlanes,
    bit_statistics,
    lasso_moved,
    moved_share,
    prune_grow,
    random_bits,
    reduce_precision,
    uniform_bits,
)
from fedmpqkd.quant.quantize import Planes, QuantAct, qsgd, quantize, round_stochastic
from fedmpqkd.wire.updates import UpdateCode, encode_update


def planes(levels: list[int], bits: int, scale: float = 1.0) -> Planes:
    r = torch.tensor(levels)
    return Planes(r.abs().to(torch.uint8), (r.sign() + (r == 0)).to(torch.int8), scale, bits)


@pytest.mark.parametrize("norm, size", [("2", 5.0), ("max", 4.0)])
def test_the_norm_of_qsgd_is_the_one_that_is_named(norm, size):
    "The vector (3, 4): its length is five, its largest entry four."
    v, g = torch.tensor([3.0, -4.0]), torch.Generator().manual_seed(0)
    assert qsgd(v, 15, g, norm)[2].item() == size
    code = UpdateCode.of(RunConfig(uplink="qsgd", update_norm=norm))
    assert encode_update(code, v, g, 0, []).norms.tolist() == [size]


def test_a_uniform_assignment_spends_each_bit_once():
    "Three layers of ten weights at 4.4 bits: twelve spare bits give one layer a fifth bit, and two are left."
    assert uniform_bits([10, 10, 10], 4.4) == [5, 4, 4]
    assert uniform_bits([10, 6, 6], 4.5) == [4, 5, 4]  # eleven spare: five are too few for the second
    assert uniform_bits([10, 4, 6], 4.5) == [4, 5, 5]  # ten spare: both small ones
    assert uniform_bits([5, 5], 8) == [8, 8]


def test_pruning_and_growing_count_every_change():
    """Twenty weights of four bits on a budget of 3.5: ten bits too many. The first in rank gives one bit of
    its ten weights, and that is all."""
    assert prune_grow([4, 4], [2, 1], [10, 10], 3.5) == [3, 4]
    assert prune_grow([4, 4], [1, 2], [10, 10], 3.5) == [4, 3]
    assert prune_grow([4, 4], [2, 1], [10, 10], 3.0) == [2, 4]
    # nothing to prune, fifty spare bits: four for each weight of the lowest rank, then the other's turn
    assert prune_grow([6, 4], [2, 1], [10, 10], 7.5) == [7, 8]
    # what is below one bit or above eight counts as one and as eight
    assert prune_grow([0, 12], [1, 2], [10, 10], 4.5) == [1, 8]


def test_a_random_assignment_by_hand():
    "Start and order are drawn once, whatever the budget; then bits are taken and given in that order."
    sizes, seed = [3, 5, 7, 2], 4
    for budget in (2.0, 4.5, 6.0):
        g = rng(seed, "quantiser")
        b, rank = g.integers(1, 9, 4).tolist(), g.permutation(4).tolist()
        spare = budget * sum(sizes) - sum(n * d for n, d in zip(b, sizes, strict=True))
        for i in np.argsort(rank)[::-1]:
            while spare < 0 and b[i] > 1: b[i], spare = b[i] - 1, spare + sizes[i]
        for i in np.argsort(rank):
            while b[i] < 8 and sizes[i] <= spare: b[i], spare = b[i] + 1, spare - sizes[i]
        assert random_bits(sizes, budget, rng(seed, "quantiser")) == b


def test_whole_levels_end_at_the_last_one():
    """Five steps of one level each, outwards from the last: the weight stays there, so that one step back is
    seen. Inwards as well, on the other side of zero."""
    config = RunConfig(update="int-sr", lr=1.0, momentum=0.0, lambda_b=0.0)
    shown = torch.zeros(2)
    rule = IntegerSR(config, [planes([7, -7], 3)], [shown], torch.Generator().manual_seed(0))
    unit = 1 / 7
    for _ in range(5): rule.receive([torch.tensor([-unit, unit])])
    assert rule.layers[0].value.tolist() == pytest.approx([1, -1])
    rule.receive([torch.tensor([unit, -unit])])
    rule.show()
    assert shown.tolist() == pytest.approx([6 / 7, -6 / 7])
    finished, = rule.finish()
    assert (finished.levels.tolist(), finished.sign.tolist()) == ([6, 6], [1, -1])


@pytest.mark.parametrize("rule", [SignedPlanes, Latent, IntegerSR])
def test_the_penalty_of_a_layer_is_its_share(rule):
    "lambda_b N d over all weights: layers of two and six weights, at 3 and 2 bits, lambda .5."
    config = RunConfig(update="latent", lambda_b=0.5)
    layers = rule(config, [planes([1, 2], 3), planes([1] * 6, 2)], [torch.zeros(2), torch.zeros(6)],
                  torch.Generator()).layers
    assert [x.penalty for x in layers] == pytest.approx([0.5 * 3 * 2 / 8, 0.5 * 2 * 6 / 8])


def test_what_moves_counts_signs_and_leaves_other_bits_out():
    "Of four weights one changes its level and one its sign; a layer that changed its bits is not compared."
    before, after = planes([1, 2, 3, 0], 2), planes([1, 1, -3, 0], 2)
    assert moved_share([before], [after]) == 0.5
    assert moved_share([before, planes([1, 1], 3)], [after, planes([3, 3], 2)]) == 0.5
    assert moved_share([planes([0, 0], 0)], [planes([0, 0], 0)]) == 0
    flipped = planes([0, 0, 1, 1], 2)
    flipped.sign[:2] = -1  # the sign of a zero says nothing
    assert moved_share([planes([0, 0, 1, 1], 2)], [flipped]) == 0


def test_reports_are_weighted_by_samples_and_budget():
    "3 images at 2 bits, 1 at 8: weights 6 and 8. Means (6*2 + 8*8)/14 = 5.43 and (6*1)/14 + 1 = 1.43."
    assert bit_statistics([[2], [8]], [[1], [0]], [3, 1], [2, 8]) == ([5], [1])
    assert bit_statistics([[2], [8]], [[1], [0]], [1, 3], [2, 8]) == ([8], [1])  # 7.54: weights 2 and 24
    assert bit_statistics([[2], [8]], [[6], [0]], [1, 1], [2, 8]) == ([7], [2])  # 6.8 and 2.2


def test_a_dropped_plane_rescales_and_is_owed():
    """Levels 1 to 3 of four bits, the top two planes empty: two bits remain, and the scale shrinks from 15
    units to 3. What was owed before stays owed."""
    p = planes([1, 2, 3, 0], 4, scale=1.5)
    p.delta = 1
    less = reduce_precision(p)
    assert (less.bits, less.delta, less.levels.tolist()) == (2, 3, [1, 2, 3, 0])
    assert less.scale == pytest.approx(1.5 * 3 / 15)
    assert less.dequantize().tolist() == pytest.approx(p.dequantize().tolist())
    # even levels only: the last plane is empty, too; a unit is worth twice as much then
    even = reduce_precision(planes([2, 4, 6, 0], 4, scale=1.5), prune_lsb=True)
    assert (even.bits, even.delta, even.levels.tolist()) == (2, 2, [1, 2, 3, 0])
    assert even.dequantize().tolist() == pytest.approx([0.2, 0.4, 0.6, 0])
    # one weight of a hundred reaches into the top plane: 1 % is under 2 %, and it is cut to what is left
    cut = reduce_precision(planes([12] + [1, 2, 7] * 33, 4))
    assert (cut.bits, cut.levels[0].item(), cut.delta) == (3, 7, 1)
    assert reduce_precision(planes([12, 12] + [7] * 98, 4)).bits == 4  # 2 % is not under 2 %


def test_what_the_lasso_moves_by_hand():
    """One weight at level 1 of one bit, pulled by .2 a step at rate 1: after one step .8 of it is left, after
    two with momentum .9 it is .8 - (.18 + .2) = .42, which rounds to zero; without momentum .6."""
    config = RunConfig(lr=1.0, momentum=0.9)
    assert [lasso_moved(planes([1], 1), 0.2, config, steps) for steps in (0, 1, 2)] == [0, 0, 1]
    assert lasso_moved(planes([1], 1), 0.2, RunConfig(lr=1.0, momentum=0.0), 2) == 0
    assert lasso_moved(planes([1, 0, 0, 0], 1), 0.2, config, 2) == 0.25


def test_stochastic_rounding_goes_both_ways_and_keeps_whole_numbers():
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([2.25, -2.25]).repeat_interleave(20_000)
    r = round_stochastic(x, g).view(2, -1)
    assert set(r[0].tolist()) == {2, 3} and set(r[1].tolist()) == {-3, -2}
    sigma = (0.25 * 0.75 / 20_000) ** 0.5
    assert r.mean(1).tolist() == pytest.approx([2.25, -2.25], abs=4.5 * sigma)
    whole = torch.arange(-3.0, 4)
    assert torch.equal(round_stochastic(whole, g), whole)


def test_a_scale_that_is_handed_in_saturates():
    p = quantize(torch.tensor([0.5, -3.0, 0.1]), 2, scale=torch.tensor(1.0))
    assert (p.levels.tolist(), p.sign.tolist(), p.scale) == ([2, 3, 0], [1, -1, 1], 1.0)


@pytest.mark.parametrize("bits, above", [(4, 6.0), (3, 10.0)])
def test_activations_end_at_six_or_at_the_learned_bound(bits, above):
    act, x = QuantAct(bits), torch.tensor([-1.0, 2.0, 100.0])
    y = act(x)
    assert (y[0].item(), y[2].item()) == (0, above)
    step = above / (2**bits - 1)
    assert y[1].item() == pytest.approx(round(2 / step) * step)
