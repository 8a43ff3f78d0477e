"Token alignment against definitions in plain Python: the map, the path, the moved logits, the loss."
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.data.text import IGNORED, load_text, target_pairs, tokenise
from fedmpqkd.data.tokenizers import TOKENIZERS, Vocabulary, train_tokenizer, vocabulary_of
from fedmpqkd.learn.alignment import (
    UNIT,
    TopK,
    align,
    align_batches,
    cached_map,
    dtw,
    edit_distance,
    move_logits,
    nearest_texts,
    only_pairs,
    same_ends,
    soft_cross_entropy,
    soft_rows,
    span_costs,
    token_costs,
    top_k,
    vocabulary_map,
)

SOURCE = "we util ize the dynamic programming approach to align tokens".split()
TARGET = "we utilize the dynamic programming approach to align tokens".split()


@pytest.fixture(scope="module")
def trained():
    texts = [i.target for i in load_text(kind="text").train]
    return {kind: train_tokenizer(kind, texts, 384) for kind in TOKENIZERS}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("ab ", max_size=5), max_size=8), st.lists(st.text("abc ", max_size=6), max_size=12),
       st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_nearest_texts_is_the_minimum_over_all(texts, candidates, limit):
    "Smallest distance within the limit, then the smallest spelling, from all pairs."
    found = nearest_texts(texts, candidates, limit)
    for text in texts:
        if not text: continue
        near = [(edit_distance(text, c), c.replace(" ", "▁"), c) for c in candidates if c]
        near = [n for n in near if n[0] <= limit * max(len(text), len(n[2])) + 1e-9]
        assert found[text] == (min(near)[2] if near else None)


def test_nearest_texts_on_words():
    "More words than a block, longer than any 8-bit distance."
    g = np.random.default_rng(0)
    words = ["".join(g.choice(list("abcde"), n)) for n in g.integers(1, 9, 700)] + ["x" * 300]
    found = nearest_texts(words[:650] + ["x" * 290], words[::2], 1.0)
    for word in words[:60]:
        assert found[word] == min(words[::2], key=lambda c: (edit_distance(word, c), c))
    assert found["x" * 290] == "x" * 300


def test_map_by_hand():
    pieces = ["<s>", "</s>", "cut", "▁the", "<0x41>", "<0xC3>", "▁car", "qqqq", "<unk>"]
    a = Vocabulary.of(pieces, "piece", [0, 1, 8])
    b = Vocabulary.of(["<|endoftext|>", "cot", "cat", "A", "Ã", "Ġthe", "car", "Ġcat", "Ġ"], "byte", [0])
    assert vocabulary_map(a, b).tolist() == [0, 0, 2, 5, 3, 4, 6, -1, -1]
    assert vocabulary_map(a, b, 0).tolist() == [0, 0, -1, 5, 3, 4, -1, -1, -1]
    assert vocabulary_map(a, b, 1).tolist()[7] == 3  # 'A' is as near as 'car' and 'Ã'... and the smallest


def test_identity_for_equal_tokenizers(trained):
    "METHODS 9.9.1: map, path, distance and logits."
    pairs = target_pairs(load_text(kind="text").test) + [("", "Unknown: ☃ é.")]
    for one in trained.values():
        v = vocabulary_of(one)
        batch = tokenise(pairs, one, 128, v.role("bos"), v.role("eos"))
        partner = vocabulary_map(v, v)
        assert partner.tolist() == list(range(len(v)))
        for n, size in enumerate(batch.lengths.tolist()):
            ids, spans = batch.ids[n, :size].tolist(), batch.spans[n, :size].numpy()
            for cost, rule in (("norm", "one"), ("raw", "one"), ("norm", "ends")):
                found = align(ids, ids, v, v, (spans, spans), cost, rule)
                assert found.source.tolist() == list(range(size)) and found.distance == 0
            logits = top_k(torch.randn(size, len(v), generator=torch.Generator().manual_seed(n)), 7)
            moved = move_logits(logits, torch.arange(size), torch.from_numpy(partner), batch.labels[n, :size])
            assert torch.equal(moved.values, logits.values) and torch.equal(moved.index, logits.index)
            assert torch.allclose(moved.rest, logits.rest)


@pytest.mark.parametrize("cost, total, opposite", [
    ("norm", 1.0, "utilize"), ("raw", 5.0, "the"), ("offset", 1.0, "utilize")])
def test_the_papers_sentence(cost: str, total: float, opposite: str):
    if cost == "offset":
        ends = [np.cumsum([len(t) for t in tokens]) for tokens in (SOURCE, TARGET)]
        costs = span_costs(*(np.stack([e - [len(t) for t in tokens], e], 1)
                             for e, tokens in zip(ends, (SOURCE, TARGET), strict=True)))
    else: costs = token_costs(SOURCE, TARGET, cost)
    path, found = dtw(costs)
    assert found == total * UNIT
    assert {TARGET[j] for i, j in path if SOURCE[i] == "ize"} == {opposite}


def test_the_sentence_the_other_ways_cost():
    "1.095 for the path that the raw distance takes, and 7 for the intended one."
    for cost, intended, wrong in (("norm", 1.0, 3 / 7 + 2 / 3), ("raw", 7, 5)):
        c = token_costs(SOURCE, TARGET, cost) / UNIT
        assert np.isclose(c[1, 1] + c[2, 1] + c[3, 2], intended)
        assert np.isclose(c[1, 1] + c[2, 2] + c[3, 2], wrong)


def monotone(n: int, m: int) -> list[list[tuple[int, int]]]:
    "All paths."
    if (n, m) == (1, 1): return [[(0, 0)]]
    before = ((n - 1, m - 1), (n - 1, m), (n, m - 1))
    return [p + [(n - 1, m - 1)] for i, j in before if i and j for p in monotone(i, j)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_dtw_against_all_paths(n, m, data):
    costs = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n * m, max_size=n * m))).reshape(n, m)
    path, total = dtw(costs)
    best = min(sum(costs[i, j] for i, j in p) for p in monotone(n, m))
    assert total == best == sum(costs[i, j] for i, j in path)
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [n - 1, m - 1]
    assert all(tuple(step) in {(1, 1), (1, 0), (0, 1)} for step in np.diff(path, axis=0).tolist())
    assert dtw(costs.T)[1] == total


def test_dtw_against_the_recurrence():
    g = np.random.default_rng(1)
    for n, m in ((1, 30), (30, 1), (17, 40), (40, 17), (25, 25)):
        costs = g.integers(0, 50, (n, m))
        table = np.full((n + 1, m + 1), 10**9)
        table[0, 0] = 0
        for i, j in itertools.product(range(1, n + 1), range(1, m + 1)):
            table[i, j] = costs[i - 1, j - 1] + min(table[i - 1, j - 1], table[i - 1, j], table[i, j - 1])
        assert dtw(costs)[1] == table[n, m]
    assert len(dtw(np.empty((0, 3), dtype=np.int64))[0]) == 0


def test_ties_go_diagonal_then_up_then_left():
    assert dtw(np.zeros((2, 2), dtype=np.int64))[0].tolist() == [[0, 0], [1, 1]]
    assert dtw(np.array([[0, 1], [1, 1]]))[0].tolist() == [[0, 0], [1, 1]]
    up = np.array([[0, 9, 9], [0, 9, 0], [0, 0, 0]])
    assert dtw(up)[0].tolist() == [[0, 0], [1, 0], [2, 1], [2, 2]]
    assert only_pairs(dtw(up)[0]).tolist() == [False, False, False, False]


def test_costs():
    assert token_costs(["", "ab"], ["", "a"], "norm").tolist() == [[0, UNIT], [UNIT, UNIT // 2]]
    assert token_costs(["ab"], ["abc", "x"], "raw").tolist() == [[UNIT, 2 * UNIT]]
    with pytest.raises(ValueError, match="cost is 'norm' or 'raw'"): token_costs(["a"], ["a"], "offset")
    costs = span_costs(np.array([[0, 2], [2, 2]]), np.array([[0, 2], [1, 4]]))
    assert costs.tolist() == [[0, UNIT - UNIT // 3], [UNIT, UNIT]]


def test_same_ends():
    a, b = np.array([[0, 3], [3, 4], [4, 5], [4, 5]]), np.array([[0, 2], [2, 4], [4, 5], [4, 5], [5, 6]])
    assert same_ends(a, b).tolist() == [-1, 1, 2, 3, -1]
    assert same_ends(a, b[[1, 2]]).tolist() == [1, 3]


def test_special_tokens_go_by_role():
    gpt = Vocabulary.of(["<|endoftext|>", "a", "b"], "plain", [0])
    llama = Vocabulary.of(["<s>", "</s>", "<pad>", "a", "b"], "plain", [0, 1, 2])
    assert align([0, 1, 2, 0], [0, 3, 4, 1, 2], gpt, llama).source.tolist() == [0, 1, 2, 3, -1]
    assert align([1, 2], [0, 3, 4, 1], gpt, llama).source.tolist() == [-1, 0, 1, -1]
    assert align([0], [0, 1], gpt, llama).source.tolist() == [0, -1]
    assert align([], [3], gpt, llama).source.tolist() == [-1]
    for bad in ({"cost": "cosine"}, {"rule": "two"}, {"cost": "offset"}, {"rule": "ends"}):
        with pytest.raises(ValueError): align([1], [3], gpt, llama, **bad)


def test_ends_are_right_wherever_they_are_claimed(trained):
    "Decoded prefixes are equal, in characters."
    pairs = target_pairs(load_text(kind="text").test)
    batch = {kind: tokenise(pairs, one, 128) for kind, one in trained.items()}
    for a, b in itertools.permutations(("byte-bpe", "bpe", "bytes"), 2):
        va, vb = vocabulary_of(trained[a]), vocabulary_of(trained[b])
        source = align_batches(batch[a], batch[b], va, vb, rule="ends")
        assert (source >= 0).sum() > 0.4 * batch[b].lengths.sum()
        for n, j in torch.nonzero(source >= 0).tolist():
            i = int(source[n, j])
            left = "".join(va.texts[t] for t in batch[a].ids[n, :i + 1].tolist()).replace(" ", "")
            right = "".join(vb.texts[t] for t in batch[b].ids[n, :j + 1].tolist()).replace(" ", "")
            assert left == right
    with pytest.raises(ValueError, match="different texts"):
        align_batches(batch["bpe"], tokenise(pairs[:1], trained["bytes"], 128), va, vb)


def test_cached_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = (Vocabulary.of(tokens, "plain") for tokens in (["cat", "dog"], ["dog", "cot"]))
    assert cached_map(a, b, folder=tmp_path).tolist() == [1, 0]
    assert cached_map(a, b, 0.0, tmp_path).tolist() == [-1, 0]
    assert cached_map(b, a, folder=tmp_path).tolist() == [1, 0]
    assert len(list(tmp_path.glob("*.map"))) == 3
    for path in tmp_path.glob("*.map"): path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cached_map(a, b, folder=tmp_path).tolist() == [1, 0]
    assert "put aside" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert cached_map(a, b, folder=tmp_path / "file").tolist() == [1, 0]
    assert "cannot be written" in capsys.readouterr().out


def naive_move(values, index, rest, source, partner, labels):
    "One position at a time, with dictionaries: probabilities by token, and of the tail."
    out = []
    for s, label in zip(source, labels, strict=True):
        kept, tail = {}, np.exp(rest[s]) if rest is not None else 0.0
        if s >= 0:
            for z, n in zip(values[s], index[s], strict=True):
                if partner[n] >= 0 and partner[n] not in kept: kept[partner[n]] = np.exp(z)
                elif rest is not None: tail += np.exp(z)
        if not kept: kept, tail = {label: 1.0}, 0.0
        whole = sum(kept.values()) + tail
        out.append(({n: p / whole for n, p in kept.items()}, tail / whole))
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_moved_logits_against_dictionaries(seed: int, tail: bool):
    g = np.random.default_rng(seed)
    k, va, vb, s, t = g.integers(1, 6), 9, 5, 4, 6
    found = top_k(torch.from_numpy(g.normal(size=(s, va)) * 2), int(k), tail)
    partner, source, labels = g.integers(-1, vb, va), g.integers(-1, s, t), g.integers(0, vb, t)
    moved = move_logits(found, *(torch.from_numpy(x) for x in (source, partner, labels)))
    p, p_tail = moved.probabilities()
    rest = found.rest.numpy() if tail else None
    expected = naive_move(found.values.numpy(), found.index.numpy(), rest, source, partner, labels)
    for row in range(t):
        dense = torch.zeros(vb, dtype=p.dtype).scatter_add(0, moved.index[row], p[row])
        assert np.allclose(dense, [expected[row][0].get(n, 0) for n in range(vb)])
        assert np.isclose(p_tail[row], expected[row][1])


def test_the_fall_back_is_on_the_next_token(trained):
    "METHODS 9.4: on the label of the position, not on its own token."
    v = vocabulary_of(trained["bpe"])
    batch = tokenise([("", "Peas climb up a net.")], trained["bpe"], 64)
    found = top_k(torch.randn(3, len(v)), 2)
    nowhere = torch.full((batch.ids.shape[1],), -1)
    moved = move_logits(found, nowhere, torch.arange(len(v)), batch.labels[0])
    assert moved.index[:-1, 0].tolist() == batch.ids[0, 1:].tolist()
    assert (moved.probabilities()[0][:, 0] == 1).all()


def test_soft_cross_entropy_with_all_logits_is_dense():
    g = torch.Generator().manual_seed(0)
    z, teacher = (torch.randn(2, 4, 11, generator=g, dtype=torch.float64).float() for _ in range(2))
    z.requires_grad_()
    labels = torch.tensor([[1, 2, IGNORED, 4], [IGNORED, 0, 3, IGNORED]])
    for tail in (True, False):
        z.grad = None
        loss = soft_cross_entropy(z, top_k(teacher, 11, tail), labels)
        dense = F.cross_entropy(z[labels >= 0], teacher[labels >= 0].softmax(-1))
        assert torch.allclose(loss, dense, atol=1e-6)
        loss.backward()
        expected = (z.softmax(-1) - teacher.softmax(-1)).detach() / 5 * (labels >= 0)[..., None]
        assert torch.allclose(z.grad, expected, atol=1e-6)


def test_tail_is_one_more_class():
    "A dense loss over K + 1 classes, the last one being everything else."
    g = torch.Generator().manual_seed(1)
    z, teacher = torch.randn(6, 10, generator=g, requires_grad=True), torch.randn(6, 10, generator=g)
    target = top_k(teacher, 3)
    q, p = z.softmax(-1), teacher.softmax(-1)
    pick = target.index
    q4 = torch.cat([q.gather(1, pick), 1 - q.gather(1, pick).sum(1, keepdim=True)], 1)
    p4 = torch.cat([p.gather(1, pick), 1 - p.gather(1, pick).sum(1, keepdim=True)], 1)
    expected = -(p4 * q4.log()).sum(1)
    assert torch.allclose(soft_rows(z, target), expected, atol=1e-5)
    gradient = torch.autograd.grad(expected.sum(), z, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(soft_rows(z, target).sum(), z)[0], gradient, atol=1e-5)


def test_no_gradient_is_lost_or_undefined_in_corners():
    z = torch.zeros(2, 3, requires_grad=True)
    never = float("-inf")
    target = TopK(torch.tensor([[0, never]] * 2), torch.tensor([[1, 1], [2, 2]]), torch.full((2,), never))
    soft_cross_entropy(z, target, torch.tensor([1, 2])).backward()
    assert torch.allclose(z.grad, (z.softmax(-1) - F.one_hot(torch.tensor([1, 2]), 3)).detach() / 2)
    nothing = soft_cross_entropy(z, target, torch.full((2,), IGNORED))
    assert nothing.item() == 0 and nothing.requires_grad
    with pytest.raises(ValueError, match="k=4: there are 3 logits"): top_k(z, 4)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    for name in [m for m in sys.modules if m.startswith("rapidfuzz.")]: monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"^rapidfuzz is needed here: .*'fedmpqkd\[lm\]'$"):
        nearest_texts(["cat"], ["cot"])
    a = Vocabulary.of(["cat", "dog"], "plain")
    spans = np.array([[0, 3]])
    assert align([0], [0], a, a, (spans, spans), "offset").source.tolist() == [0]  # needs no distances


def test_first_partners_are_found_without_a_table_of_all_pairs():
    "Against the definition: an entry counts if it has a partner that no earlier entry of its row has."
    from fedmpqkd.learn.alignment import _first_of_each
    index = torch.randint(-1, 6, (50, 9), generator=torch.Generator().manual_seed(0))
    wanted = [[v >= 0 and v not in row[:n] for n, v in enumerate(row)] for row in index.tolist()]
    assert _first_of_each(index).tolist() == wanted
