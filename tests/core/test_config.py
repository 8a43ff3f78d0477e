"What a run is known by: no committed record may lose its name, and no field says twice what it holds."
import dataclasses
import json
import math

import pytest
from conftest import ROOT

from fedmpqkd.core import config as core
from fedmpqkd.core.config import (
    PARTS,
    RunConfig,
    canonical,
    config_from,
    interval,
    plain,
    run_id,
    setting,
)


def committed() -> list[dict]:
    "Every record in results/."
    found = [json.loads(p.read_text()) for p in sorted((ROOT / "results").glob("exp*/*/*.json"))]
    found += [json.loads(p.read_text()) for p in sorted((ROOT / "results").glob("tuning/*/*/*.json"))]
    return [r for r in found if "config" in r]


def test_every_committed_record_keeps_its_id():
    records = committed()
    assert len(records) >= 137
    for r in records: assert run_id(config_from(r["config"]), r["data"]["fingerprint"]) == r["id"]


def test_a_field_that_is_added_later_changes_no_id():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(RunConfig):
        colour: str = setting("blue", "of the sky")

    for r in committed()[::9]:
        old = {k: v for k, v in r["config"].items()}
        assert canonical(Later(**old)) == canonical(config_from(old))
        assert json.loads(canonical(Later(**old, colour="red")))["colour"] == "red"


def test_the_parts_are_the_whole():
    names = [f.name for part in PARTS for f in dataclasses.fields(part)] + ["method"]
    assert len(set(names)) == len(names)
    assert set(names) == {f.name for f in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda f: f.name)
def test_every_field_explains_itself_and_refuses_what_it_does_not_allow(field):
    assert field.metadata["help"] and not field.metadata["help"].endswith(".")
    allowed = field.metadata["allowed"]
    if allowed is None: return
    assert allowed.holds(getattr(RunConfig(), field.name))
    wrong = "no such thing" if field.type is str else (-1.5,) if field.type == tuple[float, ...] else -1
    with pytest.raises(ValueError, match=rf"^{field.name}=.*: (must be|allowed are) "):
        RunConfig(**{field.name: wrong})


@pytest.mark.parametrize("text, inside, outside", [
    ("(0, 1]", [1e-9, 0.5, 1], [0, -0.1, 1.0001, math.nan]), ("[0, 1)", [0, 0.999], [1, -1e-9]),
    ("[0, inf)", [0, 1e300], [math.inf, -1, math.nan]), ("[0, inf]", [0, math.inf], [-1])])
def test_intervals(text, inside, outside):
    allowed = interval(text)
    assert all(allowed.holds(v) for v in inside) and not any(allowed.holds(v) for v in outside)


def test_values_arrive_in_any_dress():
    assert RunConfig(bits="2, 3,4", clients="3") == RunConfig(bits=[2, 3, 4], clients=3.0)
    assert RunConfig(prune_lsb="TRUE").prune_lsb is True
    assert RunConfig(teacher_frozen=0).teacher_frozen is False
    assert plain(RunConfig(dirichlet=math.inf))["dirichlet"] == "inf"
    with pytest.raises(ValueError, match="prune_lsb='maybe' is not of type bool"):
        RunConfig(prune_lsb="maybe")
    for wrong in ("abc", "4,x", "4;2"):
        with pytest.raises(ValueError, match=f"^bits='{wrong}': must be numbers, separated by commas$"):
            RunConfig(bits=wrong)


def test_the_first_thing_that_is_wrong_is_the_one_that_is_said():
    "Types, then bounds, then combinations."
    with pytest.raises(ValueError, match="rounds='x' is not of type int"):
        RunConfig(rounds="x", alpha=-1, bits=(1, 2))
    with pytest.raises(ValueError, match="alpha=-1.0: must be finite"): RunConfig(alpha=-1, bits=(1, 2))
    with pytest.raises(ValueError, match="bits has 2 budgets for 10 clients"): RunConfig(bits=(1, 2))
    assert core.RULES, "without rules nothing above was checked"
