"""Sampling for groups of prompts by a role's engine, some completions at a time, under its weights as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsalign.contract.groups import Group
from dsalign.contract.rollouts import RolloutOptions
from dsalign.engines.engine import generating
from dsalign.engines.roles import Roles
from dsalign.models.heads import unwrap
from dsalign.rollout.sampler import noise, sample_completions


def generate(
    roles: Roles,
    role: str,
    groups: Sequence[Group],
    options: RolloutOptions,
    *,
    samples: int,
    first: int,
    seed: int,
    step: int,
    end_ids: frozenset[int],
) -> tuple[list[Group], list[Tensor]]:
    """Sample `samples` completions of each group's prompt from a role's model. Collective: every rank calls it, with
    any number of groups.

    first: the number of a prompt's first completion; a completion is a function of (seed, step, index of the group,
    number). end_ids: the tokens that end a completion.
    Returns (the groups with these completions, the log-probabilities of their tokens under the sampler: one [completion
    tokens] float32 tensor a group, nats, on the CPU).
    """
    requests = [(group, first + i) for group in groups for i in range(samples)]
    size = options.local_rollout_forward_batch_size
    found: list[tuple[tuple[int, ...], Tensor]] = []
    with generating(roles.engines[roles.role(role).engine]) as module:
        for start in range(0, len(requests), size):
            part = requests[start : start + size]
            draws = [noise(seed, step, group.index, number, options.max_new_tokens) for group, number in part]
            stacked = torch.stack(draws).to(roles.device)
            found += sample_completions(
                unwrap(module.model), [group.prompt for group, _ in part], stacked, options, end_ids
            )
    answers = [found[i : i + samples] for i in range(0, len(found), samples)]
    filled = [replace(g, completions=tuple(ids for ids, _ in a)) for g, a in zip(groups, answers, strict=True)]
    return filled, [torch.cat([logps for _, logps in a]) for a in answers]
