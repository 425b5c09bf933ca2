"""What the live screen shows: the stages before, then numbers with their direction."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console

from dsalign.report.live import Live
from dsalign.report.screen import Now


@pytest.fixture
def shown() -> Iterator[Live]:
    screen = Live()
    yield screen
    screen.close()


def text(screen: Live, width: int = 70) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(screen._drawn())
    return capture.get()


def test_stages_before_the_first_step(shown: Live) -> None:
    """A stage that is over has its seconds, the present one a bar where its end is known."""
    shown.stage("importing torch")
    shown.stage("tokenising")
    shown.progress(250, 1000)
    first, second, bar = text(shown).splitlines()
    assert first.split() == ["importing", "torch", "0.0s"] and "tokenising  0s" in second
    assert bar.endswith(" 250 of 1,000".ljust(len(bar) - bar.rindex(" 250"))) and "\u2501" in bar


def test_numbers_with_their_direction(shown: Live) -> None:
    """Against the mean of up to five values before: the margin 3 against (1 + 2) / 2 rises, the loss 0.5 stays, the
    learning rate falls; held-out rows have a column once there are some."""
    shown.title("dpo of tiny")
    for step, margin in ((1, 1.0), (2, 2.0), (3, 3.0)):
        numbers = {"loss": 0.5, "rewards/margins": margin, "lr": 1.0 / step, "num_tokens": 10.0, "tokens_per_s": 1234.0}
        shown.now(Now(step, 10, numbers, 65.0, {"memory": 1.5}), "")
    shown.now(Now(3, 10, {"eval/loss": 0.75}), "")
    lines = text(shown).splitlines()
    assert lines[0].strip() == "dpo of tiny"
    assert "step 3 of 10" in lines[1] and "1m05s left" in lines[1]
    cells = [line.split() for line in lines]
    for row in (["now", "held", "out"], ["loss", "0.5", "\u2192", "0.75"], ["margin", "3", "\u2191"],
                ["learning", "rate", "0.3333", "\u2193"], ["1,234", "tok/s", "memory", "1.5", "GiB"]):  # fmt: skip
        assert row in cells


def test_a_narrow_terminal_has_each_number_in_one_line(shown: Live) -> None:
    """The bar gives way to the words behind it, and no two numbers have one name."""
    names = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    shown.now(Now(2000, 4000, dict.fromkeys(names, 0.5), 7265.0), "")
    lines = text(shown, 55).splitlines()
    assert max(map(len, lines)) <= 55 and "\u2501" in lines[0] and lines[0].rstrip().endswith("2h01m left")
    rows = [line.split("  ")[0].strip() for line in lines if " 0.5 " in line]
    assert len(rows) == len(set(rows)) == 5 and {"Rewards: chosen", "Log-probability of answers: chosen"} < set(rows)


def test_samples_are_cut_to_the_width(shown: Live) -> None:
    shown.now(Now(1, 2, {"time/rollout": 3.0, "time/train": 1.0}), "")
    shown.samples(1, [{"completion": "two\nlines " + "x" * 200, "score": 0.5}], [])
    lines = text(shown, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("sampled at step 1, reward 0.5: two lines xxx") for line in lines)
    assert "rollout 75%, train 25%" in text(shown)
