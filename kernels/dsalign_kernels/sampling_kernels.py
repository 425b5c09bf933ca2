"""Triton kernels: a token a row of logits by Gumbel-max, and its log-probability, in one read of the logits.

A program reads SPAN columns of a row and keeps in every lane a running maximum and sum of exponentials, and the best
score with its token. A second kernel merges a row's programs. How a row is cut depends on the vocabulary alone, so that
neither a token nor the rounding of its log-probability depends on the other rows.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsalign_kernels.row_kernels import LOG2E, LOWEST, _transformed

if TYPE_CHECKING:
    from dsalign_kernels.rows import Transform

BLOCK, WARPS = 2048, 8  # columns read at a time, and the warps that read them
SPAN = 4 * BLOCK  # columns a program: 16 rows of 152064 make 304 programs, enough for every multiprocessor
NOBODY = tl.constexpr(2**31 - 1)  # above every token id
C1, C2, C3 = tl.constexpr(0xCC9E2D51), tl.constexpr(0x1B873593), tl.constexpr(0xE6546B64)  # of Murmur3
C4, C5 = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)
TO_UNIT = tl.constexpr(2.0**-32)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _mixed(word):
    """A 32-bit word as Murmur3 mixes it before it enters the state."""
    k = word * tl.cast(C1, tl.uint32)
    k = (k << 15) | (k >> 17)
    return k * tl.cast(C2, tl.uint32)


@triton.jit
def _absorbed(state, mixed):
    """Murmur3's state after one word more."""
    state = state ^ mixed
    state = (state << 13) | (state >> 19)
    return state * tl.cast(5, tl.uint32) + tl.cast(C3, tl.uint32)


@triton.jit
def _prefix(key, position):
    """The state after the words that a row's tokens share; key: int64, position: int64."""
    state = _absorbed(tl.cast(0, tl.uint32), _mixed(key.to(tl.uint32)))
    state = _absorbed(state, _mixed((key >> 32).to(tl.uint32)))
    return _absorbed(state, _mixed(position.to(tl.uint32)))


@triton.jit
def _gumbel(prefix, ids):
    """The noise of the token ids, as `sampling.gumbel` defines it."""
    h = _absorbed(prefix, _mixed(ids.to(tl.uint32))) ^ 16  # bytes hashed; then the final mix
    h = (h ^ (h >> 16)) * tl.cast(C4, tl.uint32)
    h = (h ^ (h >> 13)) * tl.cast(C5, tl.uint32)
    h = h ^ (h >> 16)
    u = tl.minimum((h.to(tl.float32) + 0.5) * TO_UNIT, BELOW_ONE)
    # -log(1 - u): for small u, which 1 - u would round, 2 atanh(u / (2 - u)).
    s = u / (2.0 - u)
    q = s * s
    series = 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    waited = tl.where(u < 0.25, 2.0 * s * (series * q + 1.0), -tl.log(1.0 - u))
    return -tl.log(waited)


@triton.jit
def _sample_kernel(
    logits, keys, positions, floors, peaks, totals, scores, choices, stride, columns, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, FILTERED: tl.constexpr, GREEDY: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, span, spans = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start_of_row = logits + tl.cast(row, tl.int64) * stride
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    prefix = _prefix(tl.load(keys + row), tl.load(positions + row))
    least = tl.load(floors + row) if FILTERED else float("-inf")
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    choice = tl.full([BLOCK], NOBODY, tl.int32)
    for start in range(span * SPAN, tl.minimum(columns, (span + 1) * SPAN), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(start_of_row + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        z = _transformed(x, scale, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:  # it would make -inf finite
            z = tl.where(x == float("-inf"), float("-inf"), z)
        score = z if GREEDY else z + _gumbel(prefix, cols)
        if FILTERED:
            score = tl.where(x >= least, score, float("-inf"))
        won = score > best  # of tokens that tie the lowest came first
        best = tl.where(won, score, best)
        choice = tl.where(won, cols, choice)
        z = tl.where(z < LOWEST, LOWEST, z)  # beyond the last column too
        up, factor = z > highest, tl.exp2(-tl.abs(z - highest) * LOG2E)
        total = tl.where(up, total * factor + 1.0, total + factor)
        highest = tl.where(up, z, highest)
    at = row * spans + span
    peak = tl.max(highest, 0)
    score = tl.max(best, 0)
    tl.store(peaks + at, peak)
    tl.store(totals + at, tl.sum(total * tl.exp2((highest - peak) * LOG2E), 0))
    tl.store(scores + at, score)
    tl.store(choices + at, tl.min(tl.where(best == score, choice, NOBODY), 0))


@triton.jit
def _merge_kernel(
    logits, peaks, totals, scores, choices, tokens, logps, stride, spans, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    span = tl.arange(0, BLOCK)
    at, inside = row * spans + span, span < spans
    highest = tl.load(peaks + at, mask=inside, other=LOWEST)
    total = tl.load(totals + at, mask=inside, other=0.0)
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    choice = tl.load(choices + at, mask=inside, other=NOBODY)
    peak, best = tl.max(highest, 0), tl.max(score, 0)
    total = tl.sum(total * tl.exp2((highest - peak) * LOG2E), 0)
    token = tl.min(tl.where(score == best, choice, NOBODY), 0)
    found = token != NOBODY
    x = tl.load(logits + tl.cast(row, tl.int64) * stride + token, mask=found, other=float("nan")).to(tl.float32)
    z = _transformed(x, tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32), HAS_SOFTCAP)
    logp = (z - peak) - tl.log(total)
    tl.store(logps + row, logp)
    tl.store(tokens + row, tl.where(logp == logp, token, 0).to(tl.int64))


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, floors: Tensor | None, how: Transform, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, logps [B] float32) of logits [B, V] whose rows are dense in memory.

    keys, positions: [B] int64. floors: [B] float32, logits below are not drawn; None = all may be. greedy: no noise.
    """
    size, device = len(logits), logits.device
    tokens = torch.empty(size, dtype=torch.int64, device=device)
    logps = torch.empty(size, dtype=torch.float32, device=device)
    if not size:
        return tokens, logps
    spans = triton.cdiv(logits.shape[1], SPAN)
    peaks, totals, scores = torch.empty(3, size, spans, dtype=torch.float32, device=device)
    choices = torch.empty(size, spans, dtype=torch.int32, device=device)
    softcap = how.softcap
    factors = (how.scale / how.temperature, 0.0 if softcap is None else softcap / how.temperature)
    _sample_kernel[(size, spans)](
        logits, keys, positions, logps if floors is None else floors, peaks, totals, scores, choices,
        logits.stride(0), logits.shape[1], *factors,
        HAS_SOFTCAP=softcap is not None, FILTERED=floors is not None, GREEDY=greedy, SPAN=SPAN, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    _merge_kernel[(size,)](
        logits, peaks, totals, scores, choices, tokens, logps, logits.stride(0), spans, *factors,
        HAS_SOFTCAP=softcap is not None, BLOCK=triton.next_power_of_2(spans), num_warps=1,
    )  # fmt: skip
    return tokens, logps
