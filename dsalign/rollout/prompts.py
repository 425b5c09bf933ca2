"""Prompts that start together, in one packed row in which nothing stands twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsalign.data.batches.packing import Span, alike


@dataclass(frozen=True)
class Place:
    """Where the keys and values of a part of a packed row go: of its tokens start to stop - 1, into the positions from
    `at` on of each of `slots`."""

    slots: Sequence[int]
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts in one row. ids: of the row's tokens. spans: what sees what, for `SharedPrefix`. last: of each prompt, in
    the order in which they were given, the position of its last token in the row. places: where all tokens go."""

    ids: Sequence[int]
    spans: Sequence[Span]
    last: Sequence[int]
    places: Sequence[Place]


def packed(prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> PackedPrompts:
    """Put prompts of one token or more into one row. slots[i]: the slots of the completions of prompt i."""
    ids: list[int] = []
    spans, places = [], []
    last = [0] * len(prompts)
    for stem, members in alike(prompts):
        if stem:
            places.append(Place([slot for i in members for slot in slots[i]], len(ids), len(ids) + stem, 0))
            ids += prompts[members[0]][:stem]
        branches = [Span(len(prompts[i]) - stem) for i in members]
        spans += [Span(stem, tuple(branches))] if stem else branches
        for i in members:
            places.append(Place(slots[i], len(ids), len(ids) + len(prompts[i]) - stem, stem))
            ids += prompts[i][stem:]
            last[i] = len(ids) - 1
    return PackedPrompts(ids, spans, last, places)
