"""Partitions: every index once, known limits of the skew, bounded time, impossible requests refused."""

import hashlib
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.core.streams import rng
from fedmpqkd.data.partition import (
    KINDS,
    Partition,
    dirichlet_counts,
    dirichlet_split,
    even_cut,
    plot_partition,
    quantity_split,
    shard_split,
    split,
    top_up,
)

CIFAR10 = np.tile(np.arange(10), 5000)
CIFAR100 = np.tile(np.arange(100), 500)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('clients', [1, 2, 7, 30])
def test_every_index_exactly_once(kind, clients):
    y = np.random.default_rng(clients).integers(0, 6, 1000)
    parts = split(y, clients, kind, classes_per_client=6 if clients == 1 else 3).parts
    assert len(parts) == clients
    assert sorted(i for p in parts for i in p.tolist()) == list(range(1000))
    assert all(p.dtype == np.int64 and p.tolist() == sorted(p.tolist()) for p in parts)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(20, 300),
    classes=st.integers(1, 12),
    clients=st.integers(1, 15),
    alpha=st.floats(1e-6, 1e6),
    seed=st.integers(0, 10**6),
)
def test_dirichlet_holds_its_promises_for_any_request(n, classes, clients, alpha, seed):
    y = np.random.default_rng(seed).integers(0, classes, n)
    p = split(y, clients, dirichlet=alpha, seed=seed)
    assert sorted(np.concatenate(p.parts).tolist()) == list(range(n))
    assert all(10 * size * clients >= n for size in p.sizes.tolist())  # in integers: n_k >= 0.1 N / K


def test_huge_concentration_is_uniform():
    table = split(CIFAR10, 10, dirichlet=1e6).table(CIFAR10, 10).to_numpy()
    assert abs(table.sum(1) - 5000).max() <= 60
    sigma = math.sqrt(5000 * 0.1 * 0.9)  # of a class count under uniform labels
    assert abs(table - 500).max() < 3 * sigma


def test_tiny_concentration_leaves_few_classes():
    table = split(CIFAR10, 10, dirichlet=0.01).table(CIFAR10, 10).to_numpy()
    assert (table > 0).sum(1).mean() < 3


def test_skew_grows_as_the_concentration_falls():
    def largest(alpha):
        tables = [split(CIFAR10, 10, dirichlet=alpha, seed=s).table(CIFAR10, 10).to_numpy() for s in range(5)]
        return np.mean([(t / t.sum(1, keepdims=True)).max(1).mean() for t in tables])

    values = [largest(a) for a in (0.05, 0.5, 5.0, 500.0)]
    assert values == sorted(values, reverse=True) and values[0] > 0.6 and values[-1] < 0.13


def test_first_class_is_dirichlet():
    "Before any client is full, the share of one client has the mean 1/K and the variance of a Beta marginal."
    alpha, clients, generator = 0.7, 5, np.random.default_rng(0)
    class_sizes = np.array([10_000, 1])
    counts = [dirichlet_counts(class_sizes, clients, alpha, generator)[0] for _ in range(4000)]
    shares = np.array(counts) / 10_000
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.allclose(shares.mean(0), 1 / clients, atol=0.02)
    assert np.allclose(shares.var(0), variance, rtol=0.12)


def test_full_accounts_are_closed():
    """A client that holds N/K after some class gets nothing of later ones."""
    for seed in range(20):
        counts = dirichlet_counts(np.full(10, 500), 5, 0.1, np.random.default_rng(seed))
        held = np.cumsum(counts, axis=0)
        later = counts[1:][held[:-1] >= 1000]
        assert later.sum() == 0 and counts.sum() == 5000


@pytest.mark.parametrize('alpha', [1e-300, 1e-12, 1e-3])
def test_vanishing_concentrations_are_not_nan(alpha):
    counts = dirichlet_counts(np.full(10, 500), 10, alpha, np.random.default_rng(0))
    assert counts.sum(1).tolist() == [500] * 10 and counts.min() >= 0


def test_hundred_clients_terminate():
    began = time.process_time()
    p = split(CIFAR100, 100, dirichlet=0.1)
    assert time.process_time() - began < 2
    assert p.sizes.min() >= 50


def test_hopeless_draws_end_in_rebalancing_which_is_recorded():
    y = np.tile(np.arange(10), 100)  # 1,000 images, 100 clients: the smallest may hold one, but rarely does
    p = dirichlet_split(y, 100, 0.01, rng(0, 'partition'), min_fraction=0.5)
    assert p.sizes.min() >= 5
    assert p.how.startswith('dirichlet(0.01), after 1000 draws: rebalanced, ')
    assert p.how.endswith(' images moved')


def test_top_up_keeps_classes_and_moves_no_more_than_it_must():
    counts = np.array([[40, 0, 3], [50, 1, 6]])
    after, moved = top_up(counts, 10, np.random.default_rng(0))
    assert after.sum(1).tolist() == [43, 57]
    assert after.sum(0).tolist() == [80, 10, 10] and moved == 10  # 9 + 1 were lacking
    assert counts.sum(0).tolist() == [90, 1, 9]  # the input is left alone


def test_same_seed_same_split_in_another_process():
    code = (
        'import hashlib, numpy as np; from fedmpqkd.data.partition import split, KINDS;'
        'y = np.tile(np.arange(10), 50);'
        'parts = [p.tobytes() for k in KINDS for p in split(y, 6, k, seed=3).parts];'
        'print(hashlib.sha256(b"".join(parts)).hexdigest())'
    )
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    y = np.tile(np.arange(10), 50)
    parts = [p.tobytes() for k in KINDS for p in split(y, 6, k, seed=3).parts]
    assert hashlib.sha256(b''.join(parts)).hexdigest() == other.stdout.strip()
    assert split(y, 6, seed=3).parts[0].tolist() != split(y, 6, seed=4).parts[0].tolist()


def test_split_leaves_global_randomness_alone():
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    split(CIFAR10, 10)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@settings(deadline=None)
@given(n=st.integers(1, 10**6), holders=st.integers(1, 1000))
def test_even_cut(n, holders):
    cut = even_cut(n, holders)
    assert len(cut) == holders and cut.sum() == n and cut.max() - cut.min() <= 1


@pytest.mark.parametrize('clients, s', [(5, 2), (10, 2), (7, 3), (100, 5), (3, 10)])
def test_shards_hold_exactly_s_classes_and_every_class_has_a_holder(clients, s):
    table = shard_split(CIFAR10, clients, s, rng(0, 'partition')).table(CIFAR10, 10).to_numpy()
    assert ((table > 0).sum(1) == s).all() and (table.sum(0) == 5000).all()
    holders = (table > 0).sum(0)
    assert holders.max() - holders.min() <= 1


def test_quantity_skews_sizes_and_not_labels():
    p = quantity_split(CIFAR10, 10, 0.5, rng(1, 'partition'))
    table = p.table(CIFAR10, 10).to_numpy()
    assert p.sizes.max() > 2 * p.sizes.min() >= 1000
    expected = p.sizes[:, None] / 10
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert chi2 < 126  # 99.9 % point of chi-squared with 81 degrees of freedom


def test_iid_sizes_and_infinite_concentration():
    p = split(CIFAR10[:103], 10, dirichlet=math.inf)
    assert sorted(p.sizes.tolist()) == [10] * 7 + [11] * 3 and p.how == 'dirichlet(inf) = iid'


def test_labels_may_skip_classes_and_come_as_tensors():
    y = torch.tensor([2, 7] * 50)
    p = split(y, 4, seed=1)
    table = p.table(y, 10)
    assert table.shape == (4, 10) and table[2].sum() == 50 and table[7].sum() == 50


def test_empty_clients_only_where_asked_for():
    p = split(np.zeros(50, dtype=int), 20, dirichlet=1e-6, min_fraction=0.0)
    assert p.sizes.min() == 0 and p.sizes.sum() == 50
    assert split(np.zeros(50, dtype=int), 20, dirichlet=1e-6).sizes.min() >= 1


@pytest.mark.parametrize(
    'request_, message',
    [
        (dict(clients=0), 'not 0'),
        (dict(clients=31), 'between 1 to 30 clients'),
        (dict(dirichlet=0.0), 'positive'),
        (dict(dirichlet=-1.0), 'positive'),
        (dict(dirichlet=math.nan), 'positive'),
        (dict(min_fraction=1.5), 'min_fraction'),
        (dict(min_fraction=-0.1), 'min_fraction'),
        (dict(clients=7, min_fraction=1.0), 'min_fraction'),
        (dict(kind='shards', classes_per_client=4), 'in 1..3'),
        (dict(kind='shards', classes_per_client=0), 'in 1..3'),
        (dict(kind='shards', clients=2, classes_per_client=1), 'cannot hold all 3'),
        (dict(kind='shards', clients=30, classes_per_client=3), 'only 10 images'),
        (dict(kind='quantity', skew=0.0), 'skew must be positive'),
        (dict(kind='random'), 'unknown kind'),
    ],
)
def test_the_impossible_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        split(**{'y': np.tile([0, 1, 2], 10), 'clients': 5} | request_)


@pytest.mark.parametrize('y', [np.zeros((4, 2), dtype=int), np.array([0.5, 1.0]), np.array([-1, 0])])
def test_labels_must_be_whole_numbers(y):
    with pytest.raises(ValueError, match='whole numbers'):
        split(y, 1)


@pytest.mark.parametrize('parts', [([0, 1], [1, 2]), ([0], [2]), ([1, 0],), ([0, 0],)])
def test_a_partition_that_is_none_cannot_be_made(parts):
    with pytest.raises(ValueError):
        Partition(tuple(np.array(p) for p in parts), 'wrong')


def test_plot_has_a_dot_for_each_filled_cell():
    import matplotlib

    matplotlib.use('Agg')
    p = split(CIFAR10, 10, dirichlet=0.1)
    ax = plot_partition(p, CIFAR10, 10)
    table = p.table(CIFAR10, 10).to_numpy()
    sizes = ax.collections[0].get_sizes()
    assert len(sizes) == (table > 0).sum()
    assert np.allclose(np.sort(sizes) / sizes.max(), np.sort(table[table > 0]) / table.max())
    matplotlib.pyplot.close(ax.figure)
