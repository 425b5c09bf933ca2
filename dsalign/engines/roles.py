"""The models of a run by role: forward passes and losses over any number of groups."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor

from dsalign import phases
from dsalign.contract.groups import Group, Output
from dsalign.data.batches.packing import Inputs, bins, chunks, joined, num_computed, num_tokens, packed, padded
from dsalign.engines import dist
from dsalign.models.adapters import with_start_weights
from dsalign.models.load import VALUE_ROLES
from dsalign.models.logps import HeadLoss

ReferenceLogps: TypeAlias = Callable[["Roles", Sequence[Group], int | None], list[Tensor]]


@dataclass(frozen=True)
class Role:
    """A way to compute a role: the name of its engine, and whether that engine uses the weights that training started
    from, which a LoRA engine does with its trained adapter off."""

    engine: str
    start_weights: bool = False


class Roles:
    """The models of a run by role. An engine holds weights and is stepped; a role is one way to compute with an engine.

    engines: name -> DeepSpeed engine, which computes the role of its own name. start_weights: the roles that the
    policy's LoRA engine computes with the weights that training started from, where they have no engine. batch_size:
    groups in a micro-batch; max_tokens: if given, a micro-batch has as many groups as fit into so many tokens instead.
    temperature: every log-probability is of the logits divided by it.
    """

    def __init__(
        self,
        engines: Mapping[str, Any],
        device: torch.device,
        batch_size: int,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        start_weights: Collection[str] = ("reference",),
    ) -> None:
        self.engines, self.device, self.batch_size, self.temperature = dict(engines), device, batch_size, temperature
        self.max_tokens, self._start_weights = max_tokens, frozenset(start_weights)
        self.memory: Mapping[str, int] = {}  # role -> bytes that this rank holds more since its engine was made

    def role(self, name: str) -> Role:
        """The way to compute the role called `name`.

        Raises ValueError where no engine computes it: never another model's numbers in its place.
        """
        if name in self.engines:
            return Role(name)
        if self.computes(name):
            return Role("policy", start_weights=True)
        raise ValueError(
            f"{name}: expected its model in memory, found none; a reference is given back once its log-probabilities "
            "are cached: run with --ref_cache off if other groups are asked about"
        )

    def computes(self, name: str) -> bool:
        """Whether an engine computes the role called `name`."""
        lora = "policy" in self.engines and isinstance(self.engines["policy"].module.model, PeftModel)
        return name in self.engines or (name in self._start_weights and lora)

    def stepped(self, trained: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Name of each engine that is stepped -> the roles among `trained` that it computes, in the order given."""
        found: dict[str, tuple[str, ...]] = {}
        for name in trained:
            engine = self.role(name).engine
            found[engine] = (*found.get(engine, ()), name)
        return found

    def forward(self, role: str, groups: Sequence[Group], *, entropy: bool = False) -> Output:
        """Compute one forward pass of the role's model over `groups`, with gradient unless under torch.no_grad.

        entropy: whether the output has entropies too. Collective at ZeRO-3, which gathers weights.
        """
        engine, started = self._engine(role)
        inputs = self._inputs(role, engine, groups)
        with started:
            if role in VALUE_ROLES:
                return Output.of(role, engine(inputs))
            logps, entropies = engine(inputs, entropy, self.temperature)
            return Output.of(role, logps, entropies)

    def loss(
        self, role: str, groups: Sequence[Group], of: Callable[[slice, Output], Tensor], *, entropy: bool = False
    ) -> Tensor:
        """Compute one forward pass of the role's model over `groups`, and return the sum of `of` over slices of
        neighbouring groups, a scalar with gradient. Taking a slice at a time lets the head keep few logits.

        of: (slice of `groups`, the model's output for it) -> the loss of that slice, a scalar. The values and scores of
        a value head come as one slice. entropy, collectives: as in `forward`.
        """
        engine, started = self._engine(role)
        inputs = self._inputs(role, engine, groups)
        with started:
            if role in VALUE_ROLES:
                values: Tensor = engine(inputs)
                return of(slice(0, len(groups)), Output.of(role, values)) + 0.0 * values.sum()

            def of_targets(part: slice, logps: Tensor, entropies: Tensor | None) -> Tensor:
                return of(part, Output.of(role, logps, entropies))

            sizes = [sum(g.lengths) for g in groups]
            found: Tensor = engine(inputs, entropy, self.temperature, HeadLoss(sizes, of_targets))
            return found

    def balance(self, role: str) -> tuple[float, Tensor] | None:
        """(weight, balancing loss) of the last forward pass of the role's model in training; None for a model without
        one, which is the same on every rank."""
        module = self._engine(role)[0].module
        if module.balancing is None or module.balance is None:
            return None
        return module.balancing.coefficient, module.balance

    def balanced(self, role: str) -> bool:
        """Whether the role's model has a balancing loss."""
        return self._engine(role)[0].module.balancing is not None

    def micro_batches(
        self, role: str, groups: Sequence[Group], positions: Sequence[int], batch_size: int | None = None
    ) -> list[Sequence[int]]:
        """Cut `positions` of `groups` into micro-batches for forward passes of the role's model. Collective.

        batch_size: if given, groups in each, whatever max_tokens is. Every rank gets as many micro-batches as the rank
        with the most, the last ones empty where it has fewer.
        """
        parts: Sequence[Sequence[int]]
        if self.max_tokens is None or batch_size is not None:
            parts = chunks(positions, batch_size or self.batch_size)
        else:
            module = self._engine(role)[0].module
            sizes = [num_computed(groups[i], shared=module.shares) for i in positions]
            parts = bins(positions, sizes, self.max_tokens)
        count = dist.largest(len(parts), self.device)
        return [*parts, *[positions[:0]] * (count - len(parts))]

    def each_group(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        """The role's output for each group, without gradient: one float32 tensor a group, on the CPU, with the
        log-probabilities of its completion tokens, its values, or its scores. batch_size: as in `micro_batches`.
        Collective: ranks with fewer groups run empty forward passes, as each gathers weights from all ranks at ZeRO-3.
        """
        engine, _ = self._engine(role)
        training = engine.module.training
        engine.module.eval()
        found: list[Tensor | None] = [None] * len(groups)
        whole, members = joined(groups)
        with torch.no_grad():
            for positions in self.micro_batches(role, whole, range(len(whole)), batch_size):
                part = [whole[i] for i in positions]
                phases.mark(work=num_tokens(part))
                out = self.forward(role, part)
                inside = [member for i in positions for member in members[i]]
                sizes = [out.size(groups[i]) for i in inside]
                for i, one in zip(inside, out.numbers.float().cpu().split(sizes), strict=True):  # type: ignore[no-untyped-call]
                    found[i] = one
        engine.module.train(training)
        return [one for one in found if one is not None]

    def _inputs(self, role: str, engine: Any, groups: Sequence[Group]) -> Inputs:
        if not engine.module.shares:
            return padded(groups, self.device, ends=role == "reward")
        counted = engine.module.balancing is not None  # a balancing loss counts each prompt's tokens
        return packed(groups, self.device, ends=role == "reward", whole=counted)

    def _engine(self, name: str) -> tuple[Any, AbstractContextManager[None]]:
        """The engine that computes the role called `name`, and the context in which its forward passes must run."""
        role = self.role(name)
        engine = self.engines[role.engine]
        if not role.start_weights:
            return engine, nullcontext()
        return engine, with_start_weights(engine.module)

    def release(self, role: str) -> None:
        """Free the engine of a role that is not computed again; a role without an engine of its own stays."""
        self.engines.pop(role, None)
        gc.collect()
