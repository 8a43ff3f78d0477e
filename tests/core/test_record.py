"The dictionary of a record's columns is complete: nothing in a committed record is unexplained."
import json

import pytest
from conftest import ROOT

from fedmpqkd.core.record import ROUND, SUMMARY, lacking
from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run

COMMITTED = [json.loads(p.read_text()) for p in sorted((ROOT / "results").glob("exp*/*/*.json"))
             if "tuned" not in p.name]


def unexplained(record: dict) -> set[str]:
    "Keys of a record that the dictionary does not have."
    lines = {key for line in record["curve"] for key in line}
    return lines - set(ROUND) | set(record["summary"]) - set(SUMMARY)


def test_every_column_of_the_committed_records_is_explained():
    records = [r for r in COMMITTED if "curve" in r]
    assert len(records) >= 80
    for record in records:
        assert not lacking(record)
        assert not unexplained(record)


MANY = dict(fedavg={}, fedkd=dict(public_images=20)) | {
    "fedmpq-moshpit": {}, "fedmpq-kd": dict(bits=(2, 4), alpha=.5)}


@pytest.mark.parametrize("method, more", MANY.items())
def test_every_column_of_a_fresh_record_is_explained(method, more):
    fields = dict(model="cnn", clients=2, rounds=2, batch_size=16, dirichlet=5.0, eval_images=0)
    record = run(make_config(method, **fields, **more), load_dataset("digits").subset(80, 40), workers=1)
    assert not lacking(record)
    assert not unexplained(record)


def test_a_headline_is_what_its_column_says():
    "Last five rounds; bytes over the whole run."
    for record in COMMITTED[::7]:
        curve, summary = record["curve"], record["summary"]
        last = [line["accuracy"] for line in curve][-5:]
        assert summary["accuracy"] == pytest.approx(sum(last) / len(last))
        warm = summary.get("warm", {}).get("bytes_up", 0)
        assert summary["bytes_up"] == sum(line["bytes_up"] for line in curve) + warm
