"""Clients with different budgets: every number of the summary is that of each client's own model."""
import numpy as np
import pytest
import torch

from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.evaluation import validate
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.pool import evaluate, predict
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import bits_used, dispersion, play, summarize
from fedmpqkd.federation.server import deployed
from fedmpqkd.models.vision import build_model

FIELDS = dict(model='resnet8', clients=4, rounds=4, dirichlet=0.5, lr=0.1, batch_size=16, eval_images=0,
              validation=0.1, seed=2)
BUDGETS = (1.0, 2.0, 2.0, 6.0)


@pytest.fixture(scope='module')
def mixed():
    data = load_dataset('digits').subset(train=400, test=200)
    run, curve = open_run(make_config('fedmpq', bits=BUDGETS, **FIELDS), data, workers=1), []
    play(run, curve)
    yield run, curve
    run.pool.close()


def models(run): return [deployed(run.server, b) for b in BUDGETS]


def test_validation_is_that_of_own_budgets(mixed):
    run, _ = mixed
    labels = run.pool.task.train_targets.cpu()[run.validation]
    right = [float((predict(run.pool, state, run.validation, train=True).argmax(1) == labels)
                   .float().mean()) for state in models(run)]
    assert validate(run) == pytest.approx(100 * np.mean(right)) and len(set(right)) > 1


def test_dispersion_is_that_of_own_budgets(mixed):
    run, curve = mixed
    labels, everything = run.pool.task.true_labels.cpu().numpy(), torch.arange(200)
    local = []
    for k, state in enumerate(models(run)):
        by_class = np.array(evaluate(run.pool, state, everything)['per_class'])
        local.append(by_class[labels[run.partition.parts[k]]].mean())
    found = dispersion(run, curve[-1])
    assert found['mean'] == pytest.approx(np.mean(local))
    assert found['std'] in (pytest.approx(np.std(local)), pytest.approx(np.std(local, ddof=1)))
    largest = dispersion(run, dict(per_class=evaluate(run.pool, models(run)[-1], everything)['per_class']))
    assert largest['std'] != pytest.approx(found['std'])


def test_fresh_statistics_are_those_of_own_budgets(mixed):
    run, curve = mixed
    net, right = build_model('resnet8', 10), []
    for state in models(run):
        net.load_state_dict(state | {n: t for n, t in net.state_dict().items() if n not in state})
        for m in net.modules():
            if not isinstance(m, torch.nn.BatchNorm2d): continue
            m.reset_running_stats()
            m.momentum = None
        net.train()
        for index in torch.arange(len(run.pool.task.labels)).split(125):
            if len(index) > 1: net(run.pool.task.plain(index)[0])
        fresh = {n: t.clone() for n, t in net.state_dict().items()}
        right.append(evaluate(run.pool, fresh, torch.arange(200))['accuracy'])
    found = summarize(run, curve)
    assert found['accuracy_recalibrated'] == pytest.approx(np.mean(right), abs=0.6)


def test_the_summary_tells_the_bits(mixed):
    run, curve = mixed
    found, net = bits_used(run), build_model('resnet8', 10)
    everything = sum(p.numel() for p in net.parameters())
    assert found['quantised_share'] == pytest.approx(sum(run.pool.replica.layout.sizes()) / everything)
    assert 2.0 < found['bits_mean'] <= np.mean(BUDGETS) + 1e-9
    assert summarize(run, curve)['quantised_share'] == found['quantised_share']


def test_one_budget_needs_no_second_column():
    data = load_dataset('digits').subset(train=100, test=60)
    run, curve = open_run(make_config('fedmpq', bits=4, **FIELDS | dict(rounds=1)), data, workers=1), []
    play(run, curve)
    run.pool.close()
    assert 'per_class_deployed' not in curve[-1]
    full = open_run(make_config('fedavg', **FIELDS | dict(rounds=1)), data, workers=1)
    full.pool.close()
    assert bits_used(full) == dict(quantised_share=0.0)
