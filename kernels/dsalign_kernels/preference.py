"""Losses of preference pairs and of labelled completions in one Triton launch: loss, sums, metrics and gradient.

There is no implementation in plain torch here: on a CPU an algorithm's own `policy_loss` (dsalign/algos) computes the
same numbers, and tests/kernels/test_preference.py holds the kernel against it in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsalign_kernels.rows import need_triton

try:
    from dsalign_kernels import pair_kernels
except ImportError:  # triton is published for Linux alone
    pair_kernels = None  # type: ignore[assignment]

PAIRED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/mean_chosen", "logps/mean_rejected", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip
LABELLED = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "desirable")


@dataclass(frozen=True)
class Recipe:
    """The loss of preference pairs, or of single labelled completions, that a launch of the kernel computes.

    Delta of a completion: the sum over its tokens of logp - logp_reference, nats; without a reference, of logp.

    losses: name -> weight, one to three names of `pair_kernels.LOSSES` (their formulas and papers stand in
    dsalign/contract/preference_losses.py, algos/simpo.py and algos/orpo.py), or "kto" alone for labelled completions.
    beta: reward a nat, > 0. reference: whether a reference's log-probabilities are subtracted.
    label_smoothing: probability that a label is flipped, in [0, 1/2).
    gamma: target margin of "sigmoid_norm", units of reward (SimPO, arXiv:2405.14734). tau: temperature of "discopop",
    > 0. divergence, alpha: the f-divergence that replaces Delta, a name of `pair_kernels.DIVERGENCES`, and the alpha
    of "alpha" (arXiv:2309.16240). tail: weight of the tokens beyond the pair's shorter completion, in [0, 1]
    (LD-DPO, arXiv:2409.06411). mean_rewards: the logged rewards are beta times Delta a token, not times Delta.
    desirable_weight, undesirable_weight, z0: lambda_D, lambda_U and the reference point in nats of "kto"
    (arXiv:2402.01306, eq. 8).
    """

    losses: Mapping[str, float]
    beta: float
    reference: bool = False
    label_smoothing: float = 0.0
    gamma: float = 0.0
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 1.0
    tail: float = 1.0
    mean_rewards: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    z0: float = 0.0


class Preference(NamedTuple):
    """What `preference` computes. loss: scalar float32, with gradient. sums: [S] float32, the log-probability of each
    completion, nats. metrics: name of `PAIRED` or `LABELLED` -> scalar float32, a sum over pairs; of labelled
    completions ".../chosen" sums over the desirable ones, ".../rejected" over the others, "desirable" counts them."""

    loss: Tensor
    sums: Tensor
    metrics: Mapping[str, Tensor]


def preference(
    logps: Tensor,
    lengths: Tensor,
    recipe: Recipe,
    *,
    reference: Tensor | None = None,
    desirable: Tensor | None = None,
    scale: float = 1.0,
    nll_scale: float = 0.0,
) -> Preference:
    """scale x the sum of the recipe's losses - nll_scale x the sum of the chosen completions' log-probabilities.

    The loss is differentiable in logps; sums and metrics are not.

    logps: [N] float32, nats, the policy's log-probabilities of the tokens of all S completions, one after another.
    lengths: [S] int64 >= 1, tokens of each completion, together N. Of pairs the chosen completion stands before the
    rejected one, so S is even. reference: [N] float32, nats, the reference's log-probabilities of the same tokens;
    given if and only if recipe.reference. desirable: [S] bool, the labels of single completions; None for pairs.
    scale, nll_scale: factors of both terms; the second is of pairs alone.
    Raises ValueError without a GPU and the triton package (or Triton's interpreter), and where shapes, dtypes, names of
    losses or the reference do not fit the recipe.
    """
    need_triton("preference", logps.device)
    _check_tokens(logps, lengths, desirable)
    _check_recipe(recipe, labelled=desirable is not None)
    _check_reference(logps, recipe, reference)
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
    """apply(x, value, gradient): the scalar `value`, whose gradient in x the kernel has computed beside it.

    gradient: of the shape of x; the backward multiplies it by the incoming scalar. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def _check_tokens(logps: Tensor, lengths: Tensor, desirable: Tensor | None) -> None:
    if logps.dim() != 1 or logps.dtype != torch.float32:
        raise ValueError(f"logps: expected [N] float32, got {tuple(logps.shape)} {logps.dtype}")
    if desirable is None and len(lengths) % 2:
        raise ValueError(f"lengths: expected a chosen and a rejected completion a pair, got {len(lengths)} completions")
    if desirable is not None and desirable.shape != lengths.shape:
        raise ValueError(f"desirable: expected one a completion {tuple(lengths.shape)}, got {tuple(desirable.shape)}")


def _check_recipe(recipe: Recipe, *, labelled: bool) -> None:
    known = pair_kernels.LABEL_LOSSES if labelled else pair_kernels.LOSSES
    unknown = [name for name in recipe.losses if name not in known]
    if unknown or not 0 < len(recipe.losses) <= pair_kernels.MOST_LOSSES:
        found = ", ".join(unknown or recipe.losses) or "none"
        raise ValueError(f"losses: expected one to three of {', '.join(known)}, got {found}")
    if labelled and not recipe.reference:
        raise ValueError("Recipe.reference: kto subtracts a reference, got False; set it to True")


def _check_reference(logps: Tensor, recipe: Recipe, reference: Tensor | None) -> None:
    losses = ", ".join(recipe.losses)
    if reference is None:
        if recipe.reference:
            raise ValueError(
                f"reference: the recipe of {losses} subtracts the reference's log-probabilities {tuple(logps.shape)}, "
                "got none; pass them, or set Recipe.reference to False"
            )
        return
    if not recipe.reference:
        raise ValueError(
            f"reference: the recipe of {losses} subtracts none, got {tuple(reference.shape)}; leave it out, or set "
            "Recipe.reference to True"
        )
    if reference.shape != logps.shape or reference.dtype != logps.dtype:
        wanted = f"{tuple(logps.shape)} {logps.dtype}"
        raise ValueError(f"reference: expected {wanted}, got {tuple(reference.shape)} {reference.dtype}")
