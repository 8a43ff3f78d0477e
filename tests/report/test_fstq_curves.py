"Experiment 7's curves: what was sent until then, and a panel for each optimiser."
import json
import math

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from fedmpqkd.report.facts import fstq_facts
from fedmpqkd.report.fstq import fstq_curves, fstq_pairs, fstq_table, fstq_traffic, plot_fstq


def run(method: str, seed: int, bits: list[float], optimizer: str = "adamw", share: float = 0.02,
        split: str = "natural", **changed) -> dict:
    uplink = "model" if method == "fedavg" else "mixed"
    config = dict(method=method, seed=seed, optimizer=optimizer, uplink=uplink, update_share=share,
                  partition=split, dirichlet=0.1, model="smollm2-135m", tokenizer="own",
                  update="fp32", lora_rank=8, rounds=3) | changed
    curve = [dict(round=n, bits_per_byte=b, bytes_up=250_000) for n, b in enumerate(bits, 1)]
    for line in curve: line.update(bytes_down=10 ** 6, arrived=5, sampled=5)
    return dict(config=config, curve=curve, environment=dict(device="a CPU"))


def test_bytes_add_up_within_a_run_and_seeds_are_averaged():
    found = fstq_curves([run("fedavg-fstq", 0, [2, 1]), run("fedavg-fstq", 1, [4, 1]),
                         run("fedavg-fstq", 0, [8, 8], share=0.2)])
    small = found[found.budget == 0.02]
    assert small.mb.tolist() == [0.25, 0.5]
    assert small.nats.tolist() == pytest.approx([3 * math.log(2), math.log(2)], abs=1e-4)
    assert (small.low.iloc[0], small.high.iloc[0]) == pytest.approx((1.3863, 2.7726))
    assert found.n.tolist() == [2, 2, 1, 1]


def test_each_optimiser_has_a_panel_with_a_line_a_budget():
    records = [run("fedavg", 0, [2, 1]), run("fedavg-magnitude", 0, [5, 4], "sgd")]
    records += [run("fedavg-fstq", 0, [3, 2], share=share) for share in (0.02, 0.2)]
    figure = plot_fstq(records)
    assert [(ax.get_title(), len(ax.lines)) for ax in figure.axes] == [("", 3)]  # under SGD there is one row
    plt.close(figure)
    figure = plot_fstq([*records, run("fedavg-fstq", 0, [3, 2], "sgd")])
    assert [(ax.get_title(), len(ax.lines)) for ax in figure.axes] == [("adamw", 3), ("sgd", 2)]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["fp32", "Fisher", "magnitude"]
    plt.close(figure)


def test_runs_of_one_row_on_other_splits_are_other_lines():
    "Fisher minus magnitude: one bit a byte on the natural split, two on the skewed one."
    splits = {"natural": 1, "dirichlet": 2}
    records = [run(method, seed, [9, 4 + gain * (method == "fedavg-magnitude")], split=split)
               for split, gain in splits.items() for method in ("fedavg-fstq", "fedavg-magnitude")
               for seed in range(2)]
    pairs = fstq_pairs(records).set_index("split").difference
    assert pairs.to_dict() == pytest.approx({"natural": -math.log(2), "Dirichlet(0.1)": -2 * math.log(2)})
    assert fstq_table(records).n.tolist() == [2] * 4
    assert "split" not in fstq_table(records[:4]) and "split" not in fstq_pairs(records[:4])
    figure = plot_fstq(records)
    assert {ax.get_title() for ax in figure.axes} == {"natural", "Dirichlet(0.1)"}
    plt.close(figure)


def test_a_row_is_measured_by_full_precision_on_its_own_split():
    "Magnitude reaches 4 bits in its last round; full precision does so on one of two splits only."
    records = [run("fedavg", 0, [9, 4]), run("fedavg", 0, [9, 2], split="iid"),
               *(run("fedavg-magnitude", 0, [9, 4], split=split) for split in ("natural", "iid"))]
    found = fstq_traffic(records).query("method == 'fedavg-magnitude'").set_index("split").times_less
    assert found["natural"] == 1 and math.isnan(found["iid"])


def test_what_else_is_changed_about_a_recipe_has_a_row_of_its_own():
    records = [run("fedavg-fstq", 0, [9, 4]), run("fedavg-fstq", 0, [9, 3], lora_train="B"),
               run("fedavg", 0, [9, 2], aggregate="lora-product"),
               run("fedavg-fstq", 0, [9, 5], token_select="random", token_mode="input_drop")]
    table = fstq_table(records)
    assert table.method.tolist() == [
        "fedavg-fstq", "fedavg-fstq (random, input_drop)", "fedavg-fstq (B alone)",
        "fedavg (mean of products)"]
    assert table["budget %"].tolist() == [2, 2, 25, 100]  # one factor stands at its bytes: 50 of 200 kB


def test_facts_of_another_task_name_the_runs_of_their_own_place():
    "Reviews: the difference computed from the files, and Dirichlet .1 under a name of its own."
    folder = ROOT / "results" / "exp7" / "study-labels"
    found, nats, used = fstq_facts(ROOT / "results"), {}, set()
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        c = record["config"]
        plain = c["token_select"] == "none" and c["lora_train"] == "AB" and c["optimizer"] == "adamw"
        if plain and c["dirichlet"] == 0.5 and c["method"] in ("fedavg-fstq", "fedavg-magnitude"):
            if c["partition"] != "dirichlet": continue
            nats[c["method"], c["seed"]] = record["curve"][-1]["bits_per_byte"] * math.log(2)
            used.add(path.name)
    mean = sum(nats["fedavg-fstq", s] - nats["fedavg-magnitude", s] for s in range(3)) / 3
    fact = found["fstq.labels.magnitude"]
    assert fact.text.startswith(f"{mean:+.3f} nats a byte (") and "n = 3" in fact.text
    assert {name.rpartition("/")[2] for name in fact.records} == used and len(used) == 6
    elsewhere = found["fstq.labels.Dirichlet(0.1).magnitude"]
    assert not set(elsewhere.records) & set(fact.records)
