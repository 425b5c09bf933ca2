"""The head by tiles of the vocabulary, in plain torch, for a CPU: its caches hold a tile of logits, not whole rows.

The softmax goes on from tile to tile, as in attention (arXiv:2205.14135, algorithm 1): running sums hold the terms
e^(z - peak) of the tiles so far, and are scaled down where a tile has a higher peak. The target's own term is kept
apart, so that neither 1 - p nor the Jacobian W[y] - p W is a difference of near numbers. A tile is [columns of the
vocabulary, N rows], transposed: products of few rows are fastest so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dsalign_kernels.head import Found, Kept, Operands, add_product, joined
from dsalign_kernels.rows import LOG2E, wide

TILE_BYTES = 16 * 2**20  # of logits: what a CPU's last cache holds
MOST_ROWS = 2048  # at a time, where nothing is kept: a product of more is no faster
LOWEST = -1e30  # stands for -inf: differences of it stay finite
LN2 = math.log(2.0)


def scan(
    x: Operands, *, entropy: bool, top: bool, jacobian: bool, buffer: Tensor | None, most_bytes: int
) -> tuple[Found, Kept]:
    """The forward: statistics of every row, and d logp / d hidden where `jacobian`.

    buffer: N x V elements of the states' dtype, which then hold d logp / d logits for `weight_gradient`; None: tiles go
    by in up to most_bytes, and of d logp / d logits the elements at the targets alone are kept.
    """
    size = len(x.hidden)
    step = max(1, size if buffer is not None else min(size, MOST_ROWS))
    columns = _columns(step, x, most_bytes)
    # One buffer for all tiles: the allocator of a CPU gives freed memory back, and every page is zeroed again.
    work = x.hidden.new_empty(step * columns) if buffer is None else buffer
    found, factors, own = [], [], []
    for start in range(0, max(1, size), step):
        block = _Block(x.rows(slice(start, start + step)), entropy=entropy, jacobian=jacobian)
        for first in range(0, len(x.weight), columns):
            block.add(first, columns, work if buffer is None else work[first * size :], keep=buffer is not None)
        found.append(block.found(top=top))
        own.append(block.own())
        factors.append(block.factors())
    return Found(*joined(found)), Kept(None if buffer is None else work, factors[0], torch.cat(own))


def weight_gradient(
    x: Operands, lses: Tensor, kept: Kept, g: Tensor, weight: Tensor | None, bias: Tensor | None, *, add: bool,
    most_bytes: int,
) -> None:  # fmt: skip
    """Write the gradients of sum_n g[n] logp[n] into weight [V, D] and bias [V], or with `add` add them.

    g: [N] in the dtype of lses, the loss's derivative in each log-probability; lses: [N] and kept: of `scan`. Where no
    tiles were kept they are computed again, up to most_bytes at a time. None: not wanted.
    """
    for columns, p, factor in _tiles(x, lses, kept, most_bytes):
        if weight is not None:
            add_product(p, x.hidden, g * factor, weight[columns], add=add)
        if bias is not None:
            part = p.to(g.dtype) @ (g * factor)
            bias[columns] = bias[columns] + part if add else part.to(bias.dtype)
    assert kept.own is not None
    coefficient = g * kept.own
    bounded = x.targets.long().clamp(0, len(x.weight) - 1)  # own is 0 beyond it
    targets, index = torch.unique(bounded, return_inverse=True)
    if weight is not None:
        sums = torch.zeros(len(targets), x.hidden.shape[1], dtype=g.dtype, device=g.device)
        sums.index_add_(0, index, x.hidden * coefficient[:, None])
        weight.index_add_(0, targets, sums.to(weight.dtype))
    if bias is not None:
        one = torch.zeros(len(targets), dtype=g.dtype, device=g.device).index_add_(0, index, coefficient)
        bias.index_add_(0, targets, one.to(bias.dtype))


def _columns(size: int, x: Operands, most_bytes: int) -> int:
    """How many columns of the vocabulary a tile of `size` rows has: a multiple of 64 where there are so many."""
    most = min(most_bytes, TILE_BYTES * max(1, size // MOST_ROWS))
    fit = max(1, most // (max(1, size) * wide(x.hidden.dtype).itemsize))
    return min(len(x.weight), fit - fit % 64 if fit > 64 else fit)


def _tiles(x: Operands, lses: Tensor, kept: Kept, most_bytes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(columns of the vocabulary, p [columns, N], factor [N]) of each tile: d logp / d logits is p times factor, but
    for the elements at the targets, which are 0 in p."""
    size, vocabulary = len(x.hidden), len(x.weight)
    step = _columns(size, x, most_bytes)
    block = None if kept.tiles is not None else _Block(x, entropy=False, jacobian=True)
    work = x.hidden.new_empty(size * step) if kept.tiles is None else kept.tiles
    for i, first in enumerate(range(0, vocabulary, step)):
        columns = slice(first, min(first + step, vocabulary))
        if block is None:
            assert kept.factors is not None
            tile = work[first * size : columns.stop * size].view(columns.stop - first, size)
            yield columns, tile, kept.factors[i]
        else:
            yield columns, block.again(columns, lses, work), block.coefficient


def _without_own(p: Tensor, here: Tensor, index: Tensor) -> Tensor:
    """Set p [columns, n] to 0, in place, at the targets that lie in the tile; here, index: of `_Block._own`."""
    return p.scatter_(0, index, torch.where(here, 0.0, p.gather(0, index)[0])[None])


class _Block:
    """A block of n rows, and their running softmax sums over the tiles so far.

    Logits are in units of log 2, as torch's 2^x is several times faster than its e^x. Per row: peak, the largest logit
    so far; picked, the target's logit; rest, the sum of 2^(z - peak) and below, that of 2^(z - peak) (peak - z) for the
    entropy, both without the target's own term; mean [n, D], the sum of 2^(z - peak) W[v] for the Jacobian.
    """

    def __init__(self, x: Operands, *, entropy: bool, jacobian: bool) -> None:
        self.x, self.dtype, self.kind = x, x.hidden.dtype, wide(x.hidden.dtype)
        how, self.targets = x.how, x.targets.long()
        # What multiplies the head's output is cheaper on its input; in 16 bits that would be one more rounding.
        self.factor = how.scale / how.temperature * LOG2E if how.softcap is None else how.scale / how.softcap
        self.folded = self.dtype == self.kind
        self.states = (x.hidden * self.factor if self.folded else x.hidden).t()
        self.inside = (self.targets >= 0) & (self.targets < len(x.weight))
        self.valid = self.targets != how.ignore_index
        self.coefficient = self.valid * torch.tensor(-how.scale / how.temperature, dtype=self.kind)
        self.peak = x.hidden.new_full((len(x.hidden),), LOWEST, dtype=self.kind)
        self.rest, self.picked = torch.zeros_like(self.peak), torch.zeros_like(self.peak)
        self.below = torch.zeros_like(self.peak) if entropy else None  # sum of 2^(z - peak) (peak - z): terms >= 0
        self.slope = torch.ones_like(self.peak)  # of the softcap, at the target
        self.mean = torch.zeros(x.hidden.shape, dtype=self.kind, device=x.hidden.device) if jacobian else None
        self.peaks: list[Tensor] = []  # of each tile, as its terms were written

    def add(self, first: int, columns: int, work: Tensor, *, keep: bool) -> None:
        """Take in the tile of up to `columns` columns that begins at `first`. Its logits are computed in the first
        elements of `work`; with `keep` these hold its terms 2^(z - peak) afterwards."""
        weight, z = self._logits(slice(first, first + columns), work)
        here, index = self._own(first, len(weight))
        slopes = self._capped(z, here, index if self.mean is not None or keep else None)
        self.picked = torch.where(here, z.gather(0, index)[0], self.picked)
        peak = torch.maximum(self.peak, z.amax(0))
        rise = peak - self.peak
        shrink = rise.neg().exp2_()
        gaps = z.sub_(peak)
        depths = gaps.clone() if self.below is not None else None
        p = _without_own(gaps.exp2_(), here, index)
        if self.below is not None and depths is not None:
            self.below = (self.below + self.rest * rise) * shrink - depths.mul_(p).sum(0)
        self.rest = self.rest * shrink + p.sum(0)
        self.peak = peak
        if slopes is not None:
            p.mul_(slopes)
        if p.dtype != self.dtype and (keep or self.mean is not None):
            p = work[: p.numel()].view(p.shape).copy_(p)
        if keep:
            self.peaks.append(peak)
        if self.mean is not None:
            self.mean.mul_(shrink[:, None])
            if self.folded:
                self.mean.addmm_(p.t(), weight)
            else:
                self.mean.add_(torch.mm(p.t(), weight))

    def again(self, columns: slice, lses: Tensor, work: Tensor) -> Tensor:
        """The probabilities p [columns, N] of a tile, computed once more, 0 at the targets; lses: [N], of `found`."""
        weight, z = self._logits(columns, work)
        here, index = self._own(columns.start, len(weight))
        slopes = self._capped(z, here, index)
        p = _without_own(z.sub_(lses * LOG2E).exp2_(), here, index)
        return (p if slopes is None else p.mul_(slopes)).to(self.dtype)

    def _logits(self, columns: slice, work: Tensor) -> tuple[Tensor, Tensor]:
        """(the tile's rows of the weight, the head's output [columns, n], of which the softcap or softmax is taken)."""
        weight, bias = self.x.weight[columns], self.x.bias
        out = work[: len(weight) * self.states.shape[1]].view(len(weight), self.states.shape[1])
        if bias is None:
            torch.mm(weight, self.states, out=out)
        else:
            part = bias[columns, None]
            torch.addmm(part * self.factor if self.folded else part, weight, self.states, out=out)  # rounded once
        return weight, out if self.folded else out.to(self.kind).mul_(self.factor)

    def _own(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """(whether each row's target lies in the tile [n] bool, its place there [1, n], 0 where it does not)."""
        here = (self.targets >= first) & (self.targets < first + size)
        return here, torch.where(here, self.targets - first, 0)[None]

    def _capped(self, z: Tensor, here: Tensor, index: Tensor | None) -> Tensor | None:
        """Apply the model's softcap, if it has one, to z in place; gives its derivatives [columns, n] where an index is
        given, else None."""
        softcap, slopes = self.x.how.softcap, None
        if softcap is None:
            return None
        z.tanh_()
        if index is not None:
            slopes = z.square().neg_().add_(1.0)
            self.slope = torch.where(here, slopes.gather(0, index)[0], self.slope)
        z.mul_(softcap / self.x.how.temperature * LOG2E)
        return slopes

    def _total(self) -> tuple[Tensor, Tensor]:
        """(the target's own term 2^(picked - peak), the sum of all terms), [n] each."""
        own = torch.where(self.inside, (self.picked - self.peak).exp2(), 0.0)
        return own, self.rest + own

    def factors(self) -> Tensor | None:
        """What the terms of each of the T kept tiles are to be multiplied by, [T, n]: each was written with the peak of
        its time. None where no tiles were kept."""
        if not self.peaks:
            return None
        return (torch.stack(self.peaks) - self.peak).exp2_() * (self.coefficient / self._total()[1])

    def own(self) -> Tensor:
        """d logp / d x at the target, [n]: scale / temperature (1 - p) times the softcap's slope."""
        return -self.coefficient * self.inside * self.slope * self.rest / self._total()[1]

    def found(self, *, top: bool) -> Found:
        """The statistics of the block's rows, after the last tile."""
        own, total = self._total()
        # Relative to the peak both terms are small: less is rounded away than in z - lse.
        logps = (self.picked - self.peak) * LN2 - total.log()
        logps = torch.where(self.valid, torch.where(self.inside, logps, torch.nan), 0.0)
        entropies = None
        if self.below is not None:
            entropies = total.log() + LN2 * (self.below + own * (self.peak - self.picked)) / total
        tops = (self.picked >= self.peak) & self.valid & self.inside if top else None
        jacobian = None
        if self.mean is not None:  # (1 - p_y) slope_y W[y] - sum over the others of p_v slope_v W[v]
            of_target = self.x.weight[torch.where(self.inside, self.targets, 0)]
            self.mean.mul_((self.coefficient / total)[:, None]).addcmul_(of_target, self.own()[:, None])
            jacobian = self.mean.to(self.dtype)
        return Found(logps, self.peak * LN2 + total.log(), entropies, tops, jacobian)
