"""Time and memory of PPO's arithmetic (`gae`, `clipped_policy`, `clipped_value`) beside its twins in plain torch.

python kernels/bench_policy.py --completions 128 --tokens 1024 --csv policy.csv
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import clipped_policy, clipped_value, gae, reference  # noqa: E402


def advantages(function: Any, dtype: torch.dtype, rewards: Tensor, values: Tensor, lengths: Tensor) -> harness.Answer:
    """Advantages, means and squares."""
    return list(function(rewards.to(dtype), values.to(dtype), lengths, gamma=1.0, lam=0.95))


def loss(function: Any, dtype: torch.dtype, x: Tensor, *others: Tensor) -> harness.Answer:
    """Loss, metrics and gradient, a token."""
    leaf = x.to(dtype).requires_grad_()
    wide = [y.to(dtype) if y.is_floating_point() else y for y in others]
    found = function(leaf, *wide, cliprange=0.2, scale=1 / len(others[0]))
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    return [found.loss.detach(), gradient, *(y / len(others[0]) for y in found.metrics.values())]


def cases(args: argparse.Namespace, device: torch.device) -> dict[str, harness.Case]:
    """An operation -> what is run; completions of half to all of `tokens`."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.tokens // 2, args.tokens + 1, (args.completions,), generator=draw)
    segment, size = torch.repeat_interleave(lengths), int(lengths.sum())
    numbers = [torch.randn(size, generator=draw) for _ in range(4)]
    values = torch.randn(size + len(lengths), generator=draw)
    old, change, one, other = (x.to(device) for x in numbers)
    lengths, segment, values = lengths.to(device), segment.to(device), values.to(device)
    inputs: dict[str, tuple[Any, Any, Any, tuple[Tensor, ...]]] = {
        "gae": (advantages, gae, reference.gae, (one, other, lengths)),
        "clipped_policy": (loss, clipped_policy, reference.clipped_policy, (old + 0.2 * change, old, one)),
        "clipped_value": (loss, clipped_value, reference.clipped_value, (values, old, one, segment)),
    }
    return {
        name: (
            partial(run, ours, torch.float32, *tensors),
            partial(run, twin, torch.float32, *tensors),
            partial(run, twin, torch.float64, *tensors),
        )
        for name, (run, ours, twin, tensors) in inputs.items()
    }


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    parser = harness.parser(__doc__, repeats=20)
    parser.add_argument("--completions", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest completion")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [
        {**row, "completions": args.completions, "tokens": args.tokens}
        for row in harness.fused_rows(cases(args, device), device, repeats=args.repeats)
    ]
    harness.report(rows, harness.FUSED_COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
