"""Triton kernels: advantages, by a scan from each completion's last token to its first, and PPO's clipped losses with
gradient and metrics. A program of the losses computes BLOCK tokens; the last one adds up, as in `pair_kernels`."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsalign_kernels.pair_kernels import COLUMNS, KEEP_NAN, ROWS, WARPS, _add_up, _counter, _start

BLOCK = 1024
MAX_LOG_RATIO = tl.constexpr(20.0)  # nats, either way: e^20 = 4.9e8; float32 holds no e^89, and inf x 0 is NaN


@triton.jit
def _then(decay_left, value_left, decay_right, value_right):
    """The step x -> value + decay x that does the left of two such steps first and then the right one."""
    return decay_left * decay_right, value_right + decay_right * value_left


@triton.jit
def _gae_kernel(rewards, values, lengths, advantages, means, squares, gamma, decay, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    length = tl.load(lengths + index).to(tl.int32)
    start = _start(lengths, index, BLOCK)
    gamma, decay = tl.cast(gamma, tl.float32), tl.cast(decay, tl.float32)
    carry, total = gamma * 0.0, gamma * 0.0
    for block in range(0, tl.cdiv(length, BLOCK)):
        back = block * BLOCK + tl.arange(0, BLOCK)  # tokens from the end
        at, inside = start + length - 1 - back, back < length
        value = tl.load(values + at, mask=inside, other=0.0)
        after = tl.load(values + at + 1, mask=inside & (back > 0), other=0.0)
        delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * after - value
        decays = tl.where(inside, decay, 1.0)  # beyond the first token nothing changes
        power, found = tl.associative_scan((decays, delta), 0, _then)
        found += power * carry
        tl.store(advantages + at, found, mask=inside)
        total += tl.sum(tl.where(inside, found, 0.0), 0)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, found, 0.0), 0)
    tl.debug_barrier()  # what other threads of this program wrote is read again
    mean = total / tl.maximum(length, 1)
    square = gamma * 0.0
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        gap = tl.load(advantages + start + at, mask=at < length, other=mean) - mean
        square += tl.sum(tl.where(at < length, gap * gap, 0.0), 0)
    tl.store(means + index, mean)
    tl.store(squares + index, square)


@triton.jit
def _between(x, low, high):
    """x held in [low, high]; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=KEEP_NAN), high, propagate_nan=KEEP_NAN)


@triton.jit
def _policy_kernel(
    logps, old, advantages, gradient, table, totals, done, tokens, cliprange, scale,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    advantage = tl.load(advantages + at, mask=inside, other=0.0)
    change = tl.load(logps + at, mask=inside, other=0.0) - tl.load(old + at, mask=inside, other=0.0)
    ratio = tl.exp(_between(change, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    free, clipped = -advantage * ratio, -advantage * _between(ratio, 1.0 - cliprange, 1.0 + cliprange)
    if GRADIENT:
        moves = (free >= clipped) & (tl.abs(change) <= MAX_LOG_RATIO)
        tl.store(gradient + at, tl.where(moves, scale * free, 0.0), mask=inside)
    row = table + tl.program_id(0) * COLUMNS
    tl.store(row, tl.sum(tl.maximum(free, clipped, propagate_nan=KEEP_NAN), 0))
    tl.store(row + 1, tl.sum(0.5 * change * change, 0))
    tl.store(row + 2, tl.sum(tl.where(clipped > free, 1.0, 0.0), 0))
    tl.store(row + 3, tl.sum(tl.where(inside, ratio, 0.0), 0))
    _add_up(table, totals, done, tl.num_programs(0), COLUMNS, ROWS)


@triton.jit
def _value_kernel(
    values, old, returns, segment, gradient, table, totals, done, tokens, cliprange, scale,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    completion = tl.load(segment + at, mask=inside, other=0)
    value = tl.load(values + at + completion, mask=inside, other=0.0)  # one value more a completion than tokens
    before, goal = tl.load(old + at, mask=inside, other=0.0), tl.load(returns + at, mask=inside, other=0.0)
    near = _between(value, before - cliprange, before + cliprange)
    plain, held = (value - goal) * (value - goal), (near - goal) * (near - goal)
    if GRADIENT:
        free = near == value
        slope = tl.where(held > plain, tl.where(free, near - goal, 0.0), value - goal)  # NaN stays NaN
        slope = tl.where((plain == held) & (near != value), 0.5 * (value - goal), slope)
        tl.store(gradient + at + completion, scale * slope, mask=inside)
        last = tl.load(segment + at + 1, mask=at + 1 < tokens, other=-1) != completion
        tl.store(gradient + at + completion + 1, tl.zeros([BLOCK], tl.float32), mask=inside & last)
    row = table + tl.program_id(0) * COLUMNS
    tl.store(row, tl.sum(0.5 * tl.maximum(plain, held, propagate_nan=KEEP_NAN), 0))
    tl.store(row + 1, tl.sum(tl.where(held > plain, 1.0, 0.0), 0))
    _add_up(table, totals, done, tl.num_programs(0), COLUMNS, ROWS)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `reference.Advantages`; rewards, values: [N] float32, dense; lengths: [S] int64 >= 1."""
    advantages = torch.empty_like(rewards)
    means, squares = (torch.empty(len(lengths), dtype=torch.float32, device=rewards.device) for _ in range(2))
    if len(lengths):
        _gae_kernel[(len(lengths),)](
            rewards,
            values,
            lengths,
            advantages,
            means,
            squares,
            float(gamma),
            float(gamma * lam),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return advantages, means, squares


def clipped_policy(
    logps: Tensor, old: Tensor, advantages: Tensor, cliprange: float, scale: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(totals, gradient) of a launch; inputs as for `dsalign_kernels.clipped_policy`.

    totals: [COLUMNS] float32, of which four are sums over tokens: loss without scale, half the squared change, clipped
    tokens, ratios. gradient: [N] float32, of scale x loss in logps; None unless wanted.
    """
    return _clipped(_policy_kernel, (logps, old, advantages), len(logps), len(logps), cliprange, scale, gradient)


def clipped_value(
    values: Tensor, old: Tensor, returns: Tensor, segment: Tensor, cliprange: float, scale: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(totals, gradient) of a launch; inputs as for `dsalign_kernels.clipped_value`.

    totals: [COLUMNS] float32, of which two are sums over tokens: loss without scale, clipped tokens. gradient: [N + S]
    float32, of scale x loss in values; None unless wanted.
    """
    inputs = (values, old, returns, segment)
    return _clipped(_value_kernel, inputs, len(old), len(values), cliprange, scale, gradient)


def _clipped(
    kernel: triton.JITFunction, inputs: tuple[Tensor, ...], tokens: int, size: int, cliprange: float, scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    device, programs = inputs[0].device, triton.cdiv(tokens, BLOCK)
    table = torch.empty(max(programs, 1), COLUMNS, dtype=torch.float32, device=device)
    totals = torch.empty(COLUMNS, dtype=torch.float32, device=device)
    slopes = torch.empty(size, dtype=torch.float32, device=device) if gradient else None
    if not programs:
        return totals.zero_(), None if slopes is None else slopes.zero_()
    kernel[(programs,)](
        *(x.detach().contiguous() for x in inputs), totals if slopes is None else slopes, table, totals,
        _counter(device), tokens, float(cliprange), float(scale),
        GRADIENT=gradient, BLOCK=BLOCK, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return totals, slopes
