"""The log-probability of one target token a row, from hidden states and the head's weight, without all N x V logits.

A log-probability is one number a token, so its gradient in the token's hidden state is one row of D numbers,
J = (W[y] - p W) / temperature. The forward computes J, as it has p at hand; the gradient of any loss in the hidden
states is then g J, with g the loss's derivative in each log-probability, and a frozen head's weight is not read again.
A trained head's gradient is ([v = y] - p)^T (g hidden): the bracket, N x V elements, is kept where it fits into memory,
and computed again in the backward, a slice of the vocabulary at a time, where it does not, as cut cross-entropy
(arXiv:2411.09009) always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsalign_kernels import by_tiles, rows
from dsalign_kernels.head import Kept, Operands, by_row
from dsalign_kernels.reference import IGNORE_INDEX, Logps
from dsalign_kernels.rows import Impl, Transform

# Work space in MiB, where the caller names none: on a GPU a matrix product wants 2,000 rows and more, on a CPU 256 rows
# of a usual vocabulary reach full speed.
DEFAULT_MIB = {"cuda": 512, "cpu": 48}
KEEP_RATIO = 6  # brackets are kept up to so many times the work space


@dataclass(frozen=True)
class Scheme:
    """How the head is computed, and its cost: matrix products of N x D x V, forward and backward together."""

    name: str  # "forward", "frozen", "kept", "recomputed", "local"
    products: int


def scheme(
    rows_: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    gradient: bool,
    trained: bool,
    head_bytes: int,
    largest_part: int | None = None,
) -> Scheme:
    """How N = rows_ rows go through a head of this vocabulary: the one place that decides. README.md has the table.

    dtype: of a logit. gradient: whether hidden states or weight need one; trained: whether the weight does. head_bytes:
    the work space for logits. largest_part: the rows of the largest part of a loss that adds over parts; None where the
    loss does not. "local" is for `linear_loss`, the other schemes for `linear_logps`.
    """
    if not gradient:
        return Scheme("forward", 1)
    if not trained:
        return Scheme("frozen", 2)
    fit = head_bytes // (vocabulary * dtype.itemsize)  # rows of logits in the work space
    # A float16 gradient taken before the loss is scaled would vanish.
    local = largest_part is not None and largest_part <= KEEP_RATIO * fit and dtype != torch.float16
    # In 16 bits the parts' weight gradients add up in a float32 tensor more: as large as the logits of many rows.
    if rows_ <= (fit if local and dtype.itemsize >= 4 else KEEP_RATIO * fit):
        return Scheme("kept", 3)
    return Scheme("local", 3) if local else Scheme("recomputed", 4)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    head_bytes: int | None = None,
    impl: Impl = "auto",
) -> Logps:
    """`selective_logps` of the logits hidden x weight^T + bias, differentiable in hidden, weight and bias.

    hidden: [N, D]; weight: [V, D] and bias: [V] of the same dtype; targets: [N] int64 in [0, V) or ignore_index.
    entropy, top, scale, softcap, temperature: as for `selective_logps`.
    head_bytes: memory for one chunk of logits; None: 512 MiB on a GPU and 48 MiB on a CPU, which uses 16 MiB of it
    unless logits are kept. A chunk's logits have the dtype of hidden; statistics and sums of weight gradients over
    chunks are float32, or by torch float64 for float64.
    Raises ValueError where shapes, dtypes or `impl` do not fit.
    """
    shapes = f"hidden [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(shapes)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{len(weight)}], got {tuple(bias.shape)}")
    rows.check(len(hidden), targets, "hidden [N, D]")
    how = Transform(scale, softcap, temperature, ignore_index)
    size = head_bytes or default_bytes(hidden.device)
    triton = rows.uses_triton(impl, hidden)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    found = _LinearLogps.apply(hidden, weight, bias, targets, how, entropy, top, size, triton)  # type: ignore[no-untyped-call]
    return Logps(*found)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    parts: Sequence[int],
    loss: Callable[[int, Tensor, Tensor | None], Tensor],
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    impl: Impl = "auto",
) -> Tensor:
    """The sum of loss(i, logps, entropy) over parts i of the rows, scalar float32, differentiable in hidden, weight and
    bias; the loss of a part must read the part's own rows alone.

    hidden, weight, bias, targets and what follows: as for `linear_logps`. parts: the number of rows of each part, in
    order, together N. loss: called in the forward, once a part in order, with the part's index, its log-probabilities
    [parts[i]] float32 and their entropy or None; it returns a scalar. Its gradient is taken at once, while the part's
    logits are in memory: three matrix products in all, and the logits are not computed again.
    Raises ValueError where the parts are not all rows, and where shapes, dtypes or `impl` do not fit.
    """
    if sum(parts) != len(hidden):
        raise ValueError(f"parts: expected numbers of rows that add up to {len(hidden)}, got {list(parts)}")
    rows.check(len(hidden), targets, "hidden [N, D]")
    how = Transform(scale, softcap, temperature, ignore_index)
    triton = rows.uses_triton(impl, hidden)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    result: Tensor = _LinearLoss.apply(hidden, weight, bias, targets, how, list(parts), loss, entropy, triton)  # type: ignore[no-untyped-call]
    return result


def default_bytes(device: torch.device) -> int:
    """Bytes of the work space for logits on this device, where the caller names none."""
    return DEFAULT_MIB.get(device.type, DEFAULT_MIB["cuda"]) * 2**20


def _way(triton: bool) -> ModuleType:
    """The implementation: `by_rows`, or `by_tiles` with the same functions."""
    if not triton:
        return by_tiles
    from dsalign_kernels import by_rows  # noqa: PLC0415  # triton is published for Linux alone

    return by_rows


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        how: Transform,
        entropy: bool,
        top: bool,
        head_bytes: int,
        triton: bool,
    ) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trained = needs_weight or needs_bias
        plan = scheme(
            len(hidden), len(weight), hidden.dtype,
            gradient=needs_hidden or trained, trained=trained, head_bytes=head_bytes,
        )  # fmt: skip
        x = Operands(hidden, weight, bias, targets, how)
        buffer = hidden.new_empty(len(hidden) * len(weight)) if plan.name == "kept" else None
        found, kept = _way(triton).scan(
            x, entropy=entropy, top=top, jacobian=needs_hidden, buffer=buffer, most_bytes=head_bytes
        )
        ctx.how, ctx.triton, ctx.head_bytes = how, triton, head_bytes
        again = (hidden, weight, bias, targets, found.lses, *kept) if trained else ()
        ctx.save_for_backward(found.jacobian, *again)
        ctx.mark_non_differentiable(*[each for each in found[1:4] if each is not None])
        return tuple(found[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, *again = ctx.saved_tensors
        g = grads[0].to(rows.wide(grads[0].dtype))
        d_hidden, d_weight, d_bias = None if jacobian is None else by_row(jacobian, g), None, None
        if again:
            hidden, weight, bias, targets, lses, *kept = again
            d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
            x = Operands(hidden, weight, bias, targets, ctx.how)
            _way(ctx.triton).weight_gradient(
                x, lses, Kept(*kept), g, d_weight, d_bias, add=False, most_bytes=ctx.head_bytes
            )
        return d_hidden, d_weight, d_bias, *[None] * 6


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        how: Transform,
        parts: list[int],
        loss: Callable[[int, Tensor, Tensor | None], Tensor],
        entropy: bool,
        triton: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        kind, way = rows.wide(hidden.dtype), _way(triton)
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        d_weight, d_bias = (
            torch.zeros_like(each, dtype=kind) if each is not None and need else None
            for each, need in zip((weight, bias), needed[1:], strict=True)
        )
        trained = d_weight is not None or d_bias is not None
        # One buffer for all parts: the allocator of a CPU gives freed memory back, and every page is zeroed again.
        buffer = hidden.new_empty(max(parts, default=0) * len(weight)) if trained else None
        most = {"most_bytes": default_bytes(hidden.device)}
        total, start = hidden.new_zeros((), dtype=kind), 0
        for index, size in enumerate(parts):
            part = slice(start, start + size)
            start += size
            x = Operands(hidden, weight, bias, targets, how).rows(part)
            room = None if buffer is None else buffer[: size * len(weight)]
            found, kept = way.scan(x, entropy=entropy, top=False, jacobian=needed[0], buffer=room, **most)
            g, value = _coefficient(loss, index, found.logps, found.entropies)
            total += value
            if d_hidden is not None:
                torch.mul(found.jacobian, g[:, None], out=d_hidden[part])
            if trained:
                way.weight_gradient(x, found.lses, kept, g, d_weight, d_bias, add=True, **most)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if x is None else x.mul_(grads[0]).to(ctx.dtype) for x in ctx.saved_tensors]
        return *found, *[None] * 6


def _coefficient(
    loss: Callable[[int, Tensor, Tensor | None], Tensor], index: int, logps: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the loss's derivative in each of the part's log-probabilities [n], the loss without gradient)."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        value = loss(index, leaf, entropy)
        (g,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
    return torch.zeros_like(logps) if g is None else g, value.detach()
