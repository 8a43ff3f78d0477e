"""Public logits: codec, bytes by hand, labels that nobody reads, resumed and parallel runs, distillation.

Runs are three clients with 50 digits and a public set of 25 (`played`)."""

import contextlib
import dataclasses
import functools
import json
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import tape
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Tape, timeless

from fedmpqkd.core.config import RunConfig, run_id
from fedmpqkd.core.journal import Journal
from fedmpqkd.data.partition import Partition, split
from fedmpqkd.federation import exchange as exchange_module
from fedmpqkd.federation import rounds
from fedmpqkd.federation import run as run_module
from fedmpqkd.federation.exchange import (
    LOGITS,
    SERVER,
    Answer,
    Ensemble,
    Public,
    TopK,
    answers,
    digest_step,
    distil,
    exchange_round,
    forecast_logits,
    logits_entry,
    mean_answer,
    own_model,
    public_and_private,
    public_batches,
    public_indices,
    remove_public,
    take,
    top_k,
)
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import play, run
from fedmpqkd.federation.server import Average
from fedmpqkd.learn.client import ClientRound, prepare
from fedmpqkd.learn.distill import kd_loss
from fedmpqkd.learn.replica import Clock, Replica
from fedmpqkd.learn.vision import VisionTask, image_task, local_batches
from fedmpqkd.wire.format import FIXED, Manifest, Message, WireError, decode, encode, forecast, sizes

torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, derandomize=True)
N, P, C, K = 75, 25, 10, 3  # training images, public ones, classes, clients
FIELDS = dict(
    model='resnet8', clients=K, rounds=2, dirichlet=1.0, batch_size=16, eval_images=0, public_images=P
)
KINDS = ('logits-only', 'logits+model', 'server-distill')
ROW = 6  # bytes before a tensor's body: number, codec, dimensions, bits, delta


def digits(): return tape.digits(N, 40)


@dataclasses.dataclass
class Played(tape.Played):
    ends: list  # length of the tape after each round

    def messages(self, direction: str, round: int, client: int | None = None) -> list[bytes]:
        "In the order of the clients, whichever finished first."
        begin = self.ends[round - 1] if round else 0
        heard = sorted(self.run.meter.tape[begin:self.ends[round]], key=lambda line: line[1])
        return [d for way, k, d in heard if way == direction and client in (None, k)]

    def logits(self, direction: str, round: int) -> list[Message]:
        "Decoded messages that hold logits."
        found = []
        for data in self.messages(direction, round):
            try: found.append(decode(data, manifest_of_logits()))
            except WireError: pass
        return found


def manifest_of_logits(): return Manifest((LOGITS,), ((P, C),))


def public_of(config: RunConfig) -> Public:
    return Public(torch.from_numpy(public_indices(config, N)), digits())


def start(exchange: str, folder: Path, workers: int = 1, **fields) -> Played:
    whole = open_run(
        RunConfig(**FIELDS | dict(exchange=exchange) | fields), digits(), workers=workers, folder=folder
    )
    whole.meter = Tape(manifest=whole.meter.manifest)
    result = Played(whole, [], [])
    try: play(whole, result.curve, lambda curve: result.ends.append(len(whole.meter.tape)))
    finally: whole.pool.close()
    return result


@pytest.fixture(scope='module')
def played(tmp_path_factory):
    "Runs by protocol and fields, each computed once."
    @functools.cache
    def get(exchange: str, workers: int = 1, **fields) -> Played:
        return start(exchange, tmp_path_factory.mktemp('clients'), workers, **fields)
    return get


# --- the codec ----------------------------------------------------------------------------------------------

def reseal(data, manifest):
    "Give tampered bytes a valid checksum."
    return data[:-4] + struct.pack('<I', zlib.crc32(data[:-4], manifest.hash & 0xFFFFFFFF))


@quick
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_top_k_round_trip_and_length(seed, rows, classes, wide, data):
    classes = classes + 65_530 * wide  # from 65,531 to 65,542: two bytes a class number, then four
    k = data.draw(st.integers(1, min(classes, 12)))
    logits = torch.from_numpy(
        np.asarray(np.random.default_rng(seed).normal(size=(*rows, classes)), np.float32)
    )
    entry = top_k(logits, k)
    manifest, message = Manifest(('z',), ((*rows, classes),)), Message(0, 1, 2, 3, dict(z=entry))
    sent = encode(message, manifest)
    got = decode(sent, manifest)
    back = got.entries['z']
    assert isinstance(back, TopK) and back.shape == (*rows, classes)
    assert torch.equal(back.values, entry.values) and torch.equal(back.indices, entry.indices)
    assert encode(got, manifest) == sent
    payload = prod(rows) * k * (2 + (2 if classes <= 65_535 else 4))
    assert (
        sizes(sent)
        == forecast(message)
        == dict(total=FIXED + ROW + 2 + payload, payload=payload, headers=FIXED + ROW + 2)
    )


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 12), st.floats(-1000, 1000), st.data())
def test_what_top_k_keeps(seed, rows, classes, shift, data):
    "The largest in half precision, the rest at their mean, so rows sum to zero; a constant changes nothing."
    k = data.draw(st.integers(1, classes))
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, classes), scale=3)).float()
    dense, centred = top_k(logits, k).dequantize(), logits - logits.mean(1, keepdim=True)
    order = centred.argsort(1, descending=True)
    kept, rest = order[:, :k], order[:, k:]
    assert torch.allclose(dense.gather(1, kept), centred.gather(1, kept), rtol=2**-10, atol=1e-6)
    assert dense.sum(1).abs().max() < 1e-3 or k == classes
    if k < classes:
        mean = centred.gather(1, rest).mean(1, keepdim=True).expand(-1, classes - k)
        assert torch.allclose(dense.gather(1, rest), mean, atol=.05 * k / (classes - k) + 1e-3)
    if k >= classes - 1: assert torch.allclose(dense, centred, atol=.1)
    assert torch.equal(dense.gather(1, kept[:, :1])[:, 0], dense.amax(1))  # half precision may tie them
    assert torch.allclose(top_k(logits + shift, k).dequantize().softmax(1), dense.softmax(1), atol=.02)


def test_top_k_refuses_what_it_cannot_write():
    manifest = Manifest(('z',), ((2, 4),))

    def send(values, indices, classes=4):
        return encode(Message(0, 0, 0, 0, dict(z=TopK(values, indices, classes))), manifest)

    one, good = torch.ones(2, 2, dtype=torch.float16), torch.tensor([[0, 3], [1, 2]])
    assert len(send(one, good)) == FIXED + ROW + 2 + 2 * 2 * 4
    for bad in ([[0, 0], [1, 2]], [[3, 0], [1, 2]], [[0, 4], [1, 2]], [[-1, 0], [1, 2]]):
        with pytest.raises(WireError, match='z: class numbers of a row must ascend within 0 to 3'):
            send(one, torch.tensor(bad))
    with pytest.raises(WireError, match='wrong shape'): send(one, good, 5)
    with pytest.raises(WireError, match='NaN or infinity'): send(one * float('nan'), good)
    with pytest.raises(WireError, match='NaN or infinity'):
        send(top_k(torch.tensor([[1e6, 0, 0, 0]] * 2), 2).values, good)
    with pytest.raises(WireError, match='as many'): send(one[:, :1], good)
    with pytest.raises(WireError, match='torch.float16'): send(one.float(), good)
    with pytest.raises(WireError, match='k is 0'): send(one[:, :0], good[:, :0])
    with pytest.raises(ValueError, match='logits_topk=5'): top_k(torch.zeros(2, 4), 5)


def test_top_k_refuses_what_it_should_not_believe():
    manifest = Manifest(('z',), ((2, 4),))
    data = encode(Message(0, 0, 0, 0, dict(z=top_k(torch.arange(8.).reshape(2, 4), 2))), manifest)
    body = len(data) - 4 - 18
    assert data[body : body + 2] == b'\2\0'
    assert decode(data, manifest).entries['z'].indices.tolist() == [[2, 3]] * 2
    for at, new, why in (
        (0, b'\0\0', 'k is 0'),
        (0, b'\5\0', 'k is 5'),
        (10, b'\3\0', 'ascend'),
        (12, b'\4\0', 'ascend'),
        (2, b'\0\x7c', 'NaN or inf'),
        (0, b'\1\0', 'ascend'),
        (0, b'\3\0', 'truncated'),
        (-2, b'\x0f', 'bits'),
    ):
        bad = data[: body + at] + new + data[body + at + len(new) :]
        with pytest.raises(WireError, match=why):
            decode(reseal(bad, manifest), manifest)
    flipped = bytearray(data)
    flipped[body + 5] ^= 1
    with pytest.raises(WireError, match='checksum'): decode(bytes(flipped), manifest)


# --- bytes --------------------------------------------------------------------------------------------------

def test_the_forty_megabytes():
    "50,000 x 100 logits of four bytes in both directions; nothing of this size is allocated."
    size = forecast_logits(50_000, 100)
    assert 2 * size['payload'] == 40_000_000 and round(40_000_000 / 2**20, 3) == 38.147
    assert size['headers'] == FIXED + ROW == 41
    assert 2 * forecast_logits(500, 100)['payload'] == 400_000
    assert forecast_logits(50_000, 100, 'fp16')['payload'] == 10_000_000
    assert forecast_logits(50_000, 100, 'topk', 10)['payload'] == 50_000 * 10 * 4
    assert forecast_logits(512, 70_000, 'topk', 16)['payload'] == 512 * 16 * 6
    with pytest.raises(ValueError, match="logits='int8'"): logits_entry(torch.zeros(1, 2), 'int8')


@pytest.mark.parametrize(('kind', 'row'), [('fp32', 4 * C), ('fp16', 2 * C), ('topk', 4 * 3)])
def test_the_bill_of_logits_only(played, kind, row):
    "2 |P| C times the width, plus 41 or 43 bytes of headers a message; no model in either direction."
    whole = played('logits-only', logits=kind, logits_topk=3)
    message = P * row + FIXED + ROW + 2 * (kind == 'topk')
    assert whole.messages('down', 0) == []  # there is no mean yet
    for way, round in (('up', 0), ('down', 1), ('up', 1)):
        assert [len(m) for m in whole.messages(way, round)] == [message] * K
        assert whole.curve[round][f'bytes_{way}'] == K * message
    assert whole.run.meter.payload == dict(down=K * P * row, up=2 * K * P * row)
    plain = open_run(RunConfig(**FIELDS), digits(), workers=1)
    plain.pool.close()
    assert (
        whole.run.meter.manifest
        == plain.meter.manifest + len(manifest_of_logits().encode())
        == plain.meter.manifest + 36
    )


@pytest.mark.parametrize('update', ['fp32', 'latent', 'signed-planes'])
def test_logits_and_model_are_the_model_and_the_logits(played, update):
    whole, models = played('logits+model', update=update), played('server-distill', update=update)
    logits = 4 * P * C + FIXED + ROW
    for way, round, extra in (
        ('down', 0, 0),
        ('up', 0, K * logits),
        ('down', 1, K * logits),
        ('up', 1, K * logits),
    ):
        assert whole.curve[round][f'bytes_{way}'] == models.curve[round][f'bytes_{way}'] + extra
        if not extra:
            assert whole.messages(way, round) == models.messages(way, round)
    assert len(whole.messages('up', 1, 0)) == 2 and len(models.messages('up', 1, 0)) == 1
    for k in range(K):  # the first round has nothing to digest: the same model as without logits
        assert whole.messages('up', 0, k)[0] == models.messages('up', 0, k)[0]


def test_the_mean_that_is_sent_is_the_mean_of_what_was_sent(played):
    "Weighted by private images, in double precision, whatever the format on the way up."
    for kind in ('fp32', 'fp16', 'topk'):
        whole = played('logits-only', logits=kind, logits_topk=3)
        said = whole.logits('up', 0)
        private = remove_public(whole.run.partition, public_indices(whole.run.config, N)).sizes
        assert [m.samples for m in said] == private.tolist() and len(set(private)) > 1
        z = np.stack([m.dense()[LOGITS].double().numpy() for m in said])
        mean = np.average(z, axis=0, weights=private)
        kept = whole.run.memories.load(SERVER, 1)[LOGITS]
        np.testing.assert_allclose(kept.numpy(), mean, rtol=1e-5, atol=1e-6)
        for m in whole.logits('down', 1):
            expected = logits_entry(kept, kind, 3)
            expected = expected.dequantize() if isinstance(expected, TopK) else expected
            assert torch.equal(m.dense()[LOGITS], expected)


def test_uniform_weights(played):
    whole = played('logits-only', aggregate='uniform', rounds=1)
    z = np.stack([m.dense()[LOGITS].double().numpy() for m in whole.logits('up', 0)])
    np.testing.assert_allclose(
        whole.run.memories.load(SERVER, 1)[LOGITS].numpy(), z.mean(0), rtol=1e-5, atol=1e-6
    )


@quick
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_identical_clients_average_to_themselves(seed, weights):
    z, pool = torch.from_numpy(np.random.default_rng(seed).normal(size=(7, 5), scale=9)).float(), Average()
    for w in weights: pool.add({LOGITS: z}, w)
    mean = pool.mean()[LOGITS]
    assert torch.equal(mean, z)
    student = z.clone().requires_grad_(True)
    kd_loss(student, mean, 2.0).backward()
    assert student.grad.abs().max() < 1e-6


def test_mean_of_logits_is_not_the_logarithm_of_the_mean_probability():
    "(4, 0) and (0, 2): 1 / (1 + e^-1) = .7311 against (.9820 + .1192) / 2 = .5506."
    pool = Average()
    for z in ([[4., 0.]], [[0., 2.]]): pool.add({LOGITS: torch.tensor(z)}, 1)
    first = pool.mean()[LOGITS].softmax(1)[0, 0].item()
    second = (
        torch.stack([torch.tensor([4.0, 0.0]).softmax(0), torch.tensor([0.0, 2.0]).softmax(0)])
        .mean(0)[0]
        .item()
    )
    assert first == pytest.approx(.7310586, abs=1e-6) and second == pytest.approx(.5506081, abs=1e-6)


# --- the public set -----------------------------------------------------------------------------------------

@quick
@given(
    st.integers(0, 999),
    st.integers(1, 60),
    st.integers(1, 6),
    st.sampled_from(['iid', 'dirichlet', 'quantity']),
)
def test_public_images_leave_the_clients(seed, images, clients, kind):
    y = np.arange(60) % 7
    index = public_indices(RunConfig(seed=seed, exchange='logits-only', public_images=images), 60)
    assert len(set(index.tolist())) == images
    assert (np.diff(index) > 0).all()
    assert 0 <= index.min()
    assert index.max() < 60
    whole = split(y, clients, kind, seed)
    private = remove_public(whole, index)
    if images == 60: assert private is whole
    else:
        assert sorted(np.concatenate([*private.parts, index])) == list(range(60))
        assert all(set(a) <= set(b) for a, b in zip(private.parts, whole.parts, strict=True))


def test_the_draw_depends_on_the_seed_alone():
    a = RunConfig(exchange='logits-only', public_images=50)
    other = dataclasses.replace(a, exchange='server-distill', dirichlet=.1, clients=3, model='resnet8', lr=.5)
    assert np.array_equal(public_indices(a, 500), public_indices(other, 500))
    assert not np.array_equal(public_indices(a, 500), public_indices(dataclasses.replace(a, seed=1), 500))
    hits = np.zeros(100)
    for seed in range(300):
        hits[public_indices(dataclasses.replace(a, seed=seed, public_images=20), 100)] += 1
    assert abs(hits - 60).max() < 4.5 * (300 * .2 * .8)**.5  # 60 hits each, and no image is favoured
    for images in (0, 501):
        bad = dataclasses.replace(RunConfig(), public_images=images)
        with pytest.raises(ValueError, match=f'public_images={images}.*1 to 500'): public_indices(bad, 500)


def test_validation_images_are_never_public():
    config = RunConfig(**FIELDS | dict(validation=.1), exchange='logits+model')
    whole = open_run(config, digits(), workers=1)
    whole.pool.close()
    public, private, leakage = public_and_private(whole)
    kept, shown = set(whole.validation.tolist()), set(public.index.tolist())
    assert len(kept) >= 6 and len(shown) == P and not kept & shown and not leakage
    assert sorted([*kept, *shown, *np.concatenate(private.parts)]) == list(range(N))
    whole.config = dataclasses.replace(config, public_images=N - len(kept))
    assert public_and_private(whole)[1:] == (whole.partition, True)
    whole.config = dataclasses.replace(config, public_images=N)
    with pytest.raises(ValueError, match=f'1 to {N - len(kept)} of {N}'): public_and_private(whole)


def test_public_images_of_a_known_partition():
    parts = Partition((np.arange(3), np.arange(3, 5)), 'by hand')
    assert remove_public(parts, np.array([0, 3, 4])).sizes.tolist() == [2, 0]
    assert remove_public(parts, np.arange(5)) is parts


class Guarded:
    "Labels that raise when one of the public images is looked up."
    device = torch.device('cpu')

    def __init__(self, labels, public): self.labels, self.public, self.read = labels, set(public.tolist()), 0

    def __len__(self): return len(self.labels)

    def __getitem__(self, index):
        if self.public & set(index.tolist()): raise AssertionError('a public label was read')
        self.read += 1
        return self.labels[index]


@pytest.mark.parametrize('kind', KINDS)
def test_public_labels_are_never_read(kind):
    "Neither by looking them up nor by value: other labels on the public images change not one byte."
    tapes = []
    for spoilt in (False, True):
        config, data = RunConfig(**FIELDS, exchange=kind), digits()
        whole = open_run(config, data, workers=1)
        public = public_indices(config, N)
        labels = data.train_y.clone()
        if spoilt: labels[public] = (labels[public] + 3) % 10
        whole.pool.task = VisionTask(dataclasses.replace(data, train_y=labels))
        whole.pool.task.labels = Guarded(labels, public)
        whole.meter = Tape()
        try:
            for t in range(2): run_module.PROTOCOLS[kind].play(whole, t)
        finally: whole.pool.close()
        assert whole.pool.task.labels.read >= 2 * K
        with pytest.raises(AssertionError): whole.pool.task.labels[torch.from_numpy(public[:1])]
        tapes.append(whole.meter.tape)
    assert tapes[0] == tapes[1] and len(tapes[0]) >= 9


@pytest.mark.parametrize('kind', KINDS)
def test_leakage_is_said(played, kind):
    whole = played(kind, public_images=N, rounds=1)
    assert whole.curve[0]['leakage'] is True and played(kind).curve[0]['leakage'] is False
    steps = [
        sum(-(-len(p) // 16) - (len(p) % 16 == 1 and len(p) > 16) for p in parts)
        for parts in (
            whole.run.partition.parts,
            remove_public(whole.run.partition, public_indices(played(kind).run.config, N)).parts,
        )
    ]
    assert [whole.curve[0]['steps'], played(kind).curve[0]['steps']] == steps and steps[0] > steps[1]


# --- the client ---------------------------------------------------------------------------------------------

def test_private_batches_are_those_of_every_other_method(played):
    "The first round of logits+model, before there is a mean, is FedAvg's on the private images."
    config = RunConfig(**FIELDS)
    plain = open_run(config, digits(), workers=1)
    plain.partition = remove_public(plain.partition, public_indices(config, N))
    plain.meter = Tape()
    try: rounds.run_round(plain, 0)
    finally: plain.pool.close()
    ups = [d for way, _, d in sorted(plain.meter.tape, key=lambda line: line[1]) if way == 'up']
    assert (
        ups
        == played('server-distill').messages('up', 0)
        == [m for k in range(K) for m in played('logits+model').messages('up', 0, k)[:1]]
    )
    public = public_of(config)
    orders = {tuple(torch.cat(list(public_batches(public, config, 0, k))).tolist()) for k in (0, 1, SERVER)}
    assert len(orders) == 3 and all(sorted(o) == list(range(P)) for o in orders)
    assert (
        not {tuple(torch.cat([p for p, *_ in local_batches(P, config, 0, k)]).tolist()) for k in (0, 1)}
        & orders
    )


@pytest.mark.parametrize('update', ['fp32', 'latent', 'signed-planes'])
def test_digesting_brings_a_client_closer_to_the_mean(played, update):
    "Positive control for full-precision and quantised students; the first step's loss is the closed form."
    whole = played('logits-only', update=update)
    config = dataclasses.replace(whole.run.config, public_epochs=6)
    public, replica = public_of(config), whole.run.pool.replicas[0]
    mean, own = 3 * whole.run.memories.load(SERVER, 2)[LOGITS], own_model(whole.run, 1, 2)
    train_state, _ = prepare(replica, config, ClientRound(1, 1, torch.arange(1)), [own], Clock())
    batches = list(public_batches(public, config, 2, 1))
    assert [len(b) for b in batches] == [16, 9] * 6
    statistics = {n: t.clone() for n, t in replica.state.items() if 'running' in n or 'batches' in n}
    with torch.no_grad(): z = replica.model.train()(public.images(batches[0]))
    replica.load(statistics)
    losses = [0.0]
    for b in batches:
        digest_step(replica, train_state, public.images(b), mean[b])
        losses.append(float(train_state.totals['digest']) - sum(losses))
    p, q = ((t / 2).log_softmax(1).double() for t in (mean[batches[0]], z))
    assert losses[1] == pytest.approx(4 * float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert train_state.totals['digests'] == 12 and train_state.totals['steps'] == 0
    assert np.mean(losses[-4:]) < .7 * np.mean(losses[1:5])


def test_answers_are_the_model_in_eval_mode_on_plain_images():
    config = RunConfig(**FIELDS, exchange='logits-only')
    replica, data, public = Replica(config, image_task(10)), digits(), public_of(config)
    with torch.no_grad():  # statistics that differ from the initial ones
        for n, t in replica.state.items():
            if 'running' in n: t.add_(torch.rand(t.shape, generator=torch.Generator().manual_seed(3)))
    x = data.train_x[public.index] / 255
    x = (x - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    with torch.no_grad(): direct = replica.model.eval()(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(answers(replica, config, replica.state, public), direct, atol=1e-4)


def test_a_quantised_client_is_asked_as_it_would_be_sent(played):
    "The logits in the uplink are those of the uplinked model, decoded from its bytes."
    whole = played('logits+model', update='signed-planes')
    public = public_of(whole.run.config)
    for k in range(K):
        model, logits = whole.messages('up', 1, k)
        state = decode(model, whole.run.server.manifest).dense()
        z = answers(whole.run.pool.replicas[0], whole.run.config, state, public)
        assert torch.equal(decode(logits, manifest_of_logits()).dense()[LOGITS], z)


@pytest.mark.parametrize('update', ['fp32', 'signed-planes'])
def test_own_models_stay_at_home(played, update):
    "They differ between clients, start from the common model, and planes are kept as planes."
    whole = played('logits-only', update=update)
    first, own = own_model(whole.run, 0, 0), [own_model(whole.run, k, 2) for k in range(K)]
    assert all(m.round == 1 and m.client == k for k, m in enumerate(own))
    weights = [m.dense()['fc.weight'] for m in own]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))
    assert torch.equal(first.dense()['bn1.weight'], whole.run.server.state['bn1.weight'])
    if update == 'fp32': assert torch.equal(first.entries['fc.weight'], whole.run.server.state['fc.weight'])
    else: assert {m.entries['fc.weight'].bits for m in own} == {4} == {first.entries['fc.weight'].bits}
    assert whole.run.server.state['fc.weight'].abs().sum() > 0
    line = whole.curve[-1]
    assert line['accuracy_worst'] <= line['accuracy'] and line['accuracy_std'] >= 0


def test_the_headline_is_the_mean_of_the_clients_own_models(played):
    whole = played('logits-only')
    data, right = digits(), []
    x = (data.test_x / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    model = whole.run.pool.replicas[0].model.eval()
    for k in range(K):
        model.load_state_dict(own_model(whole.run, k, 2).dense())
        with torch.no_grad(): right.append(100 * (model(x).argmax(1) == data.test_y).double().mean().item())
    line = whole.curve[-1]
    assert line['accuracy'] == pytest.approx(np.mean(right), abs=1)
    assert line['accuracy_worst'] == pytest.approx(min(right), abs=2)
    assert line['accuracy_std'] == pytest.approx(np.std(right), abs=2)
    assert line['accuracy_fp'] == line['accuracy']
    assert list(line['deployed']) == ['4']
    assert line['deployed']['4'] == line['accuracy_quantised']
    assert line['samples'] == 40
    assert len(line['per_class']) == 10 and 'per_class' not in whole.curve[0]


# --- the server ---------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def taught():
    config = RunConfig(**FIELDS, exchange='server-distill', public_epochs=3)
    replica, public = Replica(config, image_task(10)), public_of(config)
    state = {n: t.clone().contiguous() for n, t in replica.state.items()}
    return config, replica, public, state, answers(replica, config, state, public)


def test_one_client_is_an_optimum_of_distillation(taught):
    config, replica, public, state, said = taught
    after, loss = distil(replica, config, state, said, public, 0)
    assert abs(loss) < 1e-6
    assert all(torch.allclose(after[n].double(), state[n].double(), rtol=0, atol=1e-5) for n in state)
    assert torch.allclose(answers(replica, config, after, public), said, atol=1e-4)


def test_another_teacher_is_learned(taught):
    config, replica, public, state, said = taught
    target = said.flip(1) * 3
    losses = []
    for t in range(4):
        state, loss = distil(replica, config, state, target, public, t)
        losses.append(loss)
    assert losses[-1] < .8 * losses[0]
    for n in state:
        assert 'running' not in n or torch.equal(state[n], taught[3][n])  # eval mode: statistics stay


def test_one_client_of_feddf_is_fedavg(played):
    "Up to the rounding of an agreement: the model that came up is the model that stays."
    whole = played('server-distill', clients=1, rounds=1)
    sent = decode(whole.messages('up', 0)[0], whole.run.server.manifest).dense()
    assert whole.curve[0]['distil'] < 1e-5
    for n, t in whole.run.server.state.items():
        assert torch.allclose(t.double(), sent[n].double(), atol=1e-4), n


def test_the_server_learns_from_the_mean_answer_of_what_it_received(played):
    whole = played('server-distill', rounds=1, local_epochs=6)
    public, replica, members, total = public_of(whole.run.config), whole.run.pool.replicas[0], [], 0.0
    expected = torch.zeros(P, C, dtype=torch.double)
    average = Average()
    for data in whole.messages('up', 0):
        m = decode(data, whole.run.server.manifest)
        expected += m.samples * answers(replica, whole.run.config, m.dense(), public).double()
        total += m.samples
        average.add(m.dense(), m.samples)
        members.append((m.dense(), m.samples))
    fresh = open_run(whole.run.config, digits(), workers=2)
    mean = mean_answer(fresh, members, public)
    assert torch.allclose(mean.double(), expected / total, atol=1e-5)
    again, loss = distil(fresh.pool.replicas[0], whole.run.config, average.mean(), mean, public, 0)
    fresh.pool.close()
    assert loss == pytest.approx(whole.curve[0]['distil'], rel=1e-4) and loss > 1e-3
    moved = 0.0
    for n, t in whole.run.server.state.items():
        assert torch.allclose(t.double(), again[n].double(), atol=1e-3), n
        moved = max(moved, (t.double() - average.mean()[n].double()).abs().max().item())
    assert moved > 1e-3


def test_an_ensemble_is_an_average_with_a_memory():
    one, many = Average(), Ensemble()
    for w in (1, 4):
        for pool in (one, many): pool.add(dict(w=torch.tensor([1. * w])), w)
    assert torch.equal(one.mean()['w'], many.mean()['w']) and many.mean()['w'].item() == pytest.approx(17 / 5)
    assert [(s['w'].item(), w) for s, w in many.members] == [(1, 1), (4, 4)]


# --- failures -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_nobody_answers(played, kind):
    whole = played(kind, dropout=1.0)
    for line in whole.curve:
        assert (line['arrived'], line['sampled'], line['bytes_up'], line['failed']) == (0, K, 0, {})
        assert 'distil' not in line
    assert whole.run.memories.load(SERVER, 2) == {}
    assert all(line['bytes_down'] == 0 for line in whole.curve) == (kind == 'logits-only')


def test_the_old_mean_stays(tmp_path):
    "All clients send logits in round 0, all networks diverge in round 1: round 2 gets the mean of round 0."
    config = RunConfig(**FIELDS | dict(rounds=3), exchange='logits-only')
    whole = open_run(config, digits(), workers=1, folder=tmp_path)
    exchange_round(whole, 0)
    whole.config = dataclasses.replace(config, lr=1e30)
    line = exchange_round(whole, 1)
    assert set(line['failed']) == {'0', '1', '2'} and line['arrived'] == 0
    json.dumps(line, allow_nan=False)
    whole.config, whole.meter = config, Tape()
    exchange_round(whole, 2)
    whole.pool.close()
    sent = decode(whole.meter.tape[0][2], manifest_of_logits()).dense()[LOGITS]
    assert torch.equal(sent, whole.memories.load(SERVER, 1)[LOGITS])


def test_the_stage_of_a_failure_decides_its_bill(played):
    down = 4 * P * C + FIXED + ROW
    for stage, bill, trained in (
        ('before_download', 0, 0),
        ('after_download', down, 0),
        ('after_train', down, 1),
    ):
        whole = played('logits-only', dropout=0.34, dropout_stage=stage)
        line = whole.curve[1]
        assert (line['sampled'], line['arrived'], line['bytes_down']) == (3, 2, 2 * down + bill)
        lost = set(range(K)) - {k for way, k, _ in whole.run.meter.tape[whole.ends[0] :] if way == 'up'}
        assert [bool(own_model(whole.run, k, 2).round == 1) for k in lost] == [bool(trained)]


@pytest.mark.parametrize('kind', ['logits-only', 'logits+model'])
def test_a_client_with_impossible_answers_is_named(monkeypatch, kind):
    "Client 1's logits are too large for half precision: none of it arrives, and it keeps the model it had."
    real = exchange_module.answers
    config = RunConfig(**FIELDS | dict(rounds=1), exchange=kind, logits='fp16')
    whole = open_run(config, digits(), workers=1)
    calls = iter(
        range(3)
    )  # one worker with equal costs would go in order; sizes decide, so look the client up by its turn
    order = sorted(
        range(K), key=lambda k: -len(remove_public(whole.partition, public_indices(config, N)).parts[k])
    )
    monkeypatch.setattr(
        exchange_module, 'answers', lambda *a: real(*a) * (1e9 if order[next(calls)] == 1 else 1)
    )
    line = exchange_round(whole, 0)
    whole.pool.close()
    assert list(line['failed']) == ['1'] and 'NaN or infinity' in line['failed']['1'] and line['arrived'] == 2
    assert set(whole.meter.round['up']) == {0, 2}
    assert own_model(whole, 1, 1).samples == 0


def test_a_federation_that_diverges_ends(played):
    "A learning rate that blows every network up: clients are marked, lines are finite, the run goes on."
    for kind in KINDS:
        whole = played(kind, lr=1e30, local_epochs=2, rounds=1)
        assert all(set(line['failed']) == {'0', '1', '2'} and line['arrived'] == 0 for line in whole.curve)
        json.dumps(whole.timeless, allow_nan=False)


def test_settings_that_mean_nothing_are_refused():
    base = dict(**FIELDS, exchange='logits-only')
    for bad, why in (
        (dict(alpha=0.5), 'set alpha to 0'),
        (dict(update='signed-planes', assignment='prune-grow'), 'prune-grow'),
        (dict(uplink='qsgd'), 'uplink'),
        (dict(validation=0.1), 'validation=0.1'),
        (dict(stress='attacks'), 'stress'),
    ):
        with pytest.raises(ValueError, match=why):
            RunConfig(**base | bad)
        if not set(bad) & {'alpha', 'uplink'}:
            RunConfig(**base | bad | dict(exchange='logits+model'))


def test_a_client_speaks_for_itself_only(played):
    "Logits under another client's number are refused: each client is heard once."
    whole = played('logits-only')
    pool, public = Average(), public_of(whole.run.config)
    whole.run.server.expect(0, {0: 9, 1: 9})
    up = encode(Message(0, 0, 1, 9, {LOGITS: torch.ones(P, C)}), manifest_of_logits())
    with pytest.raises(WireError, match='a message of client 1 from client 0'):
        take(whole.run, 0, Answer(up=(up,)), public, pool)
    take(whole.run, 1, Answer(up=(up,)), public, pool)
    with pytest.raises(WireError, match='a second message of client 1'):
        take(whole.run, 1, Answer(up=(up,)), public, pool)
    assert pool.clients == 1


def test_without_a_model_at_the_server_there_is_none_to_judge_or_to_keep(tmp_path):
    config = RunConfig(**FIELDS | dict(rounds=1), exchange='logits-only')
    journal = Journal(tmp_path, 'g', 'n', run_id(config, digits().fingerprint))
    assert 'accuracy_recalibrated' not in run(config, digits(), journal, workers=1)['summary']
    assert not journal.model_path.exists()


def test_no_second_is_charged_to_two_phases(tmp_path, monkeypatch):
    "Phases that lie within each other would be counted twice."
    class Flat(Clock):
        inside = False

        @contextlib.contextmanager
        def __call__(self, phase):
            assert not self.inside, f'{phase} within another phase'
            self.inside = True
            try:
                with super().__call__(phase): yield
            finally: self.inside = False
    monkeypatch.setattr(exchange_module, 'Clock', Flat)
    assert start('logits+model', tmp_path, update='latent').curve[1]['phases']['digest'] > 0


# --- repetition ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_workers_change_nothing(played, kind):
    one, two = played(kind), played(kind, workers=2)
    assert one.run.meter.tape == two.run.meter.tape
    assert all(torch.equal(t, two.run.server.state[n]) for n, t in one.run.server.state.items())


class Killed(RuntimeError): pass


@pytest.mark.parametrize(
    ('kind', 'update'),
    [
        ('logits-only', 'fp32'),
        ('logits-only', 'signed-planes'),
        ('logits+model', 'latent'),
        ('server-distill', 'fp32'),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, monkeypatch, kind, update):
    "Killed in the second round, after memories of that round were written but before its checkpoint."
    config = RunConfig(**FIELDS | dict(rounds=3, participation=.67), exchange=kind, update=update)
    journals = {
        name: Journal(tmp_path / name, 'g', 'n', run_id(config, digits().fingerprint))
        for name in ('whole', 'killed')
    }
    whole = run(config, digits(), journals['whole'], workers=1)

    protocol = run_module.PROTOCOLS[kind]
    def dies(run, full, part, round):
        if round == 1: raise Killed
        return protocol.evaluate(run, full, part, round)
    with monkeypatch.context() as patch:
        patch.setitem(run_module.PROTOCOLS, kind, dataclasses.replace(protocol, evaluate=dies))
        with pytest.raises(Killed): run(config, digits(), journals['killed'], workers=1)
    files = [p.name for p in (journals['killed'].folder / 'clients').glob('*_1.pt')]
    assert len(journals['killed'].load()[1]) == 1 and bool(files) == (kind != 'server-distill')
    resumed = run(config, digits(), journals['killed'], workers=1)

    def lasting(record):
        return timeless(record['curve']), {
            k: v for k, v in record['summary'].items() if k not in ('seconds', 'seconds_per_round', 'memory')
        }

    assert lasting(resumed) == lasting(whole) and len(resumed['curve']) == 3
    assert not journals['killed'].folder.exists()
