"""The log-probability of one target token a row of logits. The forward reads the logits once, the backward reads them
and writes their gradient; no softmax of all rows is kept between both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsalign_kernels import rows
from dsalign_kernels.reference import IGNORE_INDEX, Logps
from dsalign_kernels.rows import Impl, Transform


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
    in_place: bool = False,
    impl: Impl = "auto",
) -> Logps:
    """Log-probabilities of the targets, differentiable in the logits: float32, or float64 of float64 logits, by torch.

    logp = z_y - log sum_v e^(z_v); d logp / d z_v = [v = y] - p_v; entropy = sum_v p_v (log sum_w e^(z_w) - z_v), with
    z = softcap tanh(scale x / softcap) / temperature of the logits x, or scale x / temperature without a softcap.

    logits: [N, V] float; targets: [N] int64 in [0, V), or ignore_index, which gives 0 and no gradient. entropy, top:
    whether `Logps` has these fields. scale, softcap, temperature: > 0.
    in_place: the backward writes the gradient over the logits instead of into new memory; then nothing else may read
    them, and there is one backward. Beside the logits the forward keeps 4 bytes a row.
    Raises ValueError where shapes, dtypes or `impl` do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits [N, V] and targets [N], got {tuple(logits.shape)} and {tuple(targets.shape)}")
    rows.check(len(logits), targets, "logits [N, V]")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    how = Transform(scale, softcap, temperature, ignore_index)
    triton = rows.uses_triton(impl, logits)
    found = _SelectiveLogps.apply(logits, targets, how, entropy, top, in_place, triton)  # type: ignore[no-untyped-call]
    return Logps(*found)


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        how: Transform,
        entropy: bool,
        top: bool,
        in_place: bool,
        triton: bool,
    ) -> tuple[Tensor | None, ...]:
        found = rows.stats(logits, targets, how, entropy=entropy, top=top, triton=triton)
        ctx.how, ctx.triton, ctx.in_place = how, triton, in_place
        ctx.save_for_backward(logits, targets, found[1])
        ctx.mark_non_differentiable(*[x for x in found[1:] if x is not None])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lses = ctx.saved_tensors
        out = logits.detach() if ctx.in_place else torch.empty_like(logits)
        weights = grads[0].to(rows.wide(grads[0].dtype)).contiguous()
        return rows.gradient(logits, out, targets, lses, weights, ctx.how, triton=ctx.triton), *[None] * 6
