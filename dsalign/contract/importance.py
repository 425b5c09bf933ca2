"""Truncated importance weights, for completions that were drawn in another precision than the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsalign.contract.groups import Metric, MicroBatch, Output
from dsalign.contract.maths import ratio

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "is_weights"  # the field of a prepared batch that has the weights, one a completion token


def truncated_weights(
    sampler: Sequence[Tensor], old: Sequence[Tensor], cap: float
) -> tuple[list[Tensor], dict[str, Metric]]:
    """The weights min(e^(old - sampler), cap) of sampled tokens, and their metrics: the mean weight and the share of
    tokens whose weight is the cap. Without a cap the weights would be those of importance sampling.

    sampler, old: one [completion tokens] float32 tensor a group, log-probabilities under the sampler and under the
    trainer with the same weights, nats; differences are held within -+20. cap: >= 1. Returns one tensor a group of the
    same shape, in [0, cap].
    Source: Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems",
    https://openreview.net/forum?id=8MHqvb4lK9
    """
    whole = [ratio(o - s) for s, o in zip(sampler, old, strict=True)]
    weights = [x.clamp(max=cap) for x in whole]
    count = sum(map(len, whole))
    return weights, {
        "rollout/is_weight": (sum(float(x.double().sum()) for x in weights), count),
        "rollout/is_capped": (sum(int((x > cap).sum()) for x in whole), count),
    }


def weighted(out: Output, batch: MicroBatch) -> Output:
    """The policy's output with the same numbers, through which the gradient of each token's log-probability is
    multiplied by the token's weight; `out` itself where the batch has no weights, or for another role.

    A loss that is a sum over tokens so has the gradient of sum_t w_t loss_t, all its parts weighted alike; one of whole
    completions has that of its tokens, each weighted by itself. The value of the loss is the one without weights.
    """
    weights = batch.fields.get(WEIGHTS)
    if weights is None or out.logps is None or not out.logps.requires_grad:
        return out
    logps = out.logps.view_as(out.logps)
    logps.register_hook(lambda gradient: gradient * weights)  # type: ignore[no-untyped-call]
    return replace(out, logps=logps)
