"""Times block sizes of the row kernels on this GPU, and prints its line of `BLOCKS` in row_kernels.py.

A run never tunes: ranks that pick different winners diverge. python kernels/tune.py --vocabulary 128256
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import row_kernels  # noqa: E402

PLAIN: dict[str, Any] = {"scale": 1.0, "softcap": None, "temperature": 1.0, "ignore_index": -100}
CANDIDATES = [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]
LANES = (2, 32)  # columns of a thread: fewer idle, more spill


def measure(kind: str, logits: torch.Tensor, targets: torch.Tensor, repeats: int) -> dict[str, float]:
    """block/warps -> p50 in ms of one kernel over all rows."""
    lses = torch.zeros(len(logits), device=logits.device)
    runs = {
        "read": partial(row_kernels.stats, logits, targets, entropy=True, top=True, write=False, **PLAIN),
        "write": partial(row_kernels.stats, logits, targets, entropy=True, top=False, write=True, **PLAIN),
        "gradient": partial(row_kernels.gradient, logits, logits, targets, lses, lses, **PLAIN),
    }

    def one(block: int, warps: int) -> None:
        with mock.patch.object(row_kernels, "blocks", lambda *_: {"BLOCK": block, "num_warps": warps}):
            runs[kind]()

    fitting = [(b, w) for b, w in CANDIDATES if LANES[0] <= b // (32 * w) <= LANES[1]]
    found = harness.times_ms({f"{b}/{w}": partial(one, b, w) for b, w in fitting}, logits.device, repeats=repeats)
    return {name: times["p50_ms"] for name, times in found.items()}


def main() -> None:
    """Reads the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune.py measures Triton kernels: expected a GPU, found none")
    device = torch.device("cuda")
    logits = torch.randn(args.rows, args.vocabulary, device=device, dtype=torch.bfloat16)
    targets = torch.randint(args.vocabulary, (args.rows,), device=device)
    best = {}
    for kind in ("read", "write", "gradient"):
        found = measure(kind, logits, targets, args.repeats)
        print(kind, ", ".join(f"{name}: {ms:.3f} ms" for name, ms in sorted(found.items(), key=lambda x: x[1])[:6]))
        block, _, warps = min(found, key=lambda name: found[name]).partition("/")
        best[kind] = (int(block), int(warps))
    major, minor = torch.cuda.get_device_capability(device)
    print(f'"sm_{major}{minor}": {best},  # {torch.cuda.get_device_name(device)}')


if __name__ == "__main__":
    main()
