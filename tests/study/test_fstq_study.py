"Experiment 7 from its runs to its tables, at the smoke preset."
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fedmpqkd.report.fstq import (  # noqa: E402
    budget_of,
    fstq_claims,
    fstq_curves,
    fstq_pairs,
    fstq_rounds,
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
    assert [budget_of(r, outcome.records) for r in uniform] == [0.1, 0.3]


@pytest.mark.parametrize("field, say", [
    ("optimizer=sgd", "optimizers=sgd"), ("update_share=0.5", "budgets=0.5"),
    ("update_bits=5", "budgets=SHARE"), ("token_select=random", "selections=random"),
    ("token_mode=input_drop", "selections=sensitivity:input_drop")])
def test_what_points_differ_in_is_no_field(field, say, tmp_path):
    "All points would have it, and their runs would be pooled in one row."
    name = field.partition("=")[0]
    with pytest.raises(ValueError, match=f"^fields: {name} is what points differ in, say {say}"):
        run_fstq("smoke", "0.1", "", "fedavg-fstq", 0, results_dir=str(tmp_path), fields=f"rounds=1,{field}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", [
    "dirichlet=0.3", "partition=iid", "lora_train=B", "aggregate=lora-product", "rounds=2"])
def test_what_is_changed_in_one_preset_is_no_field_there(field, tmp_path):
    name = field.partition("=")[0]
    with pytest.raises(ValueError, match=f"^fields: {name} is what points of study-labels differ in$"):
        run_fstq("study-labels", seeds=0, results_dir=str(tmp_path), fields=field)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_was_searched_for_is_the_only_one_of_its_optimiser():
    "SGD on reviews takes ten times AdamW's .002; elsewhere fifty times."
    for how in (dict(), dict(optimizers="adamw,sgd"), dict(optimizers="sgd", methods="fedavg,fedavg-fstq")):
        runs = runs_of("study-labels", seeds=0, **how)
        assert {c.lr for c in runs if c.optimizer == "sgd"} == {0.02}
    assert {c.lr for c in runs_of("study", seeds=0) if c.optimizer == "sgd"} == {0.1}


def test_selections_without_a_row_to_try_them_with_are_refused():
    with pytest.raises(ValueError, match="^selections=sensitivity: tried with .*, name one in methods$"):
        runs_of("smoke", methods="fedavg,fedavg-random", selections="sensitivity")
    assert {c.token_select for c in runs_of("smoke", methods="fedavg")} == {"none"}  # those of the preset
    chosen = runs_of("smoke", methods="fedavg-magnitude", selections="sensitivity", seeds=0)
    assert [c.method for c in chosen if c.token_select != "none"] == ["fedavg-magnitude"]


@pytest.mark.parametrize("budgets", ["0.25", "0.25,0.5", "0.5,0.25"])
def test_uniform_bits_stand_at_a_budget_that_was_asked_for(budgets, tmp_path):
    "Eight bits are a quarter of fp32, and the most at half of it; thirty percent is a preset's."
    found = run_fstq("smoke", budgets, "adamw", "fedavg-fstq,fedpaq-ef", 0, results_dir=str(tmp_path),
                     workers=1, fields="rounds=1").records
    table = fstq_table(found)
    assert table[table.method == "fedpaq-ef"]["budget %"].tolist() == [25]
    assert fstq_pairs(found, "fedavg-fstq", "fedpaq-ef")["budget %"].tolist() == [25]
    uniform = next(r for r in found if r["config"]["method"] == "fedpaq-ef")
    assert 0.25 < budget_of(uniform) == budget_of(uniform, [uniform]) < 0.28  # alone: what it has sent


def test_two_runs_of_one_place_are_refused_where_a_mean_would_take_them_for_seeds(outcome):
    one = outcome.records[0]
    other = one | dict(config=one["config"] | dict(lr=9.0))
    for told in (fstq_table, fstq_pairs, fstq_curves, fstq_rounds, fstq_claims):
        with pytest.raises(ValueError, match="^two runs of .*, seed 0, which differ in lr: compare "):
            told([*outcome.records, other])


def test_processors_of_one_name_are_told_apart(outcome):
    where = [dict(device="AMD EPYC", capability=c, bf16=b) for c, b in (("AVX2", False), ("AVX512", True))]
    some = [r | dict(environment=where[n % 2]) for n, r in enumerate(
        r | dict(config=r["config"] | dict(seed=seed)) for r in outcome.records[:1] for seed in (0, 1))]
    assert fstq_table(some)["computed on"].tolist() == ["AMD EPYC (AVX2) and AMD EPYC (AVX512, bf16)"]


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
    assert [pair.n.tolist() for pair in token_pairs(outcome.records)] == [[1], [1], [1]]
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


def test_runs_of_another_setting_are_no_further_seeds(outcome):
    "A seed with another rate would be averaged with the declared ones; other rounds make another row."
    one = next(r for r in outcome.records if r["config"]["method"] == "fedavg-fstq")
    for field, value in (("lr", 9.0), ("batch_size", 8)):
        other = one | dict(config=one["config"] | {"seed": 5, field: value})
        for told in (fstq_table, fstq_pairs, fstq_curves, fstq_rounds):
            with pytest.raises(ValueError, match=f"differ in {field}: compare records of one setting"):
                told([*outcome.records, other])
    further = one | dict(config=one["config"] | dict(seed=5))
    assert fstq_table([*outcome.records, further]).n.max() == 2
    longer = fstq_table([*outcome.records, one | dict(config=one["config"] | dict(seed=5, rounds=1))])
    assert longer.n.max() == 1 and (longer.method == "fedavg-fstq (1 round)").sum() == 1
    elsewhere = further | dict(data=one["data"] | dict(fingerprint="other"))
    with pytest.raises(ValueError, match="differ in their data"): fstq_table([*outcome.records, elsewhere])


@pytest.mark.parametrize("how, say", [
    (dict(methods="fedpaq-ef", budgets="0.05"), "nothing to run, since QSGD needs two bits an entry"),
    (dict(methods="qat-uniform-fstq"), "name fedavg, too")])
def test_what_cannot_be_played_or_compared_is_said_first(how, say, tmp_path):
    with pytest.raises(ValueError, match=say): run_fstq("smoke", seeds=0, results_dir=str(tmp_path), **how)
    assert not list(tmp_path.iterdir())


def test_a_parameter_among_the_fields_is_named(tmp_path):
    with pytest.raises(ValueError, match="^fields: seeds is a parameter of its own, say seeds=3$"):
        run_fstq("smoke", results_dir=str(tmp_path), fields="seeds=3")


def test_selections_are_of_fisher_whatever_the_order_of_methods():
    some = runs_of("smoke", methods="fedavg-magnitude,fedavg-fstq", selections="random", seeds=0)
    assert {c.method for c in some if c.token_select != "none"} == {"fedavg-fstq"}


def test_one_factor_alone_has_the_bytes_of_both():
    "SmolLM2's B: (576 + 192) * 8 of (576 * 2 + 576 + 192) * 8 entries of a layer: 6,144 of 15,360."
    alone, = (c for c in runs_of("study-labels", methods="fedavg-fstq", seeds=0) if c.lora_train == "B")
    both = next(c for c in runs_of("study-labels", methods="fedavg-fstq", seeds=0))
    assert int(4 * 30 * 6144 * alone.update_share) == int(4 * 30 * 15360 * both.update_share) == 36864


def test_every_row_has_a_budget_a_figure_and_its_share_of_fp32(tmp_path):
    "Rows that no figure knows by a shorter name, with nobody answering, quantised, with percentiles."
    rows = "fedavg,qat-uniform,qat-uniform-fstq,fedavg-fstq-paper"
    found = run_fstq("smoke", "0.1", "adamw", rows, 0, results_dir=str(tmp_path), workers=1,
                     fields="rounds=1")
    table = fstq_table(found.records).set_index("method")
    whole = table.kB["fedavg"]
    shares = {m: 100 * kb / whole for m, kb in table.kB.items()}
    assert table["sent %"].to_dict() == pytest.approx(shares, rel=1e-2)
    assert table["sent %"]["qat-uniform"] < 30 and (table["budget %"] > 1).all()
    for methods, fields in (("fedprox", "rounds=1"), ("fedavg", "rounds=1,dropout=1"),
                            ("fedavg", "rounds=1,partition=dirichlet,dirichlet=inf")):
        found = run_fstq("smoke", "0.1", "adamw", methods, 0, results_dir=str(tmp_path), workers=1,
                         fields=fields)
        found.root = tmp_path
        assert len(write_fstq(found)) == 2


def test_options_have_no_shorter_prompts_and_no_written_answers(tmp_path):
    from fedmpqkd.study.fstq import shorter_prompts, written_answers
    found = run_fstq("smoke", "0.1", "adamw", "fedavg", 0, results_dir=str(tmp_path), workers=1,
                     fields="rounds=1,text_kind=class")
    c, = runs_of("smoke", "0.1", "adamw", "fedavg", 0, rounds=1, text_kind="class")
    for measure in (shorter_prompts, written_answers):
        with pytest.raises(ValueError, match="answers are asked for, not options"):
            measure(c, str(found.folder.relative_to(tmp_path)), tmp_path)


def test_a_damaged_measurement_of_prompts_is_named(outcome, tmp_path):
    from fedmpqkd.core.journal import Damaged
    from fedmpqkd.report.fstq import prompt_lines
    (tmp_path / "exp7").mkdir()
    (tmp_path / "exp7" / "reduction.json").write_text("{}")
    with pytest.raises(Damaged, match="no dataset, lines, model, texts"):
        prompt_lines(tmp_path, outcome.records)


@pytest.mark.parametrize("part", ["curve", "environment"])
def test_a_record_that_lacks_a_part_is_named(part, tmp_path):
    import json

    from fedmpqkd.core.journal import Damaged
    how = dict(methods="fedavg", seeds=0, results_dir=str(tmp_path), workers=1, fields="rounds=1")
    run_fstq("smoke", "0.1", "adamw", **how)
    path, = tmp_path.rglob("fedavg_seed=0_*.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != part}))
    with pytest.raises(Damaged, match=f"{path.name}: it has no {part}"):
        run_fstq("smoke", "0.1", "adamw", **how)
