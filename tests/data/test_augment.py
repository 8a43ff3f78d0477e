"""Augmentations against torchvision: every operation and magnitude by bytes, methods on the same draws."""

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data import augment as page
from fedmpqkd.data.augment import (
    AUGMENTATIONS,
    GEOMETRY,
    OPERATIONS,
    SEVEN,
    SoftLabels,
    apply_chain,
    apply_cutmix,
    apply_erasing,
    apply_mixup,
    apply_operations,
    augment,
    augmentation_steps,
    draw_augmix,
    draw_autoaugment,
    draw_cutmix,
    draw_erasing,
    draw_mixup,
    draw_random,
)
from fedmpqkd.data.images import crop_flip, draw_views, pad_images

torch.set_num_threads(1)
SIZE = (32, 32)
REFERENCE = v2.RandAugment()
METHODS = {"randaugment": v2.RandAugment(), "trivialaugment": v2.TrivialAugmentWide()}
BINS = {v2.RandAugment: 31, v2.TrivialAugmentWide: 31, v2.AutoAugment: 10, v2.AugMix: 10}
few = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    "Colour images with smooth parts, noise, flat parts and both ends of the scale: uint8 [96, 3, 32, 32]."
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(96, 3, 5, 5, generator=g) * 300 - 20
    smooth = F.interpolate(coarse, (32, 32), mode="bilinear")
    noise = torch.randn(96, 3, 32, 32, generator=g) * torch.linspace(0, 40, 96)[:, None, None, None]
    x = (smooth + noise).clamp(0, 255).to(torch.uint8)
    x[0], x[1, 0] = 77, 0  # a grey image, and one without red: nothing to stretch
    x[2, :, :, 16:] = 255
    x[3] = torch.arange(32, dtype=torch.uint8) // 16 * 255  # black and white
    return x


def one(image: torch.Tensor, operation: str, magnitude: float, mode: str = "nearest") -> torch.Tensor:
    "torchvision's operation on one image."
    return REFERENCE._apply_image_or_video_transform(image, operation, magnitude, mode, REFERENCE._fill)


def all_magnitudes(operation: str) -> list[float]:
    "Every magnitude that any of the methods can draw."
    found = {0.0}
    for method, bins in BINS.items():
        make, signed = method._AUGMENTATION_SPACE.get(operation, (lambda *_: None, False))
        values = make(bins, *SIZE)
        for m in [] if values is None else values.tolist(): found |= {m, -m} if signed else {m}
    return sorted(found)


# --- operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_and_magnitude_is_torchvisions(images, operation, mode):
    "Different magnitudes within one batch; every byte."
    if mode == "bilinear" and operation not in GEOMETRY: pytest.skip("has no geometry")
    magnitudes = all_magnitudes(operation)
    x = images.contiguous(memory_format=torch.channels_last)
    for start in range(0, len(magnitudes), len(x)):
        part = magnitudes[start:start + len(x)]
        chosen = x[torch.arange(len(part)) * 7 % len(x)]
        got = apply_operations(chosen, torch.full((len(part),), OPERATIONS.index(operation)),
                               torch.tensor(part, dtype=torch.float64), mode)
        want = torch.stack([one(image, operation, m, mode) for image, m in zip(chosen, part, strict=True)])
        assert torch.equal(got, want)


def test_the_special_images(images):
    "Flat channels, black and white: where autocontrast and equalise divide by nothing."
    for name in ("AutoContrast", "Equalize", "Contrast", "Sharpness", "Invert"):
        number, half = torch.full((4,), OPERATIONS.index(name)), torch.full((4,), 0.5, dtype=torch.float64)
        got = apply_operations(images[:4], number, half)
        assert torch.equal(got, torch.stack([one(image, name, 0.5) for image in images[:4]]))


def test_an_image_does_not_depend_on_its_batch(images):
    g = torch_rng(3, "noise")
    operation, magnitude = draw_random(96, SIZE, g, v2.TrivialAugmentWide._AUGMENTATION_SPACE, 2)
    whole = apply_chain(images, operation, magnitude)
    singles = zip(images.split(1), operation.split(1), magnitude.split(1), strict=True)
    assert torch.equal(whole, torch.cat([apply_chain(*single) for single in singles]))


def test_the_input_is_left_alone_and_the_memory_format_stays(images):
    for x in (images.clone(), images.contiguous(memory_format=torch.channels_last)):
        before = x.clone()
        for name in AUGMENTATIONS:
            out, _ = augment(x, torch.zeros(len(x), dtype=torch.int64), name, torch_rng(0, "noise"))
            assert torch.equal(x, before) and out.dtype == torch.uint8 and out.shape == x.shape
            assert out.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(
                memory_format=torch.channels_last), name


def test_other_sizes_than_square():
    x = torch.arange(2 * 3 * 20 * 28).mul(37).remainder(256).to(torch.uint8).view(2, 3, 20, 28)
    for name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        for m in (7.0, -0.2):
            got = apply_operations(x, torch.full((2,), OPERATIONS.index(name)), torch.full((2,), m).double())
            assert torch.equal(got, torch.stack([one(image, name, m) for image in x])), (name, m)


# --- whole methods, with torchvision's random numbers replaced by ours --------------------------------------


class Tape:
    "Answers torchvision's calls for random numbers from a list."

    def __init__(self, monkeypatch, numbers):
        self.numbers = deque(numbers)
        monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor(self.numbers.popleft()))
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(self.numbers.popleft()))


def wanted(method, operation: int, magnitude: float, bins: int) -> tuple[int, int, list[float]]:
    "Row, bin and coin with which torchvision arrives at an operation and a signed magnitude."
    space = method._AUGMENTATION_SPACE
    row = list(space).index(OPERATIONS[operation])
    make, signed = space[OPERATIONS[operation]]
    values = make(bins, *SIZE)
    if values is None: return row, -1, []
    found = [i for i, v in enumerate(values.tolist()) if abs(magnitude) == v]
    assert found, "a magnitude that torchvision does not have"
    return row, found[0], [0.2 if math.copysign(1, magnitude) < 0 else 0.8] if signed else []


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_random_methods_are_torchvisions_on_the_same_draws(images, monkeypatch, name):
    method = METHODS[name]
    step, = augmentation_steps(name)
    operation, magnitude = step.draw(len(images), SIZE, torch_rng(1, "noise"))
    got = step.apply(images, operation, magnitude)
    for i, image in enumerate(images):
        numbers: list[float] = []
        for o, m in zip(operation[i].tolist(), magnitude[i].tolist(), strict=True):
            row, bin, coin = wanted(method, o, m, 31)
            if name == "randaugment": assert bin in (9, -1) or OPERATIONS[o] == "Posterize"
            numbers += [row] + ([bin] if name == "trivialaugment" and bin >= 0 else []) + coin
        with monkeypatch.context() as patch:
            tape = Tape(patch, numbers)
            assert torch.equal(got[i], method(image))
        assert not tape.numbers


@pytest.mark.parametrize("policy", list(v2.AutoAugmentPolicy))
def test_autoaugment_is_torchvisions_on_the_same_draws(images, monkeypatch, policy):
    method = v2.AutoAugment(policy)
    operation, magnitude = draw_autoaugment(len(images), SIZE, torch_rng(2, "noise"), policy)
    got = apply_chain(images, operation, magnitude)
    chances = {tuple(n for n, _, _ in pair) for pair in method._policies}
    compared = 0
    for i, image in enumerate(images):
        names = [OPERATIONS[o] for o in operation[i].tolist()]
        fits = [(k, pair) for k, pair in enumerate(method._policies)
                if all(n in (o[0], "Identity") for n, o in zip(names, pair, strict=True))
                and all(n == "Identity" or o[2] is None or _has(method, o, float(m)) for n, o, m in
                        zip(names, pair, magnitude[i], strict=True))]
        assert fits, (names, chances)
        number, pair = fits[0]
        numbers: list[float] = [number]
        for n, m in zip(names, magnitude[i].tolist(), strict=True):
            numbers += [1.5 if n == "Identity" else -0.5]  # the coin against its probability
            if n != "Identity" and method._AUGMENTATION_SPACE[n][1]:
                numbers += [0.2 if math.copysign(1, m) < 0 else 0.8]
        with monkeypatch.context() as patch:
            tape = Tape(patch, numbers)
            assert torch.equal(got[i], method(image))
        assert not tape.numbers
        compared += 1
    assert compared == len(images)


def _has(method, step, magnitude: float) -> bool:
    "Is this the magnitude of a step of the policy?"
    return abs(magnitude) == abs(float(method._AUGMENTATION_SPACE[step[0]][0](10, *SIZE)[step[2]]))


def test_augmix_is_torchvisions_on_the_same_draws(images, monkeypatch):
    method = v2.AugMix()
    operation, magnitude, weights = draw_augmix(len(images), SIZE, torch_rng(5, "noise"))
    got = page.apply_augmix(images, operation, magnitude, weights)
    for i, image in enumerate(images):
        numbers: list[float] = []
        for chain, strengths in zip(operation[i].tolist(), magnitude[i].tolist(), strict=True):
            depth = sum(o > 0 for o in chain)
            assert depth >= 1 and all(o > 0 for o in chain[:depth])
            numbers.append(depth)
            for o, m in zip(chain[:depth], strengths, strict=False):
                row, bin, coin = wanted(method, o, m, 10)
                numbers += [row] + ([bin] if bin >= 0 else []) + coin
        own, parts = weights[i, :1], weights[i, 1:]
        drawn = deque([torch.cat([own, torch.ones(1)])[None], parts[None]])  # the product is ours
        with monkeypatch.context() as patch:
            tape = Tape(patch, numbers)
            patch.setattr(method, "_sample_dirichlet", lambda p, drawn=drawn: drawn.popleft())
            assert torch.equal(got[i], method(image))
        assert not tape.numbers


def test_erasing_is_torchvisions_on_the_same_draws(images):
    box, = draw_erasing(96, SIZE, torch_rng(0, "noise"))
    got = apply_erasing(images, box)
    for image, out, (top, left, bottom, right) in zip(images, got, box.tolist(), strict=True):
        assert torch.equal(out, VF.erase(image, top, left, bottom - top, right - left, torch.zeros(3, 1, 1)))


def test_erasing_draws_torchvisions_rectangles():
    "Two samples of 6,000: means and quantiles of height, width, area and corner agree within their noise."
    box, = draw_erasing(12_000, SIZE, torch_rng(1, "noise"))
    mine = box[(box[:, 2] > box[:, 0])]
    assert abs(len(mine) / 12_000 - 0.5) < 0.02
    torch.manual_seed(0)
    method, image = v2.RandomErasing(p=1.0), torch.zeros(3, *SIZE)
    drawn = [method.make_params([image]) for _ in range(6000)]
    theirs = torch.tensor([[d["i"], d["j"], d["i"] + d["h"], d["j"] + d["w"]] for d in drawn])
    corners = mine.double(), theirs.double()
    sides = [c[:, 2:] - c[:, :2] for c in corners]
    for a, b in (corners, sides):
        error = ((a.var(0) / len(a) + b.var(0) / len(b)).sqrt() * 4.5)
        assert ((a.mean(0) - b.mean(0)).abs() < error).all()
        assert ((a.quantile(0.9, 0) - b.quantile(0.9, 0)).abs() <= 1).all()


def test_mixup_is_torchvisions_up_to_rounding(images):
    weight, = draw_mixup(96, SIZE, torch_rng(0, "noise"))
    y = torch.arange(96) % 10
    method = v2.MixUp(num_classes=10)
    method.make_params = lambda _: dict(lam=float(weight[0]))
    want, target = method(images.float(), y)
    assert (apply_mixup(images, weight) - want).abs().max() <= 0.5 + 1e-4
    labels = SoftLabels(y, y.roll(1), weight.float())
    torch.testing.assert_close(labels.dense(10), target)


def test_cutmix_is_torchvisions_on_the_same_draws(images, monkeypatch):
    method, y = v2.CutMix(num_classes=10), torch.arange(96) % 10
    for seed in range(20):
        g, twin = torch_rng(seed, "noise"), torch_rng(seed, "noise")
        box, weight = draw_cutmix(96, SIZE, g)
        share = page.draw_lambda(1, twin, 1.0, False)
        row, column = (torch.randint(32, (1,), generator=twin) for _ in range(2))
        monkeypatch.setattr(method._dist, "sample", lambda _, share=share: share.clone())
        with monkeypatch.context() as patch:
            Tape(patch, [[int(column)], [int(row)]])
            want, target = method(images, y)
        assert torch.equal(apply_cutmix(images, box, weight), want)
        torch.testing.assert_close(SoftLabels(y, y.roll(1), weight.float()).dense(10), target)


# --- randomness, labels, names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "trivialaugment+cutmix"])
def test_named_randomness(images, name):
    "The caller's generator decides all; the global one is neither used nor moved."
    y = torch.arange(96) % 10
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, _ = augment(images, y, name, torch_rng(0, "noise"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, _ = augment(images, y, name, torch_rng(0, "noise"))
    other, _ = augment(images, y, name, torch_rng(1, "noise"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_draws_are_one_row_for_each_image():
    "So that an epoch's draws can be sliced; `each` gives every image its own weight."
    for name, step in AUGMENTATIONS.items():
        for n in (1, 5):
            assert all(len(t) == n for t in step.draw(n, SIZE, torch_rng(0, "noise"))), name
    box, weight = draw_cutmix(50, SIZE, torch_rng(0, "noise"), each=True)
    assert len(weight.unique()) > 30
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert torch.equal(weight, 1 - area.double() / 1024)


@few
@given(st.integers(0, 10**6), st.sampled_from(["mixup", "cutmix"]), st.booleans())
def test_soft_labels_are_distributions(seed, name, each):
    step = AUGMENTATIONS[name]
    weight = step.draw(7, SIZE, torch_rng(seed, "noise"))[-1]
    y = torch.randint(4, (7,), generator=torch_rng(seed, "loader"))
    soft = SoftLabels(y, y.roll(1), weight.float())
    dense = soft.dense(4)
    assert (dense >= 0).all() and torch.allclose(dense.sum(1), torch.ones(7))
    logits = torch.randn(7, 4, generator=torch_rng(seed, "loader"))
    by_hand = (soft.weight * F.cross_entropy(logits, y, reduction="none")
               + (1 - soft.weight) * F.cross_entropy(logits, y.roll(1), reduction="none")).mean()
    torch.testing.assert_close(F.cross_entropy(logits, dense), by_hand)
    assert torch.equal(soft[2:5].dense(4), dense[2:5]) and len(soft[:3]) == 3


def test_weight_one_changes_nothing(images):
    one = torch.ones(96, dtype=torch.float64)
    assert torch.equal(apply_mixup(images, one), images)
    assert torch.equal(apply_cutmix(images, torch.zeros(96, 4, dtype=torch.int64), one), images)


def test_names():
    assert len(SEVEN) == 7 and "none" not in AUGMENTATIONS and not any(AUGMENTATIONS[n].mixes for n in SEVEN)
    assert augmentation_steps("none") == []
    for bad in ("", "rand", "None", "cutmix+mixup", "trivialaugment+none", "mixup+"):
        with pytest.raises(ValueError, match="augmentation"): augmentation_steps(bad)


def test_nothing_to_augment():
    empty, none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    for name in AUGMENTATIONS: assert len(augment(empty, none, name, torch_rng(0, "noise"))[0]) == 0


def test_none_is_the_base(images):
    "Crop and mirror come before; 'none' adds nothing and draws nothing."
    g = torch_rng(0, "loader")
    x = crop_flip(pad_images(images), torch.arange(96), *draw_views(96, g))
    before = g.get_state()
    out, y = augment(x, torch.arange(96), "none", g)
    assert out is x and torch.equal(g.get_state(), before) and torch.equal(y, torch.arange(96))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_device_agrees(images, name):
    y = torch.arange(96) % 10
    here, _ = augment(images, y, name, torch_rng(0, "noise"))
    there, _ = augment(images.cuda(), y.cuda(), name, torch_rng(0, "noise"))
    apart = (here.int() - there.cpu().int()).abs()
    assert (apart > 0).float().mean() < 0.01, "beyond ties of rounding"
