"""Log-probabilities, values and scores by a model's own forward, one unpadded sequence at a time, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group


@torch.no_grad()
def plain_logps(model: Any, groups: Sequence[Group]) -> list[Tensor]:
    """One [tokens of the group's completions] tensor a group, nats."""
    found = []
    for group in groups:
        parts = []
        for completion in group.completions:
            logits = model(torch.tensor([[*group.prompt, *completion]])).logits[0, len(group.prompt) - 1 : -1]
            parts.append(torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(completion)[:, None])[:, 0])
        found.append(torch.cat(parts))
    return found


@torch.no_grad()
def plain_values(model: Any, weight: Tensor, bias: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """One [tokens + completions] tensor a group: weight . state + bias from the last prompt token to the last token."""
    found = []
    for group in groups:
        parts = []
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt, *completion]])
            states = model(ids, output_hidden_states=True).hidden_states[-1][0, len(group.prompt) - 1 :]
            parts.append(states.float() @ weight[0] + bias[0])
        found.append(torch.cat(parts))
    return found


def plain_scores(model: Any, weight: Tensor, bias: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """One [completions] tensor a group: the value at the last token."""
    ends = [torch.tensor([len(c) + 1 for c in group.completions]).cumsum(0) - 1 for group in groups]
    return [v[i] for v, i in zip(plain_values(model, weight, bias, groups), ends, strict=True)]
