"Sensitivity of tokens: closed forms, causality, and choices that hold whatever the scores are."
import pytest
import torch
import torch.nn.functional as F

from fedmpqkd.learn.sensitivity import (
    MODES,
    EmbeddingGradients,
    TokenSelection,
    TokenTable,
    answering,
    chosen_tokens,
    labels_for,
    shortened_texts,
)

torch.set_num_threads(1)


def test_a_linear_model_has_a_closed_form():
    "g_i = |W^T (p_i - y_i)|^2, whatever else is in the batch and whatever the mean is over."
    g = torch.Generator().manual_seed(0)
    words, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    for w in (words.weight, head.weight): torch.nn.init.normal_(w, generator=g)
    ids, labels = torch.randint(7, (3, 5), generator=g), torch.randint(7, (3, 5), generator=g)
    labels[1, 2:] = -100
    with EmbeddingGradients(words) as seen:
        logits = head(words(ids))
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    gap = logits.detach().softmax(-1) - F.one_hot(labels.clamp(min=0), 7)
    wanted = torch.where(labels >= 0, (gap @ head.weight.detach()).square().sum(-1), 0.)
    assert torch.allclose(seen.sensitivity(int((labels >= 0).sum())), wanted, rtol=1e-4, atol=1e-6)
    words(ids).sum().backward()  # outside: nothing is caught
    assert torch.allclose(seen.sensitivity(12), wanted, rtol=1e-4, atol=1e-6)


def test_a_frozen_embedding_and_the_order_of_time():
    "Behind the last label nothing is felt, before it everything; no gradient reaches frozen weights."
    pytest.importorskip('transformers')
    pytest.importorskip('peft')
    from fedmpqkd.core.config import RunConfig
    from fedmpqkd.models.language import counted, marked
    from fedmpqkd.models.lora import build_language_model
    model = build_language_model(RunConfig(model='gpt-tiny', tokenizer='bytes', lora_rank=2), 50)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=.1)
    causal = model.held.get_base_model()
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, 4:6], labels[1, 7] = ids[0, 5:7], ids[1, 8]
    x = marked(ids, labels)
    def gradients(watch):
        model.zero_grad()
        targets = counted(x)[1]
        if watch:
            with EmbeddingGradients(causal.get_input_embeddings()) as seen:
                F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        else:
            seen = None
            F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        return seen, [p.grad.clone() for p in model.parameters()]
    seen, with_hook = gradients(True)
    without = gradients(False)[1]
    assert all(torch.equal(a, b) for a, b in zip(with_hook, without, strict=True))  # training is untouched
    g = seen.sensitivity(3)
    assert (g[0, :6] > 0).all() and (g[1, :8] > 0).all()
    assert not g[0, 6:].any() and not g[1, 8:].any()
    assert causal.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize('share', [.01, .3, 1 / 3, .5, 1.])
def test_the_number_that_is_chosen(share):
    "max(1, ceil(r n)) in exact arithmetic, and the best ones."
    from fractions import Fraction
    from math import ceil
    g = torch.Generator().manual_seed(3)
    scores, ranked = torch.rand(40, 12, generator=g).round(decimals=1), torch.rand(40, 12, generator=g) < .7
    keep = chosen_tokens(scores, ranked, share)
    assert not (keep & ~ranked).any()
    for s, r, k in zip(scores, ranked, keep, strict=True):
        n = int(r.sum())
        assert int(k.sum()) == (max(1, ceil(Fraction(share).limit_denominator(100) * n)) if n else 0)
        order = sorted(r.nonzero().flatten().tolist(), key=lambda i, s=s: (-float(s[i]), i))
        assert sorted(order[:int(k.sum())]) == k.nonzero().flatten().tolist()


def test_a_constant_score_is_its_own_mean():
    table = TokenTable(5)
    for n in range(4):
        real = torch.tensor([[True, True, n % 2 == 0]])
        table.add(torch.tensor([[1, 1, 2]]), torch.tensor([[3., 3, 8]]), real)
    assert torch.allclose(table.score(torch.arange(5)), torch.tensor([0, 3., 8, 0, 0]), atol=1e-5)


@pytest.mark.parametrize('mode', MODES)
def test_labels_are_only_ever_left_out(mode):
    table, g = TokenTable(30), torch.Generator().manual_seed(0)
    labels = torch.randint(30, (4, 6), generator=g)
    labels[2, 3:] = -100
    train, measure = labels_for(mode, labels, table, .5)
    for part in (train, measure): assert ((part == labels) | (part == -100)).all()
    sizes = [int((part >= 0).sum()) for part in (train, measure)]
    assert sizes == dict(loss_mask=[11, 11], fisher_only=[21, 11], input_drop=[21, 21])[mode]  # 3 x 3 + 2


def test_a_shorter_text_keeps_labels_order_and_positions():
    x = torch.tensor([[-5, -6, -7, 8, 9, -10], [-1, 2, -3, -1, -1, -1]])
    assert answering(x).tolist() == [[False, False, False, True, True, True],
                                     [False, True, True, False, False, False]]
    keep = answering(x) | torch.tensor([[True, False, False, False, False, False], [False] * 6])
    short, places = shortened_texts(x, keep)
    assert short.tolist() == [[-5, 8, 9, -10], [2, -3, -1, -1]]
    assert places.tolist() == [[0, 3, 4, 5], [1, 2, 0, 0]]


# a client's round -------------------------------------------------------------------------------------------

LINE = torch.tensor([[4, 1, 2, 3, 0]])  # 4 asks, 1 2 3 answer, 0 ends
TEXT = torch.where(torch.arange(5) < 4, LINE, ~LINE)  # marked: the first four positions predict something


def selection(**fields):
    "A linear model of which position i moves its own prediction only, and what chooses its labels."
    from fedmpqkd.core.config import RunConfig
    words, head = torch.nn.Embedding(5, 5), torch.nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        words.weight.zero_()
        head.weight.copy_(torch.diag(torch.tensor([1., 2., 4., 3., 0.])))
    config = RunConfig(tokenizer='bytes', token_refresh=3, **fields)
    return words, head, TokenSelection(config, words, 5, (0,), torch.Generator().manual_seed(0))


def steps(words, head, choice, count):
    "The labels of each step."
    from fedmpqkd.models.language import counted, unmarked
    labels = counted(TEXT)[1]
    out = []
    for _ in range(count):
        with choice.step(TEXT, labels) as mine:
            logits = head(words(unmarked(TEXT)[0]))[:, :4]
            F.cross_entropy(logits.flatten(0, 1), mine.flatten(), ignore_index=-100).backward()
        out.append(mine[0].tolist())
    return out


def test_labels_of_a_round_by_hand():
    """All logits are 0, so p = 1/5 and g_i = sum_k w_k^2 (p_k - y_k)^2 with w = (1, 2, 4, 3, 0):
    .04 (1 + 4 + 16 + 9) + .6 w_y^2 = 1.2 + .6 w_y^2. Token 4 predicts 1, token 1 predicts 2, 2 predicts 3 and
    3 predicts 0: their sensitivities are 3.6, 10.8, 6.6 and 1.8."""
    words, head, choice = selection(token_select='sensitivity', token_share=.3)
    found = steps(words, head, choice, 5)
    assert torch.allclose(choice.table.score(torch.arange(5)), torch.tensor([0, 10.8, 6.6, 1.8, 3.6]))
    fewer = [1, -100, -100, 0]  # one of three, and the end, whose own sensitivity is 0
    assert found == [[1, 2, 3, 0], fewer, fewer, [1, 2, 3, 0], fewer]
    assert steps(*selection(token_select='sensitivity', token_share=.5), 2)[1] == [1, 2, -100, 0]


def test_random_labels_are_as_many_and_measure_nothing():
    words, head, choice = selection(token_select='random', token_share=.3)
    found = steps(words, head, choice, 30)
    assert all(line == [1, 2, 3, 0] for line in found[::3]) and not choice.table.seen.any()
    others = [line for i, line in enumerate(found) if i % 3]
    assert all(line[3] == 0 and sum(t != -100 for t in line) == 2 for line in others)
    assert {tuple(line) for line in others} == {(1, -100, -100, 0), (-100, 2, -100, 0), (-100, -100, 3, 0)}


def test_gradients_that_are_not_numbers_are_not_learned_from():
    words, head, choice = selection(token_select='sensitivity', token_share=.3)
    with torch.no_grad(): head.weight[0, 0] = float('nan')
    steps(words, head, choice, 1)
    assert not choice.table.seen.any()


@pytest.mark.parametrize('fields, why', [
    (dict(token_share=0), 'token_share'), (dict(token_share=1), 'token_share'),
    (dict(token_refresh=1), 'at least 2'), (dict(token_select='attention'), 'sensitivity, random')])
def test_selections_that_select_nothing_are_refused(fields, why):
    from fedmpqkd.core.config import RunConfig
    with pytest.raises(ValueError, match=why): RunConfig(tokenizer='bytes', **fields)
