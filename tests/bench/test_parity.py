"Parity: another implementation of federated averaging learns the same."
import os

import pytest
from conftest import ROOT

from fedmpqkd.bench.entries import WORKLOADS, Workload
from fedmpqkd.bench.measure import read_records
from fedmpqkd.bench.parity import measure_parity, parity_table, parity_verdict

TINY = Workload("parity", "cnn", classes=4, clients=3, images=240, test_images=80, dirichlet=5.0,
                batch_size=16)


def test_the_bare_loop_learns_the_same_and_seeds_differ(tmp_path):
    "It reads the same batches, so its accuracies may differ by rounding only: a picture or two of eighty."
    found = measure_parity(TINY, 2, tmp_path / "p.json", entries=("fedavg", "bare"), rounds=3, threads=1)
    assert read_records([tmp_path / "p.json"]) == found
    table = parity_table(found)
    assert (table.loc["fedavg", [0, 1]] - table.loc["bare-fp32", [0, 1]]).abs().max() <= 2.5
    assert table.loc["fedavg", 0] != table.loc["fedavg", 1]
    assert parity_verdict(found, "bare-fp32")["n"] == 2


@pytest.mark.skipif(not os.environ.get("FEDMPQKD_SLOW"), reason="FEDMPQKD_SLOW=1 runs it: half an hour")
def test_flower_learns_the_same_on_cifar(tmp_path):
    pytest.importorskip("flwr")
    found = parity_verdict(measure_parity(WORKLOADS["parity"], 3, tmp_path / "p.json", rounds=10, threads=2))
    assert abs(found["difference"]) < found["spread"]


def test_the_committed_records_agree_within_the_spread_of_seeds():
    path = ROOT / "results" / "bench" / "parity.json"
    if not path.exists(): pytest.skip("no records")
    records = [r for r in read_records([path]) if "accuracy" in r]
    assert {r["entry"] for r in records} >= {"fedavg", "flower"} and len(records[0]["accuracy"]) == 10
    found = parity_verdict(records)
    assert found["n"] == 3 and abs(found["difference"]) < found["spread"]
