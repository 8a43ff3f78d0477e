"Corruptions against SciPy, colorsys, and numbers of OpenCV and the public generator; whole sets and a cache."
import colorsys
import hashlib
import json

import numpy as np
import pytest
import torch
from samples import dataset, photographs
from scipy import ndimage

from fedmpqkd.core.streams import rng
from fedmpqkd.data import labelnoise
from fedmpqkd.evaluate import corruptions
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

torch.set_num_threads(1)
FREE = [n for n in CORRUPTIONS if n != 'frost']  # those that need no photographs
FIXED = {'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression',
         'gaussian_blur', 'saturate'}  # those that draw nothing


@pytest.fixture(scope='module')
def photos() -> torch.Tensor:
    return photographs()


@pytest.fixture(scope='module')
def data():
    return dataset()


# ---- every corruption

def test_the_table_is_that_of_cifar_c():
    "A hash of all constants, and four rows typed again: these are not ImageNet's."
    table = {name: [[float(v) for v in row] for row in rows] for name, rows in CORRUPTIONS.items()}
    text = json.dumps(table)
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
    assert torch.equal(a, other) == (name in FIXED)
    assert corrupt(x[:0], name, 3).shape == (0, 3, 32, 32)


# severities after which the squared error falls by more than 2 %; the published generator's falls there, too,
# on the same photographs
FALLS = dict(
    glass_blur=[2, 4],  # more blur, as many copies
    motion_blur=[3],  # (6, 2) and (8, 2) are the same half bell: the angles decide
    elastic_transform=[1, 2, 3, 4],  # the affine part shrinks from severity to severity
    saturate=[2])  # from grey to gaudy


@pytest.mark.parametrize('name', FREE)
def test_severity_is_monotone(photos, name):
    error = [((corrupt(photos, name, s).float() - photos.float()) ** 2).mean().item()
             for s in range(1, 6)]
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

    def spread(name: str, severity: int) -> float:
        return (corrupt(grey, name, severity).double() / 255).std().item()

    for s in range(1, 6):
        photons, sigma, share = (CORRUPTIONS[name][s - 1][0]
                                 for name in ('shot_noise', 'speckle_noise', 'impulse_noise'))
        assert spread('shot_noise', s) == pytest.approx((level / photons) ** 0.5, rel=0.02)
        assert spread('speckle_noise', s) == pytest.approx(level * sigma, rel=0.02)

        changed, n = corrupt(grey, 'impulse_noise', s), grey.numel()
        assert abs((changed != 100).sum().item() - share * n) < 5 * (share * n) ** 0.5
        assert abs((changed == 255).sum().item() - share * n / 2) < 5 * (share * n / 2) ** 0.5
        assert set(changed.unique().tolist()) == {0, 100, 255}


def test_bytes_are_truncated_and_clipped():
    x = torch.tensor([100, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    bright = corrupt(x, 'brightness', 1)  # 100 + 12.75 and 250 + 12.75
    assert bright[:, 0, 0, 0].tolist() == [112, 255]


def test_jpeg_files_shrink_with_quality(photos):
    images = photos[::6].permute(0, 2, 3, 1).numpy()
    sizes = [sum(len(corruptions.jpeg_file(image, quality).getvalue()) for image in images)
             for quality in (80, 65, 58, 50, 40)]
    assert sizes == sorted(set(sizes), reverse=True)


# ---- parts against other libraries

@pytest.mark.parametrize('sigma, truncate, border', [
    (0.05, 4, 'nearest'), (0.4, 4, 'nearest'), (1, 4, 'nearest'), (6.4, 3, 'reflect'), (1.92, 3, 'reflect')])
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
    x, rows, columns = g.random((2, 32, 32, 3)), *(g.uniform(-9, 41, (2, 32, 32)) for _ in range(2))
    ours = between(x, rows, columns, border)
    for i in range(2):
        for c in range(3):
            theirs = ndimage.map_coordinates(x[i, :, :, c], [rows[i], columns[i]], order=1, mode=border)
            assert np.allclose(ours[i, :, :, c], theirs, atol=1e-12)


def test_colorsys_agrees():
    g = np.random.default_rng(0)
    colours = np.concatenate([
        g.random((200, 3)), np.repeat(g.random((5, 1)), 3, 1), np.eye(3), np.zeros((1, 3))])
    k, s, v = hue_saturation_value(colours)
    for colour, ki, si, vi in zip(colours, k, s, v, strict=True):
        h, theirs, value = colorsys.rgb_to_hsv(*colour)
        assert (si[0], vi[0]) == pytest.approx((theirs, value), abs=1e-12)
        for new_s, new_v in ((0.3, 0.9), (1.0, 0.5)):
            assert new_v * (1 - new_s * ki) == pytest.approx(colorsys.hsv_to_rgb(h, new_s, new_v), abs=1e-9)


def test_distances_are_near_the_true_ones():
    "Borgefors' moves are within 2.1 % of Euclid."
    edge = np.random.default_rng(0).random((5, 32, 32)) < 0.004
    ours = distance_to(edge, 100)
    true = np.stack([ndimage.distance_transform_edt(~e) for e in edge])
    assert np.abs(ours - true).max() <= 0.021 * true.max() + 1e-9 and (ours[edge] == 0).all()
    assert (distance_to(np.zeros((1, 32, 32), bool)) == 20).all()


def test_histograms_by_hand():
    "A quarter each of 3, 3, 5, 9: 3 -> 0, 5 -> 127.5 (to the even 128), 9 -> 255; a constant image stays."
    x = np.full((2, 32, 32), 7, np.uint8)
    x[0] = np.repeat([3, 3, 5, 9], 256).reshape(32, 32)
    assert equalized(x)[0].ravel()[[0, 300, 600, 1000]].tolist() == [0, 0, 128, 255]
    assert (equalized(x)[1] == 7).all()


def test_disks():
    assert disk(0.3, 0.4)[7:10, 7:10].sum() == pytest.approx(1)
    assert disk(1.5, 0.1)[7:10, 7:10] == pytest.approx(np.full((3, 3), 1 / 9), abs=1e-12)
    for kernel in (disk(0.5, 0.6), disk(1, 0.2)):
        assert kernel.sum() == pytest.approx(1)
        assert np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])


def test_glass_copies_as_the_published_generator_does():
    "The same draws through the published exchange of two views, one image at a time."
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    ours = glass_blur(x, np.random.default_rng(5), 0.05, 1, 2)  # this sigma blurs nothing
    ours = ours.round().astype(np.uint8)
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
    sums = [theirs.sum(), ((row + 2 * column) * theirs).sum()]
    assert sums == pytest.approx([495.5882213940613, 23012.85951222506], rel=1e-12)


@pytest.mark.parametrize('name, total', [
    ('fog', 18307936), ('gaussian_noise', 18785084), ('shot_noise', 18766230), ('speckle_noise', 18686963)])
def test_the_public_generator_s_numbers(name, total):
    "A weighted sum of all bytes at severity 3, after np.random.seed(0); the sum is the public generator's."
    row, column = np.mgrid[:32, :32]
    image = np.stack([(7 * row + 3 * column + 40 * k) % 256 for k in range(3)], -1).astype(np.uint8)
    out = corruptions.MAKERS[name](image[None], np.random.RandomState(0), *CORRUPTIONS[name][2])[0]
    levels = out.clip(0, 255).astype(np.uint8).astype(int)
    assert ((row + 2 * column)[..., None] * levels).sum() == total


def test_light_leaves_what_it_should(photos):
    "Contrast keeps each channel's mean, fog the brightest value, desaturation the largest component."
    x = photos.double()
    flat, pale, foggy = (corrupt(photos, *case) for case in (('contrast', 5), ('saturate', 2), ('fog', 5)))
    assert (flat.double().mean((2, 3)) - x.mean((2, 3))).abs().max() < 1.01
    assert (pale.amax(1).double() - photos.amax(1).double()).abs().max() <= 1
    assert (foggy.flatten(1).amax(1) <= photos.flatten(1).amax(1)).all()


def test_a_streak_keeps_light_and_goes_one_way():
    dot = np.zeros((4, 32, 32, 1))
    dot[:, 16, 16] = 200
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

    def sums(x: np.ndarray) -> list[float]:
        return [float(x.sum()), float(((row + 2 * column) * x[0].astype(float)).sum())]

    edge, flat = edges(image), equalized(image)
    embossed = corruptions.stencil(flat, corruptions.EMBOSS).clip(0, 255)
    relief = np.rint(corruptions.stencil(embossed, np.full((3, 3), 1 / 9)))
    assert sums(edge) == [274, 13140]  # Canny(image, 50, 150)
    assert sums(distance_to(edge)) == pytest.approx([1047.17, 46305.7], rel=1e-5)  # distanceTransform, 5 x 5
    assert sums(flat) == [130621, 6256987]  # equalizeHist
    assert sums(relief) == [158479, 7304784]  # filter2D and blur, both to bytes

    defocus = [sums(corruptions.defocus_blur(image, rng(0, 'noise'), *constants))[1]
               for constants in ((.5, .6), (1, .2), (1.5, .1))]
    assert defocus == pytest.approx([6333258.3, 6335986.6, 6352065.4], rel=1e-5)  # filter2D, soft disk


def test_an_edge_between_equal_gradients_is_one_pixel_wide():
    "Both sides of a border have the same gradient; the rule (> before, >= behind) keeps the first one."
    square = np.zeros((1, 32, 32), np.uint8)
    square[0, 8:24, 10:20] = 200
    edge = edges(square)[0]
    assert np.flatnonzero(edge[16]).tolist() == [9, 19] and np.flatnonzero(edge[:, 15]).tolist() == [7, 23]


def test_water_needs_a_drop(photos):
    "Where the noise has no drop the image stays as it is."
    images = photos[:3].permute(0, 2, 3, 1).numpy()
    dry = corruptions.spatter(images, np.random.default_rng(0), 0, 0.001, 0.7, 0.7, 0.5, 0)
    assert np.array_equal(dry, images)


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
    assert {tuple(row.unique().tolist()) for row in added} == {(0,), (4,), (8,), (12,), (16,)}  # 0.4 of each
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert corrupt(grey, 'frost', 5).unique().item() in (75, 79, 84, 88, 93)


def test_the_contact_sheet_has_every_name(photos):
    import matplotlib
    matplotlib.use('Agg')
    figure = contact_sheet(photos[0], FREE[-5:])
    titles = [a.get_title() for a in figure.axes]
    assert titles == ['clean', *(n.replace('_', ' ') for n in FREE[-5:]), '', '', '', '']


# ---- whole test sets

def test_the_cache_is_used_and_checked(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    fresh = corrupted_images(data, 'fog', 2, 40, seed=1)
    path, = (tmp_path / 'fedmpqkd' / 'corrupted').iterdir()
    monkeypatch.setattr(corruptions, 'corrupt', lambda *a: pytest.fail('made again'))
    assert torch.equal(corrupted_images(data, 'fog', 2, 40, seed=1), fresh)

    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for content in (path.read_bytes()[:-50], b'', b'no tensor'):
        path.write_bytes(content)
        assert torch.equal(corrupted_images(data, 'fog', 2, 40, seed=1), fresh)
        assert 'corrupting again' in capsys.readouterr().out
    corrupted_images(data, 'fog', 2, 40, seed=1)
    assert capsys.readouterr().out == ''

    for severity, images, seed in ((2, 40, 2), (2, 39, 1), (3, 40, 1)):
        corrupted_images(data, 'fog', severity, images, seed=seed)
    corrupted_images(data.subset(test=79), 'fog', 2, 40, seed=1)
    assert len([p for p in path.parent.iterdir() if '.damaged' not in p.name]) == 5


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


def test_streams_of_corruptions_and_clients_do_not_meet():
    "A client's label noise and a corruption are different draws, as are two corruptions."
    numbers = [*range(100), *range(labelnoise.SHARED, labelnoise.SHARED + 20)]
    firsts = [rng(0, 'noise', r, k).integers(2**62) for r in range(6) for k in numbers]
    assert len(set(firsts)) == len(firsts)
