"""The console of a run: a live screen on a terminal, plain lines elsewhere, nothing on other ranks than the first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsalign import phases


@dataclass(frozen=True)
class Now:
    """The state of a run behind a logged step.

    numbers: metric -> value. left: seconds to the end, None = not known. memory: name -> GiB.
    """

    step: int
    total: int
    numbers: Mapping[str, float]
    left: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


class Screen(Protocol):
    """The ways to show something. None of them raises: a run outlives its console."""

    def stage(self, text: str) -> None:
        """Say what begins now, such as "loading the model"; it ends with the next stage or the first step."""

    def progress(self, done: float, total: float | None) -> None:
        """Show how far the stage is; total None = not known."""

    def say(self, text: str) -> None:
        """Show a line that stays."""

    def now(self, state: Now, line: str) -> None:
        """Show a logged step; line: the same in one line."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
        """Show sampled answers; lines: the same, a line each."""

    def title(self, text: str) -> None:
        """Name the run in one line."""

    def close(self) -> None:
        """Leave the last state on the terminal and go back to plain lines."""


class Plain:
    """Lines on standard output. stages: whether stages are said too."""

    def __init__(self, *, stages: bool) -> None:
        self._stages = stages

    def stage(self, text: str) -> None:
        if self._stages:
            self.say(f"{text} ...")

    def progress(self, done: float, total: float | None) -> None:
        pass  # a bar is for a terminal

    def say(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:  # whoever read the console is gone, or the terminal is; metrics.jsonl has it all
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def now(self, state: Now, line: str) -> None:
        self.say(line)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> None:
        for line in lines:
            self.say(line)

    def title(self, text: str) -> None:
        self.say(text)

    def close(self) -> None:
        pass


STAGES = {  # phase of a run before its first step -> what a user is told
    "names of models": "finding the models",
    "data": "reading and tokenising the rows",
    "models": "loading the models",
    "self-check": "checking that packed rows are computed as rows alone",
    "reference cache": "computing the reference's log-probabilities",
    "resume": "reading the checkpoint",
    "new folder": "making the first step ready",
}


class _Current:
    """The screen of this process; until a command opens one, lines are printed and stages are not."""

    screen: Screen = Plain(stages=False)


def current() -> Screen:
    """The screen that this process shows its run on."""
    return _Current.screen


def stage(text: str) -> None:
    """Say what begins now, see `Screen.stage`."""
    _Current.screen.stage(text)


def progress(done: float, total: float | None) -> None:
    """Show how far the stage is, see `Screen.progress`."""
    _Current.screen.progress(done, total)


def _heard(phase: str) -> None:
    if phase in STAGES:
        stage(STAGES[phase])


def is_live() -> bool:
    """Whether standard output is a terminal that a screen can be drawn on. The one that OpenMPI gives a rank is not:
    what is written there is copied, maybe into a file."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return False
    with suppress(ValueError, AttributeError):  # closed, or replaced by something that is no file
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "")
    return False


@contextmanager
def opened(rank: int) -> Iterator[Screen]:
    """A context in which the process shows its run: on rank 0 live on a terminal, else as lines with stages; on other
    ranks only what is said aloud."""
    before = _Current.screen
    screen: Screen = Plain(stages=rank == 0)
    if rank == 0 and is_live():
        from dsalign.report.live import Live  # noqa: PLC0415 rich takes a fifth of a second to import, for terminals alone

        screen = Live()
    _Current.screen = screen
    phases.listeners.append(_heard)
    try:
        yield screen
    finally:
        phases.listeners.remove(_heard)
        screen.close()
        _Current.screen = before
