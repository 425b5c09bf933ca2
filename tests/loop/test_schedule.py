"""The learning rate's factor, by hand."""

from __future__ import annotations

import math

import pytest

from dsalign.loop.schedule import learning_rate_factor


def factors(kind: str, total: int, warmup_ratio: float) -> list[float]:
    return [learning_rate_factor(kind, step, total, warmup_ratio) for step in range(total)]


def test_linear() -> None:
    """Ten steps, ceil(0.15 * 10) = 2 of warm-up: 1/3, 2/3, then 1 - k / 8."""
    want = [1 / 3, 2 / 3, *[1 - k / 8 for k in range(8)]]
    assert factors("linear", 10, 0.15) == pytest.approx(want)


def test_cosine() -> None:
    """Without warm-up: 1, then (1 + cos(pi k / 4)) / 2; a half at half time."""
    root = math.sqrt(2) / 4
    assert factors("cosine", 4, 0.0) == pytest.approx([1, 0.5 + root, 0.5, 0.5 - root])


def test_constants() -> None:
    """`constant` has no warm-up whatever the ratio says."""
    assert factors("constant", 4, 0.5) == [1.0] * 4
    assert factors("constant_with_warmup", 4, 0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup_ratio"), [(1, 0.0), (1, 0.05), (3, 1.0), (100, 0.05)])
def test_no_step_is_wasted(kind: str, total: int, warmup_ratio: float) -> None:
    """Every factor is above 0 and at most 1, with one step and with nothing but warm-up too."""
    assert all(0 < f <= 1 for f in factors(kind, total, warmup_ratio))


def test_falls_to_zero_at_the_end() -> None:
    for kind in ("linear", "cosine"):
        assert learning_rate_factor(kind, 10, 10, 0.2) == pytest.approx(0, abs=1e-12)
