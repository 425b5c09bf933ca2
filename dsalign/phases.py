"""Where the main thread of this rank is: its phase and its step, and how long each phase took. Imports no torch.

The loop and what it calls say so here. `guard/watchdog.py` tells the other ranks, and takes a rank for hung by it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dsalign import faults

KEPT = 50  # intervals of a phase that are remembered


class Now(NamedTuple):
    """Where the main thread is."""

    phase: str
    step: int  # optimizer steps taken, of the whole run
    marks: int  # how many intervals have begun: a rank whose number stands still makes no progress
    since: float  # when the interval began, seconds of time.monotonic


now = Now("start", 0, 0, time.monotonic())
seconds: dict[str, deque[float]] = {}  # phase -> how long its last intervals took
listeners: list[Callable[[str], None]] = []  # told the name of each phase that begins; quick, as the loop waits


def mark(phase: str | None = None, step: int | None = None) -> None:
    """End the interval that runs and begin the next one, of the same phase unless `phase` names another.

    step: optimizer steps taken, where it changed. A phase that is named is a point of faults.py, "phase NAME".
    """
    global now
    time_now = time.monotonic()
    if now.phase not in seconds:
        seconds[now.phase] = deque(maxlen=KEPT)
    seconds[now.phase].append(time_now - now.since)
    now = Now(phase or now.phase, now.step if step is None else step, now.marks + 1, time_now)
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
    seconds.clear()
    now = Now("start", 0, now.marks + 1, time.monotonic())
