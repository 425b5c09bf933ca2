"""What test_vllm.py and test_vllm_server.py run on every rank: training that samples with vLLM, and mistakes in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from online_cases import build, last_prepared, prompts
from rollout_cases import no_adapter, old_head, old_weights
from support import VOCABULARY

from dsalign.algos.ppo import PPO
from dsalign.contract.groups import Group
from dsalign.engines import dist
from dsalign.rollout.generate import Keys, Sampler

HOW: dict[str, Any] = {"batch_size": 4, "steps": 3, "recorded": False, "rate": 1e-2, "max_new_tokens": 8}


def trainer_of(folder: Path, stage: str, tuner: str, **rollout: Any) -> tuple[Any, list[Group]]:
    """(a trainer that samples with vLLM and has taken a step, so that an adapter is not zero; this rank's prompts)."""
    trainer = build(folder, PPO(num_ppo_epochs=1), stage=stage, tuner=tuner, rollout="vllm", **HOW, **rollout)
    trainer.optimizer_step(*last_prepared(trainer))
    return trainer, [g for g in prompts(16) if g.index % dist.world_size() == dist.rank()]


def three_syncs(folder: Path, stage: str, tuner: str, rollout: dict[str, Any]) -> tuple[list[float], bool, bool]:
    """(the largest gap to the trainer's log-probabilities after each of three steps, nats; whether the probe found all
    of them exact; whether completions are the same where each group is sampled alone)."""
    trainer, mine = trainer_of(folder, stage, tuner, **rollout)
    mine = mine[: 6 - 2 * dist.rank()]  # the ranks have different numbers of prompts
    gaps, exact, alone = [], True, True
    for step in range(3):
        found = trainer.ctx.at(step).generate("policy", mine, 2)
        theirs = trainer.roles.each_group("policy", found.groups)
        gap = max(float((a - b).abs().max()) for a, b in zip(found.logps, theirs, strict=True))
        gaps.append(max(dist.gather(torch.tensor([gap], dtype=torch.float64), trainer.roles.device).tolist()))
        exact = exact and found.exact
        one = trainer.ctx.at(step).generate("policy", mine[:1], 2).groups
        alone = alone and one[0].completions == found.groups[0].completions
        trainer.optimizer_step(*last_prepared(trainer))
    return gaps, exact, alone


@contextmanager
def skipped_sync(trainer: Any) -> Iterator[None]:
    with patch.object(trainer.ctx._engines["policy"].engine._form, "holds", lambda name: True):
        yield


@contextmanager
def old_prompts(trainer: Any) -> Iterator[None]:
    """The prefix cache outlives the weights."""
    with patch.object(trainer.ctx._engines["policy"].engine._form._llm, "reset_prefix_cache", lambda: True):
        yield


@contextmanager
def other_temperature(trainer: Any) -> Iterator[None]:
    form = trainer.ctx._engines["policy"].engine._form
    sampling = form._sampling

    def hotter(*args: Any) -> Any:
        found = sampling(*args)
        found.temperature = 1.0
        return found

    with patch.object(form, "_sampling", hotter):
        yield


FAULTS = {f.__name__: f for f in (no_adapter, old_head, old_weights, skipped_sync, old_prompts, other_temperature)}


def faulty(folder: Path, tuner: str, names: list[str], rollout: dict[str, Any]) -> dict[str, str]:
    """What the first rollout with each mistake in it says; between two of them all is well."""
    trainer, _ = trainer_of(folder, "0", tuner, **rollout)
    draw = random.Random(5)
    ids = tuple(draw.randrange(4, VOCABULARY) for _ in range(300))  # of more than one block of vLLM's prefix cache
    long, said = [Group(0, "prompts.jsonl:1", ids, (), "")], {}
    sampler, options = trainer.ctx._engines["policy"], trainer.ctx.rollout
    assert isinstance(sampler, Sampler)

    def roll(k: int) -> None:
        sampler.probed(*sampler.sample(long, 1, Keys(1, k, 0), options), options)

    for k, name in enumerate(names):
        roll(k)
        trainer.optimizer_step(*last_prepared(trainer))
        with FAULTS[name](trainer):
            try:
                roll(k)
            except ValueError as error:
                said[name] = str(error)
        sampler.engine._run += "x"  # another name of the weights, so that they are sent again
    roll(0)
    return said
