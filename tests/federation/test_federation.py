"""Whole runs on a few digits: ablations bit for bit, bytes by hand, failures, kills, controls, a golden run.

One round of 120 digits takes about a third of a second; runs are shared between tests (`played`)."""
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tape
import torch
from conftest import ROOT
from tape import Tape
from torch import nn

from fedmpqkd.core.config import RunConfig, plain, run_id
from fedmpqkd.core.journal import Claimed, Journal, write_atomic
from fedmpqkd.data.partition import Partition
from fedmpqkd.federation import rounds
from fedmpqkd.federation import run as run_module
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import open_run, participants
from fedmpqkd.federation.run import make_record, play, recalibrated, run
from fedmpqkd.learn import client, step
from fedmpqkd.learn.client import ClientRound, prepare
from fedmpqkd.learn.replica import Clock
from fedmpqkd.learn.step import distillation
from fedmpqkd.learn.teacher import ASSIGNMENT, alpha_at, temperature_at
from fedmpqkd.learn.vision import local_batches
from fedmpqkd.models import vision as models
from fedmpqkd.models.vision import build_model
from fedmpqkd.quant.quantize import quantize
from fedmpqkd.wire.format import FIXED, decode
from fedmpqkd.wire.messages import manifest_of

torch.set_num_threads(1)
FIELDS = dict(model='resnet8', clients=3, rounds=2, dirichlet=1.0, batch_size=16, eval_images=0)
KD = dict(alpha=.5)
STAGES = ('before_download', 'after_download', 'after_train')  # where a client may fail


def digits(train: int = 120, test: int = 100): return tape.digits(train, test)


class Played(tape.Played):
    def messages(self, direction: str, round: int, client: int | None = None) -> list[bytes]:
        return [d for way, k, d in self.run.meter.tape if way == direction and self.decode(d).round == round
                and client in (None, k)]

    def decode(self, data: bytes): return decode(data, self.run.server.manifest)


def opened(config: RunConfig, data, workers: int = 1, folder: Path | None = None) -> rounds.Run:
    whole = open_run(config, data, workers=workers, folder=folder or Path('/nonexistent'))
    whole.meter = Tape(manifest=whole.meter.manifest)
    return whole


def start(config: RunConfig, workers: int = 1, folder: Path | None = None) -> Played:
    result = Played(opened(config, digits(), workers, folder), [])
    try: play(result.run, result.curve)
    finally: result.run.pool.close()
    return result


@pytest.fixture(scope='module')
def played(tmp_path_factory):
    "Runs by method and fields, each computed once."
    @functools.cache
    def get(method: str, workers: int = 1, **fields) -> Played:
        return start(make_config(method, **FIELDS | fields), workers, tmp_path_factory.mktemp('clients'))
    return get


def same_bytes(one: Played, other: Played) -> bool:
    return one.run.meter.tape == other.run.meter.tape


def same_state(one: Played, other: Played) -> bool:
    a, b = one.run.server.state, other.run.server.state
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the ablation -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('method', ['fedmpq-kd', 'fedmpq-kd-ema'])
def test_alpha_zero_is_fedmpq_bit_for_bit(played, method):
    "Curve, every message in both directions, final model."
    plain, ablated = played('fedmpq'), played(method, alpha=0, kd_warmup_rounds=0)
    assert ablated.timeless == plain.timeless and same_bytes(ablated, plain) and same_state(ablated, plain)
    assert not any('teacher' in line['phases'] for line in ablated.curve)
    assert not list(ablated.run.memories.folder.glob('*'))


def test_alpha_zero_wins_over_whatever_else_is_said_about_the_teacher(played):
    config = RunConfig(**FIELDS, method='fedmpq-kd', update='signed-planes', assignment='prune-grow', alpha=0,
                       teacher='q8', temperature=9, kd_loss='dkd', kd_warmup_rounds=0)
    direct = start(config)
    assert direct.timeless == played('fedmpq').timeless and same_bytes(direct, played('fedmpq'))


def test_a_schedule_may_start_at_zero():
    config = make_config('fedmpq-kd', alpha=0, alpha_schedule='linear', alpha_end=1.0, rounds=10)
    assert alpha_at(config, 9) == 1.0


@pytest.mark.parametrize('method', ['fedavg', 'qat-uniform', 'fedmpq'])
def test_a_schedule_of_alpha_leaves_methods_without_a_teacher_alone(method):
    "As in a sweep, where all methods are given the same fields."
    config = make_config(method, alpha=.5, alpha_schedule='linear', alpha_end=1.0, rounds=10)
    assert [alpha_at(config, t) for t in range(10)] == [0] * 10 and config == make_config(method, rounds=10)


# --- the teacher --------------------------------------------------------------------------------------------

def test_the_teacher_is_the_global_model_and_stays_frozen(monkeypatch):
    "Before and after each step: the same parameters and buffers, outside of the student, a function of W_t."
    seen, real = [], step.local_step

    def spy(replica, train_state, x, y):
        frozen = train_state.teacher.model
        assert not {id(m) for m in frozen.modules()} & {id(m) for m in replica.model.modules()}
        before = {n: t.clone() for n, t in frozen.state_dict().items()}
        if not seen: seen.append((x.clone(), train_state.teacher(x)))
        real(replica, train_state, x, y)
        assert not any(m.training for m in frozen.modules())
        assert not any(p.requires_grad for p in frozen.parameters())
        for n, t in frozen.state_dict().items(): assert torch.equal(t, before[n]), n
        seen.append(before)

    monkeypatch.setattr(client, 'local_step', spy)
    config = make_config('fedmpq-kd', **FIELDS | dict(rounds=1, clients=2), **KD, kd_warmup_rounds=0)
    result = start(config)
    states = seen[1:]
    assert len(states) == result.curve[0]['steps'] >= 6
    for state in states:
        assert all(torch.equal(state[n], states[0][n]) for n in state)  # the same for everybody
    model = build_model('resnet8', 10, config.seed).eval()
    with torch.no_grad(): assert torch.allclose(model(seen[0][0]), seen[0][1], atol=1e-3)


def test_the_gradient_of_distillation(played):
    "With respect to the logits alpha T (p_s - p_t) / B, and not zero with respect to the weights."
    whole = played('fedmpq-kd', **KD)
    replica, config = whole.run.pool.replicas[0], whole.run.config
    down = [whole.decode(d) for d in whole.messages('down', 1, 0)]
    train_state, _ = prepare(replica, config, ClientRound(0, 1, torch.arange(32)), down, Clock())
    part = next(local_batches(32, config, 1, 0))
    x, y = whole.run.pool.task.batch(*part)
    logits = replica.model.train()(x)
    z = logits.detach().requires_grad_(True)
    slope, = torch.autograd.grad(distillation(train_state, x, y, z), z)
    T, alpha = temperature_at(config, 1), alpha_at(config, 1)
    closed = alpha * T * ((z / T).softmax(1) - (train_state.teacher(x) / T).softmax(1)) / len(x)
    assert (T, alpha) == (2, .5) and torch.allclose(slope, closed.detach(), atol=1e-7) and slope.norm() > 1e-4
    grads = torch.autograd.grad(distillation(train_state, x, y, logits), replica.weights)
    assert all(g.norm() > 0 for g in grads)
    assert whole.curve[0]['kd'] == 0 and whole.curve[1]['kd'] > 1e-4  # the warm-up round, the other


# --- bytes --------------------------------------------------------------------------------------------------

def entry_bytes(d: int, bits: int = 32) -> int:
    "One tensor as it crosses: number, codec, dimensions, bits, delta; then fp32, or a scale and N+1 planes."
    return 6 + (4 * d if bits == 32 else 4 + (bits + 1) * -(-d // 8))


def test_what_each_teacher_costs(played):
    plain = played('fedmpq')
    teachers = dict(fp=played('fedmpq-kd', **KD))
    teachers |= {t: played(f'fedmpq-kd-{t}', **KD) for t in ('delivered', 'q8', 'ema')}
    sizes = plain.run.server.layout.sizes()
    extra = dict(delivered=0, ema=0,
                 fp=sum(entry_bytes(d) - entry_bytes(d, 4) for d in sizes) + 6 + 8 * len(sizes),
                 q8=FIXED + sum(entry_bytes(d, 8) for d in sizes))
    for name, whole in teachers.items():
        for k in range(3):  # nothing of the teacher in the warm-up round
            assert whole.messages('down', 0, k) == plain.messages('down', 0, k)
            assert whole.messages('up', 0, k) == plain.messages('up', 0, k)
            down = sum(map(len, whole.messages('down', 1, k)))
            assert down - len(plain.messages('down', 1, k)[0]) == extra[name], name
            assert len(whole.messages('up', 1, k)[0]) == len(plain.messages('up', 1, k)[0])
        assert len(whole.messages('down', 1)) == (6 if name == 'q8' else 3)
        if name != 'fp': assert whole.messages('down', 1, 0)[0] == plain.messages('down', 1, 0)[0]
        assert whole.curve[1]['bytes_down'] == plain.curve[1]['bytes_down'] + 3 * extra[name]
        assert whole.curve[1]['loss'] != plain.curve[1]['loss'] and whole.curve[1]['kd'] > 0
    assert (ASSIGNMENT in whole.decode(teachers['fp'].messages('down', 1, 0)[0]).entries
            and ASSIGNMENT not in whole.decode(teachers['q8'].messages('down', 1, 0)[0]).entries)


def test_the_accounting_is_the_length_of_the_messages(played):
    for method in ('fedmpq', 'fedavg'):
        whole = played(method)
        for t, line in enumerate(whole.curve):
            for way in ('down', 'up'): assert line[f'bytes_{way}'] == sum(map(len, whole.messages(way, t)))
        assert whole.run.meter.manifest == len(manifest_of(whole.run.server.layout).encode())
    state, shape = played('fedavg').run.server.state, played('fedavg').run.server.layout
    full = FIXED + sum(entry_bytes(t.numel()) if t.is_floating_point() else 6 + 8 * t.numel()
                       for t in state.values())
    assert {len(d) for d in played('fedavg').messages('up', 0)} == {full}
    planes = sum(entry_bytes(d) - entry_bytes(d, 4) for d in shape.sizes())
    assert {len(d) for d in played('fedmpq').messages('down', 1)} == {full - planes}


def test_client_memory_of_the_averaged_teacher(played):
    "In the second round the teacher is 0.9 of the first delivered model and 0.1 of the second."
    whole = played('fedmpq-kd-ema', **KD)
    first, second = (whole.decode(whole.messages('down', t, 1)[0]).dense() for t in (0, 1))
    kept = whole.run.memories.load(1, 2)
    for n in ('fc.weight', 'bn1.running_var'):
        assert torch.allclose(kept[n], .9 * first[n] + .1 * second[n], atol=1e-6), n
    assert torch.equal(whole.run.memories.load(1, 1)['fc.weight'], first['fc.weight'])
    assert whole.run.memories.load(1, 0) == {}


# --- budgets ------------------------------------------------------------------------------------------------

def test_heterogeneous_budgets(played):
    budgets = (2, 2, 4, 8)
    whole = played('fedmpq', bits=budgets, clients=4)
    sizes = whole.run.server.layout.sizes()
    for t in (0, 1):
        bits = []
        for k, budget in enumerate(budgets):
            message = whole.decode(whole.messages('down', t, k)[0])
            bits.append([message.entries[n].bits for n in whole.run.server.layout.quantized])
            held = sum(b * d for b, d in zip(bits[k], sizes, strict=True))
            assert budget * sum(sizes) - max(sizes) < held <= budget * sum(sizes)
            assert all(1 <= b <= 8 for b in bits[k])
        assert bits[0] == bits[1] != bits[2] != bits[3] == [8] * len(sizes)
        if t: assert len(set(bits[0])) > 1  # the second round allocates, the first cannot
    for line in whole.curve:
        assert list(line['deployed']) == ['2', '4', '8']
        two, four, eight = line['deployed'].values()
        assert line['accuracy'] == pytest.approx((2 * two + four + eight) / 4) == line['accuracy_quantised']


def test_a_large_lambda_removes_bits(played):
    "Positive control of the regulariser: some layer comes back with fewer bits, and says how many it lost."
    whole = played('fedmpq', lambda_b=1000.0, rounds=1)
    lost = 0
    for data in whole.messages('up', 0):
        for n in whole.run.server.layout.quantized:
            p = whole.decode(data).entries[n]
            assert p.bits + p.delta == 4
            lost += p.delta
    assert lost > 0 and whole.curve[0]['lasso_moved'] > .1 and min(whole.curve[0]['bits']) < 4
    assert played('fedmpq').curve[0]['lasso_moved'] == 0 and min(played('fedmpq').curve[0]['bits']) == 4


# --- who takes part -----------------------------------------------------------------------------------------

def test_participants():
    config = RunConfig(clients=50, participation=.2, dropout=.3, rounds=400)
    # 45 clients have images: 9 are sampled, round(2.7) = 3 fail
    sizes = [0 if k % 10 == 0 else 7 for k in range(50)]
    counts, failures = np.zeros(50), np.zeros(50)
    for t in range(400):
        chosen, failing = participants(config, sizes, t)
        assert chosen == sorted(set(chosen)) and len(chosen) == 9
        assert len(failing) == 3 and failing <= set(chosen)
        counts[chosen] += 1
        failures[list(failing)] += 1
    assert not counts[::10].any()
    for seen, p in ((counts, .2), (failures, .2 / 3)):
        sigma = (400 * p * (1 - p))**.5
        assert (abs(np.delete(seen, range(0, 50, 10)) - 400 * p) < 4.5 * sigma).all()
    coins = dataclasses.replace(config, dropout_mode='bernoulli')
    failed = [len(participants(coins, sizes, t)[1]) for t in range(400)]
    assert abs(sum(failed) - 400 * 9 * .3) < 4.5 * (3600 * .21)**.5 and len(set(failed)) > 4
    # who is sampled is another stream
    assert participants(coins, sizes, 5)[0] == participants(config, sizes, 5)[0]
    for mode in ('exact', 'bernoulli'):
        one = dataclasses.replace(config, participation=.001, dropout=1.0, dropout_mode=mode)
        chosen, failing = participants(one, sizes, 0)
        assert len(chosen) == 1 and failing == set(chosen)
        assert participants(dataclasses.replace(one, dropout=0), sizes, 0)[1] == set()


def test_the_stage_of_a_failure_decides_its_bill(played):
    "One of two sampled clients fails. The model afterwards is the same; the bytes and the work are not."
    fields = dict(clients=4, participation=.5, dropout=.5, rounds=1)
    runs = {s: played('fedmpq', dropout_stage=s, **fields) for s in STAGES}
    chosen, failing = participants(runs['after_train'].run.config, [1] * 4, 0)
    survivor, = set(chosen) - failing
    for stage, whole in runs.items():
        line = whole.curve[0]
        assert (line['sampled'], line['arrived'], line['failed']) == (2, 1, {})
        downs = [k for way, k, _ in whole.run.meter.tape if way == 'down']
        assert downs == ([survivor] if stage == 'before_download' else chosen)
        assert [k for way, k, _ in whole.run.meter.tape if way == 'up'] == [survivor]
        assert same_state(whole, runs['after_train'])
        assert line['steps'] == runs['before_download'].curve[0]['steps']
    sizes = {s: len(whole.messages('down', 0, survivor)[0]) for s, whole in runs.items()}
    assert len(set(sizes.values())) == 1
    assert runs['after_download'].curve[0]['bytes_down'] == 2 * runs['before_download'].curve[0]['bytes_down']


@pytest.mark.parametrize('stage', STAGES)
def test_everybody_fails(played, stage):
    rounds = 1 if stage == 'after_train' else 3
    whole = played('fedmpq', dropout=1.0, dropout_stage=stage, clients=2, rounds=rounds)
    initial = build_model('resnet8', 10, 0).state_dict()
    for n, t in whole.run.server.state.items(): assert torch.equal(t, initial[n]), n
    for line in whole.curve:
        assert (line['arrived'], line['bytes_up'], line['bits']) == (0, 0, [])
        assert (line['bytes_down'] == 0) == (stage == 'before_download')
        assert line['accuracy'] == whole.curve[0]['accuracy']


def test_clients_without_an_image_and_with_one():
    config = make_config('fedmpq', **FIELDS)
    whole = Played(opened(config, digits()), [])
    whole.run.partition = Partition((np.arange(119), np.array([119]), np.array([], np.int64)), 'by hand')
    play(whole.run, whole.curve)
    assert [line['sampled'] for line in whole.curve] == [2, 2] == [line['arrived'] for line in whole.curve]
    assert whole.messages('down', 0, 2) == [] == whole.messages('up', 0, 2)
    down, up = (whole.decode(whole.messages(way, 0, 1)[0]) for way in ('down', 'up'))
    assert up.samples == 1
    # statistics of one image are none
    for n in (*whole.run.server.layout.buffers, *whole.run.server.layout.counters):
        assert torch.equal(up.entries[n], down.entries[n]), n
    assert not torch.equal(up.dense()['fc.weight'], down.dense()['fc.weight'])
    big = whole.decode(whole.messages('up', 0, 0)[0])
    assert int(big.entries['bn1.num_batches_tracked']) == 8  # 119 images in batches of 16
    record = make_record(whole.run, whole.curve)
    whole.run.pool.close()
    assert 0 <= record['summary']['dispersion']['std'] <= 50 and np.isfinite(whole.curve[-1]['nll'])


# --- divergence ---------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def diverged(tmp_path_factory):
    "Learning rate a million, with a journal: the record's text and what the run returned."
    config = make_config('fedavg', **FIELDS | dict(lr=1e6))
    journal = Journal(tmp_path_factory.mktemp('diverged'), 'g', 'n', run_id(config, digits().fingerprint))
    return run(config, digits(), journal, workers=1), journal.record_path.read_text()


def test_divergence_is_a_failure_of_clients_and_not_of_the_run(diverged):
    record, text = diverged
    assert [line['round'] for line in record['curve']] == [1, 2]
    for line in record['curve']:
        assert line['failed'] and line['arrived'] + len(line['failed']) == line['sampled'] == 3
        assert all('NaN or infinity' in why for why in line['failed'].values())
        assert 0 <= line['accuracy'] <= 100
    assert strict_json(text)['id'] == record['id']


def strict_json(text: str) -> dict:
    def refuse(word): raise ValueError(f'{word} is not JSON')
    return json.loads(text, parse_constant=refuse)


def test_the_record_of_a_diverged_run_is_json(diverged):
    assert strict_json(diverged[1])['config']['lr'] == 1e6


@pytest.mark.parametrize('kind', ['text', 'choice'])
def test_a_diverged_language_run_has_a_record_with_every_metric(kind, tmp_path):
    "Its metrics are those of a guesser; tables and curves read them."
    pytest.importorskip('transformers'), pytest.importorskip('peft')
    from fedmpqkd.learn.language import load_language
    from fedmpqkd.report.fstq import fstq_curves, fstq_frame
    from fedmpqkd.report.language import language_table, plot_language, taught
    config = make_config('fedavg', dataset='almanac', model='gpt-tiny', tokenizer='byte-bpe:300', clients=2,
                         rounds=2, batch_size=64, partition='natural', text_kind=kind, lr=1e20)
    journal, data = Journal(tmp_path, 'g', 'n', 'id'), load_language(config)
    record = run(config, data, journal, workers=1)
    line, summary = record['curve'][-1], record['summary']
    strict_json(journal.record_path.read_text())
    words = len(data.coder.vocabulary)
    assert line['diverged'] and line['nll'] == pytest.approx(np.log(words))
    records = {'4': [record]}
    table = language_table(records).iloc[0]
    assert not len(taught(records)) and len(plot_language(records).lines) == 1
    if kind == 'choice':
        chance = np.mean([100 / len(item.options) for item in data.test_items])
        assert all(line[f'accuracy{s}'] == pytest.approx(chance) for s in ('', '_token', '_byte', '_sum'))
        assert table['accuracy %'] == pytest.approx(chance)
        return
    assert line['accuracy'] == pytest.approx(100 / words)
    assert line['perplexity'] == summary['perplexity'] == pytest.approx(words)
    tokens, size = sum((data.test >= 0).sum(1)), data.size.sum()
    assert line['bits_per_byte'] == pytest.approx(float(tokens / size) * np.log2(words))
    nats = line['bits_per_byte'] * np.log(2)
    assert table['bits per byte'] * np.log(2) == pytest.approx(nats)
    assert fstq_frame([record]).nats.tolist() == pytest.approx([nats])
    assert fstq_curves([record]).nats.tolist() == pytest.approx([nats] * 2, abs=1e-4)


def test_a_model_beyond_numbers_is_called_diverged(tmp_path):
    "Finite weights whose logits overflow: no loss is a number, no client replies, the line says so in JSON."
    config = make_config('fedavg', **FIELDS | dict(lr=0, rounds=1, clients=2))
    whole = Played(opened(config, digits()), [])
    whole.run.server.state['fc.weight'].fill_(3e38)
    play(whole.run, whole.curve)
    line = whole.curve[0]
    assert (line['arrived'], line['diverged'], line['accuracy']) == (0, True, 10.0)
    assert len(line['failed']) == 2
    assert 'loss' not in line and 'nll' not in line
    journal = Journal(tmp_path, 'g', 'n', 'id')
    journal.finish(make_record(whole.run, whole.curve))
    whole.run.pool.close()
    assert strict_json(journal.record_path.read_text())['summary']['dispersion'] == {}


def test_an_infinite_concentration_ends_in_a_record(tmp_path):
    config = make_config('fedmpq', **FIELDS | dict(rounds=1, dropout=1.0, clients=2, dirichlet=float('inf')))
    journal = Journal(tmp_path, 'g', 'n', run_id(config, digits().fingerprint))
    run(config, digits(), journal, workers=1)
    strict_json(journal.record_path.read_text())


# --- the same again -----------------------------------------------------------------------------------------

NOISY = dict(rounding_up='stochastic', rounding_down='stochastic', participation=.67)


def test_the_same_configuration_gives_the_same_run(played):
    once, again = played('fedmpq-int-sr', **NOISY), start(make_config('fedmpq-int-sr', **FIELDS | NOISY))
    assert once.timeless == again.timeless and same_bytes(once, again) and same_state(once, again)
    other = start(make_config('fedmpq-int-sr', **FIELDS | NOISY, seed=1))
    assert not same_bytes(once, other)


@pytest.mark.parametrize('workers', [2, 3])
def test_the_number_of_workers_changes_nothing(played, workers):
    one, more = played('fedmpq-int-sr', **NOISY), played('fedmpq-int-sr', workers=workers, **NOISY)
    assert one.timeless == more.timeless and same_bytes(one, more) and same_state(one, more)


def test_methods_under_one_seed_are_paired(played):
    methods = [played(m, participation=.67, seed=5, rounds=1) for m in ('fedavg', 'fedmpq')]
    methods.append(played('fedmpq-kd', participation=.67, seed=5, rounds=1, kd_warmup_rounds=0, **KD))
    facts = []
    for whole in methods:
        assert len({line['sampled'] for line in whole.curve}) == 1
        facts.append((whole.run.partition.how, [p.tolist() for p in whole.run.partition.parts],
                      sorted(k for way, k, _ in whole.run.meter.tape if way == 'up'),
                      sorted(whole.decode(d).samples for d in whole.messages('up', 0))))
    assert facts[0] == facts[1] == facts[2] and len(facts[0][2]) == 2
    avg, mpq, kd = (whole.decode(whole.messages('down', 0)[0]) for whole in methods)
    for n in methods[0].run.server.layout.quantized:
        assert torch.equal(quantize(avg.entries[n], 4).levels, mpq.entries[n].levels)
        assert torch.equal(avg.entries[n], kd.entries[n])
    other = make_config('fedavg', **FIELDS | dict(seed=6))
    apart = open_run(other, digits(), workers=1, folder=Path('/nonexistent'))
    apart.pool.close()
    assert [p.tolist() for p in apart.partition.parts] != facts[0][1]
    assert not torch.equal(apart.server.state['fc.weight'], avg.entries['fc.weight'])


# --- journals and kills -------------------------------------------------------------------------------------

LONG = FIELDS | dict(rounds=4, kd_warmup_rounds=0, participation=.67)
PROGRAM = f'''
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from fedmpqkd.core.journal import Journal
from fedmpqkd.core.config import run_id
from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.run import run
from fedmpqkd.federation.methods import make_config
data = load_dataset('digits').subset(train=120, test=100)
config = make_config('fedmpq-kd-ema', alpha=.5, **{LONG!r})
run(config, data, Journal(Path(sys.argv[1]), 'g', 'n', run_id(config, data.fingerprint)), workers=1)
'''


def without_times(path: Path) -> dict:
    record = json.loads(path.read_text())
    for line in record['curve']:
        for key in ('phases', 'seconds', 'seconds_training'): del line[key]
    for key in ('seconds', 'seconds_per_round', 'memory'): del record['summary'][key]
    return record


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    "SIGKILL in the middle, and what other processes find meanwhile and afterwards."
    config = make_config('fedmpq-kd-ema', alpha=.5, **LONG)
    id = run_id(config, digits().fingerprint)
    killed, whole = (Journal(tmp_path / folder, 'g', 'n', id) for folder in ('a', 'b'))
    victim = subprocess.Popen([sys.executable, '-c', PROGRAM, str(tmp_path / 'a')], cwd=ROOT,
                              env=os.environ | dict(OMP_NUM_THREADS='1'))
    try:
        lines, deadline = killed.folder / 'journal.jsonl', time.monotonic() + 500
        while not lines.exists():
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(.01)
        os.kill(victim.pid, signal.SIGSTOP)  # it cannot finish while we look, and still holds its claim
        with pytest.raises(Claimed, match=f'process {victim.pid} on .* since 20'):
            run(config, digits(), killed, workers=1)
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    assert victim.returncode == -signal.SIGKILL and killed.record() is None
    done = [json.loads(text) for text in lines.read_text().splitlines()]
    assert 1 <= len(done) < 4 and [line['round'] for line in done] == list(range(1, len(done) + 1))
    assert len(killed.load()[1]) in (len(done), len(done) + 1)  # the checkpoint is written first

    run(config, digits(), whole, workers=1)
    finished = run(config, digits(), killed, workers=1)
    assert without_times(killed.record_path) == without_times(whole.record_path)
    assert not killed.folder.exists() and not whole.folder.exists()
    assert {p for p in (tmp_path / 'a').rglob('*') if p.is_file()} == {killed.record_path, killed.model_path}

    before = killed.record_path.stat().st_mtime_ns
    again = run(config, digits(), killed, workers=1)  # found, not computed
    assert again == json.loads(json.dumps(finished)) and killed.record_path.stat().st_mtime_ns == before


def test_claims_exclude_each_other_and_end(tmp_path):
    one, other = (Journal(tmp_path, 'g', 'n', 'id') for _ in range(2))
    with one.claim():
        with pytest.raises(Claimed), other.claim(): raise AssertionError('two holders')
        with Journal(tmp_path, 'g', 'n', 'another').claim(): pass
    with other.claim(): pass
    with pytest.raises(KeyError), one.claim(): raise KeyError
    with other.claim(): pass


def finished(config: RunConfig, **more) -> dict:
    "What a record of a run on digits holds at least."
    fingerprint = digits().fingerprint
    id = run_id(config, fingerprint)
    return dict(id=id, config=plain(config), data=dict(fingerprint=fingerprint), **more)


class Late(Journal):
    "Looks for the record just before another process finishes it."
    looked = False

    def record(self):
        if self.looked: return super().record()
        self.looked = True
        return None


def test_a_late_comer_leaves_no_folder(tmp_path):
    config = make_config('fedmpq', **FIELDS)
    record = finished(config)
    Journal(tmp_path, 'g', 'n', record['id']).finish(record)
    late = Late(tmp_path, 'g', 'n', record['id'])
    assert run(config, digits(), late, workers=1) == record
    assert not late.folder.exists()


def test_a_reader_never_sees_half_a_record(tmp_path):
    contents = [finished(make_config('fedmpq'), curve=list(range(n))) for n in (3, 60_000)]
    journal, stop = Journal(tmp_path, 'g', 'n', contents[0]['id']), threading.Event()
    journal.finish(contents[0])

    def write():
        while not stop.is_set():
            for record in contents: journal.finish(record)

    writer = threading.Thread(target=write)
    writer.start()
    try: seen = [len(journal.record()['curve']) for _ in range(150)]
    finally:
        stop.set()
        writer.join()
    assert set(seen) <= {3, 60_000}


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / 'record.json'
    write_atomic(path, b'{"old": 1}')

    def die(*args): raise KeyboardInterrupt
    monkeypatch.setattr(os, step, die)
    with pytest.raises(KeyboardInterrupt): write_atomic(path, b'{"new": 2}' * 100)
    assert path.read_bytes() == b'{"old": 1}' and [p.name for p in tmp_path.glob('*.json')] == ['record.json']


def test_a_run_without_a_journal_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    run(make_config('fedmpq', **FIELDS | dict(rounds=1, dropout=1.0, clients=2)), digits(20, 20), workers=1)
    assert list(tmp_path.iterdir()) == []


# --- small data sets ----------------------------------------------------------------------------------------

def test_a_class_without_test_images():
    run(make_config('fedmpq', **FIELDS | dict(rounds=1, dropout=1.0, clients=2)), digits(40, 7), workers=1)


class OnePixel(nn.Module):
    "Normalises maps of one pixel, as deep networks do at their end."
    def __init__(self, classes: int):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 32), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x): return self.fc(self.bn(self.conv(x)).relu().flatten(1))


def test_recalibration_with_126_images(monkeypatch):
    monkeypatch.setitem(models._MODELS, 'one-pixel', OnePixel)
    whole = opened(make_config('fedmpq', **FIELDS | dict(model='one-pixel')), digits(126, 20))
    try: assert 0 <= recalibrated(whole)['accuracy_recalibrated'] <= 100
    finally: whole.pool.close()


@pytest.mark.parametrize('images', [125, 127])
def test_recalibration_with_other_numbers_of_images(monkeypatch, images):
    monkeypatch.setitem(models._MODELS, 'one-pixel', OnePixel)
    whole = opened(make_config('fedmpq', **FIELDS | dict(model='one-pixel')), digits(images, 20))
    state = {n: t.clone() for n, t in whole.server.state.items()}
    assert 0 <= recalibrated(whole)['accuracy_recalibrated'] <= 100
    whole.pool.close()
    assert all(torch.equal(t, state[n]) for n, t in whole.server.state.items())  # a diagnosis changes nothing
    assert all(m.momentum == .1 for m in whole.pool.replica.model.modules() if isinstance(m, nn.BatchNorm2d))


def test_whole_numbers_at_the_door():
    assert RunConfig(seed=2**53 + 1).seed == 2**53 + 1
    with pytest.raises(ValueError, match='rounds'): RunConfig(rounds=float('inf'))


@pytest.mark.parametrize('field', ['alpha', 'temperature', 'lambda_b', 'weight_decay'])
def test_infinite_weights_at_the_door(field):
    with pytest.raises(ValueError, match=field): RunConfig(**{field: float('inf')})


# --- positive controls --------------------------------------------------------------------------------------

def test_weights_change_their_levels(played):
    "At least one in a hundred in every client's round at four bits, for the rules that claim to learn."
    for whole in (played('fedmpq'), played('fedmpq-kd', **KD), played('fedmpq-int-sr', **NOISY)):
        for line in whole.curve: assert line['moved'] >= .01


def test_fedavg_learns_digits():
    """Six epochs of 400 digits: more than half of the test set, once normalisation has the statistics of the
    averaged weights; the running ones, which the headline uses, lag behind after so few steps.
    Chance is 10 %."""
    fields = FIELDS | dict(clients=2, partition='iid', rounds=3, local_epochs=2)
    record = run(make_config('fedavg', **fields), digits(400, 200), workers=2)
    assert record['summary']['accuracy_recalibrated'] > 50, record['summary']
    losses = [line['loss'] for line in record['curve']]
    assert losses[2] < .75 * losses[0] and losses[0] > losses[1] > losses[2]


def test_one_client_is_ordinary_training(played):
    "Federated averaging of a single client, beside a bare PyTorch loop over the same batches."
    whole = played('fedavg', clients=1)
    config, data = whole.run.config, whole.run.pool.task
    model = build_model('resnet8', 10, config.seed).to(memory_format=torch.channels_last)
    losses = []
    for t in range(config.rounds):
        # momentum does not outlive a round
        sgd = torch.optim.SGD(model.parameters(), config.lr, config.momentum)
        model.train()
        for part in local_batches(120, config, t, 0, data.data.flip):
            x, y = data.batch(*part)
            loss = nn.functional.cross_entropy(model(x), y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    by_round = [np.mean(losses[:8]), np.mean(losses[8:])]
    assert [line['loss'] for line in whole.curve] == pytest.approx(by_round, rel=1e-3)
    for n, t in model.state_dict().items():
        assert torch.allclose(t.double(), whole.run.server.state[n].double(), rtol=1e-2, atol=1e-3), n
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.data.mean, data.data.std))
    x = (data.data.test_x / 255 - mean) / std
    with torch.no_grad(): right = (model.eval()(x).argmax(1) == data.data.test_y).sum().item()
    assert whole.curve[-1]['accuracy'] == pytest.approx(100 * right / len(x), abs=2)


GOLDEN = dict(loss=(2.3578922748565674, 2.28173166513443), kd=(.04940918181091547, .010686255060136318),
              moved=(.30465909090909093, .11574866310160428))


def test_golden_run():
    "Two clients, two rounds, four bits, a teacher: the numbers of version 1 of the algorithm."
    fields = dict(model='resnet8', clients=2, rounds=2, dirichlet=1.0, batch_size=64, eval_images=0,
                  kd_warmup_rounds=0)
    curve = run(make_config('fedmpq-kd', **fields, **KD), digits(200, 100), workers=1)['curve']
    # the latter two feel the CPU's kernels more
    for key, tolerance in (('loss', 2e-3), ('kd', 2e-2), ('moved', 8e-2)):
        got = [line[key] for line in curve]
        assert got == pytest.approx(GOLDEN[key], rel=tolerance), (
            f'the numerics of a run have changed ({key} is {got}, was {list(GOLDEN[key])}): if that is '
            'intended, add a Revision to core.config and write the new numbers here; otherwise it is a bug')
    assert [(line['bytes_down'], line['bytes_up']) for line in curve] == [(630738, 125762)] * 2


def test_the_server_computes_without_helpers_while_workers_train(monkeypatch):
    "OpenMP's helpers would spin for cores that the workers hold; afterwards the caller has its threads back."
    seen, before = [], torch.get_num_threads()
    whole = open_run(make_config('fedavg', **FIELDS), digits(), workers=2)
    star = run_module.PROTOCOLS['star']
    def judged(*args):
        seen.append(torch.get_num_threads())
        return star.evaluate(*args)
    monkeypatch.setitem(run_module.PROTOCOLS, 'star', dataclasses.replace(star, evaluate=judged))
    try:
        torch.set_num_threads(2)
        play(whole, [], until=1)
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(KeyError), run_module.one_thread(): raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        whole.pool.close()


def test_a_crew_works_on_a_few_tasks_at_a_time():
    "Results keep their order; at most twice the workers' number and one are under way at a time."
    whole, started = open_run(make_config('fedavg', **FIELDS), digits(), workers=2), []
    def slow_first(i):
        started.append(i)
        if i == 0: time.sleep(0.2)
        return i * i
    try:
        results = whole.pool.map(slow_first, range(40))
        assert next(results) == 0 and len(started) <= 5
        assert list(results) == [i * i for i in range(1, 40)]
        failing = whole.pool.map(lambda i: 1 // i, [1, 0, 1])
        assert next(failing) == 1
        with pytest.raises(ZeroDivisionError): next(failing)
    finally: whole.pool.close()
