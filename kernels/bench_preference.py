"""Time and memory of `preference`, loss and gradient, beside its twin in plain torch.

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
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import Recipe, preference, reference  # noqa: E402

RECIPES = {
    "DPO": Recipe({"sigmoid": 1.0}, beta=0.1),
    "DPO, three losses": Recipe({"sigmoid": 0.8, "bco_pair": 0.2, "ipo": 1.0}, beta=0.1),
    "SimPO": Recipe({"sigmoid_norm": 1.0}, beta=2.0, gamma=1.0, mean_rewards=True),
    "ORPO": Recipe({"odds_ratio": 0.1}, beta=0.1, mean_rewards=True),
    "KTO": Recipe({"kto": 1.0}, beta=0.1, desirable_weight=1.3, z0=0.2),
}
WITH_REFERENCE = ("DPO", "DPO, three losses", "KTO")


def run(function: Any, recipe: Recipe, dtype: torch.dtype, logps: Any, lengths: Any, **more: Any) -> harness.Answer:
    """Loss, metrics and gradient."""
    leaf = logps.to(dtype).requires_grad_()
    if more.get("reference") is not None:
        more["reference"] = more["reference"].to(dtype)
    found = function(leaf, lengths, recipe, scale=1 / len(lengths), **more)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    return [found.loss.detach(), gradient, *(x / len(lengths) for x in found.metrics.values())]


def cases(args: argparse.Namespace, device: torch.device) -> dict[str, harness.Case]:
    """A recipe -> what is run; completions of half to all of `tokens`."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.tokens // 2, args.tokens + 1, (2 * args.pairs,), generator=draw)
    logps = -2 * torch.rand(int(lengths.sum()), generator=draw)
    reference_logps = logps + 0.05 * torch.randn(len(logps), generator=draw)
    flags = torch.rand(len(lengths), generator=draw) < 0.6
    logps, reference_logps, lengths, flags = (x.to(device) for x in (logps, reference_logps, lengths, flags))
    found = {}
    for name, recipe in RECIPES.items():
        more: dict[str, Any] = {"reference": reference_logps if name in WITH_REFERENCE else None}
        more |= {"desirable": flags} if name == "KTO" else {"nll_scale": 0.01}
        one = partial(run, recipe=recipe, logps=logps, lengths=lengths, **more)
        twin = partial(one, reference.preference)
        found[name] = (
            partial(one, preference, dtype=torch.float32),
            partial(twin, dtype=torch.float32),
            partial(twin, dtype=torch.float64),
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
        for row in harness.fused_rows(cases(args, device), device, repeats=args.repeats)
    ]
    harness.report(rows, harness.FUSED_COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
