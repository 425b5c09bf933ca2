"""Time and memory of `decode_attention` beside scaled_dot_product_attention with a mask; first the errors.

Rows have lengths spread evenly from --tokens / 16 to --tokens. `ceiling` is the share of the memory bound: the time
that the live keys and values alone would take, at the speed of a copy that is measured in the same run.

python kernels/bench_decode_attention.py --rows 256 --tokens 2048 --heads 32 --shared 8 --width 128 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import decode_attention, reference  # noqa: E402

Candidate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHECKED = 4  # rows compared with float64: the shortest and the longest are among them
SHAPE = ("dtype", "rows", "tokens", "heads", "shared", "width")
COLUMNS = ("op", *SHAPE, "error", "p20_ms", "p50_ms", "p80_ms", "us_a_row", "ceiling", "peak_mb")
COPY = "copy of the cache"


def grouped(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """PyTorch's attention over all of the cache with a mask, queries that share a head as rows of one product."""
    seen = torch.arange(keys.shape[2], device=keys.device) <= positions[:, None]
    q = query.unflatten(1, (keys.shape[1], -1))
    return scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)


def repeated(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The same as transformers asks for it: a query a head, and PyTorch repeats the keys that are shared."""
    seen = torch.arange(keys.shape[2], device=keys.device) <= positions[:, None]
    q, shared = query[:, :, None], query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None], enable_gqa=shared)[:, :, 0]


CANDIDATES: dict[str, Candidate] = {
    "decode_attention": decode_attention,
    "decode_attention, a window of 512": partial(decode_attention, window=512),
    "sdpa with a mask, grouped": grouped,
    "sdpa with a mask, enable_gqa": repeated,
}


def errors(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> dict[str, float]:
    """Candidate -> its largest error against float64.

    Raises ValueError where a candidate writes to its input, or decode_attention is off by more than rounding explains.
    """
    at = torch.linspace(0, len(query) - 1, min(CHECKED, len(query))).long()
    part = [x[at] for x in (query, keys, values, positions)]
    before = [x.clone() for x in part]
    found = {}
    for name, candidate in CANDIDATES.items():
        how = candidate.keywords if isinstance(candidate, partial) else {}
        exact = reference.decode_attention(*(x.double() for x in part[:3]), part[3], **how)
        found[name] = harness.error(candidate(*part), exact)
        if not all(map(torch.equal, part, before)):
            raise ValueError(f"{name}: expected its inputs as they were, got other ones; not timed")
    limit, ours = 8 * torch.finfo(query.dtype).eps, found["decode_attention"]
    if ours > limit:
        raise ValueError(f"decode_attention: expected an error of {limit:.2g} or less, got {ours:.2g}; not timed")
    return found


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row for each candidate, and for a copy of the whole cache."""
    draw, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    sizes = ((args.rows, args.heads, args.width), *[(args.rows, args.shared, args.tokens, args.width)] * 2)
    query, keys, values = (torch.randn(size, generator=draw).to(device, dtype) for size in sizes)
    positions = (torch.linspace(args.tokens / 16, args.tokens, args.rows).long().clamp(1, args.tokens) - 1).to(device)
    tensors = query, keys, values, positions
    found = errors(*tensors)
    runs: dict[str, Callable[[], object]] = {name: partial(one, *tensors) for name, one in CANDIDATES.items()}
    copies = torch.empty_like(keys), torch.empty_like(values)
    runs[COPY] = lambda: (copies[0].copy_(keys), copies[1].copy_(values))
    with torch.no_grad():
        peaks = {name: harness.peak_extra_bytes(run, device) / 2**20 for name, run in runs.items()}
        times = harness.times_ms(runs, device, repeats=args.repeats)
    rows: list[dict[str, object]] = []
    for name in runs:
        window = 512 if "window" in name else args.tokens
        live = float((positions + 1).clamp(max=window).double().mean()) / args.tokens
        share = 1.0 if name == COPY else live / 2  # a copy reads and writes all, attention reads what is live
        row: dict[str, object] = {"op": name, **{x: getattr(args, x) for x in SHAPE}, **times[name]}
        row |= {"error": found.get(name, float("nan")), "peak_mb": peaks[name]}
        row["us_a_row"] = 1e3 * times[name]["p50_ms"] / args.rows
        row["ceiling"] = share * times[COPY]["p50_ms"] / times[name]["p50_ms"]
        rows.append({**{column: row[column] for column in COLUMNS}, **harness.provenance(device)})
    live_mib = 2 * args.shared * args.width * dtype.itemsize * float((positions + 1).sum()) / 2**20
    bound = live_mib / (keys.nbytes + values.nbytes) * 2**20 / 2 * times[COPY]["p50_ms"]
    print(f"live keys and values {live_mib:.1f} MiB, memory bound {bound:.3g} ms at the speed of the copy")
    return rows


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    flags = harness.parser(__doc__, repeats=20)
    flags.add_argument("--rows", type=int, default=16, help="completions that are decoded at a time")
    flags.add_argument("--tokens", type=int, default=512, help="length of the cache")
    flags.add_argument("--heads", type=int, default=9, help="of the queries")
    flags.add_argument("--shared", type=int, default=3, help="heads of the cache")
    flags.add_argument("--width", type=int, default=64, help="of a head")
    flags.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = flags.parse_args()
    device = torch.device(args.device)
    harness.report(measure(args, device), COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
