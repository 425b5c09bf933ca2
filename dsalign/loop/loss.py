"""Losses and advantages by the kernels that compute them in one launch; where there is no GPU, as the algorithm's file
says. With `logps`, the importer of dsalign_kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dsalign.contract.groups import Fused, Metrics, MicroBatch, Output
from dsalign.contract.maths import entropy_metric
from dsalign_kernels import Impl, Recipe, clipped_policy, clipped_value, preference, uses_triton
from dsalign_kernels import gae as gae_of_tokens

Scales: TypeAlias = Mapping[str, float]  # unit -> what its term is multiplied by


def scaled_loss(
    algorithm: Any, role: str, out: Output, batch: MicroBatch, scales: Scales, *, impl: Impl = "auto"
) -> tuple[Tensor, Metrics]:
    """(the sum of scales[unit] x term over the terms of the algorithm's <role>_loss, its metrics).

    A term whose unit is absent from scales does not count. On a GPU, and with impl="triton", by the kernel that the
    algorithm's `fused` names, where it names one.
    """
    ask = getattr(algorithm, "fused", None)
    fused: Fused | None = ask(role, batch) if ask is not None and uses_triton(impl, batch.lengths) else None
    if fused is not None:
        return KERNELS[fused.kernel](fused, out, batch, scales, impl)
    loss = getattr(algorithm, f"{role}_loss")(out, batch)
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
    """The advantages of each group's tokens, as `dsalign_kernels.gae` has them; lengths: tokens of each completion."""
    flat = torch.tensor([n for each in lengths for n in each], dtype=torch.int64, device=device)
    if not len(flat):
        return [x.clone() for x in rewards]
    found = gae_of_tokens(
        torch.cat(list(rewards)).to(device), torch.cat(list(values)).to(device), flat, gamma=gamma, lam=lam
    )
    return list(found.advantages.to(rewards[0].device).split([len(x) for x in rewards]))  # type: ignore[no-untyped-call]


def _pairs(fused: Fused, out: Output, batch: MicroBatch, scales: Scales, impl: Impl) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    found = preference(
        out.logps,
        batch.lengths,
        Recipe(**fused.arguments),
        reference=batch.fields.get("reference"),
        scale=scales.get("pairs", 0.0),
        nll_scale=fused.nll * scales.get("chosen_tokens", 0.0),
        impl=impl,
    )
    pairs, chosen_tokens = len(batch.groups), sum(g.lengths[0] for g in batch.groups)
    metrics: dict[str, Any] = {
        name: (x, pairs) for name, x in found.metrics.items() if fused.means or "mean" not in name
    }
    metrics["nll_loss"] = (-found.metrics["logps/chosen"], chosen_tokens)
    return found.loss, metrics | entropy_metric(out.entropy)


def _labels(fused: Fused, out: Output, batch: MicroBatch, scales: Scales, impl: Impl) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    desirable = torch.tensor([bool(g.label) for g in batch.groups], dtype=torch.bool, device=batch.lengths.device)
    found = preference(
        out.logps,
        batch.lengths,
        Recipe(**fused.arguments),
        reference=batch.fields["reference"],
        desirable=desirable,
        scale=scales.get("examples", 0.0),
        impl=impl,
    )
    good = sum(bool(g.label) for g in batch.groups)
    counts = {"chosen": good, "rejected": len(batch.groups) - good}
    metrics = {
        f"{what}/{side}": (found.metrics[f"{what}/{side}"], n)
        for what in ("rewards", "logps")
        for side, n in counts.items()
    }
    return found.loss, metrics | entropy_metric(out.entropy)


def _policy(fused: Fused, out: Output, batch: MicroBatch, scales: Scales, impl: Impl) -> tuple[Tensor, Metrics]:
    assert out.logps is not None
    old, advantages = batch.fields["old"], batch.fields["advantages"]
    found = clipped_policy(out.logps, old, advantages, scale=scales.get("tokens", 0.0), impl=impl, **fused.arguments)
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


def _value(fused: Fused, out: Output, batch: MicroBatch, scales: Scales, impl: Impl) -> tuple[Tensor, Metrics]:
    assert out.values is not None
    old, returns, scale = batch.fields["values"], batch.fields["returns"], scales.get("tokens", 0.0)
    found = clipped_value(
        out.values, old, returns, batch.segment, scale=fused.weight * scale, impl=impl, **fused.arguments
    )
    n = len(old)
    return found.loss, {
        "loss/value_avg": (found.metrics["loss"], n),
        "val/clipfrac_avg": (found.metrics["clipfrac"], n),
    }


KERNELS: Mapping[str, Callable[[Fused, Output, MicroBatch, Scales, Impl], tuple[Tensor, Metrics]]] = {
    "pairs": _pairs,
    "labels": _labels,
    "clipped_policy": _policy,
    "clipped_value": _value,
}
