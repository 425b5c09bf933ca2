"""Curves cut down for a page: short ones whole, long ones with their peaks and gaps."""

from __future__ import annotations

import math

from dsalign.report.series import MOST, compact


def test_a_short_curve_is_whole() -> None:
    """Five significant digits; what is not finite is a gap."""
    points = [(1, 0.123456789), (2, math.nan), (3, 2.0), (4, math.inf)]
    assert compact(points) == {"x": [1, 2, 3, 4], "y": [0.12346, None, 2, None]}


def test_a_long_curve_keeps_peaks_gaps_and_ends() -> None:
    """10,000 steps of 0 with one peak, one dip and one NaN: all three stay where they are, and so do both ends. 250
    runs of 40 steps have 2 points at most, the NaN's run 3, and the ends may add 2."""
    values = {step: 0.0 for step in range(1, 10_001)} | {4321: 9.5, 7000: -3.0, 5555: math.nan}
    kept = compact(sorted(values.items()))
    at = dict(zip(kept["x"], kept["y"], strict=True))
    assert at[4321] == 9.5 and at[7000] == -3 and at[5555] is None
    assert kept["x"][0] == 1 and kept["x"][-1] == 10_000
    assert kept["x"] == sorted(set(kept["x"])) and len(kept["x"]) <= MOST // 2 + 3


def test_smoothing_starts_from_means() -> None:
    """2,000 steps in 250 runs of 8: the first run's steps 0..7 have the mean 3.5 and the middle step 4; a NaN does not
    count: (1 + 2 + .. + 7) / 7 = 4."""
    points = [(float(i), float(i)) for i in range(2000)]
    assert (compact(points)["mx"][0], compact(points)["m"][0]) == (4, 3.5)
    points[0] = (0.0, math.nan)
    assert compact(points)["m"][0] == 4
