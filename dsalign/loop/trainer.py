"""The one loop: prepare a global batch, cut it into optimizer steps and micro-batches, divide by global units, step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from dsalign import faults, phases
from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import OptimOptions
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.groups import Output, Prepared
from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import cut, num_tokens
from dsalign.engines import dist
from dsalign.engines.engine import TouchGuard, drop_gradients, set_learning_rate, take_steps, usable
from dsalign.engines.roles import Roles
from dsalign.guard import numbers
from dsalign.loop.bad_steps import BadSteps
from dsalign.loop.context import RunContext
from dsalign.loop.loss import scaled_loss
from dsalign.loop.metrics import Sums
from dsalign.loop.schedule import learning_rate_factor

CPU = torch.device("cpu")
ROUTED = "routed tokens"  # the unit of a balancing loss: each micro-batch weighs as many as it has tokens


class Trainer:
    """The training loop of an algorithm: `ctx.total_batches` batches of the loader, each prepared, then trained on in
    one or several optimizer steps, at most options.max_steps of them in all.

    progress: where the run is; advanced in place. Between two optimizer steps over one prepared batch it holds that
    batch, so that a checkpoint can be taken after every step. total_steps: optimizer steps of the whole run.
    output_dir: where steps that are skipped are kept, None = nowhere.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        roles: Roles,
        ctx: RunContext,
        loader: Loader,
        options: OptimOptions,
        progress: Progress,
        output_dir: Path | None = None,
    ) -> None:
        self.algorithm, self.roles, self.ctx, self.loader = algorithm, roles, ctx, loader
        self.options, self.progress = options, progress
        self.stepped = roles.stepped(algorithm.traits.trained)
        traits, sizes = algorithm.traits, map(loader.size_of, range(ctx.total_batches))
        every = sum(traits.epochs * min(traits.mini_batches, size) for size in sizes)  # no step without a group
        self.total_steps = every if options.max_steps is None else min(every, options.max_steps)
        self._guards = {name: TouchGuard(roles.engines[name]) for name in self.stepped}
        stepped = {name: roles.engines[name] for name in self.stepped}
        self._bad = BadSteps(stepped, output_dir, options.max_bad_steps, options.learning_rate)

    def fit(
        self, after_step: Callable[[dict[str, float]], None], after_prepare: Callable[[Prepared], None] | None = None
    ) -> None:
        """Train from `progress` to the end of the run. Collective.

        after_step: called with the metrics of each optimizer step; it may save a checkpoint. after_prepare: called with
        each prepared batch. A prepared batch with a number that is not finite has all its steps skipped, and leaves
        `ctx.state` as it was.
        Raises Diverged as `BadSteps.skip` does, and Interrupted where a wish to stop was agreed in `prepare`; then the
        run is as it was before that batch.
        """
        progress = self.progress
        while progress.step < self.total_steps and (
            progress.prepared is not None or progress.batches < self.ctx.total_batches
        ):
            phases.mark("prepare", progress.step)
            for engine in self.stepped:
                self.roles.engines[engine].module.train()
            if progress.prepared is None:
                progress.prepared, bad = self._prepare(progress.batches, after_prepare)
            else:  # a resumed run goes on within the passes over a batch
                bad = self._total_flaws(progress.prepared, 0)[0]
            prepared = progress.prepared
            steps = self._mini_batches(prepared, progress.batches - 1)
            last = min(len(steps), progress.taken + self.total_steps - progress.step)
            for i in range(progress.taken, last):
                with self.ctx.clock.phase("train"):
                    metrics = {} if bad else self.optimizer_step(prepared, steps[i])
                progress.step += 1
                phases.mark("log", progress.step)
                progress.prepared, progress.taken = (prepared, i + 1) if i + 1 < len(steps) else (None, 0)
                counted = {"bad_steps": float(progress.bad_steps)} if progress.bad_steps else {}
                after_step({**metrics, **counted, "num_tokens": progress.num_tokens})
            if not progress.taken:  # else max_steps ended the run, which may go on with more of them
                progress.prepared = None

    def _prepare(self, index: int, after_prepare: Callable[[Prepared], None] | None) -> tuple[Prepared, bool]:
        """(the global batch number `index`, prepared; whether a number of it is not finite on any rank, in which case
        its steps are counted as skipped and `ctx.state` is as before). Collective."""
        batch = self.loader.batch(index)
        with self.ctx.undone() as set_state_back:
            prepared = self.algorithm.prepare(self.ctx.at(index), batch)
        bad, tokens = self._total_flaws(prepared, num_tokens(prepared.groups))
        self.progress.num_tokens += tokens
        self.progress.batches += 1
        if prepared.positions is None and self.algorithm.traits.passes > 1:
            prepared = replace(prepared, positions=batch.mine)
        if after_prepare is not None:
            after_prepare(prepared)
        count = min(len(self._mini_batches(prepared, index)), self.total_steps - self.progress.step) if bad else 0
        if count:
            set_state_back()
            why = "what was prepared for the batch (rewards, values, log-probabilities) is not finite"
            rows = numbers.flawed_rows(prepared)
            self._bad.skip(why, self.progress, prepared, range(len(prepared.groups)), rows, count)
        return prepared, bad

    def _total_flaws(self, prepared: Prepared, tokens: int) -> tuple[bool, int]:
        """(whether a number of the prepared batch is not finite on any rank, the sum of `tokens` over the ranks)."""
        flawed = numbers.flawed(prepared, self.ctx.state)
        bad, total = dist.total([float(flawed), float(tokens)], self.roles.device)
        return bool(bad), int(total)

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
        Returns the step's metrics: means over all ranks, gradient norms before clipping, and learning rates; of a step
        that is skipped, as a loss or a gradient is not finite on any rank, the learning rates alone.
        Raises Diverged as `BadSteps.skip` does.
        """
        device = self.roles.device
        units = dict(self.algorithm.units(cut(prepared, positions, CPU)))
        if any(self.roles.balanced(role) for trained in self.stepped.values() for role in trained):
            units[ROUTED] = num_tokens([prepared.groups[i] for i in positions])
        counts = dict(zip(units, dist.total([float(n) for n in units.values()], device), strict=True))
        sums, losses, parts = Sums(), dict[str, list[Tensor]](), dict[str, list[Sequence[int]]]()
        sums.add(prepared.metrics)
        for name, trained in self.stepped.items():
            parts[name] = self.roles.micro_batches(name, prepared.groups, positions)
            losses[name] = []
            for i, part in enumerate(parts[name]):
                self.roles.engines[name].set_gradient_accumulation_boundary(i == len(parts[name]) - 1)
                try:
                    losses[name].append(self._backward(name, trained, prepared, part, counts, sums))
                except (RuntimeError, MemoryError) as error:
                    size = f"{len(part)} row(s), {num_tokens([prepared.groups[i] for i in part])} tokens"
                    error.add_note(f"in training step {self.progress.step + 1}, a micro-batch of {size}")
                    raise
        loss, suspects = self._total(losses, parts)
        result, problem = self._step(isfinite(loss), loss)
        wishes = self.ctx.wishes
        reduced, asked = sums.reduced_with(wishes.numbers(), device)
        wishes.agreed(asked)
        if problem:
            rows = [prepared.groups[i].where for i in (positions if isfinite(loss) else suspects)]
            self._bad.skip(problem, self.progress, prepared, positions, rows)
            return result
        self.progress.bad_in_a_row = 0
        means = {"loss": loss, **reduced, **result}
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
        groups = [prepared.groups[i] for i in positions]
        phases.mark("micro-batch", work=num_tokens(groups))
        engine = self.roles.engines[name]
        scales = {unit: dist.world_size() / count for unit, count in counts.items() if count}

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

        losses = sum((loss_of(role) for role in trained[1:]), loss_of(trained[0]))
        total: Tensor = faults.value("loss", losses)
        engine.backward(faults.value("gradient", total), scale_wrt_gas=False)
        if name in self._guards:
            self._guards.pop(name).close()
        return total.detach()

    def _total(
        self, losses: Mapping[str, Sequence[Tensor]], parts: Mapping[str, Sequence[Sequence[int]]]
    ) -> tuple[float, list[int]]:
        """(the sum of all losses, one a micro-batch of each engine, over all ranks; the indices of the groups in those
        of this rank's micro-batches on which a loss is not finite). Reads all losses at once. Collective."""
        values = torch.stack([loss for each in losses.values() for loss in each]).double().tolist()
        every, sums, bad = iter(values), list[float](), dict[int, None]()
        for cut_up in parts.values():
            mine = [next(every) for _ in cut_up]
            sums.append(sum(mine))
            bad |= {i: None for part, x in zip(cut_up, mine, strict=True) if not isfinite(x) for i in part}
        totals = dist.total(sums, self.roles.device)
        return sum(total / dist.world_size() for total in totals), list(bad)

    def _step(self, wanted: bool, loss: float) -> tuple[dict[str, float], str]:
        """Step every engine, or none where a step is not `wanted` or a gradient is not finite. Collective.

        Returns (learning rates, and gradient norms where steps were taken; what was not finite, empty where all was).
        """
        phases.mark("optimizer step")
        options, traits = self.options, self.algorithm.traits
        factor = learning_rate_factor(
            options.lr_scheduler_type, self.progress.step, self.total_steps, options.warmup_ratio
        )
        engines = {name: self.roles.engines[name] for name in self.stepped}
        prefix = {name: "" if traits.main in self.stepped[name] else f"{name}/" for name in engines}
        rates = {name: traits.role_learning_rates.get(name, options.learning_rate) * factor for name in engines}
        result = {f"{prefix[name]}lr": rate for name, rate in rates.items()}
        if not wanted:
            for engine in engines.values():
                drop_gradients(engine)
            return result, f"the loss is {loss}"
        for name, engine in engines.items():
            set_learning_rate(engine, rates[name])
        norms = dict(zip(engines, take_steps(list(engines.values()), options.max_grad_norm), strict=True))
        for name, norm in norms.items():
            if not engines[name].fp16_enabled() and not usable(norm):
                return result, f"the gradient norm of the {name} is not finite"
        return result | {f"{prefix[name]}grad_norm": norm for name, norm in norms.items()}, ""
