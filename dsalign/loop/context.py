"""The models by role, as `prepare` and the trainer use them: forward passes over groups of any number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group, Sampling
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.roles import Models, ReferenceLogps
from dsalign.loop import loss as fused
from dsalign.models.heads import unwrap
from dsalign.rollout.sampler import noise, sample

logger = logging.getLogger(__name__)


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
