"""Time and memory of preference losses as a step calls them: by the kernel, and by the algorithm's own loss in torch.

python kernels/bench_preference.py --pairs 64 --tokens 1024 --csv preference.csv
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
import losses  # noqa: E402
from dsalign.algos.dpo import DPO  # noqa: E402
from dsalign.algos.kto import KTO  # noqa: E402
from dsalign.algos.orpo import ORPO  # noqa: E402
from dsalign.algos.simpo import SimPO  # noqa: E402
from dsalign.contract.groups import MicroBatch, Output  # noqa: E402
from dsalign.loop.loss import scaled_loss  # noqa: E402

ALGORITHMS = {
    "DPO": DPO(),
    "DPO, three losses": DPO(loss_type=("sigmoid", "bco_pair", "ipo"), loss_weights=(0.8, 0.2, 1.0)),
    "SimPO": SimPO(),
    "ORPO": ORPO(),
    "KTO": KTO(desirable_weight=1.3),
}


def run(impl: Any, dtype: torch.dtype, algorithm: Any, logps: torch.Tensor, batch: MicroBatch) -> losses.Answer:
    """Loss, metrics and gradient."""
    leaf = logps.to(dtype).requires_grad_()
    count = len(batch.groups)
    scales = {"pairs": 1 / count, "examples": 1 / count, "chosen_tokens": 0.01}
    loss, metrics = scaled_loss(algorithm, "policy", Output(logps=leaf), batch, scales, impl=impl)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), gradient, *(torch.as_tensor(metrics[name][0]) / count for name in sorted(metrics))]


def cases(args: argparse.Namespace, device: torch.device) -> dict[str, losses.Case]:
    """An algorithm -> what is run; completions of half to all of `tokens`."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.tokens // 2, args.tokens + 1, (2 * args.pairs,), generator=draw).tolist()
    logps = -2 * torch.rand(sum(lengths), generator=draw)
    reference = logps + 0.05 * torch.randn(len(logps), generator=draw)
    flags = (torch.rand(len(lengths), generator=draw) < 0.6).tolist()
    logps, reference = logps.to(device), reference.to(device)
    found = {}
    for name, algorithm in ALGORITHMS.items():

        def batch(dtype: torch.dtype, labelled: bool = algorithm.traits.data == "labels") -> MicroBatch:
            labels = flags if labelled else None
            return losses.micro_batch(lengths, device, {"reference": reference.to(dtype)}, labels=labels, z0=0.2)

        one, narrow = partial(run, algorithm=algorithm, logps=logps), batch(torch.float32)
        found[name] = (
            partial(one, "triton", torch.float32, batch=narrow),
            partial(one, "torch", torch.float32, batch=narrow),
            partial(one, "torch", torch.float64, batch=batch(torch.float64)),
        )
    return found


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    parser = harness.parser(__doc__, repeats=20)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest completion")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [
        {**row, "pairs": args.pairs, "tokens": args.tokens}
        for row in losses.rows_of(cases(args, device), device, repeats=args.repeats)
    ]
    harness.report(rows, losses.COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
