"""The textbook formulas of the head's operations, of decode attention and of GAE in plain torch, on whole tensors.

Tests and benchmarks measure every implementation against them, in float64. A run calls one alone: `gae`, on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class Logps(NamedTuple):
    """What a language model's head says about one target token a row of logits; every tensor is [N], float32.

    logps: the target's log-probability, nats, <= 0, differentiable; 0 where the target is ignored. lse: log-sum-exp of
    the row's logits. entropy: of the row's distribution, nats; None unless it was asked for. top: bool, whether the
    target is the row's most likely token; None unless it was asked for. Operations on float64 give float64.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    top: Tensor | None


class Advantages(NamedTuple):
    """What `gae` computes for N tokens of S completions; float32, or float64 of float64 inputs.

    advantages: [N], units of reward. means: [S], the mean advantage of each completion. squares: [S], the sum of
    squared distances from that mean. From both and the lengths follows the variance over the tokens of all completions,
    and of all ranks, without a difference of large sums: Chan, Golub and LeVeque (1979).
    """

    advantages: Tensor
    means: Tensor
    squares: Tensor


def selective_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """Log-probabilities of targets [N] from whole logits x [N, V]; see `dsalign_kernels.selective_logps`.

    logp = z_y - log sum_v e^(z_v), entropy = sum_v p_v (log sum_w e^(z_w) - z_v); z = softcap tanh(scale x / softcap) /
    temperature, or scale x / temperature without a softcap. Computed in float32, in float64 for float64.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    log_p = torch.log_softmax(z / temperature, 1)
    kept = targets != ignore_index
    picked = log_p.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(1).detach() if entropy else None
    tops = (kept & (picked >= log_p.amax(1)) if logits.shape[0] else kept) if top else None
    return Logps(torch.where(kept, picked, 0.0), torch.logsumexp(z / temperature, 1).detach(), entropies, tops)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """`selective_logps` of the logits hidden [N, D] x weight [V, D]^T + bias [V], all of which are in memory."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_logps(
        logits,
        targets,
        entropy=entropy,
        top=top,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
    )


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one query token a row, query [B, H, D], over all of a cache [B, heads, L, D] and a mask; see
    `dsalign_kernels.decode_attention`. Computed in float32, in float64 for float64."""
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (query, keys, values))
    k, v = (x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in (k, v))
    z = (k @ q[..., None])[..., 0] * (query.shape[2] ** -0.5 if scaling is None else scaling)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    behind = positions[:, None] - torch.arange(keys.shape[2], device=positions.device)
    seen = (behind >= 0) & (behind < (keys.shape[2] if window is None else window))
    p = torch.softmax(z.masked_fill(~seen[:, None], -torch.inf), 2)
    return (p[:, :, None] @ v)[:, :, 0].to(query.dtype)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Advantages A_t = sum_k (gamma lam)^k delta_{t+k} within each completion (arXiv:1506.02438, eq. 16).

    See `dsalign_kernels.gae`. All completions at a time, as rows that are reversed and padded: the sum over k is taken
    by doubling its number of terms, in log2 of the longest length turns.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    back = torch.arange(longest, device=rewards.device)
    inside = back < lengths[:, None]
    at = torch.where(inside, lengths.cumsum(0)[:, None] - 1 - back, 0)
    r, v = (torch.where(inside, x[at], 0) for x in (rewards, values))
    delta = r - v
    delta[:, 1:] += gamma * v[:, :-1]
    shift, factor = 1, gamma * lam  # after each turn a number holds the terms of twice as many tokens
    while shift < longest:
        delta = torch.cat([delta[:, :shift], delta[:, shift:] + factor * delta[:, :-shift]], 1)
        shift, factor = 2 * shift, factor * factor
    advantages = torch.empty_like(rewards)
    advantages[at[inside]] = delta[inside]
    kept = torch.where(inside, delta, 0)
    means = kept.sum(1) / lengths.clamp_min(1)
    return Advantages(advantages, means, torch.where(inside, (kept - means[:, None]) ** 2, 0).sum(1))
