"Teacher x uplink x update x warm start x act_bits: a cell is what it is called, or it is refused."
import dataclasses
import functools
import itertools

import pytest
import torch
from samples import dataset, small

from fedmpqkd.core.config import RunConfig
from fedmpqkd.federation.methods import RECIPES, make_config, register_method
from fedmpqkd.federation.rounds import open_run, run_round
from fedmpqkd.federation.run import play
from fedmpqkd.federation.warmstart import starting_point
from fedmpqkd.learn import client as clients
from fedmpqkd.learn.distill import DISTILL_LOSSES, register_distill_loss
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.bits import RULES, Latent
from fedmpqkd.quant.quantize import QuantAct, quantize
from fedmpqkd.wire.format import decode
from fedmpqkd.wire.messages import ASSIGNMENT

register_model('small', small)
TEACHERS = {
    'fp': dict(teacher='fp'), 'delivered': dict(teacher='delivered'), 'q8': dict(teacher='q8'),
    'ema': dict(teacher='ema'), 'batch': dict(teacher_norm='batch'), 'learning': dict(teacher_frozen=False),
    'lasting': dict(teacher_refresh=2)}
UPDATES = ('fp32', 'signed-planes', 'latent', 'int-sr')
UPLINKS = ('model', 'qsgd', 'dither', 'pq')
STARTS = ('none', 'fedavg:1')


def refusal(teacher: str, uplink: str, update: str) -> str:
    "The sentence with which a cell is refused; empty where it must run."
    if uplink != 'model' and update != 'fp32': return 'compresses the update of a full-precision client'
    if (teacher, update) == ('learning', 'fp32'): return 'takes the same steps is that student'
    return 'full-precision one has its teacher at no cost' if (teacher, update) == ('q8', 'fp32') else ''


def config_of(teacher: str, uplink: str, update: str, start: str, act_bits: int, **more) -> RunConfig:
    planes = {} if update == 'fp32' else dict(bits=(3.0,))
    fields = dict(
        model='small', clients=2, rounds=3, batch_size=16, lr=0.05, partition='iid', alpha=0.5,
        kd_warmup_rounds=1, pq_centroids=4, uplink=uplink, update=update, warm_start=start, act_bits=act_bits)
    return RunConfig(**fields | planes | TEACHERS[teacher] | more)


class Spy:
    "What each client's teacher was filled with, round by round, and what it was sent."
    def __init__(self, monkeypatch):
        self.taught, self.down = {}, {}
        choose, local = clients.choose_teacher, clients.local_round

        def chosen(replica, state):
            self.taught[self.now] = {n: t.clone() for n, t in state.items()}
            return choose(replica, state)

        def played(replica, config, task, work, down, manifest):
            self.now = work.client, work.round
            self.down[self.now] = [decode(d, manifest) for d in down]
            return local(replica, config, task, work, down, manifest)

        monkeypatch.setattr(clients, 'choose_teacher', chosen)
        monkeypatch.setattr('fedmpqkd.federation.rounds.local_round', played)


@functools.cache
def tiny():
    return dataset()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize('teacher', TEACHERS)
@pytest.mark.parametrize('uplink', UPLINKS)
@pytest.mark.parametrize('update', UPDATES)
def test_impossible_cells_are_refused_when_the_configuration_is_made(teacher, uplink, update):
    if not refusal(teacher, uplink, update): pytest.skip('runs: see the cells below')
    with pytest.raises(ValueError, match=refusal(teacher, uplink, update)):
        config_of(teacher, uplink, update, 'none', 32)


# --- every other cell --------------------------------------------------------------------------------

CELLS = [(*cell, *rest) for cell in itertools.product(TEACHERS, UPLINKS, UPDATES) if not refusal(*cell)
         for rest in itertools.product(STARTS, (32, 4))]


def expected(config: RunConfig, down: dict, client: int, round: int) -> dict:
    "The teacher's state by its name, from what was decoded: written anew, entry by entry."
    def dense(round: int) -> dict:
        message = down[client, round][0].dense()
        return {n: t for n, t in message.items() if n != ASSIGNMENT and not n.startswith('codebook')}

    if config.teacher == 'ema':
        state = dense(0)
        for later in range(1, round + 1):
            new = dense(later)
            state = {n: torch.lerp(new[n], t, 0.9) if t.is_floating_point() else new[n]
                     for n, t in state.items()}
        return state
    if config.teacher_refresh == 2: return dense(1 if round < 3 else 3)
    return dense(round) | (down[client, round][1].dense() if config.teacher == 'q8' else {})


def check_messages(config: RunConfig, down: dict, states: list) -> None:
    "What was sent is what the teacher's name promises: fp32, planes, or planes and 8-bit planes."
    for (_, round), messages in down.items():
        carried = messages[0].entries['0.weight']
        fresh = (1,) if config.teacher_refresh == 2 else (1, 2)
        paid = config.update != 'fp32' and config.teacher == 'fp' and round in fresh
        assert (ASSIGNMENT in messages[0].entries) == paid
        if config.update == 'fp32' or paid: assert torch.equal(carried, states[round]['0.weight'])
        else: assert torch.equal(carried.levels, quantize(states[round]['0.weight'], carried.bits).levels)
        assert len(messages) == (2 if config.teacher == 'q8' and round else 1)
        if len(messages) == 2:
            eight = quantize(states[round]['0.weight'], 8).dequantize()
            assert torch.equal(messages[1].entries['0.weight'].dequantize(), eight)


@pytest.mark.parametrize('teacher,uplink,update,start,act_bits', CELLS)
def test_a_cell_is_what_it_is_called(teacher, uplink, update, start, act_bits, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    config, data, spy = config_of(teacher, uplink, update, start, act_bits), tiny(), Spy(monkeypatch)
    first = starting_point(config, data, workers=1)
    spy.taught.clear(), spy.down.clear()
    run = open_run(config, data, workers=1, start=first)
    names, states, lines = set(run.pool.replica.state), [], []
    assert any(isinstance(m, QuantAct) for m in run.pool.replica.model.modules()) == (act_bits == 4)
    try:
        for round in range(3):
            states.append({n: t.clone() for n, t in run.server.state.items()})
            lines.append(run_round(run, round))
    finally: run.pool.close()

    if start != 'none': assert torch.equal(states[0]['0.weight'], first.state['0.weight'])
    assert [line['arrived'] for line in lines] == [2, 2, 2] and not any(line['failed'] for line in lines)
    assert [line.get('kd', 0) > 0 for line in lines] == [False, True, True]
    assert not any(line['skipped'] for line in lines)
    assert set(spy.taught) == {(k, t) for k in (0, 1) for t in (1, 2)}
    for (client, round), state in spy.taught.items():
        assert set(state) == names
        assert same(state, expected(config, spy.down, client, round))
    check_messages(config, spy.down, states)
    assert not torch.equal(states[1]['0.weight'], states[2]['0.weight'])


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('start', ['none', 'fedavg:1', 'public:1'])
def test_bounds_of_activations_travel_and_are_averaged(update, start, monkeypatch, tmp_path):
    "A start in full precision has none: they begin where the network's own do, and are then the server's."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    config, data = config_of('fp', 'model', update, start, 2, alpha=0.0), tiny()
    spy, first = Spy(monkeypatch), starting_point(config, data, workers=1)
    spy.down.clear()
    run = open_run(config, data, workers=1, start=first)
    bounds = [n for n in run.pool.replica.state if n.endswith('bound')]
    assert len(bounds) == 2
    try:
        run_round(run, 0)
        run.server.state |= {n: torch.tensor(0.5) for n in bounds}  # reached, so that they learn
        run_round(run, 1)
    finally: run.pool.close()
    assert set(run.server.state) == set(run.pool.replica.state)
    for n in bounds:
        sent = [[spy.down[k, t][0].entries[n].item() for k in (0, 1)] for t in (0, 1)]
        assert sent == [[10, 10], [0.5, 0.5]]
        assert run.server.state[n] not in (0.5, 10)


@pytest.mark.parametrize('uplink', ['model', 'qsgd', 'dither', 'pq'])
@pytest.mark.parametrize('fields', [dict(teacher='ema'), dict(teacher_refresh=2)], ids=['ema', 'lasting'])
def test_memories_survive_a_compressed_uplink(uplink, fields):
    "What a client keeps is a whole model, and after two downloads it is not the last of them."
    config = dataclasses.replace(config_of('fp', uplink, 'fp32', 'none', 32), **fields)
    run = open_run(config, tiny(), workers=1)
    try:
        for round in range(3): run_round(run, round)
        kept, last = run.memories.load(0, 3), run.server.state
    finally: run.pool.close()
    assert set(kept) == set(last) and not torch.equal(kept['0.weight'], last['0.weight'])


def test_a_residual_and_a_teacher_do_not_share_a_memory():
    with pytest.raises(ValueError, match='both want the one memory'):
        config_of('ema', 'qsgd', 'fp32', 'none', 32, error_feedback=True)


# --- what a user registers, runs ----------------------------------------------------------------------------

@pytest.fixture
def registered():
    "A rule, a loss and a method of a user's; gone afterwards."
    class Mine(Latent): "A latent weight that is called otherwise."

    def halved(student, teacher, y, temperature, weight): return (student - teacher).square().mean() / 2

    RULES['mine'] = Mine
    register_distill_loss('halved', halved)
    register_method('my-rule', base='qat-uniform-kd', update='mine', kd_loss='halved')
    yield
    del RULES['mine'], DISTILL_LOSSES['halved'], RECIPES['my-rule']


def test_a_rule_and_a_loss_that_are_registered_run(registered):
    fields = dict(model='small', clients=2, rounds=2, batch_size=16, lr=0.05, partition='iid')
    own = make_config('my-rule', alpha=0.5, **fields)
    twin = make_config('qat-uniform-kd', alpha=0.5, **fields)
    lines, models = [], []
    for config in (own, twin, dataclasses.replace(own, kd_loss='forward')):
        run = open_run(config, tiny(), workers=1)
        try: lines.append([run_round(run, round) for round in range(2)])
        finally: run.pool.close()
        models.append(run.server.state['0.weight'])
    assert lines[0][1]['kd'] > 0 and lines[0][1]['kd'] != lines[1][1]['kd']
    assert torch.equal(models[1], models[2]) and not torch.equal(models[0], models[1])
    assert make_config('my-rule', alpha=0.5, optimizer='adamw').optimizer == 'adamw'


def test_names_that_are_not_registered_are_still_refused():
    for field, name, known in (('update', 'mine', 'fp32, signed-planes, latent, int-sr, official'),
                               ('kd_loss', 'halved', 'forward, reverse, js, dkd, dist, mse')):
        with pytest.raises(ValueError, match=f"{field}='{name}': allowed are {known}$"):
            RunConfig(**{field: name})


def test_a_run_whose_largest_layer_is_emptied_says_so_once(capsys):
    "One bit leaves 1.7 % of a layer of 1,152 weights of 1,624: logged in every round, printed in the first."
    def heavy(classes):
        net = small(classes)
        with torch.no_grad(): net[3].weight.pow_(41)  # uniform before: .5 ** (1 / 41) = .983
        return net

    register_model('heavy', heavy)
    config = make_config('fedmpq', model='heavy', clients=2, rounds=3, batch_size=64, lr=1e-6, bits=1.0)
    run, curve = open_run(config, tiny(), workers=1), []
    try: play(run, curve)
    finally: run.pool.close()
    assert [line['emptied'] for line in curve] == pytest.approx([1152 / 1624] * 3)
    said = [text for text in capsys.readouterr().out.splitlines() if 'over 95 % are zero' in text]
    assert len(said) == 1 and said[0].startswith('fedmpq seed 0, round 1: 71 % of the weights')
