"""The log-probability of one target a row, from hidden states and the head's weight: no N x V tensor is kept.

The log-probability is one number a token, so its gradient in the token's hidden state is one row of D numbers,
J = (W[y] - p W) / T. It is computed in the forward, where p is at hand; dHidden = g J then holds for any loss, and a
frozen head's weight is not read again. With a trained head, dWeight = ([v = y] - p)^T (g hidden): the bracket is kept
where it fits into memory, and computed again, a slice of the vocabulary at a time, where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsalign_kernels import rows
from dsalign_kernels.reference import IGNORE_INDEX, Logps
from dsalign_kernels.rows import Impl, Transform

# Work space in MiB, where the caller names none: on a GPU a matrix product wants 2,000 rows and more, on a CPU 256 rows
# of a usual vocabulary reach full speed.
DEFAULT_MIB = {"cuda": 512, "cpu": 48}
KEEP_RATIO = 6  # brackets are kept up to so many times the work space


@dataclass(frozen=True)
class Scheme:
    """What runs, in matrix products of N x D x V: forward and backward together."""

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
    """The one place that decides. gradient: whether hidden states or weight need one; trained: whether the weight does;
    rows_: N; dtype: of a logit; head_bytes: the work space; largest_part: rows of the largest part of a loss that adds
    over parts, None where it does not. "local" is for `linear_loss`, the others are for `linear_logps`."""
    if not gradient:
        return Scheme("forward", 1)
    if not trained:
        return Scheme("frozen", 2)
    most = KEEP_RATIO * head_bytes // (vocabulary * dtype.itemsize)  # rows of logits that may be there at a time
    if rows_ <= most:
        return Scheme("kept", 3)
    # A float16 gradient taken before the loss is scaled would vanish.
    local = largest_part is not None and largest_part <= most and dtype != torch.float16
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
    """`selective_logps` of hidden x weight^T + bias, differentiable in all three.

    hidden: [N, D]; weight: [V, D] and bias: [V] of the same dtype; targets: [N] int64 in [0, V) or ignore_index.
    head_bytes: memory for one chunk of logits; None: 512 MiB on a GPU, 48 MiB on a CPU. The logits of a chunk have
    hidden's dtype, statistics are float32, and so are sums of weight gradients over chunks.
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
    triton = rows.uses_triton(impl, hidden.device)
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
    """The sum over i of loss(i, logps, entropy), scalar float32, where the loss of a part reads its own rows alone.

    hidden, weight, bias, targets: as for `linear_logps`. parts: [number of rows of each part], together N, in order.
    loss: called once a part, in order, in the forward, with gradient; its logps are [parts[i]] float32. Its gradient is
    taken at once, while the logits are there: three matrix products, no second look at the logits.
    Raises ValueError where the parts are not all rows, and where shapes, dtypes or `impl` do not fit.
    """
    if sum(parts) != len(hidden):
        raise ValueError(f"parts: expected numbers of rows that add up to {len(hidden)}, got {list(parts)}")
    rows.check(len(hidden), targets, "hidden [N, D]")
    how = Transform(scale, softcap, temperature, ignore_index)
    triton = rows.uses_triton(impl, hidden.device)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    result: Tensor = _LinearLoss.apply(hidden, weight, bias, targets, how, list(parts), loss, entropy, triton)  # type: ignore[no-untyped-call]
    return result


def default_bytes(device: torch.device) -> int:
    """The work space where the caller names none."""
    return DEFAULT_MIB.get(device.type, DEFAULT_MIB["cuda"]) * 2**20


def chunk_rows(vocabulary: int, itemsize: int, head_bytes: int) -> int:
    """Rows of logits in one chunk: a multiple of 128 where there are so many."""
    fit = max(1, head_bytes // (vocabulary * itemsize))
    return fit - fit % 128 if fit > 128 else fit


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
        size, vocabulary = len(hidden), len(weight)
        plan = scheme(
            size, vocabulary, hidden.dtype,
            gradient=needs_hidden or trained, trained=trained, head_bytes=head_bytes,
        )  # fmt: skip
        jacobian = torch.empty_like(hidden) if needs_hidden else None
        step = size if plan.name == "kept" else chunk_rows(vocabulary, hidden.element_size(), head_bytes)
        # One buffer for all chunks: the allocator of a CPU gives freed memory back, and every page is zeroed again.
        buffer = hidden.new_empty(min(size, step), vocabulary)
        found = []
        for start in range(0, max(size, 1), max(step, 1)):
            part = slice(start, start + step)
            logits = _logits(hidden[part], weight, bias, buffer)
            write = needs_hidden or plan.name == "kept"
            found.append(rows.stats(logits, targets[part], how, entropy=entropy, top=top, write=write, triton=triton))
            if jacobian is not None:
                torch.mm(logits, weight, out=jacobian[part])
        logps, lses, entropies, tops = (None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True))
        ctx.how, ctx.triton, ctx.plan, ctx.head_bytes = how, triton, plan, head_bytes
        kept = buffer if plan.name == "kept" else None
        again = (hidden, weight, bias, targets, lses) if trained else (None,) * 5
        ctx.save_for_backward(jacobian, kept, *again)
        ctx.mark_non_differentiable(*[x for x in (lses, entropies, tops) if x is not None])
        return logps, lses, entropies, tops

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, kept, hidden, weight, bias, targets, lses = ctx.saved_tensors
        g = grads[0].float()
        d_hidden = None if jacobian is None else _by_row(jacobian, g)
        d_weight, d_bias = None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            largest = _range(g, hidden.dtype)
            scaled = _by_row(hidden, g if largest is None else g / largest)
            d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            d_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
            for columns, bracket in _brackets(ctx, kept, hidden, weight, bias, targets, lses):
                if d_weight is not None:
                    torch.mm(bracket.t(), scaled, out=d_weight[columns])
                    if largest is not None:
                        d_weight[columns].mul_(largest)
                if d_bias is not None:
                    d_bias[columns] = (bracket.t().float() @ g).to(d_bias.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 6


def _brackets(
    ctx: Any, kept: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lses: Tensor
) -> Any:
    """([slice of the vocabulary], d logp / d logits [N, columns]): whole where kept, else slice after slice."""
    if kept is not None:
        yield slice(0, len(weight)), kept
        return
    step = chunk_rows(max(1, len(hidden)), hidden.element_size(), ctx.head_bytes)
    for first in range(0, len(weight), step):
        columns = slice(first, min(first + step, len(weight)))
        logits = _logits(hidden, weight[columns], None if bias is None else bias[columns], None)
        yield columns, rows.gradient(logits, logits, targets, lses, None, ctx.how, first=first, triton=ctx.triton)


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
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        buffer = hidden.new_empty(max(parts, default=0), len(weight))
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        total, start = hidden.new_zeros((), dtype=torch.float32), 0
        for index, size in enumerate(parts):
            part = slice(start, start + size)
            start += size
            logits = _logits(hidden[part], weight, bias, buffer)
            logps, lses, entropies, _ = rows.stats(
                logits, targets[part], how, entropy=entropy, top=False, write=False, triton=triton
            )
            g, value = _coefficient(loss, index, logps, entropies)
            total += value
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            largest = _range(g, hidden.dtype)
            scaled = g if largest is None else g / largest
            rows.gradient(logits, logits, targets[part], lses, scaled, how, triton=triton)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[part])
                if largest is not None:
                    d_hidden[part].mul_(largest)
            if d_weight is not None:
                _add_product(d_weight, logits, hidden[part], largest)
            if d_bias is not None:
                d_bias.add_(logits.float().sum(0).mul_(1.0 if largest is None else largest))
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
    """(d loss / d logps [n] float32, the loss)."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        value = loss(index, leaf, entropy)
        (g,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
    return torch.zeros_like(logps) if g is None else g, value.detach()


def _add_product(total: Tensor, bracket: Tensor, hidden: Tensor, factor: Tensor | None) -> None:
    """total [V, D] float32 += factor bracket^T hidden, without rounding the product to a 16-bit float first."""
    if factor is not None:  # float16
        total.addmm_(bracket.float().t(), hidden.float() * factor)
    elif bracket.is_cuda and bracket.dtype == torch.bfloat16:
        torch.addmm(total, bracket.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(bracket.float().t(), hidden.float())


def _by_row(x: Tensor, g: Tensor) -> Tensor:
    """x [N, D] times g [N] float32, computed in float32 and rounded once to the dtype of x."""
    return torch.mul(x, g[:, None], out=torch.empty_like(x))


def _range(g: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What to divide coefficients by so that float16 holds them: the largest. None where the dtype has the range."""
    if dtype != torch.float16 or not len(g):
        return None
    return g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """hidden [n, D] x weight [V, D] + bias into the first rows of the buffer."""
    out = hidden.new_empty(len(hidden), len(weight)) if buffer is None else buffer[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)  # rounded once
