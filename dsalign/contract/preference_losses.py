"""The losses of a preference pair, as functions of log-ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dsalign.contract.maths import logsigmoid, smoothed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ratios:
    """What a pair's loss may use; every tensor is [n], one a pair, float32, nats.

    chosen, rejected: Delta = logp_policy - logp_reference, or its f-divergence transform. mean_chosen, mean_rejected:
    Delta a token. policy: logp_policy(chosen) - logp_policy(rejected). partners: constants, sorted over the batch.
    beta: reward a nat. label_smoothing: probability that a label is flipped. tau: discopop's temperature.
    """

    chosen: Tensor
    rejected: Tensor
    mean_chosen: Tensor
    mean_rejected: Tensor
    policy: Tensor
    partners: Mapping[str, Tensor]
    beta: float
    label_smoothing: float = 0.0
    tau: float = 0.05


def sigmoid(r: Ratios) -> Tensor:
    """arXiv:2305.18290, eq. 7; with label smoothing conservative DPO."""
    return smoothed(r.beta * (r.chosen - r.rejected), r.label_smoothing)


def hinge(r: Ratios) -> Tensor:
    """SLiC, arXiv:2305.10425: relu(1 - z)."""
    return torch.relu(1 - r.beta * (r.chosen - r.rejected))


def ipo(r: Ratios) -> Tensor:
    """arXiv:2310.12036, eq. 17, on Delta a token: (Delta_c / |c| - Delta_r / |r| - 1 / (2 beta))^2."""
    return (r.mean_chosen - r.mean_rejected - 1 / (2 * r.beta)) ** 2


def exo_pair(r: Ratios) -> Tensor:
    """arXiv:2402.00856, eq. 16: KL of the model's preference from the smoothed label."""
    z, eps = r.beta * (r.chosen - r.rejected), r.label_smoothing
    return torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-eps)) + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(eps))


def nca_pair(r: Ratios) -> Tensor:
    """arXiv:2402.05369: -ls(R_c) - ls(-R_c) / 2 - ls(-R_r) / 2."""
    chosen, rejected = r.beta * r.chosen, r.beta * r.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(r: Ratios) -> Tensor:
    """arXiv:2403.00409: unbiased under labels flipped with probability eps < 1/2."""
    z, eps = r.beta * (r.chosen - r.rejected), r.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def bco_pair(r: Ratios) -> Tensor:
    """arXiv:2404.04656 without the running mean: -ls(R_c) - ls(-R_r)."""
    return -logsigmoid(r.beta * r.chosen) - logsigmoid(-r.beta * r.rejected)


def sppo_hard(r: Ratios) -> Tensor:
    """arXiv:2405.00675: (Delta_c - 1 / (2 beta))^2 + (Delta_r + 1 / (2 beta))^2."""
    return (r.chosen - 0.5 / r.beta) ** 2 + (r.rejected + 0.5 / r.beta) ** 2


def apo_zero(r: Ratios) -> Tensor:
    """arXiv:2408.06266: 1 - sigmoid(R_c) + sigmoid(R_r)."""
    return torch.sigmoid(-r.beta * r.chosen) + torch.sigmoid(r.beta * r.rejected)


def apo_down(r: Ratios) -> Tensor:
    """arXiv:2408.06266: sigmoid(R_c) + 1 - sigmoid(z)."""
    return torch.sigmoid(r.beta * r.chosen) + torch.sigmoid(-r.beta * (r.chosen - r.rejected))


def sigmoid_norm(r: Ratios) -> Tensor:
    """DPO on Delta a token: -ls(beta (Delta_c / |c| - Delta_r / |r|)), as in arXiv:2411.15124."""
    return -logsigmoid(r.beta * (r.mean_chosen - r.mean_rejected))


def discopop(r: Ratios) -> Tensor:
    """arXiv:2406.08414: (1 - s)(-ls(z)) + exp(-z + ls(z / tau)), s = sigmoid(z / tau)."""
    z = r.beta * (r.chosen - r.rejected)
    # e^-z sigmoid(z / tau) as one exponential: for z << 0 the product of its factors would be inf * 0
    return -torch.sigmoid(-z / r.tau) * logsigmoid(z) + torch.exp(-z + logsigmoid(z / r.tau))


def aot(r: Ratios) -> Tensor:
    """arXiv:2406.05882, paired: the k-th largest policy log-ratio against the k-th largest reference log-ratio."""
    return smoothed(r.beta * (r.policy - r.partners["aot"]), r.label_smoothing)


def aot_unpaired(r: Ratios) -> Tensor:
    """arXiv:2406.05882, unpaired: the k-th Delta_c against the k-th Delta_r.

    Each side is taken against the other as a constant, so the sum has the full gradient and twice the value.
    """
    loss = smoothed(r.beta * (r.chosen - r.partners["rejected"]), r.label_smoothing)
    loss = loss + smoothed(r.beta * (r.partners["chosen"] - r.rejected), r.label_smoothing)
    return loss - 0.5 * loss.detach()


def sft(r: Ratios) -> Tensor:
    """NLL(chosen) has a unit of its own and is added in `policy_loss`; nothing a pair."""
    return torch.zeros_like(r.chosen)


LOSSES: Mapping[str, Callable[[Ratios], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        sigmoid_norm,
        discopop,
        aot,
        aot_unpaired,
        sft,
    )
}
SMOOTHED = frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"})
SORTED = frozenset({"aot", "aot_unpaired"})
REVERSE_KL_ONLY = SORTED | {"apo_zero", "apo_down", "sft", "ipo", "sigmoid_norm"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def partners(sorted_of: Tensor, of: Tensor, order: Tensor) -> Tensor:
    """[n] the k-th smallest of `sorted_of` for each element that is the k-th smallest of `of`; ties by `order`, [n]."""

    def ranked(x: Tensor) -> Tensor:
        by_order = torch.argsort(order, stable=True)
        return by_order[torch.argsort(x[by_order], stable=True)]

    result = torch.empty_like(sorted_of)
    result[ranked(of)] = sorted_of[ranked(sorted_of)]
    return result
