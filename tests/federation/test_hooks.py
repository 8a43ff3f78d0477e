"Server rules, terms of clients, losses and aggregations by name: closed forms and others' formulas."

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from samples import dataset, small

from fedmpqkd.core.config import AGGREGATIONS, REGISTRIES, RunConfig, config_from
from fedmpqkd.core.journal import Journal
from fedmpqkd.core.streams import torch_rng
from fedmpqkd.core.usercode import import_file
from fedmpqkd.federation.methods import RECIPES, make_config, register_method, with_code
from fedmpqkd.federation.rounds import open_run, participants, run_round
from fedmpqkd.federation.run import run
from fedmpqkd.federation.serverrules import adam_rule, momentum_rule, register_server_rule
from fedmpqkd.learn.client import TERM, term_of
from fedmpqkd.learn.terms import ClientTerm, norm_entries, register_client_term, register_task_loss
from fedmpqkd.models.vision import register_model
from fedmpqkd.study.records import config_of

register_model('small', small)
TINY = dict(model='small', clients=3, rounds=3, batch_size=8, lr=0.05, dirichlet=2.0, eval_images=0)


@pytest.fixture(autouse=True)
def registries_as_they_were():
    "What a test registers is gone after it."
    saved = {field: dict(r) for field, r in REGISTRIES.items()} | {'recipes': dict(RECIPES)}
    yield
    for field, r in [*REGISTRIES.items(), ('recipes', RECIPES)]:
        r.clear()
        r.update(saved[field])


def trained(config: RunConfig, rounds: int):
    "The global model before and after each round, and the run."
    federation = open_run(config, dataset(), workers=1)
    states = [dict(federation.server.state)]
    for t in range(rounds):
        run_round(federation, t)
        states.append(dict(federation.server.state))
    federation.pool.close()
    return states, federation


def test_momentum_is_the_published_recursion_over_rounds():
    "Hsu et al. (2019) and Flower: v = beta v + (x - mean), x = x - lr v; the first v is the first gradient."
    config = make_config('fedavgm', **TINY, server_lr=0.7, server_momentum=0.6)
    states, federation = trained(config, 3)
    plain = dataclasses.replace(config, server_rule='average')
    name, velocity = federation.server.layout.quantized[0], None
    for t in range(3):  # the clients' mean of each round, from the same start, by a server that only averages
        other = open_run(plain, dataset(), workers=1)
        other.server.state = dict(states[t])
        run_round(other, t)
        other.pool.close()
        gradient = states[t][name] - other.server.state[name]
        velocity = gradient if velocity is None else 0.6 * velocity + gradient
        expected = states[t][name] - 0.7 * velocity
        torch.testing.assert_close(states[t + 1][name], expected, rtol=1e-5, atol=1e-6)
        buffer = federation.server.layout.buffers[0]
        assert torch.equal(states[t + 1][buffer], other.server.state[buffer])  # statistics are averaged


def test_adam_is_pytorchs_without_the_correction():
    "torch.optim.Adam divides by corrected moments; undo that, and its steps are Reddi et al.'s."
    g = torch.Generator().manual_seed(1)
    x, away = {'w': torch.randn(20, generator=g)}, torch.randn(6, 20, generator=g)
    config, memory = RunConfig(server_lr=0.3, server_momentum=0.8, server_beta2=0.95, server_tau=1e-12), {}
    theirs = torch.nn.Parameter(x['w'].clone())
    optimizer = torch.optim.Adam([theirs], lr=1.0, betas=(0.8, 0.95), eps=1e-12)
    for t, step in enumerate(away, start=1):
        optimizer.param_groups[0]['lr'] = 0.3 * (1 - 0.8**t) / (1 - 0.95**t) ** 0.5
        theirs.grad = -step
        optimizer.step()
        x = adam_rule(config, x, {'w': x['w'] + step}, memory)
        torch.testing.assert_close(x['w'], theirs.detach(), rtol=1e-4, atol=1e-6)


def test_flowers_rules_agree():
    "Where Flower is installed: its FedAvgM, number by number."
    flwr = pytest.importorskip('flwr.server.strategy')
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays

    x = np.array([1.0, -2.0, 3.0], dtype=np.float32)
    strategy = flwr.FedAvgM(initial_parameters=ndarrays_to_parameters([x]), server_learning_rate=0.5,
                            server_momentum=0.9)
    ours, memory = {'w': torch.from_numpy(x)}, {}
    config = RunConfig(server_lr=0.5, server_momentum=0.9)
    for t in range(1, 4):
        mean = ours['w'].numpy() * 0.8 + t
        reply = FitRes(Status(Code.OK, ''), ndarrays_to_parameters([mean]), 10, {})
        theirs, _ = strategy.aggregate_fit(t, [(None, reply)], [])
        ours = momentum_rule(config, ours, {'w': torch.from_numpy(mean)}, memory)
        np.testing.assert_allclose(parameters_to_ndarrays(theirs)[0], ours['w'].numpy(), rtol=1e-5)
        strategy.initial_parameters = theirs


def test_a_rule_survives_a_stop(tmp_path):
    "Its memory is part of the checkpoint: a run taken up after a stop ends like one that was not stopped."
    for method in ('fedavgm', 'fedadam', 'scaffold', 'fedbn'):
        config = make_config(method, **TINY)
        whole = run(config, dataset(), workers=1)
        journal = Journal(tmp_path, method, 'run', whole['id'])

        def pull_the_plug(line):
            if line['round'] == 2: raise KeyboardInterrupt

        pull_the_plug.resume = lambda done: None
        with pytest.raises(KeyboardInterrupt):
            run(config, dataset(), journal, workers=1, progress=pull_the_plug)
        resumed = run(config, dataset(), journal, workers=1)
        keys = 'accuracy', 'loss', 'bytes_up', 'bytes_down'
        assert [[line[k] for k in keys] for line in resumed['curve']] == [
            [line[k] for k in keys] for line in whole['curve']]
        assert resumed['summary'].get('accuracy_personal') == whole['summary'].get('accuracy_personal')


def naive_scaffold(federation, config, rounds):
    "SCAFFOLD as it is written down, on the networks alone: option II, weights by samples."
    task, replica, server = federation.pool.task, federation.pool.replica, federation.server
    parts = [torch.from_numpy(p) for p in federation.partition.parts]
    model, names = replica.model, [*replica.layout.quantized, *replica.layout.others]
    x = {n: t.clone() for n, t in server.state.items()}
    c = {n: torch.zeros_like(x[n]) for n in names}
    own = [{n: torch.zeros_like(x[n]) for n in names} for _ in parts]
    total = sum(map(len, parts))
    for t in range(rounds):
        chosen, _ = participants(config, [len(p) for p in parts], t)
        seen = sum(len(parts[k]) for k in chosen)
        new = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in x.items() if v.is_floating_point()}
        change = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in c.items()}
        for k in chosen:
            model.load_state_dict(x, strict=False)
            live, steps = dict(model.named_parameters()), 0
            g = torch_rng(config.seed, 'loader', t, k)
            for position, *view in task.epoch(len(parts[k]), config.batch_size, g, config.min_batch):
                a, b = task.batch(parts[k][position], *view)
                model.train()
                loss = F.cross_entropy(model(a), b)
                grads = torch.autograd.grad(loss, [live[n] for n in names])
                with torch.no_grad():
                    for n, d in zip(names, grads, strict=True): live[n] -= config.lr * (d - own[k][n] + c[n])
                steps += 1
            state = model.state_dict()
            for n in new: new[n] += len(parts[k]) / seen * state[n].double()
            for n in names:
                plus = own[k][n] - c[n] + (x[n] - state[n]) / (steps * config.lr)
                change[n] += len(parts[k]) / total * (plus - own[k][n]).double()
                own[k][n] = plus.clone()
        x = x | {n: v.float() for n, v in new.items()}
        c = {n: (c[n] + change[n]).float() for n in names}
    return x, c


def test_scaffold_is_scaffold():
    "Three rounds with two of three clients each, against the equations on plain networks."
    config = make_config('scaffold', **TINY, participation=0.67)
    states, federation = trained(config, 3)
    expected, control = naive_scaffold(open_run(config, dataset(), workers=1), config, 3)
    for n in federation.server.layout.quantized:
        torch.testing.assert_close(states[3][n], expected[n], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(federation.server.control[n], control[n], rtol=1e-2, atol=1e-4)
    assert max(t.abs().max() for t in control.values()) > 1e-3


def test_scaffold_pays_for_its_control_variates():
    "One fp32 number a parameter in both directions, and a head of six bytes and two a dimension for each."
    plain, drift = (run(make_config(m, **TINY, momentum=0), dataset(), workers=1)['summary']
                    for m in ('fedavg', 'scaffold'))
    numbers = sum(p.numel() for p in small(4).parameters())
    for way in ('bytes_up', 'bytes_down'):
        more = (drift[way] - plain[way]) / 9  # three clients, three rounds
        assert 4 * numbers < more < 4 * numbers + 20 * len(list(small(4).parameters()))


def test_a_straggler_forgets_its_control_variate():
    "It trained, but the server has not heard of it: the next round starts from what it knew before."
    config = make_config('scaffold', **TINY, dropout=0.4, dropout_stage='after_train')
    federation = open_run(config, dataset(), workers=1)
    _, failing = participants(config, [len(p) for p in federation.partition.parts], 0)
    run_round(federation, 0)
    federation.pool.close()
    assert failing and all(k not in federation.memories.last for k in failing)
    assert set(federation.memories.last) == {0, 1, 2} - failing


def test_normalisation_stays_at_home():
    "A client starts its second round with its own statistics, whatever the others' are."
    config = make_config('fedbn', **TINY)
    _, federation = trained(config, 1)
    names = norm_entries(federation.pool.replica.model)
    memories = [federation.memories.load(k, 1) for k in range(3)]
    assert all({n.removeprefix(TERM) for n in m} == set(names) for m in memories)
    means = [m[TERM + next(n for n in names if n.endswith('running_mean'))] for m in memories]
    assert not torch.equal(means[0], means[1])
    replica = federation.pool.replica
    replica.load(federation.server.state)
    term_of(replica, config, memories[1], {})
    for n in names: assert torch.equal(replica.model.state_dict()[n], memories[1][TERM + n])


def test_a_constant_gradient_moves_the_weights_by_itself():
    "A term whose gradient is 1, with lr 0.5 and no momentum, moves every weight by -0.5 a step."
    class Push(ClientTerm):
        def change_gradients(self):
            for p in self.local.parameters.values(): p.grad = torch.ones_like(p)

    register_client_term('push', Push)
    config = RunConfig(**TINY | dict(lr=0.5, momentum=0, client_term='push', aggregate='uniform'))
    states, federation = trained(config, 1)
    steps = [len(federation.partition.parts[k]) // 8 for k in range(3)]
    moved = states[0]['0.weight'] - states[1]['0.weight']
    floor = 0.5 * min(steps)
    assert (moved > floor * 0.9).all() and moved.std() < 1e-4


def test_an_aggregation_of_ones_own():
    "The example that readers copy: of 1, 2 and 9 the median is 2, whatever the clients weigh."
    import_file(ROOT / 'examples' / 'aggregation.py')
    average = AGGREGATIONS['median'].start('mean')
    for value, weight in ((1.0, 5.0), (2.0, 1.0), (9.0, 1.0)):
        average.add(dict(w=torch.full((2,), value), steps=torch.tensor(3)), weight)
    assert average.mean()['w'].tolist() == [2, 2] and average.mean()['steps'] == 3
    median, _ = trained(RunConfig(**TINY, aggregate='median'), 1)
    mean, _ = trained(RunConfig(**TINY), 1)
    assert not torch.equal(median[1]['0.weight'], mean[1]['0.weight'])
    assert with_code(RunConfig(**TINY, aggregate='median')).extension.startswith('model:')
    assert '+aggregate:' in with_code(RunConfig(**TINY, aggregate='median')).extension
    assert 'aggregate:' not in with_code(RunConfig(**TINY)).extension


def half(config, old, mean, memory): return {n: (old[n] + mean[n]) / 2 for n in old}


def third(config, old, mean, memory): return {n: old[n] + (mean[n] - old[n]) / 3 for n in old}


def test_a_rule_of_ones_own_and_its_successor():
    "Registered again, it is another run; half of the way is half of the way."
    register_server_rule('mine', half)
    register_method('mine', base='fedavg', server_rule='mine')
    first = make_config('mine', **TINY)
    whole, _ = trained(make_config('fedavg', **TINY), 1)
    states, _ = trained(first, 1)
    torch.testing.assert_close(states[1]['0.weight'], (whole[0]['0.weight'] + whole[1]['0.weight']) / 2)
    register_server_rule('mine', third)
    register_method('mine', base='fedavg', server_rule='mine')
    assert make_config('mine', **TINY).extension != first.extension
    broken = RunConfig(**TINY, server_rule='mine')
    REGISTRIES['server_rule']['mine'] = lambda config, old, mean, memory: {}
    with pytest.raises(ValueError, match='must return every parameter'): trained(broken, 1)


def test_a_record_is_read_without_the_plugin():
    "Names with a fingerprint are taken as they stand; an unknown name without one is refused."
    register_server_rule('mine', half)
    register_task_loss('mine', lambda z, y: F.cross_entropy(z, y, reduction='sum') / 100)
    register_method('lab', base='fedavg', server_rule='mine', task_loss='mine')
    record = json.loads(json.dumps(run(make_config('lab', **TINY), dataset(), workers=1)))
    for name in ('server_rule', 'task_loss'): del REGISTRIES[name]['mine']
    del RECIPES['lab']
    assert config_of(record).task_loss == 'mine'
    with pytest.raises(ValueError, match='allowed are average'): with_code(config_of(record))
    with pytest.raises(ValueError, match='task_loss'):
        config_from(record['config'] | dict(extension='', server_rule='average'))


@pytest.mark.parametrize('fields, why', [
    (dict(client_term='scaffold'), 'plain SGD'),
    (dict(client_term='scaffold', momentum=0, update='latent'), 'plain SGD'),
    (dict(server_rule='adam', aggregate='moshpit'), 'averages models'),
    (dict(server_rule='momentum', exchange='logits-only', public_images=10), 'averages models'),
    (dict(task_loss='unheard-of'), 'allowed are task'),
    (dict(client_term='unheard-of'), 'allowed are none, scaffold, local-norm'),
    (dict(server_beta2=1.0), 'server_beta2'),
])
def test_what_cannot_be_is_refused_at_the_door(fields, why):
    with pytest.raises(ValueError, match=why): RunConfig(**fields)


def test_a_network_without_normalisation_has_no_fedbn():
    register_model('bare', lambda classes: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3072, classes)))
    with pytest.raises(ValueError, match='no batch normalisation'):
        open_run(make_config('fedbn', **TINY | dict(model='bare')), dataset(), workers=1)


def test_a_loss_that_is_no_number_is_refused_before_training():
    register_task_loss('rows', lambda z, y: F.cross_entropy(z, y, reduction='none'))
    with pytest.raises(ValueError, match='one number'):
        open_run(RunConfig(**TINY, task_loss='rows'), dataset(), workers=1)
