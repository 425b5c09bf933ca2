"""On a CPU: what is cheap to make is made again in a backward instead of being kept for it.

A norm, an activation and the product of a gated MLP keep their inputs alone. What the linear layers behind them would
keep, their outputs, is made from that again, once for all of them. Of a Llama layer's 6 D + 4 I numbers a token beside
those of its attention 2 D + 2 I stay. The idea is selective recomputation (Korthikanti et al., arXiv:2205.05198,
section 5), here of what costs a pass over memory instead of a product.
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

NORMS = ("LayerNorm", "RMSNorm")  # how the names of such classes end
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")  # the parts of a gated MLP, as Llama and its kin call them


class _Again(torch.autograd.Function):
    """compute(*inputs), made again in the backward. What follows the inputs are parameters that compute reads."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.compute, ctx.num_inputs, ctx.made = compute, num_inputs, None
        ctx.save_for_backward(*tensors)
        return compute(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, output = _made(ctx)
        leaves = [*inputs, *ctx.saved_tensors[ctx.num_inputs :]]
        found = iter(torch.autograd.grad(output, [x for x in leaves if x.requires_grad], gradient))
        ctx.made = None
        return None, None, *(next(found) if x.requires_grad else None for x in leaves)


def _made(node: Any) -> tuple[list[Tensor], Tensor]:
    """The inputs of a node and its output, with the graph between; made once a backward."""
    if node.made is None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in node.saved_tensors[: node.num_inputs]]
            node.made = inputs, node.compute(*inputs)
    found: tuple[list[Tensor], Tensor] = node.made
    return found


def again(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...] = ()) -> Tensor:
    """compute(*inputs), of which a graph keeps the inputs alone. parameters: what compute reads beside them."""
    tensors = (*inputs, *parameters)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return compute(*inputs)
    found: Tensor = _Again.apply(compute, len(inputs), *tensors)  # type: ignore[no-untyped-call]
    return found


def recompute_cheap(decoder: nn.Module) -> None:
    """Let the norms, activations and gated MLPs of a decoder keep less, and its linear layers nothing that those made.

    Values stay the same to the last bit, gradients but for the order in which float32 adds those of a norm's input.
    Under ZeRO-3 norms are as ever: their weights are in memory only while they run.
    """
    checked = dict[type, bool]()
    for module in decoder.modules():
        kind = type(module)
        if "forward" in vars(module) or getattr(module, "inplace", False):
            continue  # somebody else's way to compute it, or an input that is gone
        if isinstance(module, (nn.Linear, Conv1D)):
            vars(module)["forward"] = MethodType(_linear, module)
        elif not list(module.children()) and (kind.__name__.endswith(NORMS) or kind.__module__ in ACTIVATIONS):
            vars(module)["forward"] = MethodType(_cheap, module)
        elif all(hasattr(module, part) for part in GATED):
            if kind not in checked:
                checked[kind] = _is_gated(module)
            if checked[kind]:
                vars(module)["forward"] = MethodType(_gated, module)


def _cheap(self: nn.Module, *args: Any, **more: Any) -> Any:
    """The forward of a norm or an activation."""
    plain, parameters = partial(type(self).forward, self), tuple(self.parameters(recurse=False))
    if more or len(args) != 1 or any(hasattr(x, "ds_id") for x in parameters):
        return plain(*args, **more)
    return again(plain, args, parameters)


def _gated(self: Any, x: Tensor) -> Tensor:
    """The forward of a gated MLP."""
    found: Tensor = self.down_proj(again(partial(_product, self.act_fn), (self.gate_proj(x), self.up_proj(x))))
    return found


def _product(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    found: Tensor = type(act).forward(act, gate) * up  # as `_cheap` it would be made a third time
    return found


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether a module with those parts computes what `_gated` does."""
    weight = next(module.gate_proj.parameters())
    trains, width = module.training, getattr(module.gate_proj, "in_features", None)
    if width is None or weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return False
    x = torch.linspace(-1, 1, 2 * width, dtype=weight.dtype).view(1, 2, width)
    module.eval()
    same = torch.equal(module(x), _gated(module, x))
    module.train(trains)
    return same


def _linear(self: nn.Module, x: Tensor) -> Tensor:
    """The forward of a linear layer, that keeps no input which is made again anyway."""
    plain, node = partial(type(self).forward, self), x.grad_fn
    if not isinstance(node, _Again._backward_cls):
        return cast(Tensor, plain(x))

    def pack(kept: Tensor, start: int = x.data_ptr(), size: int = x.numel()) -> Tensor | torch.Size:
        return kept.shape if (kept.data_ptr(), kept.numel(), kept.is_contiguous()) == (start, size, True) else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else _made(node)[1].detach().view(kept)

    with saved_tensors_hooks(pack, unpack):
        found: Tensor = plain(x)
    return found
