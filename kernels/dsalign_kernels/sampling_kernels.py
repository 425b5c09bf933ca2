"""Triton kernel of Gumbel-max sampling: one read of the logits gives their softmax statistics and the noisy maximum.

A row is split over programs, so that few rows fill a GPU too; what each finds is put together by a few small sums.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsalign_kernels.row_kernels import LOG2E, LOWEST, _transformed

BLOCK, WARPS = 4096, 8  # not tuned on a GPU yet


@triton.jit
def _turned(x, BY: tl.constexpr):
    """x turned left by BY bits."""
    return (x << BY) | (x >> (32 - BY))


@triton.jit
def _word(h, k):
    """Murmur3's state after one more word of 32 bits."""
    k = _turned(k * tl.cast(0xCC9E2D51, tl.uint32), 15) * tl.cast(0x1B873593, tl.uint32)
    return _turned(h ^ k, 13) * tl.cast(5, tl.uint32) + tl.cast(0xE6546B64, tl.uint32)


@triton.jit
def _gumbel(prefix, cols):
    """The noise of token ids `cols` in a row with this state of three words."""
    h = _word(prefix, cols.to(tl.uint32)) ^ tl.cast(16, tl.uint32)
    h = (h ^ (h >> 16)) * tl.cast(0x85EBCA6B, tl.uint32)
    h = (h ^ (h >> 13)) * tl.cast(0xC2B2AE35, tl.uint32)
    h = h ^ (h >> 16)
    u = tl.minimum((h.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    kept = 1.0 - u  # -log(1 - u) to a few roundings, also where 1 - u rounds: u log(kept) / (kept - 1)
    e = tl.where(kept == 1.0, u, u * (tl.log(kept) / tl.where(kept == 1.0, -1.0, kept - 1.0)))
    return -tl.log(e)


@triton.jit
def _sample_kernel(
    logits, keys, positions, floors, peaks, totals, bests, ids, chosen, stride, columns, scale, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    scale, softcap = tl.cast(scale, tl.float32) / temperature, tl.cast(softcap, tl.float32) / temperature
    cols = part * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    x = tl.load(logits + tl.cast(row, tl.int64) * stride + cols, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, _transformed(x, scale, softcap, HAS_SOFTCAP), float("-inf"))
    peak = tl.maximum(tl.max(z, 0), LOWEST)
    total = tl.sum(tl.exp2((z - peak) * LOG2E), 0)
    total = tl.where(tl.max((z != z).to(tl.int32), 0) > 0, float("nan"), total)
    score = z
    if not GREEDY:
        key = tl.load(keys + row)
        prefix = _word(tl.cast(0, tl.uint32), key.to(tl.uint32))
        prefix = _word(prefix, (key >> 32).to(tl.uint32))
        prefix = _word(prefix, tl.load(positions + row).to(tl.uint32))
        score = z + _gumbel(prefix, cols)
    if HAS_FLOOR:
        score = tl.where(x >= tl.load(floors + row), score, float("-inf"))
    best, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    place = row * tl.num_programs(1) + part
    tl.store(peaks + place, peak)
    tl.store(totals + place, total)
    tl.store(bests + place, best)
    tl.store(ids + place, part * BLOCK + at)
    tl.store(chosen + place, tl.sum(tl.where(cols == part * BLOCK + at, z, 0.0), 0))


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, floors: Tensor | None, *, greedy: bool, scale: float,
    softcap: float | None, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens [B] int64, log-probabilities [B] float32, nats) of logits [B, V], as in `dsalign_kernels.sample_tokens`.

    floors: [B] float32, the least logit that the filters keep; None = no filter. greedy: no noise.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    parts = triton.cdiv(columns, BLOCK)
    peaks, totals, bests, chosen = (torch.empty(rows, parts, device=logits.device) for _ in range(4))
    ids = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_kernel[(rows, parts)](
            logits, keys, positions, peaks if floors is None else floors, peaks, totals, bests, ids, chosen,
            logits.stride(0), columns, scale, softcap or 1.0, temperature,
            HAS_SOFTCAP=softcap is not None, HAS_FLOOR=floors is not None, GREEDY=greedy, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    peak = peaks.amax(1, keepdim=True)
    lse = peak[:, 0] + torch.log((totals * torch.exp(peaks - peak)).sum(1))
    part = bests.argmax(1, keepdim=True)  # the first of equals has the lowest id
    logps = chosen.gather(1, part)[:, 0] - lse
    logps = torch.where(peak[:, 0] > LOWEST.value, logps, torch.nan)
    return torch.where(logps.isnan(), 0, ids.gather(1, part)[:, 0]), logps
