"""Curves as a page can hold them: thousands of points become some hundreds without losing a peak or a gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MOST = 1000  # points of a curve that is kept whole; a chart is narrower on any screen
DIGITS = 5  # significant, in the page

Points = Sequence[tuple[float, float]]


def compact(points: Points) -> dict[str, list[Any]]:
    """A curve for the page: {"x": steps, "y": values, "m": running base of smoothing}.

    Up to MOST points are kept as they are, "m" is then left out. More are cut into MOST / 4 runs of neighbours: of each
    the smallest and largest value stay at their places, and a value that is not finite, which is None here, as a gap is
    drawn there; "mx" and "m" hold each run's middle step and its mean over finite values, from which smoothed curves
    are drawn: smallest and largest values alone would smooth to something else.
    """
    if len(points) <= MOST:
        return {"x": [_number(x) for x, _ in points], "y": [_number(y) for _, y in points]}
    runs = MOST // 4
    kept: list[tuple[float, float]] = []
    middles: list[float] = []
    means: list[float] = []
    for i in range(runs):
        run = points[i * len(points) // runs : (i + 1) * len(points) // runs]
        finite = [point for point in run if math.isfinite(point[1])]
        gap = next((point for point in run if not math.isfinite(point[1])), None)
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted(ends | ({gap} if gap else set()), key=lambda p: p[0])
        middles.append(run[len(run) // 2][0])
        means.append(sum(y for _, y in finite) / len(finite) if finite else math.nan)
    for i, end in ((0, points[0]), (len(kept), points[-1])):  # the first and the last step are always there
        if end not in kept:
            kept.insert(i, end)
    return {
        "x": [_number(x) for x, _ in kept],
        "y": [_number(y) for _, y in kept],
        "mx": [_number(x) for x in middles],
        "m": [_number(y) for y in means],
    }


def _number(x: float) -> float | int | None:
    """A number of few digits for JSON; None where it is not finite."""
    if not math.isfinite(x):
        return None
    rounded = float(f"{x:.{DIGITS}g}") if not float(x).is_integer() else x
    return int(rounded) if float(rounded).is_integer() and abs(rounded) < 2**53 else rounded
