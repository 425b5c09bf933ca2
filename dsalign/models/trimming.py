"""On a CPU: freed memory goes back to the system before a backward and while the gradients are made."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor, nn

from dsalign.models.layers import layers_of

# In a backward, of the layers that are still to come: gradients grow as activations go, so the last stand closest. More
# would save little, and every page that is given back is zeroed again in the next step.
LEFT = (2 / 15, 1 / 3, 3 / 5)


def trim_in_backward(decoder: nn.Module) -> None:
    """Freed memory goes back at the end of a forward with gradient, and in its backward where LEFT of the layers are to
    come.

    glibc keeps activations of a few MiB on its heap when they are freed, between gradients that stay, and gives them
    back only from the heap's end: without this a process holds both at once, and the gradients of the step before
    beside the head's. Nothing happens under another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    layers = layers_of(decoder)
    if trim is None or not layers:
        return

    def give_back(_: Tensor) -> None:
        trim(0)

    def at_the_end(module: nn.Module, args: Any, output: Any) -> None:
        if _states(output).requires_grad:
            trim(0)

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        states = _states(output)
        if states.requires_grad:
            states.register_hook(give_back)  # type: ignore[no-untyped-call]

    decoder.register_forward_hook(at_the_end)
    for i in sorted({int(len(layers) * share) for share in LEFT}):
        layers[i].register_forward_hook(watch)


def _states(output: Any) -> Tensor:
    """What a layer or a decoder gives on: alone, or before caches and the like."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
