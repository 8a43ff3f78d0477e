"""What tests of attacks, corruptions and trials share: pieces of photographs, a small network, its pool."""
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from fedmpqkd.data.images import Dataset, from_tensors, normalize
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.pool import WorkerPool
from fedmpqkd.learn.vision import VisionTask
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.quantize import fake_quantize


@cache
def photographs() -> torch.Tensor:
    "Pieces of two real photographs, uint8 [120, 3, 32, 32]."
    pieces = []
    for image in load_sample_images().images:
        half = image[:426, :640].reshape(213, 2, 320, 2, 3).mean((1, 3)).astype(np.uint8)
        cut = torch.from_numpy(half[:192]).unfold(0, 32, 32).unfold(1, 32, 32)
        pieces.append(cut.reshape(-1, 3, 32, 32))
    return torch.cat(pieces)


@cache
def dataset() -> Dataset:
    "The pieces as a data set of four classes: 120 for training, 80 for testing."
    x, y = photographs(), torch.arange(120) % 4
    return from_tensors('pieces', x, y, x[:80], y[:80])


def small(classes: int, act=torch.nn.ReLU) -> torch.nn.Module:
    "Two convolutions: enough for every question asked here."
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, bias=False), torch.nn.BatchNorm2d(8), act(),
        torch.nn.Conv2d(8, 16, 3, 2, bias=False), torch.nn.BatchNorm2d(16), act(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, classes))


def pool_of(data: Dataset, workers: int, act_bits: int = 32, seed: int = 0) -> WorkerPool:
    "Workers with the small network."
    register_model('small', small)
    config = make_config('fedmpq', model='small', act_bits=act_bits, seed=seed)
    return WorkerPool(config, VisionTask(data), workers=workers)


def states_of(pool: WorkerPool, data: Dataset) -> dict[str, dict[str, torch.Tensor]]:
    "A network after some steps on the data, and its 4-bit form."
    replica, (x, y) = pool.replica, (normalize(data.train_x, data.mean, data.std), data.train_y)
    optimizer = torch.optim.SGD(replica.model.parameters(), 0.05, 0.9)
    for _ in range(20):
        replica.model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(replica.model(x), y).backward()
        optimizer.step()

    fp = {n: t.detach().clone() for n, t in replica.state.items()}
    return dict(deployed=fp | {n: fake_quantize(fp[n], 4) for n in replica.layout.quantized}, fp=fp)
