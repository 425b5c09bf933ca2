"""The live screen: what is being prepared, then steps, main numbers with their direction, speed, memory and samples."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dsalign.report.metric_names import CHARTS, EVAL, MAIN, label
from dsalign.report.screen import Now, Plain
from dsalign.report.story import duration, short

EVERY_S = 0.5  # seconds between two drawings
ROWS = 8  # numbers on the screen
BEFORE = 5  # logged steps whose mean a number is compared with
STEADY = 0.005  # of that mean: a smaller change is none
SHOWN = 3  # samples
COLOURS = {"good": "green", "bad": "red", "": "cyan"}


class Live:
    """A screen that rich draws twice a second, also while a step is computed. Lines that are said stand above it."""

    def __init__(self) -> None:
        self._stages: list[tuple[str, float]] = []  # what was begun, and when
        self._bar: tuple[float, float | None] | None = None
        self._title, self._state = "", Now(0, 0, {})
        self._started = time.monotonic()
        self._before: dict[str, deque[float]] = {}
        self._seen: dict[str, tuple[float, float]] = {}  # metric -> value and the mean before it
        self._samples: tuple[int, Sequence[Mapping[str, Any]]] = (0, ())
        self._spinner = Spinner("dots")
        self._plain: Plain | None = None  # once the terminal is gone
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._live = RichLive(get_renderable=self._drawn, console=self.console, auto_refresh=False)
        self._closed = threading.Event()
        self._try(self._live.start)
        # In place of rich's own thread, which ends with a traceback where the terminal is gone.
        threading.Thread(target=self._refresh, daemon=True).start()

    def stage(self, text: str) -> None:
        """Show a stage with a spinner, and how long those before it took."""
        self._bar = None
        self._stages.append((text, time.monotonic()))
        self._try(self._live.refresh)

    def progress(self, done: float, total: float | None) -> None:
        """Show a bar below the stage; it is drawn at the next refresh."""
        self._bar = (done, total)

    def say(self, text: str) -> None:
        """Print a line above the screen."""
        if self._plain is not None:
            self._plain.say(text)
        else:
            self._try(lambda: self.console.print(Text(text)))

    def title(self, text: str) -> None:
        """Name the run in the first line of the screen."""
        self._title = text

    def now(self, state: Now, line: str) -> None:
        """Show the numbers of a logged step."""
        for name, value in state.numbers.items():
            past = self._before.setdefault(name, deque(maxlen=BEFORE))
            self._seen[name] = (value, sum(past) / len(past) if past else value)
            past.append(value)
        known = self._state
        self._state = Now(
            state.step, state.total, {**known.numbers, **state.numbers},
            state.left if state.left is not None else known.left, state.memory or known.memory,
        )  # fmt: skip
        self._try(self._live.refresh)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
        """Show the last samples below the numbers."""
        self._samples = step, rows

    def _refresh(self) -> None:
        while not self._closed.wait(EVERY_S) and self._plain is None:
            self._try(self._live.refresh)

    def close(self) -> None:
        """Draw the last state and leave it there."""
        self._closed.set()
        self._try(self._live.stop)
        self._plain = self._plain or Plain(stages=False)

    def _try(self, draw: Any) -> None:
        """Draw; where the terminal is gone, go on with plain lines, which are lost quietly."""
        if self._plain is not None:
            return
        try:
            draw()
        except (OSError, ValueError):
            self._plain = Plain(stages=False)

    def _drawn(self) -> RenderableType:
        return Group(*(self._running() if self._state.total else self._preparing()))

    def _preparing(self) -> Iterator[RenderableType]:
        for i, (text, since) in enumerate(self._stages):
            if i + 1 < len(self._stages):
                yield Text(f"  {text}  {self._stages[i + 1][1] - since:.1f}s", style="dim")
                continue
            self._spinner.update(text=Text(f"{text}  {time.monotonic() - since:.0f}s"))
            yield self._spinner
            if self._bar is not None:
                yield _bar(*self._bar, "")

    def _running(self) -> Iterator[RenderableType]:
        state = self._state
        if self._title:
            yield Text(self._title, style="bold", overflow="ellipsis", no_wrap=True)
        left = "" if state.left is None else f", {duration(state.left)} left"
        spent = duration(time.monotonic() - self._started)
        yield _bar(state.step, state.total, f"step {state.step:,} of {state.total:,}  {spent} so far{left}")
        yield self._numbers()
        yield Text("   ".join(self._speed()), style="dim")
        step, rows = self._samples
        for one in rows[:SHOWN]:
            text = " ".join(str(one.get("completion", "")).split())
            score = f"{short(one['score'])}: " if isinstance(one.get("score"), (int, float)) else ""
            yield Text(f"sampled at step {step}, reward {score}{text}", overflow="ellipsis", no_wrap=True)

    def _numbers(self) -> Table:
        """The algorithm's main numbers: now, its direction against the steps before, and on held-out rows."""
        named = [(chart, name) for chart in CHARTS if chart.section == MAIN for name in chart.names]
        named += [(chart, name) for chart in CHARTS for name in chart.names if name in ("grad_norm", "lr")]
        present = [(chart, name) for chart, name in named if name in self._seen or f"{EVAL}{name}" in self._seen]
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
        held_out = any(name.startswith(EVAL) for name in self._seen)
        for head in ("", "now", "", *(["held out"] if held_out else [])):
            table.add_column(head, justify="left" if not head else "right", no_wrap=True)
        words = Counter(label(name) for _, name in present)
        for chart, name in present[:ROWS]:
            word = label(name) if words[label(name)] == 1 else f"{chart.title}: {label(name)}"
            cells = [Text(word), *self._cells(name, chart.better)]
            if held_out:
                cells.append(self._cells(f"{EVAL}{name}", "")[0])
            table.add_row(*cells)
        return table

    def _cells(self, name: str, better: str) -> tuple[Text, Text]:
        if name not in self._seen:
            return Text(""), Text("")
        value, mean = self._seen[name]
        if value == mean or abs(value - mean) <= STEADY * abs(mean):
            return Text(short(value)), Text("\u2192", style="dim")
        up = value > mean
        good = "" if not better else "good" if up == (better == "up") else "bad"
        return Text(short(value)), Text("\u2191" if up else "\u2193", style=COLOURS[good])

    def _speed(self) -> Iterator[str]:
        numbers = self._state.numbers
        if rate := numbers.get("tokens_per_s"):
            yield f"{rate:,.0f} tok/s"
        split = {name.removeprefix("time/"): x for name, x in numbers.items() if name.startswith("time/")}
        if total := sum(split.values()):
            yield ", ".join(f"{name} {x / total:.0%}" for name, x in split.items() if x / total >= 0.01)
        for name, amount in self._state.memory.items():
            yield f"{name} {amount:.1f} GiB"


def _bar(done: float, total: float | None, text: str) -> RenderableType:
    """A bar with words behind it; of an unknown total the words alone."""
    counted = text or (f"{done:,.0f}" + (f" of {total:,.0f}" if total else ""))
    if not total:
        return Text(f"  {counted}", style="dim")
    line = Table.grid(padding=(0, 1))
    line.add_column(max_width=30)
    line.add_column(no_wrap=True)  # the bar gives way
    line.add_row(ProgressBar(total=total, completed=min(done, total)), Text(counted))
    return line
