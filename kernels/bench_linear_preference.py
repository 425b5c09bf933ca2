"""Time and memory of a trained head with a preference loss on it, as a step has them: DPO with a reference, and ORPO.

python kernels/bench_linear_preference.py --pairs 8 --tokens 512 --hidden 4096 --vocabulary 128256 --dtype bfloat16
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
sys.path[:0] = [str(ROOT), str(ROOT.parent)]  # before an installed copy, so that what is measured is what lies here

import harness  # noqa: E402  # needs the line above
import losses  # noqa: E402
from dsalign.algos.dpo import DPO  # noqa: E402
from dsalign.algos.orpo import ORPO  # noqa: E402
from dsalign.contract.groups import Output  # noqa: E402
from dsalign.loop.loss import scaled_loss  # noqa: E402
from dsalign_kernels import Impl, linear_logps, linear_loss, reference  # noqa: E402

COLUMNS = (
    "op",
    "pass",
    "dtype",
    "pairs",
    "tokens",
    "hidden",
    "vocabulary",
    "error",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "peak_mb",
)
CHECKED = 4  # pairs compared with float64: of one alone the error is that of a single coefficient
ALGORITHMS = {"DPO": DPO(beta=0.1, rpo_alpha=0.0), "ORPO": ORPO(beta=0.1)}


@dataclass(frozen=True)
class Case:
    """States [2P, T, D] of P pairs, chosen at 2i and rejected at 2i + 1, all of T tokens; targets [2P, T]."""

    hidden: Tensor
    weight: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    targets: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """In another dtype."""
        tensors = (self.hidden, self.weight, self.reference_hidden, self.reference_weight)
        return Case(*(x.to(dtype) for x in tensors), self.targets)


Head = Callable[[str, Tensor, Tensor, Case], Tensor]  # loss name, hidden, weight, case -> mean loss over pairs


def pair_loss(name: str, logps: Tensor, base: Tensor | None, case: Case, impl: Impl) -> Tensor:
    """What some of the case's pairs add to the mean loss over all of them; ORPO's has the mean NLL of chosen tokens.
    logps, base: [tokens of those pairs] float, of the policy and of the reference."""
    tokens, scales = case.targets.shape[1], {"pairs": 2 / len(case.targets), "chosen_tokens": 2 / case.targets.numel()}
    fields = {} if base is None else {"reference": base}
    batch = losses.micro_batch([tokens] * (len(logps) // tokens), logps.device, fields)
    return scaled_loss(ALGORITHMS[name], "policy", Output(logps=logps), batch, scales, impl=impl)[0]


def ours(impl: Impl, by_parts: bool, name: str, hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """As a step has it: the logits kept, or a pair at a time; on a GPU the loss by its kernel."""
    flat, targets = hidden.flatten(0, 1), case.targets.flatten()
    base = None
    if name == "DPO":
        with torch.no_grad():
            base = linear_logps(case.reference_hidden.flatten(0, 1), case.reference_weight, targets, impl=impl).logps
    if not by_parts:
        logps = linear_logps(flat, weight, targets, head_bytes=2**40, impl=impl).logps
        return pair_loss(name, logps, base, case, impl)
    size = 2 * hidden.shape[1]

    def of_pair(i: int, logps: Tensor, entropy: Tensor | None) -> Tensor:
        return pair_loss(name, logps, None if base is None else base[i * size : (i + 1) * size], case, impl)

    return linear_loss(flat, weight, targets, [size] * (len(hidden) // 2), of_pair, impl=impl)


def plain(name: str, hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
    """Logits, float32 log-softmax and the textbook loss."""
    targets = case.targets.flatten()
    logps = reference.linear_logps(hidden.flatten(0, 1), weight, targets).logps
    base = None
    if name == "DPO":
        with torch.no_grad():
            base = reference.linear_logps(case.reference_hidden.flatten(0, 1), case.reference_weight, targets).logps
    return pair_loss(name, logps, base, case, "torch")


def liger_head() -> Head | None:
    """Liger's chunked losses, where they are installed: chosen completions first, then the rejected."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearORPOLoss  # noqa: PLC0415
    except ImportError:
        return None
    losses = {"DPO": LigerFusedLinearDPOLoss(beta=0.1), "ORPO": LigerFusedLinearORPOLoss(beta=0.1)}

    def head(name: str, hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        def sides(x: Tensor) -> Tensor:
            return torch.cat([x[0::2], x[1::2]])

        extra = (
            {"ref_input": sides(case.reference_hidden), "ref_weight": case.reference_weight} if name == "DPO" else {}
        )
        loss: Tensor = losses[name](weight, sides(hidden), sides(case.targets), **extra)[0]
        return loss

    return head


def run(head: Head, name: str, case: Case) -> list[Tensor]:
    """[loss, hidden gradient, weight gradient]."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss = head(name, hidden, weight, case)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def measure(args: argparse.Namespace, device: torch.device, name: str) -> list[dict[str, object]]:
    """One row for each head. Raises ValueError where a gradient of ours is further off than plain torch's."""
    draw, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    rows, scale = 2 * args.pairs, 2 / args.hidden**0.5
    hidden, weight = (
        torch.randn(*shape, args.hidden, generator=draw) for shape in ((rows, args.tokens), (args.vocabulary,))
    )
    targets = torch.randint(args.vocabulary, (rows, args.tokens), generator=draw).to(device)
    moved = [x + 0.01 * torch.randn(x.shape, generator=draw) for x in (hidden, weight)]
    tensors = (hidden, weight * scale, moved[0], moved[1] * scale)
    case = Case(*(x.to(device, dtype) for x in tensors), targets)
    heads: dict[str, Head] = {
        "dsalign, kept": partial(ours, args.impl, False),
        "dsalign, a pair at a time": partial(ours, args.impl, True),
        "plain torch": plain,
    }
    liger = liger_head()
    if liger is not None:
        heads["Liger chunked loss"] = liger
    first = slice(2 * CHECKED)
    small = Case(
        case.hidden[first], case.weight, case.reference_hidden[first], case.reference_weight, case.targets[first]
    )
    exact = run(plain, name, small.to(torch.float64))
    errors = {
        which: max(
            float((x.double() - y).norm() / y.norm()) for x, y in zip(run(head, name, small), exact, strict=True)
        )
        for which, head in heads.items()
    }
    allowed = errors["plain torch"] + torch.finfo(dtype).eps
    if any(errors[which] > allowed for which in heads if which.startswith("dsalign")):
        raise ValueError(f"{name}: expected errors up to {allowed:.3g}, got {errors}; not timed")
    runs = {which: partial(run, head, name, case) for which, head in heads.items()}
    returned = (case.hidden.numel() + case.weight.numel()) * case.hidden.element_size()
    peaks = {which: (harness.peak_extra_bytes(one, device) - returned) / 2**20 for which, one in runs.items()}
    times = harness.times_ms(runs, device, repeats=args.repeats, warmup=1)
    about = {key: getattr(args, key) for key in ("dtype", "pairs", "tokens", "hidden", "vocabulary")}
    found = [
        {"op": which, "pass": name, **about, "error": errors[which], **times[which], "peak_mb": peaks[which]}
        for which in heads
    ]
    return [{**{column: row[column] for column in COLUMNS}, **harness.provenance(device)} for row in found]


def main() -> None:
    """Reads the flags, measures, prints a table and appends to --csv."""
    parser = harness.parser(__doc__, repeats=5)
    harness.add_impl(parser)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of each completion")
    parser.add_argument("--hidden", type=int, default=576, help="D")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("beside:", harness.peers({"Liger": "liger-kernel"} if liger_head() is not None else {}))
    harness.report([row for name in ALGORITHMS for row in measure(args, device, name)], COLUMNS, device, args.csv)


if __name__ == "__main__":
    main()
