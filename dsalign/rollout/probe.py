"""The probe: after every rollout a handful of tokens are compared with the trainer's own forward pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsalign.contract.groups import Group, Metric
from dsalign.contract.rollouts import RolloutOptions
from dsalign.engines import dist
from dsalign.engines.engine import version
from dsalign.engines.roles import Roles

TOKENS = 8  # of one completion of each rank
EXACT = 1e-4  # nats: in float32 the sampler is the trainer up to rounding; an optimizer step apart they differ by more
LIMITS = {torch.float32: 1e-3}  # nats, the largest gap of a token; weights that are wrong are off by far more
HALF = 0.25  # the limit in half precision, where two orders of summation differ by nearly this much


@dataclass(frozen=True)
class Probed:
    """The result of a probe. exact: whether sampler and trainer are equal up to rounding in float32, on all ranks.
    gap: this rank's |sampler - trainer|, (sum, count), nats."""

    exact: bool
    gap: Metric


def probe(
    roles: Roles,
    role: str,
    groups: Sequence[Group],
    logps: Sequence[Tensor],
    versions: Collection[int],
    options: RolloutOptions,
) -> Probed:
    """Compare the log-probabilities of the first tokens of one completion of each rank with those of the role's model.

    groups: this rank's, with their completions. logps: the sampler's, one tensor a group. versions: of the weights that
    sampled. Collective.
    Raises ValueError that names the reason where they differ: weights of another step, another temperature, an adapter
    that is missing, or weights that are not all the trainer's.
    """
    engine = roles.engines[roles.role(role).engine]
    now = version(engine)
    old = [number for number in versions if number != now]
    if _any(bool(old), roles):
        which = f"weights of step {old[0]}" if old else "other weights on another rank"
        raise ValueError(
            f"rollout: it sampled from {which}, and the trainer is at step {now}: a synchronisation was skipped"
        )
    few, sampler = _handful(groups, logps)
    dtype = next(engine.module.parameters()).dtype
    limit = LIMITS.get(dtype, HALF)

    ours = roles.each_group(role, few, 1)
    gap = _largest(sampler, ours, roles)
    if not gap <= limit:
        raise ValueError(
            f"rollout: the log-probabilities of sampler and trainer differ by {gap:.3g} nats at a token, more than "
            f"{limit:g}: {_reason(roles, role, few, sampler, options, limit)}"
        )
    sums = sum(float((s.double() - o.double()).abs().sum()) for s, o in zip(sampler, ours, strict=True))
    return Probed(dtype is torch.float32 and gap <= EXACT, (sums, sum(map(len, ours))))


def _handful(groups: Sequence[Group], logps: Sequence[Tensor]) -> tuple[list[Group], list[Tensor]]:
    """The group with the shortest prompt, cut to the first tokens of its first completion; nothing of no groups."""
    if not groups:
        return [], []
    i = min(range(len(groups)), key=lambda i: (len(groups[i].prompt), groups[i].index))
    kept = groups[i].completions[0][:TOKENS]
    return [replace(groups[i], completions=(kept,), masks=None)], [logps[i][: len(kept)]]


def _reason(
    roles: Roles, role: str, few: Sequence[Group], sampler: Sequence[Tensor], options: RolloutOptions, limit: float
) -> str:
    """Which mistake would give the sampler's numbers. Collective."""
    trained = roles.temperature
    for temperature in {1.0, options.temperature} - {trained}:
        roles.temperature = temperature
        try:
            gap = _largest(sampler, roles.each_group(role, few, 1), roles)
        finally:
            roles.temperature = trained
        if gap <= limit:
            return f"it sampled at temperature {temperature:g} and not {trained:g}"
    start = roles.computes("reference") and roles.role("reference").start_weights
    if start and _largest(sampler, roles.each_group("reference", few, 1), roles) <= limit:
        return "it sampled without the trained adapter"
    return "its weights are not all the trainer's (of an earlier step, a tied head, or cached keys and values)"


def _largest(sampler: Sequence[Tensor], ours: Sequence[Tensor], roles: Roles) -> float:
    """The largest |difference| over all ranks, so that every rank decides alike; NaN counts as infinite."""
    gaps = [float((s.double() - o.double()).abs().max()) for s, o in zip(sampler, ours, strict=True)]
    worst = max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)
    return float(dist.gather(torch.tensor([worst], dtype=torch.float64), roles.device).max())


def _any(here: bool, roles: Roles) -> bool:
    return dist.total([float(here)], roles.device)[0] > 0
