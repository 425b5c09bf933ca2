"""Gumbel-max sampling: the hash and the keys by independent ones, draws by their exact distribution, and coupling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsalign_kernels import gumbel, sample_tokens, token_key
from dsalign_kernels.sampling import _noise

VOCABULARY = 49152


def murmur3(data: bytes) -> int:
    """murmur3_x86_32 with seed 0 of whole words, as its author describes it, one step a line."""
    mask = 2**32 - 1

    def turned(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & mask

    h = 0
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little")
        k = turned(k * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        h = (turned(h ^ k, 13) * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


def keys_of(n: int, seed: int = 0) -> Tensor:
    return torch.tensor([token_key(seed, 0, i, 0) - 2**64 * (token_key(seed, 0, i, 0) >= 2**63) for i in range(n)])


def test_the_hash_is_murmur3() -> None:
    """Vectors of murmur3_x86_32 for "test" and "Hello, wo" cut to words; then the noise of any key, from its bytes."""
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"") == 0
    keys, positions = torch.tensor([-1, 2**40 + 7, 0]), torch.tensor([0, 511, 2**32 - 1])
    found = gumbel(keys, positions, 300)
    for row, (key, position) in enumerate(zip(keys.tolist(), positions.tolist(), strict=True)):
        for token in (0, 1, 299):
            words = (key % 2**64).to_bytes(8, "little") + position.to_bytes(4, "little") + token.to_bytes(4, "little")
            u = min((murmur3(words) + 0.5) / 2**32, 1 - 2**-24)
            assert float(found[row, token]) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-6)


def test_keys_are_a_chain_of_splitmix64() -> None:
    """The first output of SplitMix64 seeded with 0 is 0xE220A8397B1DCDAF; each of four numbers counts, in its place."""
    gamma = 0x9E3779B97F4A7C15

    def mixed(z: int) -> int:
        z = (z + gamma) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert mixed(0) == 0xE220A8397B1DCDAF
    assert token_key(0, 0, 0, 0) == mixed(mixed(mixed(mixed(0))))
    assert token_key(42, 3, 17, 1) == mixed(mixed(mixed(mixed(42) ^ 3) ^ 17) ^ 1)
    assert len({token_key(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in range(5)}) == 625


def test_the_noise_is_gumbels() -> None:
    """Mean 0.5772 and variance pi^2 / 6 over two million numbers, within 4 standard errors; both ends are finite."""
    noise = gumbel(keys_of(40), torch.arange(40), VOCABULARY).double()
    assert float(noise.mean()) == pytest.approx(0.577216, abs=4 * (1.645 / noise.numel()) ** 0.5)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.01)
    ends = _noise(np.array([0, 2**32 - 1], np.uint32))
    assert ends.tolist() == pytest.approx([-math.log(-math.log1p(-0.5 / 2**32)), -math.log(24 * math.log(2))], rel=1e-5)


HOW: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"scale": 0.5, "softcap": 4.0}, {"top_k": 40}, {"top_p": 0.6}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_largest_sum(how: dict[str, Any], dtype: torch.dtype) -> None:
    """Against arg max of (filtered logits + noise) in float64, over strided rows with a column of -inf; and the
    log-probability before noise and filters."""
    logits = torch.randn(30, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2] * 3
    logits[:, 7] = -torch.inf
    keys, positions = keys_of(30), torch.arange(30) % 7
    z = logits.double() * how.get("scale", 1.0)
    if cap := how.get("softcap"):
        z = cap * torch.tanh(z / cap)
    z = z / how.get("temperature", 1.0)
    kept = z
    if k := how.get("top_k"):
        kept = kept.masked_fill(z < z.topk(k).values[:, -1:], -torch.inf)
    if top_p := how.get("top_p"):
        above = (torch.softmax(z, -1)[:, None, :] * (z[:, None, :] > z[:, :, None])).sum(-1)
        kept = kept.masked_fill(above >= top_p, -torch.inf)
    want = (kept + gumbel(keys, positions, 550).double()).argmax(-1)
    found = sample_tokens(logits, keys, positions, **how)
    assert torch.equal(found.tokens, want)
    exact = (torch.log_softmax(z, -1).gather(1, want[:, None])[:, 0]).float()
    torch.testing.assert_close(found.logps, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", [*HOW, {"top_k": 1}, {"top_k": 30, "top_p": 0.8, "temperature": 1.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_its_twin(how: dict[str, Any], dtype: torch.dtype, poisoned: None) -> None:
    """The same tokens, and log-probabilities within 2e-6 nats, over three blocks of a row and ragged positions."""
    logits = 3 * torch.randn(6, 10_000, generator=torch.Generator().manual_seed(5)).to(dtype)
    logits[:, 4096:4200], logits[2, 9_000:] = -torch.inf, -torch.inf
    keys, positions = keys_of(6), torch.tensor([0, 1, 7, 511, 4096, 2**20])
    want = sample_tokens(logits, keys, positions, impl="torch", **how)
    found = sample_tokens(logits, keys, positions, impl="triton", **how)
    assert torch.equal(found.tokens, want.tokens)
    torch.testing.assert_close(found.logps, want.logps, rtol=0, atol=2e-6)


LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]))


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_k": 9}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 8 / 13, 0, 5 / 13, 0]),
        ({"top_p": 0.8}, [0, 8 / 17, 0, 5 / 17, 4 / 17]),  # 0.4 + 0.25 < 0.8 <= 0.4 + 0.25 + 0.2
        ({"top_p": 0.6}, [0, 8 / 13, 0, 5 / 13, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),  # the most probable token is always there
        ({"top_p": 0.9, "top_k": 2}, [0, 8 / 13, 0, 5 / 13, 0]),
        ({"top_p": 0.3, "top_k": 4}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [x / 0.275 for x in (0.0025, 0.16, 0.01, 0.0625, 0.04)]),
        # squared and normalised 0.58, 0.23, 0.15, 0.04, 0.01: without the temperature top_p would keep three
        ({"temperature": 0.5, "top_p": 0.7}, [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
    ],
    ids=str,
)
def test_frequencies_are_the_filtered_probabilities(how: dict[str, Any], want: list[float]) -> None:
    """20,000 draws: chi-square below its 99.99 % point for 4 degrees of freedom, and no token that was filtered out."""
    found = sample_tokens(LOGITS.expand(20_000, -1), keys_of(20_000), torch.zeros(20_000, dtype=torch.int64), **how)
    counts = torch.bincount(found.tokens, minlength=5).double()
    expected = torch.tensor(want).double() * 20_000
    assert not counts[expected == 0].any()
    assert float(((counts - expected) ** 2)[expected > 0].div(expected[expected > 0]).sum()) < 23.5
    torch.testing.assert_close(
        found.logps[:9], torch.log_softmax(LOGITS / how.get("temperature", 1), -1)[found.tokens[:9]]
    )


def test_ties_go_to_the_lowest_id() -> None:
    equal = torch.zeros(4, 6)
    found = sample_tokens(equal, keys_of(4), torch.zeros(4, dtype=torch.int64), top_k=1)
    assert found.tokens.tolist() == [0] * 4
    assert found.logps.tolist() == pytest.approx([-math.log(6)] * 4)


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    """Bit for bit: alone, and with rows enough for several chunks."""
    logits = torch.randn(9, 20_000, generator=torch.Generator().manual_seed(1))
    keys, positions = keys_of(9), torch.arange(9)
    whole = sample_tokens(logits, keys, positions)
    for i in range(9):
        alone = sample_tokens(logits[i : i + 1], keys[i : i + 1], positions[i : i + 1])
        assert torch.equal(alone.tokens, whole.tokens[i : i + 1]) and torch.equal(alone.logps, whole.logps[i : i + 1])


def test_rows_without_a_distribution_say_so() -> None:
    logits = torch.zeros(4, 5)
    logits[0, 2], logits[1], logits[2, 0] = torch.nan, -torch.inf, torch.inf
    for impl in ("torch", "triton"):
        found = sample_tokens(logits, keys_of(4), torch.zeros(4, dtype=torch.int64), impl=impl)  # type: ignore[arg-type]
        assert found.logps.isnan().tolist() == [True, True, True, False], impl
        assert found.tokens[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("entropy", "spread"), [("low", 4.0), ("high", 2.0)])
def test_small_noise_on_the_logits_rarely_changes_a_token(entropy: str, spread: float) -> None:
    """The coupling: with noise of 1e-5 nats on each logit no token of 400 changes, with 4e-3 (bfloat16) at most 1 %;
    inverting the cumulative distribution changes ten times as many."""
    generator = torch.Generator().manual_seed(2)
    n = 400
    logits = spread * torch.randn(n, VOCABULARY, generator=generator)
    keys, positions = keys_of(n), torch.zeros(n, dtype=torch.int64)
    first = sample_tokens(logits, keys, positions).tokens
    u = torch.rand(n, 1, dtype=torch.float64, generator=generator)

    def inverted(z: Tensor) -> Tensor:
        cumulative = torch.softmax(z, -1).double().cumsum(-1)
        return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]

    noise = torch.randn(n, VOCABULARY, generator=generator)
    assert torch.equal(sample_tokens(logits + 1e-5 * noise, keys, positions).tokens, first)
    changed = float((sample_tokens(logits + 4e-3 * noise, keys, positions).tokens != first).double().mean())
    others = float((inverted(logits + 4e-3 * noise) != inverted(logits)).double().mean())
    assert changed <= 0.01 and others >= max(0.02, 10 * changed - 0.02), (entropy, changed, others)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"softcap": 0.0}, {"scale": -1.0}],
    ids=str,
)
def test_numbers_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        sample_tokens(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), **bad)
