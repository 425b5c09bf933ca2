"""The one loop: prepare a global batch, cut it into optimizer steps and micro-batches, divide by global units, step."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dsalign.checkpoint.progress import Progress
from dsalign.contract.groups import Batch, Output, Prepared
from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import cut, num_tokens
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.roles import Models
from dsalign.loop import loss as fused
from dsalign.loop.context import RunContext
from dsalign.loop.metrics import Sums
from dsalign.loop.plan import Plan
from dsalign.loop.schedule import learning_rate_factor


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; the message names the step and the rows."""


class Trainer:
    """Runs an algorithm over engines; calls `after_step(metrics)` after each optimizer step."""

    def __init__(
        self, algorithm: Any, models: Models, ctx: RunContext, loader: Loader, plan: Plan, progress: Progress
    ) -> None:
        self.algorithm, self.models, self.ctx, self.loader = algorithm, models, ctx, loader
        self.plan, self.progress = plan, progress
        self.trained = [role for role, how in algorithm.roles.items() if how == "train"]
        self.total_steps = plan.total_batches * algorithm.epochs * algorithm.mini_batches
        self.at_boundary = True
        self._guards = {role: engines.TouchGuard(models.engines[role]) for role in self.trained}

    def fit(
        self, after_step: Callable[[dict[str, float]], None], after_prepare: Callable[[Prepared], None] | None = None
    ) -> None:
        """Train from where `progress` says to the end of the plan. `after_step` may save a checkpoint where
        `at_boundary` is true: between two prepared batches."""
        while self.progress.batches < self.plan.total_batches:
            index = self.progress.batches
            batch = self.loader.batch(index)
            for role in self.trained:
                self.models.engines[role].module.train()
            prepared = self.algorithm.prepare(self.ctx.at(index), batch)
            tokens = dist.total([num_tokens(prepared.groups)], self.models.device)[0]
            self.progress.num_tokens += int(tokens)
            self.progress.batches += 1
            if after_prepare is not None:
                after_prepare(prepared)
            steps = self._mini_batches(batch, index)
            updates: list[dict[str, float]] = []
            for i, positions in enumerate(steps):
                metrics = self.optimizer_step(prepared, positions)
                self.progress.step += 1
                updates.append(metrics)
                self.at_boundary = i == len(steps) - 1 or self.algorithm.stop(metrics)
                if self.at_boundary:
                    metrics |= self._variances(updates)
                after_step({**metrics, "num_tokens": self.progress.num_tokens})
                if self.at_boundary:
                    break

    def _variances(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """NAME_var of every such need: the variance, with n - 1, of a metric over the updates of a prepared batch."""
        found = {}
        for need in self.algorithm.needs:
            values = [metrics[need[:-4]] for metrics in updates if need.endswith("_var") and need[:-4] in metrics]
            if len(values) > 1:
                found[need] = statistics.variance(values)
        return found

    def _mini_batches(self, batch: Batch, index: int) -> list[Sequence[int]]:
        """This rank's positions in each optimizer step over a prepared batch: a permutation of the whole batch by
        (seed, batch, pass), so that a step holds the same groups on any number of ranks; no step without a group."""
        algorithm = self.algorithm
        if algorithm.epochs * algorithm.mini_batches == 1:
            return [range(len(batch.mine))]
        local = {position: i for i, position in enumerate(batch.mine)}
        steps: list[Sequence[int]] = []
        for epoch in range(algorithm.epochs):
            order = list(range(len(batch.groups)))
            random.Random(f"dsalign passes {self.plan.seed} {index} {epoch}").shuffle(order)
            for part in range(min(algorithm.mini_batches, len(order))):
                steps.append([local[i] for i in order[part :: algorithm.mini_batches] if i in local])
        return steps

    def optimizer_step(self, prepared: Prepared, positions: Sequence[int]) -> dict[str, float]:
        """One step of every trained role over this rank's prepared groups at `positions`. Returns global means.

        Every rank runs as many micro-batches as the one with the most groups, empty ones where it has fewer.
        Raises NonFiniteError before the step where a loss is not finite, after it where the gradient was not.
        """
        device, world = self.models.device, self.plan.world_size
        units = self.algorithm.units([prepared.groups[i] for i in positions])
        counts = dict(zip(units, dist.total([float(n) for n in units.values()], device), strict=True))
        sums, total_loss, result = Sums(), 0.0, dict[str, float]()
        sums.add(prepared.metrics)
        for role in self.trained:
            losses = []
            parts = self.models.micro_batches(role, prepared.groups, positions)
            for i, part in enumerate(parts):
                losses.append(self._backward(role, prepared, part, counts, sums, last=i == len(parts) - 1))
            total_loss += self._check_losses(losses, parts, prepared) / world
            self._step(role, result)
        return {"loss": total_loss, **sums.reduced(device), **result}

    def _backward(
        self,
        role: str,
        prepared: Prepared,
        positions: Sequence[int],
        counts: Mapping[str, float],
        sums: Sums,
        *,
        last: bool,
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss times world_size, detached."""
        engine = self.models.engines[role]
        engine.set_gradient_accumulation_boundary(last)
        scales = {unit: self.plan.world_size / count for unit, count in counts.items() if count}

        def part_loss(part: slice, out: Output) -> Tensor:
            micro = cut(prepared, positions[part], self.models.device)
            loss, metrics = fused.scaled_loss(self.algorithm, role, out, micro, scales)
            sums.add(metrics)
            return loss

        groups = [prepared.groups[i] for i in positions]
        total = self.models.loss(role, groups, part_loss, entropy="entropy" in self.algorithm.needs)
        engine.backward(total, scale_wrt_gas=False)
        if role in self._guards:
            self._guards.pop(role).close()
        return total.detach()

    def _check_losses(self, losses: Sequence[Tensor], parts: Sequence[Sequence[int]], prepared: Prepared) -> float:
        """The sum over micro-batches and ranks of the losses times world_size."""
        values = torch.stack(list(losses)).double().tolist()
        total = dist.total([sum(values)], self.models.device)[0]
        if isfinite(total):
            return total
        text = f"step {self.progress.step + 1}: the loss is {total}, nothing was stepped"
        bad = [prepared.groups[i].where for part, v in zip(parts, values, strict=True) for i in part if not isfinite(v)]
        dist.agree(NonFiniteError(f"{text}; it comes from {', '.join(bad)}") if bad else None)
        raise NonFiniteError(text)  # finite losses that overflow when added

    def _step(self, role: str, result: dict[str, float]) -> None:
        engine, plan = self.models.engines[role], self.plan
        factor = learning_rate_factor(plan.schedule, self.progress.step, self.total_steps, plan.warmup_ratio)
        rate = plan.learning_rates[role] * factor
        engines.set_learning_rate(engine, rate)
        norm = engines.step(engine, plan.max_grad_norm)
        if not plan.fp16 and not (isfinite(norm) and norm >= 0):
            raise NonFiniteError(
                f"step {self.progress.step + 1}: the gradient norm of the {role} is {norm}; the weights in memory are "
                "not to be trusted, go on from the last checkpoint with --resume and a lower --learning_rate"
            )
        prefix = "" if role == self.trained[0] else f"{role}/"
        result |= {f"{prefix}grad_norm": norm, f"{prefix}lr": rate}
