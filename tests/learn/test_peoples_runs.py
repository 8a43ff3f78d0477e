"Networks that people bring, in whole runs: one result an identity, every buffer arrives, clear refusals."

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tape import timeless
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run
from fedmpqkd.learn.replica import Replica
from fedmpqkd.learn.vision import VisionTask
from fedmpqkd.models.vision import build_model, model_names, register_model

OURS = model_names()
FIELDS = dict(
    clients=3,
    rounds=2,
    partition='iid',
    lr=0.05,
    batch_size=16,
    kd_warmup_rounds=0,
    alpha=0.5,
    temperature=2.0,
)


def digits():
    return load_dataset('digits').subset(90, 40)


class Small(nn.Module):
    "A convolution, something in between, a head."

    def __init__(self, classes, between=None, wrap=lambda z: z):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Linear(8, classes)
        self.between, self.wrap = between, wrap

    def forward(self, x):
        h = self.norm(self.conv(x)).relu()
        if self.between:
            h = self.between(self, h)
        return self.wrap(self.head(h.mean((2, 3))))


def named(name, **kwargs):
    register_model(name, lambda classes: Small(classes, **kwargs))
    return name


def drop(net, h):
    return F.dropout(h, 0.5, net.training)


def python_coin(net, h):
    return h * random.choice([0.5, 2.0]) if net.training else h


def numpy_noise(net, h):
    return h + np.random.randn() if net.training else h


def played(method, model, workers, **more):
    torch.manual_seed(workers), random.seed(workers), np.random.seed(workers)  # of the user's own program
    return timeless(
        run(make_config(method, model=model, **FIELDS | more), digits(), workers=workers)['curve']
    )


@pytest.mark.parametrize('how', [drop, python_coin, numpy_noise])
def test_networks_that_draw_give_one_result(how, capsys):
    name = named(how.__name__, between=how)
    one = played('fedmpq-kd', name, 1)
    assert played('fedmpq-kd', name, 2) == one == played('fedmpq-kd', name, 4)
    said = capsys.readouterr().out
    assert said.count('local rounds take turns') == 3  # once a run
    still = [line['loss'] for line in played('fedmpq-kd', named('still'), 1)]
    assert [line['loss'] for line in one] != still  # noise there was


@pytest.mark.parametrize(
    'method, more',
    [
        ('fedmd', dict(public_images=20)),
        ('feddf', dict(public_images=20)),
        ('fedmpq-kd-moshpit', {}),
        ('fedmpq-kd-batch', {}),
        ('fedmpq-kd-co', {}),
    ],
)
def test_every_protocol_takes_turns(method, more):
    name = named('drop', between=drop)
    assert played(method, name, 1, **more) == played(method, name, 3, **more)


def test_the_programs_own_generators_are_left_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(make_config('fedavg', model=named('drop', between=drop), **FIELDS), digits(), workers=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize('name', [n for n in OURS if 'small-4' not in n])
def test_trying_a_network_changes_nothing(name):
    config = make_config('fedmpq-kd', model=name, **FIELDS)
    replica, fresh = Replica(config, VisionTask(digits())), build_model(name, 10, config.seed)
    assert not replica.draws and not replica.remarks and replica.simple
    for n, t in fresh.state_dict().items():
        assert torch.equal(t, replica.state[n])
    assert all(p.grad is None for p in replica.model.parameters())
    assert all(m.training for m in replica.model.modules())
    # kernels are chosen by strides, so these decide the last digits of every record
    usual = fresh.to(memory_format=torch.channels_last).state_dict()
    assert {n: t.stride() for n, t in usual.items()} == {n: t.stride() for n, t in replica.state.items()}


def test_every_kind_of_buffer_arrives():
    kinds = dict(
        flag=torch.bool, table=torch.int32, short=torch.float16, wide=torch.float64, count=torch.int64
    )

    def mean_of(net, h):
        if net.training:
            with torch.no_grad():
                net.short += 1
                net.wide += 0.5
                net.count += 2
        return h + 0 * net.flag.sum() + 0 * net.short.sum()

    def make(classes):
        net = Small(classes, between=mean_of)
        for n, kind in kinds.items():
            net.register_buffer(n, torch.ones(2).to(kind))
        return net

    register_model('kinds', make)
    config = make_config('fedmpq-kd-batch', model='kinds', **FIELDS)
    found = run(config, digits(), workers=2)
    steps = found['curve'][0]['steps'] // 3  # a client
    replica = Replica(config, VisionTask(digits()))
    assert set(replica.state) & set(kinds) == {'short', 'wide', 'count'}
    assert replica.state['short'].dtype == replica.state['wide'].dtype == torch.float32
    replica.load(dict(short=torch.full((2,), 3.0), wide=torch.full((2,), 4.0), count=torch.tensor([5, 6])))
    assert replica.model.short.tolist() == [3, 3] and replica.model.short.dtype == torch.float16
    assert replica.model.wide.tolist() == [4, 4] and replica.model.wide.dtype == torch.float64
    assert replica.model.count.tolist() == [5, 6] and steps == 2


def test_a_buffer_that_is_replaced_is_sent_as_it_is_now():
    def running(net, h):
        if net.training:
            net.seen = net.seen + 1.0
        return h

    def make(classes):
        net = Small(classes, between=running)
        net.register_buffer('seen', torch.zeros(1))
        return net

    register_model('replacing', make)
    replica = Replica(make_config('fedavg', model='replacing'), VisionTask(digits()))
    assert not replica.simple and replica.state['seen'].item() == 0
    replica.model.train()(torch.randn(2, 3, 32, 32))
    assert replica.state['seen'].item() == 1
    replica.load(dict(seen=torch.tensor([7.0])))
    assert replica.model.seen.item() == 7


class View(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4096, classes)

    def forward(self, x):
        return self.head(self.one(x).view(len(x), -1))


class Volume(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 4, 3), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.conv(x[:, None]).mean((2, 3, 4)))


ACCEPTED = dict(
    view=View,
    volume=Volume,
    lazy=lambda c: nn.Sequential(
        nn.LazyConv2d(4, 4, 4), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(c)
    ),
    old=lambda c: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 4, 4)), nn.Flatten(), nn.Linear(256, c)),
    new=lambda c: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 4, 4)),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(256, c),
    ),
    spectral=lambda c: nn.Sequential(
        nn.Flatten(), parametrizations.spectral_norm(nn.Linear(3072, 8)), nn.Linear(8, c)
    ),
)


@pytest.mark.parametrize('name', ACCEPTED)
@pytest.mark.parametrize('method', ['fedavg', 'fedmpq-kd'])
def test_what_people_bring_runs(name, method):
    register_model(name, ACCEPTED[name])
    one = played(method, name, 1, rounds=1)
    assert one == played(method, name, 2, rounds=1) and not one[0]['failed']


def in_eval(net, h):
    return F.dropout(h, 0.5)


def grows(net, h):
    net.flag.copy_(~net.flag) if net.training else None
    return h


def own_generator(net, h):
    net.__dict__.setdefault('g', torch.Generator())
    return h + torch.randn(1, generator=net.g) if net.training else h


REFUSED = {
    'tuple': (dict(wrap=lambda z: (z, z)), 'returns a tuple'),
    'dict': (dict(wrap=lambda z: dict(logits=z)), 'returns a dict'),
    'thousand': (dict(wrap=lambda z: z.repeat(1, 100)), r'logits \[2, 10\], not torch.float32 \[2, 1000\]'),
    'column': (dict(wrap=lambda z: z[:, :, None]), r'\[2, 10, 1\]'),
    'classes': (dict(wrap=lambda z: z.argmax(1)), 'not torch.int64'),
    'in eval': (dict(between=in_eval), 'draws random numbers in eval mode'),
    'own generator': (dict(between=own_generator), 'generator of its own'),
    'broken': (dict(between=lambda n, h: h.view(3, 5, 7)), 'fails on two samples: RuntimeError'),
    'no gradient': (dict(wrap=lambda z: z.detach()), 'nothing to train'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_run_is_one_sentence_at_the_start(name):
    kwargs, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"model '{name}': .*{why}"):
        Replica(make_config('fedmpq', model=named(name, **kwargs)), VisionTask(digits()))


def test_a_constant_that_training_changes_is_refused():
    def make(classes):
        net = Small(classes, between=grows)
        net.register_buffer('flag', torch.ones(1, dtype=torch.bool))
        return net

    register_model('flipping', make)
    with pytest.raises(ValueError, match='training changes flag'):
        Replica(make_config('fedavg', model='flipping'), VisionTask(digits()))


def test_nothing_to_quantise_is_said_where_bits_are_wanted():
    class Scale(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, classes))

        def forward(self, x):
            return x.mean((2, 3)) @ self.w

    register_model('scale', Scale)
    assert Replica(make_config('fedavg', model='scale'), VisionTask(digits())).layout.quantized == ()
    with pytest.raises(ValueError, match='no convolution or linear layer'):
        Replica(make_config('fedmpq', model='scale'), VisionTask(digits()))


def test_a_run_says_that_it_predicts_unfolded(capsys):
    def penalised(net, h):
        return h + 10 * sum(p.square().sum().item() for p in net.conv.parameters())

    name = named('penalised', between=penalised)
    run(make_config('fedavg', model=name, **FIELDS | dict(rounds=1)), digits(), workers=2)
    assert capsys.readouterr().out.count("model penalised: predicts unfolded") == 1
