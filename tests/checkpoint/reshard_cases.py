"""What the ranks run: a training saved under one layout, and gone on with under another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import run_cases
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from run_cases import Run, role_of, weights
from support import section

from dsalign.checkpoint.checkpoints import Checkpoints
from dsalign.config.schema import OutputOptions
from dsalign.engines import dist
from dsalign.engines import engine as engines

OPTIM = partial(run_cases.optim, adam_epsilon=1e-2)  # with a small one Adam makes steps of rounding in gradients
Arrays = dict[str, np.ndarray]


class State(NamedTuple):
    """Float32 weights, first and second moments, each name -> array; the steps that the engine has taken."""

    master: Arrays
    first: Arrays
    second: Arrays
    steps: int


class Found(NamedTuple):
    """The state after step 2, and the losses and weights of the two steps behind it."""

    state: State
    losses: list[float]
    weights: Arrays


def saved(run: Run, output_dir: Path) -> Found | None:
    """Four steps without a break, with a checkpoint after two."""
    return _fit(run, output_dir, None)


def resumed(run: Run, output_dir: Path) -> Found | None:
    """Steps three and four from the checkpoint of `saved`, whatever wrote it."""
    return _fit(run, output_dir, output_dir / "checkpoint-2")


def _fit(run: Run, output_dir: Path, checkpoint: Path | None) -> Found | None:
    torch.manual_seed(5)
    with mock.patch.object(run_cases, "optim", OPTIM):
        trainer = run_cases.build(run)
    engine = trainer.roles.engines[role_of(trainer)]
    store = Checkpoints(
        section(OutputOptions, output_dir=str(output_dir)),
        {role_of(trainer): engine},
        run_cases.tokenizer(),
        {role_of(trainer): str(run.folder)},
        {
            "options": {"seed": "1"},
            "ranks": dist.world_size(),
            "layout": engines.layout(OPTIM(run.stage), run.dtype),
        },
        adapters_only=run.tuner == "lora",
    )
    states, losses = [], list[float]()
    if checkpoint is not None:
        trainer.progress = store.load(checkpoint)
        trainer.ctx.state = trainer.progress.state
        states.append(_state(engine))

    def after_step(metrics: dict[str, float]) -> None:
        if trainer.progress.step == 2:
            states.append(_state(engine))
            store.save(trainer.progress)
        elif trainer.progress.step > 2:
            losses.append(metrics["loss"])

    trainer.fit(after_step)
    after = weights(trainer)
    return Found(states[0], losses, after) if dist.rank() == 0 else None


def _state(engine: Any) -> State:
    """By DeepSpeed's own interface, or of stage 0 torch's: never by the code that is tested."""
    found = State({}, {}, {}, engine.global_steps)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False  # it links the second group before that has moments
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            own = engine.optimizer.state[parameter]
            three = [parameter.detach(), own["exp_avg"], own["exp_avg_sq"]]
        else:
            moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            three = [safe_get_full_fp32_param(parameter), *moments]
        for arrays, tensor in zip(found[:3], three, strict=True):
            arrays[name] = tensor.float().numpy().copy()
    return found
