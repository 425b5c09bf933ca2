"""Cheap activations are computed again in a backward instead of being kept for it.

Cheap are a norm, an activation and the product of a gated MLP: a pass over memory each, and no matrix product. Of these
the graph keeps the inputs alone. A linear layer after one of them would keep its input, which is the cheap output; that
is computed again, once for all linear layers that share it. Of the 6 D + 4 I numbers a token that a Llama layer keeps
beside its attention's (D hidden size, I intermediate size), 2 D + 2 I are left. This is selective recomputation
(Korthikanti et al., arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

NORMS = ("LayerNorm", "RMSNorm")  # how the class names of norms end
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")  # the parts of a gated MLP, as Llama and its kin call them


class _Again(torch.autograd.Function):
    """compute(*inputs), of which the graph keeps the inputs; the output is computed again in the backward.

    tensors: the inputs, then parameters that `compute` reads by itself and that need a gradient too.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.compute, ctx.num_inputs, ctx.made = compute, num_inputs, None
        ctx.save_for_backward(*tensors)
        return compute(*tensors[:num_inputs])

    @staticmethod
    def output(ctx: Any) -> Tensor:
        """The output of forward with a graph of its own; computed once in a backward, however often it is asked for."""
        if ctx.made is None:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors[: ctx.num_inputs]]
                ctx.made = inputs, ctx.compute(*inputs)
        return cast(Tensor, ctx.made[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output = _Again.output(ctx)
        leaves = [*ctx.made[0], *ctx.saved_tensors[ctx.num_inputs :]]
        found = iter(torch.autograd.grad(output, [x for x in leaves if x.requires_grad], gradient))
        ctx.made = None
        return None, None, *(next(found) if x.requires_grad else None for x in leaves)


class _RMSNorm(torch.autograd.Function):
    """weight x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467, eq. 4), in float32.

    The forward has the operations of transformers in their order, so its bits are the same. The graph keeps x and one
    number a row, and the backward is written out, in half as many passes over memory as autograd's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.normed = ctx.made = None
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale)

    @staticmethod
    def unit(ctx: Any) -> Tensor:
        """x / sqrt(mean(x^2) + eps), computed once in a backward."""
        if ctx.normed is None:
            x, _, scale = ctx.saved_tensors
            ctx.normed = x * scale
        return cast(Tensor, ctx.normed)

    @staticmethod
    def output(ctx: Any) -> Tensor:
        """The output of forward, computed once in a backward."""
        if ctx.made is None:
            ctx.made = ctx.saved_tensors[1] * _RMSNorm.unit(ctx)
        return cast(Tensor, ctx.made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """With u = unit(x) and g = gradient weight: (g - u mean(g u)) / sqrt(mean(x^2) + eps), and gradient u."""
        _, weight, scale = ctx.saved_tensors
        unit, of_unit = _RMSNorm.unit(ctx), gradient * weight
        along = (of_unit * unit).mean(-1, keepdim=True)
        of_x = of_unit.addcmul_(unit, along, value=-1).mul_(scale)
        of_weight = (gradient * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        ctx.normed = ctx.made = None
        return of_x, of_weight, None


def again(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...] = ()) -> Tensor:
    """compute(*inputs); where a gradient is wanted, the graph keeps the inputs and computes the output again in the
    backward. parameters: those that `compute` reads beside its inputs."""
    tensors = (*inputs, *parameters)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return compute(*inputs)
    found: Tensor = _Again.apply(compute, len(inputs), *tensors)  # type: ignore[no-untyped-call]
    return found


def recompute_cheap(decoder: nn.Module) -> None:
    """Let the norms, activations and gated MLPs of a decoder keep their inputs alone, and its linear layers no input
    that one of those computes again.

    Outputs stay the same to the last bit, and gradients too except in float32, where RMSNorm's own backward rounds
    otherwise. Under ZeRO-3 norms stay as they are, since their weights are in memory only while they run; so does a
    module whose forward is not its class's, and one that changes its input in place.
    """
    checked = dict[type, bool]()
    for module in decoder.modules():
        kind = type(module)
        if "forward" in vars(module) or getattr(module, "inplace", False):
            continue  # something else has replaced the forward, or the input is overwritten
        if isinstance(module, (nn.Linear, Conv1D)):
            vars(module)["forward"] = MethodType(_linear, module)
        elif kind.__name__.endswith("RMSNorm") and (offset := _offset(module)) is not None:
            vars(module)["forward"] = MethodType(partial(_rms_norm, offset=offset), module)
        elif not list(module.children()) and (kind.__name__.endswith(NORMS) or kind.__module__ in ACTIVATIONS):
            vars(module)["forward"] = MethodType(_cheap, module)
        elif all(hasattr(module, part) for part in GATED):
            if kind not in checked:
                checked[kind] = _is_gated(module)
            if checked[kind]:
                vars(module)["forward"] = MethodType(_gated, module)


def _cheap(self: nn.Module, *args: Any, **more: Any) -> Any:
    """The forward of a norm or an activation of any formula; the module's own where it takes more than one input."""
    plain, parameters = partial(type(self).forward, self), tuple(self.parameters(recurse=False))
    if more or len(args) != 1 or any(hasattr(x, "ds_id") for x in parameters):
        return plain(*args, **more)
    return again(plain, args, parameters)


def _rms_norm(self: Any, x: Tensor, *, offset: float) -> Tensor:
    """The forward of an RMSNorm that multiplies by offset + weight, `_RMSNorm` where all is float32."""
    if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or hasattr(self.weight, "ds_id"):
        found: Tensor = _cheap(self, x)
        return found
    if not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
        return cast(Tensor, type(self).forward(self, x))
    factor = offset + self.weight if offset else self.weight
    return cast(Tensor, _RMSNorm.apply(x, factor, _eps(self)))  # type: ignore[no-untyped-call]


def _eps(norm: Any) -> float | None:
    found: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found


@torch.no_grad()
def _offset(norm: Any) -> float | None:
    """The constant that an RMSNorm adds to its weight, 0 as in Llama or 1 as in Gemma, found by trying both on one
    input; None where its output is another one."""
    weight, eps = getattr(norm, "weight", None), _eps(norm)
    if weight is None or eps is None or weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return None
    x = torch.linspace(-1, 2, 2 * weight.numel()).view(2, -1)
    plain, of_ones = type(norm).forward(norm, x), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return next((offset for offset in (0.0, 1.0) if torch.equal(plain, (offset + weight) * of_ones)), None)


def _gated(self: Any, x: Tensor) -> Tensor:
    """The forward of a gated MLP, down(act(gate(x)) up(x)), whose product is computed again in a backward."""
    found: Tensor = self.down_proj(again(partial(_product, self.act_fn), (self.gate_proj(x), self.up_proj(x))))
    return found


def _product(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    found: Tensor = type(act).forward(act, gate) * up  # by `_cheap` the activation would be computed a third time
    return found


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a module with the GATED parts has the formula of `_gated`, found by comparing both on one input."""
    weight = next(module.gate_proj.parameters(), None)  # one in 4 bits has none
    trains, width = module.training, getattr(module.gate_proj, "in_features", None)
    if weight is None or width is None or weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return False
    x = torch.linspace(-1, 1, 2 * width, dtype=weight.dtype).view(1, 2, width)
    module.eval()
    same = torch.equal(module(x), _gated(module, x))
    module.train(trains)
    return same


def _linear(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a linear layer, which keeps no input that is computed again in the backward anyway."""
    plain, node = partial(type(self).forward, self), x.grad_fn
    made_by = getattr(node, "_forward_cls", None)
    if made_by not in (_Again, _RMSNorm):
        return cast(Tensor, plain(x))

    def pack(kept: Tensor, start: int = x.data_ptr(), size: int = x.numel()) -> Tensor | torch.Size:
        return kept.shape if (kept.data_ptr(), kept.numel(), kept.is_contiguous()) == (start, size, True) else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else made_by.output(node).detach().view(kept)

    with saved_tensors_hooks(pack, unpack):
        found: Tensor = plain(x)
    return found
