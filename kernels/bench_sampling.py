"""Time and memory of `sample_tokens` beside torch.multinomial: first the error against float64, then the numbers.

python kernels/bench_sampling.py --rows 256 --vocabulary 152064 --dtype bfloat16 --csv sampling.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import Impl, gumbel, sample_tokens  # noqa: E402

Candidate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CHECKED = 64  # rows compared with float64
COLUMNS = ("op", "dtype", "rows", "vocabulary", "error", "p20_ms", "p50_ms", "p80_ms", "us_a_row", "ceiling", "peak_mb")
COPY = "copy of the logits"


def ours(impl: Impl, logits: Tensor, keys: Tensor, positions: Tensor, **how: float) -> tuple[Tensor, Tensor]:
    """dsalign_kernels.sample_tokens."""
    found = sample_tokens(logits, keys, positions, impl=impl, **how)  # type: ignore[arg-type]
    return found.tokens, found.logps


def multinomial(logits: Tensor, _keys: Tensor, _positions: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook: probabilities of a whole [B, V], a draw by the device's generator, and log-probabilities again."""
    tokens = torch.multinomial(torch.softmax(logits.float(), 1), 1)
    return tokens[:, 0], torch.log_softmax(logits.float(), 1).gather(1, tokens)[:, 0]


def exponential(logits: Tensor, _keys: Tensor, _positions: Tensor) -> tuple[Tensor, Tensor]:
    """The draw of small engines: p / E with E exponential, the same distribution, from the device's generator."""
    logps = torch.log_softmax(logits.float(), 1)
    tokens = logps.exp().div_(torch.empty_like(logps).exponential_()).argmax(1, keepdim=True)
    return tokens[:, 0], logps.gather(1, tokens)[:, 0]


def candidates(impl: Impl) -> dict[str, Candidate]:
    """What is measured, by its name."""
    return {
        "sample_tokens": partial(ours, impl),
        "sample_tokens, greedy": partial(ours, impl, top_k=1),
        "sample_tokens, top_k 50": partial(ours, impl, top_k=50),
        "sample_tokens, top_p 0.9": partial(ours, impl, top_p=0.9),
        "softmax + multinomial + log_softmax": multinomial,
        "log_softmax, p / exponential": exponential,
    }


def errors(impl: Impl, logits: Tensor, keys: Tensor, positions: Tensor) -> dict[str, float]:
    """Candidate -> the largest error of its tokens' log-probabilities, nats, against float64.

    Raises ValueError where a candidate writes to its input, or where more than one token in a hundred of sample_tokens
    is another than the arg max of the logits and their noise: on a GPU a logarithm may be rounded otherwise.
    """
    logits, keys, positions = logits[:CHECKED], keys[:CHECKED], positions[:CHECKED]
    before = logits.clone()
    exact = torch.log_softmax(logits.double(), 1)
    found = {}
    for name, candidate in candidates(impl).items():
        tokens, logps = candidate(logits, keys, positions)
        if not torch.equal(logits, before):
            raise ValueError(f"{name}: expected the logits as they were, got other ones; not timed")
        found[name] = harness.error(logps, exact.gather(1, tokens[:, None])[:, 0])
    tokens, _ = ours(impl, logits, keys, positions)
    want = (logits.cpu().float() + gumbel(keys, positions, logits.shape[1])).argmax(1)
    others = int((tokens.cpu() != want).sum())
    if others > len(logits) / 100:
        raise ValueError(f"sample_tokens: expected the arg max of logits and noise, got {others} others; not timed")
    return found


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row for each candidate."""
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(args.rows, args.vocabulary, generator=draw)).to(device, getattr(torch, args.dtype))
    keys = torch.randint(-(2**63), 2**63 - 1, (args.rows,), generator=draw).to(device)
    positions = torch.arange(args.rows, device=device)
    found = errors(args.impl, logits, keys, positions)
    runs: dict[str, Callable[[], object]] = {
        name: partial(one, logits, keys, positions) for name, one in candidates(args.impl).items()
    }
    runs[COPY] = partial(torch.empty_like(logits).copy_, logits)
    with torch.no_grad():
        peaks = {name: harness.peak_extra_bytes(run, device) / 2**20 for name, run in runs.items()}
        times = harness.times_ms(runs, device, repeats=args.repeats)
    rows: list[dict[str, object]] = []
    for name in runs:
        row: dict[str, object] = {"op": name, "dtype": args.dtype, "rows": args.rows, "vocabulary": args.vocabulary}
        row |= {"error": found.get(name, float("nan")), "peak_mb": peaks[name], **times[name]}
        row["us_a_row"] = 1e3 * times[name]["p50_ms"] / args.rows
        # A copy reads and writes, a draw needs the read alone.
        row["ceiling"] = (1.0 if name == COPY else 0.5) * times[COPY]["p50_ms"] / times[name]["p50_ms"]
        rows.append({**{column: row[column] for column in COLUMNS}, **harness.provenance(device)})
    return rows


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    harness.run_over_logits(__doc__, measure, COLUMNS, rows=64, rows_are="completions that are sampled at a time, B")


if __name__ == "__main__":
    main()
