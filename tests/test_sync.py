"""The package is what the notebooks say, and the pages are what a reader should find. No test needs git."""
import ast
import filecmp
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import BIN, ROOT

sys.path.insert(0, str(ROOT / "nbs" / "_site"))
import readme  # noqa: E402
import refresh  # noqa: E402
from test_wings import WINGS  # noqa: E402

NOTEBOOKS = readme.pages()
COMPONENTS = [p for p in NOTEBOOKS if p.stem[0].isdigit()]
EXPERIMENTS = [p for p in NOTEBOOKS if re.fullmatch(r"exp\d+", p.stem)]
MODULES = sorted(ROOT.glob("fedmpqkd/**/*.py"))
BARE_WINGS = ("core", "quant", "data", "models", "wire", "learn", "evaluate", "federation", "study")
BARE = sorted(p for wing in BARE_WINGS for p in (ROOT / "fedmpqkd" / wing).glob("[!_]*.py"))
ON_A_BARE_MACHINE = {
    "fedmpqkd", "numpy", "torch", "torchvision", "timm", "pandas", "pyarrow", "PIL", "tqdm"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path: Path, kind: str = "") -> list[dict]:
    "The cells of a notebook, all or of one kind, their source as one string."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if kind in c["cell_type"]]


def code_lines(source: str) -> list[str]:
    "Lines that are neither blank nor a directive."
    return [s for s in source.splitlines() if s.strip() and not re.match(r"\s*#\s*\|", s)]


def modules_of_notebooks() -> set[str]:
    "What the notebooks export."
    sources = [c["source"] for p in NOTEBOOKS for c in cells(p, "code")]
    return {name for s in sources for name in re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", s, re.M)}


def test_package_is_exported(copy: Path):
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
    names = [str(p.relative_to(copy / "fedmpqkd")) for p in (copy / "fedmpqkd").rglob("*.py")]
    assert set(names) == {str(p.relative_to(ROOT / "fedmpqkd")) for p in MODULES}
    _, differ, missing = filecmp.cmpfiles(ROOT / "fedmpqkd", copy / "fedmpqkd", names, shallow=False)
    assert not differ + missing, "run nbdev_export"


def test_notebooks_are_clean(copy: Path):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    stale = [p.name for p in NOTEBOOKS if p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()]
    assert not stale, "run nbdev_clean"


def test_every_module_has_a_notebook():
    by_hand = {"__init__", "_modidx"}
    found = [p.relative_to(ROOT / "fedmpqkd").with_suffix("") for p in MODULES if p.stem not in by_hand]
    assert {".".join(p.parts) for p in found} == modules_of_notebooks()


def test_every_page_is_seen():
    "In every wing; a tool that looks at one level only would see a handful."
    assert len(NOTEBOOKS) == sum("_site" not in p.parts for p in (ROOT / "nbs").rglob("[!_.]*.ipynb")) >= 50
    assert refresh.component_pages() == COMPONENTS


@pytest.mark.parametrize("path", BARE, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_core_modules_import_on_a_bare_machine(path: Path):
    "At their top these modules import what a training machine has, and nothing for drawing or for notebooks."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    # not our own modules, whose imports are relative
    found |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert {f.split(".")[0] for f in found} - set(sys.stdlib_module_names) <= ON_A_BARE_MACHINE


@each
def test_title_cell_is_alone(path: Path):
    "Title, subtitle and `- key: value` lines: anything else here would vanish from the module's docstring."
    lines = [s for s in cells(path, "markdown")[0]["source"].splitlines() if s.strip()]
    assert re.match(r"# \S", lines[0])
    assert len(lines) > 1 and lines[1].startswith("> "), "the title wants a subtitle: > one line"
    assert all(re.match(r"- \w+: \S", s) for s in lines[2:])


@each
def test_cells_have_names_of_their_own(path: Path):
    "The exported package names the cells, so that each needs one id, kept for ever."
    ids = [c["id"] for c in cells(path)]
    assert len(set(ids)) == len(ids)


def is_export(source: str) -> bool:
    "Does the cell go into the package?"
    return bool(re.search(r"^#\s*\|\s*export", source, re.M))


def only_imports(source: str) -> bool:
    "A list of imports is as long as it is."
    return all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(source).body)


@each
def test_code_cells_are_short(path: Path):
    "At most 25 lines; a longer cell gives its reason in a comment that begins with `# long:`."
    sources = [c["source"] for c in cells(path, "code")]
    sources = [s for s in sources if "# long:" not in s and not only_imports(s)]
    assert max((len(code_lines(s)) for s in sources), default=0) <= 25


@each
def test_functions_are_used_where_they_are_defined(path: Path):
    "At most three exported cells without a cell that uses, prints or draws; import cells do not count."
    run = longest = 0
    for source in (c["source"] for c in cells(path, "code") if not only_imports(c["source"])):
        run = run + 1 if is_export(source) else 0
        longest = max(longest, run)
    assert longest <= 3


@each
def test_what_is_shown_is_the_same_everywhere(path: Path):
    "No widget state, no machine's paths and no addresses in the committed outputs."
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    text = json.dumps([c["outputs"] for c in cells(path, "code")])
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert refresh.WIDGET not in text
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/\S*| at 0x[0-9a-f]+", text)


def test_a_reader_without_a_kernel_sees_what_the_widgets_show():
    "Each cell of the page of widgets stores a drawing, but for the run that nobody has started."
    found = [c for c in cells(ROOT / "nbs" / "explore.ipynb", "code")
             if re.search(r"interact\(|w\.explorer\(", c["source"])]
    kinds = [next(iter({"image/png", "text/html"} & set(c["outputs"][0]["data"]))) for c in found]
    assert kinds == ["image/png"] * 5 + ["text/html"]
    assert "<svg" in "".join(found[-1]["outputs"][0]["data"]["text/html"])


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_pages_explain_their_code(path: Path):
    words = sum(len(c["source"].split()) for c in cells(path, "markdown"))
    lines = sum(len(code_lines(c["source"])) for c in cells(path, "code"))
    assert words >= lines, f"{words} words for {lines} lines of code"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_take_parameters(path: Path):
    "Without the tag papermill would put the parameters on top, where the notebook's defaults overwrite them."
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    raw = [c["source"] for c in cells(path, "raw")]
    assert raw == ["---\nskip_exec: true\n---"], "nbdev_test would run the experiment"
    names = [n.target.id for n in ast.parse(tagged[0]["source"]).body]
    seen = list(papermill.inspect_notebook(str(path)))
    assert seen == names, "papermill skips a line with '=' or ':' in its comment"


LINK = re.compile(r"(?<!!)\[[^]]*\]\((?![a-z]+:|#)([^)#\s]+)")  # relative ones, without the part behind '#'


def broken_links(text: str, folder: Path) -> list[str]:
    "Relative links of a Markdown text that point to nothing."
    return [target for target in LINK.findall(text) if not (folder / target).exists()]


def test_a_broken_link_is_found(tmp_path: Path):
    (tmp_path / "there.md").touch()
    text = "[a](there.md#part) [b](gone.md) [c](https://example.org) [d](#here)\n[two\nlines](gone/too.ipynb)"
    assert broken_links(text, tmp_path) == ["gone.md", "gone/too.ipynb"]


@each
def test_links_point_to_files(path: Path):
    text = "\n\n".join(c["source"] for c in cells(path, "markdown"))
    assert broken_links(text, path.parent) == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_front_door_point_to_files(name: str):
    assert broken_links((ROOT / name).read_text(encoding="utf-8"), ROOT) == []


def test_the_map_shows_every_page():
    "Each page is linked from the index; the wings stand in the order in which they may import one another."
    text = "\n".join(c["source"] for c in cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    linked = {(ROOT / "nbs" / target).resolve() for target in LINK.findall(text)}
    assert set(NOTEBOOKS) - linked <= {ROOT / "nbs" / "index.ipynb"}
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.M)) == WINGS


def test_readme_is_current():
    if not (ROOT / "README.md").exists(): pytest.skip("README.md is not written yet")
    assert readme.main(["--check"]) == 0, "run python nbs/_site/readme.py"


def test_readme_fits_on_a_screen_or_two():
    "At most 6 kB, with one figure; what is longer belongs on the page of results."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"^!\[.+\]\(nbs/images/\w+\.png\)$", text, re.M)
    assert len(text.encode()) <= 6000 and len(figures) == 1


def test_readme_shows_what_a_reader_needs(tmp_path: Path):
    new = nbformat.v4
    shown, table = {"text/plain": "plain", "text/html": "<b>html</b>"}, {"text/markdown": "|a|"}
    nb = new.new_notebook()
    nb.cells = [
        new.new_code_cell("#| hide\nimport secret"),
        new.new_markdown_cell(
            "# Title\n\n"
            "[page](quant/05_quantize.ipynb) [file](../LICENSE) [web](https://example.org) [here](#x)"),
        new.new_code_cell("#| eval: false\nf[0](y)", outputs=[new.new_output("display_data", data=shown)]),
        new.new_code_cell("#| echo: false\ntable()", outputs=[new.new_output("display_data", data=table)]),
        new.new_code_cell("go()", outputs=[new.new_output("stream", name="stderr", text="a warning")]),
        new.new_code_cell("#| echo: false\n#| fig-alt: a curve\nplot()", id="abc",
                          outputs=[new.new_output("display_data", data={"image/png": "aGVsbG8=\n"})]),
        new.new_markdown_cell(readme.END), new.new_markdown_cell("for the page only"),
    ]
    index, target = tmp_path / "index.ipynb", tmp_path / "README.md"
    nbformat.write(nb, index)
    assert readme.main(["--check"], index, target) == 1
    assert readme.main([], index, target) == 0 and readme.main(["--check"], index, target) == 0
    assert target.read_text() == readme.NOTE + (
        "# Title\n\n"
        "[page](nbs/quant/05_quantize.ipynb) [file](LICENSE) [web](https://example.org) [here](#x)\n\n"
        "```python\nf[0](y)\n```\n\n    plain\n\n|a|\n\n```python\ngo()\n```\n\n"
        "![a curve](nbs/images/abc.png)\n")
    assert (tmp_path / "images" / "abc.png").read_bytes() == b"hello"
    (tmp_path / "images" / "abc.png").write_bytes(b"another")
    assert readme.main(["--check"], index, target) == 1


def test_refresh_twice_changes_nothing(copy: Path):
    "A page that shows a number, a widget and an execution count; run twice, only the number is left."
    new, kernel = nbformat.v4, {"name": "python3", "language": "python", "display_name": "python3"}
    nb = new.new_notebook(metadata={"kernelspec": kernel})
    nb.cells = [new.new_code_cell("import ipywidgets\n6 * 7"), new.new_code_cell("ipywidgets.IntSlider()")]
    path = copy / "nbs" / "99_tmp.ipynb"
    nbformat.write(nb, path)
    refresh.refresh(path)
    once = path.read_bytes()
    refresh.refresh(path)
    assert path.read_bytes() == once
    first, second = cells(path)
    assert first["outputs"][0]["data"]["text/plain"] == ["42"] and first["execution_count"] is None
    assert second["outputs"] == []
    nb.cells = [new.new_code_cell("ipywidgets.VBox([ipywidgets.Label('x'), out := ipywidgets.Output()])\n"
                                  "with out: display({'image/png': 'AAAA'}, raw=True)\nout",
                                  metadata={"tags": ["picture"]})]
    nb.cells[0].source = "import ipywidgets\nfrom IPython.display import display\n" + nb.cells[0].source
    nbformat.write(nb, path)
    refresh.refresh(path)
    assert [o["data"] for o in cells(path)[0]["outputs"]] == [{"image/png": "AAAA"}]


def test_the_readme_installs_the_pytorch_that_the_constraints_keep():
    "Another version would be replaced in the next line, by one with CUDA."
    pins = set((ROOT / "constraints.txt").read_text().split())
    named = re.findall(r"\btorch(?:vision)?==[\d.]+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) == 2 and set(named) <= pins
