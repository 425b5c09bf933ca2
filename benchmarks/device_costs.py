"""What a piece of work costs on a CPU or on a GPU: its clocks, and the growth of memory to its peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import step_clock
import torch

Found = TypeVar("Found")
COPIED_BYTES = 2**30  # of the copy that measures a GPU's bandwidth: far more than a cache holds
COPIED_BYTES_CPU = 2**26


def wait(device: torch.device) -> None:
    """Wait until the device has done all that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_s(device: torch.device) -> float:
    """Seconds of the clock that work is compared by: that of the process on a CPU, which other programs change less
    than the time on the wall, and that of the wall on a GPU."""
    wait(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def measured(work: Callable[[], Found], device: torch.device) -> tuple[Found, dict[str, float]]:
    """What some work returns, and its cpu_s, wall_s and peak_gib.

    peak_gib: the most memory beyond what there was before: what torch allocates on a GPU, the resident set on a CPU.
    """
    before = _memory_from_here(device)
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    wait(device)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else step_clock.peak_bytes()
    return found, {"cpu_s": cpu_s, "wall_s": wall_s, "peak_gib": (peak - before) / 2**30}


def _memory_from_here(device: torch.device) -> int:
    """The bytes that are held now; the peak is counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return step_clock.peak_bytes()


def bytes_a_second(device: torch.device, repeats: int = 5) -> float:
    """The bandwidth of the device's memory, bytes read and written a second of a copy, the best of the repeats."""
    size = COPIED_BYTES if device.type == "cuda" else COPIED_BYTES_CPU
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(repeats + 1):  # the first one warms up
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        taken.append(time.perf_counter() - start)
    return 2 * size / min(taken[1:])
