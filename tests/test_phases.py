"""Where a rank is, and for how long it was there."""

from __future__ import annotations

import pytest

from dsalign import phases


def test_intervals_are_counted_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks at 10, 11, 13, 16: one second of start, two of a, three of a again, which are 0.5 s a unit of its work."""
    times = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(times))
    phases.begin()
    before = phases.now.marks
    phases.mark("a", 4)
    phases.mark(work=6.0)
    phases.mark("b")
    assert {name: list(found.recent) for name, found in phases.past.items()} == {"start": [1.0], "a": [2.0, 3.0]}
    assert list(phases.past["a"].rates) == [2.0, 0.5]
    assert (phases.past["a"].count, phases.past["a"].longest) == (2, 3.0)
    assert phases.now == phases.Now("b", 4, before + 3, 16.0)


def test_an_error_keeps_the_phase_that_it_left() -> None:
    phases.begin()
    phases.mark("outer")
    with pytest.raises(KeyError) as caught, phases.within("save"), phases.within("write"):
        raise KeyError
    assert phases.of_error(caught.value) == "write" and phases.now.phase == "outer"
    assert phases.of_error(ValueError()) == "outer"


def test_a_phase_is_a_point_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_TEST", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DSALIGN_FAULT", "phase of a test:0:raise")
    with pytest.raises(RuntimeError, match="a test raises at phase of a test"):
        phases.mark("of a test")
