"""Mathematics that several algorithms share: stable functions, sums over completions, the metrics of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dsalign.contract.groups import Metric, MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


def logsigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), stable for any x."""
    return torch.nn.functional.logsigmoid(x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, nats.

    Switches at -ln 2 (Maechler 2012); each branch sees only inputs it is finite for, or the backward of `where` is NaN.
    """
    near = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -1.0))))
    large = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x)))
    return torch.where(near, small, large)


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z): the label is wrong with probability eps (conservative DPO)."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def pair(completions: Tensor) -> tuple[Tensor, Tensor]:
    """[2n] a number a completion -> chosen [n], rejected [n]."""
    chosen, rejected = completions.view(-1, 2).unbind(1)
    return chosen, rejected


def chosen_nll(batch: MicroBatch, logps: Tensor) -> Tensor:
    """Scalar: -sum of the chosen completions' token log-probabilities, nats."""
    return -pair(batch.sum(logps))[0].sum()


def pair_units(groups: Sequence[Group]) -> Mapping[str, int]:
    """The units of pair algorithms: pairs, and the tokens of chosen completions."""
    return {"pairs": len(groups), "chosen_tokens": sum(g.lengths[0] for g in groups)}


def mean(numbers: Tensor) -> Metric:
    """(sum, count) of a tensor, detached: a metric that averages."""
    return numbers.detach().sum(), numbers.numel()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Metric]:
    """rewards/{chosen,rejected,accuracies,margins} of n pairs; chosen, rejected: [n], units of reward."""
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean((chosen > rejected).float()),
        "rewards/margins": mean(chosen - rejected),
    }


def logp_metrics(batch: MicroBatch, logps: Tensor, *, means: bool = False) -> dict[str, Metric]:
    """logps/{chosen,rejected}: sums a completion, nats; `means`: also logps/mean_{chosen,rejected}, nats a token."""
    sums = batch.sum(logps)
    chosen, rejected = pair(sums)
    metrics: dict[str, Metric] = {"logps/chosen": mean(chosen), "logps/rejected": mean(rejected)}
    if means:
        chosen, rejected = pair(sums / batch.lengths)
        metrics |= {"logps/mean_chosen": mean(chosen), "logps/mean_rejected": mean(rejected)}
    return metrics


def entropy_metric(entropy: Tensor | None) -> dict[str, Metric]:
    """entropy: nats a completion token, where the model gave it."""
    return {} if entropy is None else {"entropy": mean(entropy)}
