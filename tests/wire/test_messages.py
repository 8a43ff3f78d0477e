"""The contract of client and server: what is in a message, in which order, and how long it is."""

from dataclasses import replace
from math import ceil

import pytest
import torch

from fedmpqkd.core.config import RunConfig
from fedmpqkd.models.vision import build_model, layout
from fedmpqkd.quant.quantize import Planes
from fedmpqkd.wire.format import Message, decode, encode
from fedmpqkd.wire.messages import (
    ASSIGNMENT,
    codebook_names,
    downlink_entries,
    manifest_of,
    received_state,
)

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def model():
    return build_model('resnet8', 10)


def random_bits(count, seed=0):
    return torch.randint(1, 9, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_manifest_lists_the_whole_state_and_the_assignment(model):
    shape, state = layout(model), model.state_dict()
    manifest = manifest_of(shape)
    assert manifest.names[-1] == ASSIGNMENT and manifest.shapes[-1] == (len(shape.quantized),)
    assert sorted(manifest.names[:-1]) == sorted(state)
    assert manifest.names[: len(shape.quantized)] == shape.quantized
    assert all(manifest.shapes[manifest.index(n)] == tuple(t.shape) for n, t in state.items())
    assert manifest_of(shape, RunConfig()) == manifest  # only codebooks would make a difference


@pytest.mark.parametrize('fields, count', [
    (dict(), 0), (dict(uplink='qsgd'), 0), (dict(uplink='pq', codebook='client'), 0),
    (dict(uplink='pq'), 6), (dict(uplink='pq', codebook='multi'), 4),  # 432 and 640 weights are too few
    (dict(uplink='pq', pq_centroids=16), 8), (dict(uplink='pq', pq_centroids=2**16), 0),
])
def test_codebooks_of_a_configuration(model, fields, count):
    shape, config = layout(model), RunConfig(**fields)
    names = codebook_names(config, shape)
    assert names == [f'codebook {i}' for i in range(count)]
    manifest = manifest_of(shape, config)
    assert manifest.names[len(manifest.names) - count :] == tuple(names)
    assert set(manifest.shapes[len(manifest.names) - count :]) <= {(config.pq_centroids, config.pq_dim)}


@pytest.mark.parametrize('seed', [None, 3])
def test_length_of_a_downlink(model, seed):
    "The equation of the page, with bits of its own for each layer."
    shape, state = layout(model), model.state_dict()
    bits = random_bits(len(shape.quantized))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    data = encode(Message(0, 0, 0, 0, downlink_entries(state, shape, bits, generator)), manifest_of(shape))
    planes = sum(4 + (b + 1) * ceil(d / 8) for b, d in zip(bits, shape.sizes(), strict=True))
    plain = sum(state[n].numel() for n in (*shape.others, *shape.buffers))
    assert len(data) == 35 + 6 * len(state) + planes + 4 * plain + 8 * len(shape.counters)


def test_what_arrives_is_what_was_assigned(model):
    shape, state = layout(model), model.state_dict()
    bits, manifest = random_bits(len(shape.quantized), 1), manifest_of(shape)
    entries = downlink_entries(state, shape, bits)
    message = decode(encode(Message(0, 0, 0, 0, entries), manifest), manifest)
    assert [message.entries[n].bits for n in shape.quantized] == bits
    assert all(isinstance(e, Planes) == (n in shape.quantized) for n, e in message.entries.items())

    received = received_state([message])
    assert set(received) == set(state)
    for n, b in zip(shape.quantized, bits, strict=True):
        step = float(state[n].abs().max()) / (2**b - 1)
        assert float((received[n] - state[n]).abs().max()) <= step / 2 * 1.0001
    assert all(torch.equal(received[n], state[n]) for n in state if n not in shape.quantized)


def test_stochastic_rounding_is_unbiased(model):
    shape, state = layout(model), model.state_dict()
    name, generator = shape.quantized[0], torch.Generator().manual_seed(0)
    bits = [2] * len(shape.quantized)
    draws = [downlink_entries(state, shape, bits, generator)[name].dequantize() for _ in range(300)]
    step = float(state[name].abs().max()) / 3
    assert float((torch.stack(draws).mean(0) - state[name]).abs().max()) < 5 * step / 2 / 300**.5
    assert not torch.equal(draws[0], draws[1])


def test_the_assignment_is_no_part_of_the_model(model):
    shape, state = layout(model), model.state_dict()
    bits, manifest = [4] * len(shape.quantized), manifest_of(shape)
    message = Message(0, 0, 0, 0, state | {ASSIGNMENT: torch.tensor(bits)})
    received = received_state([decode(encode(message, manifest), manifest), replace(message, entries={})])
    assert set(received) == set(state)
    assert all(torch.equal(received[n], state[n]) for n in state)


def test_bits_for_every_layer_or_none(model):
    shape, state = layout(model), model.state_dict()
    with pytest.raises(ValueError):
        downlink_entries(state, shape, [4])
