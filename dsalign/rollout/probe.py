"""The probe: after every rollout a handful of tokens are compared with the trainer's own forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsalign.contract.groups import Group, Metric
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.contract.rollouts import logp_gap
from dsalign.engines import dist
from dsalign.engines.engine import version
from dsalign.engines.roles import Roles
from dsalign.engines.self_check import largest_gap, limit_in, limit_of

TOKENS = 8  # of one completion of each rank
EXACT = 1e-4  # nats: in float32 the sampler is the trainer up to rounding; an optimizer step apart they differ by more


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
    dtype: torch.dtype,
) -> Probed:
    """Compare the log-probabilities of the first tokens of one completion of each rank with those of the role's model.

    groups: this rank's, with their completions. logps: the sampler's, one tensor a group. versions: of the weights that
    sampled. dtype: in which the sampler computes. Collective.
    Raises ValueError that names the reason where they differ: weights of another step, another temperature, an adapter
    that is missing, or weights that are not all the trainer's.
    """
    engine = roles.engines[roles.role(role).engine]
    now = version(engine)
    old = [number for number in versions if number != now]
    if dist.total([float(len(old))], roles.device)[0]:
        which = f"weights of step {old[0]}" if old else "other weights on another rank"
        raise ValueError(
            f"rollout: it sampled from {which}, and the trainer is at step {now}: a synchronisation was skipped; "
            "start the run again, or take --rollout local"
        )
    few, sampler = _handful(groups, logps)
    limit = max(limit_of(engine.module), limit_in(dtype))
    ours = _trainers(roles, role, few)
    gap = largest_gap(sampler, ours, roles)
    if not gap <= limit:
        raise ValueError(
            f"rollout: the log-probabilities of sampler and trainer differ by {gap:.3g} nats at a token, more than "
            f"{limit:g}: {_reason(roles, role, few, sampler, options, limit)}"
        )
    exact = {dtype, next(engine.module.parameters()).dtype} == {torch.float32} and gap <= EXACT
    return Probed(exact, logp_gap([sampler], [ours]))


def _handful(groups: Sequence[Group], logps: Sequence[Tensor]) -> tuple[list[Group], Tensor]:
    """The group with the shortest prompt, cut to the first tokens of its first completion, and their log-probabilities
    by the sampler, [tokens]; nothing of no groups."""
    if not groups:
        return [], torch.empty(0)
    i = min(range(len(groups)), key=lambda i: (len(groups[i].prompt), groups[i].index))
    kept = groups[i].completions[0][:TOKENS]
    return [replace(groups[i], completions=(kept,), masks=None)], logps[i][: len(kept)]


def _trainers(roles: Roles, role: str, few: Sequence[Group]) -> Tensor:
    """The log-probabilities of the same tokens by the role's model, [tokens]. Collective."""
    return torch.cat([torch.empty(0), *roles.each_group(role, few, 1)])


def _reason(
    roles: Roles, role: str, few: Sequence[Group], sampler: Tensor, options: RolloutOptions, limit: float
) -> str:
    """Which mistake would give the sampler's numbers. Collective."""
    trained = roles.temperature
    for temperature in {1.0, options.temperature} - {trained}:
        roles.temperature = temperature
        try:
            gap = largest_gap(sampler, _trainers(roles, role, few), roles)
        finally:
            roles.temperature = trained
        if gap <= limit:
            return f"it sampled at temperature {temperature:g} and not {trained:g}"
    start = roles.computes("reference") and roles.role("reference").start_weights
    if start and largest_gap(sampler, _trainers(roles, "reference", few), roles) <= limit:
        return "it sampled without the trained adapter"
    return "its weights are not all the trainer's (of an earlier step, a tied head, or cached keys and values)"
