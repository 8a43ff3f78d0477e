"""Build the site: every page as it was executed, the API reference, search.

    pip install -e '.[docs]'
    python nbs/_site/build.py            # build/site/index.html
    python nbs/_site/build.py --check    # warnings are errors, and every link must have an end

Hidden cells and directive lines are left out. Nothing is executed, nothing is fetched: figures are those that
the pages store.
"""
import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill  # noqa: F401  imports our plug-in, which cannot come first
from fastcore.docments import docments
from readme import DIRECTIVE, ROOT, pages

SITE = ROOT / "nbs" / "_site"
SOURCE, TARGET = ROOT / "build" / "site-source", ROOT / "build" / "site"
WINGS = ("core", "quant", "data", "models", "wire", "evaluate", "learn", "federation", "study", "report",
         "bench", "tools")
FRONT = re.compile(r"^- \w+: .*\n?", re.M)


def visible(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The notebook as a reader should see it."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown" and not cells: cell.source = FRONT.sub("", cell.source)
        if cell.cell_type == "code":
            marks = DIRECTIVE.findall(cell.source)
            if any(re.match(r"(hide|default_exp)\b", mark) for mark in marks): continue
            if any(re.match(r"echo:\s*false", m) for m in marks): cell.metadata["tags"] = ["remove-input"]
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            if not cell.source: continue
        if cell.cell_type != "raw": cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    return nb


def write_pages() -> dict[str, list[str]]:
    "Copy every page; returns the names of each wing's pages, '' for those at the top."
    found: dict[str, list[str]] = {}
    for path in pages():
        name = path.relative_to(ROOT / "nbs")
        target = SOURCE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = visible(nbformat.read(path, 4))
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = outside(cell.source, name)
            for data in (out.get("data", {}) for out in cell.get("outputs", ())):
                if "text/markdown" in data: data["text/markdown"] = outside(data["text/markdown"], name)
        nbformat.write(nb, target)
        found.setdefault("" if len(name.parts) == 1 else name.parts[0], []).append(str(name.with_suffix("")))
    return found


def outside(text: str, page: Path) -> str:
    "Links to files that are no pages lead to the repository; here they become plain words."
    def keep(link: re.Match) -> str:
        words, target = link[1], link[2].split("#")[0]
        inside = (ROOT / "nbs" / page.parent / target).resolve()
        if re.match(r"[a-z]+:", target) or not target or inside.suffix == ".ipynb": return link[0]
        return f"{words} (`{inside.relative_to(ROOT)}`)" if inside.exists() else words
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", keep, text)


def cell(text: object) -> str:
    "A cell of a Markdown table."
    return str(text).replace("|", "\\|").replace("\n", " ")


def reference(name: str, thing: object) -> str:
    "One function or class: signature, parameters with types, defaults, shapes and units."
    try: about, signature = docments(thing, full=True), str(inspect.signature(thing))
    except (TypeError, ValueError): return ""
    kind = "class" if inspect.isclass(thing) else "def"
    call = re.sub(r"<(?:class|function) '?([\w.]+)[^>]*>", r"\1", f"{kind} {name}{signature}")
    lines = [f"## `{name}`\n", inspect.getdoc(thing) or "", f"\n```python\n{call}\n```\n"]
    rows = [(k, v) for k, v in about.items() if v.docment and k != "self"]
    if rows: lines.append("| | | |\n| --- | --- | --- |")
    for key, value in rows:
        default = "" if value.default is inspect._empty else f" = `{cell(value.default)}`"
        lines.append(f"| {'returns' if key == 'return' else f'`{key}`'}{default} | "
                     f"`{cell(inspect.formatannotation(value.anno))}` | {cell(value.docment)} |")
    return "\n".join(lines) + "\n"


def exported(path: Path) -> list[str]:
    "The names in a module's `__all__`."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def write_reference() -> list[str]:
    "A page for each module; returns their names."
    names = []
    for wing in WINGS:
        for path in sorted((ROOT / "fedmpqkd" / wing).glob("[!_]*.py")):
            module = importlib.import_module(f"fedmpqkd.{wing}.{path.stem}")
            parts = [reference(name, getattr(module, name)) for name in exported(path)]
            text = f"# {wing}.{path.stem}\n\n{module.__doc__ or ''}\n\n" + "\n".join(p for p in parts if p)
            target = SOURCE / "api" / f"{wing}.{path.stem}.md"
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
            names.append(f"api/{wing}.{path.stem}")
    return names


def toctree(caption: str, names: list[str]) -> str:
    "A chapter of the sidebar."
    options = [":hidden:", f":caption: {caption}", ":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""])


def write_index(found: dict[str, list[str]], api: list[str]) -> None:
    "The README with the sidebar's chapters behind it."
    index = nbformat.read(SOURCE / "index.ipynb", 4)
    top = [name for name in found[""] if name != "index"]
    chapters = [toctree("Start", [n for n in top if not n.startswith("9")])]
    chapters += [toctree(wing.capitalize(), found[wing]) for wing in WINGS if wing in found]
    chapters += [toctree("Appendix", [n for n in top if n.startswith("9")]), toctree("Reference", api)]
    index.cells.append(nbformat.v4.new_markdown_cell("\n".join(chapters)))
    nbformat.write(index, SOURCE / "index.ipynb")


def main(args: list[str]) -> int:
    "Write the sources and let Sphinx draw them."
    for folder in (SOURCE, TARGET): shutil.rmtree(folder, ignore_errors=True)
    found = write_pages()
    write_index(found, write_reference())
    shutil.copy(SITE / "conf.py", SOURCE)
    shutil.copytree(SITE / "_static", SOURCE / "_static")
    strict = ["-W", "--keep-going", "-n"] if "--check" in args else []
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "2", *strict, SOURCE, TARGET]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
