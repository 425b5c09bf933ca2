"""From groups to the tensors of a forward pass, and to the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice

import torch
from torch import Tensor

from dsalign.algos import MicroBatch, Prepared
from dsalign.data.tokenize import Group


@dataclass(frozen=True)
class Span:
    """A group in a packed row: its prompt, then its completions one after another. Numbers of tokens."""

    prompt: int
    completions: tuple[int, ...]

    def positions(self) -> Iterator[int]:
        """The position id of each token: those of every completion go on from the prompt's."""
        yield from range(self.prompt)
        for length in self.completions:
            yield from range(self.prompt, self.prompt + length)


@dataclass(frozen=True)
class Inputs:
    """What one forward pass computes.

    ids: [B, T] int64. predict: [N] int64, flat positions whose hidden state predicts each completion token that counts.
    targets: [N] int64. states: [M] int64, flat positions from the last prompt token to the last completion token of
    each completion. positions: [1, T] int64 and spans: of a packed row; without them a row is one completion.
    """

    ids: Tensor
    predict: Tensor
    targets: Tensor
    states: Tensor
    positions: Tensor | None = None
    spans: tuple[Span, ...] = ()


def packed(groups: Sequence[Group], device: torch.device) -> Inputs:
    """The groups as one row without padding, in which every prompt stands once; with none, one token of which nothing
    is predicted, so that a rank without work still takes part in the collectives of a forward and a backward pass."""
    ids: list[int] = []
    predict: list[int] = []
    states: list[int] = []
    targets: list[int] = []
    spans: list[Span] = []
    for group in groups:
        last = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        for completion, mask in zip(group.completions, _masks(group), strict=True):
            path = [last, *range(len(ids), len(ids) + len(completion))]
            ids += completion
            states += path
            predict += compress(path[:-1], mask)
            targets += compress(completion, mask)
        spans.append(Span(len(group.prompt), tuple(map(len, group.completions))))
    if not ids:
        ids, spans = [0], [Span(1, ())]
    positions = [p for span in spans for p in span.positions()]
    row, where = (torch.tensor([x], device=device) for x in (ids, positions))
    return Inputs(row, *_index(device, predict, targets, states), where, tuple(spans))


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
    positions = [p for span in spans for p in islice(span.positions(), span.prompt, None)]
    row, where = (torch.tensor([x], device=device) for x in (ids, positions))
    return Inputs(row, *_index(device, predict, targets, []), where, tuple(spans))


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


def rows(groups: Sequence[Group], device: torch.device) -> Inputs:
    """The groups as one completion a row, right padded with 0 (under a causal mask no real token sees the padding, so
    there is no mask): for models whose layers look at a row in other ways than causal attention does."""
    sequences = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, _masks(g), strict=True)]
    width = max((len(p) + len(c) for p, c, _ in sequences), default=1)
    ids = torch.zeros(max(1, len(sequences)), width, dtype=torch.int64)
    predict: list[int] = []
    states: list[int] = []
    targets: list[int] = []
    for i, (prompt, completion, mask) in enumerate(sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        first = i * width + len(prompt) - 1
        predict += compress(range(first, first + len(completion)), mask)
        states += range(first, first + len(completion) + 1)
        targets += compress(completion, mask)
    return Inputs(ids.to(device), *_index(device, predict, targets, states))


def _index(device: torch.device, *lists: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    predict, targets, states = (torch.tensor(x, dtype=torch.int64, device=device) for x in lists)
    return predict, targets, states


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


def num_tokens(groups: Sequence[Group], *, shared: bool = True) -> int:
    """Real input tokens, each prompt once, or with `shared` off once a completion."""
    return sum(
        len(g.prompt) * (1 if shared else max(1, len(g.completions))) + sum(len(c) for c in g.completions)
        for g in groups
    )
