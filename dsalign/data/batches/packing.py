"""From groups to the tensors of a forward pass, and to the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group, MicroBatch, Prepared
from dsalign.data.tokens.templates import length_shared


@dataclass(frozen=True)
class Span:
    """A group in a packed row: its stem, which is the prompt and what all completions begin with, then the rest of each
    completion, one after another. Numbers of tokens."""

    stem: int
    branches: tuple[int, ...]

    def positions(self) -> Iterator[int]:
        """The position id of each token: those of every branch go on from the stem's."""
        yield from range(self.stem)
        for length in self.branches:
            yield from range(self.stem, self.stem + length)


@dataclass(frozen=True)
class Inputs:
    """What one forward pass computes.

    ids: [B, T] int64. predict: [N] int64, flat positions whose hidden state predicts each completion token that counts.
    targets: [N] int64. states: [M] int64, flat positions from the last prompt token to the last completion token of
    each completion, or the latter alone. Of a packed row (without spans a row is one completion): positions [1, T]
    int64; copies: where completions of a group begin alike, int64, which of the N that are computed is each token that
    counts of all completions; sizes: how many of the N are each group's; read: int64, the positions whose last hidden
    state is looked at, each once.
    """

    ids: Tensor
    predict: Tensor
    targets: Tensor
    states: Tensor
    positions: Tensor | None = None
    spans: tuple[Span, ...] = ()
    copies: Tensor | None = None
    sizes: tuple[int, ...] = ()
    read: Tensor | None = None


def packed(groups: Sequence[Group], device: torch.device, *, ends: bool = False) -> Inputs:
    """The groups as one row without padding, in which every prompt stands once, and what all its completions begin with
    as well; with none, one token of which nothing is predicted, so that a rank without work still takes part in the
    collectives of a forward and a backward pass. ends: `states` are the last token of each completion alone."""
    ids: list[int] = []
    states: list[int] = []
    asked: dict[tuple[int, int], int] = {}  # (position, the token it predicts) -> which of the N
    copies: list[int] = []
    sizes: list[int] = []
    spans: list[Span] = []
    for group in groups:
        before, known = len(ids) + len(group.prompt) - 1, len(asked)
        shared = num_shared(group)
        ids += group.prompt
        ids += group.completions[0][:shared] if shared else ()
        stem = range(before, len(ids))
        for completion, mask in zip(group.completions, _masks(group), strict=True):
            path = [*stem, *range(len(ids), len(ids) + len(completion) - shared)]
            ids += completion[shared:]
            states += path[-1:] if ends else path
            copies += (asked.setdefault(at, len(asked)) for at in compress(zip(path, completion, strict=False), mask))
        sizes.append(len(asked) - known)
        spans.append(Span(len(group.prompt) + shared, tuple(len(c) - shared for c in group.completions)))
    if not ids:
        ids, spans = [0], [Span(1, ())]
    positions = [p for span in spans for p in span.positions()]
    return Inputs(
        ids=_index([ids], device),
        predict=_index([position for position, _ in asked], device),
        targets=_index([token for _, token in asked], device),
        states=_index(states, device),
        positions=_index([positions], device),
        spans=tuple(spans),
        copies=_index(copies, device) if len(asked) < len(copies) else None,
        sizes=tuple(sizes),
        read=_index(list(dict.fromkeys(states)), device),
    )


def num_shared(group: Group) -> int:
    """With how many tokens all completions of a group begin, where it has several."""
    if len(group.completions) < 2:
        return 0
    return length_shared(min(group.completions), max(group.completions))  # all others lie between these


def behind(groups: Sequence[Group], device: torch.device) -> Inputs:
    """The completions of some groups as one row whose prompts are computed already, in a row of groups with the same
    prompts in the same order: `predict` counts the last token of each prompt first, then the tokens of this row."""
    ids: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    spans: list[Span] = []
    for i, group in enumerate(groups):
        for completion, mask in zip(group.completions, _masks(group), strict=True):
            first = len(groups) + len(ids)
            ids += completion
            predict += compress([i, *range(first, first + len(completion) - 1)], mask)
            targets += compress(completion, mask)
        spans.append(Span(len(group.prompt), tuple(map(len, group.completions))))
    positions = [p for span in spans for p in islice(span.positions(), span.stem, None)]
    return Inputs(
        ids=_index([ids], device),
        predict=_index(predict, device),
        targets=_index(targets, device),
        states=_index([], device),
        positions=_index([positions], device),
        spans=tuple(spans),
    )


def joined(groups: Sequence[Group], most: int = 2) -> tuple[list[Group], list[list[int]]]:
    """(groups, positions): those of the same prompt as one, so that it is computed once, with at most `most`
    completions where they are not one group's own; positions: which of the given groups each of the new ones holds."""
    found: list[list[int]] = []
    room: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> (last group of it, completions that still fit)
    for i, group in enumerate(groups):
        at, free = room.get(tuple(group.prompt), (-1, 0))
        count = len(group.completions)
        if count <= free:
            found[at].append(i)
        else:
            at, free = len(found), most
            found.append([i])
        room[tuple(group.prompt)] = at, free - count
    return [_joined([groups[i] for i in part]) for part in found], found


def _joined(parts: Sequence[Group]) -> Group:
    if len(parts) == 1:
        return parts[0]
    masks = [tuple(m) for g in parts for m in _masks(g)] if any(g.masks is not None for g in parts) else None
    completions = tuple(c for g in parts for c in g.completions)
    return replace(parts[0], completions=completions, masks=None if masks is None else tuple(masks))


def rows(groups: Sequence[Group], device: torch.device, *, ends: bool = False) -> Inputs:
    """The groups as one completion a row, right padded with 0 (under a causal mask no real token sees the padding, so
    there is no mask): for models whose layers look at a row in other ways than causal attention does. ends: `states`
    are the last token of each completion alone."""
    sequences = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, _masks(g), strict=True)]
    width = max((len(p) + len(c) for p, c, _ in sequences), default=1)
    ids = torch.zeros(max(1, len(sequences)), width, dtype=torch.int64)
    predict: list[int] = []
    states: list[int] = []
    targets: list[int] = []
    for i, (prompt, completion, mask) in enumerate(sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        first = i * width + len(prompt) - 1
        path = range(first, first + len(completion) + 1)
        predict += compress(path[:-1], mask)
        states += path[-1:] if ends else path
        targets += compress(completion, mask)
    return Inputs(ids.to(device), _index(predict, device), _index(targets, device), _index(states, device))


def _index(numbers: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _masks(group: Group) -> Sequence[Sequence[bool]]:
    return [[True] * len(c) for c in group.completions] if group.masks is None else group.masks


def micro_batch(
    groups: Sequence[Group],
    device: torch.device,
    fields: Mapping[str, Sequence[Tensor]] | None = None,
    shared: Mapping[str, float] | None = None,
) -> MicroBatch:
    """The flat view of some groups that a loss works on; `fields` has one tensor for each of these groups."""
    lengths = torch.tensor([n for g in groups for n in g.lengths], dtype=torch.int64, device=device)
    segment = torch.repeat_interleave(lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(len(segment), device=device) - starts[segment]
    flat = {name: (torch.cat(list(x)) if x else torch.empty(0)).to(device) for name, x in (fields or {}).items()}
    return MicroBatch(groups, lengths, segment, position, flat, dict(shared or {}))


def cut(prepared: Prepared, positions: Sequence[int], device: torch.device) -> MicroBatch:
    """The micro-batch of the prepared groups at `positions`."""
    groups = [prepared.groups[i] for i in positions]
    fields = {name: [x[i] for i in positions] for name, x in prepared.fields.items()}
    return micro_batch(groups, device, fields, prepared.shared)


def chunks(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """`positions` in chunks of `size`."""
    return [positions[i : i + size] for i in range(0, len(positions), size)]


def bins(positions: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """`positions` in bins of at most `most` by their `sizes`: best fit, the largest first. One that is larger has a bin
    of its own."""
    found: list[list[int]] = []
    room: list[int] = []
    for position, size in sorted(zip(positions, sizes, strict=True), key=lambda x: (-x[1], x[0])):
        fitting = [i for i, free in enumerate(room) if free >= size]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            found[best].append(position)
            room[best] -= size
        else:
            found.append([position])
            room.append(most - size)
    return sorted(sorted(one) for one in found)


def num_tokens(groups: Sequence[Group]) -> int:
    """Real input tokens, each prompt once."""
    return sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)


def num_computed(group: Group, *, shared: bool = True) -> int:
    """How many tokens of a group a forward pass computes in a packed row, or with `shared` off in single rows."""
    again = max(0, len(group.completions) - 1)
    return num_tokens([group]) + again * (-num_shared(group) if shared else len(group.prompt))
