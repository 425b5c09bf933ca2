"""The one loop: prepare a global batch, cut it into optimizer steps and micro-batches, divide by global units, step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import OptimOptions
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.groups import Batch, Output, Prepared
from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import cut, num_tokens
from dsalign.engines import dist
from dsalign.engines.engine import TouchGuard, set_learning_rate, take_step
from dsalign.engines.roles import Roles
from dsalign.loop.context import RunContext
from dsalign.loop.loss import scaled_loss
from dsalign.loop.metrics import Sums
from dsalign.loop.schedule import learning_rate_factor

CPU = torch.device("cpu")
ROUTED = "routed tokens"  # the unit of a balancing loss: each micro-batch weighs as many as it has tokens


class NonFiniteError(ValueError):
    """The error of a loss or a gradient that is NaN or infinite; the message names the step, and of a loss the rows."""


class Trainer:
    """The training loop of an algorithm: `ctx.total_batches` batches of the loader, each prepared, then trained on in
    one or several optimizer steps, at most options.max_steps of them in all.

    progress: where the run is; advanced in place. total_steps: optimizer steps of the whole run. at_boundary: whether
    the run is between two prepared batches, where a checkpoint can be taken.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        roles: Roles,
        ctx: RunContext,
        loader: Loader,
        options: OptimOptions,
        progress: Progress,
    ) -> None:
        self.algorithm, self.roles, self.ctx, self.loader = algorithm, roles, ctx, loader
        self.options, self.progress = options, progress
        self.stepped = roles.stepped(algorithm.traits.trained)
        traits, sizes = algorithm.traits, map(loader.size_of, range(ctx.total_batches))
        every = sum(traits.epochs * min(traits.mini_batches, size) for size in sizes)  # no step without a group
        self.total_steps = every if options.max_steps is None else min(every, options.max_steps)
        self.at_boundary = True
        self._guards = {name: TouchGuard(roles.engines[name]) for name in self.stepped}

    def fit(
        self, after_step: Callable[[dict[str, float]], None], after_prepare: Callable[[Prepared], None] | None = None
    ) -> None:
        """Train from `progress` to the end of the run. Collective.

        after_step: called with the metrics of each optimizer step; it may save a checkpoint where `at_boundary` is
        true: after the last step over a prepared batch, or of the run. after_prepare: called with each prepared batch.
        Raises NonFiniteError as `optimizer_step` does.
        """
        while self.progress.batches < self.ctx.total_batches:
            index = self.progress.batches
            batch = self.loader.batch(index)
            for engine in self.stepped:
                self.roles.engines[engine].module.train()
            prepared = self.algorithm.prepare(self.ctx.at(index), batch)
            tokens = dist.total([num_tokens(prepared.groups)], self.roles.device)[0]
            self.progress.num_tokens += int(tokens)
            self.progress.batches += 1
            if after_prepare is not None:
                after_prepare(prepared)
            steps = self._mini_batches(batch, prepared, index)[: self.total_steps - self.progress.step]
            self.at_boundary = not steps
            for i, positions in enumerate(steps):
                with self.ctx.clock.phase("train"):
                    metrics = self.optimizer_step(prepared, positions)
                self.progress.step += 1
                self.at_boundary = i == len(steps) - 1
                after_step({**metrics, "num_tokens": self.progress.num_tokens})

    def _mini_batches(self, batch: Batch, prepared: Prepared, index: int) -> list[Sequence[int]]:
        """This rank's groups of each optimizer step over a prepared batch, by their index in `prepared.groups`.

        Each pass shuffles the places of all ranks' groups by (seed, batch, pass) and deals them to the steps, so that a
        step has the same groups on any number of ranks; a step without any group on any rank is left out. Collective.
        """
        traits = self.algorithm.traits
        mine, everyone = batch.mine, list(range(len(batch.groups)))
        if prepared.positions is not None:
            mine = prepared.positions
            everyone = sorted(map(int, self.ctx.gather(torch.tensor(mine, dtype=torch.float64))))
        if traits.passes == 1:
            return [range(len(mine))] if everyone else []
        local = {position: i for i, position in enumerate(mine)}
        steps: list[Sequence[int]] = []
        for epoch in range(traits.epochs):
            order = list(everyone)
            random.Random(f"dsalign passes {self.loader.seed} {index} {epoch}").shuffle(order)
            for part in range(min(traits.mini_batches, len(order))):
                steps.append([local[i] for i in order[part :: traits.mini_batches] if i in local])
        return steps

    def optimizer_step(self, prepared: Prepared, positions: Sequence[int]) -> dict[str, float]:
        """Take one step of every trained engine over this rank's `prepared.groups` at `positions`. Collective.

        Every rank runs as many micro-batches as the rank with the most groups, empty ones where it has fewer.
        Returns the step's metrics: means over all ranks, gradient norms before clipping, and learning rates.
        Raises NonFiniteError: before the step where a loss is not finite, after it where the gradient was not.
        """
        device = self.roles.device
        units = dict(self.algorithm.units(cut(prepared, positions, CPU)))
        if any(self.roles.balanced(role) for trained in self.stepped.values() for role in trained):
            units[ROUTED] = num_tokens([prepared.groups[i] for i in positions])
        counts = dict(zip(units, dist.total([float(n) for n in units.values()], device), strict=True))
        sums, total_loss, result = Sums(), 0.0, dict[str, float]()
        sums.add(prepared.metrics)
        for name, trained in self.stepped.items():
            losses = []
            parts = self.roles.micro_batches(name, prepared.groups, positions)
            for i, part in enumerate(parts):
                self.roles.engines[name].set_gradient_accumulation_boundary(i == len(parts) - 1)
                losses.append(self._backward(name, trained, prepared, part, counts, sums))
            total_loss += self._check_losses(losses, parts, prepared) / dist.world_size()
            self._step(name, result)
        means = {"loss": total_loss, **sums.reduced(device), **result}
        return {**means, **self.algorithm.derived(means)}

    def _backward(
        self,
        name: str,
        trained: Sequence[str],
        prepared: Prepared,
        positions: Sequence[int],
        counts: Mapping[str, float],
        sums: Sums,
    ) -> Tensor:
        """Run the forward passes of the engine's trained roles over one micro-batch, and one backward pass of the sum
        of their losses, as each backward pass must reach every trained parameter of its engine. Returns the loss times
        world_size, detached: DeepSpeed's average over ranks takes the factor out of the gradients."""
        engine = self.roles.engines[name]
        scales = {unit: dist.world_size() / count for unit, count in counts.items() if count}
        groups = [prepared.groups[i] for i in positions]

        def loss_of(role: str) -> Tensor:
            def of_part(part: slice, out: Output) -> Tensor:
                micro = cut(prepared, positions[part], self.roles.device)
                loss, metrics = scaled_loss(self.algorithm, role, out, micro, scales)
                sums.add(metrics)
                return loss

            found = self.roles.loss(role, groups, of_part, entropy="entropy" in self.algorithm.traits.needs)
            if (balance := self.roles.balance(role)) is None:
                return found
            weight, term = balance
            tokens = num_tokens(groups)
            sums.add({"aux_loss": (term.detach() * tokens if tokens else 0.0, tokens)})
            return found + weight * tokens * scales[ROUTED] * term if tokens else found

        total = sum((loss_of(role) for role in trained[1:]), loss_of(trained[0]))
        engine.backward(total, scale_wrt_gas=False)
        if name in self._guards:
            self._guards.pop(name).close()
        return total.detach()

    def _check_losses(self, losses: Sequence[Tensor], parts: Sequence[Sequence[int]], prepared: Prepared) -> float:
        """The sum of `losses`, one a micro-batch, over all ranks. Collective. Raises NonFiniteError where it is not
        finite, naming the rows of the micro-batches on which a loss is not."""
        values = torch.stack(list(losses)).double().tolist()
        total = dist.total([sum(values)], self.roles.device)[0]
        if isfinite(total):
            return total
        text = f"step {self.progress.step + 1}: the loss is {total}, nothing was stepped"
        bad = [prepared.groups[i].where for part, v in zip(parts, values, strict=True) for i in part if not isfinite(v)]
        dist.agree(NonFiniteError(f"{text}; it comes from {', '.join(bad)}") if bad else None)
        raise NonFiniteError(text)  # finite losses that overflow when added

    def _step(self, name: str, result: dict[str, float]) -> None:
        """Step the engine called `name`, and put its gradient norm and learning rate into `result`. Collective."""
        engine, options, traits = self.roles.engines[name], self.options, self.algorithm.traits
        rate = traits.role_learning_rates.get(name, options.learning_rate)
        rate *= learning_rate_factor(
            options.lr_scheduler_type, self.progress.step, self.total_steps, options.warmup_ratio
        )
        set_learning_rate(engine, rate)
        norm = take_step(engine, options.max_grad_norm)
        if not engine.fp16_enabled() and not (isfinite(norm) and norm >= 0):
            raise NonFiniteError(
                f"step {self.progress.step + 1}: the gradient norm of the {name} is {norm}; the weights in memory are "
                "not to be trusted, go on from the last checkpoint with --resume and a lower --learning_rate"
            )
        prefix = "" if self.algorithm.traits.main in self.stepped[name] else f"{name}/"
        result |= {f"{prefix}grad_norm": norm, f"{prefix}lr": rate}
