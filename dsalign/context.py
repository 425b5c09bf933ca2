"""The models by role, as `prepare` and the trainer use them: forward passes over groups of any number."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Dropout

from dsalign import dist, engines, fused
from dsalign.algos import Output, Sampling
from dsalign.data.batch import Inputs, behind, bins, chunks, joined, num_computed, packed, rows
from dsalign.data.tokenize import Group
from dsalign.logps import HeadLoss
from dsalign.models.adapters import as_started
from dsalign.models.heads import Begun, unwrap
from dsalign.models.load import VALUE_ROLES
from dsalign.rollout.sampler import noise, sample

logger = logging.getLogger(__name__)
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


class RunContext:
    """`dsalign.algos.Context` over real engines. rewards: groups -> one [completions] tensor a group. reference: where
    the reference's log-probabilities are computed beforehand, what looks them up."""

    def __init__(
        self,
        models: Models,
        *,
        seed: int,
        max_length: int,
        state: dict[str, Any],
        end_ids: frozenset[int] = frozenset(),
        total_batches: int = 1,
        rewards: Callable[[Sequence[Group], int], list[Tensor]] | None = None,
        reference: ReferenceLogps | None = None,
        decode: Callable[[Sequence[int]], str] = str,
    ) -> None:
        self._models, self._seed, self.max_length, self.state = models, seed, max_length, state
        self.end_ids, self.total_batches, self._rewards, self._decode = end_ids, total_batches, rewards, decode
        self._reference = reference
        self._said: set[str] = set()
        self.at(0)

    def at(self, step: int) -> RunContext:
        """The context of prepared batch `step`."""
        self.step = step
        self.generator = torch.Generator().manual_seed(hash((self._seed, step)) % 2**63)
        return self

    def logps(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        if role == "reference" and self._reference is not None:
            return self._reference(self._models, groups, batch_size)
        return self._models.each_group(role, groups, batch_size)

    def logps_beside(self, role: str, own: Sequence[Group], groups: Sequence[Group]) -> list[Tensor]:
        return self._models.beside(role, own, groups)

    def values(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        return self._models.each_group(role, groups, batch_size)

    def generate(
        self, role: str, groups: Sequence[Group], sampling: Sampling, batch_size: int
    ) -> tuple[list[Group], list[Tensor]]:
        requests = [(group, i) for group in groups for i in range(sampling.samples)]
        found: list[tuple[tuple[int, ...], Tensor]] = []
        with engines.generating(self._models.engines[role]) as module:
            for start in range(0, len(requests), batch_size):
                part = requests[start : start + batch_size]
                draws = [noise(self._seed, self.step, g.index, i, sampling.max_new_tokens) for g, i in part]
                prompts = [g.prompt for g, _ in part]
                stacked = torch.stack(draws).to(self._models.device)
                found += sample(unwrap(module.model), prompts, stacked, sampling, self.end_ids)
        answers = [found[i : i + sampling.samples] for i in range(0, len(found), sampling.samples)]
        filled = [replace(g, completions=tuple(ids for ids, _ in a)) for g, a in zip(groups, answers, strict=True)]
        return filled, [torch.cat([logps for _, logps in a]) for a in answers]

    def scores(self, groups: Sequence[Group], batch_size: int) -> list[Tensor]:
        if self._rewards is None:
            raise ValueError("reward: expected a reward model or function, got none; give --reward_model")
        return self._rewards(groups, batch_size)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids)

    def gae(
        self,
        rewards: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[Sequence[int]],
        gamma: float,
        lam: float,
    ) -> list[Tensor]:
        return fused.gae(rewards, values, lengths, gamma, lam, self._models.device)

    def total(self, numbers: Sequence[float]) -> list[float]:
        return dist.total(numbers, self._models.device)

    def gather(self, numbers: Tensor) -> Tensor:
        return dist.gather(numbers, self._models.device)

    def warn(self, text: str) -> None:
        if text not in self._said and dist.rank() == 0:
            logger.warning(text)
        self._said.add(text)
