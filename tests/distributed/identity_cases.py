"""What test_same_tokens.py runs on every rank: a training whose every prompt is also sampled by other engines, in other
batches, under the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Recording
from online_cases import ENDS, build
from run_cases import Run, store_of
from torch import Tensor

from dsalign.algos.grpo import GRPO
from dsalign.contract.groups import Group, Prepared
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.rollout.generate import Keys, Sampler

SAVED = 1  # rollouts before the checkpoint
RATE = 0.3  # of SGD: Adam would make differences of rounding as large as an update


class Way(NamedTuple):
    """How completions are sampled: --rollout and --local_rollout_forward_batch_size."""

    engine: str
    rows: int

    @property
    def options(self) -> dict[str, Any]:
        return {"rollout": self.engine, "local_rollout_forward_batch_size": self.rows}


class Size(NamedTuple):
    """How much is sampled: rollouts of a training, completions a prompt, and tokens of each at most."""

    rollouts: int
    samples: int
    most: int


Completions = dict[int, tuple[tuple[int, ...], ...]]  # index of the prompt -> its completions
Found = dict[tuple[int, Way], Completions]  # of each rollout, by the way of sampling


def trained(
    folder: Path, stage: str, size: Size, own: Way, others: Sequence[Way], out: Path, resumed: bool
) -> tuple[Found, float]:
    """(what each rollout of a training by GRPO sampled on all ranks, in its own way and, from the checkpoint on, in
    `others`; the mean entropy of a token, nats). The checkpoint is in `out`; `resumed`: the training goes on from it.
    """
    trainer = training(folder, stage, size, own)
    store = store_of(trainer, Run("grpo", folder), out)
    if resumed:
        trainer.progress = store.load(out / f"checkpoint-{SAVED}")
        trainer.ctx.state = trainer.progress.state
    found: Found = {}
    nats: list[Tensor] = []

    def after_prepare(prepared: Prepared) -> None:
        step = trainer.ctx.step
        found[step, own] = _of_all_ranks(prepared.groups)
        nats.extend(-old for old in prepared.fields["old"])
        mine = trainer.loader.batch(step).local
        for way in others if step >= SAVED else ():
            options = RolloutOptions(max_new_tokens=size.most, **way.options)
            sampler = Sampler(trainer.roles, "policy", options, ENDS)
            filled, _, _ = sampler.sample(mine, size.samples, Keys(1, step, 0), options)
            found[step, way] = _of_all_ranks(filled)

    def after_step(metrics: dict[str, float]) -> None:
        if trainer.progress.step == SAVED:
            store.save(trainer.progress)

    trainer.fit(after_step, after_prepare)
    return found, float(torch.cat(nats).mean())


def training(folder: Path, stage: str, size: Size, way: Way) -> Recording:
    """A trainer that has not begun; as seed it has 1."""
    how: dict[str, Any] = {"batch_size": 4, "steps": size.rollouts, "recorded": False, "rate": RATE, "optimizer": "sgd"}
    algorithm = GRPO(num_generations=size.samples, beta=0.0)
    return build(folder, algorithm, stage=stage, tuner="full", **how, max_new_tokens=size.most, **way.options)


def untrained(folder: Path, size: Size, way: Way) -> Completions:
    """What the rollout after the checkpoint would sample if the weights were those of the start."""
    trainer = training(folder, "0", size, way)
    batch = trainer.loader.batch(SAVED)
    return _of_all_ranks(trainer.ctx.at(SAVED).generate("policy", batch.local, size.samples).groups)


def _of_all_ranks(groups: Sequence[Group]) -> Completions:
    every: list[Any] = [None] * dist.world_size()
    torch.distributed.all_gather_object(every, {g.index: g.completions for g in groups})
    return {index: completions for part in every for index, completions in part.items()}
