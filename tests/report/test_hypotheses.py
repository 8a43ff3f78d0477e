"The hypotheses of the sources: verdicts that can be checked by hand."
import json
import math

import pytest

from fedmpqkd.report.facts import Study, hypothesis_facts, numbers
from fedmpqkd.report.hypotheses import FREE, hypotheses, in_words
from fedmpqkd.study.examples import made_up_record


def runs(method: str, accuracies: list[float], **line: float) -> list[dict]:
    return [made_up_record(method, s, [a] * 6, line=line or None) for s, a in enumerate(accuracies)]


BASE = runs("fedmpq", [50, 51, 52, 53, 54])


def verdicts(records: list[dict]) -> dict[str, str]:
    found = hypotheses(("made up", records))
    return dict(zip(found.hypothesis, found.verdict, strict=True))


def test_four_pairs_decide_nothing_and_none_is_not_measured():
    four = verdicts(BASE + runs("fedmpq-kd", [60, 61, 62, 63]))
    assert four["raises final accuracy"] == "undecided (n=4, fewer than 5 pairs)"
    assert four["raises final accuracy, teacher: the received model"] == "not measured"


@pytest.mark.parametrize(("gains", "expected"), [
    ([2, 2.1, 1.9, 2, 2], "pass"), ([-2, -2.1, -1.9, -2, -2], "fail"),
    ([.1, -.1, .2, -.2, .1], "fail (within 1 point of no difference)"), ([4, -3, 5, -2, 1], "undecided")])
def test_gains(gains: list[float], expected: str):
    teacher = runs("fedmpq-kd", [50 + i + g for i, g in enumerate(gains)])
    assert verdicts(BASE + teacher)["raises final accuracy"] == expected


def test_bytes_are_counted_in_the_worse_direction():
    "1.25 MB each way: 3 MB down is 140 % more; the received model adds nothing."
    found = verdicts(BASE + runs("fedmpq-kd", [55] * 5, bytes_down=3_000_000) + runs(FREE, [50.0] * 5))
    assert found["sends at most 1 % more bytes (worse direction)"] == "fail"
    assert found["sends at most 1 % more bytes (worse direction), teacher: the received model"] == "pass"


def test_a_condition_is_a_row_of_c_and_the_family_grows_with_it():
    noisy = BASE + runs("fedmpq-kd", [50 + i + g for i, g in enumerate([4.0, .6, 3.5, 1.0, 1.5])])
    alone = hypotheses(("x", noisy)).set_index("letter").loc["a"].iloc[0]
    more = hypotheses(("x", noisy), {"exp2/mini": noisy})
    assert more.letter.tolist()[-2:] == ["c", "d"] and more.scale.tolist()[-2] == "exp2/mini"
    assert more.p_holm[0] > alone.p_holm and math.isnan(more.p_holm[2]), "limits have no p"


def test_each_number_of_the_table_has_records_behind_it(tmp_path):
    study = Study("exp1", "exp1/study", tuple(BASE + runs("fedmpq-kd", [52.0, 53.5, 54, 55, 56])))
    fact = hypothesis_facts([study], tmp_path)["hypotheses.table"]
    shown = {n for row in fact.text.splitlines()[2:4] for cell in row.split("|")[3:5] for n in numbers(cell)}
    behind = {n for part in fact.parts.values() for n in numbers(part.text)}
    assert shown and shown <= behind and len(fact.records) == 10


def test_time_is_that_of_the_benchmark_where_there_is_one(tmp_path):
    "Medians 6 and 5 s in four repeats, 6.6 and 5 in the fifth; those of the runs are left."
    rounds = {"fedmpq": [[9, 5, 5]] * 5, "fedmpq-kd": [[9, 6, 6]] * 4 + [[6.6, 6.6, 9]]}
    timed = [dict(workload="w2", entry=m, repeat=i, seconds_per_round=s)
             for m, some in rounds.items() for i, s in enumerate(some)]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "time.json").write_text(json.dumps(timed))
    study = Study("exp1", "exp1/study", tuple(BASE + runs("fedmpq-kd", [52.0, 53.5, 54, 55, 56])))
    fact = hypothesis_facts([study], tmp_path)["hypotheses.table"]
    line = next(row for row in fact.text.splitlines() if "more time" in row)
    assert "+22.40 %" in line and "| 5 | fail |" in line  # (4 * 20 + 32) / 5
    assert "bench/time.json" in fact.records


def test_words_have_verdict_difference_interval_n_and_scale():
    line = in_words(hypotheses(("exp1/study", BASE + runs("fedmpq-kd", [52, 53.1, 53.9, 55, 56]))))[0]
    for part in ("(a) raises final accuracy", "**pass**", "+2.00 points", "n = 5", "exp1/study"):
        assert part in line


def test_a_method_that_the_benchmark_lacks_is_timed_by_its_runs():
    "The received model: rounds of 2 s where FedMPQ takes 1, all of them."
    slow = [made_up_record(FREE, s, [50.0] * 6, [2.0] * 6) for s in range(5)]
    quick = [made_up_record("fedmpq", s, [50.0] * 6, [1.0] * 6) for s in range(5)]
    timed = [dict(workload="w2", entry=m, repeat=i, seconds_per_round=[1.0, 1.0])
             for m in ("fedmpq", "fedmpq-kd") for i in range(5)]
    found = hypotheses(("exp1/study", quick + slow), timed=timed).set_index("hypothesis")
    own = found.loc["takes at most 10 % more time, teacher: the received model"]
    assert (own.difference, own.n, own.scale, own.verdict) == (100.0, 5, "exp1/study", "fail")
    assert found.scale["takes at most 10 % more time"] == "benchmark w2"
