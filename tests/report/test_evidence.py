"""Records in, tables and sentences out: means, spreads, ties, pairs and files against known numbers."""
import copy
import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
from conftest import ROOT  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fedmpqkd.core.config import config_from  # noqa: E402
from fedmpqkd.core.journal import Damaged  # noqa: E402
from fedmpqkd.data.images import load_dataset  # noqa: E402
from fedmpqkd.federation.methods import RECIPES, make_config  # noqa: E402
from fedmpqkd.federation.rounds import open_run  # noqa: E402
from fedmpqkd.federation.run import final_states  # noqa: E402
from fedmpqkd.federation.server import Server, downlink  # noqa: E402
from fedmpqkd.federation.trials import stress_test  # noqa: E402
from fedmpqkd.models.vision import build_model, layout  # noqa: E402
from fedmpqkd.report import captions, claims, evidence  # noqa: E402
from fedmpqkd.study import records  # noqa: E402
from fedmpqkd.study.examples import made_up_record, with_trial  # noqa: E402
from fedmpqkd.study.experiments import EXPERIMENTS, plan  # noqa: E402
from fedmpqkd.study.matched import Matched, equal_bytes, message_bytes  # noqa: E402
from fedmpqkd.study.records import Record  # noqa: E402

KD, PLAIN = (84.5, 84.7, 84.9), (81.8, 82.1, 82.4)
PAIR = [("fedmpq-kd", "fedmpq")]


def record(method: str, seed: int, accuracy: float, *, seconds: float = 2.0, down: int = 1_500_000,
           up: int = 1_000_000, kd: float | None = None, bits: tuple = (4, 4), lasso: float = 0.0,
           device: str = "a laptop", **fields) -> Record:
    "A record with a flat curve, by default of four rounds, each a second longer than the one before."
    rounds = fields.get("rounds", 4)
    line = dict(bytes_down=down, bytes_up=up, bits=list(bits), lasso_moved=lasso,
                accuracy_quantised=accuracy - 1)
    if kd is not None: line["kd"] = kd
    times = [seconds + t for t in range(rounds)]
    return made_up_record(method, seed, accuracy, times, device, line, **fields)


def rows(method: str, accuracies, **kw) -> list[dict]:
    return [record(method, s, a, **kw) for s, a in enumerate(accuracies)]


THREE = rows("fedmpq-kd", KD, down=4_500_000, seconds=2.2) + rows("fedmpq", PLAIN)


def save(folder: Path, records: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for r in records: (folder / f"{r['id']}.json").write_text(json.dumps(r))


# reading ----------------------------------------------------------------------------------------------------

def test_records_survive_the_file_and_come_in_order(tmp_path: Path):
    save(tmp_path / "exp1" / "study", THREE)
    (tmp_path / "exp1" / "study" / "_work").mkdir()
    (tmp_path / "exp1" / "study" / ".x.json.1.2").write_text("half a rec")  # left by an interrupted write
    found = records.load_records(tmp_path, "exp1", "study")
    assert [r["id"] for r in found] == sorted(r["id"] for r in THREE)
    pd.testing.assert_frame_equal(evidence.table(found), evidence.table(THREE))
    assert records.load_records(tmp_path, "exp1", "paper") == []


@pytest.mark.parametrize("text", ["", '{"config": {', "[]", "3", "null", '{"config": {}}', "\x00"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str):
    save(tmp_path / "exp1" / "study", THREE)
    (tmp_path / "exp1" / "study" / "fedmpq-1.json").write_text(text)
    with pytest.raises(Damaged, match=r"fedmpq-1\.json: .*delete it"):
        records.load_records(tmp_path, "exp1", "study")


def test_records_of_another_algorithm_are_left_out_aloud(tmp_path: Path, capsys):
    save(tmp_path / "exp1" / "study", THREE[:5] + [THREE[5] | dict(algorithm=8)])
    assert len(records.load_records(tmp_path, "exp1", "study")) == 5
    said = capsys.readouterr().out
    assert "fedmpq-2.json is left out" in said and "version 8, now 1" in said


# what may stand together ------------------------------------------------------------------------------------

@pytest.mark.parametrize("other, complaint", [
    (record("fedmpq", 7, 80, dirichlet=0.1), "records of fedmpq differ in dirichlet"),
    (record("fedmpq-kd", 7, 80, alpha=1.0), "records of fedmpq-kd differ in alpha"),
    (record("fedavg", 0, 80, rounds=5), "fedavg and fedmpq-kd differ in rounds"),
    (record("fedavg", 0, 80, label_noise=0.1), "fedavg and fedmpq-kd differ in label_noise"),
    (record("fedavg", 0, 80, validation=0.05), "fedavg and fedmpq-kd differ in validation"),
    (record("fedavg", 0, 80, warm_start="fedavg:2"), "fedavg and fedmpq-kd differ in warm_start"),
    (record("fedmpq", 7, 80, lr=0.3), "records of fedmpq differ in lr"),
    (record("fedmpq", 1, 99), "fedmpq with seed 1 is there twice"),
    (record("fedavg", 0, 80) | dict(data=THREE[0]["data"] | dict(fingerprint="g")), "saw other data")])
def test_records_that_must_not_be_averaged(other: dict, complaint: str):
    for show in (evidence.runs_frame, evidence.table, evidence.comparisons, captions.reading,
                 captions.caption, evidence.plot_curves):
        with pytest.raises(ValueError, match=complaint): show(THREE + [other])


def test_select_separates_them():
    strong = rows("fedmpq-kd", (90, 91), alpha=1.0)
    mixed = strong + THREE
    assert records.select(mixed, alpha=1) == strong  # 1 and 1.0 mean the same
    assert records.select(mixed, method="fedmpq", seed="2") == [THREE[5]]
    assert records.select(mixed, bits=4) == mixed and records.select(mixed, bits=2) == []
    with pytest.raises(TypeError, match="alhpa"): records.select(mixed, alhpa=1)


def test_nothing_to_show():
    with pytest.raises(ValueError, match="no records"): evidence.table([])


# the table --------------------------------------------------------------------------------------------------

def test_runs_frame_converts_nothing_but_totals():
    runs = evidence.runs_frame(THREE)
    assert runs.method.tolist() == ["fedmpq"] * 3 + ["fedmpq-kd"] * 3 and runs.seed.tolist() == [0, 1, 2] * 2
    first = runs.iloc[0]
    assert (first.accuracy, first.accuracy_fp, first.accuracy_quantised) == pytest.approx((81.8, 82.8, 80.8))
    assert (first.bytes_down, first.bytes_up, first.rounds, first.train) == (1_500_000, 1_000_000, 4, 1000)
    assert (first.ece, first.auc_sum, first.auc_norm, first.client_std,
            first.moved) == pytest.approx((0.05, 4 * 81.8, 81.8, 3, 0.25))


def test_headlines_are_means_of_the_last_five_rounds():
    r = record("fedavg", 0, 50, rounds=8)
    for t, line in enumerate(r["curve"]): line["accuracy_fp"], line["accuracy_quantised"] = float(t), 10.0 * t
    row = evidence.runs_frame([r]).iloc[0]
    assert (row.accuracy_fp, row.accuracy_quantised) == (5.0, 50.0)  # (3+4+5+6+7)/5


def test_table_has_the_known_means_and_spreads():
    t = evidence.table(THREE)
    assert t["n"].tolist() == [3, 3]
    assert t["Accuracy %"].to_numpy() == pytest.approx(np.array([[82.1, 0.3], [84.7, 0.2]]))
    assert t.loc["fedmpq-kd", ("MB down", "mean")] == pytest.approx(4.5)
    assert t.loc["fedmpq", ("ECE %", "mean")] == pytest.approx(5)
    assert all(kind.kind in "if" for kind in t.dtypes), "numbers, not text"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6))
def test_spread_is_the_sample_standard_deviation(hundredths: list[int]):
    accuracies = [h / 100 for h in hundredths]
    mean, std = evidence.table(rows("fedavg", accuracies)).loc["fedavg", "Accuracy %"]
    assert mean == pytest.approx(statistics.mean(accuracies))
    assert std == pytest.approx(statistics.stdev(accuracies), abs=1e-9)


def test_rows_follow_the_recipes_unless_told():
    some = [record(m, 0, 50.0, public_images=40) for m in reversed(list(RECIPES)) if m != "fedmpq-official"]
    assert list(evidence.table(some).index) == [m for m in RECIPES if m != "fedmpq-official"]
    ordered = evidence.table(some, order=["fedmpq-kd", "fedmpq", "unheard-of"])
    assert list(ordered.index)[:3] == ["fedmpq-kd", "fedmpq", "fedavg"]


def test_one_seed_has_no_spread_and_no_bold():
    t = evidence.table([record("fedavg", 0, 90.0), record("fedmpq", 0, 80.0)])
    assert t["Accuracy %"]["std"].isna().all()
    text = evidence.to_markdown(t) + evidence.to_latex(t)
    assert "±" not in text and "pm" not in text and "**" not in text and "mathbf" not in text
    assert "90.00" in text


@pytest.mark.parametrize("other, tied", [((84.3, 84.5, 84.7), True), ((84.29, 84.49, 84.69), False),
                                         ((60.0, 84.9, 99.0), False)])
def test_ties_are_within_one_standard_deviation_of_the_best(other: tuple, tied: bool):
    "The best is 84.7 ± 0.2, so 84.5 is as good, whatever its own spread, and 84.49 is not."
    text = evidence.to_markdown(evidence.table(THREE + rows("qat-uniform", other)))
    bold = {line.split(" | ")[0].strip("| ") for line in text.splitlines()
            if re.search(r"^\| \S+ \| 3 \| \*\*", line)}
    assert bold == {"fedmpq-kd"} | ({"qat-uniform"} if tied else set())


def test_lower_is_better_for_calibration():
    good, bad = rows("fedmpq", (80, 81, 82)), rows("fedavg", (80, 81, 82))
    for r in bad: r["summary"]["ece"] = 0.09
    t = evidence.table(good + bad)[["n", "ECE %"]]
    assert evidence.to_markdown(t).splitlines() == [
        "| Method | n | ECE % ↓ |", "| --- | --- | --- |", "| fedavg | 3 | 9.00 ± 0.00 |",
        "| fedmpq | 3 | **5.00 ± 0.00** |"]


def test_markdown_has_all_columns_in_every_row():
    lines = evidence.to_markdown(evidence.table(THREE)).splitlines()
    assert lines[0] == ("| Method | n | Accuracy % ↑ | fp32 % ↑ | Quantised % ↑ | AUC ↑ | ECE % ↓ "
                        "| Client std ↓ | MB down | MB up | s/round |")
    assert {line.count("|") for line in lines} == {12} and len(lines) == 4
    assert lines[3].startswith("| fedmpq-kd | 3 | **84.70 ± 0.20** |")
    assert lines[3].endswith("| 4.50 | 1.00 | 3.20 |")  # the second round: the first one starts things up


def test_a_quantity_nobody_measured_is_a_dash():
    some = copy.deepcopy(THREE)
    for r in some: r["summary"]["dispersion"] = {}
    t = evidence.table(some)[["n", "Client std"]]
    assert evidence.to_markdown(t).splitlines()[2] == "| fedmpq | 3 | – |"
    assert "fedmpq & 3 & -- " in evidence.to_latex(t)


# LaTeX ------------------------------------------------------------------------------------------------------

@pytest.fixture
def odd_name():
    "A method whose name LaTeX would stumble over."
    name = r"my_own #1 & 50% {x} ^~\$|"
    RECIPES[name] = RECIPES["fedmpq"]  # `register_method` would refuse the backslash
    yield name
    del RECIPES[name]


def test_names_are_escaped(odd_name: str):
    t = evidence.table(THREE + rows(odd_name, (70, 71, 72)))
    latex = evidence.to_latex(t)
    name = r"my\_own \#1 \& 50\% \{x\} \textasciicircum{}\textasciitilde{}\textbackslash{}\$\textbar{}"
    assert name + r" & 3 & $71.00 \pm 1.00$" in latex
    assert latex.splitlines()[0] == "% Written by nbs/exp1.ipynb: do not edit"
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"Accuracy \% $\uparrow$" in latex
    assert r"$\mathbf{84.70 \pm 0.20}$" in latex and r"$82.10 \pm 0.30$" in latex
    assert r"\|" in evidence.to_markdown(t)


def test_ordinary_frames_can_be_written_too():
    frame = pd.DataFrame(dict(a_b=["x|y", "50%"], n=[1, 2], value=[0.000493, math.nan]))
    assert evidence.to_markdown(frame).splitlines()[2:] == [r"| x\|y | 1 | 0.000493 |", "| 50% | 2 | – |"]
    latex = evidence.to_latex(frame, "nbs/exp2.ipynb")
    assert r"\begin{tabular}{lrr}" in latex and r"a\_b & n & value" in latex and r"50\% & 2 & -- \\" in latex
    assert r"x\textbar{}y & 1 & $0.000493$ \\" in latex and latex.startswith("% Written by nbs/exp2.ipynb")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path, odd_name: str):
    records = THREE + rows(odd_name, (70, 71, 72))
    records += [tried("fedmpq-kd-delivered", s, 20 + s, lr=0.03) for s in range(3)]
    captions.write_outputs(records, tmp_path / "generated", "exp1")
    beside = claims.beside_the_paper(records, "exp1").iloc[:, :6]
    (tmp_path / "generated" / "claims.tex").write_text(evidence.to_latex(beside))
    (tmp_path / "main.tex").write_text(r"""\documentclass{article}
\usepackage[margin=1in]{geometry}\usepackage{booktabs,graphicx}
\begin{document}\input{generated/exp1_caption}\begin{table}\footnotesize\centering\setlength{\tabcolsep}{3pt}
\input{generated/exp1}\caption{\generatedcaption}\end{table}
\begin{table}\footnotesize\centering\setlength{\tabcolsep}{3pt}
\input{generated/exp1_robustness_caption}\input{generated/exp1_robustness}\caption{\generatedcaption}\end{table}
\noindent\input{generated/claims}\par\noindent\includegraphics[width=\textwidth]{generated/exp1}\end{document}""")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
                          cwd=tmp_path, capture_output=True)
    log = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull" not in log and "undefined" not in log, log[-3000:]


# curves -----------------------------------------------------------------------------------------------------

def test_curves_are_means_with_a_band():
    ax = evidence.plot_curves(THREE)
    assert [line.get_label() for line in ax.lines] == ["fedmpq", "fedmpq-kd"]
    assert ax.lines[1].get_xdata().tolist() == [1, 2, 3, 4]
    assert ax.lines[1].get_ydata() == pytest.approx([84.7] * 4)
    assert [tuple(band.get_paths()[0].get_extents().intervaly) for band in ax.collections] == [
        pytest.approx((81.8, 82.4)), pytest.approx((84.5, 84.9))]
    assert tuple(ax.figure.get_size_inches()) == (3.3, 2.1)


def test_curves_over_bytes_count_both_directions():
    ax = evidence.plot_curves(THREE, x="bytes")
    assert ax.lines[0].get_xdata() == pytest.approx([2.5, 5.0, 7.5, 10.0])
    assert ax.lines[1].get_xdata() == pytest.approx([5.5, 11.0, 16.5, 22.0])


def test_one_seed_has_no_band():
    ax = evidence.plot_curves([THREE[0]])
    assert len(ax.lines) == 1 and not ax.collections
    with pytest.raises(ValueError, match="allowed are 'round' and 'bytes'"):
        evidence.plot_curves(THREE, x="seconds")


# tests over seeds -------------------------------------------------------------------------------------------

def test_three_pairs_are_undecided_whatever_p_is():
    one = evidence.comparisons(THREE, PAIR).iloc[0]
    assert (one.n, one.seeds, one.verdict) == (3, "0, 1, 2", "undecided")
    assert one.p == pytest.approx(4.93e-4, abs=5e-7) and one.p_holm == one.p and one.sign_flip_p == 0.25
    assert (one.difference, one.ci_low,
            one.ci_high) == pytest.approx((2.6, 2.6 - 4.302653 * 0.1 / 3**0.5, 2.6 + 4.302653 * 0.1 / 3**0.5))
    equal = evidence.comparisons(rows("fedmpq-kd", (90.0,) * 3) + rows("fedmpq", (80.0,) * 3), PAIR).iloc[0]
    assert equal.p == 0 and equal.verdict == "undecided"


def test_pairs_are_matched_by_seed_and_not_by_place():
    shuffled = [record("fedmpq-kd", s, a)
                for s, a in zip((2, 0, 1), (84.9, 84.5, 84.7), strict=True)] + THREE[3:]
    assert evidence.comparisons(shuffled, PAIR).p[0] == pytest.approx(4.93e-4, abs=5e-7)
    other = THREE[:3] + [record("fedmpq", s, a) for s, a in enumerate((82.4, 81.8, 82.1))]
    assert evidence.comparisons(other, PAIR).p[0] == pytest.approx(9.24e-3, abs=5e-6)


def test_only_common_seeds_count():
    a = [record("fedmpq-kd", s, 85.0 + s / 10) for s in (0, 1, 2, 3, 9)]
    b = [record("fedmpq", s, 80.0) for s in (1, 2, 3, 4, 5)]
    one = evidence.comparisons(a + b, PAIR).iloc[0]
    assert (one.n, one.seeds, one.verdict) == (3, "1, 2, 3", "undecided")
    assert one.difference == pytest.approx(5.2)
    none = evidence.comparisons(a[:1] + b, PAIR).iloc[0]
    assert none.n == 0 and math.isnan(none.difference) and none.verdict == "undecided"
    single = evidence.comparisons(a[1:2] + b, PAIR).iloc[0]
    assert single.n == 1 and single.difference == pytest.approx(5.1) and math.isnan(single.p)
    assert single.verdict == "undecided"


def test_the_gate_is_holm_over_the_family():
    "A p between .025 and .05 passes alone, and fails as one of two claims."
    noisy = [4.0, 0.6, 3.5, 1.0, 1.5]
    a = rows("fedmpq-kd", [80 + d for d in noisy])
    b, c = rows("fedmpq", (80.0,) * 5), rows("qat-uniform", [80.2, 79.8, 80.1, 79.9, 80.0])
    alone = evidence.comparisons(a + b + c, PAIR).iloc[0]
    assert 0.025 < alone.p < 0.05 and alone.verdict == "fedmpq-kd higher"
    family = evidence.comparisons(a + b + c, PAIR + [("fedmpq", "qat-uniform")])
    assert family.p_holm[0] == pytest.approx(2 * family.p[0])
    assert family.verdict.tolist() == ["undecided", "equivalent (within 1 point)"]  # .2 points at most
    reverse = evidence.comparisons(a + b + c, [("fedmpq", "fedmpq-kd")]).iloc[0]
    assert reverse.verdict == "fedmpq-kd higher" and reverse.difference == pytest.approx(-alone.difference)


def test_default_claims_are_those_that_were_run():
    assert evidence.comparisons(THREE)[["a", "b"]].to_numpy().tolist() == [["fedmpq-kd", "fedmpq"]]
    assert evidence.comparisons(rows("fedavg", (1, 2))).empty
    with pytest.raises(ValueError, match="no record of fedavg, fedkd"):
        evidence.comparisons(THREE, [("fedkd", "fedavg")])


def test_a_users_method_is_paired_with_what_it_was_made_from(monkeypatch):
    "By seed; in the table and in the reading; after the plug-in is gone; the built-in claims stay first."
    monkeypatch.setitem(RECIPES, "mine", RECIPES["fedmpq-kd"] | dict(kd_loss="mse"))
    monkeypatch.setitem(RECIPES, "sums", RECIPES["fedavg"] | dict(prox=0.5))
    own = [record("mine", s, a) for s, a in ((1, 86.0), (2, 86.4), (0, 85.6))] + rows("sums", (70, 71, 72))
    for name in ("mine", "sums"): monkeypatch.delitem(RECIPES, name)
    found = evidence.comparisons(THREE + own + rows("fedavg", (71, 72, 73)))
    assert found[["a", "b"]].values.tolist() == [
        ["fedmpq-kd", "fedmpq"], ["mine", "fedmpq-kd"], ["sums", "fedavg"]]
    assert found.difference.tolist() == pytest.approx([2.6, 1.3, -1.0])  # 85.6, 86, 86.4 of `mine`
    assert found.seeds.tolist() == ["0, 1, 2"] * 3 and set(found.verdict) == {"undecided"}
    said = captions.reading(THREE + own)
    assert "`mine` differs from `fedmpq-kd` by +1.30 points over 3 paired seeds" in said
    assert evidence.comparisons(own).empty


# beside the paper, reading, caption -------------------------------------------------------------------------

def at(preset: str, seed: int, method: str, accuracy: float, experiment: str = "exp1", **kw) -> dict:
    "A hand-made record with exactly the setting of a preset."
    c = next(c for c in plan(EXPERIMENTS[experiment], preset, seeds=seed) if c.method == method)
    return record(method, seed, accuracy, **{k: v for k, v in dataclasses.asdict(c).items()
                                             if k not in ("method", "seed")} | kw)


def test_the_published_setting_is_recognised():
    records = [at("paper", s, m, a) for m, a in (("fedavg", 87.5), ("fedmpq", 82.1), ("fedmpq-kd", 84.7))
               for s in (0, 1)]
    beside = claims.beside_the_paper(records, "exp1").set_index(["subject", "quantity"])
    assert set(beside["other scale than the paper"]) == {""}
    gap = beside.loc[("fedmpq-kd - fedmpq", "gap to fedavg closed %")]
    assert gap["paper claims"] == 51 and gap["measured"] == pytest.approx(48.148148)  # 2.6 of 5.4
    assert beside.loc[("fedmpq", "AUC (sum)"), "measured"] == pytest.approx(50 * 82.1)
    assert beside.loc[("fedmpq", "MB/round"), "measured"] == pytest.approx(2.5)
    assert beside.loc[("fedmpq", "ECE %"), "paper claims"] == 4.9 and "fedpq" not in beside.index


@pytest.mark.parametrize("preset, apart", [("mini", {"rounds", "train_images", "test_images"}),
                                           ("smoke", {"dataset", "model", "clients"})])
def test_other_scales_are_named(preset: str, apart: set):
    r = at(preset, 0, "fedmpq", 50.0)
    named = claims.beside_the_paper([r], "exp1")["other scale than the paper"].unique()
    assert len(named) == 1 and apart <= set(named[0].split(", "))
    assert captions.scale_of(r) == f"exp1/{preset}" and f"preset exp1/{preset}." in captions.caption([r])


def test_the_gap_closed_counts_every_seed():
    "Seed 0 closes 5 of 10 points; seed 1 has no gap and loses 7. Together that is 2 points lost of 8."
    records = [at("mini", s, m, a) for m, both in (("fedavg", (90, 80)), ("fedmpq", (80, 82)),
                                                    ("fedmpq-kd", (85, 75))) for s, a in enumerate(both)]
    beside = claims.beside_the_paper(records, "exp1").set_index(["subject", "quantity"])
    row = beside.loc[("fedmpq-kd - fedmpq", "gap to fedavg closed %")]
    assert row["measured"] == pytest.approx(-25) and row["n"] == 2 and math.isnan(row["std"])


def test_a_gap_that_is_not_there_cannot_be_closed():
    records = [at("mini", 0, m, a) for m, a in (("fedavg", 80.0), ("fedmpq", 82.1), ("fedmpq-kd", 84.7))]
    beside = claims.beside_the_paper(records, "exp1").set_index(["subject", "quantity"])
    assert math.isnan(beside.loc[("fedmpq-kd - fedmpq", "gap to fedavg closed %"), "measured"])


def test_reading_of_three_seeds():
    said = captions.reading(THREE)
    for part in ("84.70 ± 0.20 % (n=3)", "2.60 points ahead of `fedmpq`", "+2.60 points over 3 paired seeds",
                 "p = 0.00049", "undecided",
                 "4.50 MB down and 1.00 MB up", "1.50 and 1.00 (+200.0 % down, +0.0 % up)",
                 "+6.7 % (6.7 to 6.7, n = 3)", "25 % of its weights",
                 "the regulariser alone none", "1 bit-width occurred in its layers (4)",
                 "6 runs together took 60 s on a laptop (2 threads)"):
        assert part in said, part
    assert "demonstration" not in said and "qat-uniform" not in said and "nan" not in said


def test_reading_of_one_seed_is_a_demonstration():
    said = captions.reading([THREE[0], THREE[3]])
    assert said.startswith("A single seed: a demonstration") and "cannot be tested: undecided" in said
    assert "±" not in said
    assert "single seed of `fedavg`: a demonstration" in captions.reading(THREE + [record("fedavg", 0, 90)])
    assert "nan" not in captions.reading([record("fedavg", 0, 90)])


def test_reading_notices_what_did_not_happen():
    never = rows("fedmpq-kd", KD, kd=0.0) + THREE[3:]
    assert "No round of `fedmpq-kd` distilled anything" in captions.reading(never)
    moved = captions.reading(rows("fedmpq", PLAIN, lasso=0.002, bits=(3, 4, 5)))
    assert "the regulariser alone 0.2 %" in moved and "3 bit-widths occurred in its layers (3, 4, 5)" in moved
    elsewhere = captions.reading(rows("fedmpq-kd", KD, device="a GPU") + THREE[3:])
    assert "its time cannot be compared" in elsewhere and "more time" not in elsewhere
    assert "a GPU (2 threads) and a laptop" in elsewhere


@pytest.mark.parametrize("uniform, said", [
    ((82.0, 82.1, 82.2), "by +0.00 points over 3 paired seeds (95 % interval -0.50 to 0.50"),
    ((80.0, 80.1, 80.2), "by +2.00 points over 3 paired seeds (95 % interval 1.50 to 2.50"),
    ((82.0,), "by -0.20 points on 1 common seed, which cannot be tested: undecided")])
def test_reading_compares_with_uniform_quantisation(uniform: tuple, said: str):
    "Differences of -.2, 0 and .2 have a standard error of .2/sqrt(3), and t(.975, 2) = 4.303: +- .497."
    text = captions.reading(rows("fedmpq", PLAIN[:len(uniform)]) + rows("qat-uniform", uniform))
    assert f"`fedmpq` differs from `qat-uniform` {said}" in text and "undecided" in text


def test_reading_says_when_rounding_after_training_is_better():
    "`record` loses one point by rounding; the best model of few bits, fedmpq-kd, has 84.7 %."
    plain = rows("fedavg", (86.2, 86.2, 86.2))
    assert "`fedavg`, rounded after training" in captions.reading(THREE + plain)  # 85.2 over 84.7
    assert "rounded after training" not in captions.reading(THREE + rows("fedavg", (85.2, 85.2, 85.2)))
    assert "rounded after training" not in captions.reading(THREE)


def test_caption_says_what_there_is():
    text = captions.caption(THREE + [record("fedavg", 0, 90)])
    for part in ("1,000 training and 500 test images", "10 clients", "Dirichlet 0.5",
                 "4 rounds of 1 local epoch, 4 bits a weight", "distillation weight 0.5 at",
                 "seeds 0, 1, 2 (n=3; fedavg n=1)", "fp32 on a laptop", "none (own setting)",
                 "fp32 for fedavg, quantised for all others",
                 "all at the same rate (0.1)", "mean of the last 4 rounds", "± is the standard deviation"):
        assert part in text, part
    assert "A single seed: a demonstration" in captions.caption(THREE[:1])


# what went wrong, and what was measured ---------------------------------------------------------------------

def test_failures_come_first_and_lead_nothing():
    lost = [made_up_record("fedavg", s, 99, line=dict(diverged=True)) for s in (0, 1)]
    said = captions.reading(lost + THREE)
    assert said.startswith("`fedavg` diverged (seed 0, rounds 1, 2, 3, 4; seed 1, rounds 1, 2, 3, 4)")
    assert "`fedmpq-kd`, which deploys quantised weights, is highest" in said
    assert "Every method has diverged" in captions.reading(lost) and "highest" not in captions.reading(lost)
    half = [made_up_record("fedmpq", 0, 50, line=dict(diverged=True)), record("fedmpq-kd", 0, 60)]
    assert "Distillation changes" not in captions.reading(half)
    assert captions.failures(THREE) == ""


@pytest.mark.parametrize("line, said", [
    (dict(arrived=0, failed={"3": "NaN"}), "every reply was refused (seed 0, rounds 1, 2, 3, 4)"),
    (dict(arrived=0, failed={}), "no reply arrived"),
    (dict(skipped=3), "teachers whose logits were not finite"),
    (dict(moved=0.0), "never moved a weight to another level (seed 0)")])
def test_each_failure_is_said(line: dict, said: str):
    assert said in captions.reading([made_up_record("fedmpq", 0, 50, line=line)])


def test_nothing_is_nan_where_nobody_trained():
    one = made_up_record("fedmpq", 0, 50, line=dict(arrived=0, failed={}))
    for line in one["curve"]: del line["moved"], line["lasso_moved"]
    assert "nan" not in captions.reading([one]) and "no client trained" in captions.reading([one])


def test_a_silent_teacher_has_its_true_reason():
    silent = [record("fedmpq", 0, 50), made_up_record("fedmpq-kd", 0, 50, line=dict(kd=0.0))]
    assert "although it was to" in captions.reading(silent)
    idle = [record("fedmpq", 0, 50), made_up_record("fedmpq-kd", 0, 50, line=dict(kd=0.0), alpha=0)]
    assert "its weight is 0" in captions.reading(idle)


def test_bits_are_measured():
    few, asked = record("fedmpq", 0, 50), record("fedmpq", 0, 50)
    few["summary"] |= dict(quantised_share=0.019, bits_mean=4.0)
    assert "4 bits a weight in 1.9 % of the weights, the others fp32," in captions.caption([few])
    few["summary"] |= dict(quantised_share=0.98, bits_mean=2.5)
    assert "4 bits a weight (measured: 2.50)," in captions.caption([few])
    sizes, everything = captions._sizes("resnet20", 10, (3, 32, 32))
    # by hand, 3x3 convolutions: 3-16, six 16-16, 16-32, five 32-32, 32-64, five 64-64; and the last layer
    assert sum(sizes) == 9 * (48 + 6 * 256 + 512 + 5 * 1024 + 2048 + 5 * 4096) + 640 < everything
    asked["curve"][-1]["bits"] = [2] * len(sizes)
    assert captions.measured_bits(asked) == (sum(sizes) / everything, 2.0)


def test_tuned_rates_are_those_of_a_tuning(tmp_path: Path, monkeypatch):
    own = [record("fedavg", 0, 90, lr=0.17), record("fedmpq", 0, 80, lr=0.013)]
    assert "learning rates 0.17 for fedavg, 0.013 for fedmpq" in captions.caption(own)
    choices = {m: dict(values=dict(lr=lr)) for m, lr in (("fedavg", 0.17), ("fedmpq", 0.013))}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("lib_name = fedmpqkd")
    path = tmp_path / "results" / "exp1" / "study-tuned.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(choices=choices)))
    assert "each method at its tuned rate" in captions.caption(own)
    assert "0.18 for fedavg" in captions.caption([record("fedavg", 0, 90, lr=0.18), own[1]])


# files ------------------------------------------------------------------------------------------------------

def test_equal_records_make_equal_files(tmp_path: Path):
    paths = captions.write_outputs(THREE, tmp_path / "one", "exp1")
    assert [p.name for p in paths] == ["exp1.tex", "exp1_caption.tex", "exp1.md", "exp1.pdf"]
    there = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert there == sorted(p.name for p in paths), "nothing half-written is left"
    again = captions.write_outputs(copy.deepcopy(THREE[::-1]), tmp_path / "two", "exp1")
    for one, two in zip(paths[:-1], again[:-1], strict=True):
        assert one.read_bytes() == two.read_bytes(), "the order of the records does not matter"
    pdf = paths[-1].read_bytes()
    assert captions.write_outputs(THREE, tmp_path / "one", "exp1")[-1].read_bytes() == pdf
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"/Type3" not in pdf
    other = captions.write_outputs(rows("fedmpq", (1, 2, 3)), tmp_path / "one", "exp1")
    assert other[-1].read_bytes() != pdf


def test_the_page_holds_table_caption_reading_and_claims(tmp_path: Path):
    text = captions.write_outputs(THREE, tmp_path, "exp1")[2].read_text()
    assert evidence.to_markdown(evidence.table(THREE)) in text and captions.caption(THREE) in text
    assert captions.reading(THREE) in text
    assert "| paper claims |" not in text and "| verdict |" in text, "digits are not the paper's task"
    assert "paper claims" not in captions.write_outputs(THREE, tmp_path, "mine")[2].read_text()
    assert not (tmp_path / "exp1_robustness.tex").exists(), "nothing was tried"


# rates of their own -----------------------------------------------------------------------------------------

TUNED = [*rows("fedavg", (90, 91, 92), optimizer="adamw", lr=0.001), *rows("fedmpq-kd", KD, lr=0.3),
         *rows("fedmpq", PLAIN, lr=0.03)]


def test_each_method_may_have_its_own_rate_and_the_table_shows_it():
    t = evidence.table(TUNED)
    assert t["lr"].to_dict() == {"fedavg": 0.001, "fedmpq": 0.03, "fedmpq-kd": 0.3}
    assert t["n"].tolist() == [3, 3, 3]
    lines = evidence.to_markdown(t).splitlines()
    assert lines[0].startswith("| Method | n | lr | Accuracy % ↑ |")
    assert lines[2].startswith("| fedavg | 3 | 0.001 | **91.00 ± 1.00** |")
    panels = evidence.latex_panels(t)
    assert "fedmpq-kd & 3 & 0.3 & $1.50$ & $1.00$ " in panels, "next to the bytes, where there is room"
    said = captions.caption(TUNED)
    rates = "learning rates 0.001 for fedavg, 0.03 for fedmpq, 0.3 for fedmpq-kd"
    assert f"{rates}, adamw for fedavg;" in said and "same rate" not in said
    assert "lr" not in evidence.table(THREE) and "lr" not in evidence.to_markdown(evidence.table(THREE))


def test_a_rate_that_all_share_is_no_column_even_if_it_is_unusual():
    same = rows("fedmpq-kd", KD, lr=0.3) + rows("fedmpq", PLAIN, lr=0.3)
    assert "lr" not in evidence.table(same) and "all at the same rate (0.3);" in captions.caption(same)


# attacks and corruptions ------------------------------------------------------------------------------------

def tried(method: str, seed: int, hit: float, *, corrupted: bool = True, **fields) -> Record:
    "A record whose deployed model keeps `hit` percent under FGSM at 2/255, and 30 + seed at severity 3."
    return with_trial(record(method, seed, 80.0, **fields), hit, 30.0 + seed if corrupted else None,
                      corruption_set="digits-C (rebuilt, 14 of 19)")


HITS = [tried(m, s, h + s) for m, h in (("fedmpq", 20.0), ("fedmpq-kd", 23.0), ("fedavg", 26.0))
        for s in range(3)]


def test_table_of_trials_has_the_known_means_and_spreads():
    t = evidence.robustness_table(HITS)
    assert list(t.index) == ["fedavg", "fedmpq", "fedmpq-kd"] and t["n"].tolist() == [3, 3, 3]
    assert list(t.columns.unique(0)) == ["n", "Clean %", "FGSM 1/255", "FGSM 2/255", "FGSM 4/255",
                                         "FGSM 8/255", "PGD-10 2/255",
                                         "Transfer 2/255", "mCA", "Severity 3"]
    for e, means in {1: [28, 22, 25], 2: [27, 21, 24], 4: [25, 19, 22], 8: [21, 15, 18]}.items():
        assert t[f"FGSM {e}/255"]["mean"].tolist() == pytest.approx(means)
        assert t[f"FGSM {e}/255"]["std"].tolist() == pytest.approx([1, 1, 1])
    assert t["PGD-10 2/255"]["mean"].tolist() == pytest.approx([24, 18, 21])
    assert t["Transfer 2/255"]["mean"].tolist()[1:] == pytest.approx([31, 34])
    assert math.isnan(t.loc["fedavg", ("Transfer 2/255", "mean")])
    assert t["Severity 3"].to_numpy() == pytest.approx(np.array([[31, 1]] * 3))
    assert t["mCA"]["std"].tolist() == [0, 0, 0]
    text = evidence.to_markdown(t[["n", "FGSM 2/255", "Transfer 2/255"]]).splitlines()
    assert text[2] == "| fedavg | 3 | **27.00 ± 1.00** | – |"
    assert text[4] == "| fedmpq-kd | 3 | 24.00 ± 1.00 | **34.00 ± 1.00** |"
    assert r"$\mathbf{27.00 \pm 1.00}$ & --" in evidence.to_latex(t[["n", "FGSM 2/255", "Transfer 2/255"]])


def test_only_trials_that_took_place_are_shown():
    some = [tried("fedmpq", s, 20 + s, corrupted=False) for s in range(3)]
    assert list(evidence.robustness_table(some + THREE[:3]).columns.unique(0))[-1] == "Transfer 2/255"
    shown = evidence.robustness_table(some + THREE[:3])
    assert list(shown.index) == ["fedmpq"], "methods that were not tried have no row"
    with pytest.raises(ValueError, match="run with stress="): evidence.robustness_table(THREE)
    assert "mCA" not in captions.robustness_caption(some)
    assert "digits-C (rebuilt, 14 of 19)" in captions.robustness_caption(HITS)


def test_a_diverged_model_is_a_dash_and_not_left_out_of_a_mean():
    some = copy.deepcopy(HITS)
    some[1]["robustness"] = dict(images=500, seed=1, diverged=["deployed", "fp"])
    t = evidence.robustness_table(some)
    assert t.loc["fedmpq"].drop(("n", "")).isna().all() and t.loc["fedmpq", ("n", "")] == 3
    assert t.loc["fedmpq-kd", ("FGSM 2/255", "mean")] == 24
    assert "under FGSM" not in captions.reading(some)


@pytest.mark.parametrize("change", [dict(images=1000), dict(corruption_set="digits-C (rebuilt, 19 of 19)")])
def test_trials_on_other_images_are_not_averaged(change: dict):
    some = copy.deepcopy(HITS)
    some[0]["robustness"] |= change
    with pytest.raises(ValueError, match="different images"): evidence.robustness_table(some)


@pytest.mark.parametrize("method, own", [("fedmpq", "deployed"), ("fedavg", "fp")])
def test_a_real_trial_fits_into_the_table(method: str, own: str):
    "The names in the record are those that the stress test writes."
    config = make_config(method, model="resnet8", clients=2, rounds=1)
    federation = open_run(config, load_dataset("digits").subset(train=40, test=40), workers=1)
    found = stress_test(federation.pool, final_states(federation), images=20, corruptions=("contrast",),
                        severities=(1, 3), cache=False)
    federation.pool.close()
    row = evidence.robustness_table([record(method, 0, 50.0) | dict(robustness=found)]).loc[method]
    assert row["Clean %", "mean"] == found["clean"][own]
    assert row["PGD-10 2/255", "mean"] == found["attacks"][own]["pgd-10 2/255"]
    assert row["FGSM 8/255", "mean"] == found["attacks"][own]["fgsm 8/255"]
    assert row["Severity 3", "mean"] == found["corruptions"][own]["contrast"]["3"]
    assert row["mCA", "mean"] == pytest.approx(sum(found["corruptions"][own]["contrast"].values()) / 2)
    assert ("Transfer 2/255" in row.index.unique(0)) == (method == "fedmpq")


def test_files_of_an_experiment_with_trials(tmp_path: Path):
    paths = captions.write_outputs(HITS, tmp_path, "exp2")
    assert sorted(p.name for p in paths) == ["exp2.md", "exp2.pdf", "exp2.tex", "exp2_caption.tex",
                                             "exp2_robustness.tex", "exp2_robustness_caption.tex"]
    text = (tmp_path / "exp2.md").read_text()
    assert evidence.to_markdown(evidence.robustness_table(HITS)) in text
    assert captions.robustness_caption(HITS) in text
    assert ("under FGSM at 2/255 `fedmpq` 21.00 % and `fedmpq-kd` 24.00 %; "
            "at severity 3 of the corruptions `fedmpq` 31.00 %") in text


# the paper's second experiment ------------------------------------------------------------------------------

def test_claimed_differences_are_those_of_the_entries():
    for experiment, claimed in claims.PAPER.items():
        for subject in (s for s in claimed if " - " in s):
            a, b = (claimed[m] for m in subject.split(" - "))
            gain = a["accuracy %"] - b["accuracy %"]
            assert claimed[subject]["accuracy, points"] == pytest.approx(gain), (experiment, subject)
            for ours, entry in (("client std, points", "client std"), ("corrupted, points", claims._SHIFT),
                                ("FGSM, points", claims._FGSM)):
                if ours in claimed[subject]:
                    assert claimed[subject][ours] == pytest.approx(a[entry] - b[entry])
            for ours, entry in (("AUC %", "AUC (sum)"), ("bytes %", "MB/client")):
                if ours in claimed[subject]:
                    assert claimed[subject][ours] == pytest.approx(100 * (a[entry] / b[entry] - 1), abs=0.05)


def exp2(preset: str, method: str, seed: int, accuracy: float, hit: float = 20.0, **kw) -> dict:
    trial = tried(method, seed, hit, alpha=0.5, public_images=40)["robustness"]
    return at(preset, seed, method, accuracy, "exp2", **kw) | dict(robustness=trial)


def test_experiment_2_beside_the_paper():
    records = [exp2("paper", m, s, a + s, h, **kw) for m, a, h, kw in (
        ("fedmpq", 40.0, 20.0, {}), ("fedmpq-kd", 42.0, 22.5, dict(seconds=2.5)),
        ("fedkd", 41.0, 21.0, dict(down=22_500_000, up=27_500_000)))
        for s in (0, 1)]
    beside = claims.beside_the_paper(records, "exp2").set_index(["subject", "quantity"])
    assert set(beside["other scale than the paper"]) == {""}
    assert not {"qat-uniform", "fedmpq-kd-high"} & set(beside.index.get_level_values(0))
    gain = beside.loc["fedmpq-kd - fedmpq"]
    assert gain["paper claims"].to_dict() == pytest.approx({"accuracy, points": 1.7, "time %": 9,
                                                            "client std, points": -0.9,
                                                            "corrupted, points": 2.5,
                                                            "FGSM, points": 1.5})
    assert gain["measured"].to_dict() == pytest.approx({"accuracy, points": 2, "time %": 100 / 6,
                                                        "client std, points": 0, "corrupted, points": 0,
                                                        "FGSM, points": 2.5})
    assert beside.loc[("fedmpq-kd - fedkd", "bytes %"), "measured"] == pytest.approx(-95)  # 2.5 MB of 50
    own = beside.loc["fedmpq"]
    assert own.loc["accuracy %", ["measured", "std", "n"]].tolist() == pytest.approx([40.5, 0.5**0.5, 2])
    assert own.loc["corrupted, severity 3, %", "measured"] == pytest.approx(30.5)
    assert own.loc["FGSM 2/255 %", "measured"] == pytest.approx(20)
    assert own.loc["MB/client", "measured"] == pytest.approx(0.25), "2.5 MB of ten clients"
    noise = own.loc["change by 10 % label noise, points"]
    assert noise["paper claims"] == -5.2 and noise["n"] == 0 and math.isnan(noise["measured"])
    with pytest.raises(ValueError, match="claims about exp1, exp2"): claims.beside_the_paper(records, "exp3")


@pytest.mark.parametrize(("preset", "epochs"), [("mini", 40)])
def test_scaled_down_presets_say_so(preset: str, epochs: int):
    r = exp2(preset, "fedmpq-kd", 0, 40.0, lr=0.01)
    r["data"] = dict(name="cifar100-coarse", fingerprint="f", train=4000, test=1000, classes=20)
    (named,) = set(claims.beside_the_paper([r], "exp2")["other scale than the paper"])
    assert {"dataset", "model", "clients", "participation", "train_images", "rounds",
            "lr"} <= set(named.split(", "))
    assert not {"stress", "eval_images", "precision", "seed", "validation"} & set(named.split(", "))
    said = captions.caption([r])
    for part in ("cifar100-coarse (20 coarse classes), 4,000 training",
                 "mobilenetv2-imagenet (ImageNet strides) of 2,249,492 parameters, "
                 "20 clients, 40 % of them in a round, "
                 "20 % of whom fail, 5 % of their images kept for validation, "
                 f"warm start public:{epochs}, Dirichlet 0.1", "2 local epochs", f"preset exp2/{preset}."):
        assert part in said, part


def test_a_tuning_run_is_nobodys_preset():
    assert captions.scale_of(at("mini", 0, "fedmpq", 50.0)) == "exp1/mini"
    assert captions.scale_of(at("mini", 0, "fedmpq", 50.0, validation=0.1)) == ""
    assert captions.scale_of(at("mini", 0, "fedmpq", 50.0,
                                lr=0.3)) == "exp1/mini", "a tuned rate belongs to the method"


def test_caption_names_unusual_conditions():
    noisy = [record("fedkd", 0, 50, label_noise=0.2, noise_clients=0.1, noise_from=60, public_images=1000,
                    rounds=100, dropout=0.2),
             record("fedmpq-kd", 0, 50, label_noise=0.2, noise_clients=0.1, noise_from=60, rounds=100,
                    dropout=0.2, alpha=1.0)]
    for part in ("10 clients, 20 % of them fail in a round, 20 % of the labels of 10 % of the clients wrong "
                 "after round 60, Dirichlet", "4 bits a weight, "
                 "distillation weight 1 at temperature 2, 1,000 public images for fedkd, all at"):
        assert part in captions.caption(noisy), part
    assert "40 % of the labels of all clients wrong, warm start public:3, Dirichlet" in captions.caption(
        [record("fedavg", 0, 50, label_noise=0.4, warm_start="public:3")])


# equal bytes ------------------------------------------------------------------------------------------------

SHAPE = layout(build_model("resnet20", 10))
# What is not planes: norms, shortcuts, bias, scales; header, checksum, one head a tensor.
REST = 23_112 + 31 + 4 + 4 * 128 + 2 * 108


def by_formula(bits) -> int:
    "Bytes of ResNet-20 at a number of bits per layer: a sign plane and the planes."
    return REST + sum(-(-d // 8) * (b + 1) for d, b in zip(SHAPE.sizes(), bits, strict=True))


def control_of(r: dict, **fields):
    "Uniform quantisation in the setting of a record."
    return make_config("qat-uniform", **{k: getattr(config_from(r["config"]), k)
                                         for k in (*records.SETTING, "seed", "lr")} | fields)


def lengths(matched: Matched) -> list[int]:
    "What a server with this configuration sends to each client, byte by byte."
    model = build_model("resnet20", 10)
    server = Server(matched.config, SHAPE, model.state_dict())
    return [len(downlink(server, k, 0)[0]) for k in range(matched.config.clients)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_control_of_the_committed_runs_has_their_bytes(seed: int):
    found = [r for r in records.load_records(ROOT / "results", "exp1", "mini")
             if (r["config"]["method"], r["config"]["seed"]) == ("fedmpq", seed)]
    if not found: pytest.skip("no committed records")
    matched = equal_bytes(found[0], control_of(found[0]))
    assert matched.config.bits == (4.0,) and matched.config.seed == seed
    assert matched.config.method == "qat-uniform"
    assert message_bytes(found[0])["down"] == by_formula([4] * 20) == 191_585
    assert matched.residual["down"] == 0 and 0 <= matched.residual["up"] < 0.01
    assert 191_585 * 200 / found[0]["summary"]["bytes_up"] - 1 == pytest.approx(matched.residual["up"])


def pruned(down: float, up: float, sampled: int = 10, arrived: int = 10, **fields) -> dict:
    "A record of FedMPQ on ResNet-20 whose messages have these average lengths."
    r = record("fedmpq", 0, 50.0, **fields)
    for line in r["curve"]:
        line |= dict(sampled=sampled, arrived=arrived, bytes_down=down * sampled, bytes_up=up * arrived)
    return r


@pytest.mark.parametrize("pay", [0.0, 0.07, 0.31, 0.5, 0.77, 0.93])
@pytest.mark.parametrize("floor", [1, 3, 6])
def test_pruned_bits_are_matched_within_one_percent(pay: float, floor: int):
    "However many planes FedMPQ's clients dropped, some mixture over layers and clients sends as much."
    bytes_each = by_formula([floor] * 20) + pay * (by_formula([floor + 1] * 20) - by_formula([floor] * 20))
    r = pruned(bytes_each, bytes_each)
    matched = equal_bytes(r, control_of(r))
    assert matched.worst <= 0.01 and len(matched.config.bits) in (1, 10)
    sent = lengths(matched)
    assert sum(sent) / 10 / bytes_each - 1 == pytest.approx(matched.residual["up"], abs=1e-12)
    assert {len(set(sent))} <= {1, 2}
    assert by_formula([floor] * 20) <= min(sent) <= max(sent) <= by_formula([floor + 1] * 20)


def test_layers_are_mixed_small_ones_first():
    "All but one of the largest layers at four bits is a step; half-way, half of the clients make it."
    all_but_one = by_formula([4] * 18 + [3, 4])
    alone = equal_bytes(r := pruned(all_but_one, all_but_one), control_of(r))
    assert alone.worst == 0 and len(alone.config.bits) == 1 and 3.85 < alone.config.bits[0] < 3.9
    half = (all_but_one + 191_585) / 2
    mixed = equal_bytes(r := pruned(half, half), control_of(r))
    assert mixed.worst == pytest.approx(0) and sorted(lengths(mixed)) == [all_but_one] * 5 + [191_585] * 5
    assert str(equal_bytes(pruned(191_585, 191_585), control_of(r))) == "4 bits: +0.00 % down, +0.00 % up"


def test_the_residual_tells_directions_apart():
    "An uplink that is 2.4 % shorter leaves 1.2 % in each direction, and no choice of bits leaves less."
    r = pruned(191_585, 191_585 - 4608)
    matched = equal_bytes(r, control_of(r))
    assert matched.residual["down"] == pytest.approx(-0.0122, abs=5e-4)
    assert matched.residual["up"] == pytest.approx(0.0122, abs=5e-4)


def test_messages_are_counted_by_who_was_there():
    late, early = (pruned(1000.0, 500.0, 8, 6, participation=0.8, dropout=0.25, dropout_stage=s)
                   for s in ("after_download", "before_download"))
    assert message_bytes(late) == dict(down=1000, up=500)
    assert message_bytes(early) == dict(down=pytest.approx(8 / 6 * 1000),
                                        up=500), "who fails before the download has cost nothing"
    with pytest.raises(ValueError, match="no client of fedmpq .seed 0. ever answered"):
        message_bytes(pruned(1000.0, 0.0, 8, 0))


def test_not_everything_is_a_control():
    r = pruned(191_585, 191_585)
    for method, fields in (("fedavg", {}), ("fedmpq", {}), ("qat-uniform-kd", dict(alpha=0.5)),
                           ("fedkd", dict(public_images=40))):
        with pytest.raises(ValueError, match=f"{method} is no control"):
            equal_bytes(r, make_config(method, **fields))
    with pytest.raises(ValueError, match="seed 3, the record 0"): equal_bytes(r, control_of(r, seed=3))
    with pytest.raises(ValueError, match="sent a teacher as well"):
        equal_bytes(r | dict(config=THREE[0]["config"]), control_of(r))


def test_records_of_texts_have_tables_too():
    "No calibration error and no accuracy by class is measured on texts: a dash, and the rest is there."
    some = [r for r in records.load_records(ROOT / 'results', 'exp5', 'study')
            if r['config']['bits'] == [4.0]]
    assert len(some) == 25 and all('ece' not in r['summary'] for r in some)
    lines = evidence.to_markdown(evidence.table(some)).splitlines()
    heads = [cell.split(' ')[0] for cell in lines[0].strip('| ').split(' | ')]
    cells = [cell.strip('* ') for cell in lines[2].strip('| ').split(' | ')]
    shown = dict(zip(heads, cells, strict=True))
    last = [sum(line['accuracy'] for line in r['curve'][-5:]) / 5 for r in some
            if r['config']['method'] == 'fedavg']
    assert shown['Method'] == 'fedavg' and shown['ECE'] == '–' == shown['Client']
    assert shown['Accuracy'].startswith(f'{sum(last) / len(last):.2f} ')


def test_a_start_has_no_part_in_the_bytes_of_a_round():
    "Twenty rounds of a warm start stand in the summary; the four rounds of the curve sent 1.5 MB each."
    begun = [r | dict(summary=r["summary"] | dict(bytes_down=10**9)) for r in rows("fedmpq", PLAIN)]
    assert evidence.runs_frame(begun).bytes_down.tolist() == [1_500_000] * len(PLAIN)


def test_a_lead_is_told_with_its_paired_interval():
    "Mean and standard deviation of the three differences, by hand."
    said = captions.reading(THREE)
    differences = [a - b for a, b in zip(KD, PLAIN, strict=True)]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # t of two degrees of freedom
    mean = statistics.mean(differences)
    assert f"paired, {mean - half:.2f} to {mean + half:.2f}, n = 3, of two rows that were picked" in said
