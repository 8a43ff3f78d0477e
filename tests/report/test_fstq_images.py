"Fed-FSTQ beside FedMPQ-KD on images: equal bytes by hand, and the differences from the records themselves."
import json

import pytest
from conftest import ROOT
from scipy import stats

from fedmpqkd.report.facts import by_plan, load_axis
from fedmpqkd.report.fstq import image_frame, image_pairs, image_reading, image_table
from fedmpqkd.study.axes import axis_points

FOLDER = ROOT / "results" / "exp3" / "study"
SHARE = axis_points("coding", "study")["kd-bytes"]["update_share"]


def runs(method: str) -> dict[int, dict]:
    found = [json.loads(p.read_text()) for p in FOLDER.glob(f"{method}_seed=[0-4]_*.json")]
    usual = [r for r in found if r["config"]["alpha"] in (0, 0.5) and r["config"]["temperature"] == 2
             and r["config"]["clients"] == 10 and r["config"]["bits"] == [4]]
    return {r["config"]["seed"]: r for r in usual if r["config"]["uplink"] == "model"
            or r["config"]["update_share"] == SHARE}


def a_message(record: dict) -> float:
    "Bytes up of a client and round: ten clients answer in each of twenty rounds."
    return sum(line["bytes_up"] for line in record["curve"]) / 200


@pytest.fixture(scope="module")
def study():
    found = load_axis(ROOT / "results", "coding", "study")
    assert [s.name for s in found] == ["coding.kd-bytes"]
    return by_plan(found[0])[0]


def test_the_bytes_are_those_of_fedmpq_kd():
    """The convnet has 9 (3 16 + 16 32 + 32 64) + 256 10 = 26,032 weights in four layers; all else in a
    message of 106,139 bytes in fp32 is sent as it is."""
    weights = 9 * (3 * 16 + 16 * 32 + 32 * 64) + 256 * 10
    rest = 106_139 - 4 * weights - 4 * 6
    ours = [a_message(r) for method in ("fedavg-fstq", "fedavg-magnitude") for r in runs(method).values()]
    theirs = [a_message(r) for r in runs("fedmpq-kd").values()]
    assert len(theirs) == 5 and ours
    assert all(rest + int(4 * weights * SHARE) - 8 <= b <= rest + int(4 * weights * SHARE) for b in ours)
    assert abs(sum(theirs) / 5 - max(ours)) < 0.001 * max(ours)


def test_the_pairs_are_those_of_the_records(study):
    found = image_pairs(study.records).set_index(["model", "a", "b"])
    for model, key in (("as deployed", "accuracy"), ("rounded", "accuracy_quantised")):
        row = found.loc[model, "fedavg-fstq", "fedmpq-kd"]
        one, other = runs("fedavg-fstq"), runs("fedmpq-kd")
        seeds = sorted(one.keys() & other.keys())
        a, b = ([sum(line[key] for line in some[s]["curve"][-5:]) / 5 for s in seeds]
                for some in (one, other))
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval()
        assert row.n == len(seeds) == 5
        assert row.difference == pytest.approx(sum(a) / 5 - sum(b) / 5)
        assert (row.ci_low, row.ci_high) == pytest.approx((low, high))
        assert row.p >= test.pvalue
        assert f"{row.difference:+.2f} points ({row.ci_low:.2f} to {row.ci_high:.2f}, n = 5" in image_reading(
            study.records)


def test_what_is_not_equal_stands_in_the_table(study):
    shown = image_table(study.records).set_index("method")
    assert shown["deploys"][["fedavg-fstq", "fedmpq-kd"]].tolist() == ["fp32", "quantised"]
    assert shown["kB down"]["fedavg-fstq"] == pytest.approx(106.139)  # the model in fp32
    assert 18 < shown["kB down"]["fedmpq"] < 19
    assert 100 < shown["kB down"]["fedmpq-kd"] < 104  # and its teacher
    kept = image_frame(study.records)
    assert (kept[kept.method == "fedavg"].up == 106_139).all()
