"""The benchmark: the same work for all, whole processes in turns, tables made by hand. No time asserted."""
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fedmpqkd.bench import entries as bench_entries
from fedmpqkd.bench import machine
from fedmpqkd.bench import measure as measuring
from fedmpqkd.bench.entries import WORKLOADS, Job, Workload, synthetic
from fedmpqkd.bench.machine import PHASES, Stopwatch, memory_mib, profile, round_flops
from fedmpqkd.bench.measure import (
    child_environment,
    entries,
    measure,
    measure_scaling,
    obstacle,
    read_records,
    schedule,
    spawn,
    write_records,
)
from fedmpqkd.bench.report import (
    bench_table,
    main,
    phase_table,
    plot_scaling,
    scaling_table,
    scaling_verdict,
    to_markdown,
)
from fedmpqkd.models.vision import build_model, count_macs

TINY = Workload("tiny", "resnet8", 10, 3, images=60, test_images=20, batch_size=16)
RECORD_KEYS = {
    "workload", "entry", "kind", "device", "precision", "threads", "seconds_per_round", "images_per_second",
    "startup_s", "peak_memory_mib", "phases", "flops_utilisation"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def record(entry: str = "fedavg", repeat: int = 0, rate: float = 10.0, **more) -> dict:
    "A finished record with a given rate."
    kind = "peer" if entry in ("flower", "bare-fp32") else "ours"
    return dict(
        workload="w1", entry=entry, kind=kind, device="abacus", precision="fp32", threads=2, repeat=repeat,
        seconds_per_round=[100 / rate], first_round_s=20.0, images_per_second=rate, startup_s=3.0,
        peak_memory_mib=900.0, flops_utilisation=0.5, phases={}, failed=0) | more


def answer(job: Job) -> dict:
    "What a child process would say."
    if job.profile: return dict(phases=dict.fromkeys(PHASES, 1.0))
    n = job.rounds
    machine = dict(device="abacus", cores=2, capability="beads", bf16=False, torch="0")
    return dict(
        seconds=[2.0] * n, images=[100] * n, steps=[4] * n, flops=[1e9] * n, evaluations=1, failed=0,
        peak_gflops=1.0, accuracy=[50.0] * n, startup_s=1.0, peak_memory_mib=500.0, processes=1,
        environment=machine)


# --- the same work ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("workload", [
    TINY,
    replace(TINY, participation=0.34, local_epochs=2),  # one client of three
    replace(TINY, clients=2, images=66, partition="iid"),  # 33 images each: a last batch of one is dropped
    replace(TINY, clients=40, images=41, partition="iid")])  # clients with a single image
def test_bare_loop_computes_what_we_compute(workload: Workload):
    job = Job(workload, "fedavg", rounds=2 if workload == TINY else 1, threads=2)
    one, other = bench_entries.ours(job), bench_entries.bare(replace(job, entry="bare"))
    assert (one.steps, one.images, one.failed) == (other.steps, other.images, 0)
    assert len(one.seconds) == len(other.seconds) == job.rounds
    for name, t in one.state.items():
        if t.is_floating_point():
            torch.testing.assert_close(t, other.state[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_flowers_clients_hold_all_images(name: str):
    "The peers' loaders deal out each training image exactly once."
    w = replace(WORKLOADS[name], source="synthetic", images=1000, test_images=10)
    labels = torch.cat([bench_entries.client_loader(w, k).dataset.tensors[1] for k in range(w.clients)])
    assert len(labels) == 1000
    assert Counter(labels.tolist()) == Counter(bench_entries.load_images(w).train_y.tolist())


def test_a_thousand_clients_of_whom_one_percent_takes_part():
    w = replace(TINY, clients=1000, participation=0.01, images=2000, partition="iid")
    timing = bench_entries.ours(Job(w, "fedmpq", rounds=1, threads=1))
    assert (timing.steps, timing.images, timing.failed) == ([10], [20], 0)  # ten clients with two images each


def test_synthetic_images_do_not_depend_on_the_global_seed():
    torch.manual_seed(1)
    one = synthetic(20, 10, 10)
    torch.manual_seed(2)
    assert one.fingerprint == synthetic(20, 10, 10).fingerprint != synthetic(21, 10, 10).fingerprint
    assert one.train_y.bincount().tolist() == [2] * 10 and one.train_x.float().std() > 10


@pytest.mark.parametrize("model", ["resnet8", "resnet20"])
def test_operations_agree_with_pytorchs_counter(model: str):
    "PyTorch counts what it executes; the first layer has no input gradient: a bit less than three passes."
    net, n = build_model(model, 10), 4
    macs, x = count_macs(net), torch.rand(n, 3, 32, 32)
    with FlopCounterMode(display=False) as forward, torch.no_grad(): net.eval()(x)
    assert forward.get_total_flops() == round_flops(macs, 0, n)
    with FlopCounterMode(display=False) as step: net.train()(x).sum().backward()
    assert 0.97 < step.get_total_flops() / round_flops(macs, n, 0) <= 1
    assert round_flops(macs, n, n, teacher=True) - round_flops(macs, n, n) == forward.get_total_flops()


# --- phases ----------------------------------------------------------------------------------------------

def test_stopwatch_charges_each_thread_for_its_own_time():
    watch = Stopwatch()
    leaf = watch.wrap(lambda: time.sleep(0.03), "leaf")
    tree = watch.wrap(lambda: (time.sleep(0.02), leaf(), leaf()), "tree")
    start = time.perf_counter()
    threads = [threading.Thread(target=tree) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    alive = 4 * (time.perf_counter() - start)
    # a sleep is never shorter than asked
    assert watch.seconds["leaf"] >= 4 * 0.06 and watch.seconds["tree"] >= 4 * 0.02
    assert sum(watch.seconds.values()) <= alive  # nothing is charged twice


def test_stopwatch_survives_an_error():
    watch = Stopwatch()
    bad = watch.wrap(lambda: 1 / 0, "bad")
    with pytest.raises(ZeroDivisionError): bad()
    watch.wrap(lambda: time.sleep(0.01), "good")()
    assert set(watch.seconds) == {"bad", "good"} and watch.seconds["good"] >= 0.01


def test_phases_of_methods():
    "Each method spends time where it has work, and the functions that were wrapped are whole again."
    before = machine.rounds.downlink, machine.server.encode, machine.server.Average.add
    phases = {m: profile(Job(TINY, m, threads=1)) for m in ("fedavg", "fedmpq-kd")}
    assert before == (machine.rounds.downlink, machine.server.encode, machine.server.Average.add)
    for seconds in phases.values():
        assert set(seconds) == set(PHASES) and min(seconds.values()) >= 0
        assert all(seconds[p] > 0 for p in ("data", "student", "optimiser", "wire", "aggregate", "evaluate"))
    plain, distilled = phases["fedavg"], phases["fedmpq-kd"]
    assert plain["teacher"] == plain["regulariser"] == 0 < distilled["teacher"]
    assert distilled["quantise"] > plain["quantise"]
    table = phase_table([record(entry=m, phases=p) for m, p in phases.items()])
    assert table["entry"].tolist() == ["fedavg", "fedmpq-kd"] and list(table.columns[2:]) == list(PHASES)


# --- whole processes -------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_shared_memory_is_counted_once_and_private_memory_each_time():
    code = """
import mmap, os, sys, time
kind, n = sys.argv[1], 60 * 2**20
shared = mmap.mmap(-1, n)
for _ in range(3):
    if os.fork() == 0: break
block = shared if kind == 'shared' else bytearray(n)
block[:] = b'x' * n
print('.', flush=True); time.sleep(60)
"""
    def measured(kind: str) -> float:
        process = subprocess.Popen([sys.executable, "-c", code, kind], stdout=subprocess.PIPE)
        try:
            for _ in range(4): process.stdout.readline()
            pids = machine.family(process.pid)
            assert len(pids) == 4
            return memory_mib(pids)
        finally:
            for pid in reversed(machine.family(process.pid)): os.kill(pid, 9)
            process.wait()
    shared, private = measured("shared"), measured("private")
    assert 60 < shared < 160  # four interpreters, one block
    assert 240 < private < 340  # four interpreters, four blocks


def test_the_command_writes_every_key(tmp_path: Path, capsys):
    "Ours and the bare loop in processes of their own; Flower, too, or the reason why not."
    path = tmp_path / "w1.json"
    sizes = "--images 40 --test-images 10 --clients 2 --model resnet8 --rounds 2 --repeats 1 --threads 1"
    who = "--methods fedmpq-kd --peers bare,flower --precision fp32"
    main(["w1", *who.split(), *sizes.split(), "--no-profile", "--json", str(path)])
    found = {r["entry"]: r for r in json.loads(path.read_text())}
    assert path.read_text().count("\n{") == len(found)  # an object a line
    able = [e for e, r in found.items() if "skipped" not in r]
    assert {"fedmpq-kd", "bare-fp32"} <= set(able) and "flower" in found
    for entry in able:
        r = found[entry]
        assert set(r) >= RECORD_KEYS and r["failed"] == 0 and len(r["seconds_per_round"]) == 1
        assert r["steps"] == found["bare-fp32"]["steps"]
        assert min(r["startup_s"], r["first_round_s"], r["images_per_second"], r["flops_utilisation"]) > 0
        assert r["peak_memory_mib"] > 100
    printed = capsys.readouterr().out
    assert found["fedmpq-kd"]["device"] in printed and "| fedmpq-kd |" in printed
    for entry in set(found) - set(able):
        assert f"skipped: {entry} ({found[entry]['skipped']})" in printed
    if obstacle("flower", "fp32"):
        assert "pip install 'fedmpqkd[bench]'" in found["flower"]["skipped"]


def test_an_entry_that_dies_is_an_error_that_names_it():
    message = r"(?s)bare-fp32 ended without an answer.*unknown model 'perceptron'"
    with pytest.raises(RuntimeError, match=message):
        spawn(Job(replace(TINY, model="perceptron"), "bare"))


def test_children_are_told_to_be_quiet(tmp_path: Path):
    env = child_environment(Job(TINY, "flower", threads=3), tmp_path)
    assert (env["FLWR_TELEMETRY_ENABLED"], env["RAY_USAGE_STATS_ENABLED"]) == ("0", "0")
    assert {env["FLWR_HOME"], env["RAY_TMPDIR"], env["TMPDIR"]} == {str(tmp_path)}
    assert (Path(env["PYTHONPATH"].split(os.pathsep)[0]) / "fedmpqkd" / "bench" / "measure.py").exists()


def test_threads_are_set_for_all_but_flower(tmp_path: Path, monkeypatch):
    """Ray gives its actors one thread each only if no number is set.

    Two actors of two threads each on two cores took 65 s a round instead of 18 to 23.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in child_environment(Job(TINY, "flower", threads=3), tmp_path)
    assert child_environment(Job(TINY, "bare", threads=3), tmp_path)["OMP_NUM_THREADS"] == "3"


# --- turns -----------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(1, 5))
def test_entries_take_turns(n: int, repeats: int):
    jobs = [Job(TINY, f"method {i}") for i in range(n)]
    order = schedule(jobs, repeats)
    assert Counter(order) == Counter({(r, j): 1 for r in range(repeats) for j in jobs})
    for start in range(0, len(order), n):
        turn = order[start:start + n]
        assert [j for _, j in turn] == jobs and len({r for r, _ in turn}) == 1


def test_records_are_kept_after_every_process(tmp_path: Path, monkeypatch):
    "Three entries, of which one cannot run; the benchmark is interrupted in the second repeat."
    order = []
    def fake(job: Job) -> dict:
        if len(order) == 3: raise KeyboardInterrupt
        order.append(job.name)
        return answer(job)
    monkeypatch.setattr(measuring, "spawn", fake)
    reasons = dict(flower="no wings")
    monkeypatch.setattr(measuring, "obstacle", lambda entry, precision, device: reasons.get(entry, ""))
    jobs = [Job(TINY, e) for e in ("fedavg", "bare", "flower")]
    with pytest.raises(KeyboardInterrupt): measure(jobs, 2, tmp_path / "r.json")
    kept = read_records([tmp_path / "r.json"])
    assert order == ["fedavg", "bare-fp32", "fedavg"]
    assert [(r["entry"], r.get("repeat"), r.get("skipped")) for r in kept] == [
        ("flower", None, "no wings"), ("fedavg", 0, None), ("bare-fp32", 0, None), ("fedavg", 1, None)]


def test_only_our_entries_are_profiled_and_last(monkeypatch):
    order = []

    def fake(job: Job) -> dict:
        order.append((job.name, job.profile))
        return answer(job)

    monkeypatch.setattr(measuring, "spawn", fake)
    records = measure([Job(TINY, "fedmpq"), Job(TINY, "bare")], 2)
    assert order == [("fedmpq", False), ("bare-fp32", False)] * 2 + [("fedmpq", True)]
    assert all(bool(r["phases"]) == (r["entry"] == "fedmpq") for r in records)


def test_who_takes_part(monkeypatch):
    found = entries("fedavg,fedmpq", "bare,flower", precision="fp32")
    ours = [("fedavg", "fp32"), ("fedmpq", "fp32")]
    assert found == [*ours, ("bare", "fp32"), ("bare", "bf16"), ("flower", "fp32")]
    monkeypatch.setattr(measuring, "has_bf16", lambda device: False)
    assert "no bf16 in hardware" in obstacle("bare", "bf16") and obstacle("bare", "fp32") == ""
    monkeypatch.setattr(measuring, "has_bf16", lambda device: True)
    assert obstacle("bare", "bf16") == ""
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    assert obstacle("flower", "fp32").startswith("flwr is not installed")
    assert obstacle("fedavg", "fp32") == ""


@pytest.mark.parametrize("wrong,why", [
    ("w1 --rounds 0", "at least 1"), ("w1 --peers horse", "unknown peer 'horse'"),
    ("w1 --methods fedup", "unknown method"), ("show /no/such.json", "No such file")])
def test_wrong_options_end_with_a_sentence(wrong: str, why: str):
    with pytest.raises(SystemExit, match=why): main(wrong.split())


# --- tables ----------------------------------------------------------------------------------------------

def test_ratios_are_taken_repeat_by_repeat():
    "The machine halves its speed from repeat to repeat, the ratio stays. A repeat of the peer is missing."
    mine = [record("fedavg", i, rate) for i, rate in enumerate((80.0, 40.0, 20.0))]
    theirs = [record("bare-fp32", i, rate) for i, rate in enumerate((40.0, 20.0))]
    absent = dict(entry="flower", workload="w1", kind="peer", skipped="no wings")
    row = bench_table([*mine, *theirs, absent]).set_index("entry").loc["fedavg"]
    assert row[["x_bare-fp32", "x_bare-fp32_low", "x_bare-fp32_high"]].tolist() == [2.0, 2.0, 2.0]
    assert row[["seconds", "seconds_low", "seconds_high"]].tolist() == [2.5, 1.25, 5.0]
    assert (row["images_per_second"], row["repeats"]) == (40.0, 3)


def test_machines_and_workloads_are_not_mixed():
    "The same entry on two machines is two rows, and each is compared with the peer on its machine."
    records = [record("fedavg", 0, 60.0), record("flower", 0, 20.0)]
    records += [record("fedavg", 0, 300.0, device="loom"), record("flower", 0, 100.0, device="loom")]
    table = bench_table(records).set_index(["device", "entry"])
    assert table.loc[("abacus", "fedavg"), "x_flower"] == 3.0 == table.loc[("loom", "fedavg"), "x_flower"]
    assert len(table) == 4


def test_markdown_has_a_cell_for_every_heading():
    records = [record("fedmpq", 0, 50.0), record("fedmpq", 1, 40.0), record("flower", 0, 25.0)]
    lines = to_markdown(bench_table(records)).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert "| 2.25 (2-2.5) |" in lines[2] and "| 50 % |" in lines[2]
    assert to_markdown(bench_table([])) == "Nothing has been measured yet."


RECORD = st.fixed_dictionaries(
    dict(entry=st.text(max_size=5), repeat=st.integers(0, 9), seconds=st.floats(0, 1e6)))


@given(st.lists(RECORD))
def test_records_survive_the_file(tmp_path_factory, records: list[dict]):
    path = write_records(tmp_path_factory.mktemp("r") / "r.json", records)
    assert read_records([path]) == records


# --- scaling ---------------------------------------------------------------------------------------------

def curve(seconds, clients=(4.0, 4.0), memory=(900.0, 900.0, 900.0)) -> list[dict]:
    points = [("images", n, seconds(n), 900.0) for n in (1000, 2000, 4000, 8000)]
    points += [("clients", k, s, m) for k, s, m in zip((5, 80), clients, memory[:2], strict=True)]
    points += [("sparse", 1000, 0.1, memory[2])]
    return [record(axis=a, x=x, seconds_per_round=[s], peak_memory_mib=m) for a, x, s, m in points]


@given(st.floats(0.01, 5), st.floats(0.1, 10))
def test_a_straight_line_is_found(start: float, slope: float):
    verdict = scaling_verdict(scaling_table(curve(lambda n: start + slope * n / 1000)))
    assert np.isclose(verdict["seconds_per_1000_images"], slope)
    assert np.isclose(verdict["seconds_without_images"], start, atol=1e-6)
    assert verdict["worst_miss"] < 1e-6
    assert verdict["clients_seconds"] == verdict["clients_memory"] == 1


def test_a_curve_that_is_not_straight_or_flat_is_seen():
    points = curve(lambda n: (n / 1000) ** 2, clients=(4.0, 6.0), memory=(900.0, 900.0, 1800.0))
    verdict = scaling_verdict(scaling_table(points))
    assert verdict["worst_miss"] > 0.5
    assert (verdict["clients_seconds"], verdict["clients_memory"]) == (1.5, 2)


def test_scaling_is_measured_in_turns_and_drawn(tmp_path: Path, monkeypatch, capsys):
    asked = []
    def fake(job: Job) -> dict:
        asked.append(job)
        return answer(job) | dict(seconds=[1 + job.workload.images / 1000] * job.rounds)
    monkeypatch.setattr(measuring, "spawn", fake)
    path = tmp_path / "scaling.json"
    records = measure_scaling(replace(TINY, images=4000), repeats=2, path=path, rounds=2)
    axes = [(r["axis"], r["x"]) for r in records]
    half = len(axes) // 2
    assert axes[:half] == axes[half:] and ("sparse", 1000) in axes
    assert {r["repeat"] for r in records} == {0, 1}
    along = [(r["axis"], job.workload) for r, job in zip(records, asked, strict=True)]
    assert len({w.images for axis, w in along if axis == "clients"}) == 1
    assert len({w.clients for axis, w in along if axis == "images"}) == 1
    main(["show", str(path), "--figure", str(tmp_path / "scaling.pdf")])
    assert "seconds_per_1000_images 1," in capsys.readouterr().out
    assert (tmp_path / "scaling.pdf").stat().st_size > 1000
    left, _ = plot_scaling(read_records([path]))
    drawn = dict(zip(*left.lines[-1].get_data(), strict=True))
    assert drawn == {1000: 2.0, 2000: 3.0, 4000: 5.0, 8000: 9.0}
