"The smoke presets of the language experiments, from the notebooks' own calls to the tables."
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fedmpqkd.study.language import LANGUAGE, language_table, pairs, run_language  # noqa: E402
from fedmpqkd.study.mkt import mkt_pairs, mkt_table, run_mkt  # noqa: E402


@pytest.mark.parametrize("name", LANGUAGE)
def test_smoke(name, tmp_path):
    rows = "fedavg,fedmpq,fedmpq-kd"
    outcomes = run_language(name, "smoke", "4,2", rows, results_dir=str(tmp_path), workers=1)
    records = {b: o.records for b, o in outcomes.items()}
    assert [len(r) for r in records.values()] == [3, 2]  # fedavg has no bits
    table = language_table(records)
    assert table.bits.tolist() == ["32", "4", "4", "2", "2"]
    up = dict(zip(table.method + table.bits, table["kB up"], strict=True))
    assert up["fedmpq2"] < up["fedmpq4"] < up["fedavg32"]
    metric = "bits_per_byte" if name == "exp5" else "accuracy"
    if name == "exp5": assert (table["bits per byte"] < 8.5).all()
    both = pairs(records, "fedmpq-kd", "fedmpq", metric)
    assert both.n.tolist() == [1, 1] and math.isnan(both.ci_low[0])


def test_smoke_of_fedmkt(tmp_path):
    records = run_mkt("smoke", "public-ce,fedmkt", "0,1", results_dir=str(tmp_path), rounds=1)
    table = mkt_table(records).set_index("method")
    assert table.loc["public-ce", "kB up"] == 0 < table.loc["fedmkt", "kB up"]
    assert mkt_pairs(records).n.tolist() == [2]
