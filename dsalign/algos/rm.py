"""RM: a reward model trained on preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dsalign.contract.algorithm import Algorithm, Traits, check_range
from dsalign.contract.groups import Loss, MicroBatch, Output
from dsalign.contract.maths import logsigmoid, pair, reward_metrics


@dataclass(frozen=True, kw_only=True)
class RM(Algorithm):
    """Bradley-Terry reward model: InstructGPT, arXiv:2203.02155, eq. 1, with an optional margin and centring.

    The score s of a completion is the value head at its last token. The head's bias is not trained: it cancels in
    s_c - s_r, and classifiers of other libraries, as which the model opens, have none.
    """

    center_rewards_coefficient: float = 0.0  # weight of (s_c + s_r)^2, >= 0; keeps scores around 0

    traits: ClassVar[Traits] = Traits(
        data="pairs",
        roles={"reward": "train"},
        main="reward",
        learning_rates={"full": 1e-5, "lora": 1e-4},
        dropout=0.05,
        needs=frozenset(),
    )

    def __post_init__(self) -> None:
        check_range("center_rewards_coefficient", self.center_rewards_coefficient, 0)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"pairs": len(batch.groups)}

    def reward_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-log sigmoid(s_c - s_r - margin) + center (s_c + s_r)^2, summed over pairs."""
        assert out.scores is not None
        chosen, rejected = pair(out.scores)
        margin = torch.tensor([g.margin or 0.0 for g in batch.groups], device=chosen.device)
        loss = -logsigmoid(chosen - rejected - margin) + self.center_rewards_coefficient * (chosen + rejected) ** 2
        return Loss(terms={"pairs": loss.sum()}, metrics=reward_metrics(chosen, rejected))
