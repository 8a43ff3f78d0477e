"""The command line without a notebook: what it prints, where it writes, and what it refuses."""
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from conftest import ROOT

from fedmpqkd.__main__ import cli
from fedmpqkd.core.config import RunConfig
from fedmpqkd.federation.methods import RECIPES
from fedmpqkd.models.vision import _MODELS

TINY = "--preset smoke --methods fedavg --rounds 1 --clients 2 --train_images 60 --test_images 20"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch):
    "A folder that is the project's root, so that nothing is written into the checkout."
    (tmp_path / "settings.ini").write_text("lib_name = fedmpqkd\n")
    monkeypatch.chdir(tmp_path)


def said(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), prog_name="fedmpqkd")


@pytest.mark.parametrize("command,table", [
    ("exp1", "| fedavg | 1 |"), ("exp3 --axis local_epochs --points 1", "| 1: fedavg | 1 |")])
def test_an_experiment_prints_its_table_and_writes_its_files(command: str, table: str):
    done = said(*command.split(), *TINY.split())
    assert done.exit_code == 0 and table in done.stdout, done.output
    written = [line.removeprefix("wrote ") for line in done.stdout.splitlines() if line.startswith("wrote ")]
    assert len(written) >= 3 and all(Path(name).stat().st_size > 0 for name in written)
    assert {Path(name).suffix for name in written} >= {".tex", ".md", ".pdf"}
    folder = Path(done.stdout.splitlines()[-1].removeprefix("records in "))
    assert list(folder.glob("fedavg_seed=0_*.json"))


@pytest.mark.parametrize("command,why", [
    ("exp1 --alhpa 1", "Did you mean one of: '--alpha'"), ("exp1 --axis bits", "No such option '--axis'"),
    ("exp9", "No such command 'exp9'"),
    ("exp3 --axis sideways", "sideways"), ("exp1 --dropout 1.5", "must be in [0, 1]"),
    ("exp1 --workers abc", "workers='abc' is not of type int"),
    ("exp1 --bits abc", "bits='abc': must be numbers, separated by commas"),
    ("exp5 --preset smoke --bits a", "bits='a': must be numbers, separated by commas"),
    ("exp1 --methods", "requires an argument"), ("exp1 --methods --seeds 1", "needs a value"),
    ("exp1 --seeds 1 --seeds=2", "--seeds is there twice"), ("exp1 --seeds a", "Error: seed='a'"),
    ("exp1 --train_images 5 --train-images 6", "--train-images is there twice"),
    ("exp4 --preset huge", "allowed are auto"), ("exp4 --bits 2 --bits 3", "--bits is there twice"),
    ("exp4 --rounds 3", "No such option '--rounds'"), ("exp4 --fields epoch=3 --preset smoke", "epoch"),
    ("exp3 --rounds x", "rounds='x'"), ("exp1 --optimizer adm", "allowed are sgd, adamw"),
    ("exp1 --results_dir settings.ini --preset smoke", "settings.ini"),
    ("exp1 --preset smoke --methods fedmpq --assignment uniform", "use fedmpq-uniform"),
    ("exp1 --preset smoke --device mps", "float64"), ("records --results-dir nowhere", "no such folder"),
    ("methods --plugins nowhere.py", "there is no file")])
def test_wrong_words_end_with_a_sentence(command: str, why: str):
    done = said(*command.split())
    assert done.exit_code != 0 and why in done.output, done.output
    assert isinstance(done.exception, SystemExit) and not list(Path().rglob("*.json"))


@pytest.mark.parametrize("name", ["exp1", "exp2", "exp3"])
def test_help_explains_every_field(name: str):
    "Each field but those that are computed, once, with its sentence; the published value is the default."
    words = " ".join(said(name, "--help").output.split())
    for f in dataclasses.fields(RunConfig):
        if f.name in ("seed", "method", "extension"): continue
        assert words.count(f" --{f.name.replace('_', '-')} ") == 1, f.name
    assert "learning rate, constant [must be finite and at least 0; default 0." in words
    assert "[sgd|adamw]" in words and "How a client trains:" in words


def test_dashes_and_underscores_are_one():
    done = said("exp1", *TINY.replace("_", "-").replace("fedavg", "x").split(), "--rounding-up", "stochastic")
    assert "unknown method 'x'" in done.output, done.output


def test_light_commands_import_nothing_heavy():
    program = ("import sys; from fedmpqkd.__main__ import cli\n"
               "try: cli.main(sys.argv[1:], prog_name='fedmpqkd')\n"
               "finally: print([m for m in ('torch', 'papermill', 'pandas') if m in sys.modules])")
    for words in (["--help"], ["--version"], ["completion", "bash"]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("[]\n"), (words, done.stderr)


def test_lists_import_no_library_of_networks_or_data():
    "Each of these takes longer to import than a list should take."
    program = ("import sys; from fedmpqkd.__main__ import cli\n"
               "heavy = ('torchvision', 'timm', 'sklearn', 'torch._dynamo', 'matplotlib', 'scipy')\n"
               "for name in sys.argv[1:]: cli.main([name], standalone_mode=False)\n"
               "print([m for m in heavy if m in sys.modules])")
    command = [sys.executable, "-c", program, "data", "methods", "models", "records"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout[-300:] + done.stderr[-300:]


@pytest.mark.parametrize("words, answer", [
    ("--methods fedmqp", "unknown method 'fedmqp': did you mean fedmpq"),
    ("--model resnt8", "unknown model 'resnt8': did you mean resnet8"),
    ("--dataset digts", "unknown data set 'digts': did you mean digits?"),
    ("--augment cutmx", "augment='cutmx': did you mean cutmix?"),
    ("--optimizer adm", "did you mean adamw?")])
def test_a_misspelt_name_is_answered_with_close_ones(words: str, answer: str):
    done = said("exp1", *TINY.replace("--methods fedavg ", "").split(), "--results-dir", "r", *words.split())
    assert done.exit_code != 0 and answer in " ".join(done.output.split()) and len(done.output) < 500


def test_a_shell_completes_commands_options_and_choices():
    def completed(line: str) -> list[str]:
        *before, last = line.split(" ")
        shell = ShellComplete(cli, {}, "fedmpqkd", "_FEDMPQKD_COMPLETE")
        return [item.value for item in shell.get_completions(before, last)]

    found = completed("exp")
    assert {"exp1", "exp4", "export"} <= set(found) and all(name.startswith("exp") for name in found)
    assert completed("exp1 --rounding-u") == ["--rounding-up"]
    assert completed("exp1 --rounding-up st") == ["stochastic"]


PLUGIN = """
from torch import nn
from fedmpqkd.federation.methods import register_method
from fedmpqkd.models.vision import register_model
register_model('mine', lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes)))
register_model('grey', lambda n: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LazyLinear(n)))
register_method('fedmpq-two', base='fedmpq', bits=2)
"""


@pytest.fixture
def forgets():
    "What a test registers is gone after it."
    registries = RECIPES, _MODELS
    before = [dict(r) for r in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - set(names): del registry[name]


def test_lists_know_what_a_plugin_registers(tmp_path: Path, forgets: None):
    (tmp_path / "lab.py").write_text(PLUGIN)
    models = said("models", "--plugins", "lab.py").output
    assert re.search(r"^grey +not for images of 3x32x32$", models, re.M)
    assert re.search(r"^mine +30,730 ", models, re.M) and re.search(r"^cnn +10,266 ", models, re.M)
    assert re.search(r"^fedmpq-two +fedmpq +bits=2$", said("methods", "--plugins", "lab.py").output, re.M)
    assert re.search(r"^digits +embedded +10 ", said("data").output, re.M)


def test_records_are_listed(tmp_path: Path):
    said("exp1", *TINY.split(), "--results-dir", "r", "--seeds", "0,1")
    printed = said("records", "--results-dir", "r").output
    assert re.search(r"^exp1/smoke +2  0,1 +1  digits  fedavg$", printed, re.M)


def test_signs_that_the_terminal_lacks_do_not_lose_the_table(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "fedmpqkd", "exp1", *TINY.split(), "--results_dir", "r"],
                          cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Accuracy % ?" in done.stdout and (tmp_path / "runs/generated/exp1.tex").exists()


def test_a_reader_that_leaves_does_not_lose_the_table(tmp_path: Path):
    command = f"{sys.executable} -m fedmpqkd exp1 {TINY} --results_dir r | head -2"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert (tmp_path / "runs/generated/exp1.tex").exists()
