"A second task through the same loop: the next token of a synthetic language whose best perplexity is known."
import dataclasses
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.streams import torch_rng
from fedmpqkd.federation import pool
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run
from fedmpqkd.learn.task import IGNORED, Task, rows_of

TOKENS, LENGTH, SURE = 8, 12, 0.8  # the next token is the successor with probability 0.8, else any other
ENTROPY = -SURE * math.log(SURE) - (1 - SURE) * math.log((1 - SURE) / (TOKENS - 1))  # nats a token


@dataclasses.dataclass(frozen=True)
class Sentences:
    "Token sequences [N, LENGTH + 1], each with a dialect."
    name: str
    train: torch.Tensor
    test: torch.Tensor
    dialect: torch.Tensor  # int64 [N]: what a partition looks at

    @property
    def fingerprint(self) -> str: return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:12]


def speak(n: int, seed: int) -> torch.Tensor:
    "Sentences of a Markov chain."
    g = torch.Generator().manual_seed(seed)
    said = [torch.randint(TOKENS, (n,), generator=g)]
    for _ in range(LENGTH):
        wander = torch.randint(2, TOKENS + 1, (n,), generator=g)  # any token but the successor
        step = torch.where(torch.rand(n, generator=g) < SURE, 1, wander)
        said.append((said[-1] + step) % TOKENS)
    return torch.stack(said, 1)


class NextToken(nn.Module):
    "A bigram model with one hidden layer."
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(TOKENS, 16), nn.Linear(16, 32)
        self.head = nn.Linear(32, TOKENS)

    def forward(self, x): return self.head(torch.relu(self.hidden(self.embedding(x))))  # [B, T] -> [B, T, V]


class SequenceTask(Task):
    "Predict the next token; the first one of every sentence is not counted."
    metrics, headlines = ("accuracy", "nll", "perplexity"), ("perplexity",)

    def __init__(self, data: Sentences, device="cpu"):
        self.name, self.fingerprint, self.classes = data.name, data.fingerprint, 4
        self.device = torch.device(device)
        self.train_samples, self.test_samples = data.train.to(device), data.test.to(device)
        self.train_targets = self._targets(self.train_samples)
        self.test_targets = self._targets(self.test_samples)
        self.labels = self.true_labels = data.dialect.to(device)
        self.test_labels = torch.zeros(len(data.test), dtype=torch.int64)

    def _targets(self, tokens):
        found = tokens[:, 1:].clone()
        found[:, 0] = IGNORED
        return found

    def network(self, config: RunConfig) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=torch_rng(config.seed, "init"))))
            return NextToken()

    def epoch(self, n, batch_size, generator, min_batch=2):
        for part in torch.randperm(n, generator=generator).split(batch_size): yield (part,)

    def batch(self, index, *view): return self.plain(index)
    def plain(self, index): return self.inputs(self.train_samples[index]), self.train_targets[index]
    def inputs(self, samples): return samples[:, :-1]

    def loss(self, logits, targets, label_smoothing=0.0):
        return F.cross_entropy(*rows_of(logits, targets), label_smoothing=label_smoothing)

    def score(self, logits, targets):
        rows, labels = rows_of(logits, targets)
        nll = F.cross_entropy(rows, labels).item()
        return dict(accuracy=100 * float((rows.argmax(1) == labels).float().mean()), nll=nll, per_class=[],
                    perplexity=math.exp(nll), diverged=not math.isfinite(nll))


@pytest.fixture
def language(monkeypatch):
    monkeypatch.setitem(pool.TASKS, Sentences, SequenceTask)
    return Sentences("markov", speak(400, 0), speak(600, 1), torch.arange(400) % 4)


FIELDS = dict(clients=4, rounds=6, local_epochs=2, batch_size=20, lr=0.2, partition="dirichlet",
              dirichlet=1.0, eval_images=200, bits=4, kd_warmup_rounds=1)


@pytest.mark.parametrize("method, alpha, slack", [
    ("fedavg", 0.0, 1.03), ("fedmpq", 0.0, 1.1), ("fedmpq-kd", 0.5, 1.15)])
def test_a_language_is_learned_through_the_same_loop(language, method, alpha, slack):
    "No model can have a lower perplexity than exp(entropy) = 2.43 in the mean; guessing has 8."
    record = run(make_config(method, **FIELDS, alpha=alpha), language, workers=2)
    best, last = math.exp(ENTROPY), record["curve"][-1]
    assert best * 0.93 < record["summary"]["perplexity"] < TOKENS * 0.75
    assert best * 0.93 < last["perplexity"] < best * slack, last["perplexity"]
    assert last["accuracy"] == pytest.approx(100 * SURE, abs=4) and record["summary"]["dispersion"] == {}
    assert record["data"] == dict(
        name="markov", fingerprint=language.fingerprint, train=400, test=600, classes=4)
    assert not any("image" in key or "ece" in key for line in record["curve"] for key in line)
    if alpha: assert all((line["kd"] > 0) == (line["round"] > 1) for line in record["curve"])


def test_quantised_language_models_are_smaller_and_resume_does_not_matter(language):
    full = run(make_config("fedavg", **FIELDS | dict(rounds=1)), language, workers=1)
    few = run(make_config("fedmpq", **FIELDS | dict(rounds=1)), language, workers=2)
    assert few["summary"]["bytes_up"] < full["summary"]["bytes_up"] * 0.55  # the embedding stays in fp32
    again = run(make_config("fedmpq", **FIELDS | dict(rounds=1)), language, workers=1)
    assert [line["loss"] for line in again["curve"]] == [line["loss"] for line in few["curve"]]


def test_distillation_compares_row_by_row_without_padding():
    "Two positions of which one is padding: the divergence is that of the other alone."
    z, t = torch.zeros(1, 2, 3), torch.tensor([[1, IGNORED]])
    rows, labels = rows_of(z, t)
    assert rows.shape == (1, 3) and labels.tolist() == [1]


def test_labels_of_a_language_cannot_be_made_noisy(language):
    with pytest.raises(ValueError, match="the labels of markov cannot be changed"):
        run(make_config("fedavg", **FIELDS, label_noise=0.5), language, workers=1)
