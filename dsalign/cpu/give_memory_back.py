"""Freed memory goes back to the system before a backward and while it fills the gradients.

Why it does not by itself: glibc keeps freed blocks of a few MiB, such as activations, on its heap, and returns them
only from the heap's end. A backward frees activations and allocates gradients that stay, so without this a process
holds both at once, and in the next forward the gradients of the step before beside those of the head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# The shares of the layers whose backward is still to come when memory is given back: of layers 0 to 29 before that of
# 18, 10 and 4. Closer towards the end, as gradients take the place of activations. Three times and not more, as every
# page that is given back is zeroed by the system once more in the next step.
LEFT = (2 / 15, 1 / 3, 3 / 5)


def trim_in_backward(decoder: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Give freed memory back (malloc_trim) at three moments of each step: when the decoder's forward ends, before the
    head makes its gradient; in the backward, where LEFT of the layers are to come; and in a forward, behind each layer
    at which the process holds more than it did in any backward before, so that forwards are not the peak.

    layers: of the decoder, first to last. Forwards without gradient are left alone, and so is a process whose allocator
    is not glibc's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not layers:
        return
    most: int | None = None  # bytes resident in any backward so far

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
    """Bytes of this process that are in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


def _states(output: Any) -> Tensor:
    """The hidden states that a layer or a decoder returns: its output, or the first part of that."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states
