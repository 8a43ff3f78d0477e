"""Nothing that a client sends changes the server before all of it is checked, and no message ends a run."""
import copy
import dataclasses
import functools
import struct
import zlib

import numpy as np
import pytest
import tape
import torch
from samples import small
from tape import Tape

from fedmpqkd.core.streams import rng
from fedmpqkd.federation import exchange, moshpit, rounds
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.moshpit import Peer, hop_message, meet, peer_manifest
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import play
from fedmpqkd.federation.server import Average, Server, aggregate, receive
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.quantize import Planes, quantize
from fedmpqkd.wire.format import Affine, Qsgd, WireError, decode, encode, shape_of
from fedmpqkd.wire.messages import ASSIGNMENT
from fedmpqkd.wire.updates import Pq

torch.set_num_threads(1)
register_model('small', small)
K = 3
FIELDS = dict(model='small', clients=K, rounds=1, dirichlet=5.0, batch_size=32, eval_images=20, lr=0.01)
PQ = dict(pq_centroids=4, pq_dim=2)
METHODS = {
    'fedavg': {}, 'fedmpq': dict(lambda_b=300.0, bits=(2, 4, 8)), 'fedmpq-sr': dict(bn_pool='moments'),
    'fedpaq': {}, 'uveqfed': {}, 'fedpq': PQ, 'fedpq-client': PQ, 'fedpq-multi': PQ,
    'fedavg-fstq': dict(update_share=0.1), 'fedavg-powersgd': {}}


def digits(): return tape.digits(72, 30)


def sealed(data, manifest):
    "The same bytes with the checksum that belongs to them."
    body = bytes(data[:-4])
    return body + struct.pack('<I', zlib.crc32(body, manifest.hash & 0xFFFFFFFF))


def patched(data, at, layout, value, manifest):
    "Another number at a byte of a message, correctly sealed."
    changed = bytearray(data)
    struct.pack_into('<' + layout, changed, at, value)
    return sealed(changed, manifest)


HEADER = dict(
    method=(8, 'B'), round=(9, 'I'), client=(13, 'I'), samples=(17, 'I'), entries=(21, 'H'),
    payload=(23, 'Q'))


def with_header(data, manifest, **values):
    for name, value in values.items(): data = patched(data, *HEADER[name], value, manifest)
    return data


def with_entries(data, manifest, change):
    "The message with other entries; `change` gets a dict of them and returns one."
    message = decode(data, manifest)
    return encode(dataclasses.replace(message, entries=change(dict(message.entries))), manifest)


def value(entry):
    "Some values; those of a product code without its codebook are zeros."
    if isinstance(entry, Pq) and not entry.own: return torch.zeros(entry.shape)
    return entry if isinstance(entry, torch.Tensor) else entry.dequantize()


def other_kinds(entry, draw):
    "The same shape in every kind of code but its own."
    w = torch.from_numpy(np.asarray(draw.normal(size=shape_of(entry)))).float()
    one = torch.ones(w.shape, dtype=torch.int8)
    kinds = [w, w.half(), w.long(), quantize(w, int(draw.integers(1, 9))), Affine(one.byte(), 1.0, 0, 4),
             Qsgd(one.byte(), one, torch.ones(1), int(draw.integers(2, 10)))]
    return kinds[int(draw.integers(len(kinds)))]


# --- the server, one message at a time ----------------------------------------------------------------------

@functools.cache
def world(method):
    "A server in its second round, and the honest replies of its clients."
    run = open_run(make_config(method, **FIELDS | dict(rounds=2) | METHODS[method]), digits(), workers=1)
    rounds.run_round(run, 0)
    sizes = {k: len(p) for k, p in enumerate(run.partition.parts)}
    replies = {k: rounds.visit(run, k, 1, False)[1].message for k in range(K)}
    run.pool.close()
    return run.server, sizes, replies


def snapshot(server):
    a = server.average
    return copy.deepcopy((
        server.state, server.mean_bits, server.mean_loss, server.codebooks, server.reports, server.heard,
        server.counts, server.round, a.sums, a.weight, a.clients))


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def mutant(data, manifest, draw):
    "One of the ways in which a reply can be wrong, or merely different."
    kind = int(draw.integers(13))
    at = int(draw.integers(len(data)))
    names = list(decode(data, manifest).entries)
    one, two = (names[int(i)] for i in draw.choice(len(names), 2, replace=False))
    if kind == 0: return data[:at]
    if kind == 1: return data + bytes(draw.integers(0, 256, 1 + at % 9, dtype=np.uint8))
    if kind in (2, 3, 4, 5):  # a bit, a byte or a float; with a checksum that agrees, or not
        changed = bytearray(data)
        number = struct.pack('<f', draw.choice([np.nan, np.inf, 3e38, -3e38]))
        if kind == 5: changed[at:at + 4] = number[:len(data) - at]
        else: changed[at] = changed[at] ^ 1 << int(draw.integers(8)) if kind < 4 else int(draw.integers(256))
        return bytes(changed) if kind == 2 else sealed(changed, manifest)
    if kind == 6:
        name = list(HEADER)[int(draw.integers(6))]
        return with_header(data, manifest, **{name: int(draw.choice([0, 1, 2, 3, 9, 255]))})
    if kind == 7: return with_header(data, manifest, samples=int(draw.choice([0, 1, 10**9, 2**32 - 1])))

    def change(entries):
        if kind == 8: entries.pop(one)
        if kind == 9: entries[one] = other_kinds(entries[one], draw)
        if kind == 10: entries = {n: torch.full_like(value(e), 1) for n, e in entries.items()}
        if kind == 11: entries[ASSIGNMENT] = torch.full(manifest.shapes[manifest.index(ASSIGNMENT)], 8)
        if kind == 12 and shape_of(entries[one]) == shape_of(entries[two]):
            entries[one], entries[two] = entries[two], entries[one]
        return entries
    return with_entries(data, manifest, change)


def valid(server, data, honest, client, sizes):
    "A second opinion: what a reply must be, from the honest one of the same client."
    m, h = decode(data, server.manifest), decode(honest, server.manifest)
    assert (m.method, m.round, m.client, m.samples) == (0, 1, client, sizes[client])
    assert m.entries.keys() == h.entries.keys()
    for n, e in m.entries.items():
        was = h.entries[n]
        assert type(e) is type(was)
        if isinstance(e, torch.Tensor):
            assert e.dtype == was.dtype and torch.isfinite(e).all()
            assert e.is_floating_point() or (e.abs() <= 2**53).all()
            assert 'running_var' not in n or (e >= 0).all()
        elif isinstance(e, Planes): assert 0 <= e.delta and e.bits + e.delta == was.bits + was.delta
        else: assert (e.bits, e.delta) == (was.bits, 0)


@pytest.mark.parametrize('method', METHODS)
def test_a_mutated_message_changes_nothing_or_is_a_valid_one(method):
    server, sizes, replies = world(method)
    draw, refused, accepted = np.random.default_rng(list(method.encode())), 0, 0
    for client in range(1, K):
        server._start_round()
        server.expect(1, sizes)
        receive(server, replies[0], 0)  # so that there is an average to spoil
        before = snapshot(server)
        for _ in range(200):
            data = mutant(replies[client], server.manifest, draw)
            try: receive(server, data, client)
            except WireError:
                refused += 1
                assert same(snapshot(server), before)
                continue
            accepted += 1
            valid(server, data, replies[client], client, sizes)
            for t in server.average.mean().values(): assert torch.isfinite(t).all()
            server._start_round()
            server.expect(1, sizes)
            receive(server, replies[0], 0)
    assert refused > 200 and accepted  # honest numbers of another size are none of the border's business


@pytest.mark.parametrize('method', METHODS)
def test_honest_replies_pass(method):
    server, sizes, replies = world(method)
    server._start_round()
    server.expect(1, sizes)
    for k, data in replies.items(): receive(server, data, k)
    assert server.average.clients == K and server.average.weight == sum(sizes.values()) == 72


def changed(data, server, **entries): return with_entries(data, server.manifest, lambda old: old | entries)


def refused(server, data, sender, text):
    before = snapshot(server)
    with pytest.raises(WireError, match=text): receive(server, data, sender)
    assert same(snapshot(server), before)


def test_who_sends_and_what_it_claims():
    server, sizes, replies = world('fedavg')
    server._start_round()
    server.expect(1, {k: sizes[k] for k in (0, 1)})
    m = server.manifest
    refused(server, replies[2], 2, 'client 2 was not sampled')
    refused(server, with_header(replies[0], m, client=4_000_000_000), 4_000_000_000, 'not sampled')
    refused(server, replies[1], 0, 'a message of client 1 from client 0')  # under another's number
    refused(server, with_header(replies[1], m, samples=10**9), 1, 'samples 1000000000, registered is')
    refused(server, with_header(replies[1], m, round=0), 1, 'a message of round 0 in round 1')
    refused(server, with_header(replies[1], m, method=3), 1, 'method 3')
    refused(server, patched(replies[1], 4, 'H', 2, m), 1, 'version 2')
    receive(server, replies[1], 1)  # and the honest one is no duplicate
    refused(server, replies[1], 1, 'a second message of client 1')
    assert server.heard == {1} and server.average.weight == sizes[1]


ONE = torch.ones(8, 3, 3, 3, dtype=torch.int8)


@pytest.mark.parametrize('method,name,entry,text', [
    ('fedmpq', '0.weight', torch.zeros(8, 3, 3, 3), 'float32 where Planes of {bits} bits'),
    ('fedmpq', '0.weight', torch.zeros(8, 3, 3, 3).half(), 'float16 where Planes of {bits} bits'),
    ('fedmpq', '0.weight', quantize(torch.ones(8, 3, 3, 3), 8), 'Planes of 8 bits where Planes of {bits}'),
    ('fedavg', '0.weight', quantize(torch.ones(8, 3, 3, 3), 8), 'Planes of 8 bits where float32'),
    ('fedavg', '0.weight', torch.zeros(8, 3, 3, 3).long(), 'int64 where float32'),
    ('fedavg', '1.num_batches_tracked', torch.tensor(7.0), 'float32 where int64'),
    ('fedavg', '1.num_batches_tracked', torch.tensor(2**62), 'counter beyond'),
    ('fedavg', '1.running_var', -torch.ones(8), 'below zero'),
    ('fedpaq', '0.weight', Qsgd(ONE.byte(), ONE, torch.ones(1), 3), 'Qsgd of 3 bits where Qsgd of 5'),
    ('fedpaq', '0.weight', Qsgd(ONE.byte(), ONE, torch.ones(216), 5, 1), 'buckets of 1'),
    ('fedpaq', '0.weight', torch.zeros(8, 3, 3, 3), 'float32 where Qsgd'),
])
def test_the_form_that_is_due(method, name, entry, text):
    server, sizes, replies = world(method)
    server._start_round()
    server.expect(1, sizes)
    data = changed(replies[0], server, **{name: entry})
    refused(server, data, 0, f'{name}: .*{text.format(bits=server.assignment(2)[0])}')


def test_a_reply_lacks_nothing_and_brings_nothing():
    server, sizes, replies = world('fedmpq')
    server._start_round()
    server.expect(1, sizes)
    for name in decode(replies[0], server.manifest).entries:
        def without(entries, name=name): return {k: e for k, e in entries.items() if k != name}
        refused(server, with_entries(replies[0], server.manifest, without), 0, f'no {name}')
    more = changed(replies[0], server, **{ASSIGNMENT: torch.full((3,), 8)})
    refused(server, more, 0, 'assigned bits is not part')


def test_values_are_finite_after_dequantising():
    "Scales and norms are finite; weight and update add up to infinity, or a pooled moment is infinite."
    server, sizes, replies = world('fedpaq')
    state = {n: t.clone() for n, t in server.state.items()}
    state['0.weight'] = torch.full_like(state['0.weight'], 3e38)
    near = Server(server.config, server.layout, state)
    near.expect(1, sizes)
    huge = Qsgd(15 * ONE.byte(), ONE, torch.tensor([3e38]), 5)
    refused(near, changed(replies[0], near, **{'0.weight': huge}), 0, '0.weight: NaN or infinity')

    server, sizes, replies = world('fedmpq-sr')  # bn_pool='moments'
    server._start_round()
    server.expect(1, sizes)
    far = changed(replies[0], server, **{'1.running_mean': torch.full((8,), 1e20)})
    refused(server, far, 0, '1.running_var: NaN or infinity')


def test_counts_of_zero_and_an_empty_round():
    server, sizes, replies = world('fedavg')
    server._start_round()
    server.expect(1, dict.fromkeys(range(K), 0))
    for k, data in replies.items():
        refused(server, with_header(data, server.manifest, samples=0), k, 'not sampled')
    state = server.state
    assert aggregate(server) == 0 and server.state is state
    with pytest.raises(ValueError, match='weight=0'): Average().add({'w': torch.ones(1)}, 0)


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_counters_take_the_largest(order):
    server, sizes, replies = world('fedavg')
    fresh = Server(server.config, server.layout, server.state)
    fresh.expect(1, sizes)
    for k in order:
        counter = {'1.num_batches_tracked': torch.tensor([50, 90, 70][k])}
        receive(fresh, changed(replies[k], server, **counter), k)
    aggregate(fresh)
    assert fresh.state['1.num_batches_tracked'].item() == 90


def test_a_pooled_variance_is_never_below_zero():
    "Cancellation: equal means and variances of zero, with weights whose sum is rounded."
    values = torch.linspace(0.1, 900, 1000)
    average, state = Average('moments'), {'a.running_mean': values, 'a.running_var': torch.zeros(1000)}
    for w in (0.1, 0.2, 0.7, 3.3): average.add(state, w)
    first, second = (average.sums[n] / average.weight for n in state)
    raw = second - first**2
    assert (raw < 0).any() and (average.mean()['a.running_var'] >= 0).all()


# --- five protocols -----------------------------------------------------------------------------------------

SHARED = dict(public_images=12)
PROTOCOLS = {
    'star': ('fedmpq', {}), 'moshpit': ('fedmpq-moshpit', dict(grid_axes=1, moshpit_iterations=1)),
    'logits-only': ('fedmd', SHARED), 'logits+model': ('fedkd', SHARED), 'server-distill': ('feddf', SHARED)}


def retyped(entries, which):
    name = list(entries)[which]
    was = value(entries[name])
    return entries | {name: was.long() if was.is_floating_point() else was.float()}


def infinite(data, manifest):
    "The last number of the payload: an infinity, or a counter near its end."
    last = list(decode(data, manifest).entries.values())[-1]
    if last.dtype == torch.int64: return patched(data, len(data) - 12, 'q', 2**62, manifest)
    return patched(data, len(data) - 8, 'f', np.inf, manifest)


BAD = {
    'empty': lambda data, m: b'',
    'garbage': lambda data, m: bytes(range(200)),
    'no bytes': lambda data, m: 'a text',
    'another version': lambda data, m: patched(data, 4, 'H', 2, m),
    'cut short': lambda data, m: data[:-7],
    'a flipped bit': lambda data, m: data[:90] + bytes([data[90] ^ 4]) + data[91:],
    'a claim of 10^9': lambda data, m: with_header(data, m, samples=10**9),
    'no images': lambda data, m: with_header(data, m, samples=0),
    "another client's number": lambda data, m: with_header(data, m, client=0),
    'a number out of range': lambda data, m: with_header(data, m, client=4_000_000_000),
    'another round': lambda data, m: with_header(data, m, round=77),
    'nothing in it': lambda data, m: with_entries(data, m, lambda entries: {}),
    'the first retyped': lambda data, m: with_entries(data, m, lambda entries: retyped(entries, 0)),
    'the last retyped': lambda data, m: with_entries(data, m, lambda entries: retyped(entries, -1)),
    'infinite': infinite,
}


def tampered(monkeypatch, run, kind, change):
    "Client 1's reply of each round is replaced: change(round, bytes, manifest), None for none at all."
    def manifest_for(logits):
        return exchange.public_and_private(run)[0].manifest if logits else run.server.manifest

    if kind.startswith('logits'):
        real = exchange.visit

        def answered(run, public, index, mean, client, round, fails):
            answer = real(run, public, index, mean, client, round, fails)
            if client != 1 or not answer.up: return answer
            up, which = list(answer.up), round % len(answer.up)  # the model and the logits in turn
            up[which] = change(round, up[which], manifest_for(which == len(up) - 1))
            if up[which] is not None: return dataclasses.replace(answer, up=tuple(up))
            return dataclasses.replace(answer, up=(), log=answer.log | dict(failed='dropped'))
        monkeypatch.setattr(exchange, 'visit', answered)
        return

    where = moshpit if kind == 'moshpit' else rounds
    star = where.visit

    def replied(run, client, round, fails):
        down, result = star(run, client, round, fails)
        if client != 1 or result.message is None: return down, result
        message = change(round, result.message, manifest_for(False))
        log = result.log | (dict(failed='dropped') if message is None else {})
        return down, dataclasses.replace(result, message=message, log=log)
    monkeypatch.setattr(where, 'visit', replied)


def played(monkeypatch, kind, change, count):
    method, fields = PROTOCOLS[kind]
    config, curve = make_config(method, **FIELDS | fields | dict(rounds=count)), []
    run = open_run(config, digits(), workers=1)
    run.meter = Tape(manifest=run.meter.manifest)
    with monkeypatch.context() as patch:
        tampered(patch, run, kind, change)
        try: play(run, curve)
        finally: run.pool.close()
    return run, curve


@pytest.mark.parametrize('kind', PROTOCOLS)
def test_one_bad_message_is_a_line_in_the_log(monkeypatch, kind):
    "Client 1 sends another kind of rubbish in each round: bit for bit the run in which it never replied."
    bad = list(BAD.values())
    run, curve = played(monkeypatch, kind, lambda t, data, m: bad[t](data, m), len(bad))
    clean, without = played(monkeypatch, kind, lambda t, data, m: None, len(bad))
    for t, (name, line) in enumerate(zip(BAD, curve, strict=True)):
        assert list(line['failed']) == ['1'] and line['arrived'] == K - 1, (t, name, line['failed'])
        assert line['failed']['1'] != 'dropped' == without[t]['failed']['1']
    assert same(run.server.state, clean.server.state) and run.server.mean_bits == clean.server.mean_bits
    assert run.meter.tape == clean.meter.tape and run.meter.total == clean.meter.total
    lines, others = (tape.timeless(c) for c in (curve, without))
    for line in lines + others: line.pop('failed')
    assert lines == others


@pytest.mark.parametrize('kind', PROTOCOLS)
def test_huge_numbers_do_not_end_the_run(monkeypatch, kind):
    "Every number of client 1 is as large as fp32 has them: believed or not, three rounds are played."
    def huge(t, data, m):
        def change(entries):
            def blown(e):
                if isinstance(e, Planes): return dataclasses.replace(e, scale=3.4e38)
                return torch.full_like(e, 3.4e38) if e.is_floating_point() else e
            return {n: blown(e) for n, e in entries.items()}
        return with_entries(data, m, change) if t == 0 else data
    run, curve = played(monkeypatch, kind, huge, 3)
    assert len(curve) == 3
    for t in run.server.state.values(): assert torch.isfinite(t).all()


def test_a_message_without_logits_does_not_dilute_the_mean(monkeypatch):
    def mean(change):
        run, curve = played(monkeypatch, 'logits-only', change, 1)
        return run.memories.load(exchange.SERVER, 1)[exchange.LOGITS], curve[0]
    empty, line = mean(lambda t, data, m: with_entries(data, m, lambda entries: {}))
    absent, _ = mean(lambda t, data, m: None)
    assert torch.equal(empty, absent) and line['failed'] == {'1': 'no logits'}


def test_both_messages_of_an_exchange_or_none(monkeypatch):
    "The logits of client 1 are good and its model is not: neither counts."
    run, curve = played(monkeypatch, 'logits+model', lambda t, data, m: data[:50], 1)
    assert list(curve[0]['failed']) == ['1']
    assert {k for way, k, _ in run.meter.tape if way == 'up'} == {0, 2}
    clean, _ = played(monkeypatch, 'logits+model', lambda t, data, m: None, 1)
    a, b = (r.memories.load(exchange.SERVER, 1)[exchange.LOGITS] for r in (run, clean))
    assert torch.equal(a, b)


# --- between peers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [n for n in BAD if 'images' not in n])  # hops carry their weight as an entry
def test_a_bad_hop_leaves_its_sender_out(monkeypatch, name):
    "The two others average as if client 1 had been absent; it keeps its own model."
    def one(change):
        method, fields = PROTOCOLS['moshpit']
        run = open_run(make_config(method, **FIELDS | fields), digits(), workers=1)
        run.meter, curve, real = Tape(), [], hop_message
        with monkeypatch.context() as patch:
            def tampered_hop(run, peer, k, *at):
                data = real(run, peer, k, *at)
                return change(data, peer_manifest(run.server.layout)) if k == 1 else data
            patch.setattr(moshpit, 'hop_message', tampered_hop)
            try: play(run, curve)
            finally: run.pool.close()
        return run, curve[0], [moshpit.recall(run, k, 1).state for k in range(K)]

    def absent(data, m): raise WireError('absent')
    bad = BAD[name] if name != 'a claim of 10^9' else lambda data, m: with_entries(
        data, m, lambda entries: entries | {moshpit.WEIGHT: torch.tensor(1e9)})
    run, line, models = one(bad)
    clean, other, wanted = one(absent)
    assert list(line['failed']) == ['1'] and line['arrived'] == other['arrived'] == 2
    assert same(models, wanted) and run.meter.tape == clean.meter.tape
    assert same(models[0], models[2]) and not same(models[0], models[1])


def peers(count, **more):
    fields = FIELDS | dict(hop='q8', rounding_up='stochastic') | more
    run = open_run(make_config('fedmpq-moshpit', **fields), digits(), workers=1)
    run.pool.close()
    run.meter = Tape()
    bits, n = (8,) * len(run.server.layout.quantized), float(max(len(p) for p in run.partition.parts))
    entries = {n: t.clone() for n, t in run.server.state.items()} | {
        moshpit.WEIGHT: torch.tensor(n), moshpit.BIT_WEIGHT: torch.tensor(4 * n),
        moshpit.MEAN_BITS: torch.full((3,), 4.0), moshpit.MEAN_LOSS: torch.zeros(3)}
    return run, {k: Peer(dict(entries), bits) for k in range(count)}


def test_stochastic_hops_have_coins_of_their_own():
    "The same model from three peers, in two iterations and two rounds, and the reply: none rounded alike."
    run, members = peers(3)
    manifest, layer = peer_manifest(run.server.layout), '3.weight'

    def levels(data): return decode(data, manifest).entries[layer].levels.numpy().tobytes()
    hops = [levels(hop_message(run, members[k], k, t, i)) for k, t, i in np.ndindex(3, 2, 2)]
    assert len(set(hops)) == 12
    meet(run, members, 0, 0)
    heard = [levels(data) for _, _, data in run.meter.tape]
    ups, downs = set(heard[:2]), set(heard[2:])
    assert ups <= set(hops) and len(ups) == 2 and len(downs) == 1 and not downs & set(hops)
    keys = list(np.ndindex(3, 2, 3, 2))  # rounds, iterations, clients, ways; also a leader's own two
    coins = [torch.rand(1, generator=moshpit._coin(run.config, *key)).item() for key in keys]
    assert len(set(coins)) == len(coins)


@pytest.mark.parametrize('failure,met', [(0.0, True), (1.0, False)])
def test_a_lone_peer_has_met_only_when_it_lives(failure, met):
    "One of two seats is empty. Alive, the peer is its own group; failed in all iterations, it was nowhere."
    run, members = peers(1, clients=2, peer_failure=failure, grid_axes=1)
    assert moshpit.exchange(run, members, [0, 1], 0) == {}
    assert members[0].met is met and run.meter.tape == []


@pytest.mark.parametrize('seed', range(6))
def test_only_the_living_have_met(seed):
    "Three peers on nine seats, mostly alone: each has met if it lived in an iteration, whoever else did."
    run, members = peers(3, clients=9, participation=1.0, peer_failure=0.6, grid_axes=2, seed=seed)
    moshpit.exchange(run, members, range(9), 0)
    alive = [rng(seed, 'dropout', 0, 1 + t).random(9) >= 0.6 for t in range(run.config.moshpit_iterations)]
    assert [members[k].met for k in range(3)] == np.any(alive, 0)[:3].tolist()


def test_a_lone_peer_that_failed_did_not_arrive_and_keeps_its_bits():
    fields = dict(clients=2, dropout=0.5, grid_axes=1, moshpit_iterations=2)
    for failure, arrived in ((0.0, 1), (1.0, 0)):
        config, curve = make_config('fedmpq-moshpit', **FIELDS | fields, peer_failure=failure), []
        run = open_run(config, digits(), workers=1)
        try: play(run, curve)
        finally: run.pool.close()
        assert curve[0]['arrived'] == arrived and bool(run.server.mean_bits) is bool(arrived)
