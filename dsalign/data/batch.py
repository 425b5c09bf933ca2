"""From groups to the tensors of a forward pass: one completion a row, right padded, the padding gone after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsalign.algos import MicroBatch, Prepared
from dsalign.data.tokenize import Group


@dataclass(frozen=True)
class Rows:
    """Inputs of one forward pass.

    ids: [B, T] int64, right padded with 0 (under a causal mask no real token sees the padding, so there is no mask).
    predict: [N] int64, flat positions whose hidden state predicts each completion token. targets: [N] int64.
    states: [N + S] int64, flat positions from the last prompt token to the last completion token of each completion.
    """

    ids: Tensor
    predict: Tensor
    targets: Tensor
    states: Tensor


def rows(groups: Sequence[Group], device: torch.device) -> Rows:
    """The rows of some groups; with none, one row of one token of which nothing is predicted, so that a rank without
    work still takes part in the collectives of a forward and a backward pass."""
    sequences = [(g.prompt, completion) for g in groups for completion in g.completions]
    width = max((len(p) + len(c) for p, c in sequences), default=1)
    ids = torch.zeros(max(1, len(sequences)), width, dtype=torch.int64)
    predict: list[int] = []
    states: list[int] = []
    targets: list[int] = []
    for i, (prompt, completion) in enumerate(sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        first = i * width + len(prompt) - 1
        predict += range(first, first + len(completion))
        states += range(first, first + len(completion) + 1)
        targets += completion
    index = [torch.tensor(x, dtype=torch.int64, device=device) for x in (predict, targets, states)]
    return Rows(ids.to(device), *index)


def micro_batch(
    groups: Sequence[Group],
    device: torch.device,
    fields: Mapping[str, Sequence[Tensor]] | None = None,
    shared: Mapping[str, float] | None = None,
) -> MicroBatch:
    """The flat view of some groups that a loss works on; `fields` has one tensor for each of these groups."""
    lengths = torch.tensor([len(c) for g in groups for c in g.completions], dtype=torch.int64, device=device)
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


def chunks(positions: Sequence[int], size: int, count: int) -> list[Sequence[int]]:
    """`positions` in chunks of `size`, then empty ones up to `count` chunks."""
    found = [positions[i : i + size] for i in range(0, len(positions), size)]
    return [*found, *[positions[:0]] * (count - len(found))]


def num_tokens(groups: Sequence[Group]) -> int:
    """Real input tokens, each prompt once."""
    return sum(len(g.prompt) + sum(len(c) for c in g.completions) for g in groups)
