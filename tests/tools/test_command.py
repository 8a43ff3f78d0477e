"""The command line without a notebook: what it prints, where it writes, and what it refuses."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpqkd.__main__ import main, options

TINY = "--preset smoke --methods fedavg --rounds 1 --clients 2 --train_images 60 --test_images 20"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch):
    "A folder that is the project's root, so that nothing is written into the checkout."
    (tmp_path / "settings.ini").write_text("lib_name = fedmpqkd\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command,table", [
    ("exp1", "| fedavg | 1 |"), ("exp3 --axis local_epochs --points 1", "| 1: fedavg | 1 |")])
def test_an_experiment_prints_its_table_and_writes_its_files(command: str, table: str, capsys):
    main([*command.split(), *TINY.split()])
    printed = capsys.readouterr().out
    assert table in printed
    written = [line.removeprefix("wrote ") for line in printed.splitlines() if line.startswith("wrote ")]
    assert len(written) >= 3 and all(Path(name).stat().st_size > 0 for name in written)
    assert {Path(name).suffix for name in written} >= {".tex", ".md", ".pdf"}


@pytest.mark.parametrize("command,why", [
    ("exp1 --alhpa 1", "did you mean --alpha"), ("exp1 --axis bits", "that is exp3"), ("exp9", "exp9"),
    ("exp3 --axis sideways", "sideways"),
    ("exp1 --workers abc", "fedmpqkd: workers='abc' is not of type int"),
    ("exp1 --methods", "--methods needs a value"), ("exp1 --methods --seeds 1", "--methods needs a value"),
    ("exp1 --seeds 1 --seeds=2", "--seeds is there twice"), ("exp1 --seeds a", "fedmpqkd: seed='a'"),
    ("exp3 --rounds x", "fedmpqkd: rounds='x'"),
    ("exp1 --results_dir settings.ini --preset smoke", "settings.ini"),
    ("exp1 --preset smoke --methods fedmpq --assignment uniform", "use fedmpq-uniform"),
    ("exp1 --preset smoke --device mps", "float64")])
def test_wrong_words_end_with_a_sentence(command: str, why: str):
    with pytest.raises(SystemExit, match=why): main(command.split())


def test_help_explains_every_option(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in options())


def test_signs_that_the_terminal_lacks_do_not_lose_the_table(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "fedmpqkd", "exp1", *TINY.split(), "--results_dir", "r"],
                          cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Accuracy % ?" in done.stdout and (tmp_path / "runs/generated/exp1.tex").exists()


def test_a_reader_that_leaves_does_not_lose_the_table(tmp_path: Path):
    command = f"{sys.executable} -m fedmpqkd exp1 {TINY} --results_dir r | head -2"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert (tmp_path / "runs/generated/exp1.tex").exists()
