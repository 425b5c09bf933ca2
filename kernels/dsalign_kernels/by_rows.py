"""The head by chunks of whole rows of logits, for a GPU: a matrix product makes a chunk's logits, one kernel reads them
and writes their gradient over them. No more than a chunk is in memory, unless all N x V elements are kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsalign_kernels import row_kernels
from dsalign_kernels.head import Found, Kept, Operands, add_product, chunk_rows, joined


def scan(
    x: Operands, *, entropy: bool, top: bool, jacobian: bool, buffer: Tensor | None, most_bytes: int
) -> tuple[Found, Kept]:
    """The forward: statistics of every row, and d logp / d hidden where `jacobian`.

    buffer: N x V elements of the states' dtype, which then hold d logp / d logits for `weight_gradient`; None: the rows
    go by in chunks of up to most_bytes of logits, and nothing is kept.
    """
    size, vocabulary = len(x.hidden), len(x.weight)
    step = max(1, chunk_rows(vocabulary, x.hidden.element_size(), most_bytes) if buffer is None else size)
    work = (x.hidden.new_empty(min(size, step) * vocabulary) if buffer is None else buffer).view(-1, vocabulary)
    made = torch.empty_like(x.hidden) if jacobian else None
    found = []
    for start in range(0, max(size, 1), step):
        part = x.rows(slice(start, start + step))
        logits = _product(part.hidden, x.weight, x.bias, work[: len(part.hidden)])
        write = jacobian or buffer is not None
        found.append(row_kernels.stats(logits, part.targets, entropy=entropy, top=top, write=write, **vars(x.how)))
        if made is not None:
            torch.mm(logits, x.weight, out=made[start : start + step])
    logps, lses, entropies, tops = joined(found)
    return Found(logps, lses, entropies, tops, made), Kept(None if buffer is None else work[:size])


def weight_gradient(
    x: Operands, lses: Tensor, kept: Kept, g: Tensor, weight: Tensor | None, bias: Tensor | None, *, add: bool,
    most_bytes: int,
) -> None:  # fmt: skip
    """Write the gradients of sum_n g[n] logp[n] into weight [V, D] and bias [V], or with `add` add them.

    g: [N] float32, the loss's derivative in each log-probability; lses: [N] float32 and kept: of `scan`. Where nothing
    was kept, logits are computed again, a slice of the vocabulary of up to most_bytes at a time. None: not wanted.
    """
    for columns, bracket in _brackets(x, lses, kept.tiles, most_bytes):
        if weight is not None:
            add_product(bracket.t(), x.hidden, g, weight[columns], add=add)
        if bias is not None:
            part = bracket.t().float() @ g
            bias[columns] = bias[columns] + part if add else part.to(bias.dtype)


def _brackets(x: Operands, lses: Tensor, kept: Tensor | None, most_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the vocabulary, d logp / d logits [N, columns]): the whole vocabulary where it was kept, else slice
    after slice."""
    if kept is not None:
        yield slice(0, len(x.weight)), kept
        return
    size = len(x.hidden)
    step = chunk_rows(max(1, size), x.hidden.element_size(), most_bytes)
    for first in range(0, len(x.weight), step):
        columns = slice(first, min(first + step, len(x.weight)))
        out = x.hidden.new_empty(size, columns.stop - first)
        logits = _product(x.hidden, x.weight[columns], None if x.bias is None else x.bias[columns], out)
        yield columns, row_kernels.gradient(logits, logits, x.targets, lses, None, first=first, **vars(x.how))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write hidden [n, D] x weight [V, D]^T + bias [V] into out [n, V], and return it."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)  # rounded once
