"""What the ranks run: the trainer over real engines, on a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from deepspeed.utils import safe_get_full_grad
from support import ALGORITHMS, ds_file, learnable_groups, random_groups, section

from dsalign import algos
from dsalign.checkpoint.export import whole_state
from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import ModelOptions, OptimOptions
from dsalign.contract.algorithm import Algorithm, Traits
from dsalign.contract.groups import Batch, Loss, MicroBatch, Output, Prepared
from dsalign.data.batches.loader import Loader
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.roles import Roles
from dsalign.loop.context import RunContext
from dsalign.loop.trainer import Trainer
from dsalign.models import load
from dsalign.models.heads import CausalModel
from dsalign.models.names import resolve

STAGES: dict[str, dict[str, Any]] = {
    **{str(stage): {"stage": stage} for stage in (0, 1, 2)},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "3_offload": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    },
}


def model_options(tuner: str, **changes: Any) -> ModelOptions:
    """Adapters of rank 4 without dropout on every linear layer, or all weights."""
    return section(ModelOptions, tuner=tuner, lora_rank=4, lora_alpha=8, **changes)


@dataclass(frozen=True, kw_only=True)
class ActorCritic(Algorithm):
    """Two trained roles, several passes and mini-batches over what was prepared: the shape of PPO, made small."""

    traits: ClassVar[Traits] = Traits(
        data="demonstrations",
        roles={"policy": "train", "value": "train"},
        needs=frozenset(),
        epochs=2,
        mini_batches=3,
    )

    def prepare(self, ctx: Any, batch: Batch) -> Prepared:
        """The values before the first pass, one a token."""
        values = ctx.values("value", batch.local)
        return Prepared(batch.local, {"values": [v[:-1] for v in values], "old": ctx.logps("policy", batch.local)})

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"tokens": len(batch.segment)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-ratio x value: a policy gradient with the first values as advantages."""
        return Loss({"tokens": -(torch.exp(out.logps - batch.fields["old"]) * batch.fields["values"]).sum()}, {})

    def value_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """Values of tokens towards 1."""
        values = out.values[torch.arange(len(batch.segment)) + batch.segment]
        return Loss({"tokens": 0.5 * ((values - 1) ** 2).sum()}, {"value": (values.detach().sum(), len(values))})


class Recording(Trainer):
    """A trainer that keeps the whole gradient of each step: `gradients` of the last engine, `by_engine` of each."""

    gradients: dict[str, torch.Tensor]
    by_engine: dict[str, dict[str, torch.Tensor]]

    def _step(self, wanted: bool, loss: float) -> tuple[dict[str, float], str]:
        self.by_engine = {}
        for name in self.stepped:
            named = self.roles.engines[name].module.named_parameters()
            self.gradients = {n: safe_get_full_grad(p).float().clone() for n, p in named if p.requires_grad}
            self.by_engine[name] = self.gradients
        return super()._step(wanted, loss)


def build(
    name: str,
    folder: Path,
    *,
    stage: str,
    tuner: str = "full",
    batch_size: int = 1,
    global_batch: int = 8,
    rows: int = 24,
    learning_rate: float = 0.05,
    optimizer: str = "sgd",
    steps: int | None = None,
    max_steps: int | None = None,
    groups: Any = None,
    checkpointing: bool = False,
    settings: dict[str, Any] | None = None,
    wrap: Any = None,
    max_tokens: int | None = None,
    head_bytes: int | None = None,
) -> Recording:
    """A trainer of one algorithm on the tiny model of `folder`."""
    found_class = ActorCritic if name == "actor_critic" else algos.load(name)
    algorithm = found_class(**(ALGORITHMS.get(name, {}) if settings is None else settings))
    device = torch.device("cpu")
    options = model_options(tuner, gradient_checkpointing=checkpointing)
    optim = section(
        OptimOptions,
        deepspeed=ds_file({"zero_optimization": STAGES[stage]}),
        batch_size=batch_size,
        max_grad_norm=0.0,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_steps=max_steps,
    )
    found: dict[str, Any] = {}
    source = resolve(str(folder))
    for role, how in algorithm.traits.roles.items():
        if how == "train":
            module = load.load_trained(role, source, options, device=device, dropout=False, seed=42)
            if head_bytes is not None and isinstance(module, CausalModel):  # the option counts in MiB
                module.head = dataclasses.replace(module.head, head_bytes=head_bytes)
            found[role] = engines.trained(wrap(module) if wrap else module, optim, torch.float32)
        elif tuner == "full":
            found[role] = engines.frozen(load.load_frozen(role, source, options, device=device), optim, torch.float32)
    models = Roles(found, device, batch_size, max_tokens=max_tokens)
    groups = random_groups(algorithm.traits.data, rows) if groups is None else groups
    loader = Loader(
        groups,
        global_batch=global_batch,
        seed=1,
        rank=dist.rank(),
        world_size=dist.world_size(),
        min_groups=algorithm.traits.min_groups,
    )
    ctx = RunContext(models, seed=1, max_length=64, state={}, total_batches=steps or loader.steps_per_epoch)
    return Recording(algorithm, models, ctx, loader, optim, Progress())


def gradient(
    name: str,
    folder: Path,
    stage: str,
    tuner: str,
    batch_size: int,
    global_batch: int,
    checkpointing: bool = False,
    max_tokens: int | None = None,
    head_bytes: int | None = None,
) -> Any:
    """(loss, {name: whole gradient}) of the first global batch."""
    trainer = build(
        name,
        folder,
        stage=stage,
        tuner=tuner,
        batch_size=batch_size,
        global_batch=global_batch,
        steps=1,
        checkpointing=checkpointing,
        max_tokens=max_tokens,
        head_bytes=head_bytes,
    )
    found: list[float] = []
    trainer.fit(lambda metrics: found.append(metrics["loss"]))
    return found[0], {n: g.numpy() for n, g in trainer.gradients.items()}


def three_steps(name: str, folder: Path, stage: str, tuner: str) -> Any:
    """({name: whole weight} after three SGD steps with an uneven last batch, the losses)."""
    trainer = build(name, folder, stage=stage, tuner=tuner, batch_size=3, global_batch=8, rows=21)
    losses: list[float] = []
    trainer.fit(lambda metrics: losses.append(metrics["loss"]))
    state = whole_state(trainer.roles.engines[trainer.algorithm.traits.main], trained_only=True)
    return {n: t.numpy() for n, t in state.items()}, losses


def short_second_step(name: str, folder: Path, stage: str) -> Any:
    """({name: weight}, steps) after global batches of 2 and 1 rows."""
    trainer = build(name, folder, stage=stage, global_batch=2, rows=3)
    trainer.fit(lambda metrics: None)
    state = whole_state(trainer.roles.engines[trainer.algorithm.traits.main], trained_only=True)
    return {n: t.numpy() for n, t in state.items()}, trainer.progress.step


class Spare(torch.nn.Module):
    """A model with a parameter its output does not depend on."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.shares, self.balancing = inner, inner.shares, None
        self.spare = torch.nn.Parameter(torch.zeros(3))

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


def untouched_parameter(folder: Path, stage: str) -> str:
    """The message that a run with such a parameter ends with."""
    trainer = build("sft", folder, stage=stage, wrap=Spare, steps=1)
    try:
        trainer.fit(lambda metrics: None)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def learn(name: str, folder: Path, stage: str, tuner: str) -> tuple[float, float]:
    """The mean loss of the first and of the last three of 30 AdamW steps."""
    groups = learnable_groups(algos.load(name)().traits.data)
    trainer = build(
        name,
        folder,
        stage=stage,
        tuner=tuner,
        batch_size=4,
        groups=groups,
        learning_rate=1e-2 if tuner == "lora" else 3e-3,
        optimizer="adamw",
        steps=30,
        settings={},
    )
    losses: list[float] = []
    trainer.fit(lambda metrics: losses.append(metrics["loss"]))
    return sum(losses[:3]) / 3, sum(losses[-3:]) / 3


def actor_critic(folder: Path, stage: str, batch_size: int, max_steps: int | None = None) -> Any:
    """({role: {name: weight}}, losses, order of roles' learning rates) after two batches of 7 and 4 groups."""
    trainer = build(
        "actor_critic",
        folder,
        stage=stage,
        batch_size=batch_size,
        global_batch=7,
        rows=11,
        learning_rate=1e-3,
        max_steps=max_steps,
    )
    seen: list[dict[str, float]] = []
    trainer.fit(seen.append)
    weights = {
        role: {n: t.numpy() for n, t in whole_state(engine, trained_only=True).items()}
        for role, engine in trainer.roles.engines.items()
    }
    return weights, [m["loss"] for m in seen], sorted(seen[0]), trainer.progress.as_dict()
