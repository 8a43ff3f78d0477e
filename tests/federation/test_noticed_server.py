"Small changes of server, rounds and evaluation that pass elsewhere; the numbers are worked out by hand."
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples import small
from tape import digits

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.journal import Damaged
from fedmpqkd.core.streams import rng
from fedmpqkd.federation import evaluation, rounds
from fedmpqkd.federation.evaluation import best_validation, evaluate_round
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import (
    Memories,
    longest_first,
    open_run,
    round_half_up,
    run_round,
    summary_of,
    visit,
)
from fedmpqkd.federation.server import Average, Server, aggregate, deployed, downlink, receive
from fedmpqkd.learn.client import Result
from fedmpqkd.models.vision import layout, register_model
from fedmpqkd.quant.bits import random_bits
from fedmpqkd.quant.quantize import Planes, quantize
from fedmpqkd.wire.format import Message, decode, encode

SIZES = [216, 1152, 640]  # of the small network's three quantised layers
FIELDS = dict(model='small', clients=3, rounds=2, partition='iid', batch_size=16, eval_images=0)


def take(server, data, round):
    "Receive one reply of a round whose sampled clients are those that were heard, and its sender."
    message = decode(data, server.manifest)
    server.expect(round, (server.counts if server.round == round else {}) | {message.client: message.samples})
    receive(server, data, message.client)


def server_of(**fields) -> Server:
    register_model('small', small)
    torch.manual_seed(0)
    network = small(10)
    fields = dict(model='small', clients=2, update='signed-planes', assignment='prune-grow') | fields
    server = Server(RunConfig(**fields), layout(network), network.state_dict())
    assert server.layout.sizes() == SIZES
    return server


def answer(server: Server, client: int, bits: list[int], lost: list[int], round: int = 0) -> bytes:
    "A client's model at these bits, with these losses."
    entries = dict(server.state)
    for name, n, delta in zip(server.layout.quantized, bits, lost, strict=True):
        entries[name] = dataclasses.replace(quantize(server.state[name], n), delta=delta)
    return encode(Message(0, round, client, 10, entries), server.manifest)


# --- bits -------------------------------------------------------------------------------------------------

def test_what_has_lost_most_in_all_gives_first():
    """Four bits everywhere, 2008 weights, budget 3.5: 1004 bits too many. By size and loss (216 * 6, 1152,
    640) the first layer gives three bits, the second one; what is left buys one bit for the third. By size
    alone the second layer would give one."""
    server = server_of(bits=3.5)
    server.mean_bits, server.mean_loss = [4, 4, 4], [6, 1, 1]
    assert server.assignment(3.5) == [1, 3, 5]
    server.mean_loss = [1, 1, 1]
    assert server.assignment(3.5) == [4, 3, 4]


def test_the_deployed_model_has_the_assigned_bits():
    server = server_of(bits=3.5)
    server.mean_bits, server.mean_loss = [4, 4, 4], [6, 1, 1]
    model = deployed(server, 3.5)
    for name, bits in zip(server.layout.quantized, (1, 3, 5), strict=True):
        w = server.state[name]
        units = model[name].abs() / (w.abs().max() / (2**bits - 1))
        assert torch.allclose(units, units.round(), atol=1e-3) and units.max().round() == 2**bits - 1
        assert torch.allclose(model[name], w, atol=float(w.abs().max()) / (2**bits - 1) / 2 + 1e-6)


def test_reports_count_by_samples_and_budget():
    """Budgets of 8 and 2 bits, 10 images each: weights 80 and 20. Bits of (7, 2) average to 6, of (8, 2) to
    6.8; losses of (1, 0) to .8, of (6, 0) to 4.8, and one is added."""
    server = server_of(bits=(8, 2))
    take(server, answer(server, 0, [7, 2, 8], [1, 6, 0]), 0)
    take(server, answer(server, 1, [2, 2, 2], [0, 0, 0]), 0)
    assert aggregate(server) == 2
    assert (server.mean_bits, server.mean_loss) == ([6, 2, 7], [2, 6, 1])


def test_every_budget_draws_the_same_lots():
    server = server_of(bits=(2, 8), assignment='random', seed=3)
    for budget in (2.0, 5.5, 8.0):
        assert server.assignment(budget) == random_bits(SIZES, budget, rng(3, 'quantiser'))
    assert server.assignment(5.5) != server_of(bits=(2, 8), assignment='random', seed=4).assignment(5.5)


def test_clients_of_one_budget_share_a_message_and_others_do_not():
    server = server_of(bits=(2, 4, 2), clients=3)
    def bits(client, round=0):
        message = decode(downlink(server, client, round)[0], server.manifest)
        assert (message.client, message.round) == (client, round)
        return [message.entries[n].bits for n in server.layout.quantized]
    assert [bits(k) for k in range(3)] == [[2] * 3, [4] * 3, [2] * 3]
    assert bits(0, round=1) == [2] * 3
    before = downlink(server, 0, 1)
    server.state = {n: t + 1 if t.is_floating_point() else t for n, t in server.state.items()}
    assert downlink(server, 0, 1) != before  # a new model is packed anew


# --- averages ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pool, variance', [('mean', 2.5), ('moments', 2.5 + 3.0)])
def test_averages_by_hand(pool, variance):
    """Three images with mean 0 and variance 2, one with mean 4 and variance 4: the mean is 1, the mean
    variance 2.5, and that of the pooled data 2.5 + (3 * 1 + 1 * 9) / 4."""
    average = Average(pool)
    for mean, var, count, n in ((0.0, 2.0, 9, 3), (4.0, 4.0, 5, 1)):
        average.add({'bn.running_mean': torch.tensor([mean]), 'bn.running_var': torch.tensor([var]),
                     'bn.num_batches_tracked': torch.tensor(count)}, n)
    found = average.mean()
    assert found['bn.running_mean'].item() == 1 and found['bn.running_var'].item() == variance
    assert found['bn.num_batches_tracked'].item() == 9 and average.clients == 2


@pytest.mark.parametrize('rule, expected', [('samples', 0.25), ('uniform', 0.5)])
def test_whose_weight_is_what(rule, expected):
    server = server_of(update='fp32', assignment='uniform', aggregate=rule)
    for client, value, samples in ((0, 0.0, 30), (1, 1.0, 10)):
        state = {n: torch.full_like(t, value) for n, t in server.state.items()}
        take(server, encode(Message(0, 0, client, samples, state), server.manifest), 0)
    aggregate(server)
    assert server.state['8.bias'].tolist() == pytest.approx([expected] * 10)


def test_a_round_without_messages_leaves_model_and_bits():
    server = server_of(bits=3.5)
    server.mean_bits, server.mean_loss = [4, 4, 4], [6, 1, 1]
    before = {n: t.clone() for n, t in server.state.items()}
    assert aggregate(server) == 0
    assert all(torch.equal(before[n], t) for n, t in server.state.items())
    assert (server.mean_bits, server.mean_loss) == ([4, 4, 4], [6, 1, 1])


def test_the_second_round_starts_from_nothing():
    "Its average and its reports are those of its own messages."
    server = server_of(bits=4)
    for round, (bits, lost) in enumerate((([4, 4, 4], [0, 0, 0]), ([2, 3, 4], [2, 1, 0]))):
        take(server, answer(server, 0, bits, lost, round=round), round)
        assert aggregate(server) == 1
    assert (server.mean_bits, server.mean_loss) == ([2, 3, 4], [3, 2, 1])


# --- evaluation -------------------------------------------------------------------------------------------

def test_each_client_counts_with_its_own_model(monkeypatch):
    """Four clients at 2, 2, 4 and 8 bits. A pretended task scores a model by its distinct magnitudes in the
    first layer, which are 4, 16 and many: the line is the mean over clients, not the first budget's, not
    over budgets."""
    register_model('small', small)
    config = make_config('fedmpq', **FIELDS | dict(clients=4, bits=(2, 2, 4, 8)))
    run = open_run(config, digits(40, 20), workers=1)
    seen = {}

    def score(pool, state, index):
        levels = len(state['0.weight'].abs().unique())
        seen[levels] = True
        return dict(accuracy=float(levels), ece=0.0, nll=0.0, diverged=False, per_class=[])

    monkeypatch.setattr(evaluation, 'evaluate', score)
    everything = torch.arange(20)
    try: line = evaluate_round(run, everything, everything, 0)
    finally: run.pool.close()
    two, four, eight = line['deployed'].values()
    assert two <= 4 < four <= 16 < eight
    assert line['accuracy'] == pytest.approx((2 * two + four + eight) / 4)
    assert line['accuracy_fp'] == max(seen) > eight


def test_the_best_round_is_the_one_that_validation_chose():
    curve = [dict(round=1, accuracy=50.0, accuracy_validation=40.0),
             dict(round=2, accuracy=45.0, accuracy_validation=60.0),
             dict(round=3, accuracy=70.0, accuracy_validation=50.0)]
    found = best_validation(curve)
    assert (found['accuracy_best_validation'], found['best_validation']) == (45, 60)
    assert (found['best_validation_round'], found['accuracy_validation']) == (2, 50)
    assert best_validation([dict(accuracy=1.0)]) == {}


# --- rounds -----------------------------------------------------------------------------------------------

def test_half_is_rounded_up():
    assert [round_half_up(x) for x in (0.5, 1.5, 2.5, 2.49, 0.0)] == [1, 2, 3, 2, 0]
    assert longest_first([3, 0, 2, 1], [5, 9, 5, 7]) == [1, 3, 0, 2]


def test_a_line_from_logs_by_hand():
    logs = [dict(loss=1.0, kd=0.2, skipped=1, steps=4, seconds=dict(student=1.0, wire=0.5)),
            dict(loss=3.0, kd=float('nan'), moved=0.5, skipped=0, steps=6, seconds=dict(student=2.0))]
    assert summary_of(logs) == dict(loss=2.0, kd=0.2, moved=0.5, skipped=1, steps=10,
                                    phases=dict(student=3.0, wire=0.5))
    assert summary_of([]) == dict(skipped=0, steps=0, phases={})


class Remembering:
    "A local round that only notes what it was given, and answers with a memory or fails."
    def __init__(self, message): self.message, self.given = message, []

    def __call__(self, replica, config, task, work, down, manifest):
        self.given.append(work.memory.get('w'))
        log = dict(loss=0.0, kd=0.0, skipped=0, steps=1, seconds={}, failed='because')
        return Result(self.message, log, dict(w=torch.tensor(float(work.round))))


@pytest.fixture
def federation(monkeypatch, tmp_path):
    register_model('small', small)
    opened = []

    def make(method: str, **fields) -> SimpleNamespace:
        config = make_config(method, **FIELDS | fields)
        whole = open_run(config, digits(40, 20), workers=1, folder=tmp_path / str(len(opened)))
        opened.append(whole)
        local = Remembering(None)
        monkeypatch.setattr(rounds, 'local_round', local)
        return SimpleNamespace(run=whole, local=local)

    yield make
    for whole in opened: whole.pool.close()


def test_what_a_straggler_remembers(federation):
    """Client 0 fails in round 1. A teacher's memory is its own and moves on; the residual of error feedback
    is of an update that never arrived, and stays."""
    kd = dict(alpha=0.5, kd_warmup_rounds=0, rounds=3)
    for method, fields, expected in (('fedmpq-kd-ema', kd, [None, 0, 1]),
                                     ('uveqfed', dict(error_feedback=True), [None, 0, 0])):
        case = federation(method, dropout=0.3, dropout_stage='after_train', **fields)
        for round, fails in ((0, False), (1, True), (2, False)): visit(case.run, 0, round, fails)
        assert [None if w is None else int(w) for w in case.local.given] == expected


def test_a_failed_client_is_named_and_billed(federation):
    "It was sent its message and sent none; the others' logs and the reason are in the line."
    case = federation('fedmpq')
    line = run_round(case.run, 0)
    assert (line['sampled'], line['arrived'], line['steps']) == (3, 0, 3)
    assert line['failed'] == {k: 'because' for k in ('0', '1', '2')}
    assert case.run.meter.total['down'] > 0 == case.run.meter.total['up']


def test_memories_are_those_before_the_round_and_two_are_kept(tmp_path):
    memories = Memories(tmp_path, 'run')
    for round in (0, 3, 4): memories.save(7, round, dict(w=torch.tensor(round)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['7_3.pt', '7_4.pt']
    assert [memories.load(7, round).get('w') for round in (4, 5, 9)] == [3, 4, 4]
    assert memories.load(8, 9) == {}
    with pytest.raises(Damaged, match='client 7 has vanished'):
        for path in tmp_path.iterdir(): path.unlink()
        memories.load(7, 5)
    twelve = Memories(tmp_path, 'run')  # rounds are numbers, not words: 9 comes before 10
    for round in (8, 9, 10): twelve.save(1, round, dict(w=torch.tensor(round)))
    assert twelve.load(1, 11)['w'] == 10
    with pytest.raises(Damaged, match='belongs to'): Memories(tmp_path, 'another run').load(1, 11)


def test_without_a_folder_memories_go_with_their_object():
    memories = Memories()
    folder = Path(memories.folder)
    memories.save(0, 0, {})
    assert len(list(folder.iterdir())) == 1
    memories.temporary.cleanup()
    assert not folder.exists()


def test_held_out_samples_are_a_tenth_of_each_client():
    register_model('small', small)
    whole = open_run(make_config('fedavg', **FIELDS | dict(validation=0.1)), digits(100, 20), workers=1)
    whole.pool.close()
    assert len(whole.validation) == sum(round_half_up(0.1 * n) for n in (34, 33, 33)) == 9
    held = np.concatenate(whole.partition.parts)
    assert sorted([*held, *whole.validation.tolist()]) == list(range(100))


def test_a_zero_layer_is_reported_with_no_bits():
    "A client whose layer has lost all its bits says so, and the mean counts it."
    server = server_of(bits=4)
    entries = dict(server.state)
    for n in server.layout.quantized: entries[n] = quantize(server.state[n], 4)
    name = server.layout.quantized[0]
    zero = torch.zeros_like(server.state[name], dtype=torch.uint8)
    entries[name] = Planes(zero, torch.ones_like(zero, dtype=torch.int8), 0.5, 0, delta=4)
    take(server, encode(Message(0, 0, 0, 10, entries), server.manifest), 0)
    take(server, answer(server, 1, [4, 4, 4], [0, 0, 0]), 0)
    aggregate(server)
    assert (server.mean_bits, server.mean_loss) == ([2, 4, 4], [3, 1, 1])
    assert server.state[name].abs().max() < 1
