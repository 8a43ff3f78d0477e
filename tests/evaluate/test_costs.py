"Costs: counts against other libraries, closed forms, clocks of known speed, and a profiler's file read back."
import copy
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from fedmpqkd.core.streams import rng
from fedmpqkd.evaluate import costs as C
from fedmpqkd.models.vision import build_model

torch.set_num_threads(1)
NETWORKS = [('resnet20', 10), ('resnet20-A', 10), ('mobilenetv2', 100), ('mobilenetv2-imagenet', 100),
            ('vit-tiny-4', 10)]


@pytest.fixture(scope='module')
def built():
    return {name: build_model(name, classes) for name, classes in NETWORKS}


@pytest.fixture(scope='module')
def rows():
    return {name: C.cost_table(name, classes, bits=4).iloc[0] for name, classes in NETWORKS}


# ---- what a model costs

@pytest.mark.parametrize('name, macs', [
    ('resnet20', 40_813_184), ('resnet20-A', 40_551_040), ('mobilenetv2', 88_091_648),
    ('mobilenetv2-imagenet', 6_240_128)])
def test_published_macs(rows, name, macs):
    assert (rows[name].macs, rows[name].flops) == (macs, 2 * macs)


@pytest.mark.parametrize('name', [name for name, _ in NETWORKS])
def test_macs_agree_with_fvcore(built, rows, name):
    """fvcore counts convolutions, linear layers and matrix products.

    It does not see a fused attention, so it is unfused here.
    """
    fvcore = pytest.importorskip('fvcore.nn')
    model = copy.deepcopy(built[name]).eval()
    for m in model.modules():
        if hasattr(m, 'fused_attn'): m.fused_attn = False

    analysis = fvcore.FlopCountAnalysis(model, torch.zeros(1, 3, 32, 32))
    counted = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert rows[name].macs == counted['conv'] + counted['linear'] + counted.get('matmul', 0)


@pytest.mark.parametrize('name, extras', [
    # bias, ReLUs of three stages, values that are pooled
    ('resnet20', 10 + 7 * 16_384 + 6 * 8_192 + 6 * 4_096 + 4_096),
    ('resnet20-A', 10 + 7 * 16_384 + 6 * 8_192 + 6 * 4_096 + 4_096),
    ('mobilenetv2', 100 + 1_280 * 16), ('mobilenetv2-imagenet', 100 + 1_280)])  # bias, values that are pooled
def test_macs_agree_with_ptflops(built, rows, name, extras):
    "ptflops adds biases, ReLUs and pools, one operation a number; normalisation and ReLU6 are left out here."
    ptflops, timm = pytest.importorskip('ptflops'), pytest.importorskip('timm')
    rest = [nn.BatchNorm2d, timm.layers.BatchNormAct2d, nn.ReLU, nn.ReLU6, nn.AdaptiveAvgPool2d]
    counted, _ = ptflops.get_model_complexity_info(
        copy.deepcopy(built[name]), (3, 32, 32), as_strings=False, backend='pytorch',
        print_per_layer_stat=False, ignore_modules=rest)
    assert counted - extras == rows[name].macs


@pytest.mark.parametrize('name, classes', [
    ('resnet20-A', 10), ('mobilenetv2-imagenet', 100), ('vit-tiny-4', 10)])
def test_flops_agree_with_torch(built, name, classes):
    from torch.utils.flop_counter import FlopCounterMode
    model = copy.deepcopy(built[name]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model(torch.zeros(1, 3, 32, 32))
    assert C.cost_table(name, classes).flops[0] == counter.get_total_flops()


def test_bops_in_closed_form():
    "ResNet-20 A has no unquantised layer: every MAC counts N times the bits of the activations."
    macs = 40_551_040
    for bits, act in ((32, 32), (4, 32), (4, 8), (1, 1)):
        assert C.cost_table('resnet20-A', 10, bits, act).bops[0] == macs * bits * act
    shortcuts = 512 * 16 * 16 + 2048 * 8 * 8  # stay at 32 bits
    assert C.cost_table('resnet20', 10, 4, 8).bops[0] == (40_813_184 - shortcuts) * 4 * 8 + shortcuts * 32 * 8


def test_bops_of_attention_do_not_depend_on_weights():
    inside = 6 * 2 * 65**2 * 192  # blocks, two products of 65 tokens of width 192
    two, four = (C.cost_table('vit-tiny-4', 10, bits, 8).iloc[0] for bits in (2, 4))
    assert two.bops == (two.macs - inside) * 2 * 8 + inside * 64
    assert four.bops - two.bops == (two.macs - inside) * 2 * 8


def test_mixed_bits_are_averaged_over_weights():
    sizes = [432] + 6 * [2304] + [4608] + 5 * [9216] + [18432] + 5 * [36864] + [640]
    bits = [8] * 10 + [2] * 10
    row = C.cost_table('resnet20', 10, bits).iloc[0]
    assert row.bits == pytest.approx(sum(b * d for b, d in zip(bits, sizes, strict=True)) / 268_336)
    uniform = C.cost_table('resnet20', 10, 8).iloc[0]
    assert uniform.bytes - row.bytes == sum((8 - b) * d // 8 for b, d in zip(bits, sizes, strict=True))


@pytest.mark.parametrize('wrong, says', [
    (dict(bits=0), 'bits=0'), (dict(bits=[4]), '1 bit-widths for 8'), (dict(act_bits=0), 'act_bits=0'),
    (dict(act_bits=33), 'act_bits=33')])
def test_impossible_bits_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): C.cost_table('resnet8', 10, **wrong)


def test_training_flops():
    assert C.training_flops(10, 5) == 10 * 5 * 2 * 3
    assert C.training_flops(10, 5, teacher=True) - C.training_flops(10, 5) == 10 * 5 * 2
    with pytest.raises(ValueError, match='negative'): C.training_flops(-1, 5)


# ---- clocks

def test_latency_of_a_known_sleep():
    found = C.latency(lambda x: time.sleep(0.02), torch.zeros(1000, 1), warmup=1, repeats=7)
    low, high = found['quartiles']
    assert 0.02 <= low <= found['median'] <= high and found['median'] < 0.06
    assert (found['n'], found['images'], found['threads']) == (7, 1000, torch.get_num_threads())


def test_warmup_does_not_count():
    "Five slow calls and then fast ones."
    calls = iter(5 * [0.1] + 20 * [0.001])
    found = C.latency(lambda x: time.sleep(next(calls)), torch.zeros(1))
    assert found['quartiles'][1] < 0.05 and next(calls, None) is None


def test_a_slow_call_does_not_move_the_median():
    calls = iter(9 * [0.002] + [0.3])
    assert C.latency(lambda x: time.sleep(next(calls)), torch.zeros(1), warmup=0, repeats=10)['median'] < 0.05


def test_latency_waits_for_the_device(monkeypatch):
    "A device that does its work only when it is synchronised."
    pending = [0.0]

    def synchronize(device):
        time.sleep(pending[0])
        pending[0] = 0.0

    def predict(x):
        pending[0] = 0.01

    monkeypatch.setattr(C, 'synchronize', synchronize)
    assert C.latency(predict, torch.zeros(1), warmup=1, repeats=3)['median'] >= 0.01


def test_student_is_on_its_grid_and_teacher_is_not():
    model = build_model('resnet8-A', 10, seed=1).eval()
    pair = C.student_and_teacher('resnet8-A', model.state_dict(), 10, bits=3)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pair['teacher'](x), model(x).detach(), rtol=1e-4, atol=1e-5)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for p in by_hand.parameters():
            if p.ndim > 1: p.copy_((p / p.abs().max() * 7).round() * p.abs().max() / 7)
    torch.testing.assert_close(pair['student'](x), by_hand(x).detach(), rtol=1e-3, atol=1e-4)


def test_latency_table_names_its_rows():
    predictors = dict(fast=lambda x: time.sleep(0.001), slow=lambda x: time.sleep(0.02))
    found = C.latency_table(predictors, torch.zeros(3), warmup=0, repeats=3)
    assert found['median']['fast'] < found['median']['slow'] > 20 and (found.images == 3).all()


# ---- memory, utilisation, profiler

def test_without_a_gpu_nothing_is_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    peak = C.peak_memory()
    assert C.gpu_utilisation() is None and peak.pop('rss') > 10 and set(peak.values()) == {None}


def test_utilisation_is_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'utilization', lambda device: 37)
    assert C.gpu_utilisation() == 37.0
    def missing(device): raise ModuleNotFoundError('pynvml')
    monkeypatch.setattr(torch.cuda, 'utilization', missing)
    assert C.gpu_utilisation() is None


def test_vram_comes_from_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (3 * 2**20, 10 * 2**20))
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device=None: 2 * 2**20)
    monkeypatch.setattr(torch.cuda, 'max_memory_reserved', lambda device=None: 4 * 2**20)
    peak = C.peak_memory()
    assert (peak['vram_allocated'], peak['vram_reserved'], peak['vram_in_use']) == (2, 4, 7)


def test_watching_ends_with_the_work():
    before = threading.active_count()
    result, seen = C.watched(lambda: time.sleep(0.06) or 'done', gauge=lambda: 50.0, every=0.01)
    assert result == 'done' and threading.active_count() == before
    assert 2 <= len(seen) <= 8 and set(seen) == {50.0}

    def fail(): raise KeyError('work')
    with pytest.raises(KeyError): C.watched(fail, gauge=lambda: None, every=0.01)
    assert threading.active_count() == before


def test_trace_counts_calls_and_writes_a_chrome_file(tmp_path):
    a = torch.ones(64, 64)
    def work():
        for _ in range(3): a @ a
        a.sin()
    table = C.trace(work, tmp_path / 'new' / 'trace.json', top=50)
    assert (table.calls['aten::mm'], table.calls['aten::sin']) == (3, 1)
    assert table.share.sum() == pytest.approx(100) and table.cpu_ms.is_monotonic_decreasing
    names = [e.get('name') for e in json.loads((tmp_path / 'new' / 'trace.json').read_text())['traceEvents']]
    assert names.count('aten::mm') == 3
    assert len(C.trace(work, tmp_path / 'again.json', top=2)) == 2


def test_trace_sees_other_threads(tmp_path):
    "Clients train in threads that are older than the profiler."
    a = torch.ones(32, 32)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        table = C.trace(lambda: pool.submit(lambda: a @ a).result(), tmp_path / 'trace.json', top=50)
    assert table.calls['aten::mm'] == 1


def test_phases():
    "A phase that does not occur in every round counts as zero there."
    two, three = dict(student=2.0, evaluate=5.0), dict(student=2.0, teacher=1.0, evaluate=5.0)
    table = C.phases_table(dict(curve=[dict(phases=two)] * 2 + [dict(phases=three)] * 3))
    assert list(table.index) == ['evaluate', 'student', 'teacher']
    assert table.loc['teacher'].tolist() == [3.0, 1.0, pytest.approx(100 * 3 / 13)]
    assert np.isnan(table.share['evaluate']) and table.share.sum() == pytest.approx(100)
    server = C.phases_table(dict(curve=[dict(phases=dict(student=1.0, wire=3.0, distil=9.0))]))
    assert server.share.drop('distil').to_dict() == dict(wire=75, student=25)
    assert np.isnan(server.share['distil'])
    with pytest.raises(ValueError, match='no phases'): C.phases_table(dict(curve=[dict(round=1)]))


# ---- networks and batteries

def test_round_time_by_hand():
    "190,822 bytes up and 1,097,305 down at 6 and 13 Mbit/s."
    expected = 0.2544293 + 0.6752646 + 5.1
    assert C.round_time(190_822, 1_097_305, 5, (6e6, 13e6), 0.1) == pytest.approx(expected, abs=1e-6)
    assert C.round_time(125_000, 0, 0, 1e6) == C.round_time(0, 125_000, 0, 1e6) == 1.0


@pytest.mark.parametrize('arguments', [
    (1, 1, -1, 1e6), (-1, 1, 1, 1e6), (1, 1, 1, 0), (1, 1, 1, (1e6, 0)), (1, 1, 1, 1e6, -1)])
def test_impossible_rounds_are_refused(arguments):
    with pytest.raises(ValueError): C.round_time(*arguments)


@pytest.mark.parametrize('clients, sigma', [(1, 0.5), (10, 0.5), (50, 0.2)])
def test_slowest_client_in_closed_form(clients, sigma):
    "P(largest factor < m) = Phi(ln m / sigma)^n."
    g = rng(1, 'dropout')
    found = [C.slowest([2.0] * clients, sigma, g) for _ in range(4000)]
    for q in (0.25, 0.5, 0.9):
        bound = 2 * np.exp(sigma * statistics.NormalDist().inv_cdf(q ** (1 / clients)))
        assert np.mean(np.array(found) <= bound) == pytest.approx(q, abs=0.03)


def test_slowest_of_none():
    with pytest.raises(ValueError, match='without clients'): C.slowest([], 0.5, rng(0, 'dropout'))
    with pytest.raises(ValueError, match='sigma=-1'): C.slowest([1.0], -1, rng(0, 'dropout'))


def test_energy_is_linear_in_powers_and_bytes():
    power = C.Power(transmit=4, receive=1, compute=10)
    expected = dict(transmit=4.0, receive=1.0, compute=30.0, total=35.0)
    assert C.round_energy(1e6, 2e6, 3, (8e6, 16e6), power) == expected
    one, two = (C.round_energy(n * 1e5, n * 3e5, n * 2, 5e6)['total'] for n in (1, 2))
    assert two == pytest.approx(2 * one)
    with pytest.raises(ValueError, match='negative'): C.round_energy(1, 1, -1, 1e6)
