"""The axes of Experiment 3 at every scale, one of them really run, and the page of commands."""
import itertools
import json
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import papermill
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from test_experiments import papermill as run_papermill

from fedmpqkd.core.config import RunConfig, as_list
from fedmpqkd.federation.methods import RECIPES, difference
from fedmpqkd.report.axis_tables import (
    axis_comparisons,
    axis_latex,
    axis_markdown,
    axis_table,
    plot_axis,
    write_axis,
)
from fedmpqkd.study.axes import AXES, axis_points, run_axis
from fedmpqkd.study.examples import made_up_record
from fedmpqkd.study.experiments import EXPERIMENTS, Outcome, parse_fields, plan

torch.set_num_threads(1)

THREE = EXPERIMENTS["exp3"]
TINY = dict(clients=2, train_images=120, test_images=100)
CASES = list(itertools.product(AXES, THREE.presets))


def asked(axis: str, preset: str) -> dict[str, RunConfig]:
    "What each point asks for, before any method drops what it has no use for."
    base = {k: v for k, v in (THREE.fields | THREE.presets[preset]).items() if k not in ("methods", "seeds")}
    return {label: RunConfig(**base | {k: v for k, v in values.items() if k != "methods"})
            for label, values in axis_points(axis, preset).items()}


def planned(axis: str, preset: str) -> dict[str, dict[str, RunConfig]]:
    "Point -> method -> its run with seed 0."
    found = {}
    for label, values in axis_points(axis, preset).items():
        runs = plan(THREE, preset, values["methods"], 0,
                    **{k: v for k, v in values.items() if k != "methods"})
        found[label] = {run.method: run for run in runs}
        assert list(found[label]) == as_list(values["methods"])  # every method has a run of its own
    return found


@pytest.mark.parametrize("axis, preset", CASES)
def test_points_differ_in_the_fields_of_the_axis_and_in_nothing_else(axis: str, preset: str):
    wanted, runs = asked(axis, preset), planned(axis, preset)
    for one, other in itertools.combinations(runs, 2):
        fields = set(difference(wanted[one], wanted[other]))
        felt = [set(difference(runs[one][m], runs[other][m])) for m in set(runs[one]) & set(runs[other])]
        assert fields and set().union(*felt) == fields, (one, other)


@pytest.mark.parametrize("axis, field, values", [
    ("local_epochs", "local_epochs", [1, 2, 5]), ("bits", "bits", [(1,), (2,), (4,), (8,)]),
    ("dirichlet", "dirichlet", [0.1, 0.5, math.inf]),
    ("model", "model", ["resnet20", "mobilenetv2", "vit-small-4"]), ("clients", "clients", [10, 50, 100]),
    ("participation", "participation", [0.1, 0.5, 1]), ("dropout", "dropout", [0, 0.2]),
    ("label-noise", "label_noise", [0, 0.1, 0.2]),
    ("alpha", "alpha", [0.01, 0.03, 0.1, 0.3, 1]), ("temperature", "temperature", [1, 2, 4])])
def test_values_of_the_design(axis: str, field: str, values: list):
    points = planned("noise" if axis == "label-noise" else axis, "paper")
    assert [getattr(list(runs.values())[-1], field) for runs in points.values()] == values


def test_noise_begins_at_round_sixty_of_a_hundred():
    late = planned("noise", "paper")["mid-run"]["fedmpq-kd"]
    assert (late.rounds, late.noise_from, late.label_noise, late.noise_clients) == (100, 60, 0.2, 0.1)
    assert [axis_points("noise", "mini", rounds)["mid-run"]["noise_from"]
            for rounds in (0, 5, 20)] == [5, 3, 12]
    runs = [planned("noise", preset)["mid-run"]["fedavg"] for preset in THREE.presets]
    assert all(0 < run.noise_from < run.rounds for run in runs)


@pytest.mark.parametrize("preset", THREE.presets)
def test_warm_starts_have_a_teacher_from_the_first_round(preset: str):
    runs = {label: found["fedmpq-kd"] for label, found in planned("start", preset).items()}
    kinds = [(c.warm_start.split(":")[0], c.kd_warmup_rounds, c.bits) for c in runs.values()]
    assert kinds == [(k, w, (b,)) for b in (4, 2) for k, w in (("none", 1), ("fedavg", 0), ("public", 0))]


def test_heterogeneous_budgets_are_those_of_the_fedmpq_paper():
    for axis in ("budgets", "assignment"):
        run = planned(axis, "smoke")["heterogeneous"]["fedmpq"]
        assert run.bits == (2, 2, 4, 4, 4, 6, 6, 6, 8, 8) and run.clients == 10
    assert planned("budgets", "smoke")["equal"]["fedmpq"].bits == (sum(run.bits) / 10,)


@pytest.mark.parametrize("given, said", [
    (dict(axis="epochs"), "unknown axis 'epochs': did you mean local_epochs?"),
    (dict(axis="?"), "choose from " + ", ".join(AXES)),
    (dict(axis="bits", points="2,3"), "no point '3' at preset smoke; there are 1, 2, 4, 8"),
    (dict(axis="dirichlet", dirichlet=0.3), "axis='dirichlet' sets dirichlet itself"),
    (dict(axis="budgets", fields="clients=20"), "sets clients itself (as in clients=10)"),
    (dict(axis="optimizer", lr=0.1), "sets lr itself"),
    (dict(axis="alpha", preset="huge"), "allowed are auto, demo, smoke, mini, study, paper")])
def test_mistakes_are_said_before_anything_runs(given: dict, said: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        run_axis(**dict(preset="smoke", device="cpu", results_dir=str(tmp_path)) | given)
    assert said in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed, labels", [(0.1, ["0.1"]), (math.inf, ["inf"]), ("0.5,inf", ["0.5", "inf"]),
                                           ("", ["0.1", "0.5", "inf"])])
def test_points_as_papermill_passes_them(typed, labels: list[str]):
    assert list(axis_points("dirichlet", "study", points=typed)) == labels


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[str, Outcome]]:
    "Two points, two methods, one round, on digits; and once more, from records."
    folder = tmp_path_factory.mktemp("results")
    with ThreadPoolExecutor(1) as pool:
        first, second = (run_axis("local_epochs", "smoke", "1,2", "fedavg,fedmpq", device="cpu", seeds="0",
                                  rounds=1,
                                  results_dir=str(folder), executor=pool, **TINY) for _ in range(2))
    one, two = ([[r["id"] for r in o.records] for _, o in found] for found in (first, second))
    assert one == two
    assert len(list(folder.rglob("*_seed=0_*.json"))) == 4
    return first


def test_an_axis_runs(outcomes: list[tuple[str, Outcome]], tmp_path: Path):
    seen = {(label, r["config"]["method"]): r for label, o in outcomes for r in o.records}
    assert all(r["config"]["local_epochs"] == int(label) for (label, _), r in seen.items()) and len(seen) == 4
    for method in ("fedavg", "fedmpq"):  # twice the epochs are twice the steps
        assert seen["2", method]["curve"][0]["steps"] == 2 * seen["1", method]["curve"][0]["steps"] > 0
    means = axis_table(outcomes)["Accuracy %"]["mean"]
    assert means.to_dict() == {f"{label}: {method}": r["summary"]["accuracy"]
                               for (label, method), r in seen.items()}
    fresh = axis_table(outcomes)["Fresh norm. %"]["mean"].to_dict()
    assert fresh == {f"{label}: {method}": r["summary"]["accuracy_recalibrated"]
                     for (label, method), r in seen.items()}
    paths = write_axis("local_epochs", outcomes, tmp_path)
    assert [p.name for p in paths] == ["exp3_local_epochs.tex", "exp3_local_epochs.md",
                                       "exp3_local_epochs.pdf"]
    assert paths[2].read_bytes().startswith(b"%PDF") and "A single seed" in paths[1].read_text()


@pytest.fixture
def three_seeds() -> list[tuple[str, Outcome]]:
    "Accuracies that can be checked by heart: fedmpq leads at the first point, fedavg at the second."
    def point(label: str, **centres: float) -> tuple[str, Outcome]:
        found = [made_up_record(m, s, centre + s - 1.0, local_epochs=int(label))
                 for m, centre in centres.items()
                 for s in range(3)]
        return label, Outcome("exp3", "smoke", found, ROOT)
    return [point("1", fedavg=50, fedmpq=60), point("2", fedavg=90, fedmpq=80)]


def test_bold_is_decided_within_a_point(three_seeds: list[tuple[str, Outcome]]):
    rows = {row.split("|")[1].strip(): row.split("|")[3].strip()
            for row in axis_markdown(three_seeds).splitlines()[2:]}
    assert rows == {"1: fedavg": "50.00 ± 1.00", "1: fedmpq": "**60.00 ± 1.00**",
                    "2: fedavg": "**90.00 ± 1.00**", "2: fedmpq": "80.00 ± 1.00"}
    latex = axis_latex(three_seeds)
    body = latex.split("\\midrule\n", 1)[1].split("\\bottomrule")[0].splitlines()
    assert [line.split(" & ")[0] for line in body] == ["1: fedavg", "1: fedmpq", "\\midrule", "2: fedavg",
                                                       "2: fedmpq"]
    bold = [line.split(" & ")[2].startswith(r"$\mathbf{") for line in body if "&" in line]
    assert bold == [False, True, True, False] and latex.count("tabular") == 2


def test_points_are_compared_by_seed(three_seeds: list[tuple[str, Outcome]]):
    found = axis_comparisons(three_seeds)
    shown = found[["point", "a", "b", "n", "difference"]].to_numpy().tolist()
    assert shown == [["1", "fedavg", "fedmpq", 3, -10], ["2", "fedavg", "fedmpq", 3, 10]]
    assert set(found.verdict) == {"undecided"}  # three seeds are three seeds


def test_the_picture_shows_means_and_spreads(three_seeds: list[tuple[str, Outcome]]):
    ax = plot_axis(three_seeds, Figure().subplots())
    lines = {bars.get_label(): bars for bars in ax.containers}
    for method, means in dict(fedavg=[50, 90], fedmpq=[60, 80]).items():
        line, _, (spread,) = lines[method]
        assert line.get_xdata().tolist() == [0, 1] and line.get_ydata().tolist() == means
        assert [segment[:, 1].tolist()
                for segment in spread.get_segments()] == [[m - 1, m + 1] for m in means]
    alone = plot_axis(three_seeds[:1], Figure().subplots())
    assert [t.get_text() for t in alone.get_xticklabels()] == ["fedavg", "fedmpq"]


def listed_commands() -> list[str]:
    "The commands of the page, from its own code."
    names: dict = {}
    for cell in json.loads((ROOT / "nbs/91_commands.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), names)
    return list(names["COMMANDS"])


def test_every_listed_command_can_be_typed():
    "papermill's own inspection finds each parameter declared in the page, and all runs can be configured."
    commands, declared, reached = listed_commands(), {}, set()
    for text in commands:
        program, path, *words = shlex.split(text)
        assert program == "papermill" and words[::3] == ["-p"] * (len(words) // 3), text
        given, name = dict(zip(words[1::3], words[2::3], strict=True)), Path(path).stem
        if path not in declared: declared[path] = papermill.inspect_notebook(str(ROOT / path))
        assert set(given) <= set(declared[path]), text
        preset, methods, seeds, fields = (given.pop(key, "")
                                          for key in ("preset", "methods", "seeds", "fields"))
        if "axis" in given:
            points = axis_points(given.pop("axis"), preset, points=given.pop("points", ""))
        else: points = {"": dict(methods="")}
        for values in points.values():
            more = {k: v for k, v in values.items() if k != "methods"} | given | parse_fields(fields)
            reached |= {run.method for run in plan(EXPERIMENTS[name], preset, methods or values["methods"],
                                                   seeds, **more)}
    assert len(commands) > 60 and reached == set(RECIPES)


def test_experiment_3_through_papermill(tmp_path: Path):
    done = run_papermill(str(ROOT / "nbs/exp3.ipynb"), "-p", "axis", "dirichlet", "-p", "points", "0.5", "-p",
                         "methods", "fedavg,qat-uniform", "-p", "preset", "smoke",
                         "-p", "rounds", "1", "-p", "device", "cpu", "-p", "results_dir", str(tmp_path / "r"),
                         "-p", "fields", ",".join(f"{k}={v}" for k, v in TINY.items()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(p.read_text()) for p in (tmp_path / "r").rglob("*.json")]
    assert {(r["config"]["method"], r["config"]["dirichlet"])
            for r in records} == {("fedavg", 0.5), ("qat-uniform", 0.5)}
    (executed,) = (tmp_path / "runs").glob("exp3_axis=dirichlet*.ipynb")
    assert "| 0.5: qat-uniform | 1 |" in executed.read_text() and "exp3_dirichlet.tex" in executed.read_text()
