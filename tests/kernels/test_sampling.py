"""`sample_tokens`: its hash, its noise, its distribution, and the same tokens from the kernel and on the CPU."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsalign_kernels import gumbel, rows, sample_tokens, sampling, sampling_kernels, token_key

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, INF = math.nan, math.inf
HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7, "scale": 1.5},
    "softcap": {"softcap": 5.0, "temperature": 0.7},
    "greedy": {"top_k": 1, "temperature": 0.7},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "both": {"top_k": 20, "top_p": 0.95, "softcap": 5.0},
    "top_k of all": {"top_k": 5000},
}


def inputs(n: int, v: int, *, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, v], keys of all 64 bits and positions of up to 20 bits, [n]."""
    draw = torch.Generator().manual_seed(1000 * n + v + seed)
    logits = spread * torch.randn(n, v, generator=draw)
    keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=draw)
    return logits, keys, torch.randint(2**20, (n,), generator=draw)


def murmur3(text: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32, written from its definition with Python's integers."""

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> 32 - by) & 0xFFFFFFFF

    def mixed(k: int) -> int:
        return rotated(k * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    h, whole = seed, len(text) // 4 * 4
    for (k,) in struct.iter_unpack("<I", text[:whole]):
        h = (rotated(h ^ mixed(k), 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if text[whole:]:
        h ^= mixed(int.from_bytes(text[whole:], "little"))
    h ^= len(text)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


@pytest.mark.parametrize(
    ("text", "seed", "want"),
    [
        (b"", 0, 0),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\0\0\0\0", 0, 0x2362F9DE),
        (b"!Ce\x87", 0, 0xF55B516B),
        (b"test", 0, 0xBA6BD213),
        (b"Hello, world!", 0, 0xC0363E43),
        (b"The quick brown fox jumps over the lazy dog", 0, 0x2E4FF723),
    ],
)
def test_the_yardstick_is_murmur3(text: bytes, seed: int, want: int) -> None:
    """The vectors that implementations of the hash publish."""
    assert murmur3(text, seed) == want


def test_hash_is_murmur3_of_key_position_and_token() -> None:
    """16 bytes, little endian; keys with the highest bit set are negative as int64, positions reach 2^32 - 1."""
    keys, positions = [0, -1, -(2**63), 0x0123456789ABCDEF, 1 << 32], [0, 2**32 - 1, 1, 77, 5]
    noise = gumbel(torch.tensor(keys), torch.tensor(positions), 40)
    for key, position, row in zip(keys, positions, noise.tolist(), strict=True):
        for token, found in enumerate(row):
            u = (murmur3(struct.pack("<QII", key % 2**64, position, token)) + 0.5) / 2**32
            assert found == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-6)


def test_keys_by_hand() -> None:
    """SplitMix64 of the seed 0 begins e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f: its state grows by the same
    number each time. A key takes four steps, and every one of its numbers counts."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [sampling._splitmix64(k * gamma % 2**64) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    chain = 0
    for x in (7, 300, 2**40, 3):
        chain = sampling._splitmix64(chain ^ x)
    assert token_key(7, 300, 2**40, 3) == chain and token_key(0, 0, 0, 0) == 0x2130748AAAC80268
    assert token_key(-1, 0, 0, 0) == token_key(2**64 - 1, 0, 0, 0)
    keys = {token_key(*numbers) for numbers in np.ndindex(5, 5, 5, 5)}
    assert len(keys) == 625 and all(0 <= key < 2**64 for key in keys)


def test_noise_is_finite_at_both_ends() -> None:
    """h = 0: -log(-log1p(-2^-33)) = 33 log 2 = 22.8739; h = 2^32 - 1: u = 1 - 2^-24, so -log(24 log 2) = -2.8115."""
    found = sampling._noise(np.array([0, 2**32 - 1], np.uint32))
    np.testing.assert_allclose(found, [22.8739, -2.8115], atol=1e-4)


def test_noise_has_the_moments_of_gumbel() -> None:
    """Mean 0.57722, variance pi^2 / 6 = 1.64493; of 983,040 draws these are known to 0.0013 and 0.0033."""
    noise = gumbel(torch.arange(20), torch.arange(20), 49152).double()
    assert abs(float(noise.mean()) - 0.57722) < 0.004
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.01


@pytest.mark.parametrize(
    ("v", "spread"), [(1, 1), (5, 1), (49152, 0), (49152, 0.01), (20000, 3), (20000, 30), (999, 1e5)]
)
def test_unneeded_noise_changes_nothing(v: int, spread: float) -> None:
    """The tokens are those of the whole noise, from flat rows, where any may win, to a single one that does."""
    logits, keys, positions = inputs(12, v, spread=spread)
    found = sample_tokens(logits, keys, positions, impl="torch")
    assert torch.equal(found.tokens, (logits + gumbel(keys, positions, v)).argmax(1))
    exact = torch.log_softmax(logits.double(), 1).gather(1, found.tokens[:, None])[:, 0]
    torch.testing.assert_close(found.logps.double(), exact, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_and_cpu_agree(dtype: torch.dtype, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, log-probabilities within 1e-6 (and of a softcap, whose tanh differs, three roundings of it):
    1,000 columns in 2 programs of a row, the last of them short, columns of -inf, rows with a stride."""
    monkeypatch.setattr(sampling_kernels, "BLOCK", 256)
    monkeypatch.setattr(sampling_kernels, "SPAN", 512)
    logits, keys, positions = inputs(3, 1003, seed=3)
    logits = logits.to(dtype)[:, 3:]
    logits[:, 990:] = -INF
    logits[2, :600] = -INF  # all that the first program of this row reads
    ours = sample_tokens(logits, keys, positions, impl="torch", **how)
    kernel = sample_tokens(*(x.to(DEVICE) for x in (logits, keys, positions)), impl="triton", **how)
    assert ours.tokens.dtype == kernel.tokens.dtype == torch.int64 and ours.logps.dtype == torch.float32
    assert torch.equal(kernel.tokens.cpu(), ours.tokens)
    tolerance = 1e-6 if "softcap" not in how else 3e-6
    torch.testing.assert_close(kernel.logps.cpu(), ours.logps, atol=tolerance, rtol=1e-6)
    z = rows._transformed(logits.double(), rows.Transform(**{k: v for k, v in how.items() if k[:3] != "top"}))
    z = z.masked_fill(logits == -INF, -INF)
    exact = torch.log_softmax(z, 1).gather(1, ours.tokens[:, None])[:, 0]
    torch.testing.assert_close(ours.logps.double(), exact, atol=5e-6, rtol=1e-6)
    if how.get("top_k") == 1:
        assert torch.equal(ours.tokens, logits.float().argmax(1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ties_go_to_the_lowest(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At logits of 1e9 float32 goes in steps of 64: the noise is rounded away, all tie. Greedy: three tie."""
    monkeypatch.setattr(sampling_kernels, "BLOCK", 32)
    monkeypatch.setattr(sampling_kernels, "SPAN", 64)
    keys, positions = torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)
    logits = torch.full((3, 100), 1e9, device=DEVICE)
    logits[1, :40] = 0
    logits[2, :77] = -INF
    assert sample_tokens(logits, keys, positions, impl=impl).tokens.tolist() == [0, 40, 77]
    logits = torch.zeros(3, 100, device=DEVICE)
    logits[0, [5, 50, 99]] = logits[1, [98, 97, 96]] = logits[2, [33, 40, 47]] = 1.0
    found = sample_tokens(logits, keys, positions, impl=impl, top_k=1)
    assert found.tokens.tolist() == [5, 96, 33]
    torch.testing.assert_close(found.logps.cpu(), torch.full((3,), 1 - math.log(3 * math.e + 97)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"softcap": 2.0}], ids=str)
def test_rows_that_are_no_distribution(how: dict[str, Any], impl: Any) -> None:
    """NaN, all -inf and +inf give NaN and token 0; beside them a row with one possible token gives it, log 1 = 0."""
    if "softcap" in how:
        logits = torch.tensor([[0, NAN, 1], [-INF, -INF, -INF], [-INF, 0, -INF], [NAN, NAN, NAN]])
    else:
        logits = torch.tensor([[0, NAN, 1], [-INF, -INF, -INF], [-INF, 0, -INF], [INF, 0, 0]])
    n = torch.arange(4, device=DEVICE)
    found = sample_tokens(logits.to(DEVICE), n, n, impl=impl, **how)
    assert found.tokens.tolist() == [0, 0, 1, 0]
    assert found.logps.isnan().tolist() == [True, True, False, True] and found.logps[2] == 0


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, [0.4, 0.25, 0.2, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.0625, 0.04, 0.01, 0.0025]),
        ({"top_k": 2}, [0.4, 0.25, 0, 0, 0]),
        ({"top_p": 0.84}, [0.4, 0.25, 0.2, 0, 0]),
        ({"top_p": 0.86}, [0.4, 0.25, 0.2, 0.1, 0]),
        ({"top_p": 0.86, "top_k": 2}, [0.4, 0.25, 0, 0, 0]),
        ({"top_p": 0.39, "top_k": 2}, [0.4, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.64}, [0.4, 0.25, 0, 0, 0]),  # of the whole distribution, not of the three
    ],
    ids=str,
)
def test_distribution(how: dict[str, Any], kept: list[float]) -> None:
    """20,000 draws against the probabilities left by hand: chi-square below 18.5, its 99.9 % point at 4 degrees of
    freedom. Log-probabilities stay those of the whole distribution."""
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    want = torch.tensor(kept)[[3, 0, 4, 1, 2]].double()
    draws = 20_000
    keys = torch.full((draws,), token_key(1, 2, 3, 4) >> 1)
    found = sample_tokens(p.log().expand(draws, 5), keys, torch.arange(draws), impl="torch", **how)
    counts, want = found.tokens.bincount(minlength=5).double(), draws * want / want.sum()
    assert not counts[want == 0].any()
    assert float(((counts - want) ** 2 / want)[want > 0].sum()) < 18.5
    whole = torch.log_softmax(p.log() / how.get("temperature", 1.0), 0)
    torch.testing.assert_close(found.logps, whole[found.tokens])


def test_distribution_over_keys() -> None:
    """The same over 20,000 completions at position 0: neighbours of a step differ in one number of their key."""
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    keys = torch.tensor([token_key(0, 0, i // 8, i % 8) for i in range(20_000)], dtype=torch.uint64).view(torch.int64)
    found = sample_tokens(p.log().expand(20_000, 5), keys, torch.zeros_like(keys), impl="torch")
    want = 20_000 * p.double()
    assert float(((found.tokens.bincount(minlength=5) - want) ** 2 / want).sum()) < 18.5


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_equal_logits_at_the_border_stay(how: dict[str, Any], impl: Any) -> None:
    """Probabilities 0.4, 0.2, 0.2, 0.2: two or more kept means all four, as no order among the three is better."""
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2], device=DEVICE).log().expand(24, 4)
    n = torch.arange(24, device=DEVICE)
    assert set(sample_tokens(logits, n, n, impl=impl, **how).tokens.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_a_draw_does_not_depend_on_its_batch(how: dict[str, Any], impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: alone, in reverse, in chunks of other sizes, as every second row of a wider tensor."""
    logits, keys, positions = (x.to(DEVICE) for x in inputs(4, 700))
    whole = sample_tokens(logits, keys, positions, impl=impl, **how)

    def same(found: sampling.Sampled, at: Any) -> bool:
        return torch.equal(found.tokens, whole.tokens[at]) and torch.equal(found.logps, whole.logps[at])

    for row in (0, 3):
        at = slice(row, row + 1)
        assert same(sample_tokens(logits[at], keys[at], positions[at], impl=impl, **how), at)
    back = torch.arange(3, -1, -1, device=DEVICE)
    assert same(sample_tokens(logits[back], keys[back], positions[back], impl=impl, **how), back)
    monkeypatch.setattr(sampling, "CHUNK", 2000)
    monkeypatch.setattr(sampling, "FILTER_CHUNK", 2000)
    assert same(sample_tokens(logits, keys, positions, impl=impl, **how), slice(None))
    wide = torch.stack([logits, logits + 1], 1).reshape(8, 700)[::2]
    columns = logits.T.contiguous().T
    assert not wide.is_contiguous() and columns.stride(1) != 1
    for view in (wide, columns):
        assert same(sample_tokens(view, keys, positions, impl=impl, **how), slice(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_order_of_the_logits_is_that_of_a_sort(dtype: torch.dtype) -> None:
    """From the largest down, NaN before +inf, -inf last, equal ones kept: what torch's own sort gives."""
    logits = (inputs(6, 3000, spread=3)[0].to(dtype) * 8).round() / 8
    logits[1, 5:9], logits[2, ::3], logits[3, 7], logits[4] = NAN, -INF, INF, 0
    want = logits.sort(1, descending=True).values.float()
    torch.testing.assert_close(sampling._descending(logits), want, rtol=0, atol=0, equal_nan=True)


def inverted(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens [n, draws] by inverting the cumulative distribution of logits [n, V], at draws [n, draws] in [0, 1)."""
    cumulative = torch.softmax(logits, 1).double().cumsum(1)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)


def test_rounding_rarely_changes_a_token() -> None:
    """Of 960 draws at an entropy of 3.8 nats: none changes with noise on the logits of 1e-6 and 1e-5, as float32 in
    another batch has it, at most 0.6 % with 4e-3, as bfloat16 has it. Inverting the cumulative distribution shifts
    every boundary behind a changed probability: over 5 % change, ten times as many."""
    draw = torch.Generator().manual_seed(5)
    row = 4.2 * torch.randn(49152, generator=draw)
    entropy = float(torch.distributions.Categorical(logits=row).entropy())
    assert 3.3 < entropy < 4.3, entropy
    logits, uniform = row.expand(80, -1), torch.rand(80, 12, dtype=torch.float64, generator=draw)

    def tokens(x: Tensor) -> Tensor:
        each = torch.arange(80)
        return torch.stack(
            [sample_tokens(x, each, torch.full_like(each, t), impl="torch").tokens for t in range(12)], 1
        )

    ours, theirs = tokens(logits), inverted(logits, uniform)
    for sigma, most in ((1e-6, 0), (1e-5, 0), (4e-3, 0.006)):
        other = logits + sigma * torch.randn(logits.shape, generator=draw)
        flips = float((tokens(other) != ours).double().mean())
        assert flips <= most, (sigma, flips)
    assert float((inverted(other, uniform) != theirs).double().mean()) > max(0.05, 10 * flips)


def test_other_dtypes_and_no_rows() -> None:
    """Float64 logits are sampled in float32; no rows give no tokens, by the kernel too; a gradient is not followed."""
    logits, keys, positions = inputs(4, 50)
    single = sample_tokens(logits, keys, positions, impl="torch")
    double = sample_tokens(logits.double().requires_grad_(), keys, positions)
    assert torch.equal(single.tokens, double.tokens) and torch.equal(single.logps, double.logps)
    for impl in ("torch", "triton"):
        none = sample_tokens(*(x[:0].to(DEVICE) for x in (logits, keys, positions)), top_p=0.5, impl=impl)  # type: ignore[arg-type]
        assert none.tokens.shape == none.logps.shape == (0,)


@pytest.mark.parametrize("name", ["temperature", "scale", "softcap"])
def test_numbers_must_be_positive(name: str) -> None:
    """The message names the number."""
    with pytest.raises(ValueError, match=f"{name}: expected a number > 0, got 0.0"):
        sample_tokens(*inputs(1, 3), **{name: 0.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_filters_must_fit(how: dict[str, Any]) -> None:
    """The message shows both."""
    with pytest.raises(ValueError, match=r"expected top_k >= 0 and top_p in \(0, 1\], got top_k"):
        sample_tokens(*inputs(1, 3), **how)


@pytest.mark.parametrize(
    ("logits", "keys", "positions"),
    [
        (torch.zeros(3), torch.arange(3), torch.arange(3)),
        (torch.zeros(3, 0), torch.arange(3), torch.arange(3)),
        (torch.zeros(3, 4).long(), torch.arange(3), torch.arange(3)),
        (torch.zeros(3, 4), torch.arange(2), torch.arange(3)),
        (torch.zeros(3, 4), torch.arange(3), torch.arange(3).int()),
    ],
)
def test_shapes_and_dtypes_must_fit(logits: Tensor, keys: Tensor, positions: Tensor) -> None:
    """The message shows those of the two that do not fit."""
    with pytest.raises(ValueError, match=r"expected logits \[B, V\] of floats and (keys|positions) \[B\] int64, got"):
        sample_tokens(logits, keys, positions)


def test_impl_must_be_known() -> None:
    """As for the other operations."""
    with pytest.raises(ValueError, match='impl: expected "auto"'):
        sample_tokens(*inputs(1, 3), impl="numpy")  # type: ignore[arg-type]
