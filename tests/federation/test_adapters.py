"Adapters on the server: B alone, factors, or what they make; each mean by hand."
import numpy as np
import pytest
import torch

from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import open_run, run_round

pytest.importorskip('transformers')
pytest.importorskip('peft')

from fedmpqkd.learn.language import load_language  # noqa: E402

torch.set_num_threads(1)


def a_round(**fields):
    "The server's adapters before and after one round, the replies, and the bytes that came up."
    config = make_config('fedavg', dataset='almanac', text_kind='answer', model='gpt-tiny',
                         tokenizer='byte-bpe:300', lora_rank=2, clients=2, batch_size=4, eval_images=0, lr=.5,
                         rounds=1, **fields)
    run = open_run(config, load_language(config), workers=1)
    before = {n: t.clone() for n, t in run.server.state.items()}
    replies, add = [], run.server.average.add.__func__
    def kept(self, state, weight):
        replies.append((state, weight))
        add(self, state, weight)
    run.server.average.add = kept.__get__(run.server.average)
    line = run_round(run, 0)
    run.pool.close()
    assert not line['failed']
    return before, run.server.state, replies, run.meter.total['up']


def test_only_b_trains():
    "The mean of the factors is the mean of the products, since A is one and the same; half is sent."
    before, after, replies, sent = a_round(lora_train='B')
    assert all('lora_B' in n for n in before) and any(not torch.equal(before[n], after[n]) for n in before)
    total = sum(w for _, w in replies)
    for n in after:
        mean = sum(w * s[n].double() for s, w in replies) / total
        assert torch.allclose(after[n].double(), mean, atol=1e-7)
    both = a_round()
    assert {n.replace('lora_A', 'lora_B') for n in both[1]} == set(after)
    numbers = 2 * 2 * 2 * 32 * 4  # bytes of A: layers, projections, rank, width
    assert both[3] - sent == 2 * (numbers + 4 * 6)  # two clients; six bytes a tensor


def test_products_are_averaged():
    "The server's product is the nearest of rank 2 to the mean of the clients' products."
    _, after, replies, _ = a_round(aggregate='lora-product')
    total = sum(w for _, w in replies)
    for a in (n for n in after if 'lora_A' in n):
        b = a.replace('lora_A', 'lora_B')
        mean = sum(w * s[b].double() @ s[a].double() for s, w in replies).numpy() / total
        u, s, v = np.linalg.svd(mean)
        best = u[:, :2] * s[:2] @ v[:2]
        assert np.allclose((after[b] @ after[a]).numpy(), best, atol=1e-6)
        assert after[a].shape == (2, 32) and after[b].shape == (32, 2)


@pytest.mark.parametrize('fields, why', [
    (dict(tokenizer=''), 'adapters'), (dict(lora_rank=0), 'adapters'), (dict(lora_train='B'), 'adapters'),
    (dict(server_rule='adam'), 'new basis'), (dict(uplink='mixed', error_feedback=True), 'new basis')])
def test_products_are_refused_where_factors_are_remembered_or_there_are_none(fields, why):
    from fedmpqkd.core.config import RunConfig
    with pytest.raises(ValueError, match=why):
        RunConfig(**dict(tokenizer='bytes', lora_rank=2, aggregate='lora-product') | fields)
