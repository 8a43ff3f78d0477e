"Sensitivity of tokens: closed forms, causality, and choices that hold whatever the scores are."
import pytest
import torch
import torch.nn.functional as F

from fedmpqkd.learn.sensitivity import (
    EmbeddingGradients,
    TokenSelection,
    TokenTable,
    answering,
    chosen_tokens,
    kept_tokens,
    shortened_texts,
    trained_labels,
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


def test_shares_are_rounded_up_from_decimals_not_from_their_neighbours():
    "Every hundredth of every number to 300, against fractions; .15 of 100 tokens are 15."
    from fractions import Fraction
    from math import ceil
    numbers = torch.arange(1, 301)
    ranked = torch.arange(300) < numbers[:, None]
    for hundredths in range(1, 101):
        found = chosen_tokens(torch.zeros(300, 300), ranked, hundredths / 100).sum(1).tolist()
        assert found == [max(1, ceil(Fraction(hundredths, 100) * n)) for n in numbers.tolist()]


def test_a_constant_score_is_its_own_mean():
    table = TokenTable(5)
    for n in range(4):
        real = torch.tensor([[True, True, n % 2 == 0]])
        table.add(torch.tensor([[1, 1, 2]]), torch.tensor([[3., 3, 8]]), real)
    assert torch.allclose(table.score(torch.arange(5)), torch.tensor([0, 3., 8, 0, 0]), atol=1e-5)


def test_labels_are_only_ever_left_out():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(30, (4, 6), generator=g)
    labels[2, 3:] = -100
    fewer = trained_labels(labels, torch.zeros(4, 6), .5)
    assert ((fewer == labels) | (fewer == -100)).all()
    assert int((fewer >= 0).sum()) == 11  # 3 x 3 + 2


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
            F.cross_entropy(logits.flatten(0, 1), mine.labels.flatten(), ignore_index=-100).backward()
        out.append(mine.labels[0].tolist())
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


# what tokens are chosen for -------------------------------------------------------------------------------

def trained_client(**fields):
    "A client of a tiny GPT with adapters after six steps: its adapters, and what it has measured."
    pytest.importorskip('transformers')
    pytest.importorskip('peft')
    from fedmpqkd.core.config import RunConfig
    from fedmpqkd.learn.importance import SquaredGradients
    from fedmpqkd.learn.language import LanguageTask, load_language
    from fedmpqkd.learn.replica import Clock, Replica
    from fedmpqkd.learn.step import TrainState, local_step, make_optimizer
    c = RunConfig(dataset='almanac', text_kind='answer', model='gpt-tiny', tokenizer='byte-bpe:300',
                  lora_rank=2, context=64, lr=.05, momentum=.5, uplink='mixed', token_refresh=3, **fields)
    task = LanguageTask(load_language(c))
    torch.manual_seed(0)
    replica = Replica(c, task, 'cpu')
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in replica.weights: w.copy_(.1 * torch.randn(w.shape, generator=g))
    tokens = task.selection(c, replica.model, torch.Generator().manual_seed(2))
    state = TrainState(c, task, 0., 1., None, None, make_optimizer(c, [*replica.others, *replica.weights]),
                       Clock(), squares=SquaredGradients(1.), tokens=tokens)
    for i in range(6): local_step(replica, state, *task.batch(torch.arange(4 * i, 4 * i + 4)))
    return replica, state, [w.detach().clone() for w in replica.weights]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_measuring_on_fewer_labels_trains_as_if_nothing_were_chosen():
    plain, chosen = (trained_client(**f) for f in (
        {}, dict(token_select='sensitivity', token_mode='fisher_only', token_share=.3)))
    assert same(plain[2], chosen[2])
    assert not same(plain[1].squares.value(), chosen[1].squares.value())


def test_what_is_measured_is_the_gradient_of_the_chosen_labels():
    """The last of six steps chooses. Its squares are those of a backward pass of our own, at the weights
    before it, over the labels that the same stream of random numbers picks."""
    from dataclasses import replace

    from fedmpqkd.learn.importance import SquaredGradients
    from fedmpqkd.learn.step import local_step
    replica, state, _ = trained_client(token_select='random', token_mode='fisher_only', token_share=.3)
    task, tokens = replica.task, state.tokens
    x, y = task.batch(torch.arange(4))
    tokens.steps, tokens.generator = 1, torch.Generator().manual_seed(5)
    scores = torch.rand(y.shape, generator=torch.Generator().manual_seed(5))
    fewer = trained_labels(y, scores, .3, tokens.stays)
    assert 0 < int((fewer >= 0).sum()) < int((y >= 0).sum())
    replica.model.train()
    wanted = torch.autograd.grad(task.loss(replica.model(x).float(), fewer), replica.weights)
    state = replace(state, squares=SquaredGradients(1.))
    local_step(replica, state, x, y)
    for mine, g in zip(state.squares.value(), wanted, strict=True):
        assert torch.allclose(mine, g**2, atol=1e-12)


def test_a_shorter_prompt_that_keeps_everything_is_no_other_training():
    "Of n tokens that may go, ceil(.999 n) = n stay."
    plain, whole, half = (trained_client(**f)[2] for f in (
        {}, *(dict(token_select='random', token_mode='input_drop', token_share=s) for s in (.999, .3))))
    for a, b in zip(plain, whole, strict=True): assert torch.allclose(a, b, atol=1e-5)
    assert not same(plain, half) and all(torch.isfinite(w).all() for w in half)


def test_what_stays_of_a_prompt_by_hand():
    "Six tokens of a prompt, the last predicts the one answer; behind it padding. w = 2."
    x = torch.tensor([[-5, -6, -7, -8, -9, 4, -3, -1]])  # ids 4 to 8, then 4 and its answer 2
    table = TokenTable(10)
    table.add(torch.tensor([[4, 5, 6, 7]]), torch.tensor([[1., 2., 3., 4.]]), torch.ones(1, 4).bool())
    def kept(share, rule, tail=2):
        return kept_tokens(x, share, rule, table, torch.Generator(), tail)[0].nonzero()[:, 0].tolist()
    assert kept(.5, 'sensitivity') == [0, 2, 3, 4, 5, 6]  # of ids 5 and 6 the second; 7 and 8 are the tail
    assert kept(.5, 'last') == [0, 2, 3, 4, 5, 6]
    assert kept(.5, 'sensitivity', 0) == [0, 2, 3, 5, 6]  # two of four: ids 6 and 7
    assert kept(1., 'random') == [0, 1, 2, 3, 4, 5, 6]  # never padding


@pytest.mark.parametrize('fields, why', [
    (dict(token_mode='fisher_only'), 'nothing else measures'),
    (dict(token_mode='fisher_only', uplink='mixed', importance='magnitude'), 'nothing else measures'),
    (dict(token_mode='input_drop', alpha=.5), 'a teacher'),
    (dict(token_mode='inputs'), 'loss_mask, fisher_only, input_drop')])
def test_choices_that_nothing_would_follow_from_are_refused(fields, why):
    from fedmpqkd.core.config import RunConfig
    with pytest.raises(ValueError, match=why):
        RunConfig(tokenizer='bytes', token_select='random', **fields)
