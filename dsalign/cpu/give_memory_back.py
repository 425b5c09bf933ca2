"""On a CPU: freed memory goes back to the system before a backward and while the gradients are made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# In a backward, of the layers that are still to come: gradients grow as activations go, so the last stand closest. More
# would save little, and every page that is given back is zeroed again in the next step.
LEFT = (2 / 15, 1 / 3, 3 / 5)


def trim_in_backward(decoder: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Freed memory goes back at the end of a forward with gradient, in its backward where LEFT of the layers are to
    come, and within a forward that would need more than the backward before it.

    glibc keeps activations of a few MiB on its heap when they are freed, between gradients that stay, and gives them
    back only from the heap's end: without this a process holds both at once, and the gradients of the step before
    beside the head's. Nothing happens under another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not layers:
        return
    most: int | None = None  # bytes resident in a backward, once there was one

    def give_back(_: Tensor) -> None:
        nonlocal most
        most = max(most or 0, _resident())
        trim(0)

    def at_the_end(module: nn.Module, args: Any, output: Any) -> None:
        if _states(output).requires_grad:
            trim(0)

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        states = _states(output)
        if states.requires_grad:
            states.register_hook(give_back)  # type: ignore[no-untyped-call]

    def no_more(module: nn.Module, args: Any, output: Any) -> None:
        if most is not None and _states(output).requires_grad and _resident() > most:
            trim(0)

    decoder.register_forward_hook(at_the_end)
    for layer in layers:
        layer.register_forward_hook(no_more)
    for i in sorted({int(len(layers) * share) for share in LEFT}):
        layers[i].register_forward_hook(watch)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


def _states(output: Any) -> Tensor:
    """What a layer or a decoder gives on: alone, or before caches and the like."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
