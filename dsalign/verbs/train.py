"""The training command: builds a run in order, sources -> data -> models -> context -> trainer, and trains it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain

import torch

from dsalign.checkpoint import checkpoints, fingerprint
from dsalign.config.schema import RunConfig
from dsalign.data.dataset import data_of
from dsalign.engines import build, dist, identity, reference_cache
from dsalign.engines.self_check import self_check
from dsalign.loop.plan import batches_of, context_of, loader_of
from dsalign.loop.session import Session
from dsalign.loop.trainer import Trainer
from dsalign.models.compare import compare_models
from dsalign.models.tokenizer import stop_at, template_of
from dsalign.ranks import Process
from dsalign.report import screen
from dsalign.report.run_log import quiet
from dsalign.rewards.retemplate import retemplate_of
from dsalign.rewards.sources import functions_of, rewards_of
from dsalign.verbs import preflight


def train(
    config: RunConfig, process: Process, command: str, origins: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run one training as `config` says; returns the last value of every metric. Collective.

    process: this rank and its place on this machine. command: the command line, kept in the output folder. origins:
    option -> where its value is from, which the report tells.
    Raises ValueError for input that cannot be used, with what to do.
    """
    quiet(process.rank)
    device = dist.init(process.local_rank, process.local_size)
    try:
        with ExitStack() as held:
            if process.world_size > 1:  # a process alone did it before it imported torch
                lead = process.rank == 0
                dist.together(lambda: held.enter_context(preflight.ready(config)) if lead else None)
            dist.same_everywhere(identity.of_run(config))
            return _train(config, device, command, origins)
    finally:
        dist.shutdown()


def _train(
    config: RunConfig, device: torch.device, command: str, origins: Mapping[str, str] | None
) -> dict[str, float]:
    torch.manual_seed(config.seed + dist.rank())  # dropout differs between ranks, as their rows do
    screen.stage("finding the models")
    sources = build.sources(config)
    template = dist.together(lambda: template_of(config, sources[config.algorithm.traits.main]))
    retemplate = dist.together(lambda: retemplate_of(config, sources, template))
    if retemplate is not None:
        sources = build.with_critic_of_ids(sources, template, retemplate.template)
    screen.stage("reading and tokenising the rows")
    data = dist.together(lambda: data_of(config, template))
    screen.stage("comparing rows and models")
    dist.together(
        lambda: compare_models(
            config, sources, template.tokenizer, chain(data.train, data.held_out),
            own_ids=["reward"] if retemplate is not None else [],
        )
    )  # fmt: skip
    functions = dist.together(lambda: functions_of(config, data.train))
    dist.same_everywhere(identity.of_inputs({"dataset": data.train, "val_dataset": data.held_out}, sources, template))
    loader = loader_of(config, data.train, shuffle=True)
    held_out = loader_of(config, data.held_out, shuffle=False) if data.held_out else None
    total_batches = batches_of(config, loader)

    cache = reference_cache.cache_of(config, loader, held_out, total_batches, sources.get("reference"), device)
    if cache is not None and cache.complete(device):
        del sources["reference"]  # the cache has every log-probability it would give
    screen.stage("loading the models")
    roles = build.roles_of(config, sources, device)
    screen.stage("checking that packed rows are computed as rows alone")
    self_check(roles, data.train)
    if cache is not None:
        screen.stage("computing the reference's log-probabilities")
        reference_cache.fill(cache, roles)
    screen.stage("making the first step ready")
    rewards = dist.together(lambda: rewards_of(config, roles, template, retemplate, functions))

    trained = {role: roles.engines[role] for role in config.algorithm.traits.trained}
    for engine in trained.values():
        stop_at(engine.module.model, template.end_ids)
    bases = {role: sources[role].weights for role in trained}
    settings = fingerprint.settings(config, len(data.train), total_batches)
    adapters_only = config.models.tuner == "lora"
    store = checkpoints.Checkpoints(
        config.output, trained, template.tokenizer, bases, settings, adapters_only=adapters_only
    )
    progress = checkpoints.begin(config, store, command)
    ctx = context_of(config, roles, loader, template, rewards, cache, total_batches, progress.state)
    trainer = Trainer(config.algorithm, roles, ctx, loader, config.optim, progress)
    return Session(config, trainer, store, held_out, origins).run()
