"""PPO's arithmetic on flat tokens, each in one launch on a GPU: advantages (GAE) and the two clipped losses.

`gae` has a torch implementation beside the kernel, for CPUs and float64. The clipped losses are kernels alone:
elsewhere `policy_loss` and `value_loss` of dsalign/algos/ppo.py compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsalign_kernels import reference
from dsalign_kernels.preference import WithGradient
from dsalign_kernels.reference import Advantages
from dsalign_kernels.rows import Impl, need_triton, uses_triton

try:
    from dsalign_kernels import token_kernels
except ImportError:  # triton is published for Linux alone
    token_kernels = None  # type: ignore[assignment]


class Clipped(NamedTuple):
    """What a clipped loss computes. loss: scalar float32, with gradient. metrics: name -> scalar float32, a sum over
    tokens, without gradient and without the loss's factor."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float, impl: Impl = "auto"
) -> Advantages:
    """Generalised advantage estimates of each completion's tokens, without gradient: arXiv:1506.02438, eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; V and A are 0 after a completion's last
    token, also where it was cut by its length.

    rewards, values: [N] float32 (float64: by torch), units of reward, the tokens of all S completions, one after
    another; lengths: [S] int64 >= 1, tokens of each completion, together N. gamma: discount a token; lam: decay a
    token; both in [0, 1]. Raises ValueError where shapes, dtypes or `impl` do not fit.
    """
    _check("rewards and values", rewards, values, dtypes=(torch.float32, torch.float64))
    if not uses_triton(impl, rewards):
        return reference.gae(rewards, values, lengths, gamma=gamma, lam=lam)
    return Advantages(*token_kernels.gae(rewards.contiguous(), values.contiguous(), lengths, gamma, lam))


def clipped_policy(logps: Tensor, old: Tensor, advantages: Tensor, *, cliprange: float, scale: float = 1.0) -> Clipped:
    """scale x sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps)): arXiv:1707.06347, eq. 7.

    rho = e^clamp(logp - old, -20, 20). Beyond 20 nats a token's gradient is 0; without the clamp e^89 is infinite in
    float32, and its product with the 0 slope of the clipped branch NaN.

    Differentiable in logps. logps, old: [N] float32, nats, log-probabilities of the sampled tokens by the policy in
    training and by the policy that sampled them; advantages: [N] float32; cliprange: eps > 0; scale: factor of the
    loss. Metrics: "loss"; "approxkl" = 1/2 (logp - old)^2, not clamped; "clipfrac" = 1 where the clipped term is the
    larger; "ratio" = rho.
    Raises ValueError without a GPU and the triton package (or Triton's interpreter), and where shapes or dtypes do not
    fit.
    """
    need_triton("clipped_policy", logps.device)
    _check("logps, old and advantages", logps, old, advantages)
    gradient = logps.requires_grad and torch.is_grad_enabled()
    totals, slopes = token_kernels.clipped_policy(logps, old, advantages, cliprange, scale, gradient=gradient)
    return _result(logps, totals, slopes, scale, ("loss", "approxkl", "clipfrac", "ratio"))


def clipped_value(
    values: Tensor, old: Tensor, returns: Tensor, segment: Tensor, *, cliprange: float, scale: float = 1.0
) -> Clipped:
    """scale x 1/2 sum_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2): the critic's loss beside eq. 7 of
    arXiv:1707.06347, held near the old values (arXiv:2005.12729).

    Differentiable in values. values: [N + S] float32, units of reward, the critic's numbers of S completions: one
    before each token and one after the last, which has no part in the loss. old: [N] float32, the values at sampling;
    returns: [N] float32; segment: [N] int64, the completion of each token, ascending from 0 to S - 1; cliprange:
    eps > 0, units of reward; scale: factor of the loss. Metrics: "loss", "clipfrac" = 1 where the held term is the
    larger.
    Raises ValueError without a GPU and the triton package (or Triton's interpreter), and where shapes or dtypes do not
    fit.
    """
    need_triton("clipped_value", values.device)
    _check("old and returns", old, returns)
    if values.dim() != 1 or values.dtype != old.dtype or segment.shape != old.shape:
        raise ValueError(
            f"values [N + S] {old.dtype} and segment {tuple(old.shape)}, got {tuple(values.shape)} {values.dtype} and "
            f"{tuple(segment.shape)}"
        )
    gradient = values.requires_grad and torch.is_grad_enabled()
    totals, slopes = token_kernels.clipped_value(values, old, returns, segment, cliprange, scale, gradient=gradient)
    return _result(values, totals, slopes, scale, ("loss", "clipfrac"))


def _result(x: Tensor, totals: Tensor, slopes: Tensor | None, scale: float, names: tuple[str, ...]) -> Clipped:
    loss = scale * totals[0]
    loss = loss if slopes is None else WithGradient.apply(x, loss, slopes)  # type: ignore[no-untyped-call]
    return Clipped(loss, {name: totals[i] for i, name in enumerate(names)})


def _check(names: str, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    kinds = [(tuple(x.shape), x.dtype) for x in tensors]
    if len(set(kinds)) > 1 or tensors[0].dim() != 1 or tensors[0].dtype not in dtypes:
        got = ", ".join(f"{shape} {dtype}" for shape, dtype in kinds)
        raise ValueError(f"{names}: expected [N] float32, got {got}")
