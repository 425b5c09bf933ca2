"""SFT: maximum likelihood of the demonstrated completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsalign.contract.algorithm import Algorithm, Traits
from dsalign.contract.groups import Loss, MicroBatch, Output
from dsalign.contract.maths import entropy_metric, mean


@dataclass(frozen=True, kw_only=True)
class SFT(Algorithm):
    """Supervised fine-tuning: the negative log-likelihood of completion tokens (as in arXiv:2203.02155, step 1)."""

    traits: ClassVar[Traits] = Traits(
        data="demonstrations", roles={"policy": "train"}, learning_rates={"full": 1e-5, "lora": 1e-4}, dropout=0.05
    )

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"tokens": len(batch.segment)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-sum_t log pi(y_t | x, y_<t) over completion tokens."""
        assert out.logps is not None
        return Loss({"tokens": -out.logps.sum()}, {"nll_loss": mean(-out.logps), **entropy_metric(out.entropy)})
