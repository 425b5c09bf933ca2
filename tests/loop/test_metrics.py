"""Sums, counts and the mean over a window, by hand."""

from __future__ import annotations

import pytest
import run_cases
from support import RankPool

from dsalign.loop.metrics import Window


def test_sums_are_divided_once_over_all_ranks(two_ranks: RankPool) -> None:
    """mixed: (1 + 3 + 2 + 3) / (2 + 1 + 2 + 1) = 1.5; here: rank 1's alone; never: counted nowhere, so absent."""
    assert two_ranks.run(run_cases.sums_over_ranks) == pytest.approx({"here": 5.0, "mixed": 1.5})


def test_sums_are_float64(two_ranks: RankPool) -> None:
    """2**24 + 1: in float32 the 1 would be lost."""
    assert two_ranks.run(run_cases.large_and_small) == {"large": 2.0**24 + 1}


def test_window_is_the_mean_over_steps() -> None:
    """a: (1 + 2) / 2; b was there once; afterwards nothing is left."""
    window = Window()
    window.add({"a": 1.0})
    window.add({"a": 2.0, "b": 5.0})
    assert window.take() == {"a": 1.5, "b": 5.0}
    assert window.take() == {}
