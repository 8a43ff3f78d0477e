"An augmentation of a run: with every method, the same whoever computes, chosen together, refused by name."
import numpy as np
import pytest
import torch
from samples import dataset

from fedmpqkd.core.config import AUGMENTS, MIXING, RunConfig
from fedmpqkd.core.journal import Journal
from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data.augment import AUGMENTATIONS, SEVEN
from fedmpqkd.evaluate.augmentation import Sums, augmented_batches, no_sums, score
from fedmpqkd.federation import selection
from fedmpqkd.federation.methods import RECIPES, make_config
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import run
from fedmpqkd.learn.task import Task
from fedmpqkd.wire.format import decode

SMALL = dict(model='cnn', clients=3, rounds=4, batch_size=16, min_batch=8, lr=0.05, alpha=0.5,
             public_images=20, dirichlet=0.2)
FEW = dict(augment='auto', augment_every=2, augment_choices='none/erasing/randaugment')


def test_the_names_of_the_configuration_are_those_of_the_table():
    assert AUGMENTS == SEVEN
    assert {n for n, a in AUGMENTATIONS.items() if a.mixes} == set(MIXING)
    assert set(AUGMENTATIONS) == {*AUGMENTS, *MIXING}


@pytest.mark.parametrize('name', ['cutmix', 'erasing+mixup'])
@pytest.mark.parametrize('method', ['fedavg', 'fedmpq-kd-dkd', 'fedmpq-kd-agree', 'fedmpq-kd-co', 'fedkd',
                                    'feddf', 'fedmd', 'fedmpq-moshpit', 'fedpaq'])
def test_labels_that_mix_go_through_every_kind_of_method(method, name):
    free = {k: v for k, v in SMALL.items() if k not in RECIPES[method]}
    c = make_config(method, **free | dict(rounds=2, augment=name))
    record = run(c, dataset(), workers=1)
    assert np.isfinite([line['loss'] for line in record['curve'] if 'loss' in line]).all()
    assert record['curve'][-1]['steps'] > 0


def test_the_number_of_workers_changes_nothing_and_the_draws_do_not_depend_on_the_method():
    c = make_config('fedmpq-kd', **SMALL, augment='trivialaugment')
    one, two = (run(c, dataset(), workers=w) for w in (1, 2))
    assert [x['loss'] for x in one['curve']] == [x['loss'] for x in two['curve']]
    plain = run(make_config('fedmpq-kd', **SMALL), dataset(), workers=1)
    assert [x['loss'] for x in plain['curve']] != [x['loss'] for x in one['curve']]


def test_a_run_that_was_stopped_goes_on_with_its_choice(tmp_path, monkeypatch):
    two = FEW | dict(augment_choices='erasing/randaugment')
    c = make_config('fedmpq-kd', **SMALL | dict(rounds=5), **two)
    whole = run(c, dataset(), Journal(tmp_path / 'a', 'g', 'n', 'whole'), workers=1)

    def stop(line):
        if line['round'] == 3: raise KeyboardInterrupt

    stop.resume = lambda done: None
    journal = Journal(tmp_path / 'b', 'g', 'n', 'stopped')
    with pytest.raises(KeyboardInterrupt): run(c, dataset(), journal, workers=1, progress=stop)
    rest = run(c, dataset(), journal, workers=1)
    told = [line['augment'] for line in whole['curve']]
    assert told[:2] == ['none', 'none'] and told[2] != 'none' and told[2] == told[3]
    for key in ('augment', 'loss', 'bytes_up', 'bytes_down'):
        assert [line[key] for line in rest['curve']] == [line[key] for line in whole['curve']], key
    assert rest['summary']['manifest_bytes'] == whole['summary']['manifest_bytes']


def test_bytes_of_a_choice_are_counted_once_and_only_where_they_cross():
    fixed = run(make_config('fedavg', **SMALL), dataset(), workers=1)
    auto = run(make_config('fedavg', **SMALL, **FEW), dataset(), workers=1)
    classes, clients = fixed['data']['classes'], SMALL['clients']
    header, entry = 31 + 4, 6  # of a message with its checksum; of a plain tensor
    up = clients * (header + 3 * (entry + 4 * (classes**2 + classes + 1)))
    extra = [a['bytes_up'] - f['bytes_up'] for a, f in zip(auto['curve'], fixed['curve'], strict=True)]
    down = [a['bytes_down'] - f['bytes_down'] for a, f in zip(auto['curve'], fixed['curve'], strict=True)]
    assert extra == [0, 0, up, 0]
    assert down == [0, 0, clients * (header + entry + 8), clients * (header + entry + 8)]


def test_the_federated_score_of_a_quantised_model_is_the_central_one_with_absent_classes():
    data = dataset()
    c = make_config('fedmpq', **SMALL | dict(dirichlet=0.05, clients=5), **FEW)
    f = open_run(c, data, workers=1)
    sizes = {k: len(p) for k, p in enumerate(f.partition.parts)}
    f.server.expect(2, sizes)
    active = [k for k, n in sizes.items() if n]
    found = [selection.read_sums(f.server, selection.measured(f, k, 2), k, data.classes) for k in active]
    assert any(score(s['none']).absent for s in found)
    state = selection.received_state([decode(selection.downlink(f.server, 0, 2)[0], f.server.manifest)])
    model = f.pool.replica.predictor(state)
    for name in selection.candidates(c):
        p, y = [], []
        for k in active:
            part = selection.part_of(f.pool.task, torch.from_numpy(f.partition.parts[k]))
            for x, labels in augmented_batches(part, name, torch_rng(c.seed, 'augment', 2, 2**20 + k), 125):
                p.append(model(x.contiguous(memory_format=torch.channels_last)).double().softmax(1))
                y.append(labels)
        p, y = torch.cat(p), torch.cat(y)
        present = y.unique().tolist()
        q = {i: p[y == i].mean(0) for i in present}
        cmi = torch.stack([(p[i] * (p[i].log() - q[int(y[i])].log())).sum() for i in range(len(y))]).mean()
        dev = -torch.stack([q[i][i].log() for i in present]).mean()
        assert score(sum((s[name] for s in found), no_sums(data.classes))).m == \
            pytest.approx(float(dev - cmi), abs=1e-6)


def test_sums_that_cannot_be_are_refused_and_the_others_count(monkeypatch):
    c, honest = make_config('fedavg', **SMALL, **FEW), selection.client_sums

    def lying(replica, config, task, work, state):
        sums = honest(replica, config, task, work, state)
        if work.client: return sums
        return {n: Sums(2 * s.mass, 2 * s.count, 2 * s.entropy) for n, s in sums.items()}

    monkeypatch.setattr(selection, 'client_sums', lying)
    f = open_run(c, dataset(), workers=1)
    line = selection.select(f, 2)
    assert 'registered are' in line['augment_refused']['0'] and line['augment_clients'] == 2
    f.server.state = {n: t * float('nan') if t.is_floating_point() else t for n, t in f.server.state.items()}
    monkeypatch.setattr(selection, 'downlink', lambda server, client, round: ())
    monkeypatch.setattr(selection, 'received_state', lambda down: f.server.state)
    before = f.pool.task.augmentation
    line = selection.select(f, 4)
    assert line['augment'] == before and line['augment_clients'] == 0 and 'augment_scores' not in line


def test_what_has_no_images_is_refused_at_the_door():
    class Words(Task):
        name = 'words'
        network = epoch = batch = plain = inputs = loss = score = None

    words = Words()
    assert words.augmented('none') is words
    with pytest.raises(ValueError, match="augment='erasing' is for images, and words has none"):
        words.augmented('erasing')
    for wrong in (dict(augment='erasing+'), dict(augment='cutmix+erasing'), dict(augment='nothing'),
                  dict(augment='auto', augment_choices='none/mixup'), dict(augment='auto', augment_every=0)):
        with pytest.raises(ValueError, match='augment'): RunConfig(**wrong)
    with pytest.raises(ValueError, match='needs a server with a model'):
        RunConfig(augment='auto', exchange='logits-only', public_images=10)
