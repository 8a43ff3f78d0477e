"Records as tables, from Python and on the command line; another framework's history next to them."
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import fedmpqkd
from fedmpqkd.__main__ import cli
from fedmpqkd.data.images import from_tensors, register_dataset
from fedmpqkd.evaluate.costs import cost_table
from fedmpqkd.report.captions import caption
from fedmpqkd.report.frames import load_model
from fedmpqkd.study.experiments import run_experiment


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


def test_captions_costs_and_models_follow_the_size_of_the_images(tmp_path: Path):
    "28x28 grey images: the caption says so, the kept model takes them, and a network is priced for them."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8, generator=g), torch.arange(60) % 3
    register_dataset('grey', lambda: from_tensors('grey', x[:40], y[:40], x[40:], y[40:]))
    fields = 'dataset=grey,rounds=1,clients=2,bits=4'
    outcome = run_experiment('exp1', methods='fedmpq', seeds='0', fields=fields, results_dir=str(tmp_path))
    assert '40 training and 20 test images of 1x28x28' in caption(outcome.records)
    network = load_model(outcome.folder, method='fedmpq', seed=0)
    assert network(torch.zeros(1, 1, 28, 28)).shape == (1, 3)
    costs = cost_table('cnn', 3, 4, image=(1, 28, 28)).iloc[0]
    by_hand = 16 * 9 * 14 * 14 + 32 * 16 * 9 * 7 * 7 + 3 * 512  # two convolutions of stride 2, a classifier
    assert costs.macs == by_hand
