"""Statistics of rows of logits and the gradient of their targets' log-probabilities, by Triton or by torch.

Also the choice between both, which all operations share: `uses_triton`, `has_triton`, `need_triton`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dsalign_kernels.reference import IGNORE_INDEX

try:
    from dsalign_kernels import row_kernels
except ImportError:  # triton is published for Linux alone
    row_kernels = None  # type: ignore[assignment]

Impl: TypeAlias = Literal["auto", "triton", "torch"]
CHUNK_BYTES = 4 * 2**20  # work space of the torch implementation: it stays in the caches of one core
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Transform:
    """What lies between the head's output x and the logits z of the softmax.

    z = softcap tanh(scale x / softcap) / temperature (arXiv:2408.00118, section 2), or scale x / temperature without a
    softcap; all three > 0. Rows whose target is ignore_index have log-probability 0 and no gradient.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = IGNORE_INDEX


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device: a GPU, or any in Triton's interpreter (the environment
    variable TRITON_INTERPRET is 1, as in the tests); and only where the triton package is installed."""
    return row_kernels is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def need_triton(operation: str, device: torch.device) -> None:
    """Raises ValueError where an operation that is a Triton kernel alone can't run on tensors of this device."""
    if not has_triton(device):
        raise ValueError(
            f"{operation}: expected tensors on a GPU and the triton package, got tensors on {device}; there the "
            "algorithm's own loss in dsalign/algos computes the same"
        )


def uses_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether an operation that has a Triton kernel and a torch implementation runs the kernel on this tensor.

    "auto": on a GPU; "triton" and "torch" insist. A float64 tensor is always for torch: the kernels compute in float32.
    Raises ValueError where "triton" can't run on the tensor's device, or `impl` is none of the three.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}')
    device = tensor.device
    able = has_triton(device)
    if impl == "triton" and not able:
        raise ValueError(f'impl="triton": expected a GPU and the triton package, got a tensor on {device}; use "auto"')
    wanted = impl == "triton" or (impl == "auto" and device.type == "cuda")
    return able and wanted and tensor.dtype != torch.float64


def check(logits_rows: int, targets: Tensor, shapes: str) -> None:
    """Raises ValueError unless targets is [logits_rows] int64 or int32; shapes: the other inputs, for the message."""
    if targets.shape != (logits_rows,) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected {shapes} and targets [N] int64, got targets {tuple(targets.shape)} {targets.dtype}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of logits of this dtype are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def stats(
    logits: Tensor, targets: Tensor, how: Transform, *, entropy: bool, top: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logps, log-sum-exp, entropy, top) of the rows of logits [N, V] at targets [N]: the fields of `Logps`, all [N].

    entropy and top are None unless they are asked for. triton: by the kernel, else by torch in chunks of rows.
    """
    if triton:
        return row_kernels.stats(logits, targets, entropy=entropy, top=top, write=False, **vars(how))
    size, device, kind = len(logits), logits.device, wide(logits.dtype)
    logps, lses = (torch.empty(size, dtype=kind, device=device) for _ in range(2))
    entropies = torch.empty_like(logps) if entropy else None
    tops = torch.empty(size, dtype=torch.bool, device=device) if top else None
    for rows, work in _chunks(logits, owned=False):
        part, target = logits[rows], targets[rows].long()
        z = _transformed(work.copy_(part), how)
        kept, inside = target != how.ignore_index, (target >= 0) & (target < logits.shape[1])
        index = torch.where(inside, target, 0)[:, None]
        picked, peak = z.gather(1, index)[:, 0], z.amax(1)
        gaps = z.sub_(peak[:, None])
        spread = gaps.clone() if entropy else None
        p = _exp(gaps)
        total = p.sum(1)
        lses[rows] = peak + total.log()
        logps[rows] = torch.where(kept, torch.where(inside, picked - lses[rows], torch.nan), 0.0)
        if tops is not None:
            tops[rows] = (picked >= peak) & kept & inside
        if entropies is not None and spread is not None:
            # The sum has terms >= 0: a difference of sums would cancel.
            entropies[rows] = total.log() - spread.mul_(p).sum(1) / total
    return logps, lses, entropies, tops


def gradient(
    logits: Tensor, out: Tensor, targets: Tensor, lses: Tensor, weights: Tensor, how: Transform, *, triton: bool
) -> Tensor:
    """Write weights x d logp / d logits [N, V] into `out`, and return it; out may be the logits themselves.

    lses: [N] float32, what `stats` found; weights: [N] float32, the loss's derivative in each log-probability.
    """
    if triton:
        return row_kernels.gradient(logits, out, targets, lses, weights, **vars(how))
    kind = wide(logits.dtype)
    owned = out.data_ptr() == logits.data_ptr() and logits.dtype == kind  # then the logits are the work space
    for rows, work in _chunks(logits, owned=owned):
        part, target = logits[rows], targets[rows].long()
        z = _transformed(part if owned else work.copy_(part), how)
        slope = _slope(z, how) if how.softcap is not None else None
        inside = (target >= 0) & (target < logits.shape[1])
        index = torch.where(inside, target, 0)[:, None]
        p = _exp(z.sub_(lses[rows, None]))
        coefficient = (target != how.ignore_index) * weights[rows] * (how.scale / how.temperature)
        # One pass; in the column of the target 1 - p is taken first, as both products may be near each other.
        of_target = coefficient * (inside.to(kind) - p.gather(1, index)[:, 0])
        p.mul_(-coefficient[:, None]).scatter_(1, index, of_target[:, None])
        if slope is not None:
            p.mul_(slope)
        if not owned:
            out[rows] = p
    return out


def _transformed(z: Tensor, how: Transform) -> Tensor:
    """The head's output z becomes the logits of the softmax, in place."""
    if how.softcap is not None:
        return z.mul_(how.scale / how.softcap).tanh_().mul_(how.softcap / how.temperature)
    factor = how.scale / how.temperature
    return z if factor == 1.0 else z.mul_(factor)


def _exp(z: Tensor) -> Tensor:
    """e^z in place: torch's 2^x is several times faster than its e^x on some CPUs, and as exact."""
    return z.mul_(LOG2E).exp2_()


def _slope(z: Tensor, how: Transform) -> Tensor:
    """The softcap's derivative 1 - tanh^2, from the logits z = softcap tanh(.) / temperature."""
    assert how.softcap is not None
    return z.mul(how.temperature / how.softcap).square_().neg_().add_(1.0)


def _chunks(logits: Tensor, *, owned: bool) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of the rows of logits [N, V], each of up to CHUNK_BYTES: (which rows, work space for them [n, V]).

    The work space is the same memory for all chunks: the allocator of a CPU gives freed memory back to the system,
    which zeroes every page again. It is empty where `owned`: then the caller works in the logits.
    """
    kind = wide(logits.dtype)
    size = max(1, CHUNK_BYTES // (kind.itemsize * max(1, logits.shape[1])))
    work = logits.new_empty(0 if owned else min(size, len(logits)), logits.shape[1], dtype=kind)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        yield rows, work[: rows.stop - start]
