"Experiment 7's curves: what was sent until then, and a panel for each optimiser."
import math

import matplotlib.pyplot as plt
import pytest

from fedmpqkd.report.fstq import fstq_curves, plot_fstq


def run(method: str, seed: int, bits: list[float], optimizer: str = "adamw", share: float = 0.02) -> dict:
    uplink = "model" if method == "fedavg" else "mixed"
    config = dict(method=method, seed=seed, optimizer=optimizer, uplink=uplink, update_share=share)
    curve = [dict(round=n, bits_per_byte=b, bytes_up=250_000) for n, b in enumerate(bits, 1)]
    return dict(config=config, curve=curve)


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
