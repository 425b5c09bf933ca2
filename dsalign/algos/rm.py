"""RM: a reward model from preferences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dsalign.contract.algorithm import check_range, plain
from dsalign.contract.groups import Loss, MicroBatch, Output
from dsalign.contract.maths import logsigmoid, pair, reward_metrics

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class RM:
    """Bradley-Terry reward model: InstructGPT, arXiv:2203.02155, eq. 1, with an optional margin and centring.

    The score s of a completion is the value head at its last token.
    """

    center_rewards_coefficient: float = 0.0  # weight of (s_c + s_r)^2, >= 0; keeps scores around 0

    data: ClassVar[str] = "pairs"
    roles: ClassVar[Mapping[str, str]] = {"reward": "train"}
    needs: ClassVar[frozenset[str]] = frozenset()
    learning_rates: ClassVar[Mapping[str, float]] = {"full": 1e-5, "lora": 1e-4}
    dropout: ClassVar[float] = 0.05
    epochs: ClassVar[int] = 1
    mini_batches: ClassVar[int] = 1
    temperature: ClassVar[float] = 1.0
    role_learning_rates: ClassVar[Mapping[str, float]] = {}
    min_groups: ClassVar[int] = 1

    prepare = staticmethod(plain)

    def __post_init__(self) -> None:
        check_range("center_rewards_coefficient", self.center_rewards_coefficient, 0, math.inf)

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def units(self, groups: Sequence[Group]) -> Mapping[str, int]:
        return {"pairs": len(groups)}

    def reward_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-log sigmoid(s_c - s_r - margin) + center (s_c + s_r)^2, summed over pairs."""
        assert out.scores is not None
        chosen, rejected = pair(out.scores)
        margin = torch.tensor([g.margin or 0.0 for g in batch.groups], device=chosen.device)
        loss = -logsigmoid(chosen - rejected - margin) + self.center_rewards_coefficient * (chosen + rejected) ** 2
        return Loss(terms={"pairs": loss.sum()}, metrics=reward_metrics(chosen, rejected))

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
