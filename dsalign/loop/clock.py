"""The seconds that a run which samples spends on each of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dsalign import phases

PHASES = ("rollout", "score", "reference", "train", "wait")


class Clock:
    """Seconds by the wall in each phase on this rank since they were last taken.

    rollout: sampling and its probe. score: reward model and functions. reference: forward passes without gradient of
    reference, critic and policy. train: optimizer steps. wait: for the rank whose rollout takes longest.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time counts for the phase called `name`; contexts do not lie in one another."""
        start = time.perf_counter()
        try:
            with phases.within(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self, steps: int) -> dict[str, float]:
        """The metrics time/{phase}: seconds per step over the last `steps` optimizer steps; counting starts again. With
        no rollout there are none."""
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        if not taken["rollout"]:
            return {}
        return {f"time/{name}": seconds / max(steps, 1) for name, seconds in taken.items()}
