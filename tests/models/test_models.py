"Models: published numbers, other libraries' counts, and invariants of layout, folding and naming."
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fedmpqkd.models import vision as M

torch.set_num_threads(1)
ALL = ('resnet8', 'resnet8-A', 'resnet20', 'resnet20-A',
       'mobilenetv2', 'mobilenetv2-imagenet', 'vit-small-4', 'vit-tiny-4')


@pytest.fixture(scope='module')
def built():
    return {name: M.build_model(name, 100 if 'mobile' in name else 10) for name in ALL}


def images(n=2, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=0):
    "Random statistics and affine parameters, so that folding has something to do."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            n = m.num_features
            m.running_mean.copy_(0.3 * torch.randn(n, generator=g))
            m.running_var.copy_(0.5 + torch.rand(n, generator=g))
            m.weight.data.copy_((0.5 + torch.rand(n, generator=g)) * torch.randn(n, generator=g).sign())
            m.bias.data.copy_(0.3 * torch.randn(n, generator=g))
    return model.eval()


def gap(fast, model, x):
    with torch.no_grad(): return (fast(x) - model(x)).abs().max().item()


# ---- numbers of the networks

@pytest.mark.parametrize('name, parameters, macs', [
    ('resnet20', 272_474, 40_813_184), ('resnet20-A', 269_722, 40_551_040),
    ('mobilenetv2', 2_351_972, 88_091_648), ('mobilenetv2-imagenet', 2_351_972, 6_240_128)])
def test_published_counts(built, name, parameters, macs):
    assert (M.count_parameters(built[name]), M.count_macs(built[name])) == (parameters, macs)


def test_resnet8_macs_by_hand(built):
    stem, s1 = 432 * 1024, 2 * 2304 * 1024
    s2, s3, fc = (4608 + 9216) * 256, (18432 + 36864) * 64, 640
    assert M.count_macs(built['resnet8-A']) == stem + s1 + s2 + s3 + fc
    assert M.count_macs(built['resnet8']) == stem + s1 + s2 + s3 + fc + 512 * 256 + 2048 * 64


def test_layout_of_resnet20_and_its_bytes(built):
    plan = M.layout(built['resnet20'])
    assert plan.sizes() == [432] + [2304] * 6 + [4608] + [9216] * 5 + [18432] + [36864] * 5 + [640]
    assert sum(plan.sizes()) == 268_336

    def count(names): return sum(int(np.prod(plan.shapes[n])) for n in names)

    assert len(plan.counters) == 21
    assert count(n for n in plan.others if 'shortcut.0' in n) == 512 + 2048
    bn = sum(m.num_features for m in built['resnet20'].modules() if isinstance(m, nn.BatchNorm2d))
    assert (bn, count(plan.buffers)) == (784, 1568)
    fp32 = 4 * (sum(plan.sizes()) + count(plan.others))
    assert fp32 == 1_089_896
    assert fp32 + 4 * count(plan.buffers) + 8 * len(plan.counters) == 1_096_336
    four_bit = 268_336 * 5 // 8 + 4 * (count(plan.others) + count(plan.buffers)) + 8 * 21 + 20 * 4 + 2 * 20
    assert four_bit == 190_822  # planes with signs, leftovers, counters, scales, bits and their drops


@pytest.mark.parametrize('name', ALL)
def test_layout_is_a_partition_in_state_order(built, name):
    model = built[name]
    plan, state = M.layout(model), model.state_dict()
    groups = [plan.quantized, plan.others, plan.buffers, plan.counters]
    assert sorted(n for g in groups for n in g) == sorted(state)
    for group in groups: assert list(group) == [n for n in state if n in set(group)]
    assert all(state[n].dtype == torch.int64 for n in plan.counters)
    assert plan.shapes == {n: tuple(t.shape) for n, t in state.items()}
    assert all(state[n].ndim >= 2 for n in plan.quantized)


def test_which_weights_are_quantised(built):
    vit = set(M.quantized_names(built['vit-tiny-4']))
    named = {'patch_embed.proj.weight', 'head.weight', 'blocks.0.attn.qkv.weight', 'blocks.5.mlp.fc2.weight'}
    assert named <= vit
    assert len(vit) == 1 + 6 * 4 + 1
    assert not any(w in n for n in vit for w in ('norm', 'bias', 'pos_embed', 'cls_token'))
    mobile = M.quantized_names(built['mobilenetv2'])
    assert 'blocks.0.0.conv_dw.weight' in mobile and 'blocks.0.0.conv_pw.weight' in mobile
    assert len(mobile) == sum(p.ndim in (2, 4) for p in built['mobilenetv2'].parameters()) == 53
    assert not any('shortcut' in n for n in M.quantized_names(built['resnet20']))
    borrowed = M.quantized_names(torchvision.models.resnet18())
    assert len(borrowed) == 18 and not any('downsample' in n for n in borrowed)


def test_a_bare_layer_has_a_layout():
    assert M.layout(nn.Linear(3, 2)).quantized == ('weight',)
    assert M.layer_macs(nn.Conv2d(3, 4, 1)) == {'weight': 12 * 32 * 32}


def test_layout_refuses_what_it_cannot_send():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match='tied parameters.*1.weight'): M.layout(tied)
    with pytest.raises(ValueError, match='without a weight: 1.weight'):
        M.layout(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), lambda n, m: n == '1')


# ---- other libraries count the same

def test_parameters_agree_with_timm(built):
    def count(m): return sum(p.numel() for p in m.parameters())
    def shapes(m): return {n: p.shape for n, p in m.named_parameters()}

    mobile = timm.create_model('mobilenetv2_100', num_classes=100)
    assert M.count_parameters(built['mobilenetv2']) == count(mobile)
    small = timm.create_model('vit_small_patch16_224', img_size=32, patch_size=4, num_classes=10)
    assert M.count_parameters(built['vit-small-4']) == count(small)
    assert shapes(built['vit-small-4']) == shapes(small)


@pytest.mark.parametrize('name', ['resnet20', 'resnet8-A', 'mobilenetv2', 'vit-tiny-4'])
def test_macs_agree_with_fvcore(built, name):
    from fvcore.nn import FlopCountAnalysis
    analysis = FlopCountAnalysis(copy.deepcopy(built[name]).eval(), images(1))
    counted = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert M.count_macs(built[name]) == counted['conv'] + counted['linear']


@pytest.mark.parametrize('name, extras', [
    # bias, ReLUs of three stages, pooled values
    ('resnet20', 10 + 7 * 16_384 + 6 * 8_192 + 6 * 4_096 + 4_096),
    ('mobilenetv2-imagenet', 100 + 1_280)])
def test_macs_agree_with_ptflops(built, name, extras):
    "ptflops adds biases, ReLUs and pools, one operation a number; normalisation and ReLU6 are left out here."
    from ptflops import get_model_complexity_info
    rest = [nn.BatchNorm2d, timm.layers.BatchNormAct2d, nn.ReLU, nn.ReLU6, nn.AdaptiveAvgPool2d]
    counted, _ = get_model_complexity_info(
        copy.deepcopy(built[name]), (3, 32, 32),
        as_strings=False, backend='pytorch', print_per_layer_stat=False, ignore_modules=rest)
    assert counted - extras == M.count_macs(built[name])


def test_attention_macs_agree_with_torch(built):
    "FlopCounterMode counts two per multiply-accumulate, attention included."
    from torch.utils.flop_counter import FlopCounterMode
    model = copy.deepcopy(built['vit-tiny-4']).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model(images(1))
    assert counter.get_total_flops() == 2 * (M.count_macs(model) + M.attention_macs(model))


def test_bops(built):
    macs = M.layer_macs(built['resnet8'])
    assert M.count_bops(macs, {}) == sum(macs.values()) * 1024
    one = M.count_bops(macs, {'fc.weight': 2}, act_bits=8)
    assert one == (sum(macs.values()) - 640) * 32 * 8 + 640 * 2 * 8
    with pytest.raises(ValueError, match='layers that do not exist: head.weight'):
        M.count_bops(macs, {'head.weight': 4})


def test_counting_leaves_no_trace(built):
    model = M.build_model('resnet8', 10)
    model.bn1.eval()  # one frozen module
    before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    M.count_macs(model)
    with pytest.raises(RuntimeError): M.count_macs(model, image=(5, 32, 32))
    assert [m.training for m in model.modules()] == before[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before[1].items())
    assert not any(m._forward_hooks for m in model.modules())


# ---- building

def test_initial_weights_have_their_own_stream():
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.random.get_rng_state()
    a = M.build_model('mobilenetv2', 10, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    b = M.build_model('mobilenetv2', 10, seed=3).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    c = M.build_model('mobilenetv2', 10, seed=4).state_dict()
    assert not torch.equal(a['conv_stem.weight'], c['conv_stem.weight'])


def test_seed_none_draws_from_the_global_generator():
    torch.manual_seed(1)
    a = M.build_model('resnet8', 10, seed=None)
    b = M.build_model('resnet8', 10, seed=None)

    torch.manual_seed(1)
    c = M.build_model('resnet8', 10, seed=None)
    assert torch.equal(a.conv1.weight, c.conv1.weight) and not torch.equal(a.conv1.weight, b.conv1.weight)


def test_weights_start_uniform_within_one_over_root_fan_in(built):
    for m in built['resnet20'].modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            bound = m.weight[0].numel() ** -0.5
            assert m.weight.abs().max().item() <= bound * (1 + 1e-6)
            if m.weight.numel() > 4000:
                assert m.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_activations_can_be_exchanged_but_the_first():
    class Count(nn.Module):
        calls = 0
        def forward(self, x):
            Count.calls += 1
            return x.relu()
    model, plain = M.build_model('resnet20', 10, act=Count), M.build_model('resnet20', 10)
    assert type(model.act0) is nn.ReLU
    model.load_state_dict(plain.state_dict())
    x = images()
    assert gap(model.eval(), plain.eval(), x) == 0
    assert Count.calls == 18  # two in each of nine blocks
    acts = [m for m in model.modules() if isinstance(m, Count)]
    assert len({id(m) for m in acts}) == 18  # a learned range belongs to one place


def test_what_is_refused(monkeypatch):
    # other tests register networks of their own
    monkeypatch.setattr(M, '_MODELS', {name: M._MODELS[name] for name in ALL})
    with pytest.raises(ValueError, match="unknown model 'vgg'; `fedmpqkd models` lists all"):
        M.build_model('vgg', 10)
    with pytest.raises(ValueError, match='classes must be at least 1'): M.build_model('resnet8', 0)
    with pytest.raises(ValueError, match='no exchangeable activations'):
        M.build_model('vit-tiny-4', 10, act=nn.ReLU)
    with pytest.raises(ValueError, match='must be callable'): M.register_model('broken', 3)
    assert 'broken' not in M.model_names()


def test_registry(monkeypatch):
    monkeypatch.setattr(M, '_MODELS', {name: M._MODELS[name] for name in ALL})
    M.register_model('mine', lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)))
    assert set(M.model_names()) == {*ALL, 'mine'}
    first = M.build_model('mine', 7, seed=2)
    assert first(images()).shape == (2, 7)
    assert torch.equal(first[1].weight, M.build_model('mine', 7, seed=2)[1].weight)


def test_imagenet_strides_leave_one_pixel(built):
    "timm's strides on 32 px: 1x1 maps, and a batch of one cannot be normalised."
    with torch.no_grad():
        assert built['mobilenetv2-imagenet'].eval().forward_features(images(1)).shape[2:] == (1, 1)
        assert built['mobilenetv2'].eval().forward_features(images(1)).shape[2:] == (4, 4)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        copy.deepcopy(built['mobilenetv2-imagenet']).train()(images(1))
    assert copy.deepcopy(built['mobilenetv2']).train()(images(1)).isfinite().all()


@pytest.mark.parametrize('name', ['resnet8', 'resnet20-A', 'mobilenetv2-imagenet', 'vit-tiny-4'])
def test_one_image_predicts_as_in_a_batch(built, name):
    model, x = built[name].eval(), images(3)
    with torch.no_grad(): assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-4)


# ---- 1x1 convolutions as matrix products

@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('bias', [False, True])
def test_pointwise_equals_convolution_with_gradients(memory, bias):
    g = torch.Generator().manual_seed(1)
    conv = nn.Conv2d(6, 5, 1, bias=bias)
    fast = M.use_pointwise_matmul(copy.deepcopy(conv))
    assert isinstance(fast, M.PointwiseConv2d)
    x = torch.randn(3, 6, 4, 7, generator=g).contiguous(memory_format=memory)
    found = []
    for m in (conv, fast):
        z = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = m(z)
        (y * y.detach().cos()).sum().backward()
        found.append([y.detach(), z.grad, *[p.grad for p in m.parameters()]])
    for a, b in zip(*found, strict=True): assert torch.allclose(a, b, atol=1e-5)


def test_pointwise_takes_only_plain_1x1():
    rest = [nn.Conv2d(4, 4, 1, **odd) for odd in (dict(stride=2), dict(padding=1), dict(groups=2))]
    rest.append(nn.Conv2d(4, 4, 3))
    model = M.use_pointwise_matmul(nn.Sequential(*rest, nn.Conv2d(4, 4, 1)))
    assert [isinstance(m, M.PointwiseConv2d) for m in model] == [False] * 4 + [True]


def test_pointwise_keeps_state_layout_and_logits(built):
    model = shaken(copy.deepcopy(built['mobilenetv2-imagenet']))
    fast = M.use_pointwise_matmul(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert M.layout(fast) == M.layout(model)
    assert M.count_macs(fast) == M.count_macs(model)
    assert gap(fast, model, images()) < 1e-5 * max(1, model(images()).abs().max().item())


# ---- folding

@pytest.mark.parametrize('name, pairs', [
    ('resnet20', 21), ('resnet20-A', 19), ('mobilenetv2-imagenet', 52), ('mobilenetv2', 52)])
def test_folded_logits_agree(built, name, pairs):
    model = copy.deepcopy(built[name])
    fast = M.fold_batchnorm(model)  # made from a model in training mode, with other numbers
    shaken(model, seed=7)
    with torch.no_grad():  # logits of order one
        head = model.get_classifier() if hasattr(model, 'get_classifier') else model.fc
        head.weight /= model(images()).abs().max()
    fast.load(model.state_dict())
    assert fast.folded and len(fast.pairs) == pairs
    assert gap(fast, model, images(4, seed=2)) < 1e-4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.model.modules())


def test_folding_agrees_with_torch_fx(built):
    from torch.fx.experimental.optimization import fuse
    model = shaken(copy.deepcopy(built['resnet20']))
    fast, reference = M.fold_batchnorm(model), fuse(model)
    for pair in fast.pairs:
        ours, theirs = fast.model.get_submodule(pair.conv), reference.get_submodule(pair.conv)
        assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
        assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_folding_leaves_the_model_alone_and_its_logits_enter_a_loss(built):
    model = M.build_model('resnet8', 10).train()
    before = copy.deepcopy(model.state_dict())
    fast = M.fold_batchnorm(model)
    target = fast(images())
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    F.mse_loss(model(images()), target).backward()
    assert not target.requires_grad and not target.is_inference()
    assert model.conv1.weight.grad.abs().sum() > 0
    assert model.conv1.bias is None


def test_loading_twice_equals_loading_once():
    fast = M.fold_batchnorm(M.build_model('resnet8', 10, seed=0))
    one, two = (shaken(M.build_model('resnet8', 10, seed=n), n) for n in (1, 2))
    x = images()

    fast.load(one.state_dict())
    first = fast(x)
    fast.load(two.state_dict())
    assert not torch.allclose(fast(x), first)
    fast.load(one.state_dict())
    assert torch.equal(fast(x), first)


@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_folding_with_pointwise_products(built, memory):
    model = shaken(copy.deepcopy(built['mobilenetv2-imagenet'])).to(memory_format=memory)
    fast = M.fold_batchnorm(M.use_pointwise_matmul(copy.deepcopy(model)))
    assert len(fast.pairs) == 52 and any(isinstance(m, M.PointwiseConv2d) for m in fast.model.modules())
    fast.load(model.state_dict())
    top = model(images()).abs().max().item()
    assert gap(fast, model, images()) < 1e-5 * max(1, top)


def test_folding_under_autocast():
    model = shaken(M.build_model('resnet8', 10))
    fast = M.fold_batchnorm(model)
    with torch.autocast('cpu', torch.bfloat16): low = fast(images())
    assert low.dtype == torch.bfloat16
    assert (low.float() - fast(images())).abs().max() < 0.05 * fast(images()).abs().max()


class Odd(nn.Module):
    "A biased pair, a convolution with two readers, a shared convolution, a normalisation in front."
    def __init__(self):
        super().__init__()
        def conv(): return nn.Conv2d(4, 4, 3, padding=1)
        self.front, self.stem = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        self.biased, self.bn1 = conv(), nn.BatchNorm2d(4, eps=0.1)
        self.read_twice, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.shared, self.bn3, self.bn4 = conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.scale, self.fc = nn.Parameter(torch.tensor(1.7)), nn.Linear(4, 5)

    def forward(self, x, mask=None):
        if mask is not None: x = x * mask
        x = self.bn1(self.biased(self.stem(self.front(x)))).relu()
        y = self.read_twice(x)
        x = self.bn2(y) + y
        x = self.bn4(self.shared(self.bn3(self.shared(x))))
        return self.fc(self.scale * x.mean((2, 3)))


def test_only_safe_pairs_are_folded():
    torch.manual_seed(3)
    model = Odd()
    fast = M.fold_batchnorm(model)
    model = shaken(model, 5)
    model.scale.data.fill_(0.3)
    fast.load(model.state_dict())
    assert fast.pairs == [M.FoldedPair('biased', 'bn1', 4, 0.1, True)]
    assert gap(fast, model, images()) < 1e-5


class Moody(nn.Module):
    "Its forward pass depends on the data, so no graph can be recorded."
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.bn(self.conv(x)).mean((2, 3))
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize('make', [
    Moody, lambda: M.build_model('vit-tiny-4', 10), lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))])
def test_fall_back_to_the_plain_model(make):
    torch.manual_seed(0)
    fast, model = M.fold_batchnorm(make().train()), shaken(make())
    fast.load(model.state_dict())
    assert not fast.folded and not fast.model.training
    for seed in (0, 1): assert gap(fast, model, images(seed=seed)) < 1e-6


def test_unknown_normalisations_are_left_alone():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x): return 2 * super().forward(x)

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Doubled(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
    for m in (model[1], model[5]): shaken(m)
    fast = M.fold_batchnorm(model)
    assert [(p.conv, p.bn) for p in fast.pairs] == [('4', '5')]
    assert gap(fast, model.eval(), images()) < 1e-5


def test_load_refuses_a_foreign_state():
    fast = M.fold_batchnorm(M.build_model('resnet8', 10))
    with pytest.raises(KeyError): fast.load({})
    with pytest.raises(RuntimeError): fast.load(M.build_model('resnet8', 7).state_dict())
