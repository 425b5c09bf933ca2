"""SFT: maximum likelihood of the demonstrated completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dsalign.contract.algorithm import plain
from dsalign.contract.groups import Loss, MicroBatch, Output
from dsalign.contract.maths import entropy_metric, mean

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning: the negative log-likelihood of completion tokens (as in arXiv:2203.02155, step 1)."""

    data: ClassVar[str] = "demonstrations"
    roles: ClassVar[Mapping[str, str]] = {"policy": "train"}
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    learning_rates: ClassVar[Mapping[str, float]] = {"full": 1e-5, "lora": 1e-4}
    dropout: ClassVar[float] = 0.05
    epochs: ClassVar[int] = 1
    mini_batches: ClassVar[int] = 1
    temperature: ClassVar[float] = 1.0
    role_learning_rates: ClassVar[Mapping[str, float]] = {}
    min_groups: ClassVar[int] = 1

    prepare = staticmethod(plain)

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def units(self, groups: Sequence[Group]) -> Mapping[str, int]:
        return {"tokens": sum(sum(g.lengths) for g in groups)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-sum_t log pi(y_t | x, y_<t) over completion tokens."""
        assert out.logps is not None
        nll = -out.logps
        return Loss(terms={"tokens": nll.sum()}, metrics={"nll_loss": mean(nll), **entropy_metric(out.entropy)})

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
