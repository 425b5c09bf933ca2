"""What a rollout does on a CPU and on a GPU: the size of its passes, graphs of a step, and the memory of its slots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from dsalign.rollout.graphs import Capture, capture_cuda

SHARE = 0.75  # of the free memory, for keys and values; the rest is for prompts' forwards, logits and graphs
LARGE = 2**30  # bytes of slots that are given back to the device, not only to PyTorch, before training goes on
GIB = 2**30
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """How the engine `local` uses a device.

    prefill_tokens: prompt tokens in one forward pass. read_every: decoding steps between two looks at which rows have
    ended, each of which waits for the device. capture: records a step as a graph; None = each is computed as it is, in
    the very rows that run. free: bytes of memory that are free; None = nobody asks, and slots grow as they are needed.
    give_back: returns freed memory to the device, whatever it costs.
    """

    prefill_tokens: int = 1024
    read_every: int = 1
    capture: Capture | None = None
    free: Callable[[], int] | None = None
    give_back: Callable[[], None] | None = None

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The way of a device. A GPU counts its memory, so all slots are made at once and stay where they are."""
        if device.type != "cuda":
            return Machine()
        return Machine(16384, 8, capture_cuda, free_on_cuda, torch.cuda.empty_cache)


def free_on_cuda() -> int:
    """Bytes that the current GPU could still give to this process: free ones, and those that PyTorch holds unused."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def rows_that_fit(asked: int, row_bytes: int, free: int, longest: int) -> int:
    """The number of rows, `asked` or fewer: as many as SHARE of the free bytes holds.

    row_bytes: keys and values of the longest row, of `longest` tokens. free: bytes.
    Raises ValueError where not even one row fits.
    """
    rows = min(asked, int(SHARE * free) // row_bytes)
    if 0 < rows < asked:
        warn_once("rollout: fewer completions run at a time than were asked for, as free memory holds no more")
    if rows < 1:
        raise ValueError(
            f"rollout: expected room for one completion, whose {longest} tokens with its prompt take "
            f"{row_bytes / GIB:.2f} GiB of keys and values, got {SHARE:.0%} of {free / GIB:.2f} GiB of free memory; "
            "lower max_new_tokens or the length of prompts, or offload the optimizer"
        )
    return rows


@cache
def warn_once(text: str) -> None:
    """Log a warning, once in a process however often it holds."""
    logger.warning("%s", text)
