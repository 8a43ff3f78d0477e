"Diagnostics: closed forms, automatic differentiation, and agreement with the round itself."
import copy
import json
import math
from dataclasses import replace

import matplotlib

matplotlib.use('Agg')
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data.images import from_tensors
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.pool import WorkerPool
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import play, recalibrated
from fedmpqkd.federation.server import Server, deployed, downlink
from fedmpqkd.learn.client import ClientRound, local_round
from fedmpqkd.learn.replica import Replica
from fedmpqkd.learn.vision import VisionTask, epoch_batches, image_task
from fedmpqkd.models.vision import register_model
from fedmpqkd.quant.bits import RULES, group_lasso, plane_weights
from fedmpqkd.quant.quantize import quantize
from fedmpqkd.report import diagnostics as D
from fedmpqkd.wire.format import decode

torch.set_num_threads(1)
STUDY = sorted((ROOT / 'results' / 'exp1' / 'mini').glob('*.json'))

class Counted(nn.Linear):
    "A linear layer with the whole-number buffer that networks with batch normalisation have."
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer('seen', torch.tensor(0))


register_model('linear for diagnostics', lambda classes: nn.Sequential(nn.Flatten(), Counted(3072, classes)))
register_model('tiny for diagnostics',
               lambda classes: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Counted(3, classes)))
register_model('norm for diagnostics',
               lambda classes: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, classes)))


@pytest.fixture(scope='module')
def data():
    "Coloured noise whose brightness depends on the class: 96 images to train on, 40 to test."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(136) % 4
    x = (torch.rand(136, 3, 32, 32, generator=g) * 120 + 30 * y[:, None, None, None]).to(torch.uint8)
    return from_tensors('noise', x[:96], y[:96], x[96:], y[96:], flip=False)


def place(config, data, n=64, round=1, client=0):
    "What a replay needs, with the server it came from."
    replica, images = Replica(config, image_task(data.classes)), VisionTask(data)
    server = Server(config, replica.layout, replica.state)
    work = ClientRound(client, round, torch.arange(n))
    return (replica, config, images, work, downlink(server, client, round)), server


def linear(method='fedmpq-kd', **fields):
    "A linear classifier: every gradient is known in closed form."
    return make_config(method, **dict(model='linear for diagnostics', clients=1, rounds=3, batch_size=32,
                                      lr=0.01) | fields)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def inputs(arguments, number):
    "A batch of the round as float64 matrices: images [B, 3072], labels [B], straight from the loader."
    _, config, images, work, _ = arguments
    g = torch_rng(config.seed, 'loader', work.round, work.client)
    position, *views = list(epoch_batches(len(work.index), config.batch_size, g, False))[number]
    x, y = images.batch(work.index[position], *views)
    return x.flatten(1).double().numpy(), y.numpy()


# ---- the replay is the round

@pytest.mark.parametrize('fields', [dict(update=u) for u in ('signed-planes', 'latent', 'int-sr', 'official')]
                         + [
    dict(local_epochs=2, teacher_refresh=0), dict(local_epochs=2, teacher_frozen=False)], ids=str)
def test_replay_ends_where_the_round_ends(data, fields):
    config = replace(linear(bits=3, alpha=5.0, lambda_b=1.0), **fields)
    arguments, server = place(config, data)
    *_, (train_state, _, _) = D.replay(*arguments)
    ours = train_state.rule.finish()[0]
    replica, _, images, work, down = place(config, data)[0]
    theirs = decode(local_round(replica, replace(config, assignment='uniform'), images, work, down,
                                server.manifest).message,
                    server.manifest).entries['1.weight']
    assert torch.equal(ours.levels, theirs.levels)
    assert torch.equal(ours.sign * (ours.levels > 0), theirs.sign * (theirs.levels > 0))
    assert ours.scale == pytest.approx(theirs.scale, rel=1e-6)


def test_replay_counts_steps_and_refuses_an_empty_client(data):
    arguments, _ = place(linear(alpha=0.5), data, n=70)
    assert [len(x) for _, x, _ in D.replay(*arguments)] == [32, 32, 6]
    with pytest.raises(ValueError, match='client 0 has no images'):
        next(D.replay(*place(linear(alpha=0.5), data, n=0)[0]))


# ---- gradients of the losses

def test_loss_gradients_in_closed_form(data):
    arguments, server = place(linear(bits=4, alpha=0.7, temperature=3.0), data)
    train_state, x, y = next(D.replay(*arguments))
    ce, kd = D.loss_gradients(arguments[0], train_state, x, y, arguments[0].weights)
    rows, labels = inputs(arguments, 0)
    bias = server.state['1.bias'].double().numpy()
    teacher = rows @ server.state['1.weight'].double().numpy().T + bias
    student = rows @ quantize(server.state['1.weight'], 4).dequantize().double().numpy().T + bias
    want = (softmax(student) - np.eye(4)[labels]).T @ rows / 32
    np.testing.assert_allclose(ce[0].numpy(), want, atol=1e-5)
    # d/dz T^2 KL(softmax(t/T) || softmax(z/T)) = T (softmax(z/T) - softmax(t/T))
    want = 0.7 * 3 * (softmax(student / 3) - softmax(teacher / 3)).T @ rows / 32
    assert np.abs(want).max() > 1e-4
    np.testing.assert_allclose(kd[0].numpy(), want, atol=1e-5)


def test_distillation_gradient_is_zero_where_student_equals_teacher(data):
    arguments, _ = place(linear('fedmpq-kd-delivered', bits=2, alpha=5.0), data)
    train_state, x, y = next(D.replay(*arguments))
    ce, kd = D.loss_gradients(arguments[0], train_state, x, y, arguments[0].weights)
    assert float(kd[0].norm()) < 1e-5 * float(ce[0].norm())
    report = D.gradient_report(*arguments, steps=2)
    assert report.kd[0] < 1e-5 < report.kd[1] and report.layer.tolist() == ['1.weight'] * 2
    assert report.step.tolist() == [1, 2]


@pytest.mark.parametrize('fields', [dict(teacher_frozen=False), dict(alpha_schedule='grad-ratio')], ids=str)
def test_looking_changes_nothing(data, fields):
    "Teachers that learn, and weights that adapt, end up the same, measured in between or not."
    config, ends = replace(linear(bits=6, alpha=1.0), **fields), []
    for look in (False, True):
        arguments, _ = place(config, data, n=96)
        for train_state, x, y in D.replay(*arguments):  # noqa: B007
            if look: D.loss_gradients(arguments[0], train_state, x, y, arguments[0].weights)
        ends.append((train_state.rule.layers[0].value.clone(), float(train_state.totals['kd'])))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] > 0


def test_without_a_teacher_the_term_is_zero(data):
    report = D.gradient_report(*place(linear('fedmpq', bits=4), data)[0], steps=1)
    assert report.kd[0] == 0 and report.ce[0] > 0 and math.isnan(report['ce.kd'][0])
    assert not math.isnan(report['ce.lasso'][0])


def test_full_precision_has_no_regulariser(data):
    report = D.gradient_report(*place(linear('fedavg-kd', alpha=0.5), data)[0], steps=2)
    assert (report.lasso == 0).all() and report.ce[0] > 0
    assert report.kd[0] < 1e-6 < report.kd[1]  # the teacher is the starting point itself


# ---- units of the rules

@pytest.mark.parametrize('bits', [1, 2, 5, 8])
def test_lasso_gradient_is_that_of_group_lasso(bits):
    w = torch.randn(60, generator=torch.Generator().manual_seed(bits))
    config, shown = RunConfig(update='signed-planes', lambda_b=0.3), [torch.zeros(60), torch.zeros(40)]
    rule = RULES['signed-planes'](config, [quantize(w, bits), quantize(w[:40], 2)], shown)
    planes = (rule.layers[0].state['planes'] / rule.layers[0].scale).requires_grad_()
    (g,) = torch.autograd.grad(0.3 / 100 * group_lasso(planes), planes)
    want = rule.layers[0].scale * (plane_weights(bits) @ g)  # W = S sum c_i B_i
    torch.testing.assert_close(D.lasso_gradient(rule.layers[0], config), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('fields', [dict(), dict(bit_lr='plain'), dict(bit_lr='plain', scale_update='fixed'),
                                    dict(scale_update='fixed')])
@pytest.mark.parametrize('bits', [1, 3, 8])
def test_a_step_of_the_planes_is_gain_times_gradient_plus_lasso(fields, bits):
    g = torch.Generator().manual_seed(bits)
    config = RunConfig(update='signed-planes', lambda_b=0.5, lr=1e-3, momentum=0.0, **fields)
    shown = [torch.zeros(50)]
    rule = RULES['signed-planes'](config, [quantize(torch.randn(50, generator=g), bits)], shown)
    layer = rule.layers[0]
    gradient, before = torch.randn(50, generator=g), layer.value.clone()
    want = D.step_gain(layer, config) * gradient + D.lasso_gradient(layer, config)
    rule.receive([gradient])
    torch.testing.assert_close((before - layer.value) / 1e-3, want, rtol=1e-3, atol=2e-3)


def test_latent_weights_get_gradient_plus_hinge():
    config = RunConfig(update='latent', lambda_b=2.0)
    w = torch.randn(50, generator=torch.Generator().manual_seed(1))
    layer = (rule := RULES['latent'](config, [quantize(w, 3)], [torch.zeros(50)])).layers[0]
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(2))
    lasso_grad = D.lasso_gradient(layer, config)
    rule.receive([gradient])
    assert float(lasso_grad.norm()) > 0 and D.step_gain(layer, config) == 1
    torch.testing.assert_close(layer.value.grad, gradient + lasso_grad)


def test_official_planes_are_in_the_same_units():
    w = torch.randn(50, generator=torch.Generator().manual_seed(3))
    pulls = []
    for update in ('signed-planes', 'official'):
        config = RunConfig(update=update, lambda_b=0.3, bit_lr='plain')
        layer = RULES[update](config, [quantize(w, 4)], [torch.zeros(50)]).layers[0]
        pulls.append(D.lasso_gradient(layer, config))
        assert D.step_gain(layer, config) == pytest.approx(float(w.abs().max()) ** 2 * 17 / 45)
    torch.testing.assert_close(*pulls, rtol=1e-5, atol=1e-7)


def test_a_layer_without_bits_is_not_pulled():
    config = RunConfig(update='signed-planes', lambda_b=1.0)
    layer = D.Layer(torch.zeros(5), 0, torch.tensor(0.0), torch.zeros(5), 0.0)
    assert D.step_gain(layer, config) == 0 and not D.lasso_gradient(layer, config).any()


def test_lengths_and_angles_by_hand():
    found = D.lengths_and_angles(dict(a=torch.tensor([3.0, 4.0]), b=torch.tensor([[0.0], [2.0]]),
                                      c=torch.zeros(2)))
    assert (found['a'], found['b'], found['c'], found['a.b']) == (5, 2, 0, pytest.approx(0.8))
    assert math.isnan(found['a.c']) and math.isnan(found['b.c'])


def test_report_in_the_units_of_plain_planes(data):
    reports = [D.gradient_report(*place(linear(alpha=0.5, bits=4, bit_lr=r), data)[0], steps=1)
               for r in ('precond', 'plain')]
    scale = float(place(linear('fedmpq', bits=4), data)[1].state['1.weight'].abs().max())
    for term in ('ce', 'kd'):
        assert reports[1][term][0] / reports[0][term][0] == pytest.approx(scale**2 * 17 / 45, rel=1e-5)
    assert reports[1].lasso[0] == pytest.approx(reports[0].lasso[0], rel=1e-5)


# ---- levels

@pytest.mark.parametrize('update', ['signed-planes', 'latent', 'int-sr'])
def test_level_changes_agree_with_the_log_of_the_round(data, update):
    config = replace(linear(bits=4, alpha=0.5), update=update, lr=0.05)
    arguments, server = place(config, data)
    found = D.level_changes(*arguments)
    log = local_round(*place(config, data)[0], server.manifest).log
    assert found.since_start.iloc[-1] == pytest.approx(log['moved']) and log['moved'] > 0.01
    assert found.moved[0] == found.since_start[0] and found.step.tolist() == [1, 2]
    assert found.since_start[1] <= found.moved.sum() + 1e-12
    assert found.lasso.isna().all() == (update != 'signed-planes')
    if update == 'signed-planes': assert found.lasso.iloc[-1] == pytest.approx(log['lasso_moved'])


@pytest.mark.parametrize('factor, moves', [(0.33, [0, 0]), (0.36, [0, 1]), (0.98, [0, 1]), (1.02, [1, 1])])
def test_the_lasso_moves_one_bit_weights_beyond_a_threshold(data, factor, moves):
    """With N = 1 and m ones the plane has length sqrt(m), and every one falls to level 0 once it is
    shorter by more than half.
    The first step shortens it by lr * lambda, both together, with momentum .9, by 2.9 times as much."""
    weight = place(linear('fedmpq', bits=1), data)[1].state['1.weight']
    ones = int((weight.abs() / weight.abs().max() > 0.5).sum())
    config = linear('fedmpq', bits=1, lr=0.01, lambda_b=factor * math.sqrt(ones) / 2 / 0.01)
    found = D.level_changes(*place(config, data)[0])
    assert found.lasso.tolist() == pytest.approx([m * ones / weight.numel() for m in moves])


def test_levels_that_change_are_weights_that_change(data):
    "With a fixed scale a weight has another level if and only if it has another value."
    config = linear(bits=4, alpha=0.5, lr=0.05, scale_update='fixed')
    arguments, _ = place(config, data, n=96)
    shown = [arguments[0].weights[0].detach().clone() for _ in D.replay(*arguments)]
    shown.append(arguments[0].weights[0].detach().clone())
    found = D.level_changes(*place(config, data, n=96)[0])
    assert len(found) == 3 and found.moved[1] != found.since_start[1]
    assert found.moved.tolist() == pytest.approx([float((a != b).float().mean())
                                                  for a, b in zip(shown, shown[1:], strict=False)])
    assert found.since_start.tolist() == pytest.approx([float((shown[0] != b).float().mean())
                                                        for b in shown[1:]])


def test_without_learning_nothing_changes_level(data):
    found = D.level_changes(*place(linear(bits=4, alpha=0.5, lr=0.0), data)[0])
    assert not found.drop(columns='step').to_numpy().any()
    with pytest.raises(ValueError, match='no levels'): D.level_changes(*place(linear('fedavg'), data)[0])


# ---- FedProx at matched strength

def test_matched_prox_in_closed_form(data):
    "Two steps of a full-precision student starting as its teacher: first KD gradient and distance are zero."
    config = linear('fedavg-kd', model='tiny for diagnostics', alpha=0.5, temperature=2.0, lr=0.2)
    arguments, server = place(config, data)
    w, b = (server.state[f'2.{n}'].double().numpy() for n in ('weight', 'bias'))

    def pooled(number):
        x, y = inputs(arguments, number)
        return x.reshape(32, 3, -1).mean(2), y

    rows, labels = pooled(0)
    error = (softmax(rows @ w.T + b) - np.eye(4)[labels]) / 32
    move_w, move_b = -0.2 * error.T @ rows, -0.2 * error.sum(0)
    rows, _ = pooled(1)
    student, teacher = rows @ (w + move_w).T + b + move_b, rows @ w.T + b
    error = 0.5 * 2 * (softmax(student / 2) - softmax(teacher / 2)) / 32
    lasso_grad = math.hypot(np.linalg.norm(error.T @ rows), np.linalg.norm(error.sum(0)))
    moved = math.hypot(np.linalg.norm(move_w), np.linalg.norm(move_b))
    assert D.matched_prox(*arguments) == pytest.approx(lasso_grad / moved, rel=1e-3)


def test_matched_prox_is_proportional_to_alpha_at_the_second_step(data):
    "With two steps and a teacher that the student starts as, alpha enters only through the second gradient."
    mu = [D.matched_prox(*place(linear('fedavg-kd', alpha=a), data)[0]) for a in (0.1, 0.4)]
    assert mu[1] / mu[0] == pytest.approx(4, rel=1e-3)


def test_matched_prox_needs_a_teacher_and_a_distance(data):
    with pytest.raises(ValueError, match='no distillation'): D.matched_prox(*place(linear('fedmpq'), data)[0])
    with pytest.raises(ValueError, match='no distillation'):
        D.matched_prox(*place(linear(alpha=0.5), data, round=0)[0])  # warm-up
    with pytest.raises(ValueError, match='at least two'):
        D.matched_prox(*place(linear(alpha=0.5), data, n=32)[0])


# ---- features

@pytest.mark.parametrize('model, last', [('resnet8', 'fc'), ('mobilenetv2', 'classifier'),
                                         ('vit-tiny-4', 'head')])
def test_features_times_classifier_are_the_logits(data, model, last):
    config = RunConfig(model=model)
    replica = Replica(config, image_task(4))
    state = {n: t.clone() for n, t in replica.state.items()}
    g = torch.Generator().manual_seed(5)
    state[f'{last}.weight'] = torch.randn(state[f'{last}.weight'].shape, generator=g)
    n = 131 if model == 'resnet8' else 3  # more than one portion
    x = torch.randn(n, 3, 32, 32, generator=g)
    found = D.features(replica, state, x, batch=n - 1)
    logits = replica.predictor(state)(x)
    assert found.shape == (n, state[f'{last}.weight'].shape[1]) and logits.std() > 0.01
    torch.testing.assert_close(found @ state[f'{last}.weight'].T + state[f'{last}.bias'], logits, rtol=1e-3,
                               atol=1e-4)
    assert not any(m._forward_pre_hooks for m in replica.folded.model.modules())


def test_tsne_keeps_clusters_and_places_equal_features_together():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 4
    points = 10 * torch.eye(4)[labels] + 0.3 * torch.randn(24, 4, generator=g)
    student, teacher = D.embed_together(points, points + 1e-4)
    again = D.embed_together(points, points + 1e-4)
    assert np.array_equal(student, again[0]) and np.array_equal(teacher, again[1])
    distance = np.linalg.norm(student[:, None] - teacher[None], axis=2)
    assert (labels[distance.argmin(1)] == labels).all()
    assert np.median(np.diag(distance)) < 0.1 * np.median(distance)
    ax = D.plot_tsne(points, points, labels)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['student', 'teacher']
    with pytest.raises(ValueError, match='two sets of features'): D.embed_together(points, points[:, :2])


# ---- bits and bars from records

RECORD = dict(config=dict(method='fedmpq'),
              curve=[dict(round=1, bits=[4, 2, 4]), dict(round=2, bits=[8, 0, 4])])

def test_bit_table_and_pictures():
    table = D.bit_table(RECORD, ['a.weight', 'b.weight', 'weight'])
    assert table.to_dict() == {1: dict(a=4, b=2, weight=4), 2: dict(a=8, b=0, weight=4)}
    ax = D.bit_heatmap(RECORD, ['a.weight', 'b.weight', 'weight'])
    assert np.array_equal(ax.images[0].get_array(), [[4, 8], [2, 0], [4, 4]])
    assert ax.get_title() == '0 to 8 bits'
    assert [p.get_height() for p in D.bit_histogram(RECORD).patches] == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [p.get_height() for p in D.bit_histogram(RECORD, round=1).patches] == [0, 0, 1, 0, 2, 0, 0, 0, 0]


def test_equal_bits_are_said_and_missing_bits_refused():
    same = dict(RECORD, curve=[dict(round=r, bits=[3, 3, 3]) for r in (1, 2)])
    assert D.bit_heatmap(same, list('abc')).get_title() == 'every layer 3 bits in every round'
    with pytest.raises(ValueError, match='2 names for 3 layers'): D.bit_table(RECORD, ['a', 'b'])
    empty = dict(RECORD, curve=[dict(round=1, bits=[])])
    with pytest.raises(ValueError, match='round 1 has no bits'): D.bit_table(empty, [])
    with pytest.raises(ValueError, match='rounds 1 to 2'): D.bit_histogram(RECORD, round=7)


@pytest.mark.skipif(not STUDY, reason='no committed records')
def test_bars_are_the_means_of_the_dots():
    records = [json.loads(p.read_text()) for p in STUDY]
    ax = D.accuracy_bars(records)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    for label, bar, dots in zip(labels, ax.patches, ax.lines, strict=True):
        method, n = label.split('\nn=')
        want = sorted(r['summary']['accuracy'] for r in records if r['config']['method'] == method)
        assert sorted(dots.get_ydata()) == want and int(n) == len(want)
        assert bar.get_height() == pytest.approx(np.mean(want))


# ---- landscape

def test_landscape_of_a_quadratic():
    "Second differences of w'Aw/2 along an axis are h^2 d'Ad; with A = a I that is a h^2 ||w||^2."
    g = torch.Generator().manual_seed(0)
    state = dict(conv=torch.randn(6, 3, 2, 2, generator=g).double(),
                 fc=torch.randn(4, 6, generator=g).double(),
                 bias=torch.randn(4, generator=g).double(), running_mean=torch.ones(6))
    kept, seen = copy.deepcopy(state), []
    def loss(s):
        seen.append(s)
        return float(1.5 * (s['conv'].square().sum() + s['fc'].square().sum()))
    grid = D.landscape(loss, state, ['conv', 'fc', 'bias'], span=0.6, points=7, seed=3)
    square = float(kept['conv'].square().sum() + kept['fc'].square().sum())
    assert grid.shape == (7, 7) and grid[3, 3] == pytest.approx(1.5 * square) == pytest.approx(loss(kept))
    for axis in (0, 1):
        np.testing.assert_allclose(np.diff(grid, 2, axis=axis), 3 * 0.2**2 * square, rtol=1e-5)
    mixed = np.diff(np.diff(grid, axis=0), axis=1)  # a h^2 d'e: the same everywhere, and small
    np.testing.assert_allclose(mixed, mixed[0, 0], atol=1e-8)
    assert abs(mixed[0, 0]) < 0.5 * 3 * 0.2**2 * square
    assert all(s['bias'] is state['bias'] and s['running_mean'] is state['running_mean'] for s in seen[:-1])
    assert all(torch.equal(state[n], kept[n]) for n in kept)
    assert np.array_equal(grid, D.landscape(loss, state, ['conv', 'fc', 'bias'], span=0.6, points=7, seed=3))
    assert not np.array_equal(grid, D.landscape(loss, state, ['conv', 'fc', 'bias'], span=0.6, points=7,
                                                seed=4))
    assert 'in the middle' in D.plot_landscape(grid, 0.6).get_title()


def test_directions_are_as_long_as_the_filters():
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    w[2] = 0  # an empty filter stays empty
    for d in D.filter_directions(dict(w=w), ['w']):
        torch.testing.assert_close(d['w'].flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
    with pytest.raises(ValueError, match='nothing to move'): D.filter_directions(dict(b=w[0, 0, 0]), ['b'])
    with pytest.raises(ValueError, match='odd'): D.landscape(lambda s: 0.0, dict(w=w), ['w'], points=4)


# ---- the teacher's lag

def norm_config(): return RunConfig(model='norm for diagnostics', clients=1)

def test_fresh_statistics_by_hand(data):
    replica, images = Replica(norm_config(), image_task(4)), VisionTask(data)
    state = {n: t.clone() for n, t in replica.state.items()} | {'0.running_mean': torch.full((3,), 7.0)}
    found = D.fresh_statistics(replica, state, images, samples=96)
    mean, std = (np.array(v)[:, None, None] for v in (data.mean, data.std))
    x = (data.train_x.numpy() / 255 - mean) / std
    np.testing.assert_allclose(found['0.running_mean'], x.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found['0.running_var'], x.var((0, 2, 3), ddof=1), rtol=1e-4)
    assert (state['0.running_mean'] == 7).all() and torch.equal(found['2.weight'], state['2.weight'])
    assert replica.model[0].momentum == 0.1
    assert [len(x) for x, _ in D.plain_batches(images, 65, 32)] == [32, 32]


def test_lag_of_spoilt_statistics(data):
    "Means a thousand deviations off drown the image; fresh statistics restore the very same teacher."
    config = norm_config()
    pool = WorkerPool(config, VisionTask(data), workers=1)
    try:
        good = D.fresh_statistics(pool.replica, {n: t.clone() for n, t in pool.replica.state.items()},
                                  pool.task, 96)
        bad = good | {'0.running_mean': torch.full((3,), 1000.0)}
        found, healthy = D.teacher_lag(pool, bad, good, 96, 96), D.teacher_lag(pool, good, good, 96, 96)
    finally: pool.close()
    for key in ('accuracy', 'kl', 'agreement'):
        assert found[f'{key}_fresh'] == pytest.approx(healthy[key], abs=1e-5)
    assert healthy['kl'] < 1e-5 and healthy['agreement'] == 1 and found['kl'] > 1 and found['agreement'] < 0.6


def test_fresh_statistics_agree_with_the_record(data):
    config = make_config('fedmpq', model='resnet8', clients=2, rounds=1, batch_size=16, partition='iid')
    run = open_run(config, data, workers=1)
    try:
        play(run, [])
        fresh = D.fresh_statistics(run.pool.replica, deployed(run.server, 4.0), run.pool.task, 1000)
        accuracy = D.evaluate(run.pool, fresh, torch.arange(40))['accuracy']
        assert accuracy == recalibrated(run)['accuracy_recalibrated']
    finally: run.pool.close()
