"DualMinCE, its metrics, the bytes of the exchange, and losses that lie."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.data.text import IGNORED
from fedmpqkd.learn.alignment import TopK, soft_cross_entropy, top_k
from fedmpqkd.learn.dualmince import (
    MessageSize,
    adapter_size,
    check_losses,
    choice_changes,
    dual_min_ce,
    index_bytes,
    item_loss,
    item_nll,
    logit_losses,
    message_size,
    mutual_loss,
    round_size,
)


def test_example_of_the_specification():
    "METHODS 9.3: equal is not smaller."
    chosen = dual_min_ce(np.array([[0.9, 0.5, 2.0], [1.2, 0.7, 0.4]]), np.array([0.6, 0.6, 0.4]))
    assert chosen.best.tolist() == [0, 0, 1] and chosen.kept.tolist() == [False, True, False]
    assert chosen.teacher.tolist() == [-1, 0, -1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_selection_sample_by_sample(clients: int, samples: int, seed: int):
    g = np.random.default_rng(seed)
    losses, local = g.integers(0, 4, (clients, samples)) * 0.5, g.integers(0, 4, samples) * 0.5
    teacher = dual_min_ce(losses, local).teacher
    for i in range(samples):
        best = min(range(clients), key=lambda k: (losses[k, i], k))
        assert teacher[i] == (best if losses[best, i] < local[i] else -1)


def test_losses_that_are_no_numbers():
    nan, inf = float("nan"), float("inf")
    losses = np.array([[nan, nan, 1.0], [2.0, inf, 5.0]])
    assert dual_min_ce(losses, np.array([3.0, nan, nan])).teacher.tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="losses must be"): dual_min_ce(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="losses must be"): dual_min_ce(np.zeros((0, 3)), np.zeros(3))


def test_nobody_is_better():
    "METHODS 9.9.3: the second term is exactly 0, and so is its gradient."
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    kept = torch.from_numpy(dual_min_ce(np.ones((2, 3)), np.ones(3)).kept)
    soft = soft_cross_entropy(z, top_k(z, 2), labels.where(kept, torch.tensor(IGNORED)))
    hard = F.cross_entropy(z, labels)
    assert soft.item() == 0 and mutual_loss(hard, soft, 0.9).item() == (0.9 * hard).item()
    gradient = torch.autograd.grad(mutual_loss(hard, soft), z, retain_graph=True)[0]
    assert torch.allclose(gradient, 0.9 * torch.autograd.grad(hard, z)[0])
    with pytest.raises(ValueError, match="must lie in"): mutual_loss(hard, soft, 1.5)


def test_metrics_by_hand():
    "A: 3 tokens, 6 nats; B: 1 token, 5 nats; the same 6 bytes."
    nll, tokens, size = np.array([[6.0], [5.0]]), np.array([[3], [1]]), np.array([6])
    found, changed = choice_changes(nll, tokens, np.array([60.0]), np.array([2]), size)
    assert {m: int(s.teacher[0]) for m, s in found.items()} == {"token": 0, "byte": 1, "sample": 1}
    assert changed == {"token": 0.0, "byte": 1.0, "sample": 1.0}
    assert item_loss(nll, tokens, size, "byte").ravel().tolist() == [1.0, 5 / 6]
    with pytest.raises(ValueError, match="unknown metric"): item_loss(nll, tokens, size, "word")
    with pytest.raises(ValueError, match="without a target"): item_loss(nll, tokens * 0, size)


def test_item_nll_is_cross_entropy():
    g = torch.Generator().manual_seed(2)
    z, labels = torch.randn(3, 4, 7, generator=g), torch.randint(0, 7, (3, 4), generator=g)
    labels[0, 2:] = labels[2] = IGNORED
    nll, tokens = item_nll(z, labels)
    assert tokens.tolist() == [2, 4, 0] and nll[2] == 0
    for n in range(2):
        assert torch.allclose(nll[n], F.cross_entropy(z[n], labels[n], reduction="sum"))


def test_bytes_of_the_paper():
    "METHODS 9.7: 32.8 MB as the paper counts, 65.5 MB with indices, and a LoRA adapter of 6.29 MB."
    paper = message_size(512, 16, 50_272, samples=1000, lengths=False)
    assert paper == MessageSize(32_768_000, 32_768_000, 4000, 0, 0) and paper.total == 65_540_000
    half = message_size(512, 16, 50_272, 1000, "fp16", 16, lengths=False)
    assert half.values + half.indices == 32_768_000
    adapter = adapter_size([(2048, 2048)] * 48, 8)
    assert adapter == 6_291_456 and round(65_536_000 / adapter) == 10
    assert message_size(512, 16, 50_272, 1000, tail=True).rest == 512 * 1000 * 4
    assert round_size([paper, half], paper) == (65_540_000 + 32_772_000, 131_080_000)


def test_bytes_are_those_of_the_tensors():
    "Ragged samples, counted by what torch would store."
    positions = [3, 0, 7]
    for value, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        for bits, kind in ((32, torch.int32), (16, torch.int16)):
            found = message_size(positions, 5, 4096, value=value, index_bits=bits, tail=True)
            rows = [torch.zeros(n, 5) for n in positions]
            assert found.values == sum(r.to(dtype).nbytes for r in rows)
            assert found.indices == sum(r.to(kind).nbytes for r in rows)
            assert found.rest == sum(r[:, 0].to(dtype).nbytes for r in rows)
            assert (found.losses, found.lengths) == (12, 12)


@pytest.mark.parametrize("call, message", [
    (lambda: index_bytes(65_537, 16), "65537 tokens do not fit into 16 bits"),
    (lambda: index_bytes(9, 8), "16 or 32"), (lambda: message_size(4, 17, 16), "k=17: there are 16 logits"),
    (lambda: message_size(4, 1, 16, value="fp8"), "fp8"),
    (lambda: message_size([3, -1], 1, 16), "less than no position")])
def test_impossible_messages(call, message: str):
    with pytest.raises(ValueError, match=message): call()
    assert index_bytes(65_536, 16) == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 11), st.booleans())
def test_the_bound_holds_for_every_honest_client(seed: int, k: int, tail: bool):
    "The true loss is never below the bound, and equals the estimate where the label is among the K."
    g = torch.Generator().manual_seed(seed)
    z, labels = 3 * torch.randn(1, 6, 11, generator=g), torch.randint(0, 11, (1, 6), generator=g)
    labels[0, 5] = IGNORED
    found = top_k(z, k, tail)
    estimate, bound = logit_losses(found, labels, 11)
    true = F.cross_entropy(z[0], labels[0], reduction="none")
    assert (true >= bound[0] - 1e-5).all() and (bound <= estimate).all()
    inside = (found.index == labels[..., None]).any(-1)
    if tail or k == 11: assert torch.allclose(estimate[inside], true[None][inside], atol=1e-5)
    assert estimate[0, 5] == bound[0, 5] == 0
    assert not check_losses(found, labels, np.array([true[:5].mean().item()]), 11).lied.any()


def test_an_equal_share_of_the_rest():
    row = TopK(torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[7, 8]]), torch.tensor([0.2]).log())
    estimate, bound = logit_losses(row, torch.tensor([3]), 6)
    assert np.isclose(estimate.item(), -np.log(0.05)) and np.isclose(bound.item(), -np.log(0.2))
    estimate, bound = logit_losses(TopK(row.values, row.index), torch.tensor([3]), 6)
    assert estimate.item() == float("inf") and np.isclose(bound.item(), -np.log(0.3 / 0.8))


def poisoned(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    "A good client, a client of noise, and a fair server."
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 40, (50, 4), generator=g)
    one_hot = F.one_hot(labels, 40).float()
    skill = {"server": 4.0, "good": 5.0, "noise": 0.0}
    return {n: s * one_hot + torch.randn(50, 4, 40, generator=g) for n, s in skill.items()}, labels


@pytest.mark.parametrize("seed", range(3))
def test_a_false_low_loss_is_selected_and_the_defence_stops_it(seed: int):
    "METHODS 9.9.8."
    models, labels = poisoned(seed)
    mean = {n: (item_nll(z, labels)[0] / 4).numpy() for n, z in models.items()}
    honest = np.stack([mean["good"], mean["noise"]])
    assert not (dual_min_ce(honest, mean["server"]).teacher == 1).any()

    reported = np.stack([mean["good"], np.full(50, 1e-6)])
    assert (dual_min_ce(reported, mean["server"]).teacher == 1).mean() > 0.9
    checked = [check_losses(top_k(models[n], 8), labels, r, 40) for n, r in zip(("good", "noise"), reported,
                                                                                 strict=True)]
    assert [int(c.lied.sum()) for c in checked] == [0, 50]
    verified = dual_min_ce(np.stack([c.losses for c in checked]), mean["server"])
    assert not (verified.teacher == 1).any() and (verified.teacher == 0).sum() > 25


def test_a_report_that_is_no_number_is_a_lie():
    models, labels = poisoned(0)
    checked = check_losses(top_k(models["good"], 8), labels, np.full(50, np.nan), 40)
    assert checked.lied.all() and np.isfinite(checked.losses).all()
    with pytest.raises(ValueError, match="without a target"):
        check_losses(top_k(models["good"], 8), torch.full_like(labels, IGNORED), np.zeros(50), 40)
