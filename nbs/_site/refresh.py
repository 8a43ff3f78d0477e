"""Run the component notebooks in place and keep what they show.

    python nbs/_site/refresh.py                               # every page whose name begins with a digit
    python nbs/_site/refresh.py nbs/quant/05_quantize.ipynb   # these pages

Widgets are dropped from what is kept: their ids change at every run, and without a running kernel they
show nothing. Of a cell with the tag `picture` what its widget shows at first is kept in its place. Lines that
say how far a run is are dropped, too. A second run of the same pages changes no byte.
"""
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the kernel inherits it: sums in the same order, however many cores
os.environ.pop("MPLBACKEND", None)  # the pages keep their figures
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

import nbformat
from nbclient import NotebookClient
from readme import pages

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def component_pages() -> list[Path]:
    "The pages whose name begins with a digit, in all wings."
    return [p for p in pages() if p.name[0].isdigit()]


def is_passing(output: nbformat.NotebookNode) -> bool:
    "Is it a widget's view, or a line of progress?"
    return WIDGET in output.get("data", {}) or "fedmpqkd" in output.get("metadata", {})


def shown(output: nbformat.NotebookNode, state: dict) -> list[nbformat.NotebookNode]:
    "What a widget shows in its output areas, outermost first."
    todo, found = [output["data"][WIDGET]["model_id"]], []
    while todo:
        model = state[todo.pop(0)]["state"]
        drawn = [o for o in model.get("outputs", ()) if o["output_type"] == "display_data"]
        found += map(nbformat.from_dict, drawn)
        todo += [name.removeprefix("IPY_MODEL_") for name in model.get("children", ())]
    return found


def without_widgets(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "Drop widget views, or put what they show in their place; drop lines of progress and the widgets' state."
    state = nb.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})

    def kept(output: nbformat.NotebookNode, picture: bool) -> list[nbformat.NotebookNode]:
        if picture and WIDGET in output.get("data", {}): return shown(output, state)
        return [] if is_passing(output) else [output]

    for cell in nb.cells:
        if cell.cell_type != "code": continue
        picture = "picture" in cell.metadata.get("tags", ())
        cell.outputs = [o for output in cell.outputs for o in kept(output, picture)]
    return nb


def refresh(path: Path) -> None:
    "Execute one notebook in its own folder and write it back; a failing notebook is left as it was."
    nb = nbformat.read(path, 4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, coalesce_streams=True, timeout=600, kernel_name="python3", resources=where).execute()
    nbformat.write(without_widgets(nb), path)
    clean = Path(sys.executable).with_name("nbdev_clean")
    # execution counts, timestamps, kernel versions
    subprocess.run([clean, "--fname", path], cwd=path.parent, check=True)


def main(names: list[str]) -> int:
    "Refresh the named pages, or all; say which failed."
    failed = []
    for path in [Path(n).resolve() for n in names] or component_pages():
        try:
            refresh(path)
        except Exception as e:
            failed.append(path.name)
            print(f"{path.name} failed:\n{e}", file=sys.stderr)
        else:
            print(path.name)
    if failed: print("failed:", *failed, file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
