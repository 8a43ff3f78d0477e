"Bits for coordinates: against brute force, theory and counting by hand."
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.quant.coordinates import (
    BITS,
    HEAD,
    _falling,
    bf16,
    body_bytes,
    decoded,
    errors_of,
    hull_moves,
    percentile_tags,
    plan,
    scales_before,
    spend,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
tensors = st.lists(st.integers(0, 40), min_size=1, max_size=4)


def drawn(seed, sizes, tail=3):
    rng = np.random.default_rng(seed)
    delta = (1e-3 * rng.standard_t(tail, sum(sizes))).astype(np.float32)
    return delta, rng.gamma(.5, 1, sum(sizes)).astype(np.float32)


def lost(delta, fisher, found, sizes):
    return float((fisher.astype(float) * (delta - decoded(delta, found, sizes)).astype(float) ** 2).sum())


def value_bits(tags): return int(np.array(BITS)[tags].sum())


@quick
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_greedy_is_optimal_where_it_stops_on_the_hull(seed, d):
    "At the budgets that the moves sum up to, nothing among all 4^d assignments is better."
    delta, fisher = drawn(seed, [d])
    sizes = np.array([d])
    errors = errors_of(delta, sizes, scales_before(delta, sizes))
    cost = errors * fisher
    moves = hull_moves(cost, where=0)
    every = np.array(list(product(range(4), repeat=d)))  # [4^d, d]
    bits, loss = np.array(BITS)[every].sum(1), cost[every, np.arange(d)].sum(1)
    for taken in range(len(moves[0]) + 1):
        tags = np.zeros(d, np.uint8)
        tags[moves[0][:taken]] = moves[1][:taken]
        budget = value_bits(tags)
        found = spend(moves, d, budget, value_bits)
        assert value_bits(found) <= budget
        reached = cost[found, np.arange(d)].sum()
        assert reached <= loss[bits <= budget].min() * (1 + 1e-4) + 1e-9


def test_the_order_of_moves_is_that_of_gain_per_bit():
    delta, fisher = drawn(1, [300])
    sizes = np.array([300])
    errors = errors_of(delta, sizes, scales_before(delta, sizes))
    where, now, last = 8, np.zeros(300, int), np.inf
    price = np.array([0, *(b + where for b in BITS[1:])])
    for j, c in zip(*hull_moves(errors * fisher, where), strict=True):
        assert c > now[j]
        slope = (errors[now[j], j] - errors[c, j]) * fisher[j] / (price[c] - price[now[j]])
        others = [(errors[now[j], j] - errors[k, j]) * fisher[j] / (price[k] - price[now[j]])
                  for k in range(now[j] + 1, 4)]
        assert slope == pytest.approx(max(others), rel=1e-5) and 0 < slope <= last * (1 + 1e-5)
        now[j], last = c, slope
    final = errors[now, np.arange(300)]
    assert (final <= errors.min(0) + 1e-12).all()  # in the end nothing is to be gained


def plain_moves(cost, price):
    "One at a time, in fractions: the steepest; of equal ones that of the first entry, to the least class."
    now, moves = [0] * cost.shape[1], []
    while True:
        every = [(-Fraction(int(cost[a, j] - cost[c, j]), price[c] - price[a]), j, c)
                 for j, a in enumerate(now) for c in range(a + 1, 4) if cost[c, j] < cost[a, j]]
        if not every: return moves
        _, j, c = min(every)
        now[j] = c
        moves.append((j, c))


@quick
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0, 8]), st.sampled_from([2, 5, 40]))
def test_moves_with_ties_are_those_of_plain_greedy(seed, d, where, values):
    "Few whole numbers as errors, classes 1 and 2: a bit's worth is exact and often the same."
    rng = np.random.default_rng(seed)
    cost = (2 + where) * (4 + where) * np.sort(rng.integers(0, values, (4, d)), 0)[::-1]
    cost[3] = cost[0]  # not to be had
    entry, target = hull_moves(cost.astype(np.float32), where)
    expected = plain_moves(cost, [0, *(b + where for b in BITS[1:])])
    assert list(zip(entry.tolist(), target.tolist(), strict=True)) == expected


@quick
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([2, 5, 40]), st.integers(0, 60))
def test_moves_are_taken_one_by_one_while_they_fit(seed, d, values, budget):
    "Then eight more are looked at, one by one."
    rng = np.random.default_rng(seed)
    cost = 8 * np.sort(rng.integers(0, values, (4, d)), 0)[::-1]
    moves, tags, over = hull_moves(cost.astype(np.float32), 0), np.zeros(d, np.uint8), 0
    for j, c in zip(*moves, strict=True):
        before = tags.copy()
        tags[j] = max(tags[j], c)
        over += over > 0 or value_bits(tags) > budget
        if value_bits(tags) > budget or over > 8: tags = before
    assert (spend(moves, d, budget, value_bits) == tags).all()


@quick
@given(st.integers(0, 2**31), st.integers(0, 3000), st.sampled_from([1, 6, 200, 10**6]))
def test_the_order_by_halves_is_that_of_a_stable_sort(seed, n, values):
    "Also of numbers that are equal, and of those with less than a full mantissa."
    rng = np.random.default_rng(seed)
    gain = (10.0 ** rng.uniform(-44, 38, values)).astype(np.float32)[rng.integers(0, values, n)]
    gain = gain[gain > 0]
    assert (_falling(gain) == np.argsort(-gain, kind='stable')).all()


def naive_bytes(tags, sizes, ternary):
    "Counted entry by entry."
    total, start = 0, 0
    for d in sizes:
        part, gaps = list(tags[start:start + d]), 0
        for c in (1, 2, 3):
            at = [i for i, t in enumerate(part) if t == c]
            steps = [b - a - 1 for a, b in zip([-1, *at], at, strict=False)]
            gaps += sum(max(1, -(-int(g).bit_length() // 7)) for g in [len(at), *steps])
        n = [part.count(c) for c in range(4)]
        two = -(-n[1] // 5) if ternary else -(-2 * n[1] // 8)
        total += 1 + 2 * (n[1] > 0) + 2 * (n[2] > 0) + min(gaps, -(-d // 4)) + two + -(-n[2] // 2) + 2 * n[3]
        start += d
    return total


@quick
@given(st.integers(0, 2**31), st.lists(st.integers(0, 700), min_size=1, max_size=4), st.floats(0, 1),
       st.booleans())
def test_length_is_what_counting_says(seed, sizes, share, ternary):
    rng = np.random.default_rng(seed)
    tags = (rng.integers(0, 4, sum(sizes)) * (rng.uniform(size=sum(sizes)) < share)).astype(np.uint8)
    assert body_bytes(tags, np.array(sizes), ternary).sum() == naive_bytes(tags, sizes, ternary)


@quick
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.integers(0, 4000),
       st.sampled_from([(1, 2, 3), (2,), (3,), (1, 3)]), st.sampled_from(['rms', 'class', 'group']),
       st.booleans())
def test_the_budget_is_never_exceeded(seed, sizes, more, classes, scale, ternary):
    delta, fisher = drawn(seed, sizes)
    least = sum(HEAD + 1 + min(3, -(-d // 4)) for d in sizes)
    budget = least + more
    found = plan(delta, fisher, sizes, budget, classes, scale, ternary)
    used = naive_bytes(found.tags, sizes, ternary) + HEAD * len(sizes)
    assert used <= budget
    assert set(np.unique(found.tags)) <= {0, *classes}


@pytest.mark.parametrize('tail', [3, 30])
def test_more_bytes_lose_less(tail):
    sizes = [4000, 1000, 50]
    delta, fisher = drawn(5, sizes, tail)
    losses = [lost(delta, fisher, plan(delta, fisher, sizes, b), sizes) for b in range(100, 12_000, 400)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6 * losses[0]


@pytest.mark.parametrize('d, spread, worst', [
    (30, 0, 2), (300, 0, 1.05), (300, 1, 1.05), (2048, 0, 1), (2048, 1, 1), (20_000, 1, 1), (100_000, 1, 1)])
def test_more_bytes_lose_less_where_the_price_of_a_place_changes(d, spread, worst):
    "Also at the edges of the band in which both are tried. Of few entries, one that does not fit matters."
    near, wide = [3 / 32 - 1e-4, 3 / 32 + 1e-4, 9 / 64 - 1e-3, 9 / 64 + 1e-3], [.0625, .07, .08, .1, .11, .12]
    if d < 1000: wide = np.linspace(.18 if d < 100 else .06, .3, 20)
    shares = sorted(near if d > 50_000 else [*near, *wide])
    for seed in range(6 if d < 1000 else 2):
        rng = np.random.default_rng(seed)
        delta = (rng.standard_normal(d) * np.exp(rng.normal(size=d) * spread)).astype(np.float32)
        fisher, sizes = rng.gamma(.3, size=d), [d // 2, d - d // 2]
        budgets = [b for b in (int(4 * d * s) for s in shares) if b >= 20]
        losses = [lost(delta, fisher, plan(delta, fisher, sizes, b), sizes) for b in budgets]
        for n in range(1, len(losses)): assert losses[n] <= worst * min(losses[:n]), (seed, budgets[n])


every = np.array(list(product(range(4), repeat=6)), np.uint8)  # [4^6, 6]
lengths = np.array([int(body_bytes(tags, np.array([6]))[0]) + HEAD for tags in every])


@quick
@given(st.integers(0, 2**31), st.integers(9, 26))
def test_a_small_update_has_the_better_of_two_plans(seed, budget):
    "Never below the best of all 4^6 assignments that fit, never above what either price of a place buys."
    delta, fisher = drawn(seed, [6])
    sizes = np.array([6])
    weight = fisher / fisher.max()
    cost = errors_of(delta, sizes, scales_before(delta, sizes)) * weight
    loss = cost[every, np.arange(6)].sum(1)
    reached = cost[plan(delta, fisher, sizes, budget).tags, np.arange(6)].sum()
    assert reached >= loss[lengths <= budget].min() * (1 - 1e-5)
    for where in (0, 8):
        tags = spend(hull_moves(cost, where), 6, budget, lambda t: int(body_bytes(t, sizes)[0]) + HEAD)
        assert reached <= cost[tags, np.arange(6)].sum() * (1 + 1e-5)


def test_importance_wins_by_its_own_measure():
    "And magnitude by its own; at equal bytes, against Top-k in half precision and random entries."
    sizes = [5000]
    delta, fisher = drawn(6, sizes)
    one = np.ones_like(fisher)
    random = np.random.default_rng(0).uniform(size=5000) / np.maximum(delta**2, 1e-20)
    found = {n: plan(delta, f, sizes, 1500, c) for n, f, c in (
        ('fisher', fisher, (1, 2, 3)), ('magnitude', one, (1, 2, 3)), ('topk', one, (3,)),
        ('random', random, (1, 2, 3)))}
    weighted = {n: lost(delta, fisher, f, sizes) for n, f in found.items()}
    plain = {n: lost(delta, one, f, sizes) for n, f in found.items()}
    assert weighted['fisher'] == min(weighted.values()) and plain['magnitude'] == min(plain.values())
    assert max(plain, key=plain.get) == 'random' and plain['topk'] > plain['magnitude']


@pytest.mark.parametrize('budget', [1500, 4000])
def test_gaussians_of_many_sizes_against_reverse_water_filling(budget):
    "No code of so many bits beats Shannon's bound; one that picks and scales entries is not far from it."
    rng = np.random.default_rng(0)
    sizes = [100] * 60
    spread = np.repeat(np.sort(np.exp(rng.uniform(-9, 0, 60)))[::-1], 100).astype(np.float32)  # of 60 tensors
    delta = (spread * rng.normal(size=6000)).astype(np.float32)
    one = np.ones(6000, np.float32)
    found = plan(delta, one, sizes, budget)

    def bound(bits, low=1e-12, high=1.0):
        for _ in range(60):  # the level of the water at which the rates add up
            level = (low * high) ** .5
            rate = np.maximum(0, .5 * np.log2(spread.astype(float) ** 2 / level)).sum()
            low, high = (level, high) if rate > bits else (low, level)
        return np.minimum(spread.astype(float) ** 2, level).sum()
    heads = 8 * (HEAD + 5) * 60
    assert bound(8 * budget) < lost(delta, one, found, sizes) < bound((8 * budget - heads) / 3)
    bits = [b.mean() for b in np.array_split(np.array(BITS)[found.tags], 6)]  # by falling spread
    assert bits == sorted(bits, reverse=True) and bits[-1] == 0


@pytest.mark.parametrize('c', [2**-3, 2**3, 2**8])
def test_units_of_the_parameters_do_not_matter(c):
    sizes = [700, 300]
    delta, fisher = drawn(7, sizes)
    one, other = plan(delta, fisher, sizes, 400), plan(delta * c, fisher / c**2, sizes, 400)
    assert (one.tags == other.tags).all() and (one.levels == other.levels).all()


def test_ties_are_broken_by_position_and_nothing_else():
    delta, fisher = np.full(400, .5, np.float32), np.ones(400, np.float32)
    found = plan(delta, fisher, [400], 60)
    sent = np.flatnonzero(found.tags)
    assert len(sent) and (sent == np.arange(len(sent))).all()


def test_scales_are_bfloat16():
    torch = pytest.importorskip('torch')
    x = np.abs(np.random.default_rng(0).normal(size=1000)).astype(np.float32) * 1e-9
    theirs = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.abs(bf16(x) - theirs).max() <= np.abs(x).max() * 2**-8  # halves may go the other way
    assert (bf16(theirs) == theirs).all()


def test_two_bits_are_not_wasted_on_zeros():
    "The published rule gives two bits to entries that it then writes as zero; a budget never does."
    sizes = [4000]
    delta, fisher = drawn(8, sizes)
    for scale in ('rms', 'group'):
        found = plan(delta, fisher, sizes, 900, scale=scale)
        assert (found.levels[(found.tags == 1) | (found.tags == 2)] != 0).all()
    stake = fisher * delta**2
    by_rank = plan(delta, fisher, sizes, None, scale='group')
    assert (by_rank.tags == percentile_tags(stake)).all()
    assert (by_rank.levels[by_rank.tags == 1] == 0).mean() > .9


def test_all_zero_and_all_alike():
    zero = np.zeros(50, np.float32)
    for fisher in (zero, zero + 1):
        assert not plan(zero, fisher, [50], 30).tags.any()
    assert not plan(zero + 1, zero, [50], 30).tags.any()  # of no importance
    assert plan(zero[:0], zero[:0], [0, 0], 20).tags.shape == (0,)


@pytest.mark.parametrize('change, why', [
    (dict(fisher=np.full(4, np.nan)), 'importance of 4 of 4'),
    (dict(fisher=np.array([1, -1, 1, 1.])), 'below 0'), (dict(fisher=np.ones(3)), '3 importances'),
    (dict(delta=np.array([1, np.inf, 0, 0], np.float32)), 'update of 1 of 4'),
    (dict(budget=3), 'empty update'),
    (dict(classes=()), 'classes'), (dict(classes=(0, 1)), 'classes'), (dict(scale='max'), "scale='max'"),
    (dict(sizes=[3]), 'tensors of 3')])
def test_what_cannot_be_planned(change, why):
    good = dict(delta=np.ones(4, np.float32), fisher=np.ones(4), sizes=[4], budget=40)
    with pytest.raises(ValueError, match=why): plan(**good | change)


def test_percentiles():
    stake = np.arange(100, dtype=float)
    assert np.bincount(percentile_tags(stake)).tolist() == [70, 15, 12, 3]
    assert np.bincount(percentile_tags(stake, (.5, .5, 1.0)), minlength=4).tolist() == [50, 0, 50, 0]
    with pytest.raises(ValueError, match='must rise'): percentile_tags(stake, (.9, .5, .95))
