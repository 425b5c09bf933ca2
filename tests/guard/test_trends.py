"""Guards that speak: each by a series that is made to trip it, none by the series of real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dsalign.guard.trends import ENOUGH, GUARDS, LONG, MOST, Trend, Watch

HEALTHY = sorted((Path(__file__).parent / "healthy").glob("*.jsonl"))
Course = Callable[[int], float]


def ripple(i: int) -> float:
    """A repeatable noise of mean 0: -0.1, 0, 0.1, ..."""
    return (i % 3 - 1) / 10


def said(steps: int, **of: Course) -> list[str]:
    """The warnings over some logged steps. of: metric, __ in place of its slash, -> its value at step i."""
    watch = Watch()
    return [text for i in range(steps) for text in watch.add({n.replace("__", "/"): f(i) for n, f in of.items()})]


def up(i: int) -> float:
    return 0.1 * i + ripple(i)


SCRIPTS: dict[str, tuple[dict[str, Course], str]] = {
    "likelihood displacement": (
        {"rewards__chosen": lambda i: -0.1 * i + ripple(i), "rewards__margins": up},
        "rewards/chosen",
    ),
    "reward over-optimisation": ({"objective__scores": up, "objective__kl": lambda i: i + ripple(i)}, "nats an answer"),
    "reward by length": ({"objective__scores": up, "rollout__length": lambda i: 50 + 5 * i}, "tokens"),
    "entropy collapse": (
        {"objective__scores": lambda i: 0.0, "policy__entropy_avg": lambda i: math.exp(-i / 4)},
        "entropy of sampled tokens fell",
    ),
    "answers without end": ({"val__num_eos_tokens": lambda i: max(0, 128 - 8 * i)}, "fell from 116 to 52 a rollout"),
    "empty answers": ({"rollout__length": lambda i: max(1, 40 - 4 * i)}, "answers end at once"),
    "KL explosion": ({"objective__kl": lambda i: 1.0 if i < 20 else 500.0}, "is 500 nats"),
    "accuracy of a guess": ({"rewards__accuracies": lambda i: 0.5 + ripple(i)}, "stays at 0.51 over 30"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_guard_is_tripped_once(name: str) -> None:
    """By a course of 40 logged steps, with its number, a paper and what to try; no other guard speaks."""
    series, number = SCRIPTS[name]
    (text,) = said(40, **series)
    assert text.startswith(f"guard: {name}: ") and number in text
    assert "(arXiv:2" in text and "); try " in text


def test_every_guard_has_a_script() -> None:
    assert list(SCRIPTS) == [guard.name for guard in GUARDS]


@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_healthy_runs_are_left_alone(path: Path) -> None:
    """What DPO, PPO and GRPO of the tiny demo model logged."""
    watch, numbers = Watch(), [json.loads(line) for line in path.read_text().splitlines()]
    assert len(numbers) >= ENOUGH and [text for one in numbers for text in watch.add(one)] == []


def test_a_real_run_that_went_wrong() -> None:
    """DPO with --rpo_alpha 0 and a learning rate a thousand times too large: chosen answers of ten tokens lost ten nats
    while every pair was told apart."""
    watch = Watch()
    lines = (Path(__file__).parent / "displaced.jsonl").read_text().splitlines()
    (text,) = [text for line in lines for text in watch.add(json.loads(line))]
    assert "likelihood displacement: chosen answers become less likely (rewards/chosen 0.012 to -0.135)" in text


@pytest.mark.parametrize(
    "series",
    [
        {"rewards__chosen": up, "rewards__margins": up},
        {"rewards__chosen": lambda i: -0.005 * i, "rewards__margins": up},  # a twentieth of what the margin gains
        {"objective__scores": up, "objective__kl": lambda i: 0.1 * i},
        {"objective__scores": up, "rollout__length": lambda i: 50 + ripple(i)},
        {"objective__scores": lambda i: 0.0, "rollout__length": lambda i: 50 + 5 * i},
        {"policy__entropy_avg": lambda i: 1 - i / 80, "objective__scores": up},
        {"val__num_eos_tokens": lambda i: 100 - i},
        {"objective__kl": lambda i: 500.0 if i == 20 else 1.0},
        {"rewards__accuracies": lambda i: 0.5 + i / 100},
        {"rewards__accuracies": lambda i: 0.75 + ripple(i)},
        {"entropy": lambda i: math.exp(-i / 4)},  # of rows, which a model may learn by heart
    ],
)
def test_courses_that_are_well(series: dict[str, Course]) -> None:
    assert said(60, **series) == []


@pytest.mark.parametrize("spoken", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_goes_on_with_its_trends(name: str, spoken: bool) -> None:
    """Resumed at half of the steps, or behind the warning, from the lines of metrics.jsonl with those of steps that are
    taken anew: the same guard speaks at the same step as in a run that was not stopped. A guard that has spoken speaks
    again where the run is to stop, and not where it was a warning."""
    series, _ = SCRIPTS[name]
    logged = [{"step": i + 1, **{n.replace("__", "/"): f(i) for n, f in series.items()}} for i in range(60)]
    whole = Watch()
    at = next(i for i, one in enumerate(logged) if whole.add(one))
    for cut in (at // 2, at, at + 3):
        watch = Watch()
        watch.recall([{"step": 0, "eval/loss": 1.0}, *logged[: cut + 5], {"no": "step"}], cut, spoken=spoken)
        spoke = [i for i in range(cut, 60) if watch.add(logged[i])]
        assert spoke[:1] == ([] if spoken and cut > at else [max(at, cut)])


def test_too_few_points_are_no_trend() -> None:
    """The accuracy of a guess wants LONG points, the others ENOUGH."""
    series, _ = SCRIPTS["reward by length"]
    assert said(ENOUGH - 1, **series) == [] and len(said(ENOUGH, **series)) == 1
    series, _ = SCRIPTS["accuracy of a guess"]
    assert said(LONG - 1, **series) == []


def test_a_trend_by_hand() -> None:
    """0, 2, 4, 6, 8, 10: thirds (0, 2) and (8, 10) with the means 1 and 9 and the variance 2 each; the error of their
    difference is sqrt((2 + 2) / 2), so they lie 8 / sqrt(2) errors apart. NaN is left out."""
    trend = Trend()
    for value in (0, 2, math.nan, 4, 6, 8, 10):
        trend.add(value)
    assert (len(trend), trend.before, trend.after, trend.recent) == (6, 1, 9, [6, 8, 10])
    assert trend.moved == pytest.approx(8 / math.sqrt(2))


def test_a_long_run_is_kept_in_few_points() -> None:
    """10,000 values of a straight line keep the means of its thirds to 1 %."""
    trend = Trend()
    for i in range(10_000):
        trend.add(float(i))
    assert len(trend) < MOST
    assert trend.before == pytest.approx(10_000 / 6, rel=0.03) and trend.after == pytest.approx(50_000 / 6, rel=0.03)
