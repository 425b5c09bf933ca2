"""Which curves stand in a chart, of one run and of several."""

from __future__ import annotations

import math

from dsalign.report.figures import figures

SERIES = {
    "loss": [(1.0, 0.5), (2.0, math.nan), (3.0, 0.25)],
    "eval/loss": [(3.0, 0.75)],
    "rewards/chosen": [(1.0, 1.0)],
    "rewards/rejected": [(1.0, -1.0)],
}


def test_of_one_run() -> None:
    """Training and held-out rows of a metric in one colour, two metrics of a chart in two; numbers in words below."""
    loss, rewards = figures({"run": SERIES})
    assert [(c["label"], c["color"], c["held_out"]) for c in loss["curves"]] == [
        ("training", 0, False),
        ("held out", 0, True),
    ]
    assert loss["curves"][0]["y"] == [0.5, None, 0.25]
    assert loss["said"] == ["training: 0.5 to 0.25; not a finite number at step 2", "held out: 0.75"]
    assert [(c["label"], c["color"]) for c in rewards["curves"]] == [("chosen", 0), ("rejected", 1)]


def test_of_two_runs() -> None:
    """Each metric has its chart, and a run the same colour in all."""
    found = figures({"a": SERIES, "b": {"loss": [(1.0, 2.0), (2.0, 2.0)]}})
    assert [chart["title"] for chart in found] == ["Loss", "Rewards: chosen", "Rewards: rejected"]
    assert [(c["label"], c["color"]) for c in found[0]["curves"]] == [("a", 0), ("a, held out", 0), ("b", 1)]
    assert found[0]["said"][-1] == "b: 2 throughout"
