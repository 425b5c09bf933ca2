"""Prompts that begin alike, in one packed row: by hand."""

from __future__ import annotations

from dsalign.data.batches.packing import Span
from dsalign.rollout.prompts import Place, alike, packed

TURN = tuple(range(10, 20))  # of ten tokens


def test_a_row_by_hand() -> None:
    """Two prompts that begin with ten tokens, and one alone between them."""
    row = packed([(*TURN, 1), (5, 6), (*TURN, 2, 3)], [[0, 1], [2], [3]])
    assert row.ids == [5, 6, *TURN, 1, 2, 3]
    assert row.spans == [Span(2, ()), Span(10, (1, 2))]
    assert row.last == [12, 1, 14]
    assert row.places == [
        Place([2], 0, 2, 0), Place([0, 1, 3], 2, 12, 0), Place([0, 1], 12, 13, 10), Place([3], 13, 15, 10)
    ]  # fmt: skip


def test_equal_prompts_keep_a_token_each() -> None:
    """And a prompt that is the beginning of another one; eight tokens are enough to share, seven are not."""
    row = packed([TURN, TURN, TURN[:9]], [[0], [1], [2]])
    assert row.spans == [Span(8, (1, 2, 2))] and row.last == [10, 12, 8]
    assert len(row.ids) == 13
    assert alike([(*TURN[:7], 1), (*TURN[:7], 2)]) == [(0, [0]), (0, [1])]
    assert alike([(*TURN[:8], 1), (*TURN[:8], 2)]) == [(8, [0, 1])]


def test_a_prompt_joins_only_where_that_saves_tokens() -> None:
    """Two system turns that themselves begin alike: three prompts that share 30 tokens save 60; a fourth prompt, which
    shares 10 with them, would make that 30."""
    long = TURN + tuple(range(30, 50))
    prompts = [(*long, 1), (*long, 2), (*long, 3), (*TURN, 90, 1)]
    assert alike(prompts) == [(30, [0, 1, 2]), (0, [3])]
    assert alike([(*long[:15], 50), (*long[:15], 51), (*TURN, 90)]) == [(10, [0, 1, 2])], "20 tokens in place of 15"
    assert alike([]) == []
