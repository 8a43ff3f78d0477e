"""The metric of augmentations: hand numbers, identities, two passes, soft labels, exact federated sums."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data.augment import SEVEN, SoftLabels
from fedmpqkd.data.images import Dataset, load_dataset
from fedmpqkd.evaluate.augmentation import (
    Score,
    Sums,
    as_numbers,
    augmented_batches,
    bootstrap_error,
    choose,
    from_numbers,
    gather_sums,
    gcmi,
    log_prototypes,
    mean_vector_spread,
    measure,
    minimal_variance,
    no_sums,
    score,
    teacher_outputs,
)
from fedmpqkd.models.vision import build_model

torch.set_num_threads(1)
many = settings(max_examples=60, deadline=None, derandomize=True)

P = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]], dtype=torch.float64)
Y = torch.tensor([0, 0, 1, 1])
P3 = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
T3 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)


def sample(seed: int, n: int, classes: int, size: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    "Log-probabilities and labels."
    g = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return logits.log_softmax(1), torch.randint(classes, (n,), generator=g)


def by_definition(log_p: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    "CMI and DEV of METHODS 8.1 with numpy loops."
    p, labels = log_p.exp().numpy(), y.numpy()
    q = {c: p[labels == c].mean(0) for c in np.unique(labels)}
    cmi = np.mean([np.sum(row * np.log(row / q[c])) for row, c in zip(p, labels, strict=True)])
    return float(cmi), float(np.mean([-np.log(q[c][c]) for c in q]))


# --- hand numbers and identities ----------------------------------------------------------------------------


def test_the_worked_example():
    found = score(gather_sums(P.log(), Y))
    assert [found.cmi, found.dev, found.m] == pytest.approx([0.0282930, 0.2899092, 0.2616162], abs=5e-8)
    ce = float(-P.log()[torch.arange(4), Y].mean())
    assert ce == pytest.approx(0.2990012, abs=5e-8) and found.dev <= ce
    assert found.images == 4 and found.absent == 0 and math.isnan(found.error)


def test_the_worked_example_of_soft_labels_and_the_authors_transposed_einsum():
    sums = gather_sums(P3.log(), T3)
    log_q = log_prototypes(sums)
    assert log_q.exp().flatten().tolist() == pytest.approx([0.7333333, 0.2666667, 0.4, 0.6], abs=1e-6)
    assert float(gcmi(P3.log(), T3, log_q).mean()) == pytest.approx(0.0119838, abs=5e-8)
    assert score(sums).dev == pytest.approx(0.4104903, abs=5e-8)

    # as in the authors' code: probabilities by labels in place of labels by probabilities
    wrong = torch.einsum("bi,bj->ij", P3, T3) / T3.sum(0)[:, None]
    assert wrong.flatten().tolist() == pytest.approx([0.7333333, 0.4, 0.2666667, 0.6], abs=1e-6)
    mixed = T3 @ wrong
    bug = float((P3 * (P3.log() - mixed.log())).sum(1).mean())
    assert bug == pytest.approx(0.0314519, abs=5e-8)
    assert float(-wrong.diagonal().log().mean()) == pytest.approx(0.4104903, abs=5e-8)  # DEV cannot tell


@many
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 8), st.sampled_from([0.1, 2.0, 30.0]))
def test_identities(seed, n, classes, size):
    log_p, y = sample(seed, n, classes, size)
    sums = gather_sums(log_p, y)
    found = score(sums)
    cmi, dev = by_definition(log_p, y)
    assert found.cmi == pytest.approx(cmi, abs=1e-9) and found.dev == pytest.approx(dev, abs=1e-9)
    assert -1e-12 <= found.cmi <= math.log(classes) + 1e-12

    # Jensen-Shannon form: entropy of the prototype minus mean entropy of its images
    p = log_p.exp()
    entropy = torch.special.entr(p).sum(1)
    own = [y == c for c in y.unique().tolist()]
    gain = [torch.special.entr(p[o].mean(0)).sum() - entropy[o].mean() for o in own]
    parts = [(float(o.double().mean()), v) for o, v in zip(own, gain, strict=True)]
    assert found.cmi == pytest.approx(sum(w * float(v) for w, v in parts), abs=1e-9)
    balanced = score(sums, class_balanced=True)
    assert balanced.cmi == pytest.approx(float(torch.stack([v for _, v in parts]).mean()), abs=1e-9)
    assert balanced.dev == found.dev

    nll = -log_p[torch.arange(n), y]
    class_ce = float(torch.stack([nll[y == c].mean() for c in y.unique().tolist()]).mean())
    assert class_ce >= found.dev - 1e-12
    assert found.absent == classes - len(y.unique())

    # hard labels, three ways to write them
    dense = torch.nn.functional.one_hot(y, classes)
    soft = SoftLabels(y, y.roll(1), torch.ones(n))
    for targets in (y, dense, soft):
        again = gather_sums(log_p, targets)
        assert torch.allclose(again.mass, sums.mass)
        assert float(gcmi(log_p, targets, log_prototypes(again)).mean()) == pytest.approx(found.cmi, abs=1e-9)


def test_a_certain_teacher_says_nothing_beyond_the_label():
    y = torch.tensor([0, 1, 2, 1])
    log_p = torch.nn.functional.one_hot(y, 3).double().log()  # with -inf
    found = score(gather_sums(log_p, y))
    assert found.cmi == 0.0 and found.dev == pytest.approx(0.0, abs=1e-12)
    wrong = score(gather_sums(log_p.roll(1, 1), y))
    assert math.isfinite(wrong.m) and wrong.dev > 700 and wrong.cmi == pytest.approx(0.0, abs=1e-9)


def test_balanced_classes_need_no_balance():
    log_p, _ = sample(0, 40, 4)
    y = torch.arange(40) % 4
    sums = gather_sums(log_p, y)
    assert score(sums).cmi == pytest.approx(score(sums, class_balanced=True).cmi, abs=1e-12)
    with pytest.raises(ValueError, match="entropies of each class"): score(sums.total(), class_balanced=True)


@many
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 6))
def test_two_passes_by_definition(seed, n, classes):
    "Prototypes of one pass, divergences of the other."
    first, y = sample(seed, n, classes)
    second, _ = sample(seed + 1, n, classes)
    found = score(gather_sums(second, y), first=gather_sums(first, y))
    q = {c: first.exp()[y == c].mean(0) for c in y.unique().tolist()}
    pairs = zip(second, y.tolist(), strict=True)
    cmi = np.mean([float((row.exp() * (row - q[c].log())).sum()) for row, c in pairs])
    assert found.cmi == pytest.approx(cmi, abs=1e-9)
    assert found.dev == pytest.approx(np.mean([-float(q[c][c].log()) for c in q]), abs=1e-9)


# --- sums of parts ------------------------------------------------------------------------------------------


@many
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(2, 10), st.integers(1, 12), st.booleans())
def test_any_partition_gives_the_central_value(seed, n, classes, clients, class_balanced):
    "Single-precision messages; clients without images, and classes that most of them lack."
    log_p, y = sample(seed, n, classes, size=3.0)
    y = y.sort().values if seed % 2 else y
    owner = torch.randint(clients, (n,), generator=torch.Generator().manual_seed(seed)).sort().values
    received = no_sums(classes)
    for k in range(clients):
        message = as_numbers(gather_sums(log_p[owner == k], y[owner == k]), class_balanced)
        assert message.dtype == torch.float32 and torch.isfinite(message).all()
        assert len(message) == classes**2 + classes + (classes if class_balanced else 1)
        received = received + from_numbers(message, classes, class_balanced)
    central = score(gather_sums(log_p, y), class_balanced=class_balanced)
    found = score(received, class_balanced=class_balanced)
    assert [found.cmi, found.dev] == pytest.approx([central.cmi, central.dev], abs=1e-6)
    assert found.absent == central.absent and math.isfinite(found.m)


def test_ten_clients_of_a_hundred_classes_to_a_millionth():
    "The size of an experiment: 50,000 images, single-precision sums."
    log_p, y = sample(5, 50_000, 100, size=2.5)
    order = y.argsort()
    received = no_sums(100)
    for part in order.tensor_split(10): received = received + from_numbers(
        as_numbers(gather_sums(log_p[part], y[part])), 100)
    message = as_numbers(received)
    assert message.numel() * message.element_size() == 40_404  # bytes
    assert score(received).m == pytest.approx(score(gather_sums(log_p, y)).m, abs=1e-6)


def test_messages_that_cannot_be_sums():
    good = as_numbers(gather_sums(P.log(), Y))
    assert from_numbers(good, 2).count.tolist() == [2, 2]
    for change in ((0, math.nan), (0, -1.0), (0, 5.0), (4, -2.0), (5, math.inf), (6, 1.0)):
        bad = good.clone()
        bad[change[0]] = change[1]
        with pytest.raises(ValueError, match="must be finite|do not add up"): from_numbers(bad, 2)
    for bad, classes in ((good[:-1], 2), (good, 3), (good.view(1, -1), 2)):
        with pytest.raises(ValueError, match="numbers expected"): from_numbers(bad, classes)
    with pytest.raises(ValueError, match="cannot be added"): no_sums(2) + no_sums(3)
    with pytest.raises(ValueError, match="no images"): score(no_sums(4))


def test_labels_of_another_number_of_classes():
    with pytest.raises(ValueError, match="labels"): gather_sums(P.log(), torch.ones(4, 3) / 3)


# --- the bootstrap ------------------------------------------------------------------------------------------


def test_the_bootstrap_is_the_plain_one():
    "The same images drawn, each replicate computed from its own images."
    log_p, y = sample(1, 50, 3)
    log_p = log_p.float()
    chosen = torch.randint(50, (30, 50), generator=torch.Generator().manual_seed(7))
    for balanced in (False, True):
        slow = [score(gather_sums(log_p[i], y[i]), class_balanced=balanced).m for i in chosen]
        assert bootstrap_error(log_p, y, 30, 7, balanced) == pytest.approx(np.std(slow, ddof=1), rel=1e-4)


def test_the_bootstrap_matches_the_spread_over_samples():
    "Standard error from one sample, against 200 independent samples of the same size."
    found = [score(gather_sums(*sample(k, 400, 4))).m for k in range(200)]
    one = np.mean([bootstrap_error(*sample(k, 400, 4), repeats=60) for k in range(8)])
    assert one == pytest.approx(np.std(found, ddof=1), rel=0.25)


# --- teachers and images ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(train=200, test=50)


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    "Some steps of training, so that it says something."
    model = build_model("resnet8", 10, seed=0).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(5):
        for x, y in augmented_batches(digits, "none", torch_rng(epoch, "loader"), 50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model


def test_measuring_leaves_the_teacher_alone(digits, teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    teacher.bn1.eval()
    measure(teacher, digits, "randaugment")
    assert teacher.training and not teacher.bn1.training and teacher.stages.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    teacher.train()


def test_measure_by_definition(digits, teacher):
    batches = augmented_batches(digits, "augmix", torch_rng(4, "noise"), 77)
    outputs = list(teacher_outputs(teacher, batches, 10))
    log_p, y = torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs])
    assert torch.equal(y, digits.train_y) and not log_p.requires_grad
    cmi, dev = by_definition(log_p.double(), y)
    found = measure(teacher, digits, "augmix", seed=4, batch_size=77)
    assert found.cmi == pytest.approx(cmi, abs=1e-8) and found.dev == pytest.approx(dev, abs=1e-8)


def test_nothing_drawn_means_nothing_changes(digits, teacher):
    "Without crops, mirrors and augmentation both passes are the same, and views add nothing."
    x, y = digits.train_x, digits.train_y
    batch = [(torch.nn.functional.avg_pool2d(x.float() / 255, 1), y)]
    a, b = (gather_sums(*next(teacher_outputs(teacher, batch, 10))) for _ in range(2))
    assert score(a) == score(b) or score(a).m == score(b).m
    assert score(a, first=b).m == pytest.approx(score(a).m, abs=1e-12)
    assert score(a + b).m == pytest.approx(score(a).m, abs=1e-12)


def test_passes_and_views(digits, teacher):
    one, again, two = (measure(teacher, digits, "trivialaugment", passes=p) for p in (1, 1, 2))
    assert one.m == again.m
    assert one.m != two.m and abs(one.m - two.m) < 0.5
    assert two.cmi > one.cmi, "prototypes of other draws are further away"
    views = measure(teacher, digits, "trivialaugment", views=3, repeats=30)
    single = measure(teacher, digits, "trivialaugment", repeats=30)
    assert views.images == 600 and 0 < views.error < single.error
    for bad in (dict(passes=3), dict(views=0)):
        with pytest.raises(ValueError): measure(teacher, digits, "none", **bad)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "trivialaugment+cutmix"])
@pytest.mark.parametrize("passes", [1, 2])
def test_soft_labels_by_definition(digits, teacher, name, passes):
    def outputs(number):
        g = torch_rng(0, "noise", round=number)
        found = list(teacher_outputs(teacher, augmented_batches(digits, name, g, 64), 10))
        dense = torch.cat([o[1].dense(10) for o in found])
        return torch.cat([o[0] for o in found]).double().exp(), dense.double()

    p, t = outputs(0)
    q_p, q_t = outputs(passes - 1)
    q = (q_t.T @ q_p) / q_t.sum(0)[:, None]
    want = (p * (p.log() - (t @ q).log())).sum(1).mean()
    found = measure(teacher, digits, name, passes=passes, batch_size=64)
    assert found.cmi == pytest.approx(float(want), abs=2e-5)  # probabilities are kept in half precision
    assert found.dev == pytest.approx(float(-q.diagonal().log().mean()), abs=1e-9)
    for bad in (dict(class_balanced=True), dict(repeats=9)):
        with pytest.raises(ValueError, match="hard labels"): measure(teacher, digits, name, **bad)


def test_stronger_augmentations_confuse_the_teacher(digits, teacher):
    """A positive control: the metric sees a difference. Only in cmi: this teacher's dev was larger with the
    augmentation on one processor and smaller on another (4.08 against 4.14 without)."""
    none, strong = (measure(teacher, digits, n) for n in ("none", "autoaugment-svhn"))
    assert strong.cmi > 1.5 * none.cmi


def test_crops_are_the_same_for_all_augmentations(digits):
    g, h = torch_rng(0, "noise"), torch_rng(0, "noise")
    plain = torch.cat([x for x, _ in augmented_batches(digits, "none", g)])
    erased = torch.cat([x for x, _ in augmented_batches(digits, "erasing", h)])
    same = (plain == erased).flatten(1).float().mean(1)
    assert (same == 1).float().mean() > 0.3 and (same > 0.5).all()


def test_wrong_teachers_and_names(digits):
    with pytest.raises(ValueError, match="7 outputs, the data 10 classes"):
        measure(build_model("resnet8", 7), digits, "none")
    with pytest.raises(ValueError, match="unknown augmentation 'rand'"):
        measure(build_model("resnet8", 10), digits, "rand")


def test_memory_is_that_of_one_augmentation(digits, teacher, monkeypatch):
    "What is kept is half precision, and only where it is needed."
    from fedmpqkd.evaluate import augmentation as page
    kept = []
    inner = page._one_pass

    def watch(outputs, classes, keep):
        found = inner(outputs, classes, keep)
        kept.append([p.dtype for p, _ in found[1]])
        return found

    monkeypatch.setattr(page, "_one_pass", watch)
    measure(teacher, digits, "none")
    measure(teacher, digits, "none", repeats=5)
    assert kept[0] == [] and set(kept[1]) == {torch.float16}


# --- the choice and the competitor --------------------------------------------------------------------------


def test_the_smallest_m_is_chosen():
    scores = {n: Score(cmi, dev, 1) for n, cmi, dev in (("a", 0.1, 0.5), ("b", 0.4, 0.6), ("c", 0.4, 0.6))}
    assert choose(scores) == "b"
    with pytest.raises(ValueError, match="c is not a finite"): choose(scores | {"c": Score(0.1, math.nan, 1)})
    with pytest.raises(ValueError, match="no augmentation"): choose({})


def test_minimal_variance(digits, teacher):
    vectors = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.6, 0.4]])
    assert mean_vector_spread(vectors) == pytest.approx(0.2)
    assert mean_vector_spread(vectors[:1].repeat(4, 1)) == 0
    with pytest.raises(ValueError, match="two epochs"): mean_vector_spread(vectors[:1])
    short = dict(epochs=3, batches=2, batch_size=50)
    first = minimal_variance(teacher, digits, "cutmix", **short)
    assert first > 0 and first == minimal_variance(teacher, digits, "cutmix", **short)
    assert first != minimal_variance(teacher, digits, "cutmix", seed=1, **short)


def test_all_candidates_can_be_measured(digits, teacher):
    found = {name: measure(teacher, digits, name) for name in ("none", *SEVEN)}
    assert len({s.m for s in found.values()}) == 8 and choose(found) in found


def test_sums_do_not_depend_on_batches():
    log_p, y = sample(3, 30, 4)
    whole = gather_sums(log_p, y)
    for size in (1, 7, 29):
        parts = [gather_sums(a, b) for a, b in zip(log_p.split(size), y.split(size), strict=True)]
        summed = sum(parts, no_sums(4))
        assert isinstance(summed, Sums) and score(summed).m == pytest.approx(score(whole).m, abs=1e-12)
    mixed = [a + b for a, b in itertools.permutations([whole, whole.total()])]
    assert all(len(s.entropy) == 1 for s in mixed)
