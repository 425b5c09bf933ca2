"""DeepSpeed engines from a file of ds_configs and the flags; config/ds_keys.py refuses in the file what has a flag."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from torch import Tensor, nn

from dsalign import cpu
from dsalign.config import ds_files
from dsalign.config.schema import OptimOptions
from dsalign.engines import dist

logger = logging.getLogger(__name__)
NO_CLIPPING = 1e30  # a limit no norm reaches: with 0 the engine would not compute the norm that tells a NaN


def complete(options: OptimOptions, dtype: torch.dtype, *, train: bool) -> dict[str, Any]:
    """The whole DeepSpeed configuration of an engine. dtype: of the weights in compute. train: whether it is stepped.

    Accumulation stays 1: the trainer marks the last micro-batch of a step itself.

    Frozen engines exist at stages 0 and 3 only; at 1 and 2 there is nothing of theirs to partition. In half precision a
    trained engine of stage 0 is one of stage 1: at 0 DeepSpeed has no float32 accumulation, and sums would depend on
    the cut into micro-batches.
    """
    settings = ds_files.read(options.deepspeed)
    zero = dict(settings.get("zero_optimization", {"stage": 0}))
    if not train:
        zero.pop("offload_optimizer", None)
        zero = zero if zero.get("stage") == 3 else {"stage": 0}
    elif zero.get("stage", 0) == 0 and dtype is not torch.float32:
        logger.warning("deepspeed: stage 1 instead of 0, which cannot add gradients up in float32 for %s", dtype)
        zero["stage"] = 1
    clips_itself = zero.get("stage", 0) == 0 and dtype is torch.float32  # torch's optimizer as it is: see `take_step`
    if get_accelerator().device_name() == "cpu":
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:
                zero[part] = {**zero[part], "pin_memory": False}  # pinned memory is a CUDA notion
    settings |= {
        "zero_optimization": zero,
        "train_batch_size": options.batch_size * dist.world_size(),
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself else options.max_grad_norm or NO_CLIPPING,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if dtype is torch.bfloat16:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif dtype is torch.float16:
        settings |= {"fp16": {"enabled": True, "initial_scale_power": 16}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def layout(options: OptimOptions, dtype: torch.dtype) -> dict[str, Any]:
    """What decides, beside the number of ranks, how DeepSpeed lays out a trained engine's weights and moments in files,
    JSON-able: dtype, and the whole section zero_optimization."""
    return {"dtype": str(dtype), "zero": complete(options, dtype, train=True)["zero_optimization"]}


def trained(module: nn.Module, options: OptimOptions, dtype: torch.dtype) -> Any:
    """A DeepSpeed engine that trains those parameters of `module` that require a gradient. dtype: of the weights in
    compute. Collective."""
    settings = complete(options, dtype, train=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module, options, settings), config=settings)
    if dist.world_size() == 1 and isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.enable_backward_allreduce = False  # copies every gradient into buckets and back, for nobody
    return engine


def frozen(module: nn.Module, options: OptimOptions, dtype: torch.dtype) -> Any:
    """A DeepSpeed engine for forward passes alone, in evaluation mode; weights are sharded at stage 3. Collective."""
    engine, *_ = deepspeed.initialize(model=module, config=complete(options, dtype, train=False))
    engine.module.eval()
    return engine


def _optimizer(module: nn.Module, options: OptimOptions, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW or SGD; no weight decay on biases and norms (parameters of one dimension), as transformers does."""
    named = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate)
    how: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    on_cpu = get_accelerator().device_name() == "cpu"
    if "offload_optimizer" in settings["zero_optimization"] and not on_cpu:
        fused: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **how)
        return fused
    if on_cpu and dist.world_size() == 1 and settings["gradient_clipping"] == 0:  # nothing of DeepSpeed stands between
        return cpu.optimizer(module, groups, **how)
    return torch.optim.AdamW(groups, fused=True, **how)


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the engine's next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def take_steps(engines: Sequence[Any], max_grad_norm: float) -> list[float]:
    """Take the optimizer step of every engine for the gradients accumulated so far, or of none: where the gradient norm
    of one is not finite, the gradients of all are dropped. Returns the norms as `take_step` does. Collective.

    In float16 each engine decides alone, as a norm that is not finite there says that its loss scale is too high.
    """
    if len(engines) == 1 or any(engine.fp16_enabled() for engine in engines):
        return [take_step(engine, max_grad_norm) for engine in engines]
    norms = [_norm_ahead(engine) for engine in engines]
    if not all(map(usable, norms)):
        for engine in engines:
            drop_gradients(engine)
        return norms
    for engine, norm in zip(engines, norms, strict=True):
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            _clip(engine.module, norm, max_grad_norm)
        engine.step()
        _forget_norm(engine)
    return norms


def take_step(engine: Any, max_grad_norm: float) -> float:
    """Take the optimizer step for the gradients accumulated so far; returns their global norm before clipping, NaN
    where DeepSpeed has none. Where the norm is not `usable`, weights and optimizer state stay as they are and the
    gradients are dropped. max_grad_norm: 0 = no clipping. Collective.

    At stage 0 in float32 DeepSpeed would step on a NaN, spoil every weight and keep the norm to itself: there the norm
    is computed and clipped here. Elsewhere DeepSpeed does all of it itself.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        norm = _norm_ahead(engine)
        if not usable(norm):
            engine.zero_grad()
            return norm
        _clip(engine.module, norm, max_grad_norm)
        engine.step()
        return norm
    engine.step()
    found = engine.get_global_grad_norm()
    return math.nan if found is None else float(found)


def usable(norm: float) -> bool:
    """Whether a step was taken for a gradient of this norm; DeepSpeed also writes -1 for one that is not finite."""
    return math.isfinite(norm) and norm >= 0


def drop_gradients(engine: Any) -> None:
    """Drop the gradients accumulated so far; weights and optimizer state stay as they are. Collective.

    ZeRO keeps gradients in buffers of its own, which its step over a norm that is not finite is the one way to empty.
    In float16 the loss scale falls with it.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.zero_grad()
        return
    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.optimizer.zero_grad()
        return
    _hold_norm(engine, torch.tensor(math.inf, device=engine.device))
    engine.step()
    _forget_norm(engine)


@torch.no_grad()
def _norm_ahead(engine: Any) -> float:
    """The global norm of an engine's gradients before its step, which of ZeRO then uses it and computes none."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        gradients = [cpu.gradient_values(p) for p in engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))
    if isinstance(optimizer, BF16_Optimizer):
        return float(get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=optimizer.mpu))
    if engine.zero_optimization_stage() == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    else:
        optimizer._wait_for_offload_copies()
        norm = optimizer.scaled_global_norm()
    _hold_norm(engine, norm)
    return float(norm)


def _hold_norm(engine: Any, norm: Tensor) -> None:
    """Let the next step of a ZeRO optimizer find this norm in place of the one that it would compute."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._get_norm_groups = lambda: [norm]
    else:
        engine.optimizer.scaled_global_norm = lambda norm_type=2: norm


def _forget_norm(engine: Any) -> None:
    """Undo `_hold_norm`."""
    for name in ("_get_norm_groups", "scaled_global_norm"):
        vars(engine.optimizer).pop(name, None)


@torch.no_grad()
def _clip(module: nn.Module, norm: float, most: float) -> None:
    """Scale the module's gradients, whose global norm is `norm`, so that it is at most `most`; 0 = no limit."""
    scale = (most or math.inf) / (norm + 1e-6)
    if scale < 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                cpu.gradient_values(parameter).mul_(scale)


@contextmanager
def whole(engine: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context in which the given parameters of an engine are whole on every rank, at stage 3 too. Collective."""
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        yield


def version(engine: Any) -> int:
    """The version of an engine's weights: how many optimizer steps they have taken, also before a resume."""
    return int(engine.global_steps)


class TouchGuard:
    """A check that the first backward pass of a run reaches every trained parameter of an engine.

    At ZeRO stage 3, and with an offloaded optimizer, DeepSpeed 0.19.8 silently steps a parameter that a backward pass
    misses with its gradient of the step before, so a run with such a parameter is refused. Others are not checked.
    """

    def __init__(self, engine: Any) -> None:
        settings = engine.config["zero_optimization"]
        exposed = settings["stage"] == 3 or "offload_optimizer" in settings
        named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad] if exposed else []
        self._missed = {name for name, _ in named}
        self._hooks = [p.register_hook(lambda grad, name=name: self._missed.discard(name)) for name, p in named]

    def close(self) -> None:
        """End the check, after the first backward pass. Raises ValueError naming parameters that it did not reach."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._missed:
            some = ", ".join(sorted(self._missed)[:5])
            raise ValueError(
                f"{len(self._missed)} trained parameters get no gradient from the loss ({some}, ...): under this ZeRO "
                "configuration they would be stepped with stale gradients. Use --deepspeed zero1, or train an adapter"
            )
