"Callbacks hear a run's beginning, rounds and end; a run that fails before its first round leaves nothing."
from pathlib import Path

import pytest
import torch

from fedmpqkd.core.config import SERVER_RULES, RunConfig, run_id
from fedmpqkd.core.journal import Journal
from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import play, run
from fedmpqkd.federation.serverrules import register_server_rule
from fedmpqkd.federation.watch import CALLBACKS, Callback, Sweep, duration

LINES = [dict(round=t, accuracy=50.0 + t, bytes_up=10 * t, bits=[4, 4]) for t in (1, 2)]
TINY = dict(model="cnn", clients=2, rounds=3, batch_size=16, lr=0.05, eval_images=0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch):
    "A folder that is the project's root, so that nothing is written into the checkout."
    (tmp_path / "settings.ini").write_text("lib_name = fedmpqkd\n")
    monkeypatch.chdir(tmp_path)


def digits():
    return load_dataset("digits").subset(80, 40)


def tell(name: str) -> None:
    "Two rounds, without a federation."
    callback = CALLBACKS[name]()
    callback.start(RunConfig(method="fedmpq", bits=2), 0)
    for line in LINES: callback.round(line)
    callback.end(None)


def test_tensorboard_has_every_number(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="pip install -e '.[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tell("tensorboard")
    read = EventAccumulator(str(tmp_path / "runs/tensorboard/fedmpq_seed_0"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"accuracy", "bytes_up"}
    assert [(s.step, s.value) for s in read.Scalars("accuracy")] == [(1, 51.0), (2, 52.0)]


def test_mlflow_has_parameters_and_metrics(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow", reason="pip install -e '.[track]'")
    tell("mlflow")
    (found,) = mlflow.search_runs(experiment_names=["fedmpqkd"], output_format="list")
    assert found.data.params["bits"] == "[2.0]" and found.info.status == "KILLED"
    values = mlflow.MlflowClient().get_metric_history(found.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in values] == [(1, 51.0), (2, 52.0)]


def test_wandb_stays_offline(tmp_path: Path):
    pytest.importorskip("wandb", reason="pip install -e '.[track]'")
    tell("wandb")
    assert len(list((tmp_path / "runs/wandb").glob("offline-run-*/*.wandb"))) == 1


class Diary(Callback):
    def __init__(self): self.told = []

    def start(self, config, done): self.told.append(("start", done))

    def round(self, line):
        self.told.append(("round", line["round"]))
        if line["round"] == 2 and self.told[0] == ("start", 0): raise KeyboardInterrupt

    def end(self, record): self.told.append(("end", record is not None))


def test_a_callback_may_stop_a_run_that_goes_on_later(tmp_path: Path):
    config, data = make_config("fedmpq", **TINY), digits()
    journal = Journal(tmp_path, "g/p", "run", run_id(config, data.fingerprint))
    first, second = Diary(), Diary()
    with pytest.raises(KeyboardInterrupt): run(config, data, journal, workers=1, callbacks=[first])
    assert first.told == [("start", 0), ("round", 1), ("round", 2), ("end", False)]
    stopped = run(config, data, journal, workers=1, callbacks=[second])
    assert second.told == [("start", 2), ("round", 3), ("end", True)]
    whole = run(config, data, workers=1)
    assert [line["accuracy"] for line in stopped["curve"]] == [line["accuracy"] for line in whole["curve"]]
    assert not (tmp_path / "g/p/_work").exists()


class Refuses(Callback):
    def start(self, config, done): raise ValueError("not today")

    def end(self, record): raise AssertionError("it has never begun")


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path):
    config, data = make_config("fedavg", **TINY), digits()
    journal = Journal(tmp_path, "g/p", "run", run_id(config, data.fingerprint))
    with pytest.raises(ValueError, match="not today"):
        run(config, data, journal, workers=1, callbacks=[Refuses()])
    assert [p for p in (tmp_path / "g").rglob("*") if p.name != "p"] == []


def test_time_left_counts_what_this_process_computed(monkeypatch):
    "Ten rounds of which six were there: four seconds for two of them leave four for the other two."
    now = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    sweep = Sweep([5, 5])
    sweep.found(6)
    sweep.done, sweep.here = sweep.done + 2, 2
    assert sweep.left() == 4.0
    assert [duration(s) for s in (89, 90, 5400)] == ["89 s", "1.5 min", "1.5 h"]


def test_a_run_whose_accuracy_collapses_says_so_once(capsys):
    "From the third round on the server forgets everything; the network then always says the same."
    calls = []
    def forgetful(config, old, mean, memory):
        calls.append(1)
        return {n: t if len(calls) < 3 else torch.zeros_like(t) for n, t in mean.items()}

    register_server_rule('forgetful', forgetful)
    config = make_config('fedavg', server_rule='forgetful', partition='iid', **TINY | dict(rounds=6))
    run, curve = open_run(config, load_dataset('digits').subset(400, 200), workers=1), []
    try:
        play(run, curve, until=4)
        play(run, curve)
    finally:
        run.pool.close()
        del SERVER_RULES['forgetful']
    best, low = curve[1]['accuracy'], curve[3]['accuracy']
    assert best > 30 and low < 12
    said = [text for text in capsys.readouterr().out.splitlines() if 'collapsed' in text]
    start = f'fedavg seed 0, round 4: accuracy has collapsed to {low:.1f} %, from {best:.1f} % in round 2;'
    assert len(said) == 1 and said[0].startswith(start) and 'lr below 0.05' in said[0]
    assert 'bits' not in said[0] and 'alpha' not in said[0]


@pytest.mark.parametrize('change, told', [
    (dict(lr=0.0, rounds=5), True), (dict(lr=0.0, rounds=4), False), (dict(rounds=5), False),
    (dict(lr=0.0, rounds=8, participation=0.5), False), (dict(lr=0.0, rounds=2, local_epochs=3), True)])
def test_a_run_that_learns_nothing_says_so_at_its_end(change: dict, told: bool, capsys):
    "At rate zero nothing is learned, which is only worth a line if images were seen five times."
    config = make_config('fedmpq', partition='iid', bits=4, **TINY | change)
    run, curve = open_run(config, load_dataset('digits').subset(400, 200), workers=1), []
    try: play(run, curve)
    finally: run.pool.close()
    said = [text for text in capsys.readouterr().out.splitlines() if 'no better than' in text]
    assert len(said) == told and all('another lr than 0' in text and 'bits above 4' in text for text in said)
