"""Sampling of one token a row of logits by Gumbel-max on counter-based noise: a draw is a function of its key and its
position alone, whatever else is in the batch, and a small change of the logits rarely changes the token.

The noise of a token is a hash of (key, position, token id): there is no state to seed, to save or to resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsalign_kernels import rows
from dsalign_kernels.rows import Impl, Transform

try:
    from dsalign_kernels import sampling_kernels
except ImportError:  # triton is published for Linux alone
    sampling_kernels = None  # type: ignore[assignment]

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

CHUNK = 2**16  # logits that the CPU works on at a time: several arrays of them stay in the caches of one core
FILTER_CHUNK = 2**24  # logits that are sorted at a time
BELOW_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1
TO_UNIT = np.float32(2**-32)
ROUNDING = np.float32(4 * np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Sampled:
    """One sampled token a row of logits.

    tokens: [B] int64 in [0, V). logps: [B] float32, nats, <= 0, the token's log-probability before noise and filters;
    NaN where the row has NaN or +inf or is all -inf, and then its token is 0.
    """

    tokens: Tensor
    logps: Tensor


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Sampled:
    """A token for each row, drawn from softmax(z): argmax_v (z_v + G_v) over the v that the filters keep, ties to the
    lowest id; and log p_v = z_v - log sum_w e^(z_w) over all w.

    z = softcap tanh(scale x / softcap) / temperature of the logits x, or scale x / temperature without a softcap, in
    float32; G = `gumbel`. Source of the draw: Gumbel (1954); of its coupling: arXiv:2408.07978.

    logits: [B, V] float of any dtype and row stride; a column of -inf is never drawn. keys: [B] int64, the bits of an
    unsigned 64-bit key, see `token_key`. positions: [B] int64 in [0, 2**32), the token's index in its completion.
    top_k: the k largest logits are kept; 0 = all, 1 = the arg max, without noise. top_p: in (0, 1], a token is kept
    while those above it hold less than top_p of the whole distribution. Both: kept by both. The filters are a floor on
    x, so logits that equal the least one kept are kept too. scale, softcap, temperature: > 0.
    Raises ValueError where shapes, dtypes, `impl` or a number do not fit.
    """
    _check(logits, keys, positions)
    for name, number in (("temperature", temperature), ("scale", scale), ("softcap", softcap)):
        if number is not None and not number > 0:
            raise ValueError(f"{name}: expected a number > 0, got {number}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected top_k >= 0 and top_p in (0, 1], got top_k {top_k} and top_p {top_p}")
    how, greedy = Transform(scale, softcap, temperature), top_k == 1
    filters = (top_k if top_k < logits.shape[1] else 0, top_p)
    logits = logits.detach()
    if not rows.uses_triton(impl, logits):
        return _by_numpy(logits, keys, positions, how, filters, greedy=greedy)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    floors = None if greedy else _floors(logits, how, *filters)
    found = sampling_kernels.sample(logits, keys.contiguous(), positions.contiguous(), floors, how, greedy=greedy)
    return Sampled(*found)


def _check(logits: Tensor, keys: Tensor, positions: Tensor) -> None:
    """Raises ValueError unless logits are [B, V] float with V >= 1 and the other two [B] int64."""
    fits = logits.dim() == 2 and logits.shape[1] > 0 and logits.is_floating_point()
    for name, tensor in (("keys", keys), ("positions", positions)):
        if not fits or tensor.shape != logits.shape[:1] or tensor.dtype != torch.int64:
            raise ValueError(
                f"expected logits [B, V] of floats and {name} [B] int64, got logits {tuple(logits.shape)} "
                f"{logits.dtype} and {name} {tuple(tensor.shape)} {tensor.dtype}"
            )


def token_key(seed: int, step: int, index: int, sample: int) -> int:
    """The unsigned 64-bit key of a completion's noise: that of a prompt's index and a sample's number, at a step.

    h = 0; for x in (seed, step, index, sample): h = splitmix64(h xor x). Negative numbers are taken modulo 2**64.
    """
    key = 0
    for x in (seed, step, index, sample):
        key = _splitmix64(key ^ (x % 2**64))
    return key


def _splitmix64(z: int) -> int:
    """The first output of the generator SplitMix64 seeded with z; Steele, Lea and Flood (2014)."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def gumbel(keys: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """The noise G of every token, [B, vocabulary] float32 on the CPU, from -2.82 to 22.9.

    G = -log(-log(1 - u)) with u = min((h + 1/2) / 2**32, 1 - 2**-24), h the 32-bit Murmur3 of the 16 bytes (key,
    position, token id). The largest G come from the smallest u, where float32 is fine: the tail that wins is exact.
    keys, positions: [B] int64, as in `sample_tokens`.
    """
    found = np.empty((len(keys), vocabulary), np.float32)
    work = np.empty((2, 1, vocabulary), np.uint32)
    for row, prefix in enumerate(_prefixes(keys, positions)):
        found[row] = _noise(_hashes(prefix[None], *work))
    return torch.from_numpy(found)


def _noise(hashes: Words) -> Floats:
    """G of 32-bit hashes, of their shape."""
    u = np.minimum((hashes.astype(np.float32) + np.float32(0.5)) * TO_UNIT, BELOW_ONE)
    found: Floats = -np.log(-np.log1p(-u))
    return found


def _prefixes(keys: Tensor, positions: Tensor) -> Words:
    """Murmur3's state after the first three of a row's four words, [B]: key's low half, its high half, position."""
    key = keys.cpu().numpy().view(np.uint64)
    position = positions.cpu().numpy().view(np.uint64)
    state = np.zeros(len(key), np.uint32)
    for word in (key, key >> np.uint64(32), position):
        state ^= _mixed((word & np.uint64(2**32 - 1)).astype(np.uint32))
        state = (state << np.uint32(13) | state >> np.uint32(19)) * np.uint32(5) + np.uint32(0xE6546B64)
    return state


def _mixed(words: Words) -> Words:
    """Words as Murmur3 mixes them before they enter its state."""
    k = words * np.uint32(0xCC9E2D51)
    return (k << np.uint32(15) | k >> np.uint32(17)) * np.uint32(0x1B873593)


@lru_cache(4)
def _mixed_ids(vocabulary: int) -> Words:
    """What Murmur3 makes of a token id before it enters the state, for every id: [vocabulary]."""
    k = _mixed(np.arange(vocabulary, dtype=np.uint32))
    k.flags.writeable = False
    return k


def _hashes(prefixes: Words, h: Words, other: Words) -> Words:
    """Murmur3 of 16 bytes, for rows of `prefixes` [n] and every token id, written to h; h, other: [n, V]."""
    np.bitwise_xor(prefixes[:, None], _mixed_ids(h.shape[1]), out=h)
    np.right_shift(h, np.uint32(19), out=other)
    np.left_shift(h, np.uint32(13), out=h)
    np.bitwise_or(h, other, out=h)
    np.multiply(h, np.uint32(5), out=h)
    np.add(h, np.uint32(0xE6546B64), out=h)
    np.bitwise_xor(h, np.uint32(16), out=h)  # bytes hashed; then the final mix
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(h, np.uint32(shift), out=other)
        np.bitwise_xor(h, other, out=h)
        if factor != 1:
            np.multiply(h, np.uint32(factor), out=h)
    return h


def _by_numpy(
    logits: Tensor, keys: Tensor, positions: Tensor, how: Transform, filters: tuple[int, float], *, greedy: bool
) -> Sampled:
    """`sample_tokens` on the CPU in chunks of rows, on whatever device the logits are; filters: top_k and top_p."""
    tokens = np.zeros(len(logits), np.int64)
    logps = np.zeros(len(logits), np.float32)
    prefixes = _prefixes(keys, positions)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for part, work, space in _chunks(logits):
            work.copy_(logits[part])
            floors = None if greedy else _floors(work, how, *filters)
            lost = None if floors is None else (work < floors[:, None]).numpy()
            z: Floats = _transformed(work, how).numpy()
            tokens[part], logps[part] = _draw(z, prefixes[part], lost, space, greedy=greedy)
    return Sampled(torch.from_numpy(tokens).to(logits.device), torch.from_numpy(logps).to(logits.device))


def _floors(logits: Tensor, how: Transform, top_k: int, top_p: float) -> Tensor | None:
    """The least logit that the filters keep, [B] float32, of logits [B, V] before `how`; None where they keep all.

    It is compared with the logits before the transform, which are exact: kernels may round the others differently.
    """
    if not top_k and top_p == 1:
        return None
    floors = torch.empty(len(logits), device=logits.device)
    size = max(1, FILTER_CHUNK // logits.shape[1])
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        floors[part] = _floors_of(logits[part], how, top_k or logits.shape[1], top_p)
    return floors


def _floors_of(logits: Tensor, how: Transform, most: int, top_p: float) -> Tensor:
    """The same of a part of the rows, of which at most `most` tokens are kept."""
    some = most < logits.shape[1]
    ordered = logits.topk(most, 1).values.float() if some else _descending(logits)
    if top_p == 1:
        return ordered[:, -1]
    z = _transformed(ordered.clone(), how)
    whole = _transformed(logits.to(torch.float32, copy=True), how) if some else z
    p = z.sub_(whole.logsumexp(1, keepdim=True)).exp_().double()
    kept = (p.cumsum(1).sub_(p) < top_p).count_nonzero(1)[:, None]  # the tokens above it hold less
    return ordered.gather(1, kept.clamp(min=1) - 1)[:, 0]


def _descending(logits: Tensor) -> Tensor:
    """The logits of each row from the largest to the least, [B, V] float32, NaN first.

    On a CPU NumPy sorts: its sort of numbers alone uses vector instructions, where torch's also moves their indices.
    """
    if logits.device.type != "cpu":
        return logits.sort(1, descending=True).values.float()
    return torch.from_numpy(np.sort(logits.float().numpy(), 1)[:, ::-1].copy())


def _transformed(x: Tensor, how: Transform) -> Tensor:
    """The head's output x [B, V] float32 becomes the logits of the softmax, in place; -inf stays, despite a softcap."""
    gone = None if how.softcap is None else x == -torch.inf
    z = rows._transformed(x, how)
    return z if gone is None else z.masked_fill_(gone, -torch.inf)


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor, Words]]:
    """Chunks of rows: (which rows, space [n, V] float32 for their logits, space [3, n, V] for `_draw`)."""
    size = max(1, min(len(logits), CHUNK // logits.shape[1]))
    work = torch.empty(size, logits.shape[1])
    space = np.empty((3, size, logits.shape[1]), np.uint32)
    for start in range(0, len(logits), size):
        part = slice(start, min(start + size, len(logits)))
        yield part, work[: part.stop - start], space[:, : part.stop - start]


def _draw(
    z: Floats, prefixes: Words, lost: npt.NDArray[np.bool_] | None, space: Words, *, greedy: bool
) -> tuple[npt.NDArray[np.int64], Floats]:
    """(tokens [n], logps [n]) of logits z [n, V], tokens that the filters `lost` apart; space: [3, n, V].

    As E = -log(1 - u) >= u, e^(z + G) = e^z / E is at most e^z / u. Only tokens whose bound reaches the score of one
    token need their noise computed, and these are a handful.
    """
    n, each = len(z), np.arange(len(z))
    tokens, logps = np.zeros(n, np.int64), np.full(n, np.nan, np.float32)
    p, bound = space[1].view(np.float32), space[2].view(np.float32)
    peak = z.max(1)
    np.exp(np.subtract(z, peak[:, None], out=p), out=p)
    log_total = np.log(p.sum(1))
    if greedy:
        tokens = z.argmax(1)
        logps = z[each, tokens] - peak - log_total
        return np.where(np.isnan(logps), 0, tokens), logps
    h = _hashes(prefixes, space[0], space[2])
    # Half of h, less its lowest bit, converts to float32 at twice the speed as a signed number.
    np.copyto(bound, np.right_shift(h, np.uint32(1), out=space[2]).view(np.int32), casting="unsafe")
    np.divide(p, np.add(bound, np.float32(0.25), out=bound), out=bound)  # at least 2**-31 e^(z - peak) / u
    if lost is not None:
        np.putmask(bound, lost, np.float32(-1))
    first = bound.argmax(1)
    score = z[each, first] + _noise(h[each, first])
    slack = np.float32(1e-5) + ROUNDING * (np.abs(peak) + np.abs(score))
    least = np.exp(score - peak - slack) * np.float32(2**-31)
    row, token = np.divmod(np.flatnonzero(bound >= least[:, None]), z.shape[1])  # faster than np.nonzero of two axes
    score = z[row, token] + _noise(h[row, token])
    best = np.full(n, -np.inf, np.float32)
    np.maximum.at(best, row, score)
    won = np.flatnonzero(score == best[row])[::-1]  # of tokens that tie the lowest is written last
    tokens[row[won]] = token[won]
    logps[row] = z[row, tokens[row]] - peak[row] - log_total[row]
    return tokens, logps
