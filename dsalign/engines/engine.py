"""Role -> DeepSpeed engine, from one ds_configs file: no number has two homes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from dsalign.cpu.row_adam import RowAdam, keep_sparse, numbers

logger = logging.getLogger(__name__)
OURS = {
    "train_batch_size": "--batch_size, --gradient_accumulation_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--optimizer, --learning_rate, --weight_decay and --adam_*",
    "scheduler": "--lr_scheduler_type and --warmup_ratio",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "hybrid_engine": "nothing: rollouts go through the actor's own engine at every stage",
}
NO_CLIPPING = 1e30  # a limit no norm reaches: with 0 the engine would not compute the norm that tells a NaN


@dataclass(frozen=True)
class EngineOptions:
    """What the flags say about every engine. max_grad_norm 0 = no clipping."""

    ds_config: Mapping[str, Any]
    dtype: torch.dtype
    batch_size: int
    world_size: int
    max_grad_norm: float
    optimizer: str
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float


def stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a DeepSpeed file that sets what has a flag: two homes for a number disagree sooner or later.

    Raises ValueError naming every such key and its flag. "auto" is read as "left to the flags".
    """
    set_twice = [key for key in OURS if key in settings and settings[key] != "auto" and not _all_auto(settings[key])]
    if set_twice:
        lines = "; ".join(f"{key} is set by {OURS[key]}" for key in set_twice)
        raise ValueError(f"deepspeed: {where} sets what has a flag: {lines}. Remove it from the file")


def _plain(options: EngineOptions, zero: Mapping[str, Any]) -> bool:
    """Whether the engine runs the torch optimizer as it is; `step` clips for it."""
    return zero.get("stage", 0) == 0 and options.dtype is torch.float32


def _all_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_all_auto(v) for v in value.values())
    return bool(value == "auto")


def complete(options: EngineOptions, *, train: bool) -> dict[str, Any]:
    """The configuration that an engine gets. Accumulation stays 1: the trainer sets the boundary itself.

    Frozen engines exist at stages 0 and 3 only; at 1 and 2 there is nothing of theirs to partition. In half precision a
    trained engine of stage 0 is one of stage 1: at 0 DeepSpeed has no float32 accumulation, and sums would depend on
    the cut into micro-batches.
    """
    settings = {key: value for key, value in options.ds_config.items() if key not in OURS}
    zero = dict(settings.get("zero_optimization", {"stage": 0}))
    if not train:
        zero.pop("offload_optimizer", None)
        zero = zero if zero.get("stage") == 3 else {"stage": 0}
    elif zero.get("stage", 0) == 0 and options.dtype is not torch.float32:
        zero["stage"] = 1
    if get_accelerator().device_name() == "cpu":
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:
                zero[part] = {**zero[part], "pin_memory": False}  # pinned memory is a CUDA notion
    settings |= {
        "zero_optimization": zero,
        "train_batch_size": options.batch_size * options.world_size,
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if _plain(options, zero) else options.max_grad_norm or NO_CLIPPING,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if options.dtype is torch.bfloat16:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif options.dtype is torch.float16:
        settings |= {"fp16": {"enabled": True, "initial_scale_power": 16}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def trained(module: nn.Module, options: EngineOptions) -> Any:
    """A DeepSpeed engine that trains the parameters of `module` that require a gradient. Collective."""
    settings = complete(options, train=True)
    if stage(settings) != stage(options.ds_config):
        logger.warning(
            "deepspeed: stage 1 instead of 0, which cannot add gradients up in float32 for %s", options.dtype
        )
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module, options, settings), config=settings)
    if options.world_size == 1 and isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.enable_backward_allreduce = False  # copies every gradient into buckets and back, for nobody
        if options.optimizer == "adamw":
            keep_sparse(getattr(module, "lookups", ()))
            engine.row_adam = RowAdam(engine.optimizer)
    return engine


def frozen(module: nn.Module, options: EngineOptions) -> Any:
    """A DeepSpeed engine that only runs forward, with sharded parameters at stage 3. Collective."""
    engine, *_ = deepspeed.initialize(model=module, config=complete(options, train=False))
    engine.module.eval()
    return engine


def _optimizer(module: nn.Module, options: EngineOptions, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW or SGD; no weight decay on biases and norms (parameters of one dimension), as transformers does."""
    named = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate)
    on_cpu = get_accelerator().device_name() == "cpu"
    if "offload_optimizer" in settings["zero_optimization"] and not on_cpu:
        fused: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=options.learning_rate, betas=options.betas, eps=options.epsilon, adamw_mode=True
        )
        return fused
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.epsilon, fused=True)


def set_learning_rate(engine: Any, rate: float) -> None:
    """The learning rate of the engine's next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def step(engine: Any, max_grad_norm: float) -> float:
    """The optimizer step of the gradients accumulated so far; returns their global norm before clipping. Collective.

    At stage 0 in float32 DeepSpeed would step on a NaN and poison every weight, and keeps the norm to itself: there the
    norm is taken and clipped here, and a NaN is not stepped. Elsewhere DeepSpeed skips such a step by itself.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        norm = _clip(engine.module, max_grad_norm or math.inf)
        if math.isfinite(norm):
            if hasattr(engine, "row_adam"):
                engine.row_adam.step()
            engine.step()
        return norm
    engine.step()
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


@torch.no_grad()
def _clip(module: nn.Module, most: float) -> float:
    """The global norm of the gradients, which are then scaled to a norm of `most` where theirs is larger."""
    gradients = [numbers(p) for p in module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    scale = most / (norm + 1e-6)
    if scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


@contextmanager
def whole(engine: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are whole on every rank, whatever the stage. Collective."""
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        yield


@contextmanager
def generating(engine: Any) -> Iterator[nn.Module]:
    """Inside, the engine's module runs forward passes without any collective: at stage 3 its parameters are gathered
    once for all of them, so ranks may run different numbers of passes. Collective to enter and to leave.

    GatheredParameters alone is not enough: ZeRO-3's hooks would partition each module again after its first forward.
    """
    training = engine.module.training
    engine.module.eval()
    try:
        if engine.zero_optimization_stage() != 3:
            yield engine.module
            return
        offload = _parameter_offload(engine)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            offload._remove_module_hooks()
            try:
                yield engine.module
            finally:
                offload.forward_hooks.clear()
                offload.backward_hooks.clear()
                offload.setup_zero_stage3_hooks()
    finally:
        engine.module.train(training)


def _parameter_offload(engine: Any) -> Any:
    """The object that owns the hooks: the engine's optimizer is one itself where nothing is trained."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


class TouchGuard:
    """Checks that the first backward of a run reaches every trained parameter.

    Under ZeRO-3 and ZeRO-2 offload a parameter that a backward misses is stepped with the gradient of the step before,
    without a word (deepspeed 0.19.8), so a run with such a parameter is refused.
    """

    def __init__(self, engine: Any) -> None:
        settings = engine.config["zero_optimization"]
        exposed = settings["stage"] == 3 or "offload_optimizer" in settings
        named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad] if exposed else []
        self._missed = {name for name, _ in named}
        self._hooks = [p.register_hook(lambda grad, name=name: self._missed.discard(name)) for name, p in named]

    def close(self) -> None:
        """After the first backward: raise ValueError naming the parameters it did not reach."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._missed:
            some = ", ".join(sorted(self._missed)[:5])
            raise ValueError(
                f"{len(self._missed)} trained parameters get no gradient from the loss ({some}, ...): under this ZeRO "
                "configuration they would be stepped with stale gradients. Use --deepspeed zero1, or train an adapter"
            )
