"""The one loop: prepare a global batch, cut it into optimizer steps and micro-batches, divide by global units, step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import OptimOptions
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.groups import Output, Prepared
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

    progress: where the run is; advanced in place. Between two optimizer steps over one prepared batch it holds that
    batch, so that a checkpoint can be taken after every step. total_steps: optimizer steps of the whole run.
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
        self._guards = {name: TouchGuard(roles.engines[name]) for name in self.stepped}

    def fit(
        self, after_step: Callable[[dict[str, float]], None], after_prepare: Callable[[Prepared], None] | None = None
    ) -> None:
        """Train from `progress` to the end of the run. Collective.

        after_step: called with the metrics of each optimizer step; it may save a checkpoint. after_prepare: called with
        each prepared batch.
        Raises NonFiniteError as `optimizer_step` does, and Interrupted where a wish to stop was agreed in `prepare`;
        then the run is as it was before that batch.
        """
        progress = self.progress
        while progress.step < self.total_steps and (
            progress.prepared is not None or progress.batches < self.ctx.total_batches
        ):
            for engine in self.stepped:
                self.roles.engines[engine].module.train()
            if progress.prepared is None:
                progress.prepared = self._prepare(progress.batches)
                progress.batches += 1
                if after_prepare is not None:
                    after_prepare(progress.prepared)
            prepared = progress.prepared
            steps = self._mini_batches(prepared, progress.batches - 1)
            last = min(len(steps), progress.taken + self.total_steps - progress.step)
            for i in range(progress.taken, last):
                with self.ctx.clock.phase("train"):
                    metrics = self.optimizer_step(prepared, steps[i])
                progress.step += 1
                progress.prepared, progress.taken = (prepared, i + 1) if i + 1 < len(steps) else (None, 0)
                after_step({**metrics, "num_tokens": progress.num_tokens})
            if not progress.taken:  # else max_steps ended the run, which may go on with more of them
                progress.prepared = None

    def _prepare(self, index: int) -> Prepared:
        """Prepare the global batch number `index`. Collective."""
        batch = self.loader.batch(index)
        with self.ctx.undone():
            prepared = self.algorithm.prepare(self.ctx.at(index), batch)
        self.progress.num_tokens += int(dist.total([num_tokens(prepared.groups)], self.roles.device)[0])
        if prepared.positions is None and self.algorithm.traits.passes > 1:
            return replace(prepared, positions=batch.mine)
        return prepared

    def _mini_batches(self, prepared: Prepared, index: int) -> list[Sequence[int]]:
        """This rank's groups of each optimizer step over a prepared batch, by their index in `prepared.groups`.

        Each pass shuffles the places of all ranks' groups by (seed, batch, pass) and deals them to the steps, so that a
        step has the same groups on any number of ranks; a step without any group on any rank is left out. Collective.
        """
        traits, mine = self.algorithm.traits, prepared.positions
        if mine is None:  # the whole batch in one step
            return [range(len(prepared.groups))]
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
        wishes = self.ctx.wishes
        reduced, asked = sums.reduced_with(wishes.numbers(), device)
        wishes.agreed(asked)
        means = {"loss": total_loss, **reduced, **result}
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
