"""Time and memory of PPO's arithmetic as a step calls it: `gae` and the two clipped losses, by the kernels and in plain
torch.

python kernels/bench_policy.py --completions 128 --tokens 1024 --csv policy.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
import losses  # noqa: E402
from dsalign.algos.ppo import PPO  # noqa: E402
from dsalign.contract.groups import MicroBatch, Output  # noqa: E402
from dsalign.loop.loss import scaled_loss  # noqa: E402
from dsalign_kernels import gae  # noqa: E402


def advantages(impl: Any, dtype: torch.dtype, rewards: Tensor, values: Tensor, lengths: Tensor) -> losses.Answer:
    """Advantages, means and squares."""
    return list(gae(rewards.to(dtype), values.to(dtype), lengths, gamma=1.0, lam=0.95, impl=impl))


def loss(impl: Any, dtype: torch.dtype, role: str, x: Tensor, batch: MicroBatch) -> losses.Answer:
    """Loss, metrics and gradient, a token."""
    leaf, count = x.to(dtype).requires_grad_(), len(batch.segment)
    wide = dataclasses.replace(batch, fields={name: y.to(dtype) for name, y in batch.fields.items()})
    found, metrics = scaled_loss(PPO(vf_coef=1.0), role, Output.of(role, leaf), wide, {"tokens": 1 / count}, impl=impl)
    (gradient,) = torch.autograd.grad(found, leaf)
    return [found.detach(), gradient, *(metrics[name][0] / count for name in sorted(metrics))]


def cases(args: argparse.Namespace, device: torch.device) -> dict[str, losses.Case]:
    """An operation -> what is run; completions of half to all of `tokens`."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.tokens // 2, args.tokens + 1, (args.completions,), generator=draw)
    size = int(lengths.sum())
    numbers = [torch.randn(size, generator=draw) for _ in range(4)]
    values = torch.randn(size + len(lengths), generator=draw)
    old, change, one, other = (x.to(device) for x in numbers)
    fields = {"old": old, "advantages": one, "values": old, "returns": one}
    batch = losses.micro_batch(lengths.tolist(), device, fields)
    inputs: dict[str, tuple[Any, ...]] = {
        "gae": (advantages, one, other, lengths.to(device)),
        "clipped_policy": (loss, "policy", old + 0.2 * change, batch),
        "clipped_value": (loss, "value", values.to(device), batch),
    }
    return {
        name: (
            partial(run, "triton", torch.float32, *given),
            partial(run, "torch", torch.float32, *given),
            partial(run, "torch", torch.float64, *given),
        )
        for name, (run, *given) in inputs.items()
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
        for row in losses.rows_of(cases(args, device), device, repeats=args.repeats)
    ]
    harness.report(rows, losses.COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
