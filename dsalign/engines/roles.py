"""The models of a run by role: forward passes over groups of any number."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Dropout

from dsalign.contract.groups import Group, Output
from dsalign.data.batches.packing import Inputs, behind, bins, chunks, joined, num_computed, packed, rows
from dsalign.engines import dist
from dsalign.models.adapters import as_started
from dsalign.models.heads import Begun
from dsalign.models.load import VALUE_ROLES
from dsalign.models.logps import HeadLoss

ReferenceLogps: TypeAlias = Callable[["Models", Sequence[Group], int | None], list[Tensor]]


class Models:
    """Role -> engine. A frozen role without an engine of its own is the policy's engine, trained adapter off.

    A micro-batch has batch_size groups, or with max_tokens as many as fit into so many tokens.
    """

    def __init__(
        self,
        engines: Mapping[str, Any],
        device: torch.device,
        batch_size: int,
        temperature: float = 1.0,
        max_tokens: int | None = None,
    ) -> None:
        self.engines, self.device, self.batch_size, self.temperature = dict(engines), device, batch_size, temperature
        self.max_tokens = max_tokens
        self._begun: dict[str, tuple[Sequence[Group], Begun]] = {}

    def forward(self, role: str, groups: Sequence[Group], *, entropy: bool = False) -> Output:
        """One forward pass of the role's model over these groups, with gradient unless torch says otherwise."""
        engine, started = self._engine(role)
        inputs = self._inputs(role, engine, groups)
        with started:
            if role in VALUE_ROLES:
                return Output.of(role, engine(inputs))
            logps, entropies = engine(inputs, entropy, self.temperature, begun=self._begun_of(role, groups))
            return Output.of(role, logps, entropies)

    def loss(
        self, role: str, groups: Sequence[Group], of: Callable[[slice, Output], Tensor], *, entropy: bool = False
    ) -> Tensor:
        """The sum of of(some neighbouring groups, what the role's model gives for them) over all groups, scalar with
        gradient: `forward` and the loss in one, which lets the head take the loss's gradient part by part."""
        engine, started = self._engine(role)
        inputs = self._inputs(role, engine, groups)
        with started:
            if role in VALUE_ROLES:
                values: Tensor = engine(inputs)
                return of(slice(0, len(groups)), Output.of(role, values)) + 0.0 * values.sum()

            def of_targets(part: slice, logps: Tensor, entropies: Tensor | None) -> Tensor:
                return of(part, Output.of(role, logps, entropies))

            sizes = [sum(g.lengths) for g in groups]
            begun = self._begun_of(role, groups)
            found: Tensor = engine(inputs, entropy, self.temperature, HeadLoss(sizes, of_targets), begun)
            return found

    def beside(self, role: str, groups: Sequence[Group], others: Sequence[Group]) -> list[Tensor]:
        """`each_group` of others, which have the prompts of `groups` in the same order. Where those make one
        micro-batch, which is next, its pass is begun here, and the prompts are computed once. Collective."""
        whole = len(self.micro_batches(role, groups, range(len(groups)))) == 1
        if not (whole and self._can_begin(role)):
            return self.each_group(role, others)
        if not groups:
            return []  # no other rank waits for this one in a pass
        module = self.engines[role].module
        begun: Begun = module.begin(packed(groups, self.device))
        logps = module.behind(begun, behind(others, self.device), self.temperature)
        begun.prefix.forget()
        self._begun[role] = groups, begun
        return list(logps.split([sum(g.lengths) for g in others]))

    def _can_begin(self, role: str) -> bool:
        """Whether a pass may stop before the head and go on later: on a CPU, outside of ZeRO-3 and autocast, without
        dropout, which completions beside the trained ones would see in their prompts."""
        engine = self.engines.get(role)
        if engine is None or self.device.type != "cpu" or not engine.module.shares:
            return False
        drops = any(isinstance(part, Dropout) and part.p for part in engine.module.modules())
        return not drops and engine.zero_optimization_stage() < 3 and not engine.torch_autocast_enabled()

    def _begun_of(self, role: str, groups: Sequence[Group]) -> Begun | None:
        """The pass over these very groups, where one was begun; any other is dropped."""
        of, begun = self._begun.pop(role, ((), None))
        same = len(of) == len(groups) and all(a is b for a, b in zip(of, groups, strict=True))
        return begun if same else None

    def micro_batches(
        self, role: str, groups: Sequence[Group], positions: Sequence[int], batch_size: int | None = None
    ) -> list[Sequence[int]]:
        """The groups at `positions`, cut for forward passes of the role's model; batch_size: groups a pass whatever
        their length. Collective: as many as on the rank with the most, empty ones where this one has fewer."""
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
        """No gradient, float32, on the CPU: a group's token log-probabilities, its values, or its scores. Collective:
        ranks with fewer groups run empty passes, because a ZeRO-3 forward gathers parameters from all."""
        engine, _ = self._engine(role)
        training = engine.module.training
        engine.module.eval()
        found: list[Tensor | None] = [None] * len(groups)
        whole, members = joined(groups)
        with torch.no_grad():
            for positions in self.micro_batches(role, whole, range(len(whole)), batch_size):
                out = self.forward(role, [whole[i] for i in positions])
                inside = [member for i in positions for member in members[i]]
                sizes = [out.size(groups[i]) for i in inside]
                for i, one in zip(inside, out.numbers.float().cpu().split(sizes), strict=True):  # type: ignore[no-untyped-call]
                    found[i] = one
        engine.module.train(training)
        return [one for one in found if one is not None]

    def _inputs(self, role: str, engine: Any, groups: Sequence[Group]) -> Inputs:
        return (packed if engine.module.shares else rows)(groups, self.device, ends=role == "reward")

    def _engine(self, role: str) -> tuple[Any, AbstractContextManager[None]]:
        if role in self.engines:
            return self.engines[role], nullcontext()
        policy = self.engines["policy"]
        assert isinstance(policy.module.model, PeftModel), f"{role}: no engine, and no adapter to turn off"
        return policy, as_started(policy.module)

    def release(self, role: str) -> None:
        """Give back the memory of a role that is not asked again."""
        self.engines.pop(role, None)
        gc.collect()
