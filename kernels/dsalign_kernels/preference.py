"""Preference losses: token log-probabilities -> sums, loss, metrics and gradient, in one launch on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsalign_kernels import reference as twin
from dsalign_kernels.reference import MOST_LOSSES, Preference, Recipe
from dsalign_kernels.rows import Impl, uses_triton

try:
    from dsalign_kernels import pair_kernels
except ImportError:  # triton is published for Linux alone
    pair_kernels = None  # type: ignore[assignment]

PAIRED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/mean_chosen", "logps/mean_rejected", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip
LABELLED = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "desirable")


def preference(
    logps: Tensor,
    lengths: Tensor,
    recipe: Recipe,
    *,
    reference: Tensor | None = None,
    desirable: Tensor | None = None,
    scale: float = 1.0,
    nll_scale: float = 0.0,
    impl: Impl = "auto",
) -> Preference:
    """scale x the sum of the recipe's losses + nll_scale x -(the sum of the chosen completions' log-probabilities),
    differentiable in logps; the metrics and sums are not.

    logps, reference: [N] float32 (float64: by plain torch), nats, the tokens of all completions in order; reference: 0
    where None. lengths: [S] int64 >= 1, together N, chosen before rejected; desirable: [S] bool, where each completion
    stands for itself.
    Raises ValueError where shapes, dtypes, names or `impl` do not fit.
    """
    _check(logps, lengths, recipe, reference, desirable)
    if not uses_triton(impl, logps):
        return twin.preference(
            logps, lengths, recipe, reference=reference, desirable=desirable, scale=scale, nll_scale=nll_scale
        )
    gradient = logps.requires_grad and torch.is_grad_enabled()
    dense = None if reference is None else reference.contiguous()
    totals, sums, slopes = pair_kernels.preference(
        logps.detach().contiguous(), dense, lengths, recipe, desirable, scale, nll_scale, gradient=gradient
    )
    names = PAIRED if desirable is None else LABELLED
    metrics = {name: totals[i] for i, name in enumerate(names) if i}
    if desirable is None and "odds_ratio" not in recipe.losses:
        metrics = {name: x for name, x in metrics.items() if not name.startswith("log_odds")}
    loss = totals[0] if slopes is None else WithGradient.apply(logps, totals[0], slopes)  # type: ignore[no-untyped-call]
    return Preference(loss, sums, metrics)


class WithGradient(torch.autograd.Function):
    """A number whose gradient in x was computed with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _check(logps: Tensor, lengths: Tensor, recipe: Recipe, reference: Tensor | None, desirable: Tensor | None) -> None:
    if logps.dim() != 1 or logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps: expected [N] float32, got {tuple(logps.shape)} {logps.dtype}")
    if reference is not None and (reference.shape != logps.shape or reference.dtype != logps.dtype):
        wanted = f"{tuple(logps.shape)} {logps.dtype}"
        raise ValueError(f"reference: expected {wanted}, got {tuple(reference.shape)} {reference.dtype}")
    known = twin.LABEL_LOSSES if desirable is not None else twin.PAIR_LOSSES
    unknown = [name for name in recipe.losses if name not in known]
    if unknown or not 0 < len(recipe.losses) <= MOST_LOSSES:
        found = ", ".join(unknown or recipe.losses) or "none"
        raise ValueError(f"losses: expected one to three of {', '.join(known)}, got {found}")
    if desirable is None and len(lengths) % 2:
        raise ValueError(f"lengths: expected a chosen and a rejected completion a pair, got {len(lengths)} completions")
    if desirable is not None and desirable.shape != lengths.shape:
        raise ValueError(f"desirable: expected one a completion {tuple(lengths.shape)}, got {tuple(desirable.shape)}")
    if desirable is not None and reference is None:
        raise ValueError("reference: kto needs the reference's log-probabilities, got none")
