"""Compressed updates: against hand-worked numbers, SciPy, scikit-learn and brute force."""

import struct
import zlib
from dataclasses import replace
from itertools import product
from math import ceil, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans

from fedmpqkd.core.config import RunConfig
from fedmpqkd.models.vision import build_model, layout
from fedmpqkd.quant.quantize import qsgd
from fedmpqkd.wire.format import (
    Affine,
    Manifest,
    Message,
    Qsgd,
    WireError,
    decode,
    encode,
    forecast,
    sizes,
)
from fedmpqkd.wire.updates import (
    Compressor,
    Dithered,
    Pq,
    UpdateCode,
    attach,
    compensate,
    dither_seeds,
    dithered,
    fitted,
    from_subvectors,
    kmeans,
    nearest,
    pq_encode,
    qsgd_entry,
    starting_codebooks,
    to_subvectors,
    update_codebooks,
)

torch.set_num_threads(1)
quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)
KINDS = [('qsgd', 'shared'), ('dither', 'shared'), ('pq', 'shared'), ('pq', 'multi'), ('pq', 'client')]


def generator(seed=0): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0): return torch.randn(shape, generator=generator(seed))


def through_the_wire(entry, shape):
    manifest = Manifest(('w',), (tuple(shape),))
    message = Message(0, 0, 0, 1, {'w': entry})
    data = encode(message, manifest)
    assert sizes(data) == forecast(message)
    got = decode(data, manifest)
    assert encode(got, manifest) == data
    return got.entries['w'], sizes(data)


def same_fields(a, b, skip=()):
    assert type(a) is type(b)
    for name in vars(a):
        if name in skip: continue
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            equal = torch.equal(x, y) and x.dtype == y.dtype
        else:
            equal = x == y
        assert equal, name


# QSGD -------------------------------------------------------------------------------------------------------


def test_variance_of_the_hand_worked_vector():
    "Levels 2.4 and 3.2 of 4, so the variance is (.4 * .6 + .2 * .8) / 16 = .025, below the bound of .25."
    v, g = torch.tensor([.6, -.8, 0, 0]), generator()
    found = [qsgd(v, 4, g) for _ in range(20_000)]
    levels, signs = (torch.stack([q[i] for q in found]).numpy().astype(float) for i in (0, 1))
    assert {float(q[2]) for q in found} == {1.0}
    draws = levels * signs / 4
    seen = [set(np.round(column, 6)) for column in draws.T]
    sizes_seen = [sorted(abs(x) for x in s) for s in seen]
    assert sizes_seen == [pytest.approx([.5, .75]), pytest.approx([.75, 1]), [0], [0]]
    up = [(np.abs(draws[:, 0]) > .6).mean(), (np.abs(draws[:, 1]) > .9).mean()]
    assert up == pytest.approx([.4, .2], abs=4 * .5 / 20_000**.5)
    exact = sum(p * q * ((.5 + .25 * a - .6) ** 2 + (.75 + .25 * b - .8) ** 2)
                for (a, p), (b, q) in product([(0, .6), (1, .4)], [(0, .8), (1, .2)]))
    assert exact == pytest.approx(.025, abs=1e-12)
    measured = ((draws - v.numpy()) ** 2).sum(1).mean()
    assert measured == pytest.approx(exact, abs=5e-4)
    assert measured < min(4 / 16, 2 / 4) == .25
    # no entry's deviation is above .125
    assert np.abs(draws.mean(0) - v.numpy()).max() < 4 * .125 / 20_000**.5


@pytest.mark.parametrize('norm', ['2', 'max'])
@pytest.mark.parametrize('bits', [2, 4])
def test_mean_and_variance_of_entries(norm, bits):
    v, g, s = normal(40, seed=bits), generator(1), 2 ** (bits - 1) - 1
    draws = torch.stack([qsgd_entry(v, bits, g, norm).dequantize() for _ in range(1500)]).double()
    size = float(v.abs().max() if norm == 'max' else v.norm())
    f = (s * v.double().abs() / size) % 1
    f[(s * v.double().abs() / size) > s - 1e-6] = 0  # the largest entry is a level
    expected = (size / s) ** 2 * f * (1 - f)
    assert ((draws.mean(0) - v).abs() <= 5 * (expected / 1500).sqrt() + 1e-6).all()
    assert float(draws.var(0).sum()) == pytest.approx(float(expected.sum()), rel=.08)
    if norm == '2': assert float(expected.sum()) <= min(40 / s**2, 40**.5 / s) * size**2


def test_more_levels_come_closer_until_nothing_is_lost():
    v = normal(500)
    errors = [float((qsgd_entry(v, bits, generator(), 'max').dequantize() - v).norm())
              for bits in range(2, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] > 100  # 1 level against 255
    exact = torch.tensor([.6, -.8, 0, 0])  # 9 and 12 of 15 levels, 153 and 204 of 255
    for bits in (5, 9):
        assert torch.allclose(qsgd_entry(exact, bits, generator()).dequantize(), exact, atol=1e-6)


@pytest.mark.parametrize('bits', range(2, 9))
def test_zero_updates_stay_zero(bits):
    zero, corners = torch.zeros(2, 3), torch.tensor([[1., 1], [-1, -1]]).half()
    entries = [qsgd_entry(zero, bits, generator(), norm) for norm in ('2', 'max')]
    for entry in [*entries, dithered(zero, bits, 5), pq_encode(zero, corners)]:
        assert torch.equal(entry.dequantize(), zero)
        assert torch.equal(fitted(entry, zero).dequantize(), zero)
        through_the_wire(entry, (2, 3))


# dither -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', [
    lambda: normal(40_000), lambda: torch.full((40_000,), .37), lambda: torch.linspace(-1, 1, 40_000) ** 3,
], ids=['normal', 'constant', 'cubic'])
def test_error_of_the_dither_is_uniform(make):
    "Variance D^2/12, and the Kolmogorov-Smirnov test sees no difference to a uniform variable."
    v = make()
    entry = dithered(v, 4, 11)
    error = ((entry.dequantize() - v) / entry.step).double().numpy()
    assert entry.step == pytest.approx(float(v.abs().max()) / 7, rel=1e-6)
    assert error.var() == pytest.approx(1 / 12, rel=.02)
    assert stats.kstest(error, 'uniform', (-.5, 1)).pvalue > .01


def test_error_of_the_dither_does_not_depend_on_the_value():
    v = normal(40_000)
    entry = dithered(v, 3, 12)
    error = (entry.dequantize() - v).numpy()
    for f in (np.asarray, np.abs, lambda x: x / entry.step % 1):
        assert stats.pearsonr(f(v.numpy()), error).pvalue > .01
        assert stats.pearsonr(f(v.numpy()), error**2).pvalue > .01
    nearest_error = ((v / entry.step).round() * entry.step - v).numpy()
    upper_half = v.numpy() / entry.step % 1 > .5
    assert stats.pearsonr(upper_half, nearest_error).statistic > .5  # without dither it does


@quick
@given(st.integers(0, 2**64 - 1), shapes, st.integers(2, 8), st.floats(1e-30, 1e30))
def test_no_entry_is_cut_off(seed, shape, bits, size):
    v = size * normal(*shape, seed=seed % 2**32)
    entry = dithered(v, bits, seed)
    assert entry.levels.dtype == torch.int8
    assert int(entry.levels.abs().max()) <= 2 ** (bits - 1) - 1
    assert float((entry.dequantize() - v).abs().max()) <= entry.step * .5001
    got, size_of = through_the_wire(entry, shape)
    same_fields(entry, got)
    assert torch.equal(got.dequantize(), entry.dequantize())
    assert size_of['payload'] == 4 + ceil(prod(shape) * bits / 8) + 2
    assert size_of['headers'] == 35 + 4 + 8


def test_seeds_are_numbers_of_their_own():
    drawn = [n for s, r, c in product(range(3), range(3), range(3)) for n in dither_seeds(s, r, c, 4)]
    assert len(set(drawn)) == len(drawn) == 108
    assert all(isinstance(n, int) and 0 <= n < 2**64 for n in drawn)
    assert dither_seeds(1, 2, 0, 4) == drawn[4 * 15 : 4 * 16]
    assert not torch.equal(dithered(normal(50), 4, 1).levels, dithered(normal(50), 4, 2).levels)


# k-means ----------------------------------------------------------------------------------------------------


def test_nearest_is_brute_force():
    x, c = normal(301, 3), normal(17, 3, seed=1)
    index, gap = nearest(x, c, chunk=50)
    table = ((x.double()[:, None] - c.double()[None]) ** 2).sum(2)
    assert torch.equal(index, table.argmin(1))
    assert torch.allclose(gap.double(), table.min(1).values, atol=1e-5)


@pytest.mark.parametrize('iterations', [1, 5, 20])
def test_lloyd_is_that_of_scikit_learn(iterations):
    x, start = normal(3000, 2), normal(16, 2, seed=1)
    ours = kmeans(x, 16, None, iterations, start)
    theirs = KMeans(16, init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm='lloyd')
    theirs.fit(x.numpy())
    assert theirs.n_iter_ == iterations  # it did not stop early, so both did the same number of steps
    assert np.abs(ours.numpy() - theirs.cluster_centers_).max() < 1e-4
    assert float(nearest(x, ours)[1].sum()) == pytest.approx(theirs.inertia_, rel=1e-4)


@quick
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_distortion_never_rises(seed, n, dim, m, far_start):
    x = normal(n, dim, seed=seed).round(decimals=1)  # with ties and duplicates
    start = torch.full((m, dim), 50.) if far_start else None  # all but one cluster starts empty
    history = [float(nearest(x, kmeans(x, m, generator(seed), i, start))[1].double().sum()) for i in range(6)]
    assert all(b <= a * (1 + 1e-5) + 1e-9 for a, b in zip(history, history[1:], strict=False))


@quick
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_enough_centroids_leave_no_error(seed, distinct, dim, more, iterations):
    points = normal(distinct, dim, seed=seed)
    x = points[torch.randint(distinct, (200,), generator=generator(seed))]
    centroids = kmeans(x, distinct + more, generator(seed), iterations)
    assert float(nearest(x, centroids)[1].max()) == 0
    assert {tuple(r) for r in x.tolist()} <= {tuple(r) for r in centroids.tolist()}


def test_lloyd_max_of_the_normal_distribution():
    "Max (1960): four levels at +-.4528 and +-1.5104, mean squared error .1175."
    x = normal(200_000, 1)
    centroids = kmeans(x, 4, generator(), 60)
    assert centroids[:, 0].sort().values.tolist() == pytest.approx([-1.5104, -.4528, .4528, 1.5104], abs=.02)
    assert float(nearest(x, centroids)[1].mean()) == pytest.approx(.1175, abs=.001)


def test_empty_clusters_move_to_the_farthest_points():
    x = torch.tensor([[0.], [1], [2], [10], [20]])
    moved = kmeans(x, 3, None, 1, torch.tensor([[1.], [100], [200]]))
    assert moved[:, 0].tolist() == pytest.approx([6.6, 20, 10])


def test_the_same_stream_gives_the_same_centroids():
    x = normal(500, 2)
    assert torch.equal(kmeans(x, 16, generator(3)), kmeans(x, 16, generator(3)))
    assert not torch.equal(kmeans(x, 16, generator(3)), kmeans(x, 16, generator(4)))
    state = torch.get_rng_state()
    kmeans(x, 16, generator(3))
    assert torch.equal(state, torch.get_rng_state())  # nothing was drawn from the global generator


def test_seeds_are_drawn_by_squared_distance():
    "From 0, the point at 3 must be drawn nine times as often as the point at 1."
    x, g = torch.tensor([[0.], [1], [3]]), generator()
    pairs = [tuple(sorted(kmeans(x, 2, g, 0)[:, 0].tolist())) for _ in range(2000)]
    share = {p: pairs.count(p) / 2000 for p in set(pairs)}
    # 0 first and then 1, or 1 first and then 0
    assert share[0, 1] == pytest.approx((1 / 10 + 1 / 5) / 3, abs=.04)
    assert share[0, 3] == pytest.approx((9 / 10 + 9 / 13) / 3, abs=.04)


@pytest.mark.parametrize('call, why', [
    (lambda: kmeans(normal(4, 2), 2), 'generator or a start'),
    (lambda: kmeans(normal(4, 2), 2, start=normal(3, 2)), 'start of shape'),
    (lambda: kmeans(torch.zeros(0, 2), 2, generator()), 'a point'),
])
def test_impossible_clusterings(call, why):
    with pytest.raises(ValueError, match=why): call()


# product quantisation ---------------------------------------------------------------------------------------


@quick
@given(shapes, st.integers(1, 9))
def test_subvectors_and_back(shape, dim):
    x = torch.arange(1., prod(shape) + 1).reshape(shape)
    rows = to_subvectors(x, dim)
    assert rows.shape == (ceil(prod(shape) / dim), dim)
    assert torch.equal(from_subvectors(rows, shape), x)
    assert int((rows == 0).sum()) == -prod(shape) % dim


def test_neighbours_are_input_channels():
    x = normal(3, 8, 2, 2)
    rows = to_subvectors(x, 4).reshape(3, 2, 2, 2, 4)  # output, row, column, half of the channels, channel
    for o, h, w, half in product(range(3), range(2), range(2), range(2)):
        assert torch.equal(rows[o, h, w, half], x[o, 4 * half : 4 * half + 4, h, w])


@quick
@given(st.integers(0, 2**31), shapes, st.integers(1, 5), st.integers(1, 6),
       st.sampled_from(['shared', 'multi', 'client']))
def test_pq_round_trip_and_length(seed, shape, dim, bits, kind):
    v, n = normal(*shape, seed=seed), ceil(prod(shape) / dim)
    codebook = normal(2**bits, dim, seed=seed + 1).half()
    entry = pq_encode(v, codebook, kind == 'client', 200 if kind == 'multi' else None)
    got, size = through_the_wire(entry, shape)
    codebook_bytes = (kind == 'client') * 2 * dim * 2**bits
    assert size['payload'] == 2 + 4 + ceil(n * bits / 8) + (kind == 'multi') + codebook_bytes
    assert size['headers'] == 35 + 4 + 2
    if kind == 'client': same_fields(entry, got)
    else:
        same_fields(entry, got, skip={'codebook'})
        with pytest.raises(WireError, match='attach'): got.dequantize()
        got = attach({'w': got}, [codebook] * (201 if kind == 'multi' else 1))['w']
    assert torch.equal(got.dequantize(), entry.dequantize())
    table = codebook.float() * entry.scale
    x = to_subvectors(v, dim)
    error = float((table[entry.levels.long()] - x).norm())
    assert error <= min(float((row - x).norm()) for row in table) + 1e-4


def test_pq_without_error():
    "Unit root mean square and few sub-vectors: the table holds them all."
    corners = torch.tensor([[1., -1], [-1, -1], [1, 1], [-1, 1]])
    v = corners[torch.randint(4, (60,), generator=generator())].reshape(10, 12)
    codebook = kmeans(to_subvectors(v, 2), 4, generator()).half()
    assert torch.equal(pq_encode(.5 * v, codebook).dequantize(), .5 * v)


def test_order_of_the_centroids_means_nothing():
    v, codebook = normal(20, 6), normal(16, 2, seed=1).half()
    one, other = pq_encode(v, codebook), pq_encode(v, codebook[torch.randperm(16, generator=generator())])
    assert not torch.equal(one.levels, other.levels)
    assert torch.equal(one.dequantize(), other.dequantize())


def test_size_of_the_update_does_not_matter():
    v, codebook = normal(20, 6), normal(16, 2, seed=1).half()
    for factor in (2.**-40, 1., 2.**40):
        scaled = pq_encode(factor * v, codebook).dequantize() / factor
        assert torch.allclose(scaled, pq_encode(v, codebook).dequantize(), rtol=1e-5)


def test_a_constant_update_is_not_lost():
    corners = torch.tensor([[1., 1], [-1, -1]]).half()
    decoded = pq_encode(torch.full((4, 4), -3.), corners).dequantize()
    assert torch.allclose(decoded, torch.tensor(-3.))


# what is refused --------------------------------------------------------------------------------------------


def tampered(entry, shape, change):
    "The message with changed body bytes and a valid checksum."
    manifest = Manifest(('w',), (shape,))
    data = bytearray(encode(Message(0, 0, 0, 1, {'w': entry}), manifest)[:-4])
    change(data)
    return bytes(data) + struct.pack('<I', zlib.crc32(bytes(data), manifest.hash & 0xFFFFFFFF)), manifest


BODY = 31 + 6  # offset of the first tensor's body; its precision is two bytes before


@pytest.mark.parametrize('offset, value, why', [
    (BODY, 0, 'sub-vector length is 0'), (BODY, 1, 'truncated'), (BODY + 1, 3, 'log2 of the centroids is 3'),
    (BODY + 1, 2 | 128, 'truncated'), (BODY + 1, 2 | 192, 'what is there'), (BODY + 1, 2 | 64, 'truncated'),
    (BODY - 2, 0, 'bits is 0'), (BODY - 2, 17, 'bits is 17'), (BODY + 6, 0xFF, 'padding'),
])
def test_damaged_product_entries(offset, value, why):
    "Three sub-vectors of two bits: six bits and two of padding."
    entry = pq_encode(normal(6), normal(4, 2, seed=1).half())
    data, manifest = tampered(entry, (6,), lambda d: d.__setitem__(offset, value))
    with pytest.raises(WireError, match=why): decode(data, manifest)


@pytest.mark.parametrize('offset, value, why', [
    (BODY + 12, 0xE0, 'largest level is 4'), (BODY - 2, 1, 'bits is 1'),
    (BODY - 2, 9, 'bits is 9'), (BODY - 2, 8, 'truncated'),
])
def test_damaged_dithered_entries(offset, value, why):
    data, manifest = tampered(dithered(normal(2), 3, 5), (2,), lambda d: d.__setitem__(offset, value))
    with pytest.raises(WireError, match=why): decode(data, manifest)


def test_a_scale_that_is_not_a_number():
    for entry, offset in ((pq_encode(normal(6), normal(4, 2).half()), BODY + 2),
                          (dithered(normal(6), 3, 5), BODY)):
        def spoil(d, at=offset): d[at : at + 4] = struct.pack('<f', np.nan)
        data, manifest = tampered(entry, (6,), spoil)
        with pytest.raises(WireError, match='NaN'): decode(data, manifest)


@pytest.mark.parametrize('change, why', [
    (dict(levels=torch.tensor([0, 4, 0], dtype=torch.int32)), 'largest centroid is 4'),
    (dict(bits=17), 'bits is 17'),
    (dict(levels=torch.tensor([0, -1, 0], dtype=torch.int32)), 'smallest centroid is -1'),
    (dict(dim=0), 'sub-vector length is 0'),
    (dict(levels=torch.zeros(2, dtype=torch.int32)), 'number of sub-vectors is 2'),
    (dict(own=True, codebook=None), 'missing'),
    (dict(own=True, codebook=torch.zeros(4, 2)), 'fp16'), (dict(own=True, book=1), 'what is there'),
    (dict(book=256), 'codebook is 256'),
    (dict(own=True, codebook=torch.full((4, 2), torch.inf).half()), 'infinity'),
    (dict(scale=float('nan')), 'NaN')])
def test_impossible_product_entries(change, why):
    entry = pq_encode(normal(6), normal(4, 2, seed=1).half())
    for name, value in change.items(): setattr(entry, name, value)
    with pytest.raises(WireError, match=why):
        encode(Message(0, 0, 0, 1, {'w': entry}), Manifest(('w',), ((6,),)))


@pytest.mark.parametrize('change, why', [
    (dict(levels=torch.tensor([4, 0], dtype=torch.int8)), 'largest level is 4'),
    (dict(levels=torch.tensor([-128, 0], dtype=torch.int8)), 'largest level is 128'),
    (dict(step=float('inf')), 'infinity'), (dict(seed=2**64), 'seed is'), (dict(bits=9), 'bits is 9'),
])
def test_impossible_dithered_entries(change, why):
    entry = dithered(normal(2), 3, 5)
    for name, value in change.items(): setattr(entry, name, value)
    with pytest.raises(WireError, match=why):
        encode(Message(0, 0, 0, 1, {'w': entry}), Manifest(('w',), ((2,),)))


def test_foreign_entries_and_codebooks():
    code, books = UpdateCode('pq', centroids=4), [normal(4, 2).half()]
    compressor, layers = Compressor(code), {'w': normal(8, 8)}
    entries, _ = compressor.compress(layers, generator(), codebooks=books)
    compressor.expand(entries, books)
    foreign = [dithered(layers['w'], 4, 1), Affine(torch.zeros(8, 8, dtype=torch.uint8), 1., 0, 8)]
    own, numbered = pq_encode(layers['w'], books[0], own=True), pq_encode(layers['w'], books[0], book=0)
    for entry in foreign:
        with pytest.raises(WireError, match=f'w: {type(entry).__name__} in a round of pq'):
            compressor.expand({'w': entry}, books)
    for entry, kind in ((own, 'client'), (numbered, 'multi')):
        with pytest.raises(WireError, match=f"kind '{kind}' in a round of 'shared'"):
            compressor.expand({'w': entry}, books)
    with pytest.raises(WireError, match='1 product-quantised layers for 2 codebooks'):
        compressor.expand(entries, 2 * books)
    with pytest.raises(WireError, match='belongs'): compressor.expand(entries, [normal(8, 2).half()])
    with pytest.raises(WireError, match='belongs'): compressor.expand(entries, [normal(4, 2)])
    fifth = pq_encode(layers['w'], books[0], book=4)
    with pytest.raises(WireError, match='codebook 4 of 4'):
        Compressor(UpdateCode('pq', centroids=4, codebook='multi')).expand({'w': fifth}, 4 * books)
    with pytest.raises(ValueError, match="0 codebooks where codebook='shared' needs 1"):
        compressor.compress(layers, generator())
    with pytest.raises(WireError, match='Qsgd in a round of dither'):
        Compressor(UpdateCode('dither')).expand({'w': qsgd_entry(layers['w'], 4)})


@pytest.mark.parametrize('kind, codebook', KINDS)
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_divergence_is_an_error_of_the_wire(kind, codebook, bad):
    "The caller catches one class of error for a client that cannot send."
    updates = {'a': normal(8, 8), 'b': normal(8, 8)}
    served = kind == 'pq' and codebook != 'client'
    books = starting_codebooks(updates, 4, 2, generator(), codebook) if served else []
    updates['b'][3, 3] = bad
    for feedback in (False, True):
        code = UpdateCode(kind, centroids=4, codebook=codebook, error_feedback=feedback)
        with pytest.raises(WireError, match='b: NaN or infinity'):
            Compressor(code).compress(updates, generator(), [1, 2], books)


@pytest.mark.parametrize('fields, why', [
    (dict(kind='model'), "kind='model'"), (dict(kind='qsgd', bits=1), 'bits=1'),
    (dict(kind='dither', bits=9), 'bits=9'),
    (dict(kind='qsgd', norm='1'), "norm='1'"), (dict(kind='pq', dim=0), 'dim=0'),
    (dict(kind='pq', dim=256), 'dim=256'),
    (dict(kind='pq', centroids=1), 'centroids=1'), (dict(kind='pq', centroids=100), 'power of two'),
    (dict(kind='pq', centroids=2**17), 'power of two'), (dict(kind='pq', codebook='own'), "codebook='own'")])
def test_impossible_codes(fields, why):
    with pytest.raises(ValueError, match=why): UpdateCode(**fields)


def test_code_of_a_configuration():
    config = RunConfig(uplink='pq', update_bits=4, update_norm='max', pq_dim=8, pq_centroids=16,
                       codebook='multi', error_feedback=True)
    assert UpdateCode.of(config) == UpdateCode('pq', 4, 'max', 8, 16, 'multi', True)


# codebooks --------------------------------------------------------------------------------------------------


def test_codebooks_of_large_layers_only():
    layers = {'a': normal(8, 8), 'small': normal(7, 4),  # 28 weights, fewer than 4 * m * d' = 32
              'b': 100 * normal(8, 4, seed=1), 'c': normal(64, seed=2)}
    shared, multi = (starting_codebooks(layers, 4, 2, generator(), kind) for kind in ('shared', 'multi'))
    assert [tuple(c.shape) for c in shared] == [tuple(c.shape) for c in multi] == [(4, 2)] * 3
    assert all(c.dtype == torch.float16 and float(c.abs().max()) < 4 for c in shared + multi)  # of unit size
    entries, _ = Compressor(UpdateCode('pq', centroids=4)).compress(layers, generator(), codebooks=shared)
    assert [type(e) for e in entries.values()] == [Pq, Qsgd, Pq, Pq]
    assert entries['small'].bits == 8
    error = float((entries['small'].dequantize() - layers['small']).abs().max())
    assert error <= float(layers['small'].abs().max()) / 127 * 1.0001
    assert torch.equal(entries['c'].codebook, shared[2])


def test_four_groups_of_layers():
    "Each layer has signs of its own kind; each group's codebook is exact for its layers; clients find it."
    kinds = torch.tensor([[[1., 1], [1, 1]], [[1, -1], [1, -1]], [[-1, 1], [-1, 1]], [[-1, -1], [-1, -1]]])
    layers = {f'{i}{j}': kinds[i].repeat(16, 1) * (1 + j) for i in range(4) for j in range(2)}
    books = starting_codebooks(layers, 4, 2, generator(), 'multi')
    assert len(books) == 4
    compressor = Compressor(UpdateCode('pq', centroids=4, codebook='multi'))
    entries, _ = compressor.compress(layers, generator(), codebooks=books)
    assert [e.book for e in entries.values()] == [0, 0, 1, 1, 2, 2, 3, 3]
    for name, update in compressor.expand(entries, books).items(): assert torch.equal(update, layers[name])


@pytest.mark.parametrize('kind', ['shared', 'multi'])
def test_codebooks_follow_the_updates(kind):
    first, later = ({f'{i}': normal(40, 8, seed=10 * r + i) ** power for i in range(5)}
                    for r, power in ((0, 1), (1, 3)))
    compressor = Compressor(UpdateCode('pq', centroids=8, codebook=kind))

    def error(books):
        dense = compressor.expand(compressor.compress(later, generator(), codebooks=books)[0], books)
        return sum(float((dense[n] - later[n]).square().sum()) for n in later)

    books = starting_codebooks(first, 8, 2, generator(), kind)
    after = update_codebooks(books, later, codebook=kind)
    assert error(after) < .9 * error(books)
    unmoved = update_codebooks(books, {n: 0 * t for n, t in later.items()}, codebook=kind)
    assert all(torch.equal(a, b) for a, b in zip(unmoved, books, strict=True))
    assert update_codebooks([], later, codebook=kind) == []


# error feedback ---------------------------------------------------------------------------------------------


def crude(kind, codebook, feedback):
    code = UpdateCode(kind, bits=2, norm='2', centroids=4, codebook=codebook, error_feedback=feedback)
    return Compressor(code)


@pytest.mark.parametrize('kind, codebook', KINDS)
def test_feedback_telescopes_and_stays_bounded(kind, codebook):
    "Two bits and the Euclidean norm amplify a wide update; fitted, the residual stays of the update's size."
    compressor, g, residual = crude(kind, codebook, True), generator(), {}
    layers = {'a': normal(32, 32), 'b': normal(16, 16, seed=1)}
    books = starting_codebooks(layers, 4, 2, g, codebook) if kind == 'pq' and codebook != 'client' else None
    sent = {n: torch.zeros_like(t, dtype=torch.double) for n, t in layers.items()}
    true = {n: torch.zeros_like(t, dtype=torch.double) for n, t in layers.items()}
    for t in range(150):
        updates = {n: u + .3 * normal(*u.shape, seed=100 + t) for n, u in layers.items()}
        entries, residual = compressor.compress(updates, g, dither_seeds(0, t, 0, 2), books, residual)
        for n, d in compressor.expand(entries, books).items():
            sent[n] += d
            true[n] += updates[n]
    for n in layers:
        assert torch.allclose(sent[n] + residual[n], true[n], atol=1e-2)
        assert float((sent[n] - true[n]).norm() / true[n].norm()) < .25
        assert float(residual[n].norm()) < 40 * float(layers[n].norm())


def test_without_feedback_nothing_is_remembered():
    layers = {'a': normal(8, 8)}
    entries, left = crude('qsgd', 'shared', False).compress(layers, generator(), residual={'a': normal(8, 8)})
    assert left == {}
    same_fields(entries['a'], qsgd_entry(layers['a'], 2, generator()))


@pytest.mark.parametrize('kind, feedback', [('qsgd', True), ('dither', True), ('pq', True), ('pq', False)])
def test_quadratic_with_clients_that_disagree(kind, feedback):
    "Two clients pull to points of their own: with feedback the iterates' mean is the optimum between them."
    centres = [normal(64), normal(64, seed=1) + 2]
    optimum, x, mean = sum(centres) / 2, torch.zeros(64), torch.zeros(64)
    compressor, g, residuals = crude(kind, 'shared', feedback), generator(), [{}, {}]
    books = [kmeans(normal(400, 2, seed=3), 4, generator()).half()] if kind == 'pq' else None
    for t in range(240):
        step = torch.zeros(64)
        for k in range(2):
            update = {'x': .05 * (centres[k] - x)}
            seeds = dither_seeds(0, t, k, 1)
            entries, residuals[k] = compressor.compress(update, g, seeds, books, residuals[k])
            step += compressor.expand(entries, books)['x'] / 2
        x = x + step
        if t >= 120: mean += x / 120
    wrong = float((mean - optimum).norm() / optimum.norm())
    assert wrong < .05 if feedback else wrong > .1  # what a biased quantiser does alone


@quick
@given(st.integers(0, 2**31), shapes, st.integers(2, 8), st.sampled_from(['2', 'max']))
def test_a_fitted_entry_is_no_worse_than_none(seed, shape, bits, norm):
    "Good entries stay as they are, bad ones get the factor that NumPy's least squares finds."
    v = normal(*shape, seed=seed)
    codebook = normal(4, 2, seed=seed + 1).half()
    entries = qsgd_entry(v, bits, generator(seed), norm), dithered(v, bits, seed), pq_encode(v, codebook)
    for entry in entries:
        q, got = entry.dequantize(), fitted(entry, v).dequantize()
        if float((q - v).norm()) <= float(v.norm()): assert torch.equal(got, q)
        else:
            factor = float(np.linalg.lstsq(q.reshape(-1, 1).numpy(), v.reshape(-1).numpy())[0][0])
            assert torch.allclose(got, max(0, factor) * q, rtol=1e-4, atol=1e-5 * float(q.abs().max()))
        assert float((got - v).norm()) <= float(v.norm()) * (1 + 1e-5)


def test_residuals_of_another_shape():
    with pytest.raises(ValueError, match='residual of shape'): compensate(torch.zeros(2, 3), torch.zeros(3))


# all kinds together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, codebook', KINDS)
@pytest.mark.parametrize('feedback', [False, True])
def test_both_sides_agree_to_the_bit(kind, codebook, feedback):
    layers = {'a': normal(8, 16, 3, 3), 'b': normal(5, 3, seed=1), 'c': normal(6, 32, seed=2)}
    code = UpdateCode(kind, norm='max', centroids=16, codebook=codebook, error_feedback=feedback)
    compressor, served = Compressor(code), kind == 'pq' and codebook != 'client'
    books = starting_codebooks(layers, 16, 2, generator(), codebook) if served else None
    entries, residual = compressor.compress(layers, generator(), [1, 2, 2**64 - 1], books)
    manifest = Manifest.of(layers)
    message = Message(0, 0, 0, 1, entries)
    data = encode(message, manifest)
    dense = compressor.expand(decode(data, manifest).entries, books)
    assert sizes(data) == forecast(message)
    assert list(dense) == list(layers)
    for name, update in layers.items():
        assert dense[name].dtype == torch.float32 and dense[name].shape == update.shape
        assert torch.equal(dense[name], entries[name].dequantize())
        if feedback: assert torch.equal(residual[name], update - dense[name])
        assert float((dense[name] - update).norm()) < .8 * float(update.norm())
    again, _ = compressor.compress(layers, generator(), [1, 2, 2**64 - 1], books)
    assert encode(Message(0, 0, 0, 1, again), manifest) == data


def test_bytes_of_resnet20():
    "The published table, from the weights of each layer listed here."
    layers = [432] + [2304] * 6 + [4608] + [9216] * 5 + [18432] + [36864] * 5 + [640]
    model = build_model('resnet20', 10)
    shape, state = layout(model), model.state_dict()
    weights = {n: state[n] for n in shape.quantized}
    assert sorted(layers) == sorted(w.numel() for w in weights.values())
    rest = 4 * (512 + 2048) + 784 * 4 * 4 + 21 * 8 + 10 * 4  # shortcuts, batch norm, counters, bias
    product_layers = [d for d in layers if d >= 4 * 256 * 2]
    assert len(product_layers) == 18
    by_hand = {
        'qsgd5': sum(ceil(5 * d / 8) + 4 + 2 for d in layers) + rest,
        'qsgd4': sum(ceil(4 * d / 8) + 4 + 2 for d in layers) + rest,
        'pq': sum(d // 2 + 4 + 2 for d in product_layers) + 432 + 640 + 2 * (4 + 2) + rest}
    assert by_hand == dict(qsgd5=190_822, qsgd4=157_280, pq=157_816)

    def message(code, count=0):
        books = [normal(256, 2, seed=i).half() for i in range(count)]
        return state | Compressor(code).compress(weights, generator(), range(20), books)[0]

    def payload(entries):
        message = Message(0, 0, 0, 1, entries)
        data = encode(message, Manifest.of(state))
        assert sizes(data) == forecast(message)
        return sizes(data)['payload'], sizes(data)['headers']

    headers = 35 + 108 * 6  # 108 plain tensors
    assert payload(message(UpdateCode('qsgd'))) == (190_822, headers + 20 * (4 + 4))
    assert payload(message(UpdateCode('dither'))) == (190_822, headers + 20 * (4 + 8))
    assert payload(message(UpdateCode('qsgd', bits=4))) == (157_280, headers + 20 * (4 + 4))
    shared = message(UpdateCode('pq'), 18)
    assert payload(shared) == (157_816, headers + 18 * (4 + 2) + 2 * (4 + 4))
    own = {n: replace(e, own=True) if isinstance(e, Pq) else e for n, e in shared.items()}  # codebooks too
    assert payload(own) == (157_816 + 18_432, headers + 18 * (4 + 2) + 2 * (4 + 4))
    multi = message(UpdateCode('pq', codebook='multi'), 4)
    assert payload(multi) == (157_816 + 18, headers + 18 * (4 + 2) + 2 * (4 + 4))
    large = [tuple(w.shape) for w in weights.values() if w.numel() in product_layers]
    assert all(isinstance(e, Pq) == (e.shape in large) for e in (shared[n] for n in weights))


def test_a_dither_needs_its_seed():
    v = normal(100)
    entry = dithered(v, 4, 1)
    wrong = Dithered(entry.levels, entry.step, 2, 4)
    assert float((wrong.dequantize() - v).norm()) > 1.3 * float((entry.dequantize() - v).norm())
    with pytest.raises(ValueError, match='1 seeds for the dithers of 2 layers'):
        Compressor(UpdateCode('dither')).compress({'a': v, 'b': v}, generator(), [1])
