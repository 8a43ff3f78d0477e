"Label noise: wrong labels are counted, and their draws belong to one client."
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmpqkd.core.config import RunConfig
from fedmpqkd.data.labelnoise import noisy_clients, noisy_labels
from fedmpqkd.federation.rounds import participants

torch.set_num_threads(1)
many = settings(max_examples=40, deadline=None, derandomize=True)


@many
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 100),
       st.integers(2, 20))
def test_each_client_has_exactly_its_share_of_wrong_labels(seed, sizes, percent, classes):
    g = np.random.default_rng(seed)
    order = g.permutation(sum(sizes)).astype(np.int64)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    labels = torch.from_numpy(g.integers(0, classes, sum(sizes)))
    before = labels.clone()
    noisy = noisy_labels(labels, parts, percent / 100, classes, seed)
    wrong = [int((noisy != labels)[p].sum()) for p in parts]
    assert wrong == [percent * n // 100 for n in sizes]  # whole-number arithmetic
    assert torch.equal(labels, before) and noisy.dtype == torch.int64
    assert not len(noisy) or (noisy.min() >= 0 and noisy.max() < classes)


@pytest.mark.parametrize('rate, wrong', [
    (0.29, 29), (0.57, 57), (0.07, 7), (0.289, 28), (0.999, 99), (1, 100)])
def test_a_rate_is_a_decimal_number(rate, wrong):
    "0.29 * 100 is 28.999999999999996 to a computer."
    labels = torch.zeros(100, dtype=torch.int64)
    assert (noisy_labels(labels, [np.arange(100)], rate, 10, 0) != 0).sum() == wrong


def test_new_labels_are_uniform_over_the_other_classes():
    "Chi-square over the 90 pairs of old and new label."
    labels = torch.arange(90_000) % 10
    noisy = noisy_labels(labels, [np.arange(90_000)], 1.0, 10, seed=3)
    pairs = Counter(zip(labels.tolist(), noisy.tolist(), strict=True))
    assert len(pairs) == 90 and all(a != b for a, b in pairs)
    assert 1e-3 < stats.chisquare(list(pairs.values())).pvalue < 1 - 1e-3


def test_which_images_are_wrong_is_uniform_too():
    "Each of 40 positions is hit in about a quarter of 2,000 seeds."
    labels, part = torch.zeros(40, dtype=torch.int64), [np.arange(40)]
    hits = sum((noisy_labels(labels, part, 0.25, 10, seed) != 0).int() for seed in range(2000))
    assert hits.sum() == 20_000 and abs(hits - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_client_s_noise_is_its_own_and_other_streams_stay():
    labels, parts = torch.arange(300) % 10, np.split(np.arange(300), 3)
    config = RunConfig(clients=50, participation=0.2, dropout=0.5)
    before = participants(config, [5] * 50, 4), np.random.get_state()[1].tolist(), torch.get_rng_state()
    all_noisy = noisy_labels(labels, parts, 0.3, 10, 0)
    one = noisy_labels(labels, parts, 0.3, 10, 0, clients=[1])
    assert torch.equal(one[parts[1]], all_noisy[parts[1]])
    assert torch.equal(one[parts[0]], labels[parts[0]]) and torch.equal(one[parts[2]], labels[parts[2]])
    assert not torch.equal(noisy_labels(labels, parts, 0.3, 10, 1), all_noisy)
    after = participants(config, [5] * 50, 4), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@many
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([0, 0.01, 0.1, 0.125, 0.5, 1]),
       st.integers(0, 100))
def test_noisy_clients_are_some_of_the_active(seed, n, share, round):
    active = list(range(7, 7 + 3 * n, 3))
    chosen = noisy_clients(active, share, seed, round)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(active)
    assert len(chosen) == min(n, max(int(2 * share * n + 1) // 2, share > 0))
    assert chosen == noisy_clients(active, share, seed, round)


def test_bad_rates_are_refused():
    labels, parts = torch.zeros(4, dtype=torch.int64), [np.arange(4)]
    for bad in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match=r'\[0, 1\]'): noisy_labels(labels, parts, bad, 10, 0)
        with pytest.raises(ValueError, match=r'\[0, 1\]'): noisy_clients([1], bad, 0, 0)
    with pytest.raises(ValueError, match='at least 2'): noisy_labels(labels, parts, 0.5, 1, 0)
    with pytest.raises(ValueError, match='no client 1'): noisy_labels(labels, parts, 0.5, 10, 0, clients=[1])
