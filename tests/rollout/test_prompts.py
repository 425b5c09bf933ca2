"""Prompts that begin alike, in one packed row: by hand."""

from __future__ import annotations

from dsalign.data.batches.packing import Span
from dsalign.rollout.prompts import Place, packed

TURN = tuple(range(10, 20))  # of ten tokens


def test_a_row_by_hand() -> None:
    """Two prompts that begin with ten tokens, and one alone between them."""
    row = packed([(*TURN, 1), (5, 6), (*TURN, 2, 3)], [[0, 1], [2], [3]])
    assert row.ids == [5, 6, *TURN, 1, 2, 3]
    assert row.spans == [Span(2), Span(10, (Span(1), Span(2)))]
    assert row.last == [12, 1, 14]
    assert row.places == [
        Place([2], 0, 2, 0), Place([0, 1, 3], 2, 12, 0), Place([0, 1], 12, 13, 10), Place([3], 13, 15, 10)
    ]  # fmt: skip


def test_equal_prompts_keep_a_token_each() -> None:
    """And a prompt that is the beginning of another one."""
    row = packed([TURN, TURN, TURN[:9]], [[0], [1], [2]])
    assert row.spans == [Span(8, (Span(1), Span(2), Span(2)))] and row.last == [10, 12, 8]
    assert len(row.ids) == 13
