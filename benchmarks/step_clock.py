"""Runs a script and writes down what its optimizer steps cost, the same way for whatever trains:

    python benchmarks/step_clock.py OUT.json SCRIPT.py [ARGUMENTS]

A step ends when the optimizer of torch returns. From one end to the next lies everything that a step takes: rows,
collating, the reference, forward, backward, clipping, the update, logging. So a cost of a step is the difference of two
entries of `steps`, and start-up and the first step are what comes before the first entry. An entry holds cpu_s (all
threads of this process, user and system, since it began), wall_s (of a clock with any zero), peak_bytes (the largest
resident set so far) and device_peak_bytes (the most that torch has allocated on the GPU so far; 0 where none is used).
A step ends when the GPU has done it. `end` is one more, when the script is through.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def peak_bytes() -> int:
    """The largest resident set of this process; getrusage would begin with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def now() -> dict[str, float]:
    """cpu_s, wall_s, peak_bytes, device_peak_bytes at this moment."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter(),
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def main() -> None:
    out, script, *arguments = sys.argv[1:]
    steps: list[dict[str, float]] = []

    def stamp(*_: Any) -> None:
        steps.append(now())

    hook = register_optimizer_step_post_hook(stamp)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        hook.remove()
        Path(out).write_text(json.dumps({"steps": steps, "end": now()}))


if __name__ == "__main__":
    main()
