"""Records in, tables and sentences out: means, spreads, ties, pairs and files, against numbers known beforehand."""
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
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fedmpqkd import evidence  # noqa: E402
from fedmpqkd.core import ALGORITHM_VERSION  # noqa: E402
from fedmpqkd.experiments import EXPERIMENTS, plan  # noqa: E402
from fedmpqkd.methods import RECIPES, make_config, register_method  # noqa: E402

KD, PLAIN = (84.5, 84.7, 84.9), (81.8, 82.1, 82.4)
PAIR = [("fedmpq-kd", "fedmpq")]


def record(method: str, seed: int, accuracy: float, *, down: int = 1_500_000, up: int = 1_000_000, seconds: float = 2.0,
           kd: float = 0.1, bits: tuple = (4, 4), lasso: float = 0.0, device: str = "a laptop", **fields) -> dict:
    "A record with a flat curve of four rounds, made by hand."
    config = make_config(method, **dict(alpha=0.5, rounds=4) | fields | dict(seed=seed))
    line = dict(accuracy=accuracy, accuracy_fp=accuracy + 1, accuracy_quantised=accuracy - 1, ece=0.05, bytes_down=down, bytes_up=up,
                moved=0.25, lasso_moved=lasso, bits=list(bits), kd=kd if config.alpha else 0.0)
    n = config.rounds
    return dict(
        id=f"{method}-{seed}", algorithm=ALGORITHM_VERSION, config=dataclasses.asdict(config), commit="",
        data=dict(name="digits", fingerprint="f", train=1000, test=500, classes=10),
        summary=dict(accuracy=accuracy, accuracy_last=accuracy, accuracy_fp=0.0, accuracy_quantised=0.0, ece=0.05,
                     auc=dict(sum=n * accuracy, trapz=(n - 1) * accuracy, norm=accuracy), dispersion=dict(std=3.0), bytes_down=n * down,
                     bytes_up=n * up, seconds=10.0),
        curve=[dict(line, round=t + 1, seconds_training=seconds + t) for t in range(n)], environment=dict(device=device, cores=2, workers=2))


def rows(method: str, accuracies, **kw) -> list[dict]:
    return [record(method, s, a, **kw) for s, a in enumerate(accuracies)]


THREE = rows("fedmpq-kd", KD, down=4_500_000, seconds=2.2) + rows("fedmpq", PLAIN)


def save(folder: Path, records: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for r in records: (folder / f"{r['id']}.json").write_text(json.dumps(r))


# reading ------------------------------------------------------------------------------------------------------------------

def test_records_survive_the_file_and_come_in_order(tmp_path: Path):
    save(tmp_path / "exp1" / "study", THREE)
    (tmp_path / "exp1" / "study" / "_work").mkdir()
    (tmp_path / "exp1" / "study" / ".x.json.1.2").write_text("half a rec")  # what an interrupted write leaves behind
    found = evidence.load_records(tmp_path, "exp1", "study")
    assert [r["id"] for r in found] == sorted(r["id"] for r in THREE)
    pd.testing.assert_frame_equal(evidence.table(found), evidence.table(THREE))
    assert evidence.load_records(tmp_path, "exp1", "paper") == []


@pytest.mark.parametrize("text", ["", '{"config": {', "[]", "3", "null", '{"config": {}}', "\x00"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str):
    save(tmp_path / "exp1" / "study", THREE)
    (tmp_path / "exp1" / "study" / "fedmpq-1.json").write_text(text)
    with pytest.raises(ValueError, match=r"fedmpq-1\.json is damaged .*delete it"): evidence.load_records(tmp_path, "exp1", "study")


def test_records_of_another_algorithm_are_left_out_aloud(tmp_path: Path, capsys):
    save(tmp_path / "exp1" / "study", THREE[:5] + [THREE[5] | dict(algorithm=ALGORITHM_VERSION + 7)])
    assert len(evidence.load_records(tmp_path, "exp1", "study")) == 5
    said = capsys.readouterr().out
    assert "fedmpq-2.json is left out" in said and str(ALGORITHM_VERSION + 7) in said


# what may stand together --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("other, complaint", [
    (record("fedmpq", 7, 80, dirichlet=0.1), "records of fedmpq differ in dirichlet"),
    (record("fedmpq-kd", 7, 80, alpha=1.0), "records of fedmpq-kd differ in alpha"),
    (record("fedavg", 0, 80, rounds=5), "fedavg and fedmpq-kd differ in rounds"),
    (record("fedmpq", 1, 99), "fedmpq with seed 1 is there twice"),
    (record("fedavg", 0, 80) | dict(data=THREE[0]["data"] | dict(fingerprint="g")), "saw other data")])
def test_records_that_must_not_be_averaged(other: dict, complaint: str):
    for show in (evidence.runs_frame, evidence.table, evidence.comparisons, evidence.reading, evidence.caption, evidence.plot_curves):
        with pytest.raises(ValueError, match=complaint): show(THREE + [other])


def test_select_separates_them():
    strong = rows("fedmpq-kd", (90, 91), alpha=1.0)
    mixed = strong + THREE
    assert evidence.select(mixed, alpha=1) == strong  # 1 and 1.0 mean the same
    assert evidence.select(mixed, method="fedmpq", seed="2") == [THREE[5]]
    assert evidence.select(mixed, bits=4) == mixed and evidence.select(mixed, bits=2) == []
    with pytest.raises(TypeError, match="alhpa"): evidence.select(mixed, alhpa=1)


def test_nothing_to_show():
    with pytest.raises(ValueError, match="no records"): evidence.table([])


# the table ----------------------------------------------------------------------------------------------------------------

def test_runs_frame_converts_nothing_but_totals():
    runs = evidence.runs_frame(THREE)
    assert runs.method.tolist() == ["fedmpq"] * 3 + ["fedmpq-kd"] * 3 and runs.seed.tolist() == [0, 1, 2] * 2
    first = runs.iloc[0]
    assert (first.accuracy, first.accuracy_fp, first.accuracy_quantised) == pytest.approx((81.8, 82.8, 80.8))
    assert (first.bytes_down, first.bytes_up, first.rounds, first.train) == (1_500_000, 1_000_000, 4, 1000)
    assert (first.ece, first.auc_sum, first.auc_norm, first.client_std, first.moved) == pytest.approx((0.05, 4 * 81.8, 81.8, 3, 0.25))


def test_headlines_are_means_of_the_last_five_rounds():
    r = record("fedavg", 0, 50, rounds=8)
    for t, line in enumerate(r["curve"]): line["accuracy_fp"], line["accuracy_quantised"] = float(t), 10.0 * t
    row = evidence.runs_frame([r]).iloc[0]
    assert (row.accuracy_fp, row.accuracy_quantised) == (5.0, 50.0)  # (3+4+5+6+7)/5


def test_table_has_the_known_means_and_spreads():
    t = evidence.table(THREE)
    assert t["n"].tolist() == [3, 3]
    assert t["Accuracy %"].to_numpy() == pytest.approx(np.array([[82.1, 0.3], [84.7, 0.2]]))
    assert t.loc["fedmpq-kd", ("MB down", "mean")] == pytest.approx(4.5) and t.loc["fedmpq", ("ECE %", "mean")] == pytest.approx(5)
    assert all(kind.kind in "if" for kind in t.dtypes), "numbers, not text"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6))
def test_spread_is_the_sample_standard_deviation(hundredths: list[int]):
    accuracies = [h / 100 for h in hundredths]
    mean, std = evidence.table(rows("fedavg", accuracies)).loc["fedavg", "Accuracy %"]
    assert mean == pytest.approx(statistics.mean(accuracies)) and std == pytest.approx(statistics.stdev(accuracies), abs=1e-9)


def test_rows_follow_the_recipes_unless_told():
    some = [record(m, 0, 50.0) for m in reversed(list(RECIPES)) if m != "fedmpq-official"]
    assert list(evidence.table(some).index) == [m for m in RECIPES if m != "fedmpq-official"]
    assert list(evidence.table(some, order=["fedmpq-kd", "fedmpq", "unheard-of"]).index)[:3] == ["fedmpq-kd", "fedmpq", "fedavg"]


def test_one_seed_has_no_spread_and_no_bold():
    t = evidence.table([record("fedavg", 0, 90.0), record("fedmpq", 0, 80.0)])
    assert t["Accuracy %"]["std"].isna().all()
    text = evidence.to_markdown(t) + evidence.to_latex(t)
    assert "±" not in text and "pm" not in text and "**" not in text and "mathbf" not in text and "90.00" in text


@pytest.mark.parametrize("other, tied", [((84.3, 84.5, 84.7), True), ((84.29, 84.49, 84.69), False), ((60.0, 84.9, 99.0), False)])
def test_ties_are_within_one_standard_deviation_of_the_best(other: tuple, tied: bool):
    "The best is 84.7 ± 0.2, so 84.5 is as good, whatever its own spread, and 84.49 is not."
    text = evidence.to_markdown(evidence.table(THREE + rows("qat-uniform", other)))
    bold = {line.split(" | ")[0].strip("| ") for line in text.splitlines() if re.search(r"^\| \S+ \| 3 \| \*\*", line)}
    assert bold == {"fedmpq-kd"} | ({"qat-uniform"} if tied else set())


def test_lower_is_better_for_calibration():
    good, bad = rows("fedmpq", (80, 81, 82)), rows("fedavg", (80, 81, 82))
    for r in bad: r["summary"]["ece"] = 0.09
    t = evidence.table(good + bad)[["n", "ECE %"]]
    assert evidence.to_markdown(t).splitlines() == [
        "| Method | n | ECE % ↓ |", "| --- | --- | --- |", "| fedavg | 3 | 9.00 ± 0.00 |", "| fedmpq | 3 | **5.00 ± 0.00** |"]


def test_markdown_has_all_columns_in_every_row():
    lines = evidence.to_markdown(evidence.table(THREE)).splitlines()
    assert lines[0] == ("| Method | n | Accuracy % ↑ | fp32 % ↑ | Quantised % ↑ | AUC ↑ | ECE % ↓ | Client std ↓ "
                        "| MB down | MB up | s/round |")
    assert {line.count("|") for line in lines} == {12} and len(lines) == 4
    assert lines[3].startswith("| fedmpq-kd | 3 | **84.70 ± 0.20** |") and lines[3].endswith("| 4.50 | 1.00 | 2.20 |")


def test_a_quantity_nobody_measured_is_a_dash():
    some = copy.deepcopy(THREE)
    for r in some: r["summary"]["dispersion"] = {}
    t = evidence.table(some)[["n", "Client std"]]
    assert evidence.to_markdown(t).splitlines()[2] == "| fedmpq | 3 | – |" and "fedmpq & 3 & -- " in evidence.to_latex(t)


# LaTeX --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def odd_name():
    "A method whose name LaTeX would stumble over."
    name = r"my_own #1 & 50% {x} ^~\$|"
    register_method(name, "fedmpq")
    yield name
    del RECIPES[name]


def test_names_are_escaped(odd_name: str):
    t = evidence.table(THREE + rows(odd_name, (70, 71, 72)))
    latex = evidence.to_latex(t)
    assert (r"my\_own \#1 \& 50\% \{x\} \textasciicircum{}\textasciitilde{}\textbackslash{}\$\textbar{} & 3 & $71.00 \pm 1.00$") in latex
    assert latex.splitlines()[0] == "% Written by nbs/exp1.ipynb: do not edit"
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule")) and r"Accuracy \% $\uparrow$" in latex
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
    records = THREE + rows(odd_name, (70, 71, 72)) + rows("fedmpq-kd-delivered", (83, 84, 85))
    evidence.write_outputs(records, tmp_path / "generated", "exp1")
    (tmp_path / "generated" / "claims.tex").write_text(evidence.to_latex(evidence.beside_the_paper(records).iloc[:, :6]))
    (tmp_path / "main.tex").write_text(r"""\documentclass{article}\usepackage[margin=1in]{geometry}\usepackage{booktabs,graphicx}
\begin{document}\input{generated/exp1_caption}\begin{table}\footnotesize\centering\setlength{\tabcolsep}{3pt}
\input{generated/exp1}\caption{\generatedcaption}\end{table}
\noindent\input{generated/claims}\par\noindent\includegraphics[width=\textwidth]{generated/exp1}\end{document}""")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"], cwd=tmp_path, capture_output=True)
    log = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull" not in log and "undefined" not in log, log[-3000:]


# curves -------------------------------------------------------------------------------------------------------------------

def test_curves_are_means_with_a_band():
    ax = evidence.plot_curves(THREE)
    assert [line.get_label() for line in ax.lines] == ["fedmpq", "fedmpq-kd"]
    assert ax.lines[1].get_xdata().tolist() == [1, 2, 3, 4] and ax.lines[1].get_ydata() == pytest.approx([84.7] * 4)
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
    with pytest.raises(ValueError, match="allowed are 'round' and 'bytes'"): evidence.plot_curves(THREE, x="seconds")


# tests over seeds ---------------------------------------------------------------------------------------------------------

def test_three_pairs_are_undecided_whatever_p_is():
    one = evidence.comparisons(THREE, PAIR).iloc[0]
    assert (one.n, one.seeds, one.verdict) == (3, "0, 1, 2", "undecided")
    assert one.p == pytest.approx(4.93e-4, abs=5e-7) and one.p_holm == one.p and one.sign_flip_p == 0.25
    assert (one.difference, one.ci_low, one.ci_high) == pytest.approx((2.6, 2.6 - 4.302653 * 0.1 / 3**0.5, 2.6 + 4.302653 * 0.1 / 3**0.5))
    equal = evidence.comparisons(rows("fedmpq-kd", (90.0,) * 3) + rows("fedmpq", (80.0,) * 3), PAIR).iloc[0]
    assert equal.p == 0 and equal.verdict == "undecided"


def test_pairs_are_matched_by_seed_and_not_by_place():
    shuffled = [record("fedmpq-kd", s, a) for s, a in zip((2, 0, 1), (84.9, 84.5, 84.7), strict=True)] + THREE[3:]
    assert evidence.comparisons(shuffled, PAIR).p[0] == pytest.approx(4.93e-4, abs=5e-7)
    other = THREE[:3] + [record("fedmpq", s, a) for s, a in enumerate((82.4, 81.8, 82.1))]
    assert evidence.comparisons(other, PAIR).p[0] == pytest.approx(9.24e-3, abs=5e-6)


def test_only_common_seeds_count():
    a = [record("fedmpq-kd", s, 85.0 + s / 10) for s in (0, 1, 2, 3, 9)]
    b = [record("fedmpq", s, 80.0) for s in (1, 2, 3, 4, 5)]
    one = evidence.comparisons(a + b, PAIR).iloc[0]
    assert (one.n, one.seeds, one.verdict) == (3, "1, 2, 3", "undecided") and one.difference == pytest.approx(5.2)
    none = evidence.comparisons(a[:1] + b, PAIR).iloc[0]
    assert none.n == 0 and math.isnan(none.difference) and none.verdict == "undecided"
    single = evidence.comparisons(a[1:2] + b, PAIR).iloc[0]
    assert single.n == 1 and single.difference == pytest.approx(5.1) and math.isnan(single.p) and single.verdict == "undecided"


def test_the_gate_is_holm_over_the_family():
    "A p between .025 and .05 passes alone, and fails as one of two claims."
    noisy = [4.0, 0.6, 3.5, 1.0, 1.5]
    a = rows("fedmpq-kd", [80 + d for d in noisy])
    b, c = rows("fedmpq", (80.0,) * 5), rows("qat-uniform", [80.2, 79.8, 80.1, 79.9, 80.0])
    alone = evidence.comparisons(a + b + c, PAIR).iloc[0]
    assert 0.025 < alone.p < 0.05 and alone.verdict == "fedmpq-kd higher"
    family = evidence.comparisons(a + b + c, PAIR + [("fedmpq", "qat-uniform")])
    assert family.p_holm[0] == pytest.approx(2 * family.p[0]) and family.verdict.tolist() == ["undecided", "undecided"]
    reverse = evidence.comparisons(a + b + c, [("fedmpq", "fedmpq-kd")]).iloc[0]
    assert reverse.verdict == "fedmpq-kd higher" and reverse.difference == pytest.approx(-alone.difference)


def test_default_claims_are_those_that_were_run():
    assert evidence.comparisons(THREE)[["a", "b"]].to_numpy().tolist() == [["fedmpq-kd", "fedmpq"]]
    assert evidence.comparisons(rows("fedavg", (1, 2))).empty
    with pytest.raises(ValueError, match="no record of fedavg, fedkd"): evidence.comparisons(THREE, [("fedkd", "fedavg")])


# beside the paper, reading, caption ---------------------------------------------------------------------------------------

def at(preset: str, seed: int, method: str, accuracy: float) -> dict:
    "A hand-made record with exactly the setting of a preset of Experiment 1."
    c = next(c for c in plan(EXPERIMENTS["exp1"], preset, seeds=seed) if c.method == method)
    return record(method, seed, accuracy, **{k: v for k, v in dataclasses.asdict(c).items() if k not in ("method", "seed")})


def test_the_published_setting_is_recognised():
    records = [at("paper", s, m, a) for m, a in (("fedavg", 87.5), ("fedmpq", 82.1), ("fedmpq-kd", 84.7)) for s in (0, 1)]
    beside = evidence.beside_the_paper(records).set_index(["subject", "quantity"])
    assert set(beside["other scale than the paper"]) == {""}
    gap = beside.loc[("fedmpq-kd - fedmpq", "gap to fedavg closed %")]
    assert gap["paper claims"] == 51 and gap["measured"] == pytest.approx(48.148148)  # 2.6 of 5.4
    assert beside.loc[("fedmpq", "AUC (sum)"), "measured"] == pytest.approx(50 * 82.1)
    assert beside.loc[("fedmpq", "MB/round"), "measured"] == pytest.approx(2.5)
    assert beside.loc[("fedmpq", "ECE %"), "paper claims"] == 4.9 and "fedpq" not in beside.index


@pytest.mark.parametrize("preset, apart", [("study", {"rounds", "train_images", "test_images"}), ("smoke", {"dataset", "model", "clients"})])
def test_other_scales_are_named(preset: str, apart: set):
    r = at(preset, 0, "fedmpq", 50.0)
    named = evidence.beside_the_paper([r])["other scale than the paper"].unique()
    assert len(named) == 1 and apart <= set(named[0].split(", "))
    assert evidence.scale_of(r) == f"exp1/{preset}" and f"preset exp1/{preset}." in evidence.caption([r])


def test_a_gap_that_is_not_there_cannot_be_closed():
    records = [at("study", 0, m, a) for m, a in (("fedavg", 80.0), ("fedmpq", 82.1), ("fedmpq-kd", 84.7))]
    beside = evidence.beside_the_paper(records).set_index(["subject", "quantity"])
    assert math.isnan(beside.loc[("fedmpq-kd - fedmpq", "gap to fedavg closed %"), "measured"])


def test_reading_of_three_seeds():
    said = evidence.reading(THREE)
    for part in ("84.70 ± 0.20 % (n=3)", "2.60 points ahead of `fedmpq`", "+2.60 points over 3 paired seeds", "p = 0.00049", "undecided",
                 "4.50 MB down and 1.00 MB up", "1.50 and 1.00 (+200.0 % down, +0.0 % up)", "10.0 % more time", "25 % of its weights",
                 "the regulariser alone none", "1 bit-width occurred in its layers (4)", "6 runs together took 60 s on a laptop (2 threads)"):
        assert part in said, part
    assert "demonstration" not in said and "qat-uniform" not in said and "nan" not in said


def test_reading_of_one_seed_is_a_demonstration():
    said = evidence.reading([THREE[0], THREE[3]])
    assert said.startswith("A single seed: a demonstration") and "cannot be tested: undecided" in said and "±" not in said
    assert "single seed of `fedavg`: a demonstration" in evidence.reading(THREE + [record("fedavg", 0, 90)])
    assert "nan" not in evidence.reading([record("fedavg", 0, 90)])


def test_reading_notices_what_did_not_happen():
    never = rows("fedmpq-kd", KD, kd=0.0) + THREE[3:]
    assert "No round of `fedmpq-kd` distilled anything" in evidence.reading(never)
    moved = evidence.reading(rows("fedmpq", PLAIN, lasso=0.002, bits=(3, 4, 5)))
    assert "the regulariser alone 0.2 %" in moved and "3 bit-widths occurred in its layers (3, 4, 5)" in moved
    elsewhere = evidence.reading(rows("fedmpq-kd", KD, device="a GPU") + THREE[3:])
    assert "its time cannot be compared" in elsewhere and "more time" not in elsewhere and "a GPU (2 threads) and a laptop" in elsewhere


@pytest.mark.parametrize("uniform, said", [
    ((82.0, 82.1, 82.2), "within the spread over seeds (0.30): as far as these seeds can tell it equals uniform quantisation"),
    ((80.0, 80.1, 80.2), "more than the spread over seeds (0.30)"), ((82.0,), "one seed cannot tell")])
def test_reading_compares_with_uniform_quantisation(uniform: tuple, said: str):
    assert said in evidence.reading(rows("fedmpq", PLAIN[:len(uniform)]) + rows("qat-uniform", uniform))


def test_caption_says_what_there_is():
    text = evidence.caption(THREE + [record("fedavg", 0, 90)])
    for part in ("1,000 training and 500 test images", "10 clients", "Dirichlet 0.5", "4 rounds of 1 local epoch, 4 bits a weight", "distillation weight 0.5 at",
                 "seeds 0, 1, 2 (n=3; fedavg n=1)", "fp32 on a laptop", "none (own setting)", "fp32 for fedavg, quantised for all others",
                 "mean of the last 4 rounds", "± is the standard deviation"): assert part in text, part
    assert "A single seed: a demonstration" in evidence.caption(THREE[:1])


# files --------------------------------------------------------------------------------------------------------------------

def test_equal_records_make_equal_files(tmp_path: Path):
    paths = evidence.write_outputs(THREE, tmp_path / "one", "exp1")
    assert [p.name for p in paths] == ["exp1.tex", "exp1_caption.tex", "exp1.md", "exp1.pdf"]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in paths), "nothing half-written is left"
    again = evidence.write_outputs(copy.deepcopy(THREE[::-1]), tmp_path / "two", "exp1")
    assert [p.read_bytes() for p in again[:-1]] == [p.read_bytes() for p in paths[:-1]], "the order of the records does not matter"
    pdf = paths[-1].read_bytes()
    assert evidence.write_outputs(THREE, tmp_path / "one", "exp1")[-1].read_bytes() == pdf
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"/Type3" not in pdf
    other = evidence.write_outputs(rows("fedmpq", (1, 2, 3)), tmp_path / "one", "exp1")
    assert other[-1].read_bytes() != pdf


def test_the_page_holds_table_caption_reading_and_claims(tmp_path: Path):
    text = evidence.write_outputs(THREE, tmp_path, "exp1")[2].read_text()
    assert evidence.to_markdown(evidence.table(THREE)) in text and evidence.caption(THREE) in text and evidence.reading(THREE) in text
    assert "| paper claims |" in text and "| verdict |" in text
    assert "paper claims" not in evidence.write_outputs(THREE, tmp_path, "exp2")[2].read_text()
