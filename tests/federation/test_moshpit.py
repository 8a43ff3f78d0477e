"""Averaging in groups: a plain loop, its invariants, the published table, a federation against its star."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import tape
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape, timeless

from fedmpqkd.core.config import RunConfig, run_id
from fedmpqkd.core.journal import Journal
from fedmpqkd.core.streams import rng, torch_rng
from fedmpqkd.federation import moshpit
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.moshpit import (
    BIT_WEIGHT,
    MEAN_BITS,
    MEAN_LOSS,
    WEIGHT,
    butterfly_bytes,
    grid,
    group_mean,
    groups_of,
    iterations_to,
    moshpit_step,
    peer_manifest,
    recall,
    side_of,
    variance_path,
)
from fedmpqkd.federation.rounds import open_run, participants
from fedmpqkd.federation.run import PROTOCOLS, play, run
from fedmpqkd.federation.server import deployed
from fedmpqkd.quant.bits import prune_grow
from fedmpqkd.quant.quantize import quantize
from fedmpqkd.wire.format import Message, decode

torch.set_num_threads(1)


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


# --- the simulator ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dims', [(7,), (5, 5), (4, 4, 4), (3, 3, 3, 3), (2, 2, 2, 2, 2), (2, 3, 5), (1, 6)])
def test_a_full_grid_is_exact_after_one_iteration_an_axis(dims):
    "And every single iteration counts: one fewer is not enough, whichever is left out."
    n = math.prod(dims)
    idx, x = grid(n, dims, seeded(1)), torch.randn(n, 3, dtype=torch.float64, generator=seeded(2))
    images = torch.randint(1, 500, (n,), generator=seeded(3)).double()
    for order in itertools.islice(itertools.permutations(range(len(dims))), 6):
        values, weights = x, images
        for axis in order: values, weights = moshpit_step(values, weights, idx, axis)
        assert torch.allclose(values, ((x * images[:, None]).sum(0) / images.sum()).expand(n, 3), atol=1e-13)
        assert torch.allclose(weights, images.mean().expand(n), rtol=1e-13)
        values = x
        for axis in order[:-1]: values, _ = moshpit_step(values, None, idx, axis)
        assert dims[order[-1]] == 1 or values.var(0).min() > 1e-6


def by_loop(values, weights, idx, axis, alive):
    "The same iteration with dictionaries and NumPy."
    rows = [tuple(np.delete(row, axis)) for row in idx.numpy()]
    x, w = values.numpy().copy(), weights.numpy().copy()
    for row in set(rows):
        inside = [i for i, r in enumerate(rows) if r == row and alive[i]]
        if len(inside) < 2: continue
        mean = np.average(values.numpy()[inside], axis=0, weights=weights.numpy()[inside])
        for i in inside: x[i], w[i] = mean, np.mean(weights.numpy()[inside])
    return torch.from_numpy(x), torch.from_numpy(w)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_an_iteration(dims, filled, failure, seed):
    """Equal to a plain loop; sums of weights and of weighted values stay, the spread about the weighted mean
    does not grow; a peer that failed or was alone keeps its bits, and NaN in a failed peer harms nobody."""
    n, g = max(1, int(filled * math.prod(dims))), seeded(seed)
    idx = grid(n, dims, g)
    assert len({tuple(row) for row in idx.tolist()}) == n
    assert (idx >= 0).all()
    assert (idx < torch.tensor(dims)).all()
    values, weights = (
        torch.randn(n, 2, dtype=torch.float64, generator=g),
        1 + 99 * torch.rand(n, dtype=torch.float64, generator=g),
    )
    total, mass = (values * weights[:, None]).sum(0), weights.sum()

    def spread(x, w): return (w[:, None] * (x - total / mass) ** 2).sum(0)

    for t in range(4):
        alive = torch.rand(n, generator=g) >= failure
        after, carried = moshpit_step(values, weights, idx, t % len(dims), alive)
        for got, wanted in zip(
            (after, carried), by_loop(values, weights, idx, t % len(dims), alive), strict=True
        ):
            assert torch.allclose(got, wanted, atol=1e-12)
        group = groups_of(idx, t % len(dims))
        alone = torch.tensor([int((alive & (group == k)).sum()) < 2 for k in group])
        assert torch.equal(after[~alive | alone], values[~alive | alone])
        assert torch.allclose((after * carried[:, None]).sum(0), total, atol=1e-9)
        assert torch.isclose(carried.sum(), mass)
        assert (spread(after, carried) <= spread(values, weights) + 1e-9).all()
        poisoned = torch.where(alive[:, None], values, math.nan)
        assert torch.equal(moshpit_step(poisoned, weights, idx, t % len(dims), alive)[0][alive], after[alive])
        values, weights = after, carried


def test_the_plain_mean_of_peers_is_invariant_when_all_groups_are_full():
    idx, values = grid(36, (6, 6), seeded(0)), torch.randn(36, 1, dtype=torch.float64, generator=seeded(1))
    for t in range(3):
        after, _ = moshpit_step(values, None, idx, t % 2)
        assert torch.isclose(after.mean(), values.mean(), atol=1e-14)
        values = after


def test_holes_and_failures_end_at_the_weighted_mean():
    idx, images = grid(20, (5, 6), seeded(0)), torch.arange(1, 21).double()
    x = torch.randn(20, 1, dtype=torch.float64, generator=seeded(1))
    values, weights, g = x, images, seeded(2)
    for t in range(150):
        values, weights = moshpit_step(values, weights, idx, t % 2, torch.rand(20, generator=g) >= 0.1)
    assert torch.allclose(values, ((x[:, 0] * images).sum() / images.sum()).expand(20, 1), atol=1e-9)


def test_peers_that_have_met_do_not_meet_again_for_d_iterations():
    idx = grid(27, (3, 3, 3), seeded(0))
    met = [
        {(i, j) for i in range(27) for j in range(i) if groups_of(idx, axis)[i] == groups_of(idx, axis)[j]}
        for axis in range(3)
    ]
    assert [len(m) for m in met] == [27] * 3 and len(set.union(*met)) == 81


# published (10 restarts) and simulated (200 restarts) iterations to a variance below 1e-9, and below 1e-4
TABLE = [
    (1024, 0, 2.0, 2.00, 2.00),
    (512, 0, 8.2, 8.34, 3.60),
    (768, 0, 6.0, 6.01, 3.00),
    (900, 0, 5.0, 5.01, 2.85),
    (512, 0.001, None, 8.28, 3.69),
    (900, 0.01, 6.5, 6.25, 3.04),
    (512, 0.005, None, 8.70, 3.85),
    (1024, 0.005, None, 5.17, 2.92),
]


@pytest.mark.parametrize('n,failure,published,fine,coarse', TABLE)
def test_the_table(n, failure, published, fine, coarse):
    g = seeded(10 * n + int(1000 * failure))
    paths = [variance_path(n, (32, 32), 14, g, failure) for _ in range(40)]
    means = [np.mean([iterations_to(v, p) for p in paths]) for v in (1e-9, 1e-4)]
    assert means == pytest.approx([fine, coarse], abs=.3)
    if published: assert abs(means[0] - published) < .45  # ten restarts have a standard error of their own
    if failure == 0: assert all((p[1:] <= p[:-1] * (1 + 1e-12) + 1e-25).all() for p in paths)


def test_random_groups_contract_by_their_formula():
    n, r, g = 60, 6, seeded(0)
    factors = []
    for _ in range(1000):
        x = torch.randn(n, 1, dtype=torch.float64, generator=g)
        factors.append(
            float(
                moshpit_step(x, None, grid(n, (r, n // r), g), 1)[0].var(unbiased=False)
                / x.var(unbiased=False)
            )
        )
    error = np.std(factors) / len(factors) ** .5
    assert abs(np.mean(factors) - (r - 1) / (n - 1)) < 4 * error and error < .003


def test_sides_of_grids():
    for axes in range(1, 6):
        for n in (*range(1, 300), 1000, 1001, 4096, 4097, 10**6):
            m = side_of(n, axes)
            assert m**axes >= n and (m == 1 or (m - 1)**axes < n)


def test_the_price_of_a_group():
    "Parts that cross in a butterfly, counted one by one."
    for m in (1, 2, 5):
        sent = [0] * m
        for owner in range(m):
            for other in set(range(m)) - {owner}:
                sent[other] += 12
                sent[owner] += 12  # a part to its owner, the sum back
        assert sent == [butterfly_bytes(12 * m, m)] * m


@pytest.mark.parametrize(
    'call,text',
    [
        (lambda: grid(10, (3, 3), seeded(0)), 'do not fit'),
        (lambda: grid(0, (3,), seeded(0)), 'at least 1'),
        (lambda: grid(1, (), seeded(0)), 'at least 1'),
        (lambda: grid(1, (2, 0), seeded(0)), 'at least 1'),
        (lambda: groups_of(torch.zeros(1, 2, dtype=torch.int64), -1), 'axis=-1'),
        (
            lambda: moshpit_step(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64), 0),
            'positive',
        ),
        (lambda: variance_path(4, (2, 2), 1, seeded(0), 1.5), 'failure=1.5'),
        (lambda: iterations_to(1e-9, torch.ones(3)), 'after 2 iterations'),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text): call()


# --- the federation -----------------------------------------------------------------------------------------

FIELDS = dict(model='resnet8', clients=4, rounds=1, dirichlet=1.0, batch_size=64, eval_images=20)
SQUARE = dict(aggregate='moshpit', grid_axes=2, moshpit_iterations=2)
LINE = dict(aggregate='moshpit', grid_axes=1, moshpit_iterations=1)


def digits(train: int = 80, test: int = 30): return tape.digits(train, test)


class Played(tape.Played):
    def messages(self, way: str, manifest=None) -> list[tuple[int, Message]]:
        """A star's messages in the order of the clients, whichever finished first;
        those of peers, which have a manifest of their own, in the order in which they crossed."""
        heard = self.run.meter.tape if manifest else sorted(self.run.meter.tape, key=lambda line: line[1])
        return [(k, decode(d, manifest or self.run.server.manifest)) for w, k, d in heard if w == way]

    def own(self, client: int, round: int = 1): return recall(self.run, client, round)


@pytest.fixture(scope='module')
def played(tmp_path_factory):
    "Runs by method and fields, each computed once."
    @functools.cache
    def get(method: str, workers: int = 1, **fields) -> Played:
        whole = open_run(
            make_config(method, **FIELDS | fields),
            digits(),
            workers=workers,
            folder=tmp_path_factory.mktemp('clients'),
        )
        whole.meter, curve = Tape(manifest=whole.meter.manifest), []
        try: play(whole, curve)
        finally: whole.pool.close()
        return Played(whole, curve)
    return get


def equal(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize('method,more', [('fedavg', {}), ('fedmpq', dict(bits=(2, 2, 4, 8), lambda_b=300.0)),
                                         ('fedmpq-kd-delivered', dict(alpha=.5, kd_warmup_rounds=0))])
def test_one_axis_for_all_is_the_star(played, method, more):
    "Two rounds, bit for bit: the same mean, the same bits, so the same second local round, at distance 0."
    star, line = played(method, rounds=2, **more), played(method, **LINE, rounds=2, **more)
    for k in range(4):
        own = line.own(k, 2)
        assert equal(own.state, star.run.server.state)
        assert (own.mean_bits, own.mean_loss) == (star.run.server.mean_bits, star.run.server.mean_loss)
    assert equal(line.run.server.state, star.run.server.state)
    assert line.run.server.mean_bits == star.run.server.mean_bits
    for key in ('loss', 'arrived', 'steps', 'bits', 'accuracy_fp'):
        assert [a[key] for a in star.curve] == [b[key] for b in line.curve], key
    assert [b['consensus'] for b in line.curve] == [0, 0]
    assert line.curve[1]['accuracy'] == pytest.approx(star.curve[1]['accuracy'])


def test_one_axis_for_those_who_are_there(played):
    "A straggler of the star is an absent peer, and variances are pooled alike."
    more = dict(bn_pool='moments', dropout=.25)
    star, line = played('fedavg', **more), played('fedavg', **LINE, **more)
    failing, = participants(line.run.config, [1] * 4, 0)[1]
    assert [equal(line.own(k).state, star.run.server.state) for k in range(4)] == [
        k != failing for k in range(4)
    ]
    assert line.curve[0]['arrived'] == 3 and line.curve[0]['loss'] == star.curve[0]['loss']


def test_heterogeneous_budgets_are_spent_locally(played):
    "Each client's next assignment is pruning-growing from what the peers agreed on, under its own budget."
    whole = played('fedmpq', **SQUARE, bits=(2, 2, 4, 8), lambda_b=300.0)
    sizes = whole.run.server.layout.sizes()
    reports = [m for _, m in played('fedmpq', bits=(2, 2, 4, 8), lambda_b=300.0).messages('up')]
    share = np.array([m.samples * b for m, b in zip(reports, (2, 2, 4, 8), strict=True)], float)

    def column(f): return [[f(m.entries[n]) for n in whole.run.server.layout.quantized] for m in reports]

    bits = [round(v) for v in np.average(column(lambda p: p.bits), axis=0, weights=share)]
    loss = [round(v + 1) for v in np.average(column(lambda p: p.delta), axis=0, weights=share)]
    assert max(loss) > 1
    for k, budget in enumerate((2, 2, 4, 8)):
        own = whole.own(k)
        assert (own.mean_bits, own.mean_loss) == (bits, loss)
        wanted = prune_grow(bits, [d * v for d, v in zip(sizes, loss, strict=True)], sizes, budget)
        assert [
            len(deployed(own, budget)[n].unique()) <= 2 ** (b + 1) - 1
            for n, b in zip(own.layout.quantized, wanted, strict=True)
        ]
        assert own.assignment(budget) == wanted
    assert whole.run.server.mean_bits == bits


@pytest.mark.parametrize('failure', [0.0, .4])
def test_a_round_is_what_the_simulator_says(played, failure):
    "The models that the star's clients send in round 0 are what the peers train; the rest is `moshpit_step`."
    fields = dict(clients=6, peer_failure=failure, moshpit_iterations=3)
    whole, star = played('fedavg', **SQUARE | fields), played('fedavg', clients=6)
    trained = [m for _, m in star.messages('up')]
    idx = grid(6, (3, 3), torch_rng(0, 'participation', 0, 1))
    alive = [torch.from_numpy(rng(0, 'dropout', 0, 1 + t).random(6) >= failure) for t in range(3)]
    assert failure == 0 or 3 < sum(int(a.sum()) for a in alive) < 18
    for name in ('fc.weight', 'bn1.running_var', 'conv1.weight'):
        values = torch.stack([m.entries[name].double().reshape(-1) for m in trained])
        weights = torch.tensor([float(m.samples) for m in trained])
        for t in range(3): values, weights = moshpit_step(values, weights, idx, t % 2, alive[t])
        for k in range(6):
            own = whole.own(k).state[name].double().reshape(-1)
            assert torch.allclose(own, values[k], atol=1e-6), (name, k)

    names = (*star.run.server.layout.quantized, *star.run.server.layout.others)
    states = [torch.cat([whole.own(k).state[n].reshape(-1).double() for n in names]) for k in range(6)]
    mean = torch.stack(states).T @ torch.tensor([float(m.samples) for m in trained], dtype=torch.float64) / 80
    apart = np.mean([float((s - mean).norm() / mean.norm()) for s in states])
    line = whole.curve[0]
    assert line['consensus'] == pytest.approx(apart, rel=1e-4) and apart > 1e-3
    assert line['peer_accuracy_worst'] <= line['peer_accuracy_mean'] == line['accuracy']
    assert line['arrived'] == int(torch.stack(alive).any(0).sum()) and line['samples'] == 30


def test_bytes_of_a_full_square(played):
    "Two groups of two, two iterations: four messages each way, the star's size plus ten bytes of weight."
    star, whole = played('fedavg'), played('fedavg', **SQUARE)
    manifest = peer_manifest(whole.run.server.layout)
    for way in ('up', 'down'):
        assert whole.curve[0][f'bytes_{way}'] == star.curve[0][f'bytes_{way}'] + 4 * 10 == sum(
            len(d) for w, _, d in whole.run.meter.tape if w == way)
        assert len(whole.messages(way, manifest)) == 4
    size = len(whole.run.meter.tape[0][2])
    assert whole.curve[0]['bytes_up'] + whole.curve[0]['bytes_down'] == 2 * 4 * butterfly_bytes(size, 2)
    assert whole.run.meter.manifest == len(star.run.server.manifest.encode()) + len(manifest.encode())
    planes = played('fedmpq', **SQUARE)
    first = [m for _, m in planes.messages('up', manifest)][:2]
    layers = len(planes.run.server.layout.quantized)
    for m in first:
        assert m.entries[MEAN_BITS].tolist() == [4.0] * layers
        assert m.entries[MEAN_LOSS].tolist() == [0.0] * layers
        assert float(m.entries[BIT_WEIGHT]) == 4 * float(m.entries[WEIGHT])
        assert m.entries['conv1.weight'].bits == 4
    sent = [len(d) for w, _, d in planes.run.meter.tape if w == 'up']
    assert sent[0] == sent[1] < sent[2] / 4 and sent[2] == sent[3]  # planes first, then their mean


def test_hops_of_eight_bits_are_near_full_precision(played):
    "Three roundings to nearest, of which each is off by at most half a level of the layer's largest weight."
    exact, rounded = played('fedavg', **SQUARE), played('fedavg', **SQUARE, hop='q8')
    shape = exact.run.server.layout
    largest = {
        n: max(float(m.entries[n].abs().max()) for _, m in played('fedavg').messages('up'))
        for n in shape.quantized
    }
    for n, t in rounded.own(0).state.items():
        off = float((t.double() - exact.own(0).state[n].double()).abs().max())
        if n in shape.quantized: assert 0 < off <= 3 * 1.01 * largest[n] / (2 * 255), n
        else: assert off < 1e-6, n
    assert rounded.curve[0]['bytes_up'] < .35 * exact.curve[0]['bytes_up']


def test_stochastic_hops_are_reproducible_and_different(played):
    fields = SQUARE | dict(hop='same-bits')
    one, two = (played('fedmpq', w, **fields, rounding_up='stochastic') for w in (1, 3))
    assert one.timeless == two.timeless
    assert equal(one.run.server.state, two.run.server.state)
    assert one.run.meter.tape == two.run.meter.tape
    assert not equal(one.run.server.state, played('fedmpq', **fields).run.server.state)


def test_hops_of_the_students_own_bits(played):
    "Each peer ends on a grid of its own precision, which is the mean rounded to it."
    budgets = (2, 2, 4, 8)
    whole = played('fedmpq', **LINE, hop='same-bits', bits=budgets)
    exact = played('fedmpq', **LINE, bits=budgets).own(0).state
    for k, budget in enumerate(budgets):
        for n in whole.run.server.layout.quantized:
            assert torch.equal(whole.own(k).state[n], quantize(exact[n], budget).dequantize()), (k, n)
    assert whole.curve[0]['consensus'] > .01
    assert (
        len({len(d) for w, _, d in whole.run.meter.tape if w == 'down'}) == 3
    )  # one message a precision; client 0 leads


def test_failed_peers_keep_their_value_and_their_bits(played):
    "Nobody is ever alive: every client goes on from what it has trained, with the assignment that it had."
    fields = dict(lambda_b=3000.0, rounds=2)
    alone, star = played('fedmpq', **SQUARE, **fields, peer_failure=1.0), played('fedmpq', lambda_b=3000.0)
    assert [line['arrived'] for line in alone.curve] == [0, 0] and alone.run.meter.total == dict(up=0, down=0)
    for k, m in star.messages('up'):
        own = alone.own(k)
        assert equal(own.state, {n: m.dense()[n] for n in own.state}) and own.mean_bits == [] == own.mean_loss
        assert set(own.assignment(4)) == {4} and min(m.entries[n].bits for n in own.layout.quantized) < 4
    assert alone.run.server.mean_bits == [] and min(line['consensus'] for line in alone.curve) > 1e-3


@pytest.mark.parametrize('stage', ['before_download', 'after_download', 'after_train'])
def test_stragglers_keep_what_they_have(played, stage):
    whole = played('fedavg', **LINE, dropout=.25, dropout_stage=stage)
    (_, failing), sizes = participants(whole.run.config, [1] * 4, 0), played('fedavg').messages('up')
    k, = failing
    trained, start = sizes[k][1].dense(), moshpit.own_models(whole.run).load(4, 0)['state']
    assert equal(whole.own(k).state, {n: (trained if stage == 'after_train' else start)[n] for n in start})
    others = [j for j in range(4) if j != k]
    assert all(equal(whole.own(j).state, whole.own(others[0]).state) for j in others)
    assert not equal(whole.own(k).state, whole.own(others[0]).state)
    assert whole.curve[0]['arrived'] == 3 and {c for _, c, _ in whole.run.meter.tape} == set(others[1:])


def test_grids_are_drawn_anew_in_each_round(played, monkeypatch):
    drawn, real = [], moshpit.grid
    monkeypatch.setattr(moshpit, 'grid', lambda *args: drawn.append(real(*args)) or drawn[-1])
    for _ in range(2):
        whole = open_run(
            make_config(
                'fedavg', **FIELDS | SQUARE | dict(clients=6, rounds=3, participation=0.83, dropout=1.0)
            ),
            digits(),
            workers=1,
        )
        for round in range(3): moshpit.moshpit_round(whole, round)
        whole.pool.close()
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert [tuple(d.shape) for d in drawn] == [(5, 2)] * 6 and all((d < 3).all() for d in drawn)


def test_divergence_is_a_failure_of_clients(played):
    "They cannot write a message, keep their start, and the run goes on."
    whole = played('fedavg', **SQUARE, rounds=2, lr=1e6, batch_size=4, local_epochs=2)
    for line in whole.curve:
        assert line['arrived'] == 4 - len(line['failed']) < 4 and np.isfinite(line['accuracy'])
    assert all('NaN or infinity' in why for why in whole.curve[0]['failed'].values())


# --- interruptions ------------------------------------------------------------------------------------------

LONG = (
    FIELDS
    | SQUARE
    | dict(
        rounds=2,
        participation=0.75,
        peer_failure=0.3,
        kd_warmup_rounds=0,
        alpha=0.5,
        hop='q8',
        rounding_up='stochastic',
    )
)


class Crash(Exception):
    "The power fails."


@pytest.fixture(scope='module')
def undisturbed(): return run(make_config('fedmpq-kd-ema', **LONG), digits(), workers=1)


@pytest.mark.parametrize('moment', ['observe', 'evaluate_peers', 'exchange'])
def test_an_interrupted_run_ends_like_one_that_was_not(undisturbed, tmp_path, monkeypatch, moment):
    "Stopped in its second round: before the clients' models are kept, after that, or before the checkpoint."
    config = make_config('fedmpq-kd-ema', **LONG)
    journal, calls, real = (
        Journal(tmp_path, 'g', 'n', run_id(config, digits().fingerprint)),
        [],
        getattr(moshpit, moment),
    )

    def stop(*args):
        calls.append(1)
        if len(calls) == 2: raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        if moment == 'evaluate_peers':
            patch.setitem(PROTOCOLS, 'moshpit', dataclasses.replace(PROTOCOLS['moshpit'], evaluate=stop))
        else: patch.setattr(moshpit, moment, stop)
        with pytest.raises(Crash): run(config, digits(), journal, workers=1)
    kept = [p.name for p in journal.folder.rglob('models/*_1.pt')]
    assert len(journal.load()[1]) == 1 and bool(kept) == (moment != 'exchange')
    again = run(config, digits(), journal, workers=1)
    assert timeless(again['curve']) == timeless(undisturbed['curve'])
    for key in ('accuracy_recalibrated', 'bytes_up', 'manifest_bytes', 'ece', 'dispersion'):
        assert again['summary'][key] == undisturbed['summary'][key]
    assert not journal.folder.exists()


# --- what is refused ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    'fields,text',
    [
        (dict(alpha=0.5, teacher='fp', update='latent'), 'delivered or ema'),
        (dict(hop='same-bits'), 'quantised'),
        (dict(uplink='qsgd'), 'exchanges models'),
        (dict(exchange='logits-only', public_images=10), 'exchanges models'),
        (dict(grid_axes=0), 'grid_axes'),
        (dict(peer_failure=1.5), 'peer_failure'),
    ],
)
def test_what_cannot_be(fields, text):
    with pytest.raises(ValueError, match=text): RunConfig(**SQUARE | fields)


def test_a_silent_teacher_is_no_objection():
    assert not RunConfig(**SQUARE, alpha=0, teacher='fp').distils


def test_a_groups_mean_by_hand():
    "Counters take the maximum, variances are pooled on request, weights become their mean."
    def message(mean, count, n):
        return Message(
            0,
            0,
            0,
            0,
            {
                'bn.running_mean': torch.tensor([mean]),
                'bn.running_var': torch.tensor([1.0]),
                'bn.num_batches_tracked': torch.tensor(count),
                WEIGHT: torch.tensor(n),
            },
        )

    for pool, variance in (('mean', 1.0), ('moments', np.var([0, 2] * 3 + [4, 6]))):
        got = group_mean([message(1.0, 3, 3.0), message(5.0, 8, 1.0)], pool)
        assert {n: t.item() for n, t in got.items()} == {
            'bn.running_mean': 2.0,
            'bn.running_var': pytest.approx(variance),
            'bn.num_batches_tracked': 8,
            WEIGHT: 2.0,
        }
