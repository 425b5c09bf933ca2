"""Metrics as sums and counts: they add over micro-batches, steps and ranks, and are divided once, at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsalign.contract.groups import Metrics
from dsalign.engines import dist


class Sums:
    """Adds (sum, count) pairs by name, in float64, and reads the device only when asked for the means."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add a loss's or a prepared batch's metrics."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + _double(total), old_count + _double(count))

    def reduced(self, device: torch.device) -> dict[str, float]:
        """Means over all ranks; a metric that nothing was counted for is absent. Collective: every rank must have added
        the same names, which holds because the same loss ran everywhere, if on empty micro-batches."""
        names = sorted(self._sums)
        flat = dist.total([float(x) for name in names for x in self._sums[name]], device)
        return {n: flat[2 * i] / flat[2 * i + 1] for i, n in enumerate(names) if flat[2 * i + 1] > 0}


def _double(number: Tensor | float) -> Tensor | float:
    return number.double() if isinstance(number, Tensor) else float(number)


class Window:
    """The mean of each metric over the optimizer steps between two logged lines."""

    def __init__(self) -> None:
        self._steps: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """The metrics of one optimizer step."""
        for name, value in metrics.items():
            self._steps.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means; the window is empty afterwards."""
        means = {name: sum(values) / len(values) for name, values in self._steps.items()}
        self._steps = {}
        return means
