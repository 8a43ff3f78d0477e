"One test per defect of the reference code: what it does wrong, in a few lines, and what is right."
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.func import functional_call

from fedmpqkd.core.config import RunConfig
from fedmpqkd.data.images import from_tensors
from fedmpqkd.evaluate.metrics import auc
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run
from fedmpqkd.federation.server import Average
from fedmpqkd.learn.client import ClientRound, local_round, prepare
from fedmpqkd.learn.distill import kd_loss
from fedmpqkd.learn.replica import Clock, Replica
from fedmpqkd.learn.step import TrainState, local_step
from fedmpqkd.learn.vision import VisionTask, image_task
from fedmpqkd.models.vision import layout, mobilenetv2, quantized_names
from fedmpqkd.quant.bits import Rule
from fedmpqkd.quant.quantize import fake_quantize, quantize
from fedmpqkd.wire.format import Message, decode, encode
from fedmpqkd.wire.messages import downlink_entries, manifest_of

torch.set_num_threads(1)


def squeeze(t: torch.Tensor, bits: int) -> torch.Tensor:
    "Affine quantisation over the range of the tensor, as the reference code does it."
    low, high = -(2**(bits - 1)), 2**(bits - 1) - 1
    step = (t.max() - t.min()) / (high - low)
    zero = low - (t.min() / step).round()
    return ((t / step).round() + zero).clamp(low, high).sub(zero).mul(step)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


@pytest.fixture(scope='module')
def world():
    "A replica, images that can be told apart, the manifest, a copy of the initial state."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(60) % 10
    x[:, 0] = (x[:, 0] // 4 + 19 * y[:, None, None]).to(torch.uint8)
    data = from_tensors('noise', x[:48], y[:48], x[48:], y[48:], flip=False)
    replica = Replica(RunConfig(model='resnet8'), image_task(10))
    state = {n: t.clone().contiguous() for n, t in replica.state.items()}
    x = torch.randn(16, 3, 32, 32, generator=g)
    return SimpleNamespace(replica=replica, data=data, resident=VisionTask(data),
                           manifest=manifest_of(replica.layout), state=state, x=x, y=torch.arange(16) % 10)


def sent(world: SimpleNamespace, bits: int, state: dict[str, torch.Tensor] | None = None) -> bytes:
    "A downlink with so many bits a weight."
    entries = downlink_entries(state or world.state, world.replica.layout, [bits] * 8)
    return encode(Message(0, 0, 0, 0, entries), world.manifest)


class Listener(Rule):
    "Learns nothing and remembers what it was told."
    def receive(self, grads): self.heard = [g.clone() for g in grads]


class Stopped:
    "An optimiser that takes no step and remembers the gradients."
    def __init__(self, parameters): self.parameters = parameters
    def step(self): self.heard = [p.grad.clone() for p in self.parameters]


# --- 1 ------------------------------------------------------------------------------------------------------

def hidden_gamma(bits: int, seed: int, restore_first: bool) -> tuple[torch.Tensor, ...]:
    "Gradients of a hidden gamma and of the last layer, and the logits."
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x, y = torch.randn(32, 3, 12, 12), torch.randint(0, 10, (32,))
    weights = [m.weight for m in net if m.__class__ in (nn.Conv2d, nn.Linear)]
    full = [w.detach().clone() for w in weights]
    for w in weights: w.data.copy_(squeeze(w.data, bits))
    logits = net(x)
    if restore_first:
        for w, f in zip(weights, full, strict=True): w.data.copy_(f)
    F.cross_entropy(logits, y).backward()
    return net[1].weight.grad, net[8].weight.grad, logits.detach()


def test_defect_01_weights_restored_before_the_backward_pass(world):
    """Forward with Q(w), restore w, backward: the gradients are those of a network that was never run.
    How far off depends on the network: cosines of .99 (4 bits) and .62 (2 bits) have been measured,
    here .996 and .92."""
    found = {}
    for bits in (4, 2):
        pairs = [(hidden_gamma(bits, s, True), hidden_gamma(bits, s, False)) for s in range(5)]
        for wrong, right in pairs:
            assert torch.equal(wrong[2], right[2])  # the logits
            assert torch.equal(wrong[1], right[1])  # the last layer's gradient
        found[bits] = sum(cosine(wrong[0], right[0]) for wrong, right in pairs) / 5
    assert .95 < found[4] < .9999 and found[2] < .97 and 1 - found[2] > 5 * (1 - found[4]), found

    for bits in (4, 2):
        net, w = world.replica, world.state
        net.load(w)
        start = [quantize(w[n], bits) for n in net.layout.quantized]
        rule = Listener(RunConfig(model='resnet8'), start, [p.data for p in net.weights])
        told = Stopped(net.others)
        state = TrainState(RunConfig(model='resnet8'), net.task, 0.0, 2.0, None, rule, told, Clock())
        local_step(net, state, world.x, world.y)
        # the same by explicit straight-through estimation in a fresh graph
        model = copy.deepcopy(net.model).train()
        leaves = {n: w[n].clone().requires_grad_(True) for n in (*net.layout.quantized, *net.layout.others)}
        shown = leaves | {n: fake_quantize(leaves[n], bits) for n in net.layout.quantized}
        for n, t in shown.items():  # the replica's memory layout, so that the same kernels run
            if t.dim() == 4: shown[n] = t.contiguous(memory_format=torch.channels_last)
        F.cross_entropy(functional_call(model, shown, (world.x,)), world.y).backward()
        names = (*net.layout.quantized, *net.layout.others)
        for name, g in zip(names, (*rule.heard, *told.heard), strict=True):
            true = leaves[name].grad
            assert torch.allclose(g, true, rtol=1e-3, atol=1e-4 * true.abs().max().item()), name


# --- 2 ------------------------------------------------------------------------------------------------------

def test_defect_02_normalisation_and_biases_are_quantised(world):
    gamma = torch.tensor([.9, 1, 1.1, .02])
    assert squeeze(gamma, 4).tolist() == pytest.approx([.864, 1.008, 1.08, 0], abs=1e-6)
    assert squeeze(gamma, 2).tolist() == pytest.approx([.72, 1.08, 1.08, 0], abs=1e-6)

    state = dict(world.state)
    for name in ('bn1.weight', 'bn1.bias', 'fc.bias'):
        state[name] = gamma.repeat(4)[:len(state[name])].clone()
    arrived = decode(sent(world, 2, state), world.manifest).dense()
    for name in (*world.replica.layout.others, *world.replica.layout.buffers):
        assert torch.equal(arrived[name], state[name])
    assert len(arrived['conv1.weight'].unique()) <= 7
    assert {state[n].dim() for n in world.replica.layout.quantized} == {2, 4}


# --- 3 ------------------------------------------------------------------------------------------------------

def test_defect_03_the_teacher_is_a_part_of_the_student(world):
    class Wrapper(nn.Module):
        def __init__(self, teacher: nn.Module):
            super().__init__()
            self.student, self.teacher = nn.Linear(2, 2), teacher.eval()

    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    Wrapper(teacher).train()
    with torch.no_grad(): teacher(torch.randn(8, 2) + 3)
    assert teacher.training and teacher[1].running_mean.abs().sum() > 0  # it moved although nobody trained it

    config = RunConfig(model='resnet8', update='signed-planes', alpha=.5, teacher='delivered',
                       kd_warmup_rounds=0)
    work, down = ClientRound(0, 0, torch.arange(32)), decode(sent(world, 4), world.manifest)
    train_state, _ = prepare(world.replica, config, work, [down], Clock())
    frozen = train_state.teacher.model
    before = {n: t.clone() for n, t in frozen.state_dict().items()}
    for _ in range(3): local_step(world.replica, train_state, world.x, world.y)
    assert world.replica.model.training and not any(m.training for m in frozen.modules())
    assert not {id(m) for m in frozen.modules()} & {id(m) for m in world.replica.model.modules()}
    memory = [{t.data_ptr() for t in s.values()} for s in (frozen.state_dict(), world.replica.state)]
    assert not memory[0] & memory[1]
    for n, t in frozen.state_dict().items(): assert torch.equal(t, before[n]), n


# --- 4 ------------------------------------------------------------------------------------------------------

def test_defect_04_what_crosses_is_full_precision_and_uncounted(world):
    "An exchange of state dicts is neither quantised nor measured, whatever the forward pass rounds."
    exchanged = nn.Linear(64, 10).state_dict()
    assert len(exchanged['weight'].unique()) > 600  # not the 16 values that four bits can tell apart

    config = RunConfig(model='resnet8', update='signed-planes', assignment='prune-grow', batch_size=16,
                       lr=.05)
    down, work = sent(world, 4), ClientRound(0, 0, torch.arange(32))
    result = local_round(world.replica, config, world.resident, work, [down], world.manifest)
    up = decode(result.message, world.manifest)
    full = encode(Message(0, 0, 0, 0, world.state), world.manifest)
    for data in (down, result.message):
        assert isinstance(data, bytes) and len(data) < len(full) / 4
        for n in world.replica.layout.quantized:
            assert len(decode(data, world.manifest).dense()[n].unique()) <= 31
    assert not torch.equal(up.dense()['fc.weight'], decode(down, world.manifest).dense()['fc.weight'])


# --- 7 ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def controls(world):
    fields = dict(model='resnet8', clients=2, rounds=1, partition='iid', batch_size=12, eval_images=0)
    return {m: run(make_config(m, **fields), world.data, workers=1) for m in ('fedavg', 'qat-uniform')}


def test_defect_07_the_quantised_baseline_is_federated_averaging(world, controls):
    "A quantiser that returns its input at 32 bits makes 'Q-FedAvg' another name of FedAvg."
    w = torch.randn(5)
    assert fake_quantize(w, 32) is w

    avg, q = (controls[m]['summary'] for m in ('fedavg', 'qat-uniform'))
    assert 4 * q['bytes_up'] < avg['bytes_up'] and 4 * q['bytes_down'] < avg['bytes_down']
    assert controls['fedavg']['curve'][0]['loss'] != controls['qat-uniform']['curve'][0]['loss']
    assert 0 < controls['qat-uniform']['curve'][0]['moved'] <= 1
    with pytest.raises(ValueError, match=r'bits.*\[1, 8\]'): make_config('qat-uniform', bits=32)


# --- 12 -----------------------------------------------------------------------------------------------------

def test_defect_12_mobilenet_keeps_the_strides_of_imagenet():
    import timm
    x, sides = torch.zeros(2, 3, 32, 32), {}
    theirs = timm.create_model('mobilenetv2_100', num_classes=10)
    with torch.no_grad():
        for name, model in (('theirs', theirs), ('ours', mobilenetv2(10))):
            sides[name] = tuple(model.eval().forward_features(x).shape[2:])
    assert sides == dict(theirs=(1, 1), ours=(4, 4))
    with pytest.raises(ValueError, match='more than 1 value'): theirs.train()(x[:1])
    assert quantized_names(theirs) == list(layout(theirs).quantized)


# --- 18 -----------------------------------------------------------------------------------------------------

def test_defect_18_a_lost_round_shortens_the_area(world):
    accuracies, shortened = [10.0, 50.0, None, 80.0], []
    for a in accuracies:
        if a is not None: shortened.append(a)
    assert sum(shortened) == 140 and len(shortened) == 3
    assert auc(accuracies) == dict(sum=190.0, trapz=145.0, norm=pytest.approx(145 / 3))

    fields = dict(model='resnet8', clients=2, rounds=3, partition='iid', eval_images=0, dropout=1.0)
    lost = run(make_config('fedmpq', **fields), world.data, workers=1)
    assert [line['round'] for line in lost['curve']] == [1, 2, 3]
    assert [line['arrived'] for line in lost['curve']] == [0, 0, 0]
    first = lost['curve'][0]['accuracy']
    # nothing changed, and the point stands
    assert [line['accuracy'] for line in lost['curve']] == [first] * 3
    assert lost['summary']['auc']['sum'] == pytest.approx(3 * first)


# --- 21 -----------------------------------------------------------------------------------------------------

def test_defect_21_the_formula_and_the_code_have_opposite_directions():
    student, teacher = torch.tensor([[2.0, 0, -1]]), torch.tensor([[1.0, 1, 0]])
    p, q = (z.softmax(1)[0].double().numpy() for z in (student, teacher))
    assert stats.entropy(p, q) == pytest.approx(.379738, abs=1e-6)  # KL(s || t), the formula
    code = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction='batchmean').item()
    assert code == pytest.approx(stats.entropy(q, p), abs=1e-6) == pytest.approx(.463214, abs=1e-6)

    assert kd_loss(student, teacher, 1.0, 'reverse').item() == pytest.approx(.379738, abs=1e-6)
    assert kd_loss(student, teacher, 1.0, 'forward').item() == pytest.approx(.463214, abs=1e-6)
    assert RunConfig().kd_loss == 'forward'  # the default says which one it is
    with pytest.raises(ValueError, match='forward, reverse'): RunConfig(kd_loss='kl')


# --- 23 -----------------------------------------------------------------------------------------------------

def test_defect_23_a_counter_is_averaged_as_a_float(world, controls):
    counter = 'bn.num_batches_tracked'
    states = [{counter: torch.tensor(3)}, {counter: torch.tensor(8)}]
    mean = torch.stack([s[counter].float() for s in states]).mean(0)
    assert mean.item() == 5.5 and mean.dtype != torch.int64  # neither a count nor the buffer's type

    average = Average()
    for s, n in zip(states, (3, 1), strict=True): average.add(s, n)
    assert average.mean()[counter].item() == 8 and average.mean()[counter].dtype == torch.int64
    assert set(world.replica.layout.counters) == {n for n in world.state if n.endswith('num_batches_tracked')}
