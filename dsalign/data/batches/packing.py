"""Groups as the tensors of a forward pass, and as the flat micro-batches that a loss works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group, MicroBatch, Prepared
from dsalign.data.tokens.text_ids import length_shared

WORTH_SHARING = 8  # tokens with which prompts must begin alike


@dataclass(frozen=True)
class Span:
    """Tokens of a packed row that are computed once, and what goes on from them.

    length: number of tokens, which see what the span goes on from, and each other, causally. branches: spans that go on
    from this one; each sees it, and not the other branches. In a row a span's own tokens come first, then its branches,
    each whole.
    """

    length: int
    branches: tuple[Span, ...] = ()

    @property
    def size(self) -> int:
        """Number of tokens, those of the branches included."""
        return self.length + sum(one.size for one in self.branches)

    def positions(self, start: int = 0) -> Iterator[int]:
        """The position id of each token, the first one's being `start`: every branch goes on where the span ends, as if
        it stood there alone."""
        yield from range(start, start + self.length)
        for one in self.branches:
            yield from one.positions(start + self.length)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one forward pass. B rows of T tokens; N predicted tokens; M positions of values or rewards. "Flat"
    positions index [B * T].

    ids: [B, T] int64. predict: [N] int64, flat positions whose hidden state predicts a completion token that counts
    (its mask is true). targets: [N] int64, those tokens. states: [M] int64, flat positions at which a value head is
    read: from the last prompt token to the last completion token of each completion, or of each completion the last
    token alone.
    Of a packed row only (a padded one has None or ()): positions: [1, T] int64 position ids. spans: where each group
    stands. copies: [number of completion tokens that count] int64, or None where it would be 0, 1, 2, ...: which of the
    N predicted tokens each one is, as completions of a group that begin alike share theirs. sizes: how many of the N
    belong to each group. read: int64, `states` without repetition.
    Of padded rows only: real: [B, T] int64, 1 for tokens and 0 for padding, None where there is no padding.
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
    real: Tensor | None = None


def packed(groups: Sequence[Group], device: torch.device, *, ends: bool = False, whole: bool = False) -> Inputs:
    """All groups in one row without padding: each prompt stands once, and so do the tokens with which all its
    completions begin, and those with which several prompts begin. For models whose attention keeps branches apart
    (`models/attention.py`).

    ends: `states` has the last token of each completion alone, as a reward model needs. whole: prompts that begin alike
    stand whole all the same. Without groups the row is one token of which nothing is predicted, as a rank without work
    must still take part in the collectives of a forward and backward pass.
    """
    states: list[int] = []
    asked: dict[tuple[int, int], int] = {}  # (position, the token it predicts) -> which of the N
    copies: list[int] = []
    sizes: list[int] = []
    ids, spans, last = _row(
        groups, [(0, [i]) for i in range(len(groups))] if whole else alike([g.prompt for g in groups])
    )
    for group, before in zip(groups, last, strict=True):
        known, shared = len(asked), num_shared(group)
        at = before + 1 + shared
        stem = range(before, at)
        for completion, mask in zip(group.completions, group.counted, strict=True):
            path = [*stem, *range(at, at + len(completion) - shared)]
            at += len(completion) - shared
            states += path[-1:] if ends else path
            copies += (asked.setdefault(x, len(asked)) for x in compress(zip(path, completion, strict=False), mask))
        sizes.append(len(asked) - known)
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


def _row(
    groups: Sequence[Group], parts: Sequence[tuple[int, Sequence[int]]]
) -> tuple[list[int], list[Span], list[int]]:
    """(ids, spans, the position of each group's last prompt token) of a packed row. parts: as `alike` returns them."""
    ids: list[int] = []
    spans: list[Span] = []
    last = [0] * len(groups)
    for common, members in sorted(parts, key=lambda part: min(part[1])):
        ids += groups[members[0]].prompt[:common]
        branches = []
        for i in members:
            group, shared = groups[i], num_shared(groups[i])
            own = group.prompt[common:]
            last[i] = len(ids) + len(own) - 1
            ids += [*own, *(group.completions[0][:shared] if shared else ())]
            for completion in group.completions:
                ids += completion[shared:]
            branches.append(Span(len(own) + shared, tuple(Span(len(c) - shared) for c in group.completions)))
        spans += [Span(common, tuple(branches))] if common else branches
    return (ids, spans, last) if ids else ([0], [Span(1)], last)


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


def num_shared(group: Group) -> int:
    """Number of tokens with which all completions of a group begin; 0 where it has fewer than two."""
    if len(group.completions) < 2:
        return 0
    return length_shared(min(group.completions), max(group.completions))  # all others lie between these


def joined(groups: Sequence[Group], most: int = 2) -> tuple[list[Group], list[list[int]]]:
    """Groups of one prompt merged into one, so that its forward is computed once.

    most: completions that a merged group has at most; a group is never split, whatever it has.
    Returns (groups, positions): positions[i] are the given groups that the i-th returned one holds.
    """
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
    masks = [tuple(m) for g in parts for m in g.counted] if any(g.masks is not None for g in parts) else None
    completions = tuple(c for g in parts for c in g.completions)
    return replace(parts[0], completions=completions, masks=None if masks is None else tuple(masks))


def padded(groups: Sequence[Group], device: torch.device, *, ends: bool = False) -> Inputs:
    """Groups as one completion a row, ids [completions, longest row], right padded with 0: for models that cannot take
    a packed row.

    No attention mask is needed: under a causal mask no real token sees the padding behind it. ends: as for `packed`.
    """
    sequences = [(g.prompt, c, m) for g in groups for c, m in zip(g.completions, g.counted, strict=True)]
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
    sizes = torch.tensor([len(p) + len(c) for p, c, _ in sequences] or [1])
    real = (torch.arange(width) < sizes[:, None]).long() if int(sizes.min()) < width else None
    return Inputs(
        ids.to(device),
        _index(predict, device),
        _index(targets, device),
        _index(states, device),
        real=None if real is None else real.to(device),
    )


def _index(numbers: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def micro_batch(
    groups: Sequence[Group],
    device: torch.device,
    fields: Mapping[str, Sequence[Tensor]] | None = None,
    shared: Mapping[str, float] | None = None,
) -> MicroBatch:
    """The flat view of some groups that a loss works on, on `device`.

    fields: name -> one tensor a group, which are joined along their first dimension. shared: numbers of the whole
    global batch.
    """
    lengths = torch.tensor([n for g in groups for n in g.lengths], dtype=torch.int64, device=device)
    segment = torch.repeat_interleave(lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(len(segment), device=device) - starts[segment]
    flat = {name: (torch.cat(list(x)) if x else torch.empty(0)).to(device) for name, x in (fields or {}).items()}
    return MicroBatch(groups, lengths, segment, position, flat, dict(shared or {}))


def cut(prepared: Prepared, positions: Sequence[int], device: torch.device) -> MicroBatch:
    """The micro-batch of those prepared groups that stand at `positions`, with their part of every field."""
    groups = [prepared.groups[i] for i in positions]
    fields = {name: [x[i] for i in positions] for name, x in prepared.fields.items()}
    return micro_batch(groups, device, fields, prepared.shared)


def chunks(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """Micro-batches of `size` groups: `positions` in their order, the last chunk may be shorter."""
    return [positions[i : i + size] for i in range(0, len(positions), size)]


def bins(positions: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Micro-batches of at most `most` tokens: `positions` put into bins by best fit, the largest first.

    sizes: tokens of the group at each position. A group that is larger than `most` has a bin of its own.
    """
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
    """Tokens of prompts and completions, without padding; a prompt counts once, whatever the number of its
    completions."""
    return sum(len(g.prompt) + sum(map(len, g.completions)) for g in groups)


def num_computed(group: Group, *, shared: bool = True) -> int:
    """Tokens of a group that a forward pass computes at most: in a packed row, where no other prompt begins like its
    own, or, where `shared` is false, in padded rows, in
    which each completion has a prompt of its own (padding is not counted)."""
    again = max(0, len(group.completions) - 1)
    return num_tokens([group]) + again * (-num_shared(group) if shared else len(group.prompt))
