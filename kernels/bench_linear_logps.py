"""Time and memory of `linear_logps` by scheme, beside bare matrix products, plain torch and other projects' heads.

python kernels/bench_linear_logps.py --rows 8192 --hidden 4096 --vocabulary 128256 --dtype bfloat16 --csv linear.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
from dsalign_kernels import Impl, default_bytes, linear_logps, linear_loss, reference  # noqa: E402

COLUMNS = (
    "op", "pass", "dtype", "rows", "hidden", "vocabulary", "error", "grad_error", "p20_ms", "p50_ms", "p80_ms",
    "products", "ceiling", "peak_mb",
)  # fmt: skip
TWIN = "logits, log_softmax"  # what ours must not be further off than
CHECKED = 256  # rows compared with float64
NEEDED = {"forward": 1, "frozen": 2, "trained": 3}  # matrix products of a pass
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """The tensors of one shape. grads: what the loss makes of each log-probability."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grads: Tensor

    def first(self, n: int) -> Case:
        """Its first n rows."""
        return Case(self.hidden[:n], self.weight, self.targets[:n], self.grads[:n])


Head = Callable[[Tensor, Tensor, Case], Tensor]  # hidden, weight, case -> log-probabilities, or a scalar loss


def ours(impl: Impl, head_bytes: int | None, hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """dsalign_kernels.linear_logps."""
    return linear_logps(hidden, weight, case.targets, head_bytes=head_bytes, impl=impl).logps


def local(impl: Impl, size: int, hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """dsalign_kernels.linear_loss in parts of `size` rows."""
    starts = range(0, len(hidden), size)
    parts = [min(size, len(hidden) - i) for i in starts]
    return linear_loss(
        hidden, weight, case.targets, parts, lambda i, logps, _: (logps * case.grads[starts[i] :][: parts[i]]).sum(),
        impl=impl,
    )  # fmt: skip


def logits_float32(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """The textbook: logits, float32 log-softmax, gather."""
    return reference.linear_logps(hidden, weight, case.targets).logps


def cross_entropy(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """The leanest form of plain torch."""
    return -torch.nn.functional.cross_entropy(hidden @ weight.t(), case.targets, reduction="none").float()


def installed_peers() -> dict[str, tuple[str, Head]]:
    """Name -> (package, head) of what can be imported. A head that gives one scalar takes a loss of its own."""
    found: dict[str, tuple[str, Head]] = {}
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: PLC0415  # where it is installed

        def trl(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
            result: Tensor = ChunkedLogProbFunction.apply(
                hidden, weight, None, case.targets, 1.0, 32768, None, 1.0, ()
            )[0]
            return result

        found["TRL chunked head"] = ("trl", trl)
    except ImportError:
        pass
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # noqa: PLC0415
            LigerFusedLinearCrossEntropyFunction,
        )

        def liger(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
            result = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, case.targets)
            loss: Tensor = result[0] if isinstance(result, tuple) else result
            return loss

        found["Liger fused linear CE"] = ("liger-kernel", liger)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415

        def cce(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
            return -linear_cross_entropy(hidden, weight, case.targets, reduction="none").float()

        found["cut-cross-entropy"] = ("cut-cross-entropy", cce)
    except ImportError:
        pass
    try:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss  # noqa: PLC0415

        def tiled(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
            def loss(_: object, states: Tensor, rows: Tensor) -> Tensor:
                losses = torch.nn.functional.cross_entropy(states @ weight.t(), case.targets[rows], reduction="none")
                return -(losses.float() * case.grads[rows]).sum()

            rows = torch.arange(len(hidden), device=hidden.device)
            shards = -(-len(hidden) * len(weight) * hidden.element_size() // default_bytes(hidden.device))
            total: Tensor = TiledFusedLogitsLoss.apply(
                loss, None, hidden[None], rows[None], None, shards, [weight], "sum"
            )
            return total

        found["DeepSpeed tiled loss"] = ("deepspeed", tiled)
    except ImportError:
        pass
    return found


def run(head: Head, case: Case, mode: str) -> list[Tensor | None]:
    """[log-probabilities or loss, hidden gradient, weight gradient]; mode: "forward", "frozen" or "trained"."""
    if mode == "forward":
        with torch.no_grad():
            return [head(case.hidden, case.weight, case), None, None]
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_(mode == "trained")
    out = head(hidden, weight, case)
    wanted = [hidden, weight] if mode == "trained" else [hidden]
    grads = torch.autograd.grad(out, wanted, case.grads.to(out.dtype) if out.dim() else None, allow_unused=True)
    found = [x.grad if g is None else g for x, g in zip(wanted, grads, strict=True)]  # DeepSpeed's leaves it there
    return [out.detach(), *found, *[None] * (2 - len(found))]


def errors(heads: dict[str, Head], case: Case, mode: str) -> dict[str, tuple[float, float]]:
    """Name -> (largest error of a log-probability, nats; of a gradient, relative, by norm), against float64.

    A peer that does not run here is a line, and leaves `heads`.
    Raises ValueError where ours is further off than the textbook by more than a rounding.
    """
    small = case.first(CHECKED)
    wide = Case(small.hidden.double(), small.weight.double(), small.targets, small.grads.double())
    exact = run(logits_float32, wide, mode)
    found: dict[str, tuple[float, float]] = {}
    for name, head in list(heads.items()):
        try:
            out = run(head, small, mode)
        except (RuntimeError, AssertionError) as error:
            if name not in installed_peers():
                raise
            print(f"{name}, {mode}: does not run here: {str(error).splitlines()[0]}")
            del heads[name]
            continue
        whole = out[0] is not None and out[0].dim() == 0
        logps = float("nan") if whole else harness.error(out[0], exact[0])  # type: ignore[arg-type]
        foreign = whole and name.startswith("Liger")  # the gradient of its own loss, a mean
        pairs = [] if foreign else [(x, y) for x, y in zip(out[1:], exact[1:], strict=True) if x is not None]
        found[name] = (logps, max((float((x.double() - y).norm() / y.norm()) for x, y in pairs), default=float("nan")))  # type: ignore[union-attr]
    eps = torch.finfo(case.hidden.dtype).eps
    twin = found[TWIN]
    for name, (logp_error, grad_error) in found.items():
        if name.startswith("linear") and (logp_error > twin[0] + 1e-5 or grad_error > twin[1] + eps):
            raise ValueError(f"{name}, {mode}: expected errors near {twin}, got {(logp_error, grad_error)}; not timed")
    return found


def products(case: Case) -> dict[str, Callable[[], object]]:
    """The bare matrix products: logits; + hidden gradient; + weight gradient."""
    logits = torch.mm(case.hidden, case.weight.t())
    outs: list[tuple[Tensor, Tensor, Tensor]] = [
        (case.hidden, case.weight.t(), torch.empty_like(logits)),
        (logits, case.weight, torch.empty_like(case.hidden)),
        (logits.t(), case.hidden, torch.empty_like(case.weight)),
    ]

    def go(n: int) -> None:
        for a, b, out in outs[:n]:
            torch.mm(a, b, out=out)

    return {f"{n} matrix product{'s' * (n > 1)}": partial(go, n) for n in (1, 2, 3)}


def heads_of(mode: str, args: argparse.Namespace) -> dict[str, Head]:
    """What is measured in a mode."""
    mine: dict[str, Head] = {"linear_logps": partial(ours, args.impl, None)}
    if mode == "trained":
        mine = {
            "linear_logps, kept": partial(ours, args.impl, 2**40),
            "linear_logps, recomputed": partial(ours, args.impl, (args.head_memory or 32) * MIB),
            "linear_loss, parts": partial(local, args.impl, args.part),
        }
    plain: dict[str, Head] = {TWIN: logits_float32, "logits, cross_entropy": cross_entropy}
    if args.compile:
        plain["torch.compile of it"] = torch.compile(cross_entropy)
    found = mine | plain | {name: head for name, (_, head) in installed_peers().items()}
    return {name: head for name, head in found.items() if args.only in name or name == TWIN}


def measure(args: argparse.Namespace, device: torch.device, mode: str) -> list[dict[str, object]]:
    """One row for each head in a mode, and one for the bare products."""
    draw = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    make = partial(torch.randn, generator=draw)
    case = Case(
        make(args.rows, args.hidden).to(device, dtype),
        (make(args.vocabulary, args.hidden) * 2 / args.hidden**0.5).to(device, dtype),
        torch.randint(args.vocabulary, (args.rows,), generator=draw).to(device),
        make(args.rows).to(device),
    )
    heads = heads_of(mode, args)
    about = {"pass": mode, "dtype": args.dtype, "rows": args.rows, "hidden": args.hidden, "vocabulary": args.vocabulary}
    found, peaks, runs = errors(heads, case, mode), dict[str, float](), dict[str, Callable[[], object]]()
    for name, head in heads.items():
        if args.only not in name:  # the twin, which was checked against
            continue
        one = partial(run, head, case, mode)
        try:
            one()
            peaks[name] = (harness.peak_extra_bytes(one, device) - returned_bytes(case, mode)) / MIB
            runs[name] = one
        except (RuntimeError, AssertionError) as error:  # a peer that does not run here is a line, not a stop
            print(f"{name}, {mode}: not timed: {str(error).splitlines()[0]}")
    bare = products(case)
    times = harness.times_ms(runs | bare, device, repeats=args.repeats)
    one = times["3 matrix products"]["p50_ms"] / 3
    rows: list[dict[str, object]] = []
    for name in times:
        error, grad_error = found.get(name, (float("nan"), float("nan")))
        row: dict[str, object] = {"op": name, **about, "error": error, "grad_error": grad_error, **times[name]}
        taken, needed = times[name]["p50_ms"] / one, int(name[0]) if name in bare else NEEDED[mode]
        row |= {"products": taken, "ceiling": needed / taken, "peak_mb": peaks.get(name, float("nan"))}
        rows.append({**{column: row[column] for column in COLUMNS}, **harness.provenance(device)})
    return rows


def returned_bytes(case: Case, mode: str) -> int:
    """The gradients that a run gives back: not work space."""
    count = {"forward": 0, "frozen": case.hidden.numel(), "trained": case.hidden.numel() + case.weight.numel()}[mode]
    return count * case.hidden.element_size()


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    parser = harness.parser(__doc__, repeats=5)
    harness.add_impl(parser)
    parser.add_argument("--rows", type=int, default=2048, help="completion tokens, N")
    parser.add_argument("--hidden", type=int, default=576, help="D")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--modes", nargs="+", choices=("forward", "frozen", "trained"), default=("forward", "frozen", "trained")
    )
    parser.add_argument("--only", default="", help="part of the names to measure")
    parser.add_argument("--part", type=int, default=256, help="rows of one part of linear_loss")
    parser.add_argument("--head_memory", type=int, help="MiB of one chunk where the logits are computed again")
    parser.add_argument("--compile", action="store_true", help="torch.compile of plain torch too: minutes on a CPU")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("beside:", harness.peers({name: package for name, (package, _) in installed_peers().items()}))
    for mode in args.modes:  # a run that is cut off keeps what it has
        harness.report(measure(args, device, mode), COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
