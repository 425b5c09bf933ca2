"""The training command: builds a run in order, sources -> data -> models -> context -> trainer, and trains it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dsalign import phases
from dsalign.checkpoint import checkpoints, fingerprint, resuming
from dsalign.config.schema import RunConfig, seconds
from dsalign.data.dataset import data_of
from dsalign.data.tokens.templates import Template
from dsalign.engines import build, dist, identity, reference_cache
from dsalign.engines.engine import layout
from dsalign.engines.self_check import self_check
from dsalign.guard import resources, stale_locks, watchdog
from dsalign.guard.parents import Launchers
from dsalign.guard.wishes import Wishes
from dsalign.loop.plan import batches_of, context_of, loader_of
from dsalign.loop.session import Session
from dsalign.loop.trainer import Trainer
from dsalign.models.compare import compare_models
from dsalign.models.load import resolve_dtype
from dsalign.models.names import Source
from dsalign.models.tokenizer import stop_at, template_of
from dsalign.ranks import Process
from dsalign.report.run_log import quiet
from dsalign.rewards.retemplate import retemplate_of
from dsalign.rewards.sources import functions_of, rewards_of
from dsalign.verbs import preflight

SUMMARY = "train a model; what a command without a verb is"


def train(
    config: RunConfig, process: Process, command: str, origins: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run one training as `config` says; returns the last value of every metric. Collective.

    process: this rank and its place on this machine. command: the command line, kept in the output folder. origins:
    option -> where its value is from, which the report tells.
    Raises ValueError for input that cannot be used, with what to do, and `endings.Stopped` where it was asked to stop.
    """
    quiet(process.rank)
    if process.local_rank == 0 and (left := stale_locks.warning(os.environ)):
        print(left, file=sys.stderr)
    device = dist.init(process.local_rank, process.local_size, peer_timeout=config.output.peer_timeout)
    try:
        with ExitStack() as held, watchdog.watched(Path(config.output.output_dir), config.output.peer_timeout):
            if process.world_size > 1:  # a process alone did it before it imported torch
                lead = process.rank == 0
                dist.together(lambda: held.enter_context(preflight.ready(config)) if lead else None)
            wishes = Wishes(seconds(config.output.max_wall), Launchers.of(os.getpid()))
            with resources.told(config):
                with dist.stoppable(lambda: preflight.unbegun(wishes.reason(), command) if wishes.reason() else None):
                    dist.same_everywhere(identity.of_run(config))
                    session = _built(config, device, command, wishes, origins)
                return session.run()
    finally:
        dist.shutdown()


def _built(
    config: RunConfig, device: torch.device, command: str, wishes: Wishes, origins: Mapping[str, str] | None
) -> Session:
    """A run that is ready for its first step. Collective; every `dist.agree` in it is a place to stop."""
    torch.manual_seed(config.seed + dist.rank())  # dropout differs between ranks, as their rows do
    phases.mark("names of models")
    sources = build.sources(config)
    phases.mark("data")
    template = _template(config, sources[config.algorithm.traits.main])
    retemplate = dist.together(lambda: retemplate_of(config, sources, template))
    if retemplate is not None:
        sources = build.with_critic_of_ids(sources, template, retemplate.template)
    data = dist.together(lambda: data_of(config, template))
    dist.together(
        lambda: compare_models(
            config, sources, template.tokenizer, chain(data.train, data.held_out),
            own_ids=["reward"] if retemplate is not None else [],
        )
    )  # fmt: skip
    functions = dist.together(lambda: functions_of(config, data.train))
    inputs = identity.of_inputs({"dataset": data.train, "val_dataset": data.held_out}, sources, template)
    dist.same_everywhere(inputs)
    loader = loader_of(config, data.train, shuffle=True)
    held_out = loader_of(config, data.held_out, shuffle=False) if data.held_out else None
    total_batches = batches_of(config, loader)
    settings = fingerprint.settings(
        config, ranks=dist.world_size(), inputs=inputs | identity.of_rewards(config), batches=total_batches,
        layout=layout(config.optim, resolve_dtype(config.models.dtype, device)), versions=identity.versions(),
        day=template.day,
    )  # fmt: skip
    dist.together(lambda: resuming.check(config, settings))  # before the time that weights take

    phases.mark("models")
    cache = reference_cache.cache_of(config, loader, held_out, total_batches, sources.get("reference"), device)
    if cache is not None and cache.complete(device):
        del sources["reference"]  # the cache has every log-probability it would give
    roles = build.roles_of(config, sources, device)
    phases.mark("self-check")
    self_check(roles, data.train)
    if cache is not None:
        phases.mark("reference cache")
        reference_cache.fill(cache, roles)
    phases.mark("reward models")
    rewards = dist.together(lambda: rewards_of(config, roles, template, retemplate, functions))

    trained = {role: roles.engines[role] for role in config.algorithm.traits.trained}
    for engine in trained.values():
        stop_at(engine.module.model, template.end_ids)
    bases = {role: sources[role].weights for role in trained}
    kept, adapters_only = config.output, config.models.tuner == "lora"
    store = checkpoints.Checkpoints(kept, trained, template.tokenizer, bases, settings, adapters_only=adapters_only)
    _refuse_full_disk(trained, config, total_batches)
    phases.mark("resume" if config.output.resume else "new folder")
    progress = checkpoints.begin(config, store, command)
    ctx = context_of(config, roles, loader, template, rewards, cache, total_batches, progress.state, wishes)
    trainer = Trainer(config.algorithm, roles, ctx, loader, config.optim, progress, Path(config.output.output_dir))
    return Session(config, trainer, store, held_out, command, origins)


def _template(config: RunConfig, source: Source) -> Template:
    """The template of a run; one day is written on all ranks and when resumed, beyond midnight too. Collective."""
    template = dist.together(lambda: template_of(config, source))
    day = dist.together(lambda: resuming.day(config)) or template.day
    return replace(template, day=dist.from_rank_0(day))


def _refuse_full_disk(trained: Mapping[str, Any], config: RunConfig, total_batches: int) -> None:
    """Raise ValueError on every rank where rank 0's disk has no room for what the run will write. Collective."""
    needs, lead = resources.needs_of(trained, config), dist.rank() == 0
    dist.together(lambda: resources.refuse_full_disk(needs, config, total_batches) if lead else None)
