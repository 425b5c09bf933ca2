"""Triton kernels: preference losses from token log-probabilities, with their gradient and metrics, in one launch.

A program computes a pair, or a labelled completion, and writes its numbers to its row of a table. The program that
finishes last adds the rows up in their order: the sums do not depend on which program was fastest, and nothing is
copied to the host.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from dsalign_kernels.preference import Recipe

BLOCK, WARPS = 1024, 4  # tokens that a program reads at a time, and its warps
ROWS = 16  # pairs added up at a time, by the last program
COLUMNS = 16  # numbers of a pair: the least power of two that holds them
# Formulas and papers stand in dsalign/contract/preference_losses.py; sigmoid_norm with a margin is SimPO's
# (arXiv:2405.14734, eq. 6), odds_ratio ORPO's (arXiv:2403.07691, eq. 7).
LOSSES = (
    "none", "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "sigmoid_norm", "discopop", "odds_ratio",
)  # fmt: skip
LABEL_LOSSES = ("kto",)
MOST_LOSSES = 3  # that a recipe adds up
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)  # a minimum or maximum of NaN and a number would else be the number
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")

_done: dict[tuple[torch.device, int], Tensor] = {}  # programs that have finished; the last one makes it 0 again


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [-1/2, 1]: 2 atanh(x / (2 + x)), whose series needs no logarithm near 1."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 17.0
    series = series * q + 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _logsigmoid(x):
    """log(1 / (1 + e^-x))."""
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log1mexp(x):
    """log(1 - e^x) for x < 0: near 0 from the series of e^x - 1, which does not cancel (Maechler 2012)."""
    near = tl.maximum(x, -0.6931472)
    series = 1.0 / 10.0
    series = series * near + 1.0
    series = series * near / 9.0 + 1.0
    series = series * near / 8.0 + 1.0
    series = series * near / 7.0 + 1.0
    series = series * near / 6.0 + 1.0
    series = series * near / 5.0 + 1.0
    series = series * near / 4.0 + 1.0
    series = series * near / 3.0 + 1.0
    series = series * near / 2.0 + 1.0
    return tl.where(x > -0.6931472, tl.log(-near * series), _log1p(-tl.exp(tl.minimum(x, -0.6931472))))


@triton.jit
def _smoothed(z, eps):
    """(loss, d loss / dz) of -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)."""
    loss = -(1.0 - eps) * _logsigmoid(z) - eps * _logsigmoid(-z)
    return loss, tl.sigmoid(z) - (1.0 - eps)


@triton.jit
def _loss(c, r, mc, mr, beta, eps, gamma, tau, LOSS: tl.constexpr):
    """(loss of a pair, its derivatives in c, r, mc and mr); LOSS: an index of LOSSES, whose comment has sources.
    c, r: Delta of chosen and rejected completion, nats, or its f-divergence; mc, mr: Delta a token."""
    zero = c * 0.0
    loss, dc, dr, dmc, dmr = zero, zero, zero, zero, zero
    z, a, b = beta * (c - r), beta * c, beta * r
    if LOSS == 1:  # sigmoid
        loss, dz = _smoothed(z, eps)
        dc, dr = beta * dz, -beta * dz
    elif LOSS == 2:  # hinge
        loss = tl.maximum(1.0 - z, 0.0, propagate_nan=KEEP_NAN)
        dz = tl.where(z < 1.0, -beta, 0.0)
        dc, dr = dz, -dz
    elif LOSS == 3:  # ipo
        gap = mc - mr - 0.5 / beta
        loss, dmc, dmr = gap * gap, 2.0 * gap, -2.0 * gap
    elif LOSS == 4:  # exo_pair
        first, second = _log1p(-eps), tl.log(eps)
        p, q = tl.sigmoid(z), tl.sigmoid(-z)
        loss = p * (_logsigmoid(z) - first) + q * (_logsigmoid(-z) - second)
        dz = beta * p * q * (z - first + second)
        dc, dr = dz, -dz
    elif LOSS == 5:  # nca_pair
        loss = -_logsigmoid(a) - 0.5 * _logsigmoid(-a) - 0.5 * _logsigmoid(-b)
        dc, dr = beta * (0.5 * tl.sigmoid(a) - tl.sigmoid(-a)), beta * 0.5 * tl.sigmoid(b)
    elif LOSS == 6:  # robust
        loss = (-(1.0 - eps) * _logsigmoid(z) + eps * _logsigmoid(-z)) / (1.0 - 2.0 * eps)
        dz = -beta * ((1.0 - eps) * tl.sigmoid(-z) + eps * tl.sigmoid(z)) / (1.0 - 2.0 * eps)
        dc, dr = dz, -dz
    elif LOSS == 7:  # bco_pair
        loss = -_logsigmoid(a) - _logsigmoid(-b)
        dc, dr = -beta * tl.sigmoid(-a), beta * tl.sigmoid(b)
    elif LOSS == 8:  # sppo_hard
        up, down = c - 0.5 / beta, r + 0.5 / beta
        loss, dc, dr = up * up + down * down, 2.0 * up, 2.0 * down
    elif LOSS == 9:  # apo_zero
        loss = tl.sigmoid(-a) + tl.sigmoid(b)
        dc, dr = -beta * tl.sigmoid(a) * tl.sigmoid(-a), beta * tl.sigmoid(b) * tl.sigmoid(-b)
    elif LOSS == 10:  # apo_down
        loss = tl.sigmoid(a) + tl.sigmoid(-z)
        slope = beta * tl.sigmoid(z) * tl.sigmoid(-z)
        dc, dr = beta * tl.sigmoid(a) * tl.sigmoid(-a) - slope, slope
    elif LOSS == 11:  # sigmoid_norm
        loss, dz = _smoothed(beta * (mc - mr) - gamma, eps)
        dmc, dmr = beta * dz, -beta * dz
    elif LOSS == 12:  # discopop
        share, rest = tl.sigmoid(z / tau), tl.sigmoid(-z / tau)
        tail = tl.exp(-z + _logsigmoid(z / tau))
        loss = -rest * _logsigmoid(z) + tail
        dz = beta * (share * rest / tau * _logsigmoid(z) - rest * tl.sigmoid(-z) + tail * (rest / tau - 1.0))
        dc, dr = dz, -dz
    elif LOSS == 13:  # odds_ratio
        odds_c, slope_c = _log_odds(mc)
        odds_r, slope_r = _log_odds(mr)
        loss = -_logsigmoid(odds_c - odds_r)
        dz = -tl.sigmoid(odds_r - odds_c)
        dmc, dmr = dz * slope_c, -dz * slope_r
    return loss, dc, dr, dmc, dmr


@triton.jit
def _log_odds(mean):
    """(log(e^a / (1 - e^a)), its derivative in mean), a = min(mean, -2^-24): a mean of 0 has infinite odds."""
    a = tl.minimum(mean, -5.9604644775390625e-08, propagate_nan=KEEP_NAN)
    rest = _log1mexp(a)
    return a - rest, tl.where(mean <= -5.9604644775390625e-08, tl.exp(-rest), 0.0)


@triton.jit
def _diverged(x, alpha, DIVERGENCE: tl.constexpr):
    """(what an f-divergence puts in the place of Delta = x, its derivative in x); arXiv:2309.16240. Exponents are held
    at 80, where e^x still fits float32."""
    value, slope = x, x * 0.0 + 1.0
    if DIVERGENCE == 1:  # forward_kl
        power = tl.exp(tl.minimum(-x, 80.0, propagate_nan=KEEP_NAN))
        value, slope = -power, tl.where(-x <= 80.0, power, 0.0)
    elif DIVERGENCE == 2:  # js
        value, slope = _logsigmoid(x), tl.sigmoid(-x)
    elif DIVERGENCE == 3:  # alpha
        power = tl.exp(tl.minimum((alpha - 1.0) * x, 80.0, propagate_nan=KEEP_NAN))
        value, slope = power / (alpha - 1.0), tl.where((alpha - 1.0) * x <= 80.0, power, 0.0)
    return value, slope


@triton.jit
def _start(lengths, index, BLOCK: tl.constexpr):
    """The position of completion `index`'s first token: the lengths of all completions before it, added up."""
    found = tl.zeros([BLOCK], tl.int64)
    for first in range(0, index, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += tl.load(lengths + at, mask=at < index, other=0).to(tl.int64)
    return tl.sum(found, 0)


@triton.jit
def _sums(logps, reference, start, length, shorter, HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr):
    """Four sums over a completion's tokens: log-probabilities of the first `shorter` tokens and of the rest, then
    log-ratios to the reference of the first `shorter` and of the rest."""
    head, tail = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    ratio_head, ratio_tail = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logps + start + at, mask=at < length, other=0.0)
        head += tl.where(at < shorter, x, 0.0)
        tail += tl.where(at < shorter, 0.0, x)
        if HAS_REFERENCE:
            x -= tl.load(reference + start + at, mask=at < length, other=0.0)
        ratio_head += tl.where(at < shorter, x, 0.0)
        ratio_tail += tl.where(at < shorter, 0.0, x)
    return tl.sum(head, 0), tl.sum(tail, 0), tl.sum(ratio_head, 0), tl.sum(ratio_tail, 0)


@triton.jit
def _fill(gradient, start, length, shorter, head, tail, plain, BLOCK: tl.constexpr):
    """Write a completion's gradient: head + plain at the first `shorter` tokens, tail + plain at the rest."""
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(gradient + start + at, tl.where(at < shorter, head, tail) + plain, mask=at < length)


@triton.jit
def _add_up(table, totals, done, programs, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The program that finishes last writes the sums of the table [programs, COLUMNS] to totals [COLUMNS]. done: int32,
    how many programs have finished; it is 0 again afterwards."""
    tl.debug_barrier()  # all of this program's row is written
    if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
        column = tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, programs, ROWS):
            row = first + tl.arange(0, ROWS)
            at = row[:, None] * COLUMNS + column[None, :]
            total += tl.load(table + at, mask=row[:, None] < programs, other=0.0, cache_modifier=".cg")
        tl.store(totals + column, tl.sum(total, 0))
        tl.atomic_xchg(done, 0)


@triton.jit
def _pair_kernel(
    logps, reference, lengths, gradient, table, totals, sums, done,
    beta, eps, gamma, tau, alpha, tail_weight, weight0, weight1, weight2, scale, nll_scale,
    LOSS0: tl.constexpr, LOSS1: tl.constexpr, LOSS2: tl.constexpr, DIVERGENCE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr, MEAN_REWARDS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    beta, tail_weight = tl.cast(beta, tl.float32), tl.cast(tail_weight, tl.float32)
    eps, gamma, tau, alpha = (
        tl.cast(eps, tl.float32), tl.cast(gamma, tl.float32), tl.cast(tau, tl.float32), tl.cast(alpha, tl.float32)
    )  # fmt: skip
    n_c, n_r = tl.load(lengths + 2 * pair).to(tl.int32), tl.load(lengths + 2 * pair + 1).to(tl.int32)
    start = _start(lengths, 2 * pair, BLOCK)
    shorter = tl.minimum(n_c, n_r)
    head_c, rest_c, ratio_c, ratio_rest_c = _sums(logps, reference, start, n_c, shorter, HAS_REFERENCE, BLOCK)
    head_r, rest_r, ratio_r, ratio_rest_r = _sums(logps, reference, start + n_c, n_r, shorter, HAS_REFERENCE, BLOCK)
    logp_c, logp_r = head_c + rest_c, head_r + rest_r
    delta_c, delta_r = ratio_c + tail_weight * ratio_rest_c, ratio_r + tail_weight * ratio_rest_r
    c, slope_c = _diverged(delta_c, alpha, DIVERGENCE)
    r, slope_r = _diverged(delta_r, alpha, DIVERGENCE)
    mc, mr = delta_c / n_c, delta_r / n_r
    loss, dc, dr, dmc, dmr = _loss(c, r, mc, mr, beta, eps, gamma, tau, LOSS0)
    loss, dc, dr, dmc, dmr = weight0 * loss, weight0 * dc, weight0 * dr, weight0 * dmc, weight0 * dmr
    if LOSS1:
        more, ec, er, emc, emr = _loss(c, r, mc, mr, beta, eps, gamma, tau, LOSS1)
        loss, dc, dr = loss + weight1 * more, dc + weight1 * ec, dr + weight1 * er
        dmc, dmr = dmc + weight1 * emc, dmr + weight1 * emr
    if LOSS2:
        more, ec, er, emc, emr = _loss(c, r, mc, mr, beta, eps, gamma, tau, LOSS2)
        loss, dc, dr = loss + weight2 * more, dc + weight2 * ec, dr + weight2 * er
        dmc, dmr = dmc + weight2 * emc, dmr + weight2 * emr
    if GRADIENT:
        g_c, g_r = scale * (dc * slope_c + dmc / n_c), scale * (dr * slope_r + dmr / n_r)
        _fill(gradient, start, n_c, shorter, g_c, tail_weight * g_c, -nll_scale, BLOCK)
        _fill(gradient, start + n_c, n_r, shorter, g_r, tail_weight * g_r, 0.0, BLOCK)
    tl.store(sums + 2 * pair, logp_c)
    tl.store(sums + 2 * pair + 1, logp_r)
    reward_c, reward_r = beta * (mc if MEAN_REWARDS else delta_c), beta * (mr if MEAN_REWARDS else delta_r)
    row = table + pair * COLUMNS
    tl.store(row, scale * loss - nll_scale * logp_c)
    tl.store(row + 1, reward_c)
    tl.store(row + 2, reward_r)
    tl.store(row + 3, tl.where(reward_c > reward_r, 1.0, 0.0))
    tl.store(row + 4, reward_c - reward_r)
    tl.store(row + 5, logp_c)
    tl.store(row + 6, logp_r)
    tl.store(row + 7, logp_c / n_c)
    tl.store(row + 8, logp_r / n_r)
    if LOSS0 == 13:
        odds_c, _ = _log_odds(mc)
        odds_r, _ = _log_odds(mr)
        tl.store(row + 9, _logsigmoid(odds_c - odds_r))
        tl.store(row + 10, odds_c - odds_r)
    _add_up(table, totals, done, tl.num_programs(0), COLUMNS, ROWS)


@triton.jit
def _label_kernel(
    logps, reference, lengths, desirable, gradient, table, totals, sums, done,
    beta, desirable_weight, undesirable_weight, z0, scale,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    length = tl.load(lengths + index).to(tl.int32)
    start = _start(lengths, index, BLOCK)
    logp, _, delta, _ = _sums(logps, reference, start, length, length, True, BLOCK)
    good = tl.load(desirable + index).to(tl.int1)
    sign, weight = tl.where(good, 1.0, -1.0), tl.where(good, desirable_weight, undesirable_weight)
    z = sign * beta * (delta - z0)
    if GRADIENT:
        g = -scale * weight * sign * beta * tl.sigmoid(z) * tl.sigmoid(-z)
        _fill(gradient, start, length, length, g, g, 0.0, BLOCK)
    tl.store(sums + index, logp)
    row = table + index * COLUMNS
    tl.store(row, scale * weight * tl.sigmoid(-z))
    tl.store(row + 1, tl.where(good, beta * delta, 0.0))
    tl.store(row + 2, tl.where(good, 0.0, beta * delta))
    tl.store(row + 3, tl.where(good, logp, 0.0))
    tl.store(row + 4, tl.where(good, 0.0, logp))
    tl.store(row + 5, tl.where(good, 1.0, 0.0))
    _add_up(table, totals, done, tl.num_programs(0), COLUMNS, ROWS)


def preference(
    logps: Tensor,
    reference: Tensor | None,
    lengths: Tensor,
    recipe: Recipe,
    desirable: Tensor | None,
    scale: float,
    nll_scale: float,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(totals, sums, gradient) of a launch; inputs as for `dsalign_kernels.preference`, dense and on one device.

    totals: [COLUMNS] float32, the loss and the metrics in the order of `preference.PAIRED` or `LABELLED`. sums: [S]
    float32, each completion's log-probability. gradient: [N] float32, of the loss in logps; None unless wanted.
    """
    programs = len(lengths) // (2 if desirable is None else 1)
    table = torch.empty(max(programs, 1), COLUMNS, dtype=torch.float32, device=logps.device)
    totals = torch.empty(COLUMNS, dtype=torch.float32, device=logps.device)
    sums = torch.empty(len(lengths), dtype=torch.float32, device=logps.device)
    slopes = torch.empty_like(logps) if gradient else None
    if not programs:
        return totals.zero_(), sums, slopes
    fixed = {"GRADIENT": gradient, "BLOCK": BLOCK, "COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": WARPS}
    out = (logps if slopes is None else slopes, table, totals, sums, _counter(logps.device))
    if desirable is not None:
        _label_kernel[(programs,)](
            logps, reference, lengths, desirable, *out,
            *map(float, (recipe.beta, recipe.desirable_weight, recipe.undesirable_weight, recipe.z0, scale)), **fixed,
        )  # fmt: skip
        return totals, sums, slopes
    names = [name for name in recipe.losses if name != "none"]
    codes = [LOSSES.index(name) for name in names] + [0] * (MOST_LOSSES - len(names))
    weights = [float(recipe.losses[name]) for name in names] + [0.0] * (MOST_LOSSES - len(names))
    _pair_kernel[(programs,)](
        logps, logps if reference is None else reference, lengths, *out,
        *map(float, (recipe.beta, recipe.label_smoothing, recipe.gamma, recipe.tau, recipe.alpha, recipe.tail)),
        *map(float, (*weights, scale, nll_scale)),
        LOSS0=codes[0], LOSS1=codes[1], LOSS2=codes[2],
        DIVERGENCE=0 if recipe.alpha == 1 and recipe.divergence == "alpha" else DIVERGENCES.index(recipe.divergence),
        HAS_REFERENCE=reference is not None, MEAN_REWARDS=recipe.mean_rewards, **fixed,
    )  # fmt: skip
    return totals, sums, slopes


def _counter(device: torch.device) -> Tensor:
    """The count of finished programs, 0 between launches: one a stream, as a stream's launches follow each other."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _done:
        _done[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _done[device, stream]
