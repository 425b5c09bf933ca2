"""PPO's arithmetic on flat tokens: advantages and the clipped losses, each in one launch on a GPU; float64 by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsalign_kernels import reference
from dsalign_kernels.preference import WithGradient
from dsalign_kernels.reference import Advantages, Clipped
from dsalign_kernels.rows import Impl, uses_triton

try:
    from dsalign_kernels import token_kernels
except ImportError:  # triton is published for Linux alone
    token_kernels = None  # type: ignore[assignment]


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float, impl: Impl = "auto"
) -> Advantages:
    """delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, V and A 0 after the last token.

    rewards, values: [N] float32, the tokens of all completions in order; lengths: [S] int64 >= 1, together N. No
    gradient. Raises ValueError where shapes, dtypes or `impl` do not fit. Source: arXiv:1506.02438, eq. 16.
    """
    _same("rewards and values", rewards, values)
    if not uses_triton(impl, rewards):
        return reference.gae(rewards, values, lengths, gamma=gamma, lam=lam)
    return Advantages(*token_kernels.gae(rewards.contiguous(), values.contiguous(), lengths, gamma, lam))


def clipped_policy(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    cliprange: float,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Clipped:
    """scale x sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = e^(logp - old), differentiable in logps.

    All [N] float32. Metrics: "loss", "approxkl" (half the squared change), "clipfrac", "ratio", sums over tokens.
    Raises ValueError where shapes, dtypes or `impl` do not fit. Source: arXiv:1707.06347, eq. 7.
    """
    _same("logps, old and advantages", logps, old, advantages)
    if not uses_triton(impl, logps):
        return reference.clipped_policy(logps, old, advantages, cliprange=cliprange, scale=scale)
    gradient = logps.requires_grad and torch.is_grad_enabled()
    totals, slopes = token_kernels.clipped_policy(logps, old, advantages, cliprange, scale, gradient=gradient)
    return _result(logps, totals, slopes, scale, ("loss", "approxkl", "clipfrac", "ratio"))


def clipped_value(
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    segment: Tensor,
    *,
    cliprange: float,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Clipped:
    """scale x 1/2 sum_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), differentiable in values.

    values: [N + S] float32, one a token and one after each completion, which has no gradient; old, returns: [N];
    segment: [N] int64, the completion of each token, ascending from 0 to S - 1. Metrics: "loss", "clipfrac".
    Raises ValueError where shapes, dtypes or `impl` do not fit.
    """
    _same("old and returns", old, returns)
    if values.dim() != 1 or values.dtype != old.dtype or segment.shape != old.shape:
        raise ValueError(
            f"values [N + S] {old.dtype} and segment {tuple(old.shape)}, got {tuple(values.shape)} {values.dtype} and "
            f"{tuple(segment.shape)}"
        )
    if not uses_triton(impl, values):
        return reference.clipped_value(values, old, returns, segment, cliprange=cliprange, scale=scale)
    gradient = values.requires_grad and torch.is_grad_enabled()
    totals, slopes = token_kernels.clipped_value(values, old, returns, segment, cliprange, scale, gradient=gradient)
    return _result(values, totals, slopes, scale, ("loss", "clipfrac"))


def _result(x: Tensor, totals: Tensor, slopes: Tensor | None, scale: float, names: tuple[str, ...]) -> Clipped:
    loss = scale * totals[0]
    loss = loss if slopes is None else WithGradient.apply(x, loss, slopes)  # type: ignore[no-untyped-call]
    return Clipped(loss, {name: totals[i] for i, name in enumerate(names)})


def _same(names: str, *tensors: Tensor) -> None:
    kinds = [(tuple(x.shape), x.dtype) for x in tensors]
    if len(set(kinds)) > 1 or tensors[0].dim() != 1 or tensors[0].dtype not in (torch.float32, torch.float64):
        got = ", ".join(f"{shape} {dtype}" for shape, dtype in kinds)
        raise ValueError(f"{names}: expected [N] float32, got {got}")
