"""The table of metrics: every name in one chart, what an algorithm is about first."""

from __future__ import annotations

from collections import Counter

from dsalign.report.metric_names import CHARTS, MAIN, SECTIONS, charts_of, label


def test_every_metric_has_one_place() -> None:
    names = Counter(name for chart in CHARTS for name in chart.names)
    assert set(names.values()) == {1}
    assert [c.section for c in CHARTS] == sorted((c.section for c in CHARTS), key=SECTIONS.index)


def test_charts_of_a_run_of_pairs() -> None:
    """Training and evaluation of a metric share a chart, chosen and rejected too; counters have none; a name that
    nobody listed has its own."""
    names = ["eval/loss", "loss", "rewards/rejected", "rewards/chosen", "rewards/margins", "num_tokens", "mine", "lr"]
    found = [(chart.title, chart.names) for chart in charts_of(names)]
    assert found == [
        ("Loss", ("loss",)),
        ("Reward margin", ("rewards/margins",)),
        ("Rewards", ("rewards/chosen", "rewards/rejected")),
        ("Learning rate", ("lr",)),
        ("mine", ("mine",)),
    ]


def test_the_reward_comes_first_where_answers_are_sampled() -> None:
    charts = list(charts_of(["loss", "objective/kl", "val/ratio", "objective/scores"]))
    assert [chart.title for chart in charts if chart.section == MAIN] == ["Reward", "KL to the reference", "Loss"]


def test_labels() -> None:
    assert [label(n) for n in ("rewards/chosen", "time/train", "mine")] == ["chosen", "train", "mine"]
