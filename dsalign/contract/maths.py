"""Mathematics that several algorithms share: stable functions, sums over completions, the metrics of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from dsalign.contract.groups import Metric, MicroBatch, Output

if TYPE_CHECKING:
    from torch import Tensor


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
    """Split numbers of completions, [2n] with chosen and rejected in turn, into chosen [n] and rejected [n]."""
    chosen, rejected = completions.view(-1, 2).unbind(1)
    return chosen, rejected


def chosen_nll(batch: MicroBatch, logps: Tensor) -> Tensor:
    """The negative log-likelihood of all chosen completions of a batch of pairs, scalar, nats. logps: [N]."""
    return -pair(batch.sum(logps))[0].sum()


def pair_units(batch: MicroBatch) -> Mapping[str, int]:
    """The units of the pair algorithms: the number of pairs, and of tokens of their chosen completions."""
    return {"pairs": len(batch.groups), "chosen_tokens": sum(g.lengths[0] for g in batch.groups)}


def mean(numbers: Tensor) -> Metric:
    """The metric that averages a tensor: (its sum, its number of elements), detached."""
    return numbers.detach().sum(), numbers.numel()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Metric]:
    """The metrics rewards/{chosen,rejected,accuracies,margins} of n pairs; chosen, rejected: [n], units of reward."""
    return {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean((chosen > rejected).float()),
        "rewards/margins": mean(chosen - rejected),
    }


def logp_metrics(batch: MicroBatch, logps: Tensor, *, means: bool = False) -> dict[str, Metric]:
    """The metrics logps/{chosen,rejected}, nats a completion, of pairs whose tokens have log-probabilities `logps` [N];
    with `means` also logps/mean_{chosen,rejected}, nats a token."""
    sums = batch.sum(logps)
    chosen, rejected = pair(sums)
    metrics: dict[str, Metric] = {"logps/chosen": mean(chosen), "logps/rejected": mean(rejected)}
    if means:
        chosen, rejected = pair(sums / batch.lengths)
        metrics |= {"logps/mean_chosen": mean(chosen), "logps/mean_rejected": mean(rejected)}
    return metrics


def pair_metrics(batch: MicroBatch, out: Output, chosen: Tensor, rejected: Tensor, *, means: bool) -> dict[str, Metric]:
    """The metrics that every pair algorithm logs for a micro-batch of n pairs.

    chosen, rejected: [n], rewards of the completions. means: whether log-probabilities a token are logged too.
    """
    assert out.logps is not None
    nll = chosen_nll(batch, out.logps)
    return {
        **reward_metrics(chosen, rejected),
        **logp_metrics(batch, out.logps, means=means),
        "nll_loss": (nll.detach(), pair(batch.lengths)[0].sum()),
        **entropy_metric(out.entropy),
    }


def entropy_metric(entropy: Tensor | None) -> dict[str, Metric]:
    """The metric "entropy", nats a completion token; no metric where the output has no entropy."""
    return {} if entropy is None else {"entropy": mean(entropy)}


LOG_RATIO_LIMIT = 20.0  # nats: e^20 = 4.9e8; beyond it a ratio's gradient is 0 instead of infinite or NaN


def ratio(change: Tensor) -> Tensor:
    """The importance ratio e^change of tokens or completions. change: new minus old log-probability, nats, any shape;
    it is held within -+20, so that the ratio and its gradient are finite."""
    return torch.exp(torch.clamp(change, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


KL_ESTIMATORS = ("k1", "k2", "k3")


def token_kl(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(policy || reference) from each sampled token, nats (Schulman 2020, "Approximating KL").

    logps, reference: [N] log-probabilities of the token. With g = logp - reference: k1 = g, k2 = g^2 / 2 and
    k3 = e^-g - 1 + g >= 0, in which g is held at -20 or above: further down its gradient is 0, as that of a `ratio`. As
    a term of a loss, the expected gradient of k1 is 0 and that of k2 is the KL's.
    """
    gap = logps - reference
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return 0.5 * gap**2
    held = torch.clamp(gap, min=-LOG_RATIO_LIMIT)  # in both terms: of the second alone the gradient points away
    return torch.expm1(-held) + held
