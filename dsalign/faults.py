"""Named points at which the tests make a run fail: nothing happens there unless DSALIGN_TEST is 1. Imports no torch.

DSALIGN_FAULT holds faults separated by commas, each POINT:RANK:KIND or POINT:RANK:KIND:N for the Nth time that the rank
comes there (from 1, the default). Kinds: kill (SIGKILL of the process), stop (SIGSTOP), term (SIGTERM), raise (a
RuntimeError), full (the OSError of a full disk), sleep (an hour), nan (the value passed there becomes NaN).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from typing import Any

KINDS = ("kill", "stop", "term", "raise", "full", "sleep", "nan")
_seen: Counter[str] = Counter()


def at(point: str) -> None:
    """Fail here if a test asks for it. point: a name that no other place has."""
    if os.environ.get("DSALIGN_TEST") == "1":
        _act(_wanted(point), point)


def value(point: str, number: Any) -> Any:
    """`number` (a float or a tensor), times NaN if a test asks for it here; other kinds of fault act as in `at`."""
    if os.environ.get("DSALIGN_TEST") != "1":
        return number
    kind = _wanted(point)
    if kind == "nan":
        return number * float("nan")
    _act(kind, point)
    return number


def _wanted(point: str) -> str | None:
    """The kind of fault that is due at this visit of the point by this rank."""
    _seen[point] += 1
    for one in filter(None, os.environ.get("DSALIGN_FAULT", "").split(",")):
        name, rank, kind, *rest = one.split(":")
        if kind not in KINDS:
            raise ValueError(f"DSALIGN_FAULT: expected one of {', '.join(KINDS)}, got {kind}")
        due = int(rest[0]) if rest else 1
        if (name, rank, due) == (point, os.environ.get("RANK", "0"), _seen[point]):
            return kind
    return None


def _act(kind: str | None, point: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "raise":
        raise RuntimeError(f"a test raises at {point}")
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    elif kind == "sleep":
        time.sleep(3600)
