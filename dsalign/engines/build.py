"""The models of a run from its configuration: the source of each role's weights, and an engine for each role."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.data.tokens.templates import Template
from dsalign.engines import dist, engine
from dsalign.engines.roles import Roles
from dsalign.models import load
from dsalign.models.names import Source, resolve
from dsalign.report.environment import memory_now

logger = logging.getLogger(__name__)


def sources(config: RunConfig) -> dict[str, Source]:
    """Role -> the source of its weights, in the algorithm's order; no role "reward" where functions alone give scores.

    Rank 0 resolves names first, as it may convert an embedded model, which must happen once. Collective.
    Raises ValueError where a name cannot be resolved.
    """

    def all_roles() -> dict[str, Source]:
        return {role: source_of(role, config) for role in roles_with_model(config)}

    dist.together(lambda: all_roles() if dist.rank() == 0 else {})
    return dist.together(all_roles)


def roles_with_model(config: RunConfig) -> list[str]:
    """The roles of the algorithm in its order, without "reward" where functions alone give scores."""
    traits, reward = config.algorithm.traits, config.models.reward_model
    return [role for role in traits.roles if role != "reward" or reward or role in traits.trained]


def source_of(role: str, config: RunConfig) -> Source:
    """The source of a role's weights on this rank. Raises ValueError where its name cannot be resolved."""
    wanted = {
        "reference": config.models.ref_model,
        "reward": config.models.reward_model,
        "value": config.models.reward_model,  # the critic starts as the reward model, where there is one
    }
    return resolve(wanted.get(role) or config.models.model)


def with_critic_of_ids(found: dict[str, Source], policy: Template, reward: Template) -> dict[str, Source]:
    """The sources `found`, with a critic that can read the policy's token ids.

    A critic starts from the reward model; where that model's vocabulary is not the policy's, it starts from the
    policy's model with a new value head instead, and a warning says so. policy, reward: the templates of both models.
    """
    if "value" not in found or policy.tokenizer.get_vocab() == reward.tokenizer.get_vocab():
        return found
    logger.warning("value model: it starts from the policy's model with a new head")
    return {**found, "value": found["policy"]}


def roles_of(config: RunConfig, found: dict[str, Source], device: torch.device) -> Roles:
    """The run's roles: one engine for each role of `found`, weights loaded. With LoRA and without --ref_model the
    reference has no engine: it is the policy's engine with the trained adapter off. Collective."""
    options = config.models
    dtype = load.resolve_dtype(options.dtype, device)
    if options.tuner == "lora" and dist.rank() == 0 and (adapter := found[config.algorithm.traits.main].adapter):
        logger.warning(
            "training goes on with the adapter %s: its rank, alpha and layers stay, lora_rank, lora_alpha and "
            "lora_target_modules are not used",
            adapter,
        )
    if dist.rank() == 0 and (unused := ds_files.unused(config.optim.deepspeed)):
        logger.warning("deepspeed: %s: %s is not used: every run sets it", config.optim.deepspeed, ", ".join(unused))
    trained = partial(
        load.load_trained, options=options, device=device, dropout=config.algorithm.traits.dropout > 0, seed=config.seed
    )
    engines: dict[str, Any] = {}
    held: dict[str, int] = {}
    for role, source in found.items():
        before = memory_now()
        if role in config.algorithm.traits.trained:
            module = dist.together(partial(trained, role, source))
            engines[role] = engine.trained(module, config.optim, dtype)
        elif role != "reference" or options.tuner == "full" or options.ref_model:
            module = dist.together(partial(load.load_frozen, role, source, options, device=device))
            engines[role] = engine.frozen(module, config.optim, dtype)
        else:
            continue
        del module  # nothing of it stays but what its engine holds
        held[role] = max(0, memory_now() - before)
    optim = config.optim
    shared = ["reference"] if options.tuner == "lora" and not options.ref_model else []
    roles = Roles(engines, device, optim.batch_size, config.rollout.temperature, optim.max_tokens, shared)
    roles.memory = held
    return roles
