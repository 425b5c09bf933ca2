"""Time and memory of `selective_logps` beside plain torch: first the error against float64, then the numbers.

python kernels/bench_selective_logps.py --rows 512 --vocabulary 49152 --csv selective_logps.csv
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import Impl, selective_logps  # noqa: E402

Candidate = Callable[[Tensor, Tensor], Tensor]
CHECKED = 256  # rows compared with float64
COLUMNS = (
    "op", "pass", "dtype", "rows", "vocabulary", "error", "grad_error", "p20_ms", "p50_ms", "p80_ms", "ceiling",
    "peak_mb",
)  # fmt: skip
COPIES = {"forward": 0.5, "forward+backward": 1.5}  # a copy reads and writes; needed: a read, and a read and a write


def ours(impl: Impl, logits: Tensor, targets: Tensor) -> Tensor:
    """dsalign_kernels.selective_logps."""
    return selective_logps(logits, targets, impl=impl)[0]


def in_place(impl: Impl, logits: Tensor, targets: Tensor) -> Tensor:
    """The same, its gradient written over the logits: the backward has them for itself."""
    return selective_logps(logits, targets, in_place=True, impl=impl)[0]


def with_entropy(impl: Impl, logits: Tensor, targets: Tensor) -> Tensor:
    """The same, with the entropy and whether the target is the most likely token."""
    return selective_logps(logits, targets, entropy=True, top=True, impl=impl)[0]


def log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """The textbook: a whole [N, V] of log-probabilities, of which one a row is read."""
    return torch.log_softmax(logits.float(), 1).gather(1, targets[:, None])[:, 0]


def gather_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    """Without that tensor in the forward; autograd makes it in the backward."""
    return logits.gather(1, targets[:, None])[:, 0].float() - torch.logsumexp(logits.float(), 1)


COPY = "copy of the logits"
IN_PLACE = "selective_logps, in place"  # it uses its logits up: timed alone, on a copy that is not timed


def candidates(impl: Impl) -> dict[str, Candidate]:
    """What is measured, by its name; TRL's fused form among it where it is installed."""
    found: dict[str, Candidate] = {
        "selective_logps": partial(ours, impl),
        "selective_logps, entropy": partial(with_entropy, impl),
        "log_softmax + gather": log_softmax,
        "gather - logsumexp": gather_logsumexp,
    }
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy  # noqa: PLC0415  # where it is there
    except ImportError:
        return found
    return {**found, "TRL, with entropy": lambda z, t: selective_log_softmax_and_entropy(z, t)[0]}


def forward_backward(candidate: Candidate, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of their weighted sum in the logits."""
    leaf = logits.detach().requires_grad_()
    logps = candidate(leaf, targets)
    (grad,) = torch.autograd.grad(logps, leaf, weights)
    return logps.detach(), grad


def errors(impl: Impl, logits: Tensor, targets: Tensor, weights: Tensor) -> dict[str, tuple[float, float]]:
    """Candidate -> (error of log-probabilities in nats, error of the gradient), against float64.

    Raises ValueError where a candidate writes to its input, which would spoil every number after it, or where
    selective_logps is further off than log_softmax + gather by more than one rounding.
    """
    logits, targets, weights = logits[:CHECKED], targets[:CHECKED], weights[:CHECKED]
    before = logits.clone()
    exact, exact_grad = forward_backward(
        lambda z, t: torch.log_softmax(z, 1).gather(1, t[:, None])[:, 0], logits.double(), targets, weights.double()
    )
    found = {}
    for name, candidate in candidates(impl).items():
        logps, grad = forward_backward(candidate, logits, targets, weights)
        if not torch.equal(logits, before):
            raise ValueError(f"{name}: expected the logits as they were, got other ones after its backward; not timed")
        found[name] = (harness.error(logps, exact), harness.error(grad, exact_grad))
    copy = logits.clone().requires_grad_()
    logps = in_place(impl, copy, targets)
    (grad,) = torch.autograd.grad(logps, copy, weights)
    found[IN_PLACE] = (harness.error(logps.detach(), exact), harness.error(grad, exact_grad))
    eps, largest = torch.finfo(torch.float32).eps, float(logits.abs().max())
    of_weights = float(weights.abs().max())
    roundings = (eps * largest, (eps * largest + torch.finfo(logits.dtype).eps) * of_weights)
    pairs = zip(found["selective_logps"], found["log_softmax + gather"], roundings, strict=True)
    for what, (mine, twin, rounding) in zip(("log-probability", "gradient"), pairs, strict=True):
        if not mine <= twin + rounding:
            raise ValueError(f"{what}: expected at most plain torch's error {twin:.3g}, got {mine:.3g}; not timed")
    return found


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row for each pass and candidate."""
    draw = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    logits = (4 * torch.randn(args.rows, args.vocabulary, generator=draw)).to(device, dtype)
    targets = torch.randint(args.vocabulary, (args.rows,), generator=draw).to(device)
    weights = torch.randn(args.rows, generator=draw).to(device)
    found = errors(args.impl, logits, targets, weights)
    rows: list[dict[str, object]] = []
    copy_ms = math.nan
    for which, backward in (("forward", False), ("forward+backward", True)):
        runs: dict[str, Callable[[], object]] = {
            name: partial(forward_backward, one, logits, targets, weights)
            if backward
            else partial(one, logits, targets)
            for name, one in candidates(args.impl).items()
        }
        if backward:  # over and over on what is left of the logits: any numbers take the same time
            runs[IN_PLACE] = partial(forward_backward, partial(in_place, args.impl), logits.clone(), targets, weights)
        else:
            runs[COPY] = partial(torch.empty_like(logits).copy_, logits)
        with torch.set_grad_enabled(backward):
            peaks = {name: harness.peak_extra_bytes(run, device) / 2**20 for name, run in runs.items()}
            times = harness.times_ms(runs, device, repeats=args.repeats)
        copy_ms = times[COPY]["p50_ms"] if COPY in times else copy_ms
        for name in runs:
            row: dict[str, object] = {"op": name, "pass": which, "dtype": args.dtype}
            row |= {"rows": args.rows, "vocabulary": args.vocabulary, "peak_mb": peaks[name], **times[name]}
            row["ceiling"] = (1.0 if name == COPY else COPIES[which]) * copy_ms / times[name]["p50_ms"]
            row |= dict(zip(("error", "grad_error"), found.get(name, (float("nan"),) * 2), strict=True))
            rows.append({**{column: row[column] for column in COLUMNS}, **harness.provenance(device)})
    return rows


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    harness.run_over_logits(__doc__, measure, COLUMNS, rows=512, rows_are="completion tokens, N")


if __name__ == "__main__":
    main()
