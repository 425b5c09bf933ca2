"""Plain-torch operations: what every kernel is measured against, and what runs where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 * 1024 * 1024  # float32 work space for one chunk of rows


def selective_logps(logits: Tensor, targets: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """The log-probability of one target a row, in float32 whatever the dtype of the logits.

    logits: [N, V] float; targets: [N] int64 in [0, V). Returns logps [N] float32, nats, <= 0, differentiable in the
    logits, and the entropy [N] float32, nats, without gradient, where it is asked for. Beyond the logits the forward
    keeps 4 bytes a row, and the backward allocates the logits' gradient and one chunk.
    Raises ValueError where the shapes do not fit.
    logp = z_y - log sum_v e^(z_v); d logp / d z_v = [v = y] - p_v; entropy = sum_v p_v (log sum_w e^(z_w) - z_v).
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits [N, V] and targets [N], got {tuple(logits.shape)} and {tuple(targets.shape)}")
    logps, entropies = _SelectiveLogps.apply(logits, targets, entropy)  # type: ignore[no-untyped-call]
    return logps, entropies if entropy else None


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        entropies = torch.empty_like(lse) if entropy else lse.new_empty(0)
        for rows in _chunks(logits):
            z = logits[rows].float()
            lse[rows] = torch.logsumexp(z, 1)
            if entropy:
                p = torch.softmax(z, 1)
                entropies[rows] = p.mul_(lse[rows, None] - z).sum(1)  # terms >= 0: a difference of sums would cancel
        picked = logits.gather(1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, lse)
        ctx.mark_non_differentiable(entropies)
        return picked - lse, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            p = logits[rows].to(torch.float32, copy=True).sub_(lse[rows, None]).exp_().mul_(-grads[0][rows, None])
            p.scatter_add_(1, targets[rows, None], grads[0][rows, None])
            grad[rows] = p.to(grad.dtype)
        return grad, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy stays within CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(i, i + size) for i in range(0, len(logits), size)]
