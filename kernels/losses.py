"""What the benchmarks of whole losses share: micro-batches of given lengths, and rows of kernel and plain torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import harness
from dsalign.contract.groups import Group, MicroBatch
from dsalign.data.batches import packing
from dsalign_kernels import has_triton

Answer = Sequence[Tensor]  # what a run gives, gradients among it
Case = tuple[Callable[[], Answer], Callable[[], Answer], Callable[[], Answer]]  # kernel, plain torch, that in float64
COLUMNS = ("op", "pass", "error", "p20_ms", "p50_ms", "p80_ms", "peak_mb")


def micro_batch(
    lengths: Sequence[int],
    device: torch.device,
    fields: Mapping[str, Tensor],
    *,
    labels: Sequence[bool] | None = None,
    z0: float = 0.0,
) -> MicroBatch:
    """The micro-batch of pairs of completions with these numbers of tokens, or of single ones where there are labels.

    fields: name -> [N] numbers of all completions' tokens.
    """
    size = 2 if labels is None else 1
    groups = [
        Group(i, "", (1,), tuple((1,) * n for n in lengths[at : at + size]), "", label=labels and labels[i])
        for i, at in enumerate(range(0, len(lengths), size))
    ]
    batch = packing.micro_batch(groups, device, shared={"z0": z0})
    return dataclasses.replace(batch, fields=fields)


def rows_of(cases: Mapping[str, Case], device: torch.device, *, repeats: int) -> list[dict[str, object]]:
    """Rows of a table: each operation by its kernel and in plain torch; on a CPU, where no kernel runs, in plain torch
    alone. Both are compared with float64 before they are timed.

    Raises ValueError where a kernel is further from float64, relative to the largest number, than plain torch and 1e-6.
    """
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    errors: dict[tuple[str, str], float] = {}
    for name, (ours, twin, exact) in cases.items():
        want = [x.double() for x in exact()]
        for which, run in (("plain torch", twin), ("dsalign_kernels", ours))[: 1 + has_triton(device)]:
            sizes = [max(1.0, float(y.abs().max())) for y in want]
            gaps = [harness.error(x, y) / size for x, y, size in zip(run(), want, sizes, strict=True)]
            runs[which, name], errors[which, name] = run, max(gaps)
        its = errors["plain torch", name]
        mine = errors.get(("dsalign_kernels", name), its)
        if not mine <= its + 1e-6:
            raise ValueError(f"{name}: expected at most plain torch's error {its:.3g}, got {mine:.3g}; not timed")
    peaks = {key: harness.peak_extra_bytes(run, device) / 2**20 for key, run in runs.items()}
    times = harness.times_ms({f"{which}|{name}": run for (which, name), run in runs.items()}, device, repeats=repeats)
    return [
        {
            "op": which,
            "pass": name,
            "error": errors[which, name],
            **times[f"{which}|{name}"],
            "peak_mb": peaks[which, name],
        }
        | harness.provenance(device)
        for which, name in runs
    ]
