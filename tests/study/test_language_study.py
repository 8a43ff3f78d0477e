"The smoke presets of the language experiments, from the notebooks' own calls to the tables."
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fedmpqkd.core.journal import project_root  # noqa: E402
from fedmpqkd.data.images import DataMissing  # noqa: E402
from fedmpqkd.report.language import (  # noqa: E402
    language_table,
    pairs,
    plot_language,
    stored_language,
    taught,
    write_language,
)
from fedmpqkd.report.mkt import mkt_pairs, mkt_table, write_mkt  # noqa: E402
from fedmpqkd.study import mkt as study  # noqa: E402
from fedmpqkd.study.language import LANGUAGE, run_language  # noqa: E402
from fedmpqkd.study.mkt import MktOutcome, plan_mkt, run_mkt, stored_mkt  # noqa: E402


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
    stored = stored_language(name, "smoke", tmp_path)
    assert {b: sorted(r["id"] for r in some) for b, some in stored.items()} == {
        b: sorted(r["id"] for r in some) for b, some in records.items()}
    for outcome in outcomes.values(): outcome.root = tmp_path
    told, drawn = write_language(name, outcomes)
    assert told == tmp_path / "runs" / "generated" / f"{name}.md" and drawn.read_bytes()[:4] == b"%PDF"
    differences = 2 if name == "exp5" else 4  # questions have two metrics
    assert told.read_text().count("| fedmpq-kd |") == 2 + differences


def test_smoke_of_fedmkt(tmp_path, monkeypatch):
    outcome = run_mkt("smoke", "public-ce,fedmkt", "0,1", results_dir=str(tmp_path), rounds=1)
    records = outcome.records
    table = mkt_table(records).set_index("method")
    assert table.loc["public-ce", "kB up"] == 0 < table.loc["fedmkt", "kB up"]
    assert mkt_pairs(records).n.tolist() == [2, 2]  # clients, server
    assert not stored_mkt("smoke", tmp_path).records  # one round is another run than two
    monkeypatch.setattr(study, "project_root", lambda: tmp_path)
    told, drawn = write_mkt(outcome)
    assert told == tmp_path / "runs" / "generated" / "exp6-smoke.md"
    assert "public labels alone" in told.read_text() and drawn.read_bytes()[:4] == b"%PDF"


def test_finished_runs_of_fedmkt_are_read_without_their_texts(tmp_path, monkeypatch, capsys):
    there = dict(methods="zero-shot", seeds="0", results_dir=str(tmp_path), device="cpu")
    first = run_mkt("smoke", **there).records

    def missing(*_): raise DataMissing("no texts")

    monkeypatch.setattr(study, "_text", missing)
    assert run_mkt("smoke", **there, test_every=2).records == first  # the same run
    assert "almanac is not here" in capsys.readouterr().out
    with pytest.raises(DataMissing): run_mkt("smoke", **there | dict(seeds="1"))  # to compute
    with pytest.raises(DataMissing): run_mkt("smoke", **there, data_dir=str(tmp_path))  # named


def test_only_a_whole_cited_setting_is_evidence():
    whole = [dict(id=c.identity) for c in plan_mkt("study-a")]
    ours = project_root() / "results"
    assert MktOutcome("study-a", whole, ours).generated.parts[-2:] == ("paper", "generated")
    assert not MktOutcome("study-a", whole[1:], ours).declared
    assert not MktOutcome("study-a", whole, ours / "elsewhere").declared
    smoke = [dict(id=c.identity) for c in plan_mkt("smoke")]
    assert not MktOutcome("smoke", smoke, ours).declared


@pytest.mark.parametrize("bits", ["a", "4,x"])
def test_bits_that_are_no_numbers_are_named_before_anything_is_run(bits, tmp_path):
    with pytest.raises(ValueError, match=f"^bits='{bits}': must be numbers, separated by commas$"):
        run_language("exp5", "smoke", bits, results_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_bits_among_the_fields_are_refused_before_anything_is_run(tmp_path):
    with pytest.raises(ValueError, match="^fields: bits is a parameter of its own, say bits=3$"):
        run_language("exp5", "smoke", fields="rounds=1,bits=3", results_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits, points", [("4,4.0", ["4"]), ("", ["4", "2"]), (4, ["4"])])
def test_a_number_of_bits_is_one_point_however_it_is_written(bits, points, tmp_path):
    outcomes = run_language("exp5", "smoke", bits, "qat-uniform", results_dir=str(tmp_path), device="cpu",
                            workers=1, fields="rounds=1", seeds="0")
    assert {b: [r["config"]["bits"] for r in o.records] for b, o in outcomes.items()} == {
        b: [[float(b)]] for b in points}
    assert not len(taught({b: o.records for b, o in outcomes.items()}))


def test_methods_in_full_precision_are_run_once_and_have_no_bits(tmp_path):
    outcomes = run_language("exp5", "smoke", "4,2", "fedprox,fedpaq,qat-uniform", results_dir=str(tmp_path),
                            device="cpu", workers=1, fields="rounds=1")
    records = {b: o.records for b, o in outcomes.items()}
    labels = [("fedprox", "32"), ("fedpaq", "32"), ("qat-uniform", "4"), ("qat-uniform", "2")]
    table = language_table(records)
    assert list(zip(table.method, table.bits, strict=True)) == labels
    drawn = plot_language(records).get_legend_handles_labels()[1]
    assert drawn == ["fedprox", "fedpaq", "qat-uniform, 4 bits", "qat-uniform, 2 bits"]
    stored = stored_language("exp5", "smoke", tmp_path)
    assert {b: {r["id"] for r in some} for b, some in stored.items()} == {
        b: {r["id"] for r in some} for b, some in records.items()}


@pytest.mark.parametrize("how", [dict(bits="4"), dict(bits="3"), dict(methods="fedavg,qat-uniform")])
def test_a_part_of_experiment_5_is_not_the_declared_study(how, monkeypatch):
    "Its tables would replace the paper's, with a smaller family of tests."
    from fedmpqkd.study import experiments
    monkeypatch.setattr(experiments, "run_sweep", lambda jobs, executor=None: [])
    whole = run_language("exp5", "study", device="cpu")
    assert [o.declared for o in whole.values()] == [True, True]
    assert not any(o.declared for o in run_language("exp5", "study", device="cpu", **how).values())


def test_recipes_with_bits_of_their_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^methods=fedmpq-ternary: it has bits of its own"):
        run_language("exp5", "smoke", "4", "fedmpq-ternary", results_dir=str(tmp_path))


def test_parameters_of_experiment_6_are_no_fields(tmp_path):
    with pytest.raises(ValueError, match="^fields: methods is a parameter of its own, say methods=fedmkt$"):
        run_mkt("smoke", results_dir=str(tmp_path), fields="methods=fedmkt")
    configs = plan_mkt("smoke", "standalone", 0, clients="gpt-tiny/byte-bpe:300*2", average=True)
    assert not configs[0].average  # with it, it would be fedavg
