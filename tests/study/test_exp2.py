"""The notebook of Experiment 2, once from the command line, at the smallest scale."""
import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from fedmpqkd.federation.rounds import participants
from fedmpqkd.study.experiments import EXPERIMENTS, plan


def shown(notebook: Path) -> str:
    "Everything that the cells of an executed notebook put out."
    outputs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", "")) + "".join("".join(v) for k, v in o.get("data", {}).items()
                                                          if k.startswith("text/")) for o in outputs)


def test_high_distillation_weight_from_the_command_line(tmp_path: Path):
    words = [str(ROOT / "nbs/exp2.ipynb"), "-p", "alpha", "1.0", "-p", "preset", "smoke", "-p", "methods",
             "fedmpq,fedmpq-kd", "-p", "rounds", "1",
             "-p", "results_dir", str(tmp_path / "r"), "-p", "fields",
             "train_images=120,test_images=60,kd_warmup_rounds=0"]
    program = str(Path(sys.executable).with_name("papermill"))
    done = subprocess.run([program, *words], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KeyboardInterrupt" not in done.stdout + done.stderr  # of a kernel that is shut down at the end
    records = {r["config"]["method"]: r
               for r in (json.loads(p.read_text())
                         for p in (tmp_path / "r" / "exp2" / "smoke").glob("*.json"))}
    assert {m: r["config"]["alpha"] for m, r in records.items()} == {"fedmpq": 0.0, "fedmpq-kd": 1.0}
    for r in records.values():
        assert (r["config"]["clients"], r["config"]["participation"], r["config"]["dropout"],
                r["config"]["local_epochs"]) == (4, 0.75, 0.34, 2)
        assert [(line["sampled"], line["arrived"])
                for line in r["curve"]] == [(3, 2)]  # three of four, and one of these fails
        attacked = r["robustness"]["attacks"]["deployed"]
        assert set(attacked) == {"fgsm 1/255", "fgsm 2/255", "fgsm 4/255", "fgsm 8/255", "pgd-10 2/255",
                                 "transfer fgsm 2/255"}
        assert r["robustness"]["images"] == 60 and "corruptions" not in r["robustness"]
    assert any(line["kd"] > 0 for line in records["fedmpq-kd"]["curve"])
    (executed,) = (tmp_path / "runs").glob("exp2_*.ipynb")
    text = shown(executed)
    for part in ("4 clients, 75 % of them in a round, 34 % of whom fail", "2 local epochs",
                 "distillation weight 1 at temperature 2", "| PGD-10 2/255 ↑ |",
                 "A single seed: a demonstration", "under FGSM at 2/255",
                 "exp2_robustness.tex"):
        assert part in text, part
    assert "paper claims" not in text, "digits are not the task of the paper's numbers"
    for name in (".md", ".tex", "_caption.tex", "_robustness.tex"):
        assert (ROOT / "runs/generated" / f"exp2{name}").exists()


def test_empty_parameters_mean_the_preset():
    "What the notebook passes on by default is the published protocol, in every preset's own size."
    empty = dict(alpha=0.5, temperature=2.0, dirichlet="", bits="", local_epochs="", rounds="", lr="",
                 label_noise=0.0, stress="", dataset="", model="")
    for preset in EXPERIMENTS["exp2"].presets:
        assert plan(EXPERIMENTS["exp2"], preset, **empty) == plan(EXPERIMENTS["exp2"], preset)
    (c,) = plan(EXPERIMENTS["exp2"], "paper", "fedmpq", "0", **empty)
    assert (c.clients, c.dirichlet, c.local_epochs, c.lr, c.rounds, c.validation,
            c.stress) == (100, 0.1, 2, 0.05, 100, 0.05, "all")
    chosen, failing = participants(c, [450] * 100, 0)
    assert (len(chosen), len(failing)) == (20, 4)
