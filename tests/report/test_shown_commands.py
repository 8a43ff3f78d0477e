"The commands of page 93 compute what its tables show: no other seeds, and no other rows."
import json
import re

import pytest
from conftest import ROOT

from fedmpqkd.report.facts import by_plan, load_axis
from fedmpqkd.study.axes import axis_points
from fedmpqkd.study.experiments import EXPERIMENTS, plan


def shown(axis: str) -> dict[str, str]:
    "Parameters of the first command for an axis on the page."
    cells = json.loads((ROOT / "nbs" / "93_results.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    command = next(c for c in re.findall(r"`papermill nbs/exp3.ipynb ([^`]+)`", text) if f"axis {axis}" in c)
    return dict(re.findall(r"-p (\w+) (\S+)", command))


@pytest.mark.parametrize("axis", ["controls", "coding"])
def test_a_command_has_the_rows_and_seeds_of_its_table(axis):
    values = shown(axis)
    (point, fixed), = axis_points(axis, values["preset"]).items()
    wanted = {(c.method, c.seed) for c in plan(EXPERIMENTS["exp3"], values["preset"],
                                               values.get("methods", fixed["methods"]), values["seeds"])}
    own, _ = by_plan(load_axis(ROOT / "results", axis, values["preset"])[0])
    assert wanted == {(r["config"]["method"], r["config"]["seed"]) for r in own.records}, point
