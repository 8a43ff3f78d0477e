"Records as tables, from Python and on the command line; another framework's history next to them."
import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import fedmpqkd
from fedmpqkd.__main__ import cli


def said(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words), prog_name="fedmpqkd")
    assert done.exit_code == 0 or "Traceback" not in done.output
    return done.output


def test_a_wrong_folder_is_an_error_that_says_what_there_is():
    with pytest.raises(ValueError, match="exp1/first"): fedmpqkd.load("exp1/frist")
    assert "exp1/first" in said("export", "exp1/frist", "x.csv")


@pytest.mark.parametrize("ending, read", [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_exported_tables_hold_what_the_records_hold(tmp_path: Path, ending: str, read):
    path = tmp_path / f"runs.{ending}"
    assert said("export", "exp1/first", str(path)) == f"wrote {path}\n"
    found = read(path).set_index("id")
    for record in sorted(Path(__file__).parents[2].glob("results/exp1/first/*.json")):
        r = json.loads(record.read_text())
        row = found.loc[r["id"]]
        assert row.accuracy == pytest.approx(r["summary"]["accuracy"]) and row.method == r["config"]["method"]
        assert row.auc_norm == pytest.approx(r["summary"]["auc"]["norm"]) and row.lr == r["config"]["lr"]
        assert json.loads(row.bits) == r["config"]["bits"]


def test_a_history_of_flower_stands_beside_records(tmp_path: Path):
    history = dict(losses_distributed=[], losses_centralized=[[0, 2.3], [1, 0.9]], metrics_distributed_fit={},
                   metrics_distributed={}, metrics_centralized={"accuracy": [[0, 0.1], [1, 0.8125]]})
    path, curves = tmp_path / "history.json", tmp_path / "curves.csv"
    path.write_text(json.dumps(history))
    printed = said("import", str(path), "--beside", "exp1/first", "--to", str(curves))
    assert "flower" in printed and "81.25" in printed and "fedmpq-kd" in printed
    assert set(pd.read_csv(curves).method) == {"flower", "fedavg", "qat-uniform", "fedmpq", "fedmpq-kd"}
    path.write_text("[]")
    assert "Error" in said("import", str(path))
