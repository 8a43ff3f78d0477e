"Experiment 7 from its runs to its tables, at the smoke preset."
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fedmpqkd.report.fstq import (  # noqa: E402
    budget_of,
    fstq_claims,
    fstq_pairs,
    fstq_table,
    token_pairs,
    write_fstq,
)
from fedmpqkd.study.fstq import run_fstq, runs_of  # noqa: E402


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exp7")
    return run_fstq("smoke", seeds=0, results_dir=str(folder), workers=1, fields="rounds=2")


def test_rows_of_a_budget_send_equal_bytes_and_keep_to_it(outcome):
    "gpt-tiny, rank 8: queries and values of two layers, 8 * (32 + 32) * 2 * 2 = 2,048 entries."
    for r in outcome.records:
        c = r["config"]
        if c["uplink"] != "mixed": continue
        sent, agreed = r["summary"]["bytes_up"] / c["clients"] / c["rounds"], 4 * 2048 * c["update_share"]
        assert 0.97 * agreed < sent < agreed + 64, c["method"]  # 64: header and checksum of a message
    uniform = [r for r in outcome.records if r["config"]["method"] == "fedpaq-ef"]
    assert sorted(r["config"]["update_bits"] for r in uniform) == [3, 8]  # .1 and .3 of 32 bits, 8 at most
    assert [budget_of(r) for r in uniform] == [0.1, 0.3]


def test_choosing_labels_changes_what_is_learned_and_not_what_is_sent(outcome):
    own = [r for r in outcome.records if r["config"]["method"] == "fedavg-fstq"
           and (r["config"]["optimizer"], r["config"]["update_share"]) == ("adamw", 0.1)]
    assert [r["config"]["token_select"] for r in own] == ["none", "sensitivity", "random"]
    sent = [r["summary"]["bytes_up"] for r in own]
    assert max(sent) - min(sent) < 0.01 * min(sent)  # a budget is filled up to what does not fit any more
    assert len({r["curve"][-1]["nll"] for r in own}) == 3


def test_each_run_once_and_the_pair_first(outcome):
    planned = runs_of("smoke", seeds=0, rounds=2)
    assert [(r["config"]["method"], r["config"]["optimizer"]) for r in outcome.records] == [
        (c.method, c.optimizer) for c in planned]
    assert {c.method for c in planned[:3]} == {"fedavg", "fedavg-fstq", "fedavg-magnitude"}
    assert len(planned) == 14  # fp32, pair and uniform bits twice, two others, three under SGD, two labels
    assert [(c.method, c.token_select) for c in planned[-2:]] == [
        ("fedavg-fstq", "sensitivity"), ("fedavg-fstq", "random")]
    assert all(c.error_feedback for c in planned if c.method != "fedavg")


def test_tables(outcome, tmp_path, monkeypatch):
    table, both = fstq_table(outcome.records), fstq_pairs(outcome.records)
    assert table["nats per byte"].between(1, 8).all() and len(table) == 14
    assert both.n.tolist() == [1, 1, 1] and math.isnan(both.ci_low[0])
    assert [pair.n.tolist() for pair in token_pairs(outcome.records)] == [[1], [1]]
    assert (fstq_claims(outcome.records).measured != "").sum() == 2
    assert not outcome.declared
    outcome.root = tmp_path
    assert {p.name for p in write_fstq(outcome)} == {"exp7.md", "exp7.pdf"}
    assert {p.name for p in (tmp_path / "runs" / "generated").iterdir()} == {"exp7.md", "exp7.pdf"}


def test_shorter_prompts_are_shown_next_to_their_own_model_only(outcome):
    "The committed measurement is of SmolLM2 on XQuAD; a small GPT on the almanac has none."
    from conftest import ROOT

    from fedmpqkd.report.fstq import prompt_lines
    from fedmpqkd.study.records import load_records
    assert prompt_lines(ROOT / "results", outcome.records) == []
    lines = prompt_lines(ROOT / "results", load_records(ROOT / "results", "exp7", "study"))
    assert [(x["rule"], x["share"]) for x in lines[:2]] == [("whole", 1.0), ("sensitivity", 0.7)]
    lost = {(x["rule"], x["share"]): x["lost"] for x in lines}
    assert lost["random", 0.3] > lost["random", 0.5] > lost["random", 0.7] > 0  # fewer tokens tell less
    assert (fstq_claims(outcome.records, lines).measured != "").sum() == 3


def test_paper_is_a_configuration():
    runs = runs_of("paper")
    assert {c.model for c in runs} == {"meta-llama/Meta-Llama-3-8B"} and {c.clients for c in runs} == {100}
