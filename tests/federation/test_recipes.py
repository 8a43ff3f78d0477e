"""Every recipe runs, differs from its neighbour in what its name says, and computes its equation."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedmpqkd.core.config import RunConfig, run_id
from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import RECIPES, difference, make_config
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import play, run
from fedmpqkd.federation.server import Server, downlink, messages_for
from fedmpqkd.learn.client import ClientRound, local_round, prepare
from fedmpqkd.learn.replica import Clock, Replica
from fedmpqkd.learn.step import distillation, gradient_norm, local_step
from fedmpqkd.learn.teacher import refreshed
from fedmpqkd.learn.vision import VisionTask, image_task
from fedmpqkd.study import experiments
from fedmpqkd.study.experiments import EXPERIMENTS
from fedmpqkd.wire.format import decode, encode
from fedmpqkd.wire.messages import manifest_of

TINY = dict(model='resnet8', clients=2, rounds=2, dirichlet=1.0, lr=0.05, eval_images=0, public_images=24)


@pytest.fixture(scope='module')
def digits():
    return load_dataset('digits').subset(train=120, test=60)


def config_of(method: str, **more) -> RunConfig:
    return make_config(method, **TINY | ({} if 'alpha' in RECIPES[method] else dict(alpha=0.5)) | more)


@pytest.mark.parametrize('method', RECIPES)
def test_every_recipe_runs(method, digits):
    record = run(config_of(method), digits, workers=1)
    lines, summary = record['curve'], record['summary']
    assert [line['round'] for line in lines] == [1, 2] and not any(line['failed'] for line in lines)
    assert 0 <= summary['accuracy'] <= 100
    assert summary['bytes_up'] > 0
    assert np.isfinite([line['loss'] for line in lines]).all()
    if config_of(method).distils: assert lines[-1]['kd'] > 0


def test_recipes_are_distinct_runs():
    configs = [
        dataclasses.replace(config_of(m, local_epochs=2), method='x')  # in one, a teacher for an epoch is any
        for m in RECIPES
        if m not in ('aqfl', 'qat-uniform-bytes')
    ]  # qat-uniform with other bits
    assert len({run_id(c, '') for c in configs}) == len(configs)
    assert set(difference(config_of('aqfl', bits='2,4'), config_of('qat-uniform', bits='2,4'))) == {'method'}


@pytest.mark.parametrize(
    'name,fields',
    {
        'fedmpq-kd-reverse': {'kd_loss'},
        'fedmpq-kd-dist': {'kd_loss'},
        'fedmpq-kd-co': {'teacher_frozen'},
        'fedmpq-kd-batch': {'teacher_norm'},
        'fedmpq-kd-every5': {'teacher_refresh'},
        'fedmpq-kd-ratio': {'alpha_schedule'},
        'fedmpq-kd-agree': {'kd_gate'},
        'fedmpq-kd-delivered': {'teacher'},
        'fedmpq-kd-high': {'alpha'},
        'fedmpq-kd-sr': {'rounding_up', 'rounding_down'},
        'fedmpq-kd-plain': {'bit_lr', 'scale_update'},
        'fedmpq-kd-ternary': {'bits'},
    }.items(),
)
def test_an_ablation_is_what_its_name_says(name, fields):
    assert set(difference(config_of('fedmpq-kd'), config_of(name))) == fields | {'method'}


@pytest.mark.parametrize('experiment', ['exp1', 'exp2'])
def test_the_presets_name_recipes_that_exist(experiment):
    for values in EXPERIMENTS[experiment].presets.values():
        assert set(values['methods'].split(',')) <= set(RECIPES)


def test_a_network_without_buffers_is_loaded():
    "A transformer has no normalisation statistics and no counters."
    replica = Replica(config_of('fedmpq', model='vit-tiny-4'), image_task(10))
    replica.load({n: torch.full_like(t, 0.5) for n, t in replica.state.items()})
    assert all(bool((t == 0.5).all()) for t in replica.state.values())


def test_the_control_of_equal_bytes_waits_for_fedmpq_and_equals_it(tmp_path):
    "The control's bytes per direction are within 5 % of a FedMPQ run's, and it is refused without that run."
    fields = dict(
        preset='smoke',
        seeds='0',
        results_dir=str(tmp_path),
        device='cpu',
        rounds=1,
        clients=2,
        train_images=100,
        fields='test_images=60',
    )
    records = experiments.run_experiment(
        'exp1', methods='qat-uniform-bytes,fedmpq', bits=3.4, **fields
    ).records
    fedmpq, control = (
        next(r for r in records if r['config']['method'] == m) for m in ('fedmpq', 'qat-uniform-bytes')
    )
    for way in ('bytes_down', 'bytes_up'):
        assert control['summary'][way] == pytest.approx(fedmpq['summary'][way], rel=0.05)
    with pytest.raises(ValueError, match='needs a run of fedmpq'):
        experiments.run_experiment('exp1', methods='qat-uniform-bytes', **fields)


# --- one step by hand ---------------------------------------------------------------------------------------

def batch_of(config: RunConfig, data: VisionTask, round: int = 1):
    replica = Replica(config, image_task(10))
    server = Server(config, replica.layout, replica.state)
    down = [decode(m, server.manifest) for m in downlink(server, 0, round)]
    train_state, _ = prepare(replica, config, ClientRound(0, round, torch.arange(32)), down, Clock())
    still = torch.full((16,), 4)
    return replica, train_state, data.batch(torch.arange(16), still, still, torch.zeros(16, dtype=torch.bool))


def test_fedprox_adds_mu_times_the_distance(digits):
    "Two steps without momentum: the first equals FedAvg's, the second differs by lr * mu * (w - w0)."
    data, moved = VisionTask(digits), {}
    for mu in (0.0, 0.3):
        replica, train_state, batch = batch_of(config_of('fedavg', momentum=0.0, prox=mu), data)
        w = replica.weights[1]
        start = w.detach().clone()
        local_step(replica, train_state, *batch)
        first = w.detach().clone()
        local_step(replica, train_state, *batch)
        moved[mu] = start, first, w.detach().clone()
    start, first, plain = moved[0.0]
    assert torch.equal(first, moved[0.3][1])
    assert torch.allclose(plain - moved[0.3][2], 0.05 * 0.3 * (first - start), atol=1e-8)


def test_label_smoothing_is_that_of_the_textbook(digits):
    "CE with smoothing e is (1-e) CE + e * mean over classes of -log p."
    replica, train_state, (x, y) = batch_of(config_of('fedmpq-smooth'), VisionTask(digits))
    with torch.no_grad(): logits = replica.model(x)
    local_step(replica, train_state, x, y)
    expected = 0.9 * F.cross_entropy(logits, y) + 0.1 * -logits.log_softmax(1).mean()
    assert float(train_state.totals['loss']) == pytest.approx(float(expected), rel=1e-5)


def test_the_ratio_of_gradients_is_kept(digits):
    "alpha makes the KD gradient with respect to the logits rho times as long as that of the cross-entropy."
    replica, train_state, (x, y) = batch_of(config_of('fedmpq-kd-ratio', alpha=0.25), VisionTask(digits))
    logits = replica.model(x)
    ce = F.cross_entropy(logits, y)
    term = distillation(train_state, x, y, logits, ce)
    assert float(gradient_norm(term, logits)) == pytest.approx(
        0.25 * float(gradient_norm(ce, logits)), rel=1e-4
    )


# --- teachers that last, learn or follow --------------------------------------------------------------------

def sizes_down(config: RunConfig, rounds: int) -> list[int]:
    replica = Replica(config, image_task(10))
    server = Server(config, replica.layout, replica.state)
    return [sum(map(len, downlink(server, 0, t))) for t in range(rounds)]


def test_a_teacher_that_lasts_is_paid_once():
    "With m=5 the full-precision model goes down in rounds 1, 6 and 11; other rounds cost what FedMPQ costs."
    plain, often, seldom = (
        sizes_down(config_of(m, rounds=12), 12) for m in ('fedmpq', 'fedmpq-kd', 'fedmpq-kd-every5')
    )
    assert [t for t in range(12) if seldom[t] > plain[t]] == [1, 6, 11]
    assert all(seldom[t] == (often[t] if t in (1, 6, 11) else plain[t]) for t in range(12))


def test_a_teacher_that_lasts_is_the_one_that_was_sent(digits):
    "In a round without refreshment the client distils from its memory, not from what it received."
    config = config_of('fedmpq-kd-every5', rounds=9)
    replica, data = Replica(config, image_task(10)), VisionTask(digits)
    server = Server(config, replica.layout, replica.state)
    old = local_round(
        replica, config, data, ClientRound(0, 1, torch.arange(40)), downlink(server, 0, 1), server.manifest
    ).memory
    for name in server.layout.quantized: server.state[name] = server.state[name] * 2
    assert not refreshed(config, 2)
    result = local_round(
        replica,
        config,
        data,
        ClientRound(0, 2, torch.arange(40), old),
        downlink(server, 0, 2),
        server.manifest,
    )
    assert all(torch.equal(result.memory[n], old[n]) for n in old)


def test_a_frozen_teacher_of_one_epoch_is_the_student(digits):
    "refresh 0 with two epochs: the second epoch's teacher is the student at its beginning."
    config = dataclasses.replace(config_of('fedmpq-kd-epoch', local_epochs=2), teacher='delivered')
    replica, data = Replica(config, image_task(10)), VisionTask(digits)
    server = Server(config, replica.layout, replica.state)
    loads = []
    load = replica.folded.load
    replica.folded.load = lambda state: (loads.append(state['fc.weight'].clone()), load(state))[1]
    local_round(
        replica, config, data, ClientRound(0, 1, torch.arange(40)), downlink(server, 0, 1), server.manifest
    )
    assert len(loads) == 2 and not torch.equal(loads[0], loads[1])


@pytest.mark.parametrize('method,depends', [('fedmpq-kd', True), ('fedmpq-kd-batch', False)])
def test_only_a_teacher_in_eval_mode_depends_on_running_statistics(method, depends, digits):
    "The student normalises by the batch: perturbed running means reach its losses through the teacher only."
    config, logged = config_of(method), []
    for error in (0.0, 0.5):
        replica, data = Replica(config, image_task(10)), VisionTask(digits)
        server = Server(
            config,
            replica.layout,
            {n: t + error if n.endswith('running_mean') else t for n, t in replica.state.items()},
        )
        log = local_round(
            replica,
            config,
            data,
            ClientRound(0, 1, torch.arange(40)),
            downlink(server, 0, 1),
            server.manifest,
        ).log
        logged.append((log['kd'], log['loss']))
    assert (logged[0] != logged[1]) == depends and logged[0][0] > 0


def test_the_co_updated_teacher_learns_and_the_server_never_sees_it(digits):
    config = config_of('fedmpq-kd-co')
    replica, data = Replica(config, image_task(10)), VisionTask(digits)
    server = Server(config, replica.layout, replica.state)
    before = {n: t.clone() for n, t in server.state.items()}
    local_round(
        replica, config, data, ClientRound(0, 1, torch.arange(60)), downlink(server, 0, 1), server.manifest
    )
    taught = replica.companion.model.state_dict()
    assert any(not torch.equal(taught[n], before[n]) for n in server.layout.quantized)
    assert all(torch.equal(server.state[n], t) for n, t in before.items())


@pytest.mark.parametrize('method', ['fedavg', 'fedpq', 'fedmpq', 'fedmpq-kd', 'fedmpq-kd-q8', 'fedmpq-sr'])
def test_what_is_packed_once_a_budget_is_what_each_client_would_have_been_sent(method):
    config = config_of(method, clients=3, bits=(2, 4, 2))
    server = Server(config, Replica(config, image_task(10)).layout, Replica(config, image_task(10)).state)
    for _ in range(2):  # again after the model has changed within the round's number
        for client in (0, 1, 2): assert downlink(server, client, 1) == messages_for(server, client, 1)
        server.state = {n: t + 1 if t.is_floating_point() else t for n, t in server.state.items()}


# --- compressed updates in the loop -------------------------------------------------------------------------

def test_fine_qsgd_is_fedavg(digits):
    "Eight bits with the largest entry as norm: the average moves almost as FedAvg's."
    ends = {}
    for method, more in (('fedavg', {}), ('fedpaq', dict(update_bits=8))):
        federation = open_run(config_of(method, rounds=1, **more), digits, workers=1)
        start = {n: t.clone() for n, t in federation.server.state.items()}
        play(federation, [])
        federation.pool.close()
        ends[method] = torch.cat(
            [(federation.server.state[n] - start[n]).flatten() for n in federation.server.layout.quantized]
        )
    assert torch.nn.functional.cosine_similarity(ends['fedavg'], ends['fedpaq'], dim=0) > 0.999


def test_shared_codebooks_go_down_and_change(digits):
    config = config_of('fedpq', pq_centroids=16)
    federation = open_run(config, digits, workers=1)
    first = [b.clone() for b in federation.server.codebooks]
    play(federation, [])
    federation.pool.close()
    assert first
    assert any(not torch.equal(a, b) for a, b in zip(first, federation.server.codebooks, strict=True))
    message = decode(downlink(federation.server, 0, 2)[0], federation.server.manifest)
    assert torch.equal(message.entries['codebook 0'], federation.server.codebooks[0])
    assert message.entries['codebook 0'].dtype == torch.float16


def test_a_resumed_server_has_its_codebooks(digits):
    config = config_of('fedpq', pq_centroids=16)
    federation = open_run(config, digits, workers=1)
    play(federation, [])
    federation.pool.close()
    other = Server(config, federation.server.layout, federation.server.state)
    other.restore(federation.server.checkpoint())
    assert downlink(other, 0, 2) == downlink(federation.server, 0, 2)


def test_error_feedback_remembers_what_was_lost(digits):
    "What was sent plus the residual is the client's true update, layer by layer."
    config = config_of('fedpaq-ef', update_bits=3)
    replica, data = Replica(config, image_task(10)), VisionTask(digits)
    server = Server(config, replica.layout, replica.state)
    down = downlink(server, 0, 0)
    result = local_round(replica, config, data, ClientRound(0, 0, torch.arange(40)), down, server.manifest)
    sent = decode(result.message, manifest_of(replica.layout, config)).dense()
    for name in server.layout.quantized:
        true = replica.state[name] - server.state[name]
        assert torch.allclose(sent[name] + result.memory[name], true, atol=1e-6)
        assert result.memory[name].abs().max() > 0


# --- the server believes nothing twice ----------------------------------------------------------------------

def test_a_second_message_of_a_client_is_refused(digits):
    from fedmpqkd.federation.server import aggregate, receive
    from fedmpqkd.wire.format import Message, WireError
    config = config_of('fedmpq')
    replica = Replica(config, image_task(10))
    server = Server(config, replica.layout, replica.state)
    entries = decode(downlink(server, 0, 0)[0], server.manifest).entries
    server.expect(0, {1: 10})
    receive(server, encode(Message(0, 0, 1, 10, entries), server.manifest), 1)
    with pytest.raises(WireError, match='second message of client 1'):
        receive(server, encode(Message(0, 0, 1, 9999, entries), server.manifest), 1)
    assert aggregate(server) == 1
    server.expect(1, {1: 10})  # a new round
    receive(server, encode(Message(0, 1, 1, 10, entries), server.manifest), 1)


# --- conditions ---------------------------------------------------------------------------------------------

def test_validation_images_are_held_by_nobody_and_judged(digits):
    record = run(config_of('fedmpq', validation=0.2), digits, workers=1)
    federation = open_run(config_of('fedmpq', validation=0.2), digits, workers=1)
    federation.pool.close()
    held = np.concatenate(federation.partition.parts)
    assert len(federation.validation) == 24 and not set(held) & set(federation.validation.tolist())
    assert sorted([*held, *federation.validation.tolist()]) == list(range(120))
    assert all(0 <= line['accuracy_validation'] <= 100 for line in record['curve'])
    assert 'accuracy_best_validation' in record['summary']


def test_noise_begins_when_it_should_and_touches_whom_it_should(digits):
    federation = open_run(
        config_of('fedavg', rounds=4, label_noise=0.5, noise_from=2, noise_clients=0.5), digits, workers=1
    )
    seen = []
    play(federation, [], after=lambda curve: seen.append(federation.pool.task.labels.clone()))
    federation.pool.close()
    clean = digits.train_y
    assert [torch.equal(labels, clean) for labels in seen] == [True, True, False, False]
    changed = (seen[-1] != clean).numpy()
    per_client = [int(changed[part].sum()) for part in federation.partition.parts]
    assert sorted(bool(n) for n in per_client) == [False, True]
    noisy = int(np.argmax(per_client))
    assert per_client[noisy] == len(federation.partition.parts[noisy]) // 2


def test_a_stressed_run_says_how_it_stood(digits):
    record = run(config_of('fedmpq', rounds=1, stress='attacks'), digits, workers=1)
    assert set(record['robustness']['clean']) == {'deployed', 'fp'}
    plain = run(config_of('fedmpq', rounds=1), digits, workers=1)
    assert plain['curve'][0]['accuracy'] == record['curve'][0]['accuracy'] and 'robustness' not in plain
