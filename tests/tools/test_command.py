"""The command line without a notebook: what it prints, where it writes, and what it refuses."""
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
    ("exp3 --axis sideways", "sideways")])
def test_wrong_words_end_with_a_sentence(command: str, why: str):
    with pytest.raises(SystemExit, match=why): main(command.split())


def test_help_explains_every_option(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in options())
