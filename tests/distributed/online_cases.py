"""What the ranks run for online algorithms: the trainer on a tiny model, and a reward that is a function."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from cases import STAGES, Recording, model_options
from support import VOCABULARY, ds_file, section

from dsalign import algos
from dsalign.algos.ppo import PPO
from dsalign.checkpoint.export import export
from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import OptimOptions
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.groups import Group, Prepared, Sampled, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.loader import Loader, Stream
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.roles import Roles
from dsalign.loop.context import RunContext
from dsalign.loop.metrics import Spread
from dsalign.models import load
from dsalign.models.names import resolve

BELOW = 25  # tokens below this id are rewarded
ENDS = frozenset({2})


def prompts(n: int) -> list[Group]:
    """n prompts of uneven lengths without completions."""
    draw = random.Random(3)
    ids = [tuple(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(2, 9))) for _ in range(n)]
    return [Group(i, f"prompts.jsonl:{i + 1}", x, (), f"prompt {i}") for i, x in enumerate(ids)]


def share_below(groups: Any, batch_size: int) -> Scores:
    """The share of rewarded tokens in each completion."""
    shares = [torch.tensor([sum(i < BELOW for i in c) / len(c) for c in g.completions]) for g in groups]
    return Scores(shares, {"share": shares})


class Recorded(RunContext):
    """Completions that were recorded: random ones, a function of the prompt's index and the sample's number alone."""

    def generate(self, role: str, groups: Any, samples: int, first: int = 0) -> Any:
        filled = []
        for g in groups:
            draw = random.Random(1000 * first + g.index)
            answers = tuple(
                (*(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 6))), *draw.choice(((2,), (7,))))
                for _ in range(samples)
            )
            filled.append(Group(g.index, g.where, g.prompt, answers, g.prompt_text))
        logps = self.logps(role, filled)
        if self.rollout.rollout_is_cap is not None:  # by a sampler of another precision: up to 0.3 nats off
            angles = [17.0 * g.index + torch.arange(len(x)) for g, x in zip(filled, logps, strict=True)]
            logps = [x + 0.3 * torch.sin(angle) for x, angle in zip(logps, angles, strict=True)]
        return Sampled(filled, logps)


def build(
    folder: Path,
    algorithm: Algorithm,
    *,
    stage: str,
    tuner: str,
    batch_size: int,
    steps: int,
    recorded: bool,
    rate: float,
    optimizer: str | None = None,
    **rollout: Any,
) -> Recording:
    """A trainer of 8 prompts a step; with `recorded` SGD and recorded completions, else AdamW and real rollouts.
    optimizer: another one than these. rollout: options of it."""
    device, world, traits = torch.device("cpu"), dist.world_size(), algorithm.traits
    options, source, sampling = model_options(tuner), resolve(str(folder)), RolloutOptions(**rollout)
    optim = section(
        OptimOptions,
        deepspeed=ds_file({"zero_optimization": STAGES[stage]}),
        batch_size=batch_size,
        max_grad_norm=0.0 if recorded else 1.0,
        optimizer=optimizer or ("sgd" if recorded else "adamw"),
        learning_rate=rate,
        weight_decay=0.0,
        lr_scheduler_type="constant",
    )
    found = {}
    for role in traits.trained:
        module = load.load_trained(role, source, options, device=device, dropout=False, seed=42)
        found[role] = engines.trained(module, optim, torch.float32)
    if tuner == "full" and "reference" in traits.roles:
        reference = load.load_frozen("reference", source, options, device=device)
        found["reference"] = engines.frozen(reference, optim, torch.float32)
    roles = Roles(found, device, batch_size, sampling.temperature)
    global_batch = 8 * traits.mini_batches
    loader = Loader(prompts(16), global_batch=global_batch, seed=1, rank=dist.rank(), world_size=world)
    context = Recorded if recorded else RunContext
    ctx = context(
        roles,
        seed=1,
        max_length=64,
        state={},
        end_ids=ENDS,
        rewards=share_below,
        total_batches=steps,
        rollout=sampling,
        stream=Stream(loader),
    )
    return Recording(algorithm, roles, ctx, loader, optim, Progress())


CUT: dict[str, dict[str, Any]] = {  # settings whose gradient is compared over cuts
    "ppo": {"num_ppo_epochs": 1, "num_generations": 2, "whiten_rewards": True, "kl_estimator": "k3"},
    "grpo": {"num_generations": 3, "mask_truncated": True, "dynamic_sampling": 2},
    "rloo": {"num_generations": 3},
    "reinforce": {"num_generations": 2, "kl_estimator": "k3"},
    "online_dpo": {"num_generations": 3},
}
CAPPED = {"ppo": 1.2, "grpo": 1.2, "rloo": 1.2}  # algorithm -> its rollout_is_cap, where it has weights


def gradient(name: str, folder: Path, stage: str, tuner: str, batch_size: int, exact: bool = False) -> Any:
    """({role/name: gradient} of the first step, its metrics) on recorded rollouts of several completions a prompt;
    `exact`: in float64 and padded rows of one completion each."""
    algorithm = algos.load(name)(**CUT[name])
    how: dict[str, Any] = {"batch_size": batch_size, "steps": 1, "recorded": True, "rate": 0.01, "temperature": 0.7}
    how["rollout_is_cap"] = CAPPED.get(name)
    trainer = build(folder, algorithm, stage=stage, tuner=tuner, **how)
    found: dict[str, Any] = {}
    for engine in trainer.roles.engines.values():
        assert engine.module.shares
        if exact:
            engine.module.double().shares = False
    plain_step = trainer._step

    def step(wanted: bool, loss: float) -> tuple[dict[str, float], str]:
        result = plain_step(wanted, loss)
        found.update({f"{role}/{n}": g.numpy() for role, all_ in trainer.by_engine.items() for n, g in all_.items()})
        return result

    trainer._step = step  # type: ignore[method-assign]
    seen: list[dict[str, float]] = []
    trainer.fit(seen.append)
    return found, seen[0]


LEARN: dict[str, dict[str, Any]] = {
    "ppo": {"num_ppo_epochs": 3, "kl_coef": 0.01, "vf_coef": 0.5},
    "grpo": {"num_iterations": 2, "num_generations": 4, "dynamic_sampling": 1},
    "rloo": {"num_iterations": 2, "num_generations": 4, "kl_coef": 0.01},
    "reinforce": {"num_iterations": 3, "num_generations": 2},
    "online_dpo": {"num_generations": 4, "beta": 0.5},
}


def learn(name: str, folder: Path, stage: str, tuner: str) -> tuple[list[float], dict[str, float], int]:
    """(the mean score of each rollout, the metrics of the first step, sampled completions shown)."""
    algorithm = algos.load(name)(num_mini_batches=2, **LEARN[name])
    rate = 2e-2 if tuner == "lora" else 1e-2
    how: dict[str, Any] = {"batch_size": 4, "steps": 12, "recorded": False, "rate": rate}
    more = {"max_new_tokens": 4, "num_sample_generations": 2}
    trainer = build(folder, algorithm, stage=stage, tuner=tuner, **how, **more)
    scores: list[float] = []
    seen: list[dict[str, float]] = []
    shown: list[int] = []

    def prepared(batch: Prepared) -> None:
        total, count = batch.metrics["objective/scores"]
        of_all = dist.total([float(total), float(count)], trainer.roles.device)
        scores.append(of_all[0] / of_all[1])
        shown.append(len(batch.samples))

    trainer.fit(seen.append, prepared)
    return scores, seen[0], sum(shown)


def last_prepared(trainer: Recording) -> Any:
    """A prepared batch and this rank's positions in it."""
    batch = trainer.loader.batch(0)
    return trainer.algorithm.prepare(trainer.ctx.at(99), batch), range(len(batch.mine))


def logged(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step of three rollouts of 8 prompts, in two passes, with two completions a prompt."""
    algorithm = PPO(num_ppo_epochs=2, num_generations=2)
    trainer = build(folder, algorithm, stage="0", tuner="full", batch_size=4, steps=3, recorded=True, rate=0.05)
    seen: list[dict[str, float]] = []
    spread = Spread()
    trainer.fit(lambda metrics: seen.append({**metrics, **spread.of(metrics, last=trainer.progress.prepared is None)}))
    return seen


def generate_and_export(folder: Path, out: Path, stage: str, tuner: str, tokenizer: Any) -> Any:
    """Greedy and sampled completions by prompt index, of the model that is exported to `out` after two updates, and the
    loss of one more step."""
    algorithm = PPO(num_ppo_epochs=1)
    how: dict[str, Any] = {"batch_size": 4, "steps": 2, "recorded": False, "rate": 1e-2, "max_new_tokens": 8}
    trainer = build(folder, algorithm, stage=stage, tuner=tuner, **how)
    trainer.fit(lambda metrics: None)
    export(trainer.roles.engines["policy"], out, tokenizer, str(folder))
    mine = [g for g in prompts(16) if g.index % dist.world_size() == dist.rank()]
    found: list[Any] = []
    for samples, sampling in ((1, {"top_k": 1}), (2, {"temperature": 0.8})):
        size = {"max_new_tokens": 8, "local_rollout_forward_batch_size": 5}
        trainer.ctx.rollout = RolloutOptions(**size, **sampling)  # type: ignore[arg-type]
        trainer.roles.temperature = trainer.ctx.rollout.temperature
        groups = trainer.ctx.at(7).generate("policy", mine, samples).groups
        every: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(every, {g.index: g.completions for g in groups})
        found.append({k: v for part in every for k, v in part.items()})
    metrics = trainer.optimizer_step(*last_prepared(trainer))  # training goes on after a rollout
    return found[0], found[1], metrics["loss"]
