"""Rows of logits, by Triton on a GPU and by torch elsewhere: statistics, and the gradient of the log-probabilities."""

from __future__ import annotations

import os
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
CHUNK_BYTES = 32 * 1024 * 1024  # float32 work space of the torch implementation


@dataclass(frozen=True)
class Transform:
    """From the head's output x to logits: softcap tanh(scale x / softcap) / temperature; no softcap: scale x /
    temperature. Rows whose target is ignore_index give 0 and no gradient."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = IGNORE_INDEX


def uses_triton(impl: Impl, device: torch.device) -> bool:
    """Raises ValueError where Triton is asked for and cannot run on this device, or `impl` is no implementation."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}')
    able = row_kernels is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if impl == "triton" and not able:
        raise ValueError(f'impl="triton": expected a GPU and the triton package, got a tensor on {device}; use "auto"')
    return able and (impl == "triton" or (impl == "auto" and device.type == "cuda"))


def check(logits_rows: int, targets: Tensor, shapes: str) -> None:
    """Raises ValueError unless targets is [N] int64 or int32 with N = logits_rows."""
    if targets.shape != (logits_rows,) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expected {shapes} and targets [N] int64, got targets {tuple(targets.shape)} {targets.dtype}")


def stats(
    logits: Tensor, targets: Tensor, how: Transform, *, entropy: bool, top: bool, write: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logps, log-sum-exp, entropy or None, top or None: all [N]. write: the logits [N, V] become d logp / d logits."""
    if triton:
        return row_kernels.stats(logits, targets, entropy=entropy, top=top, write=write, **vars(how))
    size, device = len(logits), logits.device
    logps, lses = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
    entropies = torch.empty_like(logps) if entropy else None
    tops = torch.empty(size, dtype=torch.bool, device=device) if top else None
    for rows in _chunks(logits):
        part, target = logits[rows], targets[rows].long()
        owned = write and part.dtype == torch.float32  # then the logits themselves are the work space
        z = _transformed(part if owned else part.to(torch.float32, copy=True), how)
        kept, inside = target != how.ignore_index, (target >= 0) & (target < logits.shape[1])
        index = torch.where(inside, target, 0)[:, None]
        picked, peak = z.gather(1, index)[:, 0], z.amax(1)
        slope = _slope(z, how) if write and how.softcap is not None else None
        gaps = z.sub_(peak[:, None])
        spread = gaps.clone() if entropy else None
        p = gaps.exp_()
        total = p.sum(1)
        lses[rows] = peak + total.log()
        logps[rows] = torch.where(kept, torch.where(inside, picked - lses[rows], torch.nan), 0.0)
        if tops is not None:
            tops[rows] = (picked >= peak) & kept & inside
        if entropies is not None and spread is not None:
            # The sum has terms >= 0: a difference of sums would cancel.
            entropies[rows] = total.log() - spread.mul_(p).sum(1) / total
        if write:
            _to_gradient(p, kept * (how.scale / how.temperature), 1 / total, index, inside, slope)
            if not owned:
                part.copy_(p)
    return logps, lses, entropies, tops


def gradient(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    lses: Tensor,
    weights: Tensor | None,
    how: Transform,
    *,
    first: int = 0,
    triton: bool,
) -> Tensor:
    """weights x d logp / d logits [N, C] into `out`, which may be the logits; weights [N] float32, 1 where None.

    first: the vocabulary index of the first column, where the logits are a slice of the vocabulary.
    """
    if triton:
        return row_kernels.gradient(logits, out, targets, lses, weights, first=first, **vars(how))
    columns = logits.shape[1]
    for rows in _chunks(logits):
        part, target = logits[rows], targets[rows].long()
        owned = out.data_ptr() == logits.data_ptr() and part.dtype == torch.float32
        z = _transformed(part if owned else part.to(torch.float32, copy=True), how)
        slope = _slope(z, how) if how.softcap is not None else None
        inside = (target >= first) & (target < first + columns)
        index = torch.where(inside, target - first, 0)[:, None]
        p = z.sub_(lses[rows, None]).exp_()
        coefficient = (target != how.ignore_index).float() * (how.scale / how.temperature)
        if weights is not None:
            coefficient = coefficient * weights[rows]
        _to_gradient(p, coefficient, torch.ones_like(coefficient), index, inside, slope)
        if not owned:
            out[rows] = p.to(out.dtype)
    return out


def _transformed(z: Tensor, how: Transform) -> Tensor:
    """In place."""
    if how.softcap is not None:
        return z.mul_(how.scale / how.softcap).tanh_().mul_(how.softcap / how.temperature)
    factor = how.scale / how.temperature
    return z if factor == 1.0 else z.mul_(factor)


def _to_gradient(
    p: Tensor, coefficient: Tensor, factor: Tensor, index: Tensor, inside: Tensor, slope: Tensor | None
) -> None:
    """factor p [n, V] becomes coefficient ([v = target] - factor p) slope, in place and in one pass; but for the column
    of the target, where 1 - p is taken first, as both products may be near each other."""
    of_target = inside.to(p.dtype) - factor * p.gather(1, index)[:, 0]
    p.mul_((-coefficient * factor)[:, None]).scatter_(1, index, (coefficient * of_target)[:, None])
    if slope is not None:
        p.mul_(slope)


def _slope(z: Tensor, how: Transform) -> Tensor:
    """1 - tanh^2, from z = softcap tanh(.) / temperature."""
    assert how.softcap is not None
    return z.mul(how.temperature / how.softcap).square_().neg_().add_(1.0)


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy stays within CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(i, i + size) for i in range(0, len(logits), size)]
