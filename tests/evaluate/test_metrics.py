"Metrics: numbers worked by hand, and the same quantities from scikit-learn and torchmetrics."
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.evaluate import metrics

torch.set_num_threads(1)


def drawn(n, classes=10, seed=0, spread=2.0):
    "Logits, and labels drawn from their softmax: calibrated by construction."
    g = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(n, classes, generator=g)
    return z, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


# ---- accuracy

def test_accuracy_agrees_with_sklearn():
    from sklearn.metrics import accuracy_score, recall_score
    z, y = drawn(257, classes=5)
    guess = z.argmax(1).numpy()
    assert metrics.accuracy(z, y) == pytest.approx(100 * accuracy_score(y, guess))
    theirs = 100 * recall_score(y, guess, average=None)
    np.testing.assert_allclose(metrics.per_class_accuracy(z, y, 5), theirs)


def test_accuracy_is_weighted_by_samples():
    z, y = drawn(10)
    parts = [metrics.accuracy(z[:7], y[:7]), metrics.accuracy(z[7:], y[7:])]
    assert metrics.accuracy(z, y) == pytest.approx((7 * parts[0] + 3 * parts[1]) / 10)


def test_absent_class_is_nan():
    found = metrics.per_class_accuracy(torch.eye(3)[:2], torch.tensor([0, 0]), 3)
    assert found[0] == 50 and np.isnan(found[1:]).all()
    with pytest.raises(ValueError, match=r'labels must lie in 0\.\.1'):
        metrics.per_class_accuracy(torch.eye(3), torch.tensor([0, 1, 2]), 2)


@pytest.mark.parametrize('f', [
    metrics.accuracy, metrics.nll, metrics.brier, metrics.ece_from_logits, metrics.fit_temperature,
    metrics.confidence_of])
def test_bad_logits_are_refused(f):
    for samples, labels in ((0, 0), (2, 3)):
        with pytest.raises(ValueError, match='need logits'):
            f(torch.zeros(samples, 3), torch.zeros(labels, dtype=torch.long))
    with pytest.raises(ValueError, match='NaN'): f(torch.full((1, 3), math.nan), torch.tensor([0]))


# ---- calibration

def test_ece_by_hand():
    assert metrics.ece([0.95, 0.85, 0.65, 0.55, 0.55], [1, 0, 1, 1, 0], bins=10) == pytest.approx(0.27)


@pytest.mark.parametrize('bins', [1, 10, 15])
@pytest.mark.parametrize('scale', [0.5, 1, 3])
def test_ece_agrees_with_torchmetrics(bins, scale):
    from torchmetrics.classification import MulticlassCalibrationError
    z, y = drawn(2000, seed=1)
    theirs = MulticlassCalibrationError(10, n_bins=bins, norm='l1')((scale * z).softmax(1), y).item()
    assert metrics.ece_from_logits(scale * z, y, bins) == pytest.approx(theirs, abs=1e-5)


def test_calibrated_data_have_no_error():
    z, y = drawn(100_000)
    conf, right = metrics.confidence_of(z, y)
    assert metrics.ece(conf, right) < 0.01 and metrics.adaptive_ece(conf, right) < 0.01
    assert metrics.fit_temperature(z, y) == pytest.approx(1, abs=0.02)


def test_edges_of_bins():
    n, _, _ = metrics.calibration_bins([0.0, 0.2, 0.2000001, 0.4, 0.6, 0.8, 1.0], [1] * 7, bins=5)
    assert n.tolist() == [2, 2, 1, 1, 1]
    for bins in (3, 7, 10, 15):  # an edge m/M belongs to bin m
        n, conf, _ = metrics.calibration_bins([m / bins for m in range(1, bins + 1)], [0] * bins, bins)
        assert n.tolist() == [1] * bins and (np.diff(conf) > 0).all()
    assert metrics.ece([1.0, 1.0], [1, 1]) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
def test_properties_of_calibration_errors(samples, bins):
    conf, right = map(list, zip(*samples, strict=True))
    one = abs(np.mean(right) - np.mean(conf))
    for f in (metrics.ece, metrics.adaptive_ece):
        assert f(conf, right, 1) == pytest.approx(one)
        assert one - 1e-12 <= f(conf, right, bins) <= 1 + 1e-12  # finer bins cannot hide a mean gap
    by_sample = np.abs(np.array(right, float) - conf).mean()
    assert metrics.adaptive_ece(conf, right, len(conf)) == pytest.approx(by_sample)


def test_calibration_refuses_nonsense():
    for bad in ([1.2], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r'must lie in \[0, 1\]'): metrics.ece(bad, [1])
    with pytest.raises(ValueError, match='two vectors of one length'): metrics.ece([0.5, 0.5], [1])
    with pytest.raises(ValueError, match='two vectors of one length'): metrics.adaptive_ece([], [])
    with pytest.raises(ValueError, match='bins must be at least 1'): metrics.ece([0.5], [1], bins=0)


def test_proper_scores_agree_with_sklearn():
    from sklearn.metrics import log_loss
    z, y = drawn(300, classes=4)
    p = z.double().softmax(1).numpy()
    assert metrics.nll(z, y) == pytest.approx(log_loss(y, p))
    q = np.array([[0.7, 0.2, 0.1]])
    assert metrics.brier(torch.tensor(q).log(), torch.tensor([0])) == pytest.approx(0.3**2 + 0.2**2 + 0.1**2)
    assert metrics.brier(torch.tensor([[99.0, 0]]), torch.tensor([1])) == pytest.approx(2)


@pytest.mark.parametrize('factor', [0.25, 1, 4])
def test_temperature_undoes_a_factor(factor):
    z, y = drawn(5000)
    t = metrics.fit_temperature(factor * z, y)
    assert t / factor == pytest.approx(metrics.fit_temperature(z, y), rel=1e-6)
    best = metrics.nll(factor * z / t, y)
    assert all(best <= metrics.nll(factor * z / (t * other), y) for other in (0.8, 0.95, 1.05, 1.25))


def test_reliability_diagram_shows_the_bins():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    ax = metrics.plot_reliability([0.95, 0.85, 0.65, 0.55, 0.55], [1, 0, 1, 1, 0], bins=10)
    assert ax.get_title() == 'ECE 0.270'
    assert [round(bar.get_height(), 3) for bar in ax.containers[0]] == [0.5, 1, 0, 1]
    given_ax = plt.subplots()[1]
    assert metrics.plot_reliability([0.5], [1], ax=given_ax) is given_ax
    plt.close('all')


# ---- curves

def test_auc_by_hand():
    assert metrics.auc([10, 50, 70, 80]) == dict(sum=210, trapz=165, norm=55)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_auc_agrees_with_sklearn(curve, random):
    from sklearn.metrics import auc
    x = np.cumsum([random.uniform(0.1, 9) for _ in curve])
    assert metrics.auc(curve)['trapz'] == pytest.approx(auc(np.arange(len(curve)), curve))
    assert metrics.auc_over(x, curve)['trapz'] == pytest.approx(auc(x, curve))
    assert min(curve) - 1e-9 <= metrics.auc_over(x, curve)['norm'] <= max(curve) + 1e-9
    norm = metrics.auc_over(x, curve)['norm']
    assert metrics.auc_over(1e6 * x, curve)['norm'] == pytest.approx(norm)  # no unit


def test_missing_rounds_repeat_the_last_value():
    filled = dict(sum=70, trapz=45, norm=15)
    assert metrics.auc([10, None, math.nan, 40]) == metrics.auc([10, 10, 10, 40]) == filled
    assert metrics.headline([10, 20, None], last=2) == 20
    for f in (metrics.auc, metrics.headline):
        with pytest.raises(ValueError, match='first round'): f([None, 3])
        with pytest.raises(ValueError, match='first round'): f([])


def test_auc_over_refuses_impossible_costs():
    with pytest.raises(ValueError, match='3 costs for 2'): metrics.auc_over([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match='cannot fall'): metrics.auc_over([2, 1], [1, 2])
    with pytest.raises(ValueError, match='cannot fall'): metrics.auc_over([1, math.nan], [1, 2])
    assert metrics.auc_over([5, 5], [10, 20])['norm'] == 20  # nothing was paid between the two


def test_headline():
    assert metrics.headline([99, 1, 2, 3, 4, 5]) == 3
    assert metrics.headline([1, 2]) == 1.5
    with pytest.raises(ValueError, match='at least 1'): metrics.headline([1], last=0)


# ---- clients

def test_dispersion_is_the_limit_of_local_test_sets():
    rng = np.random.default_rng(0)
    acc = rng.uniform(20, 95, 6)
    common = rng.multinomial(200, rng.dirichlet([0.3] * 6), size=1).repeat(12, 0)
    counts = common + rng.integers(0, 50, (12, 6))
    hit = acc[None] / 100
    local = [100 * rng.binomial(counts[k] * 4000, hit[0]).sum() / (counts[k].sum() * 4000)
             for k in range(12)]
    found = metrics.client_dispersion(acc, counts)
    assert found['mean'] == pytest.approx(np.mean(local), abs=0.1)
    assert found['std'] == pytest.approx(np.std(local), abs=0.1)
    assert found['worst_decile'] == pytest.approx(np.sort(local)[:2].mean(), abs=0.2)  # two of twelve
    assert found['weighted_mean'] == pytest.approx(np.average(local, weights=counts.sum(1)), abs=0.1)


def test_weighted_dispersion_counts_samples():
    "A client of weight two is two clients."
    acc = [90.0, 60.0, 30.0]
    shares = np.array([[1, 0, 0], [0, 0.5, 0.5]])
    found = metrics.client_dispersion(acc, shares * [[2], [1]])
    split = metrics.client_dispersion(acc, shares[[0, 0, 1]])
    assert found['weighted_mean'] == pytest.approx(split['mean']) == 75
    assert found['weighted_std'] == pytest.approx(split['std'])
    assert found['mean'] == pytest.approx(67.5)


def test_dispersion_of_empty_clients_and_absent_classes():
    assert metrics.client_dispersion([80, math.nan], [[3, 0], [0, 0]]) == dict(
        mean=80, std=0, worst_decile=80, weighted_mean=80, weighted_std=0)
    with pytest.raises(ValueError, match='no test accuracy'):
        metrics.client_dispersion([80, math.nan], [[3, 1]])
    with pytest.raises(ValueError, match='every client is empty'):
        metrics.client_dispersion([80, 70], [[0, 0]])
    with pytest.raises(ValueError, match=r'shape \[K, 2\]'):
        metrics.client_dispersion([80, 70], [[1, 1, 1]])


# ---- memory, and what an import costs

def test_memory_and_imports_in_a_fresh_process():
    "The module needs no scipy, scikit-learn or matplotlib to be imported, and sees 64 MiB come."
    code = '''
import sys
for name in ('scipy', 'sklearn', 'matplotlib', 'fastcore', 'IPython'): sys.modules[name] = None
from fedmpqkd.evaluate.metrics import peak_memory_mib, auc
from fedmpqkd.evaluate.statistics import holm
import torch
before = peak_memory_mib()['rss']
x = torch.ones(64 * 2**18)
grown = peak_memory_mib()['rss'] - before
del x
assert 60 < grown < 80, grown
assert peak_memory_mib()['rss'] - before > 60
assert auc([1, 2])['sum'] == 3 and holm([0.1]) == [0.1]
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
