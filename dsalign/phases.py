"""Where the main thread of this rank is: its phase and its step, and how long each phase took. Imports no torch.

The loop and what it calls say so here. `guard/watchdog.py` tells the other ranks, and takes a rank for hung by it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from dsalign import faults

KEPT = 50  # intervals of a phase that are remembered


class Now(NamedTuple):
    """Where the main thread is."""

    phase: str
    step: int  # optimizer steps taken, of the whole run
    marks: int  # how many intervals have begun: a rank whose number stands still makes no progress
    since: float  # when the interval began, seconds of time.monotonic
    work: float = 1.0  # how much there is to do in it, in units of the phase


def _last() -> deque[float]:
    return deque(maxlen=KEPT)


@dataclass
class Past:
    """How long the intervals of a phase took, in seconds."""

    count: int = 0
    longest: float = 0.0  # of all of them
    recent: deque[float] = field(default_factory=_last)  # the last KEPT
    rates: deque[float] = field(default_factory=_last)  # seconds a unit of work, of the last KEPT

    def add(self, seconds: float, work: float = 1.0) -> None:
        """Add an interval with so much work."""
        self.count += 1
        self.longest = max(self.longest, seconds)
        self.recent.append(seconds)
        self.rates.append(seconds / max(work, 1.0))


now = Now("start", 0, 0, time.monotonic())
past: dict[str, Past] = {}  # phase -> its intervals so far
listeners: list[Callable[[str], None]] = []  # told the name of each phase that begins; quick, as the loop waits


def mark(phase: str | None = None, step: int | None = None, work: float = 1.0) -> None:
    """End the interval that runs and begin the next one, of the same phase unless `phase` names another.

    step: optimizer steps taken, where it changed. work: tokens in the interval that begins, where its time goes by
    them. A phase that is named is a point of faults.py, "phase NAME".
    """
    global now
    time_now = time.monotonic()
    past.setdefault(now.phase, Past()).add(time_now - now.since, now.work)
    now = Now(phase or now.phase, now.step if step is None else step, now.marks + 1, time_now, max(work, 1.0))
    if phase is not None:
        for tell in listeners:
            tell(phase)
        faults.at(f"phase {phase}")


@contextmanager
def within(phase: str) -> Iterator[None]:
    """A context that is a phase of its own; the phase around it goes on behind it."""
    global now
    outer = now.phase
    try:
        mark(phase)
        yield
    except BaseException as error:
        vars(error).setdefault("phase", now.phase)
        raise
    finally:
        mark()
        now = now._replace(phase=outer)


def of_error(error: BaseException) -> str:
    """The phase in which an exception was raised, if it left one, else the phase that runs."""
    return str(vars(error).get("phase", now.phase))


def begin() -> None:
    """Forget an earlier run of this Python process."""
    global now
    past.clear()
    now = Now("start", 0, now.marks + 1, time.monotonic())
