"""Triton kernels: attention of one query token a row over a key-value cache, split along the row's tokens.

A program reads SPLIT tokens of one row and one head of the cache, for all queries that share the head, and leaves a
part of the output with its maximum and sum; a second kernel joins a row's parts. Programs beyond a row's position, or
behind its window, end at once, so the cache is read as far as it is live. How a row is cut depends on its own position
alone, so that the rounding of its output depends neither on the other rows nor on the length of the cache.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsalign_kernels.row_kernels import LOG2E, _transformed

SPLIT, WARPS = 256, 4  # tokens a program, and the warps that read them
CHUNK = 16  # parts joined at a time
# Bytes of a key at most -> tokens read at a time, and reads under way: what shared memory of 48 KiB holds.
READS = {256: (32, 3), 512: (16, 3), 1024: (16, 2), 2**31: (16, 1)}


@triton.jit
def _span(positions, row, live, window, WINDOWED: tl.constexpr):
    """(first, stop) of the tokens that a row's query sees: up to its position, which is held below `live`."""
    stop = tl.minimum(tl.load(positions + row), live - 1).to(tl.int32) + 1
    first = tl.maximum(stop - window, 0) if WINDOWED else 0
    return first, stop


@triton.jit
def _attend_kernel(
    queries, held_keys, held_values, positions, out, parts, peaks, totals,
    query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token,
    live, window, scale, softcap,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, WINDOWED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALONE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    first, stop = _span(positions, row, live, window, WINDOWED)
    start = tl.maximum(split * SPLIT, first // BLOCK * BLOCK)
    end = tl.minimum((split + 1) * SPLIT, stop)
    if start >= end:
        return
    group, width, columns = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_OUT)
    heads = head * GROUP + group
    at = queries + row * query_row + heads[:, None] * query_head + width[None, :]
    query = tl.load(at, mask=(group[:, None] < GROUP) & (width[None, :] < WIDTH), other=0.0)
    keys = held_keys + row * key_row + tl.cast(head, tl.int64) * key_head
    values = held_values + row * value_row + tl.cast(head, tl.int64) * value_head
    peak = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    found = tl.zeros([BLOCK_GROUP, BLOCK_OUT], tl.float32)
    for begin in range(start, end, BLOCK):  # each block has a token that is seen
        token = begin + tl.arange(0, BLOCK)
        of_key = keys + token[None, :] * key_token + width[:, None]
        key = tl.load(of_key, mask=(token[None, :] < end) & (width[:, None] < WIDTH), other=0.0)
        score = tl.dot(query, key, input_precision="ieee")
        score = _transformed(score, tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32), HAS_SOFTCAP)
        score = tl.where(((token >= first) & (token < end))[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2((score - higher[:, None]) * LOG2E)
        kept = tl.exp2((peak - higher) * LOG2E)
        of_value = values + token[:, None] * value_token + columns[None, :]
        value = tl.load(of_value, mask=(token[:, None] < end) & (columns[None, :] < OUT), other=0.0)
        found = found * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        peak = higher
    of_head = row * (tl.num_programs(1) * GROUP) + heads
    stored = (group[:, None] < GROUP) & (columns[None, :] < OUT)
    if ALONE:
        found = found / total[:, None]
        tl.store(out + of_head[:, None] * OUT + columns[None, :], found.to(out.dtype.element_ty), mask=stored)
    else:
        of_part = of_head * tl.num_programs(2) + split
        tl.store(parts + of_part[:, None] * OUT + columns[None, :], found, mask=stored)
        tl.store(peaks + of_part, peak, mask=group < GROUP)
        tl.store(totals + of_part, total, mask=group < GROUP)


@triton.jit
def _join_kernel(
    positions, out, parts, peaks, totals, splits, live, window,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    of_head = row * tl.num_programs(1) + tl.program_id(1)
    first, stop = _span(positions, row, live, window, WINDOWED)
    low, high = first // SPLIT, (stop - 1) // SPLIT + 1  # the parts that were written
    columns = tl.arange(0, BLOCK_OUT)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    found = tl.zeros([BLOCK_OUT], tl.float32)
    for begin in range(low // CHUNK * CHUNK, high, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        written = (split >= low) & (split < high)
        at = of_head * splits + split
        peaks_here = tl.load(peaks + at, mask=written, other=float("-inf"))
        totals_here = tl.load(totals + at, mask=written, other=0.0)
        stored = written[:, None] & (columns[None, :] < OUT)
        parts_here = tl.load(parts + at[:, None] * OUT + columns[None, :], mask=stored, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks_here, 0))
        weight, kept = tl.exp2((peaks_here - higher) * LOG2E), tl.exp2((peak - higher) * LOG2E)
        total = total * kept + tl.sum(weight * totals_here, 0)
        found = found * kept + tl.sum(weight[:, None] * parts_here, 0)
        peak = higher
    tl.store(out + of_head * OUT + columns, (found / total).to(out.dtype.element_ty), mask=columns < OUT)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`decode_attention` of tensors whose last dimension is dense in memory; positions: [B] int64, dense."""
    (size, all_heads, width), (_, heads, live, _), columns = query.shape, keys.shape, values.shape[3]
    out = torch.empty(size, all_heads, columns, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    splits = triton.cdiv(live, SPLIT)
    alone, part = splits == 1, (0,) if splits == 1 else (size, all_heads, splits)
    parts = torch.empty(*part, columns, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, *part, dtype=torch.float32, device=query.device)
    block_out, block_width = (max(16, triton.next_power_of_2(x)) for x in (columns, width))
    block, stages = next(read for most, read in READS.items() if max(block_out, block_width) * out.itemsize <= most)
    windowed = {"OUT": columns, "BLOCK_OUT": block_out, "WINDOWED": window is not None, "SPLIT": SPLIT}
    _attend_kernel[(size, heads, splits)](
        query, keys, values, positions, out, parts, peaks, totals,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], live, window or 0, scaling, softcap or 0.0,
        GROUP=all_heads // heads, BLOCK_GROUP=max(16, triton.next_power_of_2(all_heads // heads)),
        WIDTH=width, BLOCK_WIDTH=block_width, HAS_SOFTCAP=softcap is not None, ALONE=alone,
        BLOCK=block, **windowed, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    if not alone:
        _join_kernel[(size, all_heads)](
            positions, out, parts, peaks, totals, splits, live, window or 0, CHUNK=CHUNK, **windowed, num_warps=4
        )
    return out
