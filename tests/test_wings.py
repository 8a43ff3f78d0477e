"The house: which wing may import which, read from the source, imports inside functions among them."
import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

WINGS = ("core", "quant", "data", "models", "wire", "evaluate", "learn", "federation", "study",
         "report", "bench", "tools")
PACKAGE = ROOT / "fedmpqkd"


def wing(module: str) -> str:
    "The wing of `fedmpqkd.wing.room`; the command line is one of the tools."
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "tools"


def imported(path: Path, package: Path) -> set[str]:
    "The modules of a package that a file imports, at its top or within a function."
    here = path.relative_to(package.parent).with_suffix("").parts
    files = package.rglob("*.py")
    known = {".".join(p.relative_to(package.parent).with_suffix("").parts) for p in files}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[:len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return found & known


@cache
def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    "Every module with what it imports."
    files = [p for p in package.rglob("*.py") if p.stem not in ("__init__", "_modidx")]
    names = [".".join(p.relative_to(package.parent).with_suffix("").parts) for p in files]
    return {name: imported(p, package) for name, p in zip(names, files, strict=True)}


def upward(arrows: dict[str, set[str]], order: tuple[str, ...]) -> list[str]:
    "Imports of a wing that lies above."
    floor = {name: number for number, name in enumerate(order)}
    return [f"{a} imports {b}" for a, targets in sorted(arrows.items()) for b in sorted(targets)
            if floor[wing(b)] > floor[wing(a)]]


def test_every_module_lives_in_a_wing():
    assert {wing(m) for m in graph()} == set(WINGS)
    assert sum(len(targets) for targets in graph().values()) > 100, "the reader of imports sees nothing"


def test_no_wing_imports_a_wing_above():
    assert upward(graph(), WINGS) == []


def test_no_circles():
    try: tuple(TopologicalSorter(graph()).static_order())
    except CycleError as circle: pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("text", ["from ..study.records import load",
                                  "def f():\n    from fedmpqkd.study import records",
                                  "import fedmpqkd.study.records"])
def test_an_upward_import_is_found(tmp_path: Path, text: str):
    "Also one that hides in a function."
    for name, source in {"core/config": text, "study/records": ""}.items():
        file = tmp_path / "fedmpqkd" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    found = upward(graph(tmp_path / "fedmpqkd"), WINGS)
    assert found == ["fedmpqkd.core.config imports fedmpqkd.study.records"]


def test_pages_and_tests_mirror_the_wings():
    for page in (ROOT / "nbs").rglob("[!_.]*.ipynb"):
        target = re.search(r"default_exp ([\w.]+)", page.read_text(encoding="utf-8"))
        if target and "." in target[1]: assert target[1].split(".")[0] == page.parent.name
    folders = {p.parent.name for p in (ROOT / "tests").rglob("test_*.py")} - {"tests"}
    assert folders <= {*WINGS, "browser"}  # which opens pages of every wing
