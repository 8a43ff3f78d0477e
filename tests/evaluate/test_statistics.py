"Statistics: numbers worked by hand, and the same quantities from SciPy."
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmpqkd.evaluate import statistics

A, B = [84.5, 84.7, 84.9], [81.8, 82.1, 82.4]


def test_hand_numbers_of_the_tests():
    w = statistics.welch_test(A, B)
    assert (w['t'], w['df']) == pytest.approx((12.490, 3.485), abs=5e-4)
    assert w['p'] == pytest.approx(5.13e-4, abs=5e-7)
    p = statistics.paired_test(A, B)
    assert (p['df'], p['n']) == (2, 3)
    assert p['t'] == pytest.approx(45.03, abs=5e-3) and p['p'] == pytest.approx(4.93e-4, abs=5e-7)
    q = statistics.paired_test(A, [82.4, 81.8, 82.1])
    assert (q['t'], q['p']) == (pytest.approx(10.33, abs=5e-3), pytest.approx(9.24e-3, abs=5e-6))
    assert q['sign_flip_p'] == 0.25 and q['verdict'].startswith('undecided')


@pytest.mark.parametrize('n', [2, 5, 8])
@pytest.mark.parametrize('shift', [0, 0.5, 5])
def test_tests_agree_with_scipy(n, shift):
    rng = np.random.default_rng(n)
    a, b = rng.normal(80 + shift, 1, n), rng.normal(80, 2, n)
    ours, theirs = statistics.paired_test(a, b), stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours[k] for k in ('t', 'p', 'df', 'ci_low', 'ci_high')],
                               [theirs.statistic, theirs.pvalue, theirs.df, low, high])
    ours, theirs = statistics.welch_test(a, b), stats.ttest_ind(a, b, equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours[k] for k in ('t', 'p', 'df', 'ci_low', 'ci_high')],
                               [theirs.statistic, theirs.pvalue, theirs.df, low, high])
    flip = stats.permutation_test((a - b,), np.mean, permutation_type='samples', n_resamples=np.inf)
    assert statistics.sign_flip_test(a - b) == pytest.approx(flip.pvalue)


def test_verdicts():
    one = statistics.paired_test([84.5], [81.8])
    assert one['verdict'] == 'n=1, no test' and math.isnan(one['p'])
    assert one['difference'] == pytest.approx(2.7)
    assert statistics.paired_test(A, B)['verdict'].startswith('undecided (n=3')  # although p < .001
    up = np.array([80, 81, 82, 83, 84.0])
    down = up - [1, 1.1, 0.9, 1, 1.2]
    assert statistics.paired_test(up, down)['verdict'] == 'a higher'
    assert statistics.paired_test(down, up)['verdict'] == 'b higher'
    assert statistics.paired_test(up, up[::-1])['verdict'] == 'undecided'


def test_equal_differences():
    a = np.array([80.1, 81.2, 82.3, 83.4, 84.5])
    same = statistics.paired_test(a.tolist(), a.tolist())
    assert (same['t'], same['p'], same['ci_low'], same['ci_high'], same['sign_flip_p']) == (0, 1, 0, 0, 1)
    shifted = statistics.paired_test(a, a - 0.7)
    assert math.isinf(shifted['t']) and shifted['p'] == 0 and shifted['sign_flip_p'] == 0.0625


def test_smallest_sign_flip_p():
    smallest = [statistics.sign_flip_test([0.5] * n) for n in (1, 3, 5, 6, 20)]
    assert smallest == [1, 0.25, 0.0625, 0.03125, 2 / 2**20]
    with pytest.raises(ValueError, match='1 to 20 pairs'): statistics.sign_flip_test([1.0] * 21)
    assert math.isnan(statistics.paired_test(range(21), [0.5] * 21)['sign_flip_p'])


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match='equally many'): statistics.paired_test([1, 2], [1])
    with pytest.raises(ValueError, match='b must be a non-empty list of finite'):
        statistics.paired_test([1.0], [math.nan])
    with pytest.raises(ValueError, match='at least two'): statistics.welch_test([1.0], [1.0, 2.0])


def test_bootstrap_agrees_with_scipy():
    d = np.random.default_rng(0).normal(1, 2, 40)
    ours = statistics.bootstrap_ci(d)
    theirs = stats.bootstrap((d,), np.mean, method='percentile', random_state=1).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.06)
    assert ours == statistics.bootstrap_ci(d) != statistics.bootstrap_ci(d, seed=1)
    assert statistics.bootstrap_ci([2.0, 2.0]) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_testing_with_bonferroni(p):
    "Adjusted p of claim i: the largest Bonferroni p among all intersections that contain i."
    m = len(p)
    subsets = [s for r in range(1, m + 1) for s in itertools.combinations(range(m), r)]
    expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(m)]
    assert statistics.holm(p) == pytest.approx(expected)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1, 1])
    found = statistics.holm([0.02, math.nan])
    assert found[0] == pytest.approx(0.04) and math.isnan(found[1])
    assert statistics.holm([]) == []
    with pytest.raises(ValueError, match='p values'): statistics.holm([1.2])


@pytest.mark.parametrize('n, expected', [
    (1, 'n=1, no test'), (3, 'undecided (n=3, fewer than 5 pairs)'),
    (4, 'undecided (n=4, fewer than 5 pairs)'),
    (5, 'a higher'), (6, 'a higher')])
def test_fewer_than_five_pairs_decide_nothing(n, expected):
    "However far apart: the t test of the four differences 9.9, 10, 10.1 and 10 has p of 4e-7."
    b = [50.0] * n
    a = [50 + d for d in (9.9, 10.0, 10.1, 10.0, 9.9, 10.1)[:n]]
    found = statistics.paired_test(a, b)
    assert found['verdict'] == expected
    if n > 1: assert found['p'] == pytest.approx(stats.ttest_rel(a, b).pvalue) and found['p'] < 0.01
    other = statistics.paired_test(b, a)['verdict']
    assert other == ('b higher' if n >= 5 else expected)


# no difference, and what could have been found --------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_equivalence_is_a_90_percent_interval_within_the_margin(seed: int):
    d = np.random.default_rng(seed).normal(seed / 10 - 1, .5, 6)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(.90)
    assert (statistics.equivalence_test(d, 0 * d, 1.0) < .05) == (-1 < low and high < 1)


def test_detectable_differences_are_those_of_the_tables():
    "Power .8, two-sided 5 %: the standardised differences that G*Power gives for paired samples."
    for n, expected in ((5, 1.68), (10, 1.00), (30, .529)):
        assert statistics.detectable(1.0, n) == pytest.approx(expected, abs=.006)
    assert np.isnan(statistics.detectable(1.0, 1)) and statistics.detectable(0.0, 5) == 0


@pytest.mark.parametrize('rho, p', [(12 / 28, 0.354), (15 / 28, 0.236), (20 / 28, 0.088), (22 / 28, 0.048),
                                    (26 / 28, 0.0067)])
def test_exact_p_of_seven_ranks(rho, p):
    "The table of the null distribution of Spearman's coefficient, n = 7."
    wanted = round((1 - rho) * 7 * 48 / 6)  # sum of squared differences of ranks
    orders = itertools.permutations(range(7))
    order = next(o for o in orders if sum((a - b)**2 for a, b in enumerate(o)) == wanted)
    assert statistics.spearman(list(range(7)), list(order)) == pytest.approx(rho)
    assert statistics.spearman_test(list(range(7)), list(order)) == pytest.approx(p, abs=6e-4)


@pytest.mark.parametrize('seed', range(4))
def test_ranks_with_ties_agree_with_scipy(seed):
    g = np.random.default_rng(seed)
    a, b = g.integers(0, 4, 6), g.normal(size=6)
    assert statistics.ranks(a) == pytest.approx(stats.rankdata(a))
    assert statistics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    found = stats.permutation_test((a,), lambda x: stats.spearmanr(x, b).statistic,
                                   permutation_type='pairings', n_resamples=np.inf)
    assert statistics.spearman_test(a, b) == pytest.approx(found.pvalue, abs=2e-3)
