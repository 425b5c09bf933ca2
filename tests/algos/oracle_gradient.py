"""Gradients by central differences in float64, for any loss of nested lists of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FIRST_STEP = 2.0**-4
LEVELS = 14  # the last step is 2^-17
GOOD_ENOUGH = 1e-11  # relative


def _slope(at: Callable[[float], float], x: float) -> float:
    """f'(x) by central differences at halved steps, extrapolated to step 0; the best-agreeing estimate wins.

    Steps that reach across a kink disagree with smaller ones and so are left behind.
    Source: Ridders 1982, Advances in Engineering Software 4(2).
    """
    best, error = math.nan, math.inf
    coarser: list[float] = []
    for level in range(LEVELS):
        step = FIRST_STEP / 2**level
        row = [(at(x + step) - at(x - step)) / ((x + step) - (x - step))]
        for order, old in enumerate(coarser, start=1):
            row.append(row[-1] + (row[-1] - old) / (4**order - 1))
            gap = max(abs(row[-1] - row[-2]), abs(row[-1] - old))
            if gap < error:
                best, error = row[-1], gap
        if error <= GOOD_ENOUGH * abs(best):
            break
        coarser = row
    return best


def gradient(loss: Callable[[Any], float], tokens: Any) -> Any:
    """d loss / d every number in nested lists and tuples of float64 arrays, in the same nesting.

    The relative error is below 1e-8 where no kink lies within 1e-4; `tokens` is left as it was.
    """

    def copied(node: Any) -> Any:
        return node.astype(np.float64) if isinstance(node, np.ndarray) else type(node)(copied(child) for child in node)

    moved = copied(tokens)

    def slope(array: Array, index: tuple[int, ...]) -> float:
        x = float(array[index])

        def at(value: float) -> float:
            array[index] = value
            return loss(moved)

        result = _slope(at, x)
        array[index] = x
        return result

    def slopes(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            flat = [slope(node, index) for index in np.ndindex(node.shape)]
            return np.array(flat, dtype=np.float64).reshape(node.shape)
        return type(node)(slopes(child) for child in node)

    return slopes(moved)
