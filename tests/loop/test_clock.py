"""Seconds of phases, by a clock that is turned by hand."""

from __future__ import annotations

import time

import pytest

from dsalign.loop.clock import Clock


def test_phases_add_up_and_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts of 3 and 1 seconds and training of 6 in four steps: 1 and 1.5 seconds a step; then nothing."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for name, seconds in (("rollout", 3.0), ("train", 6.0), ("rollout", 1.0)):
        with clock.phase(name):
            now[0] += seconds
        now[0] += 10  # counts for nothing
    with pytest.raises(KeyError), clock.phase("reward"):
        pass
    assert clock.take(4) == {
        "time/rollout": 1.0, "time/score": 0.0, "time/reference": 0.0, "time/train": 1.5, "time/wait": 0.0,
    }  # fmt: skip
    assert clock.take(4) == {}


def test_a_phase_that_fails_counts() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="no"), clock.phase("rollout"):
        raise ValueError("no")
    assert clock.take(1)["time/rollout"] > 0
