"""Triton kernels: softmax statistics of rows of logits, and the gradient of the targets' log-probabilities.

The first pass over a row keeps a running maximum and a running sum of exponentials (arXiv:1805.02867) in every lane of
the block, so that nothing crosses lanes inside the loop and each element costs one exponential. The second pass, where
the gradient is wanted, writes it over the row while the row is still in the L2 cache.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-1.0e30)  # stands for -inf: differences of it stay finite
LOG2E = tl.constexpr(1.4426950408889634)
# Fixed, not tuned at run time: ranks that pick different winners diverge, and tuning in a run looks like a hang.
# kernels/tune.py measures them; an architecture without a line takes the first.
BLOCKS = {
    "other": {"read": (2048, 8), "write": (4096, 16), "gradient": (2048, 8)},
    "sm_90": {"read": (2048, 8), "write": (8192, 32), "gradient": (8192, 16)},
}


@triton.jit
def _transformed(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits of the head's output x: scale x, or softcap tanh(scale x / softcap). The caller has divided scale and
    softcap by the temperature."""
    x = x * scale
    if HAS_SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _gradient(x, lse, target, weight, cols, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """weight d logp / d x = weight ([col = target] - p) dz / dx, of some columns of a row."""
    z = _transformed(x, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2((z - lse) * LOG2E)
    grad = (tl.where(cols == target, 1.0, 0.0) - p) * (weight * scale)
    if HAS_SOFTCAP:
        ratio = z / softcap
        grad = grad * (1.0 - ratio * ratio)
    return grad


@triton.jit
def _stats_kernel(
    logits, targets, logps, lses, entropies, tops, stride, rows, columns, scale, softcap, temperature, ignore_index,
    HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, softcap = tl.cast(scale, tl.float32) / temperature, tl.cast(softcap, tl.float32) / temperature
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start_of_row = logits + tl.cast(row, tl.int64) * stride
        target = tl.load(targets + row)
        kept = target != ignore_index
        inside = (target >= 0) & (target < columns)
        x_target = tl.load(start_of_row + target, mask=inside, other=0.0).to(tl.float32)  # before any warp writes to it
        z_target = _transformed(x_target, scale, softcap, HAS_SOFTCAP)
        highest = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        below = tl.zeros([BLOCK], tl.float32)  # sum of e^(z - highest) (highest - z): terms >= 0, so nothing cancels
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            if WRITE:  # it is read again below
                x = tl.load(start_of_row + cols, mask=cols < columns, other=float("-inf"), eviction_policy="evict_last")
            else:
                x = tl.load(start_of_row + cols, mask=cols < columns, other=float("-inf"))
            z = _transformed(x.to(tl.float32), scale, softcap, HAS_SOFTCAP)
            z = tl.where(cols < columns, tl.where(z < LOWEST, LOWEST, z), LOWEST)
            up, gap = z > highest, tl.abs(z - highest)
            factor = tl.exp2(-gap * LOG2E)
            if ENTROPY:
                below = tl.where(up, (below + total * gap) * factor, below + factor * gap)
            total = tl.where(up, total * factor + 1.0, total + factor)
            highest = tl.where(up, z, highest)
        peak = tl.max(highest, 0)
        factor = tl.exp2((highest - peak) * LOG2E)
        whole = tl.sum(total * factor, 0)
        lse = peak + tl.log(whole)
        logp = tl.where(kept, tl.where(inside, z_target - lse, float("nan")), 0.0)
        tl.store(logps + row, logp)
        tl.store(lses + row, lse)
        if ENTROPY:
            tl.store(entropies + row, tl.log(whole) + tl.sum((below + total * (peak - highest)) * factor, 0) / whole)
        if TOP:
            tl.store(tops + row, (z_target >= peak) & kept & inside)
        if WRITE:
            weight = tl.where(kept, 1.0, 0.0)
            for start in range(0, columns, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                x = tl.load(start_of_row + cols, mask=cols < columns, other=0.0, eviction_policy="evict_first")
                grad = _gradient(x.to(tl.float32), lse, target, weight, cols, scale, softcap, HAS_SOFTCAP)
                grad = grad.to(logits.dtype.element_ty)
                tl.store(start_of_row + cols, grad, mask=cols < columns, eviction_policy="evict_first")


@triton.jit
def _grad_kernel(
    logits, out, targets, lses, weights, stride, out_stride, columns, first, scale, softcap, temperature, ignore_index,
    HAS_SOFTCAP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    scale, softcap = tl.cast(scale, tl.float32) / temperature, tl.cast(softcap, tl.float32) / temperature
    lse = tl.load(lses + row)
    weight = tl.load(weights + row) if HAS_WEIGHTS else 1.0
    weight = tl.where(target != ignore_index, weight, 0.0)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + cols, mask=cols < columns, other=0.0).to(tl.float32)
        grad = _gradient(x, lse, target, weight, first + cols, scale, softcap, HAS_SOFTCAP)
        tl.store(out + row * out_stride + cols, grad.to(out.dtype.element_ty), mask=cols < columns)


@cache
def _architecture(device: torch.device) -> tuple[str, int]:
    """(the key of BLOCKS, multiprocessors)."""
    if device.type != "cuda":
        return "other", 4  # the interpreter
    found = torch.cuda.get_device_properties(device)
    name = f"sm_{found.major}{found.minor}" if torch.version.hip is None else found.gcnArchName.split(":")[0]
    return name if name in BLOCKS else "other", found.multi_processor_count


def _multiprocessors(device: torch.device) -> int:
    return _architecture(device)[1]


def blocks(kind: str, device: torch.device) -> dict[str, int]:
    """A kernel's BLOCK, the columns it reads at a time, and num_warps on this device; kind: "read", "write" or
    "gradient"."""
    block, warps = BLOCKS[_architecture(device)[0]][kind]
    return {"BLOCK": block, "num_warps": warps}


def stats(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy: bool,
    top: bool,
    write: bool,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logps, log-sum-exp, entropy or None, top or None), [N] each, of logits [N, V] whose rows are dense in memory.

    targets: [N] int64. entropy, top: whether they are wanted. write: the logits are overwritten by the derivative of
    each row's log-probability in them. scale, softcap, temperature, ignore_index: as in `rows.Transform`.
    """
    size = len(logits)
    logps, lses = (torch.empty(size, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropies = torch.empty_like(logps) if entropy else None
    tops = torch.empty(size, dtype=torch.bool, device=logits.device) if top else None
    if size:
        kind = "write" if write else "read"
        # Rows that are written are in flight one a multiprocessor: so many fit into the L2 cache until the second read.
        programs = min(size, _multiprocessors(logits.device)) if write else size
        _stats_kernel[(programs,)](
            logits, targets, logps, lses, entropies if entropy else logps, tops if top else logps,
            logits.stride(0), size, logits.shape[1], scale, softcap or 0.0, temperature, ignore_index,
            HAS_SOFTCAP=softcap is not None, ENTROPY=entropy, TOP=top, WRITE=write, **blocks(kind, logits.device),
        )  # fmt: skip
    return logps, lses, entropies, tops


def gradient(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    lses: Tensor,
    weights: Tensor | None,
    *,
    first: int = 0,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """Write weights x d logp / d logits [N, C] into `out`, and return it; out may be the logits themselves.

    targets: [N] int64; lses: [N] float32, log-sum-exp of the whole rows; weights: [N] float32, 1 where None. first: the
    vocabulary index of the first column, where the logits are a slice of the vocabulary, C columns of it.
    """
    if len(logits):
        _grad_kernel[(len(logits),)](
            logits, out, targets, lses, lses if weights is None else weights,
            logits.stride(0), out.stride(0), logits.shape[1], first, scale, softcap or 0.0, temperature, ignore_index,
            HAS_SOFTCAP=softcap is not None, HAS_WEIGHTS=weights is not None,
            **blocks("gradient", logits.device),
        )  # fmt: skip
    return out
