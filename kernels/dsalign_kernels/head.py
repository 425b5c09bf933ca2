"""What both implementations of the head, `by_rows` for a GPU and `by_tiles` for a CPU, take, give and keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsalign_kernels.rows import Transform


@dataclass(frozen=True)
class Operands:
    """The inputs of the head: hidden states [N, D], weight [V, D], bias [V] or None, target token ids [N] int64, and
    how the product becomes logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    how: Transform

    def rows(self, part: slice) -> Operands:
        """The same head over some of the N rows."""
        return Operands(self.hidden[part], self.weight, self.bias, self.targets[part], self.how)


class Found(NamedTuple):
    """What a forward through the head computes: the fields of `Logps`, [N] each, entropies and tops None unless asked
    for; jacobian: d logp / d hidden, [N, D] in the dtype of the states, None where they need no gradient."""

    logps: Tensor
    lses: Tensor
    entropies: Tensor | None
    tops: Tensor | None
    jacobian: Tensor | None


class Kept(NamedTuple):
    """What a forward keeps of d logp / d logits [N, V] for the weight's gradient.

    tiles: its N x V elements, in the layout of the implementation; None where the backward computes them again from the
    hidden states. Of `by_tiles` alone: factors [T, N], what the rows of each of T tiles are still to be multiplied by;
    own [N], the element at each row's target, which the tiles leave out.
    """

    tiles: Tensor | None
    factors: Tensor | None = None
    own: Tensor | None = None


def joined(parts: Sequence[Sequence[Tensor | None]]) -> Iterator[Any]:
    """Each field's tensors of consecutive parts of the rows, concatenated to one of all rows; None stays None."""
    return (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))


def chunk_rows(vocabulary: int, itemsize: int, head_bytes: int) -> int:
    """How many rows of logits, itemsize bytes each element, fit into head_bytes: at least 1, and a multiple of 128
    where more than 128 fit, as matrix products are fastest so."""
    fit = max(1, head_bytes // (vocabulary * itemsize))
    return fit - fit % 128 if fit > 128 else fit


def by_row(x: Tensor, g: Tensor) -> Tensor:
    """Row i of x [N, D] times g[i], computed in the dtype of g [N] and rounded once to that of x."""
    return torch.mul(x, g[:, None], out=torch.empty_like(x))


def add_product(a: Tensor, states: Tensor, g: Tensor, out: Tensor, *, add: bool) -> None:
    """Write sum_n a[:, n] g[n] states[n] into out [C, D], or with `add` add it, without rounding to 16 bits first.

    a: [C, N], some columns of d logp / d logits, transposed; g: [N] float32, the loss's derivative in each
    log-probability; states: [N, D]. In float16 g is divided by its largest number, so that small ones don't vanish, and
    the product multiplied by it again.
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
