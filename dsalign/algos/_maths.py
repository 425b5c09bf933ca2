"""Mathematics that several algorithms share: stable functions, sums over completions, the metrics of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dsalign.algos import Batch, Context, Metric, MicroBatch, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.data.tokenize import Group


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


def plain(ctx: Context, batch: Batch) -> Prepared:
    """Nothing to prepare: this rank's groups as they are."""
    return Prepared(groups=batch.local)


def with_reference(ctx: Context, batch: Batch) -> Prepared:
    """This rank's groups with the reference's token log-probabilities: field "reference", one a completion token."""
    return Prepared(groups=batch.local, fields={"reference": ctx.logps("reference", batch.local)})


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with open_low)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def entropy_metric(entropy: Tensor | None) -> dict[str, Metric]:
    """entropy: nats a completion token, where the model gave it."""
    return {} if entropy is None else {"entropy": mean(entropy)}
