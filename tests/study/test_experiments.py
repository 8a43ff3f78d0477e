"""Experiments as a person starts them: command line, papermill, own code, shared results folders."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import ROOT

from fedmpqkd.core.config import canonical
from fedmpqkd.data.images import DataMissing
from fedmpqkd.study import experiments
from fedmpqkd.study.experiments import EXPERIMENTS, Job, plan, run_sweep

TINY = dict(rounds=2, clients=2, train_images=120, test_images=100)
NAMES = [f"{k}={v}" for k, v in TINY.items() if k not in ("rounds",)]


def jobs(results: Path, methods: str = "fedavg,fedmpq", seeds: str = "0", rounds: int = 2) -> list[Job]:
    configs = plan(EXPERIMENTS["exp1"], "smoke", methods, seeds, **TINY | dict(rounds=rounds))
    return [Job(c, str(results), "exp1/smoke", workers=1, quiet=True) for c in configs]


def command(*words: str, cwd: Path = ROOT, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, **kw)


def papermill(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    program = str(Path(sys.executable).with_name("papermill"))
    return subprocess.run([program, *words], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)


def test_finished_runs_are_read_without_their_data(tmp_path: Path, monkeypatch, capsys):
    (there,), (other,) = jobs(tmp_path, "fedavg"), jobs(tmp_path, "fedavg", "1")
    first = run_sweep([there])

    def missing(*_): raise DataMissing("no shards")

    monkeypatch.setattr(experiments, "load_task", missing)
    experiments.say_missing.cache_clear()  # it is said once a process
    assert run_sweep([there]) == first
    assert "digits is not here" in capsys.readouterr().out
    with pytest.raises(DataMissing): run_sweep([other])  # it would have to be computed
    with pytest.raises(DataMissing): run_sweep([replace(there, data_dir=str(tmp_path))])  # named


def test_command_line_runs_an_experiment_without_papermill(tmp_path: Path):
    done = command("-m", "fedmpqkd", "exp1", "--preset", "smoke", "--methods", "fedavg,fedmpq-kd", "--alpha",
                   "1.0", "--rounds=1", "--results-dir", str(tmp_path),
                   *(w for k, v in TINY.items() if k != "rounds" for w in (f"--{k}", str(v))))
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in tmp_path.rglob("*.json")]
    assert {r["config"]["method"]: r["config"]["alpha"] for r in records} == {"fedavg": 0.0, "fedmpq-kd": 1.0}
    assert "| Method" in done.stdout or "| method" in done.stdout.lower()


@pytest.mark.parametrize("words, said", [
    (("exp1", "--alph", "1.0"), "Did you mean one of: '--alpha'"),
    (("exp1", "--preset", "huge"), "allowed are auto, demo, smoke, mini, study, paper"),
    (("exp1", "--preset", "mini", "--data-dir", "nowhere"), "nowhere"),
    (("exp9",), "No such command 'exp9'"),
    (("exp1", "--preset", "smoke", "--alpha", "-1"), "alpha=-1.0: must be finite and at least 0"),
])
def test_command_line_refuses_at_the_door(words: tuple[str, ...], said: str, tmp_path: Path):
    done = command("-m", "fedmpqkd", *words, "--results-dir", str(tmp_path))
    assert done.returncode != 0 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.json"))


OWN = '''
import torch
from torch import nn
from fedmpqkd.data.images import from_tensors, register_dataset
from fedmpqkd.federation.methods import register_method
from fedmpqkd.models.vision import register_model

def stripes():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(160) % 2
    x = torch.randint(0, 60, (160, 3, 32, 32), generator=g, dtype=torch.uint8)
    x[y == 1, :, ::2] += 150
    x[y == 0, :, :, ::2] += 150
    return from_tensors('stripes', x[:120], y[:120], x[120:], y[120:])

register_dataset('stripes', stripes)
register_model('two-layers', lambda classes: nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)))
register_method('noisy', base='fedmpq', rounding_up='stochastic')
'''


def test_own_model_data_and_method_through_papermill(tmp_path: Path):
    plugin = tmp_path / "my_lab.py"
    plugin.write_text(OWN)
    done = papermill(str(ROOT / "nbs/exp1.ipynb"), "-p", "preset", "smoke", "-p", "plugins", str(plugin),
                     "-p", "dataset", "stripes",
                     "-p", "model", "two-layers", "-p", "methods", "noisy", "-p", "rounds", "4", "-p",
                     "results_dir", str(tmp_path / "r"),
                     "-p", "fields", "train_images=0,test_images=0,clients=2", "-p", "dirichlet", "100",
                     cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "r").rglob("*.json")]
    config = record["config"]
    assert (config["method"], config["dataset"], config["model"]) == ("noisy", "stripes", "two-layers")
    assert config["rounding_up"] == "stochastic"
    assert re.fullmatch(r"\w{12}\+model:\w{12}", config["extension"])
    assert record["summary"]["accuracy"] > 90  # stripes are easy: a dead run stays at 50
    assert list((tmp_path / "runs").glob("exp1_*.ipynb"))


def test_an_edited_plugin_is_another_run():
    one, two = (plan(EXPERIMENTS["exp1"], "smoke", "fedavg", extension=e)[0] for e in ("aaa", "bbb"))
    assert canonical(one) != canonical(two)


def test_misspelt_parameter_names_the_declared_ones(tmp_path: Path):
    done = papermill(str(ROOT / "nbs/exp1.ipynb"), "-p", "alph", "1.0", cwd=tmp_path)
    assert done.returncode == 1 and "alpha" in done.stderr and "temperature" in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_sweep_through_a_pool(tmp_path: Path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        records = run_sweep(jobs(tmp_path), pool)
    assert [r["config"]["method"] for r in records] == ["fedavg", "fedmpq"]
    assert len(list(tmp_path.rglob("*.json"))) == 2


SWEEP = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from test_experiments import jobs
from fedmpqkd.study.experiments import run_sweep
run_sweep(jobs(Path({results!r}), 'fedavg,qat-uniform,fedmpq', rounds=3), wait=0.1)
"""


def test_two_processes_share_a_folder_and_one_is_killed(tmp_path: Path):
    "Every record is there once, and equals that of an undisturbed run."
    code = SWEEP.format(tests=[str(ROOT / "tests" / "study"), str(ROOT / "tests")],
                        results=str(tmp_path / "shared"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first, second = (subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
                     for _ in range(2))
    deadline = time.time() + 120
    while not list((tmp_path / "shared").rglob("journal.jsonl")) and time.time() < deadline: time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=240) == 0
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "shared").rglob("*.json"))]
    assert [r["config"]["method"] for r in records] == ["fedavg", "fedmpq", "qat-uniform"]
    assert not [p for p in (tmp_path / "shared").rglob("_work/*")]
    (alone,) = run_sweep(jobs(tmp_path / "alone", "fedmpq", rounds=3))
    (shared,) = [r for r in records if r["config"]["method"] == "fedmpq"]
    kept = ("accuracy", "loss", "bytes_up", "bytes_down", "moved")
    assert [[line[k] for k in kept]
            for line in shared["curve"]] == [[line[k] for k in kept] for line in alone["curve"]]
