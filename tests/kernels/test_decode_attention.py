"""`decode_attention`: kernel and textbook against float64, over ragged positions, shared heads, windows, softcaps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import quick_if
from torch import Tensor

from dsalign_kernels import decode_attention, decode_attention_kernels, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS = (0, 16, 31, 64, 69)  # at both sides of the edges of blocks and of splits, and at the ends
HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a window of 1": {"window": 1},
    "a window of 20": {"window": 20},
    "a window as long as the cache": {"window": 70},
    "softcap": {"softcap": 2.0, "scaling": 0.7},
    "both": {"softcap": 2.0, "window": 33},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens and splits of 32: a cache of 70 tokens has five and three of them."""
    monkeypatch.setattr(decode_attention_kernels, "SPLIT", 32)
    monkeypatch.setattr(decode_attention_kernels, "READS", {2**31: (16, 2)})


def inputs(
    group: int = 1, width: int = 16, *, heads: int = 2, dtype: torch.dtype = torch.float32, length: int = 70
) -> list[Tensor]:
    """Query, keys, values and positions of five rows; what stands behind a row's position is NaN."""
    draw = torch.Generator().manual_seed(group + width)
    n = len(POSITIONS)
    sizes = ((n, group * heads, width), (n, heads, length, width), (n, heads, length, width))
    query, keys, values = (torch.randn(size, generator=draw).to(dtype) for size in sizes)
    for row, position in enumerate(POSITIONS):
        keys[row, :, position + 1 :] = values[row, :, position + 1 :] = math.nan
    return [x.to(DEVICE) for x in (query, 2 * keys, values, torch.tensor(POSITIONS))]


def exact(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, **how: Any) -> Tensor:
    """The definition, a row, a head and a token at a time, in float64."""
    out = torch.empty(*query.shape[:2], values.shape[3], dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    scaling, softcap = how.get("scaling", query.shape[2] ** -0.5), how.get("softcap")
    for row, last in enumerate(positions.tolist()):
        first = max(0, last + 1 - how.get("window", last + 1))
        for head in range(query.shape[1]):
            k, v = (x[row, head // group, first : last + 1].double().cpu() for x in (keys, values))
            z = k @ query[row, head].double().cpu() * scaling
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            out[row, head] = torch.softmax(z, 0) @ v
    return out


def gap(found: Tensor, want: Tensor) -> float:
    return float((found.double().cpu() - want).abs().max())


@pytest.mark.parametrize("how", [quick_if(how in ("plain", "both"), how) for how in HOWS])
@pytest.mark.usefixtures("poisoned")
def test_kernel_against_float64(how: str) -> None:
    """In float32 no larger an error than the textbook's, and nothing behind a position is read; memory that no program
    wrote would show as NaN."""
    tensors = inputs(3)
    want = exact(*tensors, **HOWS[how])
    clean = [tensors[0], *(x.nan_to_num() for x in tensors[1:3]), tensors[3]]
    twin = decode_attention(*clean, **HOWS[how], impl="torch")
    found = decode_attention(*tensors, **HOWS[how], impl="triton")
    assert gap(found, want) <= gap(twin, want) + 2e-7 and gap(twin, want) < 2e-6


@pytest.mark.parametrize(("group", "width"), [(1, 64), (3, 128), (8, 80)])
def test_shared_heads_and_widths(group: int, width: int) -> None:
    """1, 3 and 8 queries a head, padded to 16; widths of 64, 128, and 80, which is padded."""
    tensors = [x[-2:] for x in inputs(group, width, heads=1)]
    found = decode_attention(*tensors, impl="triton")
    assert found.shape == (2, group, width) and gap(found, exact(*tensors)) < 4e-6


def test_float16_and_values_of_another_width() -> None:
    """The sums are in float32: the error is that of rounding the weights and the result to 11 bits, each half of a unit
    in the last place of numbers below 2 at most."""
    query, keys, values, positions = inputs(2, 16, dtype=torch.float16)
    values = torch.cat([values, values[..., :8]], 3)
    found = decode_attention(query, keys, values, positions, impl="triton")
    assert found.dtype == torch.float16 and found.shape == (5, 4, 24)
    assert gap(found, exact(query, keys, values, positions)) < 2 * 2.0**-10


@pytest.mark.parametrize("window", [quick_if(False, None), 40])
def test_a_row_depends_on_itself_alone(window: int | None) -> None:
    """Bit for bit: with other rows or alone, and in a cache of 70 or of its own live tokens, whatever its strides."""
    query, keys, values, positions = inputs(2)
    whole = decode_attention(query, keys, values, positions, window=window, impl="triton")
    for row in (2, 4):
        part, live = slice(row, row + 1), POSITIONS[row] + 1
        alone = (query[part], keys[part, :, :live].clone(), values[part, :, :live].clone(), positions[part])
        torch.testing.assert_close(
            decode_attention(*alone, window=window, impl="triton"), whole[part], rtol=0, atol=0, equal_nan=False
        )


def test_any_strides() -> None:
    """The cache of tokens before heads, a query of every other head, a last dimension that is not dense."""
    query, keys, values, positions = (x[-2:] for x in inputs(2))
    want = decode_attention(query, keys, values, positions, impl="triton")
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.stack([query, query], 2).flatten(1, 2)[:, ::2]
    columns = values.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(decode_attention(spread, turned, columns, positions, impl="triton"), want)


def test_a_position_beyond_the_cache_reads_all_of_it() -> None:
    """A row of which nobody reads the output may stand anywhere: no memory beyond the cache is touched."""
    query, keys, values, _ = (x[-1:] for x in inputs())
    last, beyond = (torch.tensor([at], device=DEVICE) for at in (69, 5000))
    found = [decode_attention(query, keys, values, at, window=7, impl="triton") for at in (last, beyond)]
    assert torch.equal(*found)


def test_nan_reaches_its_own_row_alone() -> None:
    query, keys, values, positions = (x[-2:] for x in inputs())
    keys[1, 1, 40, 3] = math.nan
    found = decode_attention(query, keys, values, positions, impl="triton")
    assert found[1, 1].isnan().all() and not found[1, 0].isnan().any() and not found[0].isnan().any()


def test_the_textbook_by_hand() -> None:
    """Scores 0 and log 3 weigh 1/4 and 3/4: 0.25 x 4 + 0.75 x 8 = 7; a window of 1 sees the last alone: 8. A softcap of
    log 3 makes of scores 0 and 1e9: 0 and log 3. Float64 stays float64, on any device."""
    cache = torch.tensor([[0.0, math.log(3)], [4.0, 8.0]], dtype=torch.float64)
    (keys, values), query, at = cache.reshape(2, 1, 1, 2, 1), cache.new_ones(1, 1, 1), torch.tensor([1])
    for how, want in (({}, 7.0), ({"window": 1}, 8.0), ({"softcap": math.log(3), "scaling": 1e9}, 7.0)):
        found = decode_attention(query, keys, values, at, **how)
        assert found.dtype == torch.float64 and float(found) == pytest.approx(want, abs=1e-12)
    assert float(reference.decode_attention(query, keys, values, torch.tensor([0]))) == 4.0


def test_no_rows() -> None:
    query, keys, values, positions = (x[:0] for x in inputs())
    for impl in ("torch", "triton"):
        assert decode_attention(query, keys, values, positions, impl=impl).shape == (0, 2, 16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": torch.zeros(2, 3, 4)}, "a multiple of heads"),
        ({"query": torch.zeros(2, 2, 5)}, "got .2, 2, 5. torch.float32"),
        ({"keys": torch.zeros(2, 2, 9, 4).half()}, "of one float dtype"),
        ({"values": torch.zeros(2, 2, 8, 4)}, "2, 2, 8, 4"),
        ({"positions": torch.zeros(2)}, "positions .B. int64"),
        ({"window": 0}, "window: expected a number of tokens >= 1 or None, got 0"),
        ({"softcap": 0.0}, "softcap: expected a number > 0 or None, got 0.0"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], said: str) -> None:
    cache = {name: torch.zeros(2, 2, 9, 4) for name in ("keys", "values")}
    given = {"query": torch.zeros(2, 2, 4), **cache, "positions": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=said):
        decode_attention(**{**given, **change})
