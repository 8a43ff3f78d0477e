"Label noise by counting, attacks against torchattacks and closed forms, corruptions against SciPy, colorsys and OpenCV's numbers."
import colorsys
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from sklearn.datasets import load_sample_images

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.streams import rng
from fedmpqkd.data import labelnoise
from fedmpqkd.data.images import from_tensors, normalize
from fedmpqkd.data.labelnoise import noisy_clients, noisy_labels
from fedmpqkd.evaluate import corruptions
from fedmpqkd.evaluate.attacks import attack, count_right, fgsm, input_gradient, live, pgd, to_input
from fedmpqkd.evaluate.corruptions import (
    CORRUPTIONS,
    EXTRA,
    MAIN,
    between,
    both_axes,
    chosen_images,
    contact_sheet,
    corrupt,
    corrupted,
    corrupted_images,
    disk,
    distance_to,
    edges,
    equalized,
    gaussian_matrix,
    glass_blur,
    hue_saturation_value,
    plasma,
    set_name,
    usable,
    zoom_matrix,
)
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.pool import WorkerPool
from fedmpqkd.federation.rounds import participants
from fedmpqkd.federation.trials import attack_all, stress_test, summarize_corruptions
from fedmpqkd.learn.vision import Resident
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.quantize import fake_quantize

torch.set_num_threads(1)
many = settings(max_examples=40, deadline=None, derandomize=True)
few = settings(many, max_examples=10)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
FREE = [n for n in CORRUPTIONS if n != 'frost']  # those that need no photographs


@pytest.fixture(scope='module')
def photos() -> torch.Tensor:
    "Pieces of two real photographs, uint8 [120, 3, 32, 32]."
    pieces = []
    for image in load_sample_images().images:
        half = image[:426, :640].reshape(213, 2, 320, 2, 3).mean((1, 3)).astype(np.uint8)
        pieces.append(torch.from_numpy(half[:192]).unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 3, 32, 32))
    return torch.cat(pieces)


@pytest.fixture(scope='module')
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2),
                               torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10)).eval()


def batch(seed: int, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 32, 32, generator=g), torch.randint(0, 10, (n,), generator=g)


# --- label noise ------------------------------------------------------------------------------------------------------

@many
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 100), st.integers(2, 20))
def test_each_client_has_exactly_its_share_of_wrong_labels(seed, sizes, percent, classes):
    g = np.random.default_rng(seed)
    order = g.permutation(sum(sizes)).astype(np.int64)
    parts = np.split(order, np.cumsum(sizes)[:-1])
    labels = torch.from_numpy(g.integers(0, classes, sum(sizes)))
    before = labels.clone()
    noisy = noisy_labels(labels, parts, percent / 100, classes, seed)
    assert [int((noisy != labels)[p].sum()) for p in parts] == [percent * n // 100 for n in sizes]  # whole-number arithmetic
    assert torch.equal(labels, before) and noisy.dtype == torch.int64
    assert not len(noisy) or (noisy.min() >= 0 and noisy.max() < classes)


@pytest.mark.parametrize('rate, wrong', [(0.29, 29), (0.57, 57), (0.07, 7), (0.289, 28), (0.999, 99), (1, 100)])
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
    everybody = noisy_labels(labels, parts, 0.3, 10, 0)
    one = noisy_labels(labels, parts, 0.3, 10, 0, clients=[1])
    assert torch.equal(one[parts[1]], everybody[parts[1]])
    assert torch.equal(one[parts[0]], labels[parts[0]]) and torch.equal(one[parts[2]], labels[parts[2]])
    assert not torch.equal(noisy_labels(labels, parts, 0.3, 10, 1), everybody)
    after = participants(config, [5] * 50, 4), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@many
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([0, 0.01, 0.1, 0.125, 0.5, 1]), st.integers(0, 100))
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


# --- attacks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('levels', [0, 1, 2, 4, 8, 255])
def test_attacks_stay_in_the_box_and_in_range(network, levels):
    x, y = batch(levels)
    x[0], x[1] = 0, 1
    for moved in (fgsm(network, x, y, levels / 255, MEAN, STD), pgd(network, x, y, levels / 255, MEAN, STD),
                  pgd(network, x, y, levels / 255, MEAN, STD, start=torch.Generator().manual_seed(0))):
        assert (moved - x).abs().max() <= levels / 255 + 1e-7
        assert moved.min() >= 0 and moved.max() <= 1 and not moved.requires_grad
        assert levels or torch.equal(moved, x)


@few
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_a_linear_margin_rises_by_the_dual_norm(seed, levels):
    "Two classes, x far from the borders: the margin's rise is epsilon times the sum of |w_1 - w_0| / std."
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).double().eval()
    with torch.no_grad(): model[1].weight.copy_(torch.randn(2, 48, generator=g))
    x, y = 0.25 + 0.5 * torch.rand(3, 3, 4, 4, generator=g, dtype=torch.float64), torch.tensor([0, 1, 0])
    margin = lambda z: (  # how far the wrong class is ahead
        model(to_input(z, MEAN, STD)) * torch.tensor([[-1, 1], [1, -1], [-1, 1]])).sum(1)
    v = (model[1].weight[1] - model[1].weight[0]).view(3, 16) / torch.tensor(STD, dtype=torch.float64)[:, None]
    for moved in (fgsm(model, x, y, levels / 255, MEAN, STD), pgd(model, x, y, levels / 255, MEAN, STD)):
        assert torch.allclose(margin(moved) - margin(x), levels / 255 * v.abs().sum().expand(3), rtol=1e-9)


def test_epsilon_counts_pixels_and_not_normalised_units(network):
    "A network with the normalisation inside, attacked without any, gives the same images; and unclipped pixels move by epsilon."
    x, y = batch(1)
    x = 0.1 + 0.8 * x
    inside = lambda z: network((z - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1))
    moved = fgsm(network, x, y, 2 / 255, MEAN, STD)
    assert torch.equal(moved, fgsm(inside, x, y, 2 / 255, (0, 0, 0), (1, 1, 1)))
    size = (moved - x).abs()
    assert size.max() == pytest.approx(2 / 255, rel=1e-4) and (size > 1.9 / 255).float().mean() > 0.9


def test_a_pixel_without_gradient_stays(network):
    x, y = batch(2)
    blind = lambda z: network(torch.cat([z[:, :2], torch.zeros_like(z[:, 2:])], 1))
    for moved in (fgsm(blind, x, y, 8 / 255, MEAN, STD), pgd(blind, x, y, 8 / 255, MEAN, STD)):
        assert torch.equal(moved[:, 2], x[:, 2]) and (moved[:, :2] != x[:, :2]).float().mean() > 0.8


def test_more_steps_find_more_loss(network):
    x, y = batch(3, 64)
    loss = lambda z: torch.nn.functional.cross_entropy(network(to_input(z, MEAN, STD)), y).item()
    quick, slow = fgsm(network, x, y, 8 / 255, MEAN, STD), pgd(network, x, y, 8 / 255, MEAN, STD)
    assert loss(x) < loss(quick) < loss(slow)


def test_the_size_of_the_batch_plays_no_part(network):
    x, y = batch(4)
    together = pgd(network, x, y, 4 / 255, MEAN, STD)
    alone = torch.cat([pgd(network, x[i:i + 1], y[i:i + 1], 4 / 255, MEAN, STD) for i in range(len(x))])
    assert (together != alone).float().mean() < 1e-3  # the last bit of a convolution may turn a sign


def test_torchattacks_agrees(network):
    "An independent implementation; not a dependency, because it pins an old version of requests."
    torchattacks = pytest.importorskip('torchattacks')
    x, y = batch(5)
    for levels in (1, 4):
        theirs = torchattacks.FGSM(network, eps=levels / 255)
        theirs.set_normalization_used(MEAN, STD)
        pixels = theirs(to_input(x, MEAN, STD), y) * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
        far = (pixels - fgsm(network, x, y, levels / 255, MEAN, STD)).abs() > 1e-5
        assert far.float().mean() < 1e-3
        theirs = torchattacks.PGD(network, eps=levels / 255, alpha=levels / 255 / 4, steps=5, random_start=False)
        theirs.set_normalization_used(MEAN, STD)
        pixels = theirs(to_input(x, MEAN, STD), y) * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
        far = (pixels - pgd(network, x, y, levels / 255, MEAN, STD, 5, levels / 255 / 4)).abs() > 1e-5
        assert far.float().mean() < 5e-3


def test_what_would_flatter_is_refused(network):
    x, y = batch(6)
    with pytest.raises(ValueError, match='training mode'): fgsm(torch.nn.Linear(3, 3).train(), x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match='without a graph'): fgsm(lambda z: network(z).detach(), x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match=r'\[0, 1\]'): fgsm(network, 255 * x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match='at least 0'): fgsm(network, x, y, -0.1, MEAN, STD)
    with pytest.raises(ValueError, match='at least 0 and 1'): pgd(network, x, y, 0.1, MEAN, STD, steps=0)


def test_parameters_get_no_gradient(network):
    pgd(network, *batch(7), 2 / 255, MEAN, STD, steps=2)
    assert all(p.grad is None for p in network.parameters())


# --- corruptions ------------------------------------------------------------------------------------------------------

def test_the_table_is_that_of_cifar_c():
    "A hash of all constants, and four rows typed again: these are not ImageNet's."
    text = json.dumps({name: [[float(v) for v in row] for row in rows] for name, rows in CORRUPTIONS.items()})
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == 'd3a18f2da9ee2183'
    assert [row[0] for row in CORRUPTIONS['gaussian_noise']] == [.04, .06, .08, .09, .10]
    assert [row[0] for row in CORRUPTIONS['jpeg_compression']] == [80, 65, 58, 50, 40]
    assert [row[0] for row in CORRUPTIONS['contrast']] == [.75, .5, .4, .3, .15]
    assert CORRUPTIONS['fog'][2] == (0.75, 2.5)
    assert (len(MAIN), len(EXTRA), len(set(MAIN + EXTRA))) == (15, 4, 19)


@pytest.mark.parametrize('name', FREE)
def test_corruptions_are_bytes_and_repeatable(photos, name):
    x = photos[:6]
    before, state = x.clone(), np.random.get_state()[1].tolist()
    a, b, other = corrupt(x, name, 3, 0), corrupt(x, name, 3, 0), corrupt(x, name, 3, 1)
    assert a.dtype == torch.uint8 and a.shape == x.shape and a.is_contiguous()
    assert torch.equal(a, b) and torch.equal(x, before) and np.random.get_state()[1].tolist() == state
    drawn = name not in ('defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression', 'gaussian_blur', 'saturate')
    assert torch.equal(a, other) != drawn
    assert corrupt(x[:0], name, 3).shape == (0, 3, 32, 32)


# severities after which the squared error falls by more than 2 %, as the published generator's does on the same photographs
FALLS = dict(
    glass_blur=[2, 4],  # more blur, as many copies
    motion_blur=[3],  # (6, 2) and (8, 2) are the same half bell: the angles decide
    elastic_transform=[1, 2, 3, 4],  # the affine part shrinks from severity to severity
    saturate=[2])  # from grey to gaudy


@pytest.mark.parametrize('name', FREE)
def test_severity_is_monotone(photos, name):
    error = [((corrupt(photos, name, s).float() - photos.float()) ** 2).mean().item() for s in range(1, 6)]
    falls = [s for s in range(1, 5) if error[s] < 0.98 * error[s - 1]]
    assert falls == FALLS.get(name, []), error


def test_gaussian_sigma_is_recovered():
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, (sigma,) in enumerate(CORRUPTIONS['gaussian_noise'], 1):
        noise = corrupt(grey, 'gaussian_noise', severity).double().numpy() / 255
        assert noise.std() == pytest.approx(sigma, rel=0.02)
        assert noise.mean() == pytest.approx((128 - 0.5) / 255, abs=0.001)  # truncation takes half a level


def test_shot_speckle_and_impulse_have_their_variances():
    grey, level = torch.full((40, 3, 32, 32), 100, dtype=torch.uint8), 100 / 255
    spread = lambda name, s: (corrupt(grey, name, s).double() / 255).std().item()
    for s in range(1, 6):
        assert spread('shot_noise', s) == pytest.approx((level / CORRUPTIONS['shot_noise'][s - 1][0]) ** 0.5, rel=0.02)
        assert spread('speckle_noise', s) == pytest.approx(level * CORRUPTIONS['speckle_noise'][s - 1][0], rel=0.02)
        changed = corrupt(grey, 'impulse_noise', s)
        share, n = CORRUPTIONS['impulse_noise'][s - 1][0], grey.numel()
        assert abs((changed != 100).sum().item() - share * n) < 5 * (share * n) ** 0.5
        assert abs((changed == 255).sum().item() - share * n / 2) < 5 * (share * n / 2) ** 0.5
        assert set(changed.unique().tolist()) == {0, 100, 255}


def test_bytes_are_truncated_and_clipped():
    x = torch.tensor([100, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    bright = corrupt(x, 'brightness', 1)  # 100 + 12.75 and 250 + 12.75
    assert bright[:, 0, 0, 0].tolist() == [112, 255]


def test_jpeg_files_shrink_with_quality(photos):
    images = photos[::6].permute(0, 2, 3, 1).numpy()
    sizes = [sum(len(corruptions.jpeg_file(image, q).getvalue()) for image in images) for q in (80, 65, 58, 50, 40)]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize('sigma, truncate, border', [(0.05, 4, 'nearest'), (0.4, 4, 'nearest'), (1, 4, 'nearest'), (6.4, 3, 'reflect'), (1.92, 3, 'reflect')])
def test_scipy_s_gaussian_agrees(sigma, truncate, border):
    x = np.random.default_rng(0).random((3, 32, 32, 2))
    theirs = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode=border, truncate=truncate)
    assert np.allclose(both_axes(x, gaussian_matrix(sigma, truncate, border)), theirs, atol=1e-12)


@pytest.mark.parametrize('factor', [1, *np.arange(1, 1.26, 0.01)[1:], 1.25, 1.75, 2.25])
def test_scipy_s_zoom_agrees(factor):
    x = np.random.default_rng(0).random((32, 32))
    kept = int(np.ceil(32 / factor))
    top = (32 - kept) // 2
    theirs = ndimage.zoom(x[top:top + kept, top:top + kept], factor, order=1)
    trim = (len(theirs) - 32) // 2
    ours = both_axes(x[None, :, :, None], zoom_matrix(factor))[0, :, :, 0]
    assert np.allclose(ours, theirs[trim:trim + 32, trim:trim + 32], atol=1e-12)


@pytest.mark.parametrize('border', ['nearest', 'reflect', 'mirror'])
def test_scipy_s_interpolation_agrees(border):
    g = np.random.default_rng(0)
    x, rows, columns = g.random((2, 32, 32, 3)), g.uniform(-9, 41, (2, 32, 32)), g.uniform(-9, 41, (2, 32, 32))
    ours = between(x, rows, columns, border)
    for i in range(2):
        for c in range(3):
            theirs = ndimage.map_coordinates(x[i, :, :, c], [rows[i], columns[i]], order=1, mode=border)
            assert np.allclose(ours[i, :, :, c], theirs, atol=1e-12)


def test_colorsys_agrees():
    g = np.random.default_rng(0)
    colours = np.concatenate([g.random((200, 3)), np.repeat(g.random((5, 1)), 3, 1), np.eye(3), np.zeros((1, 3))])
    k, s, v = hue_saturation_value(colours)
    for colour, ki, si, vi in zip(colours, k, s, v, strict=True):
        h, theirs, value = colorsys.rgb_to_hsv(*colour)
        assert (si[0], vi[0]) == pytest.approx((theirs, value), abs=1e-12)
        for new_s, new_v in ((0.3, 0.9), (1.0, 0.5)):
            assert new_v * (1 - new_s * ki) == pytest.approx(colorsys.hsv_to_rgb(h, new_s, new_v), abs=1e-9)


def test_distances_are_near_the_true_ones():
    "Borgefors' moves are within 2.1 % of Euclid."
    edge = np.random.default_rng(0).random((5, 32, 32)) < 0.004
    ours, true = distance_to(edge, 100), np.stack([ndimage.distance_transform_edt(~e) for e in edge])
    assert np.abs(ours - true).max() <= 0.021 * true.max() + 1e-9 and (ours[edge] == 0).all()
    assert (distance_to(np.zeros((1, 32, 32), bool)) == 20).all()


def test_histograms_by_hand():
    "Values 3, 3, 5, 9 a quarter each: 3 -> 0, 5 -> 127.5 (to the even 128), 9 -> 255; a constant image stays."
    x = np.full((2, 32, 32), 7, np.uint8)
    x[0] = np.repeat([3, 3, 5, 9], 256).reshape(32, 32)
    assert equalized(x)[0].ravel()[[0, 300, 600, 1000]].tolist() == [0, 0, 128, 255] and (equalized(x)[1] == 7).all()


def test_disks():
    assert disk(0.3, 0.4)[7:10, 7:10].sum() == pytest.approx(1)
    assert disk(1.5, 0.1)[7:10, 7:10] == pytest.approx(np.full((3, 3), 1 / 9), abs=1e-12)
    for kernel in (disk(0.5, 0.6), disk(1, 0.2)):
        assert kernel.sum() == pytest.approx(1) and np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])


def test_glass_copies_as_the_published_generator_does():
    "The same draws through the published exchange of two views, one image at a time."
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    ours = glass_blur(x, np.random.default_rng(5), 0.05, 1, 2).round().astype(np.uint8)  # this sigma blurs nothing
    g, theirs = np.random.default_rng(5), (x / 255 * 255).astype(np.uint8)
    for _ in range(2):
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                right, down = g.integers(-1, 1, (2, 3))
                for i, image in enumerate(theirs):
                    there = row + down[i], column + right[i]
                    image[row, column], image[there] = image[there], image[row, column]
    assert np.array_equal(ours, theirs)


def test_clouds():
    "Each from 0 to 1, and the public generator's numbers from the same draws."
    field = plasma(np.random.default_rng(0), 50, 3)
    assert (field.min((1, 2)) == 0).all() and (field.max((1, 2)) == 1).all()
    row, column = np.mgrid[:32, :32]
    theirs = plasma(np.random.RandomState(0), 1, 2.5)[0]  # the public generator draws from this older kind
    assert [theirs.sum(), ((row + 2 * column) * theirs).sum()] == pytest.approx([495.5882213940613, 23012.85951222506], rel=1e-12)


@pytest.mark.parametrize('name, total', [('fog', 18307936), ('gaussian_noise', 18785084), ('shot_noise', 18766230), ('speckle_noise', 18686963)])
def test_the_public_generator_s_numbers(name, total):
    "A weighted sum of all bytes at severity 3, after np.random.seed(0); the sum is the public generator's."
    row, column = np.mgrid[:32, :32]
    image = np.stack([(7 * row + 3 * column + 40 * k) % 256 for k in range(3)], -1).astype(np.uint8)
    out = corruptions.MAKERS[name](image[None], np.random.RandomState(0), *CORRUPTIONS[name][2])[0]
    assert ((row + 2 * column)[..., None] * out.clip(0, 255).astype(np.uint8).astype(int)).sum() == total


def test_light_leaves_what_it_should(photos):
    "Contrast keeps each channel's mean, fog the brightest value, desaturation the largest component."
    x = photos.double()
    assert (corrupt(photos, 'contrast', 5).double().mean((2, 3)) - x.mean((2, 3))).abs().max() < 1.01
    assert (corrupt(photos, 'saturate', 2).amax(1).double() - photos.amax(1).double()).abs().max() <= 1
    assert (corrupt(photos, 'fog', 5).flatten(1).amax(1) <= photos.flatten(1).amax(1)).all()


def test_a_streak_keeps_light_and_goes_one_way():
    dot = np.zeros((4, 32, 32, 1)); dot[:, 16, 16] = 200
    out = corruptions.streaks(dot, 6, 2, np.array([0., 90., 180., -90.]))[..., 0]
    assert np.allclose(out.sum((1, 2)), 200, atol=8)
    rows, columns = np.nonzero(out[0])
    assert set(rows) == {16} and max(columns) == 16  # what it came from lies to its right
    assert np.array_equal(out[1], out[0].T) and np.array_equal(out[3][:0:-1, 1:], out[1][1:, 1:])
    taps = np.exp(-np.arange(13) ** 2 / 8)
    assert out[0, 16, 16:3:-1] == pytest.approx(np.round(200 * taps / taps.sum()), abs=0.5)


def test_opencv_s_numbers():
    "Plain and weighted sums that OpenCV 5.0 gives for the same image."
    row, column = np.mgrid[:32, :32]
    image = ((row * row // 3 + 5 * column + 60 * ((row // 5 + column // 7) % 3)) % 256).astype(np.uint8)[None]
    sums = lambda x: [float(x.sum()), float(((row + 2 * column) * x[0].astype(float)).sum())]
    edge, flat = edges(image), equalized(image)
    relief = np.rint(corruptions.stencil(corruptions.stencil(flat, corruptions.EMBOSS).clip(0, 255), np.full((3, 3), 1 / 9)))
    assert sums(edge) == [274, 13140]  # Canny(image, 50, 150)
    assert sums(distance_to(edge)) == pytest.approx([1047.17, 46305.7], rel=1e-5)  # distanceTransform, 5 x 5
    assert sums(flat) == [130621, 6256987]  # equalizeHist
    assert sums(relief) == [158479, 7304784]  # filter2D and blur, both to bytes
    defocus = [sums(corruptions.defocus_blur(image, rng(0, 'noise'), *c))[1] for c in ((.5, .6), (1, .2), (1.5, .1))]
    assert defocus == pytest.approx([6333258.3, 6335986.6, 6352065.4], rel=1e-5)  # filter2D with the softened disk


def test_an_edge_between_equal_gradients_is_one_pixel_wide():
    "By hand: both sides of a border have the same gradient; the rule (> before, >= behind) keeps the first of the two."
    square = np.zeros((1, 32, 32), np.uint8)
    square[0, 8:24, 10:20] = 200
    edge = edges(square)[0]
    assert np.flatnonzero(edge[16]).tolist() == [9, 19] and np.flatnonzero(edge[:, 15]).tolist() == [7, 23]


def test_water_needs_a_drop(photos):
    "Where the noise has no drop the image stays as it is."
    dry = corruptions.spatter(photos[:3].permute(0, 2, 3, 1).numpy(), np.random.default_rng(0), 0, 0.001, 0.7, 0.7, 0.5, 0)
    assert np.array_equal(dry, photos[:3].permute(0, 2, 3, 1).numpy())


def test_bad_corruptions_are_refused(photos):
    with pytest.raises(ValueError, match="unknown corruption 'rain'"): corrupt(photos, 'rain', 1)
    for severity in (0, 6, 2.5):
        with pytest.raises(ValueError, match='1, 2, 3, 4 or 5'): corrupt(photos, 'fog', severity)
    with pytest.raises(ValueError, match='uint8'): corrupt(photos.float(), 'fog', 1)


def test_frost_and_the_name_of_a_set_without_it(photos, monkeypatch):
    corruptions.frost_pictures.cache_clear()
    monkeypatch.setattr(corruptions.importlib.util, 'find_spec', lambda name: None)
    assert usable(CORRUPTIONS) == tuple(FREE)
    assert set_name('cifar10', usable(CORRUPTIONS)) == 'CIFAR-10-C (rebuilt, 18 of 19)'
    assert set_name('cifar100', usable(MAIN), (3,)) == 'CIFAR-100-C (rebuilt, 14 of 19, severities 3)'
    with pytest.raises(ImportError, match='imagecorruptions'): corrupt(photos, 'frost', 1)
    corruptions.frost_pictures.cache_clear()
    window = tuple(np.full((40, 50, 3), 10 * i, np.uint8) for i in range(5))
    monkeypatch.setattr(corruptions, 'frost_pictures', lambda: window)
    assert usable(CORRUPTIONS) == tuple(CORRUPTIONS)
    added = corrupt(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), 'frost', 3).flatten(1)
    assert {tuple(row.unique().tolist()) for row in added} == {(0,), (4,), (8,), (12,), (16,)}  # 0.4 of each window
    assert corrupt(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8), 'frost', 5).unique().item() in (75, 79, 84, 88, 93)


def test_the_contact_sheet_has_every_name(photos):
    import matplotlib
    matplotlib.use('Agg')
    figure = contact_sheet(photos[0], FREE[-5:])
    titles = [a.get_title() for a in figure.axes]
    assert titles == ['clean', *(n.replace('_', ' ') for n in FREE[-5:]), '', '', '', '']


# --- whole test sets --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def data(photos):
    return from_tensors('pieces', photos, torch.arange(120) % 4, photos[:80], torch.arange(80) % 4)


def test_the_cache_is_used_and_checked(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    fresh = corrupted_images(data, 'fog', 2, 40, seed=1)
    path, = (tmp_path / 'fedmpqkd' / 'corrupted').iterdir()
    monkeypatch.setattr(corruptions, 'corrupt', lambda *a: pytest.fail('made again'))
    assert torch.equal(corrupted_images(data, 'fog', 2, 40, seed=1), fresh)
    monkeypatch.undo(); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for content in (path.read_bytes()[:-50], b'', b'no tensor'):
        path.write_bytes(content)
        assert torch.equal(corrupted_images(data, 'fog', 2, 40, seed=1), fresh)
        assert 'cache is damaged' in capsys.readouterr().out
    corrupted_images(data, 'fog', 2, 40, seed=1)
    assert capsys.readouterr().out == ''
    corrupted_images(data, 'fog', 2, 40, seed=2), corrupted_images(data, 'fog', 2, 39, seed=1), corrupted_images(data, 'fog', 3, 40, seed=1)
    corrupted_images(data.subset(test=79), 'fog', 2, 40, seed=1)
    assert len(list(path.parent.iterdir())) == 5


def test_a_cache_that_cannot_be_written_costs_time_only(data, tmp_path, monkeypatch, capsys):
    (tmp_path / 'fedmpqkd').write_text('in the way')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert torch.equal(corrupted_images(data, 'contrast', 2), corrupt(data.test_x, 'contrast', 2))
    assert 'cannot be written' in capsys.readouterr().out


def test_corrupted_goes_through_all_cases(data):
    found = list(corrupted(data, ['contrast', 'fog'], (1, 4), images=20, cache=False))
    assert [f[:2] for f in found] == [('contrast', 1), ('contrast', 4), ('fog', 1), ('fog', 4)]
    index = chosen_images(data, 20)
    assert torch.equal(found[1][2], corrupt(data.test_x[index], 'contrast', 4))
    assert torch.bincount(data.test_y[index]).tolist() == [5, 5, 5, 5]


def test_means_by_hand():
    table = dict(fog={'1': 80.0, '3': 60.0}, snow={'1': 70.0, '3': 50.0}, fair={'1': 91.0, '3': 92.0})
    reference = dict(fog={'1': 85.0, '3': 75.0}, snow={'1': 80.0, '3': 60.0}, fair={'1': 90.0, '3': 92.0})
    out = summarize_corruptions(table, 90, reference, 91)
    assert out['mca'] == pytest.approx(443 / 6) and out['severity_3'] == pytest.approx(202 / 3)
    assert out['mce'] == pytest.approx(100 * (60 / 40 + 80 / 60 + 17 / 18) / 3) and out['mce_of'] == 3
    assert out['relative_mce'] == pytest.approx(100 * (40 / 22 + 60 / 42) / 2) and out['relative_mce_of'] == 2  # fair: nothing was lost
    assert summarize_corruptions(table, 90) == dict(mca=out['mca'], severity_3=out['severity_3'])
    assert summarize_corruptions(dict(fog={'1': 80.0}), 90)['severity_3'] is None


# --- the stress test --------------------------------------------------------------------------------------------------

def small(classes: int, act=torch.nn.ReLU) -> torch.nn.Module:
    "Two convolutions: enough for every question asked here."
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, bias=False), torch.nn.BatchNorm2d(8), act(), torch.nn.Conv2d(8, 16, 3, 2, bias=False),
                               torch.nn.BatchNorm2d(16), act(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, classes))


def crew_of(data, workers: int, act_bits: int = 32) -> WorkerPool:
    register_model('small', small)
    return WorkerPool(make_config('fedmpq', model='small', act_bits=act_bits), Resident.of(data), workers=workers)


def states_of(pool: WorkerPool, data) -> dict:
    "A network after some steps on the data, and its 4-bit form."
    replica, (x, y) = pool.replica, (normalize(data.train_x, data.mean, data.std), data.train_y)
    optimizer = torch.optim.SGD(replica.model.parameters(), 0.05, 0.9)
    for _ in range(20):
        replica.model.train()
        optimizer.zero_grad(); torch.nn.functional.cross_entropy(replica.model(x), y).backward(); optimizer.step()
    fp = {n: t.detach().clone() for n, t in replica.state.items()}
    return dict(deployed=fp | {n: fake_quantize(fp[n], 4) for n in replica.layout.quantized}, fp=fp)


@pytest.mark.parametrize('act_bits', [32, 4, 2])
def test_gradients_pass_through_the_deployed_network(data, act_bits):
    "The folded network's gradient is that of the plain network in eval mode."
    pool = crew_of(data, 1, act_bits)
    state = states_of(pool, data)['deployed']
    x, y = data.test_x[:8].float() / 255, data.test_y[:8]
    ours = input_gradient(live(pool, state), x, y, data.mean, data.std)
    pool.replica.load(state)
    plain = input_gradient(pool.replica.model.eval(), x, y, data.mean, data.std)
    pool.close()
    assert (ours != 0).float().mean() > 0.5
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), plain.flatten(), 0)
    assert cosine > (0.999 if act_bits == 32 else 0.9)  # a rounded activation may fall to the other side


def test_the_stress_test_counts_right(data):
    "Against the plain networks, one image at a time; with one worker and with three; and as JSON."
    crews = [crew_of(data, n) for n in (1, 3)]
    states = states_of(crews[0], data)
    one, three = (stress_test(c, states, images=60, corruptions=('contrast', 'fog'), severities=(1, 5), cache=False) for c in crews)
    assert one == three == json.loads(json.dumps(one))
    assert one['images'] == 60 and one['diverged'] == [] and one['corruption_set'] == 'pieces-C (rebuilt, 2 of 19, severities 1 5)'
    index, model, chosen = chosen_images(data, 60), crews[0].replica.model.eval(), {}
    x, y = data.test_x[index].float() / 255, data.test_y[index]
    right = lambda z: 100 * sum(int(model(to_input(z[i:i + 1], data.mean, data.std)).argmax()) == int(y[i]) for i in range(60)) / 60
    for name in ('fp', 'deployed'):
        crews[0].replica.load(states[name])
        close = lambda value: pytest.approx(value, abs=100 / 60 + 1e-6)  # folding may move one image over a border
        assert one['clean'][name] == close(right(x))
        for e in (1, 2, 4, 8):
            moved = fgsm(model, x, y, e / 255, data.mean, data.std)
            assert one['attacks'][name][f'fgsm {e}/255'] == close(right(moved))
            if (name, e) == ('fp', 2): chosen['moved'] = moved
        if name == 'deployed': assert one['attacks'][name]['transfer fgsm 2/255'] == close(right(chosen['moved']))
        assert one['corruptions'][name]['fog']['5'] == close(right(corrupt(data.test_x[index], 'fog', 5).float() / 255))
    assert 'transfer fgsm 2/255' not in one['attacks']['fp']
    small = [attack_all(c, states, index, 0, batch=20) for c in crews]
    assert small[0] == small[1] and small[0]['fp']['fgsm 2/255'] == close(one['attacks']['fp']['fgsm 2/255'])
    for c in crews: c.close()


def test_attacks_hurt_in_order(data):
    "A network that has learned: a larger epsilon leaves fewer images, and ten steps no more than one."
    pool = crew_of(data, 1)
    states = states_of(pool, data)
    found = attack(pool, states, data.test_x.float() / 255, data.test_y, seed=0)['fp']
    pool.close()
    assert found['fgsm 1/255'] >= found['fgsm 2/255'] >= found['fgsm 8/255']
    assert found['pgd-10 2/255'] <= found['fgsm 2/255'] < 80


def test_the_transferred_attack_comes_from_the_full_precision_model(data):
    "Two networks with different first weights: an attack on one is not the attack on the other."
    pool, other = crew_of(data, 1), WorkerPool(make_config('fedmpq', model='small', seed=1), Resident.of(data), workers=1)
    states = dict(deployed=states_of(other, data)['fp'])
    states['fp'] = states_of(pool, data)['fp']
    x, y = data.test_x.float() / 255, data.test_y
    moved = fgsm(live(pool, states['fp']), x, y, 2 / 255, data.mean, data.std)
    expected = count_right(live(pool, states['deployed']), moved, y, data)
    found = attack(pool, states, x, y, seed=0)
    pool.close(); other.close()
    assert found['deployed']['transfer fgsm 2/255'] == expected != found['deployed']['fgsm 2/255']


def test_what_may_be_left_out(data):
    pool = crew_of(data, 1)
    states = states_of(pool, data)
    attacks = stress_test(pool, dict(deployed=states['deployed']), 'attacks', images=20)
    assert set(attacks) == {'images', 'seed', 'diverged', 'clean', 'attacks'} and set(attacks['attacks']) == {'deployed'}
    corruptions = stress_test(pool, dict(deployed=states['deployed']), 'corruptions', images=20, corruptions=['contrast'], cache=False)
    assert set(corruptions['corruption_means']['deployed']) == {'mca', 'severity_3'}
    broken = {n: torch.full_like(t, float('inf')) if t.is_floating_point() else t for n, t in states['fp'].items()}
    half = stress_test(pool, dict(deployed=broken, fp=states['fp']), 'attacks', images=20)
    assert half['diverged'] == ['deployed'] and set(half['attacks']) == {'fp'}
    with pytest.raises(ValueError, match="must be 'attacks', 'corruptions' or 'all'"): stress_test(pool, states, 'none')
    pool.close()


def test_streams_of_corruptions_and_clients_do_not_meet():
    "A client's label noise and a corruption are different draws, as are two corruptions."
    firsts = [rng(0, 'noise', r, k).integers(2**62) for r in range(6) for k in [*range(100), *range(labelnoise.SHARED, labelnoise.SHARED + 20)]]
    assert len(set(firsts)) == len(firsts)
