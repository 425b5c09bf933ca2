"""The losses of algorithms and GAE, on a GPU by kernels.

A loss kernel computes loss, gradient and metrics in one launch; its twin is the algorithm's own <role>_loss, which runs
on a CPU. Besides `models/logps.py` this is the only file of dsalign that imports dsalign_kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dsalign.contract.algorithm import Algorithm, loss_of
from dsalign.contract.groups import Fused, Metrics, MicroBatch, Output
from dsalign.contract.importance import weighted
from dsalign.contract.maths import entropy_metric
from dsalign_kernels import Impl, Recipe, clipped_policy, clipped_value, preference, uses_triton
from dsalign_kernels import gae as gae_of_tokens

Scales: TypeAlias = Mapping[str, float]  # unit -> what its term is multiplied by


def scaled_loss(
    algorithm: Algorithm, role: str, out: Output, batch: MicroBatch, scales: Scales, *, impl: Impl = "auto"
) -> tuple[Tensor, Metrics]:
    """The loss of a trained role on a micro-batch, and its metrics.

    The loss is a scalar float32 with gradient: the terms of the algorithm's <role>_loss, each times scales[its unit],
    added up; a term whose unit is not in scales is left out. out: the role's output for the micro-batch. Where the
    batch has importance weights, the gradient of each token is multiplied by its own, see `weighted`.

    impl "torch" calls <role>_loss; "triton" calls the kernel that the algorithm's `fused` names, and <role>_loss where
    it names none; "auto" is "triton" on a GPU and "torch" elsewhere. Float64 is always computed by <role>_loss.
    Raises ValueError where "triton" can't run on this device, and where a kernel's inputs don't fit: where the field
    "reference" is missing, for instance.
    """
    out = weighted(out, batch)
    fused = algorithm.fused(role, batch) if uses_triton(impl, out.numbers) else None
    if fused is not None:
        return KERNELS[fused.kernel](fused, out, batch, scales)
    loss = loss_of(algorithm, role, out, batch)
    terms = [term * scales[unit] for unit, term in loss.terms.items() if unit in scales]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=batch.lengths.device), loss.metrics


def gae(
    rewards: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
    gamma: float,
    lam: float,
    device: torch.device,
) -> list[Tensor]:
    """Generalised advantage estimates, arXiv:1506.02438: one [completion tokens] float32 tensor a group.

    rewards[i], values[i]: [tokens of group i] float32, units of reward; lengths[i]: the number of tokens of each of its
    completions. gamma: discount a token; lam: decay a token. device: where they are computed; they come back on the
    device of their rewards.
    """
    flat = torch.tensor([n for each in lengths for n in each], dtype=torch.int64, device=device)
    if not len(flat):
        return [x.clone() for x in rewards]
    found = gae_of_tokens(
        torch.cat(list(rewards)).to(device), torch.cat(list(values)).to(device), flat, gamma=gamma, lam=lam
    )
    return list(found.advantages.to(rewards[0].device).split([len(x) for x in rewards]))  # type: ignore[no-untyped-call]


def _pairs(fused: Fused, out: Output, batch: MicroBatch, scales: Scales) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    found = preference(
        out.logps,
        batch.lengths,
        Recipe(**fused.arguments, reference=fused.reference),
        reference=_reference(fused, batch),
        scale=scales.get("pairs", 0.0),
        nll_scale=fused.nll * scales.get("chosen_tokens", 0.0),
    )
    pairs, chosen_tokens = len(batch.groups), sum(g.lengths[0] for g in batch.groups)
    metrics: dict[str, Any] = {
        name: (x, pairs) for name, x in found.metrics.items() if fused.means or "mean" not in name
    }
    metrics["nll_loss"] = (-found.metrics["logps/chosen"], chosen_tokens)
    return found.loss, metrics | entropy_metric(out.entropy)


def _labels(fused: Fused, out: Output, batch: MicroBatch, scales: Scales) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    desirable = torch.tensor([bool(g.label) for g in batch.groups], dtype=torch.bool, device=batch.lengths.device)
    found = preference(
        out.logps,
        batch.lengths,
        Recipe(**fused.arguments, reference=fused.reference),
        reference=_reference(fused, batch),
        desirable=desirable,
        scale=scales.get("examples", 0.0),
    )
    good = sum(bool(g.label) for g in batch.groups)
    counts = {"chosen": good, "rejected": len(batch.groups) - good}
    metrics = {
        f"{what}/{side}": (found.metrics[f"{what}/{side}"], n)
        for what in ("rewards", "logps")
        for side, n in counts.items()
    }
    return found.loss, metrics | entropy_metric(out.entropy)


def _reference(fused: Fused, batch: MicroBatch) -> Tensor | None:
    """The field "reference" where the loss subtracts it, else None, even if the batch has such a field. Where the loss
    subtracts it and the batch has none, the kernel raises."""
    return batch.fields.get("reference") if fused.reference else None


def _policy(fused: Fused, out: Output, batch: MicroBatch, scales: Scales) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    old, advantages = batch.fields["old"], batch.fields["advantages"]
    found = clipped_policy(out.logps, old, advantages, scale=scales.get("tokens", 0.0), **fused.arguments)
    names = {
        "loss": "loss/policy_avg",
        "approxkl": "policy/approxkl_avg",
        "clipfrac": "policy/clipfrac_avg",
        "ratio": "val/ratio",
    }
    metrics: dict[str, Any] = {named: (found.metrics[name], len(old)) for name, named in names.items()}
    if out.entropy is not None:
        metrics["policy/entropy_avg"] = entropy_metric(out.entropy)["entropy"]
    return found.loss, metrics


def _value(fused: Fused, out: Output, batch: MicroBatch, scales: Scales) -> tuple[Tensor, Metrics]:
    assert out.values is not None
    old, returns, scale = batch.fields["values"], batch.fields["returns"], scales.get("tokens", 0.0)
    found = clipped_value(out.values, old, returns, batch.segment, scale=fused.weight * scale, **fused.arguments)
    n = len(old)
    return found.loss, {
        "loss/value_avg": (found.metrics["loss"], n),
        "val/clipfrac_avg": (found.metrics["clipfrac"], n),
    }


KERNELS: Mapping[str, Callable[[Fused, Output, MicroBatch, Scales], tuple[Tensor, Metrics]]] = {
    "pairs": _pairs,
    "labels": _labels,
    "clipped_policy": _policy,
    "clipped_value": _value,
}
