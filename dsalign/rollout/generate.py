"""Completions for groups of prompts by a role's model: the choice of the engine, the keys of the draws, the probe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsalign.contract.groups import Group, Sampled
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.engines.roles import Roles
from dsalign.rollout.api import Request, Rollout
from dsalign.rollout.in_process import InProcess
from dsalign.rollout.pick import token_key
from dsalign.rollout.probe import probe
from dsalign.rollout.vllm import Vllm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keys:
    """What the draws of a rollout are a function of, beside the index of the prompt. first: the number of a prompt's
    first completion."""

    seed: int
    step: int
    first: int

    def of(self, group: Group, samples: int) -> list[int]:
        """The key of each of a group's completions: a 64-bit mix of (seed, step, index of the group, number)."""
        return [token_key(self.seed, self.step, group.index, self.first + i) for i in range(samples)]


class Sampler:
    """The sampling of completions from a role's model, under its weights as they are now."""

    def __init__(self, roles: Roles, role: str, options: RolloutOptions, end_ids: frozenset[int]) -> None:
        self.roles, self.role, self.end_ids = roles, role, end_ids
        self.engine = engine_of(roles, role, options)

    def sample(
        self, groups: Sequence[Group], samples: int, keys: Keys, options: RolloutOptions
    ) -> tuple[list[Group], list[Tensor], set[int]]:
        """Sample `samples` completions of each group's prompt. Collective: every rank calls it, with any number of
        groups, and one that has fewer is done earlier.

        Returns (the groups with these completions, one [completion tokens] float32 tensor a group, the sampler's
        log-probabilities, nats; the versions of the weights that sampled).
        """
        requests = [Request(group.prompt, keys.of(group, samples), options.max_new_tokens) for group in groups]
        answers = self.engine.generate(requests, options, self.end_ids)
        filled = [replace(g, completions=tuple(c.ids for c in a)) for g, a in zip(groups, answers, strict=True)]
        logps = [torch.cat([c.logps for c in answer]) for answer in answers]
        return filled, logps, {c.version for answer in answers for c in answer}

    def probed(
        self, groups: Sequence[Group], logps: Sequence[Tensor], versions: set[int], options: RolloutOptions
    ) -> Sampled:
        """Probe that what `sample` returned comes from the trainer's weights. Collective.

        Raises ValueError where it does not, as `probe` says.
        """
        found = probe(self.roles, self.role, groups, logps, versions, options, self.engine.dtype)
        return Sampled(groups, logps, found.exact, found.gap)


def engine_of(roles: Roles, role: str, options: RolloutOptions) -> Rollout:
    """The rollout engine that --rollout names; `auto` is local where the model's attention takes packed rows, which the
    check at start-up has seen, else plain, and one line says which. Collective.

    Raises ValueError where the engine that was asked for cannot run this model.
    """
    trained = roles.engines[roles.role(role).engine]
    name, shares = options.rollout, trained.module.shares
    if name == "vllm":
        return Vllm(trained, options)
    if name == "local" and not shares:
        raise ValueError("rollout: local needs a model whose attention takes packed rows; use --rollout plain")
    inside = "plain" if name == "plain" or not shares else "local"
    if dist.rank() == 0:
        chosen = f"hybrid, with {inside} inside" if name == "hybrid" else inside
        why = "" if shares or name == "plain" else ", as the model's attention takes no packed rows"
        logger.info("completions are sampled by --rollout %s%s", chosen, why)
    return InProcess(trained, inside, options.local_rollout_forward_batch_size)
