"Messages of logits: the published byte counts, every damaged byte, and everything a sender may not claim."
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.learn.dualmince import message_size
from fedmpqkd.wire.format import WireError
from fedmpqkd.wire.logits import LogitMessage, decode_logits, encode_logits

KNOWN = dict(sender=2, round=3, vocabulary=40, k=3, lengths=torch.tensor([2, 0, 1]))


def a_message(seed=0, lengths=(2, 0, 1), k=3, vocabulary=40, tail=True):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(lengths), vocabulary, generator=g)
    values, index = logits.topk(k)
    rest = logits.scatter(-1, index, float("-inf")).logsumexp(-1) if tail else None
    losses = torch.rand(len(lengths), generator=g)
    return LogitMessage(3, 2, vocabulary, torch.tensor(lengths), losses, values, index, rest)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 9), st.sampled_from([16, 32]),
       st.sampled_from([16, 32]), st.booleans())
def test_what_arrives_is_what_was_sent_and_as_long_as_was_said(lengths, k, value_bits, index_bits, tail):
    m = a_message(len(lengths), lengths, k, tail=tail)
    data = encode_logits(m, value_bits, index_bits)
    size = message_size(lengths, k, 40, value=f"fp{value_bits}", index_bits=index_bits, tail=tail)
    assert len(data) == size.total + 34  # header and checksum
    agreed = dict(value_bits=value_bits, index_bits=index_bits, tail=tail)
    found = decode_logits(data, **KNOWN | dict(k=k, lengths=torch.tensor(lengths)), **agreed)
    for other in (dict(value_bits=48 - value_bits), dict(index_bits=48 - index_bits), dict(tail=not tail)):
        with pytest.raises(WireError, match="is due"):
            decode_logits(data, **KNOWN | dict(k=k, lengths=torch.tensor(lengths)), **agreed | other)
    assert torch.equal(found.index, m.index) and torch.equal(found.losses, m.losses)
    torch.testing.assert_close(found.values, m.values, rtol=0 if value_bits == 32 else 1e-3, atol=1e-3)
    assert (found.rest is None) == (not tail)


def test_every_flipped_bit_and_every_cut_is_refused():
    data = encode_logits(a_message())
    for n in range(len(data)):
        for bit in (1, 128):
            broken = bytearray(data)
            broken[n] ^= bit
            with pytest.raises(WireError): decode_logits(bytes(broken), **KNOWN)
        with pytest.raises(WireError): decode_logits(data[:n], **KNOWN)
    with pytest.raises(WireError): decode_logits(data + b"\0", **KNOWN)


@pytest.mark.parametrize("change, message", [
    (dict(values=torch.full((3, 3), float("nan"))), "logits: not finite"),
    (dict(values=torch.tensor([[1.0, 2.0, 3.0]] * 3)), "descending"),
    (dict(index=torch.tensor([[1, 1, 2]] * 3)), "twice"),
    (dict(index=torch.tensor([[1, 40, 2]] * 3)), "beyond the vocabulary"),
    (dict(losses=torch.tensor([0.1, -0.1, 0.0])), "below zero"),
    (dict(lengths=torch.tensor([1, 1, 1])), "other lengths"),
    (dict(lengths=torch.tensor([2, 1, 1])), "other lengths"),
    (dict(round=4), "round 4 where 3 is due"), (dict(sender=1), "sender 1 where 2 is due"),
    (dict(vocabulary=41), "vocabulary 41 where 40 is due"),
])
def test_claims_are_checked(change, message):
    with pytest.raises(WireError, match=message):
        decode_logits(encode_logits(replace(a_message(), **change)), **KNOWN)


def test_16_bits_hold_65536_tokens_and_no_more():
    m = replace(a_message(), vocabulary=65_536, index=torch.tensor([[65_535, 1, 2]] * 3))
    known = KNOWN | dict(vocabulary=65_536, value_bits=16, index_bits=16)
    assert decode_logits(encode_logits(m, 16, 16), **known).index[0, 0] == 65_535
    with pytest.raises(WireError, match="65537 tokens do not fit into 16 bits; use 32"):
        encode_logits(replace(m, vocabulary=65_537), 16, 16)


@pytest.mark.parametrize("change, message", [
    (dict(round=-1), "round=-1"), (dict(round=2**32), "round=4294967296"), (dict(sender=-1), "sender=-1"),
    (dict(vocabulary=2**32), "vocabulary=4294967296")])
def test_numbers_that_a_header_cannot_hold_are_refused_in_a_sentence(change, message):
    with pytest.raises(WireError, match=f"{message} does not fit into 32 bits"):
        encode_logits(replace(a_message(), **change))


def test_a_row_of_65535_logits_is_the_longest():
    row = torch.arange(65_536)[None].flip(1)
    m = LogitMessage(3, 2, 70_000, torch.tensor([1]), torch.zeros(1), row[:, :-1].float(), row[:, :-1])
    known = KNOWN | dict(vocabulary=70_000, lengths=torch.tensor([1]), k=65_535, tail=False)
    assert torch.equal(decode_logits(encode_logits(m), **known).index, m.index)
    with pytest.raises(WireError, match="K=65536 does not fit into 16 bits"):
        encode_logits(replace(m, values=row.float(), index=row))
