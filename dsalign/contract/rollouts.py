"""What online algorithms share: penalties, whitening, and the check of the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dsalign.contract.algorithm import Context
from dsalign.contract.groups import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


def token_kl(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """k1 = logp - ref, or k3 = e^(ref - logp) - 1 - (ref - logp) >= 0 (Schulman 2020), of each token, nats."""
    gap = logps - reference
    return gap if estimator == "k1" else torch.expm1(-gap) + gap


def whiten(ctx: Context, tokens: Sequence[Tensor], *, shift_mean: bool) -> list[Tensor]:
    """(x - mu) / sqrt(var + 1e-8) over the tokens of all ranks, var with n - 1; with shift_mean off mu is added back.
    Unchanged where there are fewer than two tokens."""
    flat = torch.cat([*tokens, torch.empty(0)]).double()
    n, total = ctx.total([float(len(flat)), float(flat.sum())])
    if n < 2:
        return list(tokens)
    mu = total / n
    (squares,) = ctx.total([float(((flat - mu) ** 2).sum())])
    scale = 1 / math.sqrt(squares / (n - 1) + 1e-8)
    return [((x.double() - mu) * scale + (0.0 if shift_mean else mu)).to(x.dtype) for x in tokens]


def token_values(values: Tensor, group: Group) -> Tensor:
    """[tokens + completions] values of a group -> [tokens]: V(s_t) of each token, without the value after the last."""
    parts = torch.split(values, [len(c) + 1 for c in group.completions])
    return torch.cat([v[:-1] for v in parts])


def logp_gap(sampler: Sequence[Tensor], old: Sequence[Tensor]) -> Metric:
    """(sum, count) of |sampler - trainer| over tokens, nats."""
    return (
        float(sum((s.double() - o.double()).abs().sum() for s, o in zip(sampler, old, strict=True))),
        sum(len(o) for o in old),
    )
