"""Prompts that start together, in one packed row in which nothing stands twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsalign.data.batches.packing import Span
from dsalign.data.tokens.text_ids import length_shared

WORTH_SHARING = 8  # tokens with which prompts must begin alike


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
        lengths = tuple(len(prompts[i]) - stem for i in members)
        spans.append(Span(stem, lengths) if stem else Span(lengths[0], ()))
        for i in members:
            places.append(Place(slots[i], len(ids), len(ids) + len(prompts[i]) - stem, stem))
            ids += prompts[i][stem:]
            last[i] = len(ids) - 1
    return PackedPrompts(ids, spans, last, places)


def alike(prompts: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Prompts that begin alike, as (number of tokens, indices of the prompts), or (0, [index]) for one that is alone.

    In sorted order prompts that begin alike are neighbours. A prompt joins the group before it where that saves more
    tokens than the group loses if its members then share fewer. Each prompt keeps a token of its own.
    """
    found: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        if found:
            stem, members = found[-1]
            before = prompts[members[-1]]
            shared = min(length_shared(before, prompts[i]), len(before) - 1, len(prompts[i]) - 1, stem or len(before))
            if shared >= WORTH_SHARING and shared * len(members) > stem * (len(members) - 1):
                found[-1] = shared, [*members, i]
                continue
        found.append((0, [i]))
    return found
