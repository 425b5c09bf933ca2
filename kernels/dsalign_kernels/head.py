"""What both ways through the head share: its operands, what is found, and what is kept for the weight's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsalign_kernels.rows import Transform


@dataclass(frozen=True)
class Operands:
    """hidden [N, D], weight [V, D], bias [V] or None, targets [N], and what lies between the product and the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    how: Transform

    def rows(self, part: slice) -> Operands:
        """Those of some rows."""
        return Operands(self.hidden[part], self.weight, self.bias, self.targets[part], self.how)


class Found(NamedTuple):
    """logps, log-sum-exp, entropy or None, top or None: all [N]. jacobian: d logp / d hidden [N, D], or None."""

    logps: Tensor
    lses: Tensor
    entropies: Tensor | None
    tops: Tensor | None
    jacobian: Tensor | None


class Kept(NamedTuple):
    """d logp / d logits for the weight's gradient, as each way writes it; tiles None: computed again from the states.

    tiles: N x V elements. factors [T, N]: what multiplies the rows of each tile. own [N]: the gradient at the target.
    """

    tiles: Tensor | None
    factors: Tensor | None = None
    own: Tensor | None = None


def joined(parts: Sequence[Sequence[Tensor | None]]) -> Iterator[Any]:
    """Each field of some parts of the rows, of all rows; None where it was not asked for."""
    return (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))


def chunk_rows(vocabulary: int, itemsize: int, head_bytes: int) -> int:
    """Rows of logits in one chunk: a multiple of 128 where there are so many."""
    fit = max(1, head_bytes // (vocabulary * itemsize))
    return fit - fit % 128 if fit > 128 else fit


def by_row(x: Tensor, g: Tensor) -> Tensor:
    """x [N, D] times g [N], computed in the dtype of g and rounded once to that of x."""
    return torch.mul(x, g[:, None], out=torch.empty_like(x))


def add_product(a: Tensor, states: Tensor, g: Tensor, out: Tensor, *, add: bool) -> None:
    """a [C, N] x (g [N] states [N, D]) into out [C, D], or added to it without rounding to 16 bits first.

    Float16 holds g divided by its largest number; the product is multiplied with it again.
    """
    largest = None
    if states.dtype == torch.float16 and len(g):
        largest = g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    scaled = by_row(states, g if largest is None else g / largest)
    if not add:
        torch.mm(a, scaled, out=out)
        if largest is not None:
            out.mul_(largest)
    elif a.is_cuda and a.dtype == torch.bfloat16:
        torch.addmm(out, a, scaled, out_dtype=torch.float32, out=out)
    else:
        scaled = scaled.to(out.dtype)
        out.addmm_(a.to(out.dtype), scaled if largest is None else scaled.mul_(largest))
