"Records as tables, from Python and on the command line; another framework's history next to them."
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import fedmpqkd
from fedmpqkd.__main__ import cli
from fedmpqkd.core.journal import project_root
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


def test_rounds_have_the_columns_by_which_runs_differ(tmp_path: Path):
    "Two rates of one method under one seed: their curves come apart by a column, and are right."
    tiny = dict(preset='smoke', methods='fedavg', rounds=2, clients=2, results_dir=str(tmp_path),
                device='cpu', workers=1, fields='train_images=60,test_images=20')
    wanted = {lr: run_experiment('exp1', lr=lr, **tiny).records[0]['curve'] for lr in (0.01, 0.02)}
    rounds = fedmpqkd.load('exp1/smoke', curves=True, results=tmp_path)
    for (lr, bits), own in rounds.groupby(['lr', 'bits']):
        assert own.accuracy.tolist() == [line['accuracy'] for line in wanted[lr]] and bits == (4.0,)
        assert set(own.data_name) == {'digits'} and own['round'].tolist() == [1, 2]
    younger = fedmpqkd.load('exp3/mini', curves=True)  # some records are older than the field teacher_norm
    assert set(younger.teacher_norm) == {'running', 'batch'}


def of_threes(value: int):
    x = torch.arange(60 * 192).reshape(60, 3, 8, 8).mul(value).to(torch.uint8)
    return lambda: from_tensors('threes', x[:40], torch.arange(40) % 2, x[40:], torch.arange(20) % 2)


def test_own_data_have_a_folder_of_their_own_and_a_line_if_they_changed(tmp_path: Path, capsys):
    tiny = dict(preset='smoke', methods='fedavg', rounds=1, clients=2, results_dir=str(tmp_path),
                device='cpu', workers=1)
    digits = run_experiment('exp1', **tiny, fields='train_images=60,test_images=20')
    register_dataset('threes', of_threes(1))
    own = run_experiment('exp1', dataset='threes', **tiny)
    assert 'threes is not the data set of smoke: records go to smoke-threes' in capsys.readouterr().out
    assert (digits.folder, own.folder) == (tmp_path / 'exp1/smoke', tmp_path / 'exp1/smoke-threes')
    assert own.generated.name == 'smoke-threes' and digits.generated.name == 'generated'
    for outcome, data in ((digits, 'digits'), (own, 'threes')):
        assert {json.loads(p.read_text())['data']['name'] for p in outcome.folder.glob('*.json')} == {data}
    assert len(fedmpqkd.load(own.folder)) == 1 and 'several' not in capsys.readouterr().out
    register_dataset('threes', of_threes(2))
    run_experiment('exp1', dataset='threes', **tiny)
    capsys.readouterr()
    assert fedmpqkd.load(own.folder).data_fingerprint.nunique() == 2
    assert 'several data sets: group by dataset and data_fingerprint' in capsys.readouterr().out


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


@pytest.mark.parametrize("where", ["exp6/study-a", "exp4/study"])
def test_what_the_list_shows_can_be_loaded_and_written(where, tmp_path):
    "Records of other forms than a run's: each file a row, its own numbers, and a CSV that reads back."
    frame = fedmpqkd.load(where)
    folder = project_root() / "results" / where / "pieces"
    files = {p.stem.rsplit("_", 1)[-1]: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert set(frame.id) == set(files) and len(frame) == len(files)
    if where == "exp6/study-a":
        for row in frame.to_dict("records"):
            told = files[row["id"]]["summary"]
            assert [row["server_"], row["mean_client"]] == [told["server"], told["mean_client"]]
            assert [row[f"clients_{n}"] for n in range(3)] == told["clients"]
    path = tmp_path / "records.csv"
    said("export", where, str(path))
    assert len(pd.read_csv(path)) == len(frame)


def test_all_listed_folders_can_be_loaded():
    from fedmpqkd.tools.lists import list_records
    for where in list_records().folder: assert len(fedmpqkd.load(where))
