"""What the ranks run for PPO: the trainer with policy and critic on a tiny model, and a reward that is a function."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from cases import LORA, STAGES, Recording
from support import VOCABULARY

from dsalign.algos.ppo import PPO
from dsalign.checkpoint.export import export
from dsalign.checkpoint.progress import Progress
from dsalign.contract.groups import Group, Sampling
from dsalign.data.batches.loader import Loader
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.roles import Models
from dsalign.loop.context import RunContext
from dsalign.loop.plan import Plan
from dsalign.models import load
from dsalign.models.names import resolve
from dsalign.models.tokenizer import LoadOptions

BELOW = 25  # tokens below this id are rewarded
ENDS = frozenset({2})


def prompts(n: int) -> list[Group]:
    """n prompts of uneven lengths without completions."""
    draw = random.Random(3)
    ids = [tuple(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(2, 9))) for _ in range(n)]
    return [Group(i, f"prompts.jsonl:{i + 1}", x, (), f"prompt {i}") for i, x in enumerate(ids)]


def share_below(groups: Any, batch_size: int) -> list[torch.Tensor]:
    """The share of rewarded tokens in each completion."""
    return [torch.tensor([sum(i < BELOW for i in c) / len(c) for c in g.completions]) for g in groups]


class Recorded(RunContext):
    """Completions that were recorded: random ones, a function of the prompt's index alone."""

    def generate(self, role: str, groups: Any, sampling: Sampling, batch_size: int) -> Any:
        filled = []
        for g in groups:
            draw = random.Random(g.index)
            answers = tuple(
                (*(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 6))), *draw.choice(((2,), (7,))))
                for _ in range(sampling.samples)
            )
            filled.append(Group(g.index, g.where, g.prompt, answers, g.prompt_text))
        return filled, self.logps(role, filled)


def build(
    folder: Path, algorithm: PPO, *, stage: str, tuner: str, batch_size: int, steps: int, recorded: bool, rate: float
) -> Recording:
    """A PPO trainer of 8 prompts a step; with `recorded` SGD and recorded completions, else AdamW and real rollouts."""
    device, world = torch.device("cpu"), dist.world_size()
    options = LoadOptions(device=device)
    engine_options = engines.EngineOptions(
        ds_config={"zero_optimization": STAGES[stage]},
        dtype=torch.float32,
        batch_size=batch_size,
        world_size=world,
        max_grad_norm=0.0 if recorded else 1.0,
        optimizer="sgd" if recorded else "adamw",
        learning_rate=rate,
        weight_decay=0.0,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    source = resolve(str(folder))
    lora = LORA if tuner == "lora" else None
    found = {
        r: engines.trained(load.load_trained(r, source, options, lora), engine_options) for r in ("policy", "value")
    }
    if lora is None:
        found["reference"] = engines.frozen(load.load_frozen("reference", source, options), engine_options)
    models = Models(found, device, batch_size, algorithm.temperature)
    context = Recorded if recorded else RunContext
    ctx = context(models, seed=1, max_length=64, state={}, end_ids=ENDS, rewards=share_below, total_batches=steps)
    global_batch = 8 * algorithm.mini_batches
    loader = Loader(prompts(16), global_batch=global_batch, seed=1, rank=dist.rank(), world_size=world)
    plan = Plan(
        total_batches=steps,
        world_size=world,
        seed=1,
        learning_rates={"policy": rate, "value": rate},
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=0.0 if recorded else 1.0,
    )
    return Recording(algorithm, models, ctx, loader, plan, Progress())


def gradient(folder: Path, stage: str, tuner: str, batch_size: int, exact: bool = False) -> Any:
    """({role/name: gradient} of the first step, its metrics) on recorded rollouts of two completions a prompt; `exact`:
    in float64 and padded rows of one completion each."""
    algorithm = PPO(num_ppo_epochs=1, num_generations=2, whiten_rewards=True, temperature=0.7, kl_estimator="k3")
    trainer = build(
        folder, algorithm, stage=stage, tuner=tuner, batch_size=batch_size, steps=1, recorded=True, rate=0.01
    )
    found: dict[str, Any] = {}
    for engine in trainer.models.engines.values():
        assert engine.module.shares
        if exact:
            engine.module.double().shares = False
    plain_step = trainer._step

    def step(role: str, result: dict[str, float]) -> None:
        plain_step(role, result)
        found.update({f"{role}/{n}": g.numpy() for n, g in trainer.gradients.items()})

    trainer._step = step  # type: ignore[method-assign]
    seen: list[dict[str, float]] = []
    trainer.fit(seen.append)
    return found, seen[0]


def learn(folder: Path, stage: str, tuner: str) -> tuple[list[float], dict[str, float], int]:
    """(the mean score of each rollout, the metrics of the first step, sampled completions shown)."""
    algorithm = PPO(
        num_ppo_epochs=3, num_mini_batches=2, max_new_tokens=4, kl_coef=0.01, vf_coef=0.5, num_sample_generations=2
    )
    rate = 2e-2 if tuner == "lora" else 1e-2
    trainer = build(folder, algorithm, stage=stage, tuner=tuner, batch_size=4, steps=12, recorded=False, rate=rate)
    seen: list[dict[str, float]] = []
    shown: list[int] = []
    trainer.fit(seen.append, lambda prepared: shown.append(len(prepared.samples)))
    return [m["objective/scores"] for m in seen[::6]], seen[0], sum(shown)


def last_prepared(trainer: Recording) -> Any:
    """A prepared batch and this rank's positions in it."""
    batch = trainer.loader.batch(0)
    return trainer.algorithm.prepare(trainer.ctx.at(99), batch), range(len(batch.mine))


def logged(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step of three rollouts of 8 prompts, in two passes, with two completions a prompt."""
    algorithm = PPO(num_ppo_epochs=2, num_generations=2)
    trainer = build(folder, algorithm, stage="0", tuner="full", batch_size=4, steps=3, recorded=True, rate=0.05)
    seen: list[dict[str, float]] = []
    trainer.fit(seen.append)
    return seen


def generate_and_export(folder: Path, out: Path, stage: str, tuner: str, tokenizer: Any) -> Any:
    """Greedy and sampled completions by prompt index, of the model that is exported to `out` after two updates, and the
    loss of one more step."""
    algorithm = PPO(num_ppo_epochs=1, max_new_tokens=8)
    trainer = build(folder, algorithm, stage=stage, tuner=tuner, batch_size=4, steps=2, recorded=False, rate=1e-2)
    trainer.fit(lambda metrics: None)
    export(trainer.models.engines["policy"], out, tokenizer, str(folder))
    mine = [g for g in prompts(16) if g.index % dist.world_size() == dist.rank()]
    found: list[Any] = []
    for sampling in (Sampling(8, top_k=1), Sampling(8, temperature=0.8, samples=2)):
        groups, _ = trainer.ctx.at(7).generate("policy", mine, sampling, 5)
        every: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(every, {g.index: g.completions for g in groups})
        found.append({k: v for part in every for k, v in part.items()})
    metrics = trainer.optimizer_step(*last_prepared(trainer))  # training goes on after a rollout
    return found[0], found[1], metrics["loss"]
