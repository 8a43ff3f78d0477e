"""Write README.md from nbs/index.ipynb.

    python nbs/_site/readme.py            # write it
    python nbs/_site/readme.py --check    # exit 1 and show the difference if it is not current

Cells marked `#| hide` and directive lines are left out, and so is the code (not the output) of a cell
with `#| echo: false`. What a cell shows follows it as Markdown or plain text; a figure becomes a file in
nbs/images, with the text of `#| fig-alt:`. Links that are relative to nbs/ are made relative to the root.
What follows the cell END is for the page only.
"""
import base64
import difflib
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(.*?)[ \t]*(?:\n|$)", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|[#/])([^)\s]+)")
END = "<!-- README ends here -->"
NOTE = "<!-- Written from nbs/index.ipynb by nbs/_site/readme.py: edit the notebook. -->\n\n"


def pages() -> list[Path]:
    "Every notebook of the project, in all wings, sorted by its page number."
    def hidden(path: Path) -> bool: return any(part[0] in "._" for part in path.relative_to(ROOT).parts)
    return sorted((p for p in (ROOT / "nbs").rglob("*.ipynb") if not hidden(p)), key=lambda p: p.name)


def from_root(text: str) -> str:
    "Relative links of a page in nbs/, as seen from the root: `quant/05_quantize.ipynb` and `../LICENSE`."
    def move(link: re.Match) -> str:
        target = link[2]
        return link[1] + (target[3:] if target.startswith("../") else f"nbs/{target}")
    return LINK.sub(move, text)


def shown(output: NotebookNode, cell: NotebookNode) -> NotebookNode:
    "Keep the Markdown of an output, or else its figure or its text: GitHub runs no scripts and drops styles."
    if "data" in output:
        data = output.data
        if "image/png" in data:
            alt = re.search(r"fig-alt:[ \t]*(.+)", cell.metadata.get("directives", ""))
            data = {"text/markdown": f"![{alt[1] if alt else ''}](images/{cell.id}.png)"}
        markdown = {"text/markdown": from_root(data["text/markdown"])} if "text/markdown" in data else None
        output.data = NotebookNode(markdown or {"text/plain": data.get("text/plain", "")})
    return output


def code_cell(cell: NotebookNode) -> NotebookNode | None:
    "A code cell without directives and noise; None if it is hidden."
    directives = DIRECTIVE.findall(cell.source)
    if any(re.match(r"(hide|default_exp)\b", d) for d in directives): return None
    cell.metadata["directives"] = "\n".join(directives)
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    kept = [o for o in cell.outputs if o.output_type != "error" and o.get("name") != "stderr"]
    cell.outputs = [shown(output, cell) for output in kept]
    if any(re.match(r"echo:\s*false", d) for d in directives):
        cell.metadata["tags"] = ["no-input"]
    return cell if cell.source else None


def page(nb: NotebookNode) -> NotebookNode:
    "The notebook as a reader should see it."
    cells = []
    for cell in nb.cells:
        if cell.source == END: break
        if cell.cell_type == "markdown": cell.source = from_root(cell.source)
        if cell.cell_type == "code": cell = code_cell(cell)
        if cell is not None and cell.cell_type != "raw": cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; code fences are named after it
    return nb


def readme(index: Path) -> str:
    "The README's text."
    tags = {"enabled": True, "remove_input_tags": {"no-input"}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=tags))
    text, _ = exporter.from_notebook_node(page(nbformat.read(index, 4)))
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def figures(index: Path) -> dict[Path, bytes]:
    "The pictures that the README shows, by their files."
    found = {}
    for cell in nbformat.read(index, 4).cells:
        if cell.source == END: break
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                found[index.parent / "images" / f"{cell.id}.png"] = base64.b64decode(output.data["image/png"])
    return found


def main(
    args: list[str],  # of the command
    index: Path = ROOT / "nbs" / "index.ipynb",  # read
    target: Path = ROOT / "README.md",  # written, or compared
) -> int:  # exit code
    "Write the README, or with --check show how it differs."
    new, drawn = readme(index), figures(index)
    if "--check" not in args:
        target.write_text(new, encoding="utf-8")
        for path, picture in drawn.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture)
        return 0
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), target.name, index.name, lineterm="")
    for line in lines: print(line)
    stale = [p.name for p, picture in drawn.items() if not p.exists() or p.read_bytes() != picture]
    for name in stale: print(f"{name} is not the figure of {index.name}")
    return int(old != new or bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
