"The paper: rules, converter, facts, and that what is committed is what the records give."
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pypandoc = pytest.importorskip("pypandoc", reason="pandoc is not here: pip install 'fedmpqkd[paper]'")

from fedmpqkd.report import paper  # noqa: E402
from fedmpqkd.report.captions import caption  # noqa: E402
from fedmpqkd.report.evidence import to_markdown  # noqa: E402
from fedmpqkd.report.facts import (  # noqa: E402
    Fact,
    Study,
    all_facts,
    behind,
    by_plan,
    count,
    finding,
    load_axis,
    numbers,
    pair_facts,
    verdict_facts,
)
from fedmpqkd.report.fstq import fstq_pairs  # noqa: E402
from fedmpqkd.report.language import language_page, stored_language  # noqa: E402
from fedmpqkd.report.latex import to_content  # noqa: E402
from fedmpqkd.report.lowbit import augmentation_table, reading_of, stored_study  # noqa: E402
from fedmpqkd.report.rules import RULES, lint, lost_citations  # noqa: E402
from fedmpqkd.study.examples import made_up_record  # noqa: E402
from fedmpqkd.study.records import load_records  # noqa: E402

TEX = shutil.which("latexmk") and not subprocess.run(
    ["kpsewhich", "algpseudocode.sty", "subcaption.sty", "natbib.sty"], capture_output=True).returncode
ALL = (*paper.SECTIONS, paper.APPENDIX)
ROWS = "\\hline\na & b \\\\\n\\hline\n1 & 2 \\\\\n\\hline\n"
LONG = "word " * 20


def tabularx(columns: str = "Xr", width: str = "\\textwidth", rows: str = ROWS) -> str:
    return f"\\begin{{tabularx}}{{{width}}}{{{columns}}}\n{rows}\\end{{tabularx}}"


def figure(inside: str, place: str = "[H]") -> str:
    return f"\\begin{{figure}}{place}\n{inside}\n\\end{{figure}}"


def half(number: int, width: str = "\\linewidth", box: str = "0.48\\linewidth") -> str:
    return (f"\\begin{{subfigure}}{{{box}}}\\includegraphics[width={width}]{{ images/x_pair{number}.pdf }}"
            "\\end{subfigure}")


PLOT = "\\includegraphics[width=0.7\\linewidth]{ images/x.pdf }"
CODE = ("\\begin{algorithm}\n\\begin{algorithmic}[1]\n\\State \\(x_1 \\gets y\\)\n\\end{algorithmic}\n"
        "\\end{algorithm}")

# rule -> section, line of the fault, a text that breaks it, a text that does not
EXAMPLES = {
    "heading": ("results", 2, "Text.\n\\section{Results}", f"\\subsection{{What was found}}\n{LONG}"),
    "subsection-title": ("results", 1, f"\\subsection{{The results}}\n{LONG}",
                         f"\\subsection{{Costs}}\n{LONG}"),
    "subsection-length": ("results", 1, "\\subsection{Costs}\nLittle.",
                          f"\\subsection{{Costs}}\n{tabularx()}"),
    "list-marker": ("results", 2, "Text:\n- one", "Text: 5 - 3, and\n\\(-1\\) is negative"),
    "item-title": ("results", 2, "\\begin{itemize}\n\\item plain\n\\end{itemize}",
                   "\\begin{itemize}\n\\item \\textbf{Title}: text\n\\end{itemize}"),
    "table-environment": ("results", 1, "\\begin{tabular}{ll}\na & b\n\\end{tabular}", tabularx()),
    "table-columns": ("results", 1, tabularx("lr"), tabularx(">{\\raggedright\\arraybackslash}Xr")),
    "table-rules": ("results", 1, tabularx(rows=ROWS.replace("\\hline\n1", "1")), tabularx()),
    "pseudocode-place": ("results", 1, CODE, LONG),
    "pseudocode-case": ("method", 3, CODE.replace("State", "STATE"), CODE),
    "pseudocode-environment": ("method", 1, "\\State x", CODE),
    "figure-place": ("method", 1, figure(PLOT), LONG),
    "figure-float": ("results", 1, figure(PLOT, ""), figure(PLOT)),
    "figure-path": ("results", 2, figure(PLOT.replace("pdf", "png")), figure(PLOT)),
    "figure-width": ("results", 2, figure(PLOT.replace("0.7", "0.5")), figure(half(1) + half(2))),
    "figure-pair": ("results", 1, figure(half(1)), figure(half(1) + half(2))),
    "special-character": ("results", 2, "fine\ndata_set & 5 % of it", "data\\_set \\& 5 \\% of \\(x_1\\)"),
    "braces": ("results", 1, "\\textbf{bold", "\\textbf{bold} \\{ and \\}"),
    "dash": ("results", 1, "low–bit", "low-bit"),
    "letter": ("results", 1, "≤ 2 bits", "\\(\\leq\\) 2 bits, naïve"),
    "unfilled": ("results", 1, "{{exp1.n}} seeds", "3 seeds"),
    "citation": ("results", 1, "see [smith\\_2023\\_deep]", "see [smith_2023_deep] and \\cite{a_b}"),
    "message": ("results", 1, "[Unchanged]", "unchanged"),
}


def test_every_rule_has_examples():
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize("rule", EXAMPLES)
def test_a_rule_finds_what_breaks_it(rule: str):
    section, line, bad, good = EXAMPLES[rule]
    assert (rule, line) in [(f.rule, f.line) for f in lint(bad, section)]
    assert lint(good, section) == []


@pytest.mark.parametrize("bad, rule", [
    ("\\begin{abstract}", "heading"), ("\\documentclass{article}", "heading"), ("\\end{document}", "heading"),
    ("\\maketitle", "heading"), (f"\\subsection{{ }}\n{LONG}", "subsection-title"),
    (f"\\subsection{{Costs}}\n{LONG}\n\\subsection{{Costs}}\n{LONG}", "subsection-title"),
    ("• one", "list-marker"), ("* one", "list-marker"), (tabularx("|X|r|"), "table-columns"),
    (tabularx(width="8cm"), "table-environment"), (tabularx(rows="a & b \\\\\n\\hline\n"), "table-rules"),
    (tabularx(rows=ROWS.rsplit("\\hline", 1)[0]), "table-rules"),
    (figure(half(1, "0.48\\linewidth") + half(2)), "figure-width"),
    (figure(half(1, box="0.3\\linewidth") + half(2)), "figure-width"),
    ("5% of", "special-character"),
    ("cost $5", "special-character"), ("a ~ b", "special-character"), ("x^2", "special-character"),
    ("#1", "special-character"), ("a --- b", "dash"), ("−3.8", "dash"), ("a } b", "braces"),
    ("\\cite{a\\_b}", "citation"), ("{[}smith\\_2023\\_deep{]}", "citation"), ("```latex", "message")])
def test_other_ways_to_break_a_rule(bad: str, rule: str):
    assert rule in {f.rule for f in lint(bad)}


@pytest.mark.parametrize("good", [
    "Table~\\ref{tab:a_b} and \\cite{x-1, y_2}", "\\[ a_1 &= b^2 \\]", "% a comment with _ and #\ntext",
    "20 \\% and \\$5 \\#1 \\textasciitilde{} a\\^{}b", "p < 0.05 \\(\\{0.5, 1\\}\\)",
    "Adam (2015) - and others"])
def test_what_looks_like_a_fault_and_is_none(good: str):
    assert lint(good) == []


def test_the_published_example_of_a_conversion_breaks_few_rules():
    "Maths, an escaped percent, an itemize as the template's own output has them."
    text = ("lifts accuracy from 82.1 \\% to 84.7 \\% at \\(<10\\%\\) overhead \\cite{chen-2023-mixed}.\n\n"
            "\\subsection{Key contributions}\n\\begin{itemize}\n  \\item \\textbf{Diagnosis}: we analyse "
            "extreme (\\(\\leq 2\\)-bit) budgets with \\(L_{\\text{bit}}\\).\n\\end{itemize}")
    assert lint(text, "introduction") == []


# ---- the converter

@pytest.mark.parametrize("markdown, latex", [
    ("data_set, C&C, 5 %, #1, {a}, ~, ^", "data\\_set, C\\&C, 5 \\%, \\#1, \\{a\\}, \\textasciitilde, \\^{}"),
    ("teacher–student — and −3", "teacher-student - and \\(-3\\)"), ("a--b 1---2", "a-b 1-2"),
    ("gains +2.6 % (-1.5)", "gains \\(+2.6\\) \\% (\\(-1.5\\))"), ("exp-1 and 2-bit", "exp-1 and 2-bit"),
    ("λ_b ≤ 2×", "\\(\\lambda_b\\) \\(\\leq\\) 2\\(\\times\\)"), ("$x_1^2$ costs", "\\(x_1^2\\) costs"),
    ("as [vaswani_2017_attention], [a_b_1]", "as [vaswani_2017_attention], [a_b_1]"),
    ("\\cite{chen-2023-mixed} and \\cite{a_b, c-d}", "\\cite{chen-2023-mixed} and \\cite{a_b, c-d}"),
    ("**bold_1** and *it*", "\\textbf{bold\\_1} and \\emph{it}"), ("`teacher_norm='batch'`", None),
    ("It's \"so\"", "It's ``so''"), ("# Any level", "\\subsection{Any level}"), ("### Costs $T$", None),
    ("back\\\\slash", "back\\textbackslash slash"), ("", "")])
def test_tricky_words(markdown: str, latex: str | None):
    found = to_content(markdown)
    if latex is not None: assert found == latex
    assert [f for f in lint(found) if f.rule != "subsection-length"] == []


def test_lists_tables_and_nesting():
    items = to_content("- **A**: one\n- **B**: two _x_\n\n  more")
    assert items == ("\\begin{itemize}\n  \\item \\textbf{A}: one\n  \\item \\textbf{B}: two \\emph{x}\n\n"
                     "more\n\\end{itemize}")
    with pytest.raises(ValueError, match="cannot stand in a list"): to_content("- a\n  - b")
    table = to_content("| a_b | n |\n|---|--:|\n| 5 % | **-1** |\n|  | 2 |\n\n: Cap $T$. {#tab:x}")
    assert "\\begin{tabularx}{\\textwidth}{>{\\raggedright\\arraybackslash}Xr}" in table
    assert "\\textbf{a\\_b} & \\textbf{n} \\\\\n\\hline\n" in table
    assert "5 \\% & \\textbf{\\(-1\\)} \\\\\n & 2 \\\\\n\\hline" in table
    assert "\\caption{Cap \\(T\\).}\\label{tab:x}" in table
    assert lint(table) == []


def test_figures_take_their_width_from_their_name():
    single = to_content("![A *plot*](images/plot.pdf){#fig:a}")
    assert "\\begin{figure}[H]" in single and "[width=0.7\\linewidth]{ images/plot.pdf }" in single
    assert "\\caption{A \\emph{plot}}\\label{fig:a}" in single
    pair = to_content("![One](images/c_pair1.pdf)\n\n![Two](images/c_pair2.pdf)")
    inline = to_content("![One](images/c_pair1.pdf) ![Two](images/c_pair2.pdf)")
    both = "![One](images/c_pair1.pdf) ![Two](images/c_pair2.pdf)"
    block = to_content(f"::: {{.pair #fig:c}}\n{both}\n\nBoth.\n:::")
    assert pair == inline and pair.count("\\begin{subfigure}{0.48\\linewidth}") == 2
    assert "\\caption{Both.}\\label{fig:c}" in block
    for latex in (single, pair, block): assert lint(latex, "results") == []
    assert {f.rule for f in lint(single, "method")} == {"figure-place"}


def test_pseudocode():
    head = '```{.algorithm #alg:a caption="A round"}'
    text = head + "\n\\FOR{each $x$}\n\\STATE $y_1 \\gets x$\n\\ENDFOR\n```"
    latex = to_content(text)
    assert "\\For{each \\(x\\)}\n\\State \\(y_1 \\gets x\\)\n\\EndFor" in latex
    assert "\\caption{A round}\\label{alg:a}" in latex
    assert lint(latex, "method") == []
    assert {f.rule for f in lint(latex, "results")} == {"pseudocode-place"}


def test_citations_are_counted():
    source = "\\cite{a, b} and \\cite{a} and [x_2020_y]"
    assert lost_citations(source, to_content(source)) == []
    assert lost_citations(source, "\\cite{a, b}") == ["[x_2020_y]", "a"]


# ---- facts and tracing

@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    return all_facts(ROOT)


def study(gap: float, seeds: int, noise: float = 0.1) -> Study:
    "FedMPQ around 50 %, FedMPQ-KD a gap above it, with differences that scatter a little."
    records = [made_up_record(m, s, 50 + s + (gap + noise * (s % 2) if "kd" in m else 0)) | {"id": f"{s}"}
               for m in ("fedmpq", "fedmpq-kd") for s in range(seeds)]
    return Study("demo", "demo/mini", tuple(records))


def test_words_follow_the_verdict():
    up, down, few = study(3, 6), study(-3, 6), study(3, 3)
    assert finding(up).text.startswith("raises accuracy by 3.05 points")
    assert finding(down).text.startswith("lowers accuracy by 2.95 points")
    assert "too few pairs to decide" in finding(few).text
    assert "no difference" in finding(study(0, 6, 0)).text
    assert verdict_facts([up])["verdicts.sentence"].text == "One of the 1 paired comparisons is decided"
    assert "since all have fewer than five pairs" in verdict_facts([few])["verdicts.sentence"].text
    assert "; decided)" in pair_facts(up)["fedmpq-kd-vs-fedmpq.brief"].text


def test_a_comparison_names_the_pairs_alone_and_added_seeds_are_a_look_of_their_own():
    "Seven seeds of one method and five of the other are five pairs; seeds 5 and 6 were added to 0 to 4."
    whole = study(3, 7)
    fewer = tuple(r for r in whole.records if r["config"]["method"] == "fedmpq-kd" or r["config"]["seed"] < 5)
    uneven = Study("demo.base", "demo/mini", fewer)
    assert len(uneven.files()) == 12 and len(uneven.files("fedmpq-kd")) == 7
    assert uneven.files("fedmpq", "fedmpq-kd") == study(3, 5).files()
    assert uneven.same("fedmpq", "fedmpq-kd") == study(3, 5).same("fedmpq", "fedmpq-kd")
    own, more = by_plan(whole)
    assert own == study(3, 5) and own.name == "demo"
    assert [r["config"]["seed"] for r in more.records] == [5, 6, 5, 6]
    row = pair_facts(more)["fedmpq-kd-vs-fedmpq.n"]
    assert row.text == "2" and row.records == more.files()
    assert by_plan(study(3, 5))[1].records == ()


def test_numbers_of_a_text():
    assert numbers("-1.71 points, 4,000 images, p = 5e-4, n=3") == ["-1.71", "4000", "5e-4", "3"]
    assert count(3) == "three" and count(16) == "16"


def test_a_number_leads_to_its_records(facts):
    number = facts["exp1.fedmpq.accuracy_mean"].text
    found = paper.trace(number, ROOT, facts)
    assert {t.section for t in found} >= {"results"}
    records = {file for t in found if t.placeholder.startswith("exp1.") and "fedmpq" in t.placeholder
               for file in t.records}
    assert records == set(facts["exp1.fedmpq.accuracy"].records)  # of this row alone, not of the whole table
    mean = [json.loads((ROOT / "results" / file).read_text())["summary"]["accuracy"] for file in records]
    assert f"{sum(mean) / len(mean):.2f}" == number
    assert any(t.placeholder.startswith("exp1.table.quality[fedmpq, ") for t in found)
    assert "The -KD ablation" in paper.trace("82.0", ROOT, facts)[0].how
    assert paper.trace("31415", ROOT, facts) == []


def test_every_fact_names_records_that_are_there(facts):
    for name, fact in facts.items():
        if name.startswith(("exp1.", "exp2.", "start.", "statistics.")) and not name.endswith(".points"):
            assert fact.records, name
            assert all((ROOT / "results" / file).is_file() for file in fact.records), name


def test_the_audit_by_hand(facts):
    "Numbers worked out on paper."
    known = {"gap": "48.1", "auc_mean": "84.8", "parameters": "272,474", "round_mb": "21.8",
             "welch_p": "0.0005", "sign_flip_floor": "0.25", "mobilenet_mib": "1.37",
             "mobilenet_head_mib": "1.92", "logits_mib": "38.1", "epochs": "30"}
    assert {name: facts[f"audit.{name}"].text for name in known} == known


# ---- sections

@pytest.mark.parametrize("name", ALL)
def test_no_number_is_typed_and_every_placeholder_resolves(name: str, facts):
    source = paper.read_section(ROOT, name)
    assert paper.typed_numbers(source) == []
    assert [p for _, p in paper.placeholders(source) if p not in facts] == []


def test_typed_numbers_are_found():
    text = "ResNet-20 and CIFAR-100 in Experiment 2, $2^b$, `fp32`, {{exp1.n}}\ngain 2.6 points in $0.5 x$"
    assert paper.typed_numbers(text) == [(2, "2.6"), (2, "0.5")]


def test_an_unknown_placeholder_says_where(facts):
    with pytest.raises(KeyError, match="abstract, line 2: there is no fact.*near: exp1.fedmpq.accuracy"):
        paper.fill("a\n{{exp1.fedmpq.acuracy}}", facts, "abstract")


def test_every_printed_number_can_be_traced(facts):
    for name in ALL:
        for _, placeholder in paper.placeholders(paper.read_section(ROOT, name)):
            for number in numbers(facts[placeholder].text):
                assert list(behind(facts[placeholder], number, placeholder)), (placeholder, number)


def test_committed_sections_are_what_the_records_give(facts):
    latex = paper.sections(ROOT, facts)
    folder = ROOT / "paper" / "generated"
    for name in ALL:
        committed = (folder / "sections" / f"{name}.tex").read_text(encoding="utf-8")
        assert committed.split("\n", 1)[1].strip() == latex[name], f"{name} is stale: run build()"
    shown = json.loads((folder / "sections.json").read_text(encoding="utf-8"))
    assert list(shown) == list(paper.SECTIONS) and shown == {n: latex[n] for n in paper.SECTIONS}


def test_committed_data_of_figures_are_what_the_records_give():
    for path, data in paper.generated(ROOT).items():
        if path.endswith(".csv"): assert (ROOT / "paper" / path).read_bytes() == data, path
        if path.endswith(".pdf"): assert (ROOT / "paper" / path).is_file()


def test_committed_tables_are_what_the_records_give():
    "A table that was written before its records moved names a folder that holds other runs."
    folder = ROOT / "paper" / "generated"
    for axis in ("start", "statistics"):
        text = (folder / f"exp3_{axis}.md").read_text(encoding="utf-8")
        assert caption(load_axis(ROOT / "results", axis)[0].runs) in text, f"exp3_{axis}.md is stale"
    for name, preset in (("exp4", "study"), ("exp4_cifar100", "cifar100")):
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        for part in (to_markdown(augmentation_table(stored_study(preset))), reading_of(stored_study(preset))):
            assert part.strip() in text, f"{name}.md is stale"
    for name in ("exp5", "exp5-arc"):
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        stored = language_page(stored_language(name))
        assert sorted(text.splitlines()) == sorted(stored.splitlines()), f"{name}.md is stale"
    table = fstq_pairs(load_records(ROOT / "results", "exp7", "study-labels"))
    assert to_markdown(table).strip() in (folder / "exp7-labels.md").read_text(encoding="utf-8")


def test_the_text_changes_with_the_records(facts):
    changed = facts | {"exp1.fedmpq.accuracy": Fact("99.99 ± 0.01", "made up")}
    assert "99.99 \\(\\pm\\) 0.01" in paper.sections(ROOT, changed)["results"]


def test_a_broken_section_stops_the_build(facts, tmp_path: Path):
    shutil.copytree(ROOT / "paper" / "sections", tmp_path / "paper" / "sections")
    path = tmp_path / "paper" / "sections" / "conclusion.md"
    path.write_text(path.read_text() + "\nIt gains 2.6 %.\n\n- plain item\n")
    with pytest.raises(ValueError, match="typed-number.*\n.*item-title"): paper.sections(tmp_path, facts)


# ---- references and LaTeX

def test_references_are_complete_and_cited_keys_exist():
    text = (ROOT / "paper" / "refs.bib").read_text(encoding="utf-8")
    entries = {m[2]: (m[1], m[3]) for m in re.finditer(r"@(\w+)\{([\w-]+),(.*?)\n\}", text, re.S)}
    needed = {"article": {"journal"}, "inproceedings": {"booktitle"}, "techreport": {"institution"}}
    for key, (kind, body) in entries.items():
        fields = set(re.findall(r"^\s*(\w+)\s*=", body, re.M))
        assert fields >= {"author", "title", "year"} | needed[kind], key
    sources = "".join(paper.read_section(ROOT, name) for name in ALL)
    cited = {key.strip() for m in re.finditer(r"\\cite\{([^}]*)\}", sources) for key in m[1].split(",")}
    assert cited <= set(entries)
    assert {"chen-2023-mixed", "ryabinin-2021-moshpit"} <= cited


def test_complaints_of_a_log():
    log = ("LaTeX Warning: Reference `x' on page 1 undefined on input line 3.\n"
           "Overfull \\hbox (0.5pt too wide)\nOverfull \\hbox (12.3pt too wide) in paragraph\n"
           "Underfull \\hbox\n")
    assert [line[:8] for line in paper.complaints(log)] == ["LaTeX Wa", "Overfull"]


@pytest.mark.slow
@pytest.mark.skipif(not TEX, reason="LaTeX (latexmk, algpseudocode, subcaption, natbib) is not here")
def test_it_compiles(tmp_path: Path):
    pdf = paper.compile_paper(ROOT / "paper", tmp_path / "build")
    assert pdf.read_bytes()[:5] == b"%PDF-"
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True).stdout
        assert "FedMPQ-KD" in text and "[?]" not in text and "??" not in text


@pytest.mark.skipif(not shutil.which("chktex"), reason="chktex is not here")
def test_chktex_is_silent():
    "But for what the template asks for: \\hline, ASCII hyphens, plain spaces before citations."
    files = [ROOT / "paper" / "main.tex", *sorted((ROOT / "paper" / "generated" / "sections").glob("*.tex"))]
    command = ["chktex", "-q", "-I0", "-n1", "-n2", "-n8", "-n44"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert "Warning" not in done.stdout and "Error" not in done.stdout, done.stdout
