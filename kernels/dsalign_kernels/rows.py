"""Rows of logits, by Triton on a GPU and by torch elsewhere: statistics, and the gradient of the log-probabilities."""

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
    """From the head's output x to logits: softcap tanh(scale x / softcap) / temperature; no softcap: scale x /
    temperature. Rows whose target is ignore_index give 0 and no gradient."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = IGNORE_INDEX


def uses_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether a kernel does it on the tensor's device; float64 is by torch always, as the kernels compute in float32.

    Raises ValueError where Triton is asked for and cannot run on this device, or `impl` is no implementation.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}')
    device = tensor.device
    able = row_kernels is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if impl == "triton" and not able:
        raise ValueError(f'impl="triton": expected a GPU and the triton package, got a tensor on {device}; use "auto"')
    wanted = impl == "triton" or (impl == "auto" and device.type == "cuda")
    return able and wanted and tensor.dtype != torch.float64


def check(logits_rows: int, targets: Tensor, shapes: str) -> None:
    """Raises ValueError unless targets is [N] int64 or int32 with N = logits_rows."""
    if targets.shape != (logits_rows,) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected {shapes} and targets [N] int64, got targets {tuple(targets.shape)} {targets.dtype}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics of logits are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def stats(
    logits: Tensor, targets: Tensor, how: Transform, *, entropy: bool, top: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logps, log-sum-exp, entropy or None, top or None of the rows of logits [N, V]: all [N]."""
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
    """weights [N] x d logp / d logits [N, V] into `out`, which may be the logits."""
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
    """In place."""
    if how.softcap is not None:
        return z.mul_(how.scale / how.softcap).tanh_().mul_(how.softcap / how.temperature)
    factor = how.scale / how.temperature
    return z if factor == 1.0 else z.mul_(factor)


def _exp(z: Tensor) -> Tensor:
    """e^z in place: torch's 2^x is several times faster than its e^x on some CPUs, and as exact."""
    return z.mul_(LOG2E).exp2_()


def _slope(z: Tensor, how: Transform) -> Tensor:
    """1 - tanh^2, from z = softcap tanh(.) / temperature."""
    assert how.softcap is not None
    return z.mul(how.temperature / how.softcap).square_().neg_().add_(1.0)


def _chunks(logits: Tensor, *, owned: bool) -> Iterator[tuple[slice, Tensor]]:
    """(rows, work space for them [n, V], empty where it is owned), each of up to CHUNK_BYTES. One work space for all:
    the allocator of a CPU gives freed memory back, and every page is zeroed again."""
    kind = wide(logits.dtype)
    size = max(1, CHUNK_BYTES // (kind.itemsize * max(1, logits.shape[1])))
    work = logits.new_empty(0 if owned else min(size, len(logits)), logits.shape[1], dtype=kind)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        yield rows, work[: rows.stop - start]
