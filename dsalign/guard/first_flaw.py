"""Where a number that is not finite first comes up: in which module, of which row, at which position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Flaw:
    """A number that is not finite. where: the name of the module whose output it is, or of a tensor. row: of the batch
    of that tensor. position: in the row, None where the tensor has no positions. value: nan, inf or -inf."""

    where: str
    row: int
    position: int | None
    value: float


def flaw_in(where: str, numbers: Tensor) -> Flaw | None:
    """The first number of a tensor [rows, positions, ...] that is not finite, the earliest position of all rows first;
    None where all are finite."""
    numbers = numbers.detach()
    bad = ~torch.isfinite(numbers)
    if not bool(bad.any()):
        return None
    if numbers.dim() < 2:
        at = int(bad.flatten().nonzero()[0])
        return Flaw(where, at, None, float(numbers.flatten()[at]))
    inside = bad.flatten(2).any(2) if numbers.dim() > 2 else bad
    position = int(inside.any(0).nonzero()[0])
    row = int(inside[:, position].nonzero()[0])
    found = numbers[row, position].flatten()
    return Flaw(where, row, position, float(found[~torch.isfinite(found)][0]))


class Watch:
    """What `watching` sees: `forward`, the first flaw of a forward pass, and `backward`, that of a backward pass."""

    forward: Flaw | None = None
    backward: Flaw | None = None


@contextmanager
def watching(module: nn.Module) -> Iterator[Watch]:
    """A context that watches the outputs of every part of a module, [rows, positions, ...], and the gradients that come
    to them. The innermost part ends first, so it is the one that is named."""
    watch = Watch()

    def after(name: str) -> Any:
        def seen(part: nn.Module, args: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if watch.forward is None:
                    watch.forward = flaw_in(name, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(back(name))  # type: ignore[no-untyped-call]

        return seen

    def back(name: str) -> Any:
        def seen(gradient: Tensor) -> None:
            if watch.backward is None:
                watch.backward = flaw_in(name, gradient)

        return seen

    hooks = [part.register_forward_hook(after(name or "the model")) for name, part in module.named_modules()]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
