"Networks that people bring: folded only where proved, and every tensor is sent, constant or refused."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from fedmpqkd.models.vision import build_model, fold_batchnorm, layer_macs, layout, register_model

BATCH = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))


class Reader(nn.Module):
    "A convolution and its normalisation, and one more reader of the filters."

    def __init__(self, how: str):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=how == 'bias'), nn.BatchNorm2d(8)
        self.head, self.how = nn.Linear(8, 10), how
        self.other = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        if how == 'tied':
            self.other.weight = self.conv.weight
        if how == 'hook':
            self.conv.register_forward_hook(lambda m, x, y: y * m.weight.abs().mean())
        if how == 'root':
            self.register_forward_pre_hook(lambda m, x: (2 * x[0],))
        if how == 'old':
            self.conv = weight_norm(self.conv)
        if how == 'new':
            self.conv = parametrizations.weight_norm(self.conv)
        self.hidden = [self.conv]  # a list is not searched for modules

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        if self.how == 'filters':
            z = z + F.conv2d(x, self.conv.weight, padding=1)
        if self.how == 'bias':
            z = z + self.conv.bias.view(1, -1, 1, 1)
        if self.how == 'affine':
            z = z * self.norm.weight.view(1, -1, 1, 1)
        if self.how == 'two readers':
            z = z + y
        if self.how == 'twice':
            z = z + self.norm(self.conv(-x))
        if self.how in ('tied', 'plain'):
            z = z + self.other(x)
        if self.how == 'penalty':
            z = z + self.conv.weight.square().sum()
        if self.how == 'tensor':
            z = z + sum(p.square().sum() for p in self.conv.parameters())
        if self.how == 'number':
            z = z + 10 * sum(p.abs().mean().item() for p in self.conv.parameters())
        return self.head(F.relu(z).mean((2, 3)))


def moved(net: nn.Module) -> nn.Module:
    "The network after some training: other weights, other statistics."
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = p.data * 1.5 + 0.1 * torch.randn(p.shape, generator=g)
    with torch.no_grad():
        net.train()(3 * BATCH + 1)
    return net.eval()


PROVED_WRONG = [
    'filters',
    'bias',
    'affine',
    'two readers',
    'twice',
    'tied',
    'penalty',
    'hook',
    'root',
    'new',
    'tensor',
]


@pytest.mark.parametrize('how', PROVED_WRONG)
def test_what_is_not_proved_is_not_folded(how):
    net = Reader(how)
    fast = fold_batchnorm(net)
    moved(net)
    fast.load(net.state_dict())
    with torch.no_grad():
        wanted = net(BATCH)
    assert not fast.folded
    assert torch.allclose(fast(BATCH), wanted, rtol=1e-4, atol=1e-4)


def test_a_computed_weight_is_not_folded():
    net = Reader('old')
    with torch.no_grad():
        net(BATCH)
    assert not fold_batchnorm(net).folded


def test_a_number_from_the_filters_is_found_by_comparing():
    net = Reader('number')
    trusting, fast = fold_batchnorm(net), fold_batchnorm(net, BATCH)
    assert trusting.folded and not fast.folded and fast.gap > 1e-3
    moved(net)
    fast.load(net.state_dict())
    with torch.no_grad():
        assert torch.allclose(fast(BATCH), net(BATCH), rtol=1e-4, atol=1e-4)


def test_a_reader_in_a_list_is_found_by_comparing():
    class Hidden(nn.Module):
        def __init__(self, seen):
            super().__init__()
            self.seen = [seen]

        def forward(self, x):
            return F.conv2d(x, self.seen[0].weight, padding=1)

    class Net(Reader):
        def __init__(self):
            super().__init__('plain')
            self.other = Hidden(self.conv)

    assert not fold_batchnorm(Net(), BATCH).folded


def test_an_honest_pair_is_folded_and_agrees():
    net = Reader('plain')
    fast = fold_batchnorm(net, BATCH)
    moved(net)
    fast.load(net.state_dict())
    assert fast.folded and fast.gap < 1e-5
    with torch.no_grad():
        assert torch.allclose(fast(BATCH), net(BATCH), rtol=1e-4, atol=1e-4)


def test_our_networks_fold_what_they_folded():
    pairs = {'resnet8': 9, 'resnet8-A': 7, 'resnet20': 21, 'resnet20-A': 19, 'mobilenetv2': 52}
    for name, number in pairs.items():  # as counted before folding asked for a proof
        fast = fold_batchnorm(build_model(name, 10), BATCH)
        assert (len(fast.pairs), fast.gap < 1e-4) == (number, True), name


def test_types_decide_what_travels():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    kinds = dict(
        mask=torch.bool,
        table=torch.int32,
        byte=torch.uint8,
        short=torch.float16,
        count=torch.int64,
        wide=torch.float64,
    )
    for name, kind in kinds.items():
        net.register_buffer(name, torch.ones(2).to(kind))
    found = layout(net)
    assert set(found.constants) == {'mask', 'table', 'byte'}
    assert {'short', 'wide'} < set(found.buffers) and set(found.counters) == {
        'count',
        '1.num_batches_tracked',
    }


@pytest.mark.parametrize(
    'change, what',
    [
        (lambda n: n.half(), 'quantised weights must be float32: 0.weight'),
        (lambda n: n.append(nn.LazyLinear(3)), 'lazy layers have no shapes yet: 2.weight'),
        (
            lambda n: n.register_parameter('z', nn.Parameter(torch.ones(1, dtype=torch.complex64))),
            'cannot be sent: z',
        ),
    ],
)
def test_a_network_without_a_layout_is_refused(change, what):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    change(net)
    with pytest.raises(ValueError, match=what):
        layout(net)


def test_a_network_may_choose_what_is_quantised():
    class Choosy(nn.Sequential):
        def quantizes(self, name, module):
            return name == '1'

    assert layout(Choosy(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))).quantized == ('1.weight',)


def test_computed_weights_stay_in_full_precision():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    assert layout(net).quantized == ('2.weight',)


def test_volumes_count_their_operations():
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3)

        def forward(self, x):
            return self.conv(x[:, None])  # [1, 1, 3, 32, 32]

    assert layout(Volume()).quantized == ('conv.weight',)
    assert layer_macs(Volume()) == {'conv.weight': 2 * 27 * 1 * 30 * 30}


def test_factories_draw_from_the_seed_whatever_generator_they_ask():
    import random

    import numpy as np

    def make(classes):
        net = nn.Linear(3, classes)
        net.weight.data += random.random() + np.random.rand()
        return net

    register_model('three generators', make)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    a, b = (build_model('three generators', 4, seed=2).weight for _ in range(2))
    assert torch.equal(a, b)
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not torch.equal(a, build_model('three generators', 4, seed=3).weight)


def test_a_factory_must_make_a_module():
    register_model('function', lambda classes: torch.relu)
    with pytest.raises(ValueError, match="'function': the factory returned"):
        build_model('function', 10)


def test_a_lazy_network_for_other_images_is_refused_in_one_sentence():
    def colours(n): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(n))
    register_model('for colours', colours)
    with pytest.raises(ValueError, match=r"fails on images of \[1, 28, 28\]: .*3 channels.*`image`"):
        build_model('for colours', 10, image=(1, 28, 28))
