"""Which completion runs in which row, by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsalign.rollout.admission import Schedule
from dsalign.rollout.api import Request


def request(tokens: int, samples: int, most: int) -> Request:
    return Request((1,) * tokens, tuple(range(samples)), most)


def test_the_longest_starts_first_and_a_request_waits_for_room() -> None:
    """Five rows: that of 30 tokens takes three, that of 20 needs three and waits, though that of 10 would fit."""
    schedule = Schedule([request(2, 1, 10), request(2, 3, 30), request(2, 3, 20)], 5)
    first = schedule.admit(100)
    assert [(a.request, a.samples, a.rows) for a in first] == [(1, range(3), range(3))]
    assert schedule.retire([1]) == [(2, 1)]  # the last running row moves into the hole
    assert [(a.request, a.rows) for a in schedule.admit(100)] == [(2, range(2, 5))]
    assert schedule.retire([0, 1, 4]) == [(2, 0), (3, 1)]
    assert [(a.request, a.rows) for a in schedule.admit(100)] == [(0, range(2, 3))]
    assert schedule.retire([0, 1, 2]) == [] and schedule.running == 0 and not schedule.admit(100)


def test_a_request_larger_than_all_rows_starts_in_parts() -> None:
    schedule = Schedule([request(2, 5, 10)], 2)
    parts = []
    while admitted := schedule.admit(100):
        parts += [one.samples for one in admitted]
        schedule.retire([row for one in admitted for row in one.rows])
    assert parts == [range(2), range(2, 4), range(4, 5)]


def test_prompts_that_start_together_are_bounded() -> None:
    """At most 10 prompt tokens a pass, or one prompt that is longer."""
    schedule = Schedule([request(n, 1, 10) for n in (12, 6, 4, 3)], 9)
    assert [[a.request for a in schedule.admit(10)] for _ in range(3)] == [[0], [1, 2], [3]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)), max_size=8),
    st.integers(1, 6),
    st.randoms(),
)
def test_every_completion_runs_once(requests: list[tuple[int, int, int]], rows: int, draw: object) -> None:
    """In rows without a hole, whatever ends when."""
    schedule = Schedule([request(*one) for one in requests], rows)
    at: dict[int, tuple[int, int]] = {}
    seen = []
    while True:
        for one in schedule.admit(9):
            at |= {row: (one.request, sample) for row, sample in zip(one.rows, one.samples, strict=True)}
        assert sorted(at) == list(range(schedule.running))
        if not at:
            break
        ended = sorted(row for row in at if draw.random() < 0.5 or len(at) == 1)  # type: ignore[attr-defined]
        seen += [at.pop(row) for row in ended]
        for source, target in schedule.retire(ended):
            at[target] = at.pop(source)
    assert sorted(seen) == [(i, k) for i, (_, samples, _) in enumerate(requests) for k in range(samples)]
