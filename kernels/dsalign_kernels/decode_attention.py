"""Attention of one query token a row over a preallocated key-value cache, of which each row has its own live length."""

from __future__ import annotations

import torch
from torch import Tensor

from dsalign_kernels import reference, rows
from dsalign_kernels.rows import Impl

try:
    from dsalign_kernels import decode_attention_kernels
except ImportError:  # triton is published for Linux alone
    decode_attention_kernels = None  # type: ignore[assignment]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """sum_j p_j v_j of each row and head, [B, H, E] of the query's dtype, with p = softmax_j(z_j) over the tokens j
    that the row's query sees; z_j = softcap tanh(scaling q k_j / softcap), or scaling q k_j without a softcap.

    query: [B, H, D] float. keys: [B, heads, L, D], values: [B, heads, L, E], of the query's dtype, with any strides;
    H / heads neighbouring queries share a head. positions: [B] int64 in [0, L): where the row's query stands; it sees
    the tokens 0 to positions[b], with a window the last `window` of them, itself included. The kernel does not read
    what the cache holds behind a position; in torch it must be finite. scaling: None = 1 / sqrt(D). window: >= 1.
    softcap: > 0. Sums and softmax are in float32, in float64 for float64; the kernel rounds p to the values' dtype
    before it is multiplied with them. No gradient.
    Source of the split along the tokens: Dao et al. (2023), Flash-Decoding.
    Raises ValueError where shapes, dtypes, `impl` or a number do not fit.
    """
    _check(query, keys, values, positions)
    if window is not None and window < 1:
        raise ValueError(f"window: expected a number of tokens >= 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    query, keys, values = (x.detach() for x in (query, keys, values))
    if not rows.uses_triton(impl, query):
        return reference.decode_attention(
            query, keys, values, positions, scaling=scaling, window=window, softcap=softcap
        )
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    factor = query.shape[2] ** -0.5 if scaling is None else scaling
    return decode_attention_kernels.attend(query, keys, values, positions.contiguous(), factor, window, softcap)


def _check(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
    """Raises ValueError unless the four are as `decode_attention` says."""
    fits = query.dim() == 3 and keys.dim() == values.dim() == 4 and query.is_floating_point()
    fits = fits and query.dtype == keys.dtype == values.dtype
    fits = fits and keys.shape[:3] == values.shape[:3] and query.shape[::2] == keys.shape[::3]
    fits = fits and keys.shape[1] > 0 and query.shape[1] % keys.shape[1] == 0 and keys.shape[2] > 0
    if not fits or positions.shape != query.shape[:1] or positions.dtype != torch.int64:
        given = (f"{tuple(x.shape)} {x.dtype}" for x in (query, keys, values, positions))
        raise ValueError(
            "expected query [B, H, D], keys [B, heads, L, D] and values [B, heads, L, E] of one float dtype, H a "
            f"multiple of heads, L >= 1, and positions [B] int64, got {', '.join(given)}"
        )
