"""Metrics as sums and counts: they add over micro-batches, steps and ranks, and are divided once, at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsalign.contract.groups import Metrics
from dsalign.engines import dist


class Sums:
    """Totals of metrics by name, as (sum, count) in float64. They stay on the device until the means are read, so that
    adding does not wait for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the (sum, count) of each metric of a loss or a prepared batch."""
        for name, (total, count) in metrics.items():
            old_total, old_count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + _double(total), old_count + _double(count))

    def reduced(self, device: torch.device) -> dict[str, float]:
        """The mean of each metric over all ranks; a metric with count 0 is left out. Collective: every rank must have
        added the same names, which holds as every rank runs the same losses, if on empty micro-batches."""
        return self.reduced_with((), device)[0]

    def reduced_with(self, numbers: Sequence[float], device: torch.device) -> tuple[dict[str, float], list[float]]:
        """(what `reduced` returns, the sum of each of `numbers` over all ranks) by one all-reduce. Collective."""
        names = sorted(self._sums)
        flat = dist.total([*numbers, *(float(x) for name in names for x in self._sums[name])], device)
        asked, pairs = flat[: len(numbers)], flat[len(numbers) :]
        return {n: pairs[2 * i] / pairs[2 * i + 1] for i, n in enumerate(names) if pairs[2 * i + 1] > 0}, asked


def _double(number: Tensor | float) -> Tensor | float:
    return number.double() if isinstance(number, Tensor) else float(number)


class Spread:
    """The variance (n - 1) of the metrics in `OF` over the optimizer steps of one prepared batch, logged as NAME_var.

    A policy ratio that varies from step to step is a sign of too many passes over a batch. updates: metric -> its
    values over this batch so far, kept up to date in place.
    """

    OF = ("val/ratio",)

    def __init__(self, updates: dict[str, list[float]] | None = None) -> None:
        self._updates = {} if updates is None else updates

    def of(self, metrics: Mapping[str, float], *, last: bool) -> dict[str, float]:
        """Add the metrics of an optimizer step. After the `last` step over a batch returns the variances, none where
        there was one step alone; returns none before it."""
        for name in self.OF:
            if name in metrics:
                self._updates.setdefault(name, []).append(metrics[name])
        if not last:
            return {}
        updates = dict(self._updates)
        self._updates.clear()
        return {f"{name}_var": statistics.variance(values) for name, values in updates.items() if len(values) > 1}


class Window:
    """The mean of each metric over the optimizer steps since the last log line, each step with the same weight.

    steps: metric -> its values since then, kept up to date in place.
    """

    def __init__(self, steps: dict[str, list[float]] | None = None) -> None:
        self._steps = {} if steps is None else steps

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one optimizer step."""
        for name, value in metrics.items():
            self._steps.setdefault(name, []).append(value)

    def __bool__(self) -> bool:
        """Whether a step was added since `take` was last called."""
        return bool(self._steps)

    def take(self) -> dict[str, float]:
        """The mean of each metric over the steps that have it; the window is empty afterwards."""
        means = {name: sum(values) / len(values) for name, values in self._steps.items()}
        self._steps.clear()
        return means
