"""A trial overwrites nothing, a wish is not dropped, a name stands for its code, and a wait says for whom."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from fedmpqkd.core.config import RunConfig
from fedmpqkd.core.journal import Damaged
from fedmpqkd.data.images import _LOADERS, from_tensors, register_dataset
from fedmpqkd.federation.methods import RECIPES, make_config, register_method
from fedmpqkd.models.vision import _MODELS, BUILT_IN, register_model
from fedmpqkd.study import experiments as E
from fedmpqkd.study.axes import AXES, axis_points
from fedmpqkd.study.examples import made_up_record
from fedmpqkd.study.records import check_comparable, load_records
from fedmpqkd.study.tuning import tune

TINY = dict(preset="smoke", methods="fedavg", rounds=1, clients=2, train_images=40, test_images=40, workers=1,
            model="resnet8", device="cpu")


@pytest.fixture(autouse=True)
def names_of_before():
    "What a test registers goes with it."
    before = [(d, dict(d)) for d in (_MODELS, _LOADERS, RECIPES)]
    yield
    for d, kept in before:
        d.clear()
        d.update(kept)


def linear(width: int):
    return lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, classes))


# identity follows the code ----------------------------------------------------------------------------------

def test_the_projects_own_names_need_no_code():
    assert all(make_config("fedavg", model=name).extension == "" for name in BUILT_IN)
    assert all(make_config(m, alpha=0.5, public_images=9).extension == "" for m in RECIPES
               if "alpha" not in RECIPES[m] or m != "fedmpq-kd-high")


def test_another_network_under_the_same_name_is_another_run(tmp_path: Path):
    sent = []
    for width in (2, 4, 2):
        register_model("mine", linear(width))
        (record,) = E.run_experiment("exp1", **TINY | dict(model="mine"), results_dir=str(tmp_path)).records
        sent.append((record["id"], record["summary"]["manifest_bytes"], record["summary"]["bytes_up"]))
    assert sent[0] == sent[2] and sent[0][0] != sent[1][0] and sent[1][2] > sent[0][2]
    assert len(list(tmp_path.rglob("fedavg*.json"))) == 2


def test_a_project_name_given_to_a_users_network_has_its_code():
    register_model("resnet8", linear(2))
    assert make_config("fedavg", model="resnet8").extension.startswith("model:")


def test_another_data_set_under_the_same_name_is_loaded(tmp_path: Path):
    def of(value: int):
        x = torch.arange(60 * 3072).reshape(60, 3, 32, 32).mul(value).to(torch.uint8)
        return lambda: from_tensors("same", x[:40], torch.arange(40) % 2, x[40:], torch.arange(20) % 2)

    ids = []
    for value in (1, 2):
        register_dataset("same", of(value))
        own = TINY | dict(dataset="same", test_images=0, fields="train_images=0", results_dir=str(tmp_path))
        (record,) = E.run_experiment("exp1", **own).records
        ids.append(record["data"]["fingerprint"])
    assert ids[0] != ids[1]


PLUGIN = "from beside_the_plugin import BITS\nfrom fedmpqkd.federation.methods import register_method\n" \
         "register_method('mine-{0}', base='fedmpq', bits=BITS)\n"


def test_plugins_are_read_anew_with_what_they_import(tmp_path: Path):
    a, b, beside = (tmp_path / f"{name}.py" for name in ("a", "b", "beside_the_plugin"))
    for path, name in ((a, "a"), (b, "b")): path.write_text(PLUGIN.format(name))
    beside.write_text("BITS = 2\n")
    first = E.load_plugins(str(a))
    assert E.load_plugins(str(a)) == first and make_config("mine-a").bits == (2,)
    beside.write_text("BITS = 3\n")
    assert E.load_plugins(str(a)) != first and make_config("mine-a").bits == (3,)
    both = E.load_plugins(f"{a},{b}")
    assert both not in ("", first) and make_config("mine-b").bits == (3,)


def test_a_plugin_edited_after_planning_is_refused(tmp_path: Path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("WIDTH = 1\n")
    config = E.plan(E.EXP1, "smoke", "fedavg", extension=E.load_plugins(str(plugin)))[0]
    plugin.write_text("WIDTH = 2\n")
    E.load_plugins("")
    with pytest.raises(ValueError, match="edited since"):
        E.open_job(E.Job(config, str(tmp_path), "exp1/smoke", plugins=str(plugin)))


def test_two_networks_of_one_name_do_not_stand_in_one_table():
    one, two = made_up_record("fedavg", 0, 50), made_up_record("fedmpq", 0, 50)
    for record, code in ((one, "model:aaa"), (two, "model:bbb")): record["config"]["extension"] = code
    with pytest.raises(ValueError, match="another network"): check_comparable([one, two])


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "a\\b"])
def test_names_stay_in_their_folder(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="file names"): register_method(name, base="fedavg")
    if "/" not in name: return
    with pytest.raises(ValueError, match="leave the folder"):
        config = RunConfig(method=name, model="resnet8", train_images=40)
        E.open_job(E.Job(config, str(tmp_path), "exp1/smoke"))


# a trial overwrites nothing ---------------------------------------------------------------------------------

DEVICE, RESULTS = "cpu", ROOT / "results"


def departs(preset="study", results=RESULTS, **changed):
    tuned = E.tuned_values(RESULTS, "exp1", preset)
    configs = E.plan(E.EXP1, preset, tuned=tuned, **dict(precision="fp32") | changed)
    return E.departure("exp1", preset, configs, results, DEVICE)


def test_only_the_whole_declared_preset_is_evidence(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert departs() == "" and departs(alpha=0.5, bits="4", rounds="20") == ""
    assert "not mini" in departs("mini") and "not smoke" in departs("smoke")
    assert str(tmp_path) in departs(results=tmp_path)
    assert "methods or seeds" in departs(methods="fedavg") and "methods or seeds" in departs(seeds="0,1")
    assert "(rounds)" in departs(rounds=1) and "(lr)" in departs(lr=0.0123)
    assert "(extension)" in departs(extension="abc")


def test_a_point_of_an_axis_is_declared_with_its_own_values(monkeypatch):
    monkeypatch.chdir(ROOT)
    tuned = E.tuned_values(RESULTS, "exp1", "mini")
    point = axis_points("start", "mini")["public-2"]
    own = {k: v for k, v in point.items() if k != "methods"}
    configs = E.plan(E.EXP3, "mini", point["methods"], tuned=tuned, precision="fp32", **own)
    assert E.departure("exp3", "mini", configs, RESULTS, DEVICE, point) == ""
    assert E.departure("exp3", "mini", configs, RESULTS, DEVICE) != ""


# wishes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("methods, wish, said", [
    ("fedmpq", dict(assignment="uniform"), "use fedmpq-uniform"), ("fedprox", dict(prox=1.0), "prox=0.01"),
    ("fedavg,fedmpq-ternary", dict(bits="2"), "fedmpq-ternary"), ("fedmpq-kd-q8", dict(teacher="ema"), "q8"),
    ("fedavg,fedmpq", dict(alpha=1.0), "no method here follows it"), ("fedmpq", dict(seed=3), "say seeds"),
    ("fedmpq-kd-high", dict(alpha=0.25), "no method here follows it"),
    ("fedmpq", dict(method="fedavg"), "say methods")])
def test_a_contradicted_wish_is_an_error(methods: str, wish: dict, said: str):
    with pytest.raises(ValueError, match=re.escape(said)): E.plan(E.EXP1, "smoke", methods, **wish)
    pinned = {m: RECIPES[m] for m in methods.split(",")}
    assert all(name in recipe for name in wish if name not in ("seed", "method")
               for recipe in [pinned[methods.split(",")[-1]]])


@pytest.mark.parametrize("methods, wish", [
    ("fedavg,fedmpq,fedmpq-kd", dict(alpha=1.0)), ("fedmpq", dict(assignment="prune-grow")),
    ("fedprox", dict(prox="0.01")), ("fedmpq,qat-uniform", dict(lambda_b=0.1)), ("fedmpq", dict(alpha=0.5)),
    ("fedmpq-kd-high,fedmpq-kd", dict(alpha=0.25))])
def test_a_wish_that_some_row_follows_is_no_contradiction(methods: str, wish: dict):
    configs = E.plan(E.EXP1, "smoke", methods, **wish)
    assert [c.method for c in configs] == methods.split(",")
    assert {c.method: c.alpha for c in configs}.get("fedmpq-kd", wish.get("alpha")) == wish.get("alpha")


def test_no_axis_contradicts_its_methods():
    for name in AXES:
        for point in axis_points(name, "study").values():
            own = {k: v for k, v in point.items() if k != "methods"}
            assert E.plan(E.EXP3, "mini", point["methods"], **own)


@pytest.mark.parametrize("wrong, said", [
    (dict(workers="abc"), "workers='abc' is not of type int"), (dict(workers=-1), "at least 0"),
    (dict(device="mps"), "float64"), (dict(fields="extension=x"), "plugins")])
def test_the_door_says_what_is_wrong(wrong: dict, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(said)):
        E.run_experiment("exp1", **TINY | dict(results_dir=str(tmp_path)) | wrong)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    E.run_experiment("exp1", **TINY, results_dir="~/mine")
    assert list((tmp_path / "mine/exp1/smoke").glob("*.json"))
    assert load_records(Path("~/mine"), "exp1", "smoke")


# pools, waiting, damage -------------------------------------------------------------------------------------

def test_a_pool_that_would_fork_is_spawned(tmp_path: Path, capsys):
    configs = E.plan(E.EXP1, "smoke", "fedavg", rounds=1, clients=2, train_images=40, test_images=40)
    with ProcessPoolExecutor(1) as pool:
        forks = pool._mp_context.get_start_method() == "fork"
        (record,) = E.run_sweep([E.Job(configs[0], str(tmp_path), "exp1/smoke", workers=1)], pool)
        assert record["config"]["method"] == "fedavg" and (not pool._processes if forks else True)
    assert ("spawned" in capsys.readouterr().out) == forks


WAITING = """
import sys
from fedmpqkd.study.experiments import run_experiment
run_experiment('exp1', 'smoke', 'fedavg', results_dir=sys.argv[1], rounds=200, clients=2, train_images=40,
               test_images=40, workers=1)
"""


def test_who_waits_says_for_whom(tmp_path: Path):
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.rglob("journal.jsonl")) and time.time() < deadline: time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        said = next(line for line in second.stdout if line.startswith("waiting: "))
        second.kill()
        second.wait()
    finally:
        first.kill()
        first.wait()
    assert f"process {first.pid}" in said and "since 20" in said
    assert "kill" in said and "fedavg_seed=0" in said


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD\n{}", '{"choices": '])
def test_damaged_files_are_named(text: str, tmp_path: Path):
    E.run_experiment("exp1", **TINY, results_dir=str(tmp_path))
    (path,) = tmp_path.rglob("fedavg*.json")
    path.write_text(text)
    with pytest.raises(Damaged, match=path.name): E.run_experiment("exp1", **TINY, results_dir=str(tmp_path))
    path.unlink()
    tuned = E.tuned_path(tmp_path, "exp1", "smoke")
    tuned.write_text(text)
    with pytest.raises(Damaged, match=tuned.name): E.run_experiment("exp1", **TINY, results_dir=str(tmp_path))
    with pytest.raises(Damaged, match=tuned.name):
        tune("exp1", "smoke", "fedavg", results_dir=str(tmp_path))


def test_a_damaged_record_names_itself_in_one_line(tmp_path: Path):
    words = [w for k, v in TINY.items() for w in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "fedmpqkd", "exp1", *words, "--results_dir", str(tmp_path)]
    (tmp_path / "exp1/smoke").mkdir(parents=True)
    E.run_experiment("exp1", **TINY, results_dir=str(tmp_path))
    (path,) = tmp_path.rglob("fedavg*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record)[:-9])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and path.name in done.stderr
    assert done.stderr.count("\n") == 1
