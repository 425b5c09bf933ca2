"""The losses of a preference pair, each a function of `Ratios` that returns [n] float32, one loss a pair.

In the formulas z = beta (Delta_c - Delta_r), R = beta Delta and ls = log sigmoid; c is chosen, r is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dsalign.contract.maths import logsigmoid, smoothed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ratios:
    """The inputs of a pair's loss; every tensor is [n] float32, one number a pair, nats.

    chosen, rejected: Delta = logp_policy - logp_reference of the completion, or its f-divergence transform.
    mean_chosen, mean_rejected: Delta divided by the completion's length, nats a token. beta: reward a nat.
    label_smoothing: probability that a label is flipped. tau: discopop's temperature. Two are for aot alone: policy,
    logp_policy(chosen) - logp_policy(rejected), and partners, name -> constants that `partners` finds by rank.
    """

    chosen: Tensor
    rejected: Tensor
    mean_chosen: Tensor
    mean_rejected: Tensor
    beta: float
    label_smoothing: float = 0.0
    tau: float = 0.05
    policy: Tensor | None = None
    partners: Mapping[str, Tensor] = field(default_factory=dict)


def sigmoid(r: Ratios) -> Tensor:
    """DPO, arXiv:2305.18290, eq. 7: -ls(z); with label smoothing conservative DPO."""
    return smoothed(r.beta * (r.chosen - r.rejected), r.label_smoothing)


def hinge(r: Ratios) -> Tensor:
    """SLiC, arXiv:2305.10425: relu(1 - z)."""
    return torch.relu(1 - r.beta * (r.chosen - r.rejected))


def ipo(r: Ratios) -> Tensor:
    """IPO, arXiv:2310.12036, eq. 17, on Delta a token: (Delta_c / |c| - Delta_r / |r| - 1 / (2 beta))^2."""
    return (r.mean_chosen - r.mean_rejected - 1 / (2 * r.beta)) ** 2


def exo_pair(r: Ratios) -> Tensor:
    """EXO, arXiv:2402.00856, eq. 16: KL of the model's preference, sigmoid(z), from the smoothed label."""
    z, eps = r.beta * (r.chosen - r.rejected), r.label_smoothing
    return torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-eps)) + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(eps))


def nca_pair(r: Ratios) -> Tensor:
    """NCA, arXiv:2402.05369: -ls(R_c) - ls(-R_c) / 2 - ls(-R_r) / 2."""
    chosen, rejected = r.beta * r.chosen, r.beta * r.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(r: Ratios) -> Tensor:
    """Robust DPO, arXiv:2403.00409: unbiased where labels are flipped with probability eps < 1/2."""
    z, eps = r.beta * (r.chosen - r.rejected), r.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def bco_pair(r: Ratios) -> Tensor:
    """BCO, arXiv:2404.04656, without the running mean: -ls(R_c) - ls(-R_r)."""
    return -logsigmoid(r.beta * r.chosen) - logsigmoid(-r.beta * r.rejected)


def sppo_hard(r: Ratios) -> Tensor:
    """SPPO, arXiv:2405.00675: (Delta_c - 1 / (2 beta))^2 + (Delta_r + 1 / (2 beta))^2."""
    return (r.chosen - 0.5 / r.beta) ** 2 + (r.rejected + 0.5 / r.beta) ** 2


def apo_zero(r: Ratios) -> Tensor:
    """APO-zero, arXiv:2408.06266: 1 - sigmoid(R_c) + sigmoid(R_r)."""
    return torch.sigmoid(-r.beta * r.chosen) + torch.sigmoid(r.beta * r.rejected)


def apo_down(r: Ratios) -> Tensor:
    """APO-down, arXiv:2408.06266: sigmoid(R_c) + 1 - sigmoid(z)."""
    return torch.sigmoid(r.beta * r.chosen) + torch.sigmoid(-r.beta * (r.chosen - r.rejected))


def sigmoid_norm(r: Ratios) -> Tensor:
    """Length-normalised DPO, arXiv:2411.15124: -ls(beta (Delta_c / |c| - Delta_r / |r|))."""
    return -logsigmoid(r.beta * (r.mean_chosen - r.mean_rejected))


def discopop(r: Ratios) -> Tensor:
    """DiscoPOP, arXiv:2406.08414: (1 - s)(-ls(z)) + s e^-z, s = sigmoid(z / tau)."""
    z = r.beta * (r.chosen - r.rejected)
    # e^-z sigmoid(z / tau) as one exponential: for z << 0 the product of its factors would be inf * 0
    return -torch.sigmoid(-z / r.tau) * logsigmoid(z) + torch.exp(-z + logsigmoid(z / r.tau))


def aot(r: Ratios) -> Tensor:
    """AOT, arXiv:2406.05882, paired: DPO with the k-th largest log-ratio of the policy between chosen and rejected
    against the k-th largest of the reference, over the global batch."""
    assert r.policy is not None
    return smoothed(r.beta * (r.policy - r.partners["aot"]), r.label_smoothing)


def aot_unpaired(r: Ratios) -> Tensor:
    """AOT, arXiv:2406.05882, unpaired: DPO with the k-th largest Delta_c against the k-th largest Delta_r.

    Each side is taken against the other as a constant, so the sum has the full gradient and twice the value.
    """
    loss = smoothed(r.beta * (r.chosen - r.partners["rejected"]), r.label_smoothing)
    loss = loss + smoothed(r.beta * (r.partners["chosen"] - r.rejected), r.label_smoothing)
    return loss - 0.5 * loss.detach()


def sft(r: Ratios) -> Tensor:
    """Zero for each pair: the NLL of chosen completions is a loss a token, and `DPO.policy_loss` adds that term."""
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
BY_LENGTH = frozenset({"ipo", "sigmoid_norm"})
# These losses read an absolute reward or a length, in which the constant of another divergence does not cancel.
REVERSE_KL_ONLY = SORTED | BY_LENGTH | {"apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard", "sft"}
LOSS_ALIASES = {"aot_pair": "aot_unpaired"}  # what ms-swift calls it
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def partners(sorted_of: Tensor, of: Tensor, order: Tensor) -> Tensor:
    """Partners by rank: where an element of `of` is the k-th smallest, the k-th smallest element of `sorted_of`.

    sorted_of, of: [n] float64, one number a pair of the global batch. order: [n], which of two equal numbers is first.
    Returns [n], in the order of `of`.
    """

    def ranked(x: Tensor) -> Tensor:
        by_order = torch.argsort(order, stable=True)
        return by_order[torch.argsort(x[by_order], stable=True)]

    result = torch.empty_like(sorted_of)
    result[ranked(of)] = sorted_of[ranked(sorted_of)]
    return result
