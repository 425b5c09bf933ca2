"""The inputs of the training loop from a configuration: its batches, their number, and the context of `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.loader import Loader, Stream
from dsalign.data.tokens.templates import Template
from dsalign.engines import dist
from dsalign.engines.reference_cache import ReferenceCache
from dsalign.engines.roles import Roles
from dsalign.guard.wishes import Wishes
from dsalign.loop.context import RunContext
from dsalign.models.tokenizer import decoder


def loader_of(config: RunConfig, groups: Sequence[Group], *, shuffle: bool) -> Loader:
    """The loader of the global batches of `groups`. A batch holds the groups of all mini_batches optimizer steps of one
    pass over it.

    Raises ValueError where the algorithm needs more groups than a batch, or the data set, has.
    """
    return Loader(
        groups,
        global_batch=config.global_batch(dist.world_size()) * config.algorithm.traits.mini_batches,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        shuffle=shuffle,
        min_groups=config.algorithm.traits.min_groups,
    )


def batches_of(config: RunConfig, loader: Loader) -> int:
    """How many global batches a run prepares: those of all epochs, or fewer where max_steps needs no more."""
    total = config.optim.num_train_epochs * loader.steps_per_epoch
    if config.optim.max_steps is None:
        return total
    steps_per_batch: int = config.algorithm.traits.passes
    return min(total, -(-config.optim.max_steps // steps_per_batch))


def rollout_of(config: RunConfig) -> RolloutOptions:
    """The options of sampling; --rollout auto is hybrid where the DeepSpeed file asks for the hybrid engine."""
    wanted = config.rollout.rollout == "auto" and ds_files.hybrid(config.optim.deepspeed)
    return replace(config.rollout, rollout="hybrid") if wanted else config.rollout


def context_of(
    config: RunConfig,
    roles: Roles,
    loader: Loader,
    template: Template,
    rewards: Callable[[Sequence[Group], int], Scores] | None,
    cache: ReferenceCache | None,
    total_batches: int,
    state: dict[str, Any],
    wishes: Wishes,
) -> RunContext:
    """The context that the run's `prepare` is given.

    rewards: (groups, how many a forward pass takes) -> their scores; None = no reward. cache: of the reference, if the
    run has one. state: the algorithm's memory, `Progress.state`. wishes: what asks the run to stop or save.
    """
    return RunContext(
        roles,
        seed=config.seed,
        max_length=config.data.max_length,
        state=state,
        end_ids=template.end_ids,
        total_batches=total_batches,
        rewards=rewards,
        reference=cache.logps if cache is not None else None,
        decode=decoder(template.tokenizer),
        rollout=rollout_of(config) if config.algorithm.traits.online else None,
        stream=Stream(loader),
        wishes=wishes,
    )
