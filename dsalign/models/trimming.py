"""On a CPU: the memory of activations goes back to the system while the gradients are made."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor, nn

TIMES = 3  # in a backward: more save little, and every page that is given back is zeroed again in the next step


def trim_in_backward(decoder: nn.Module) -> None:
    """After each quarter of the layers but the last, a backward gives freed memory back.

    glibc keeps activations of a few MiB on its heap when they are freed, between gradients that stay, and gives them
    back only from the heap's end: without this a process holds both at once. Nothing happens under another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if trim is None or not lists:
        return

    def give_back(_: Tensor) -> None:
        trim(0)

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor) and states.requires_grad:
            states.register_hook(give_back)  # type: ignore[no-untyped-call]

    layers = max(lists, key=len)
    for i in sorted({len(layers) * part // (TIMES + 1) for part in range(1, TIMES + 1)}):
        layers[i].register_forward_hook(watch)
