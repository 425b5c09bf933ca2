"""CPO: preference optimisation without a reference, anchored by the likelihood of the chosen completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dsalign.contract.algorithm import check_choice, check_range, plain
from dsalign.contract.groups import Fused, Loss, Metric, MicroBatch, Output
from dsalign.contract.maths import chosen_nll, entropy_metric, logp_metrics, pair, pair_units, reward_metrics, smoothed

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class CPO:
    """Contrastive preference optimisation, arXiv:2401.08417, eq. 3."""

    beta: float = 0.1  # reward a nat, > 0
    cpo_alpha: float = 1.0  # weight of the chosen completions' NLL, >= 0
    label_smoothing: float = 0.0  # probability that a label is flipped, in [0, 0.5]; sigmoid only
    loss_type: str = "sigmoid"  # sigmoid, hinge or ipo

    data: ClassVar[str] = "pairs"
    aliases: ClassVar[Mapping[str, Mapping[str, str]]] = {"loss_type": {"simpo": "simpo"}}  # value -> algorithm
    roles: ClassVar[Mapping[str, str]] = {"policy": "train"}
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    learning_rates: ClassVar[Mapping[str, float]] = {"full": 1e-6, "lora": 5e-5}
    dropout: ClassVar[float] = 0.05
    epochs: ClassVar[int] = 1
    mini_batches: ClassVar[int] = 1
    temperature: ClassVar[float] = 1.0
    role_learning_rates: ClassVar[Mapping[str, float]] = {}
    min_groups: ClassVar[int] = 1

    prepare = staticmethod(plain)
    units = staticmethod(pair_units)

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, math.inf, open_low=True)
        check_range("cpo_alpha", self.cpo_alpha, 0, math.inf)
        check_range("label_smoothing", self.label_smoothing, 0, 0.5)
        check_choice("loss_type", self.loss_type, ("sigmoid", "hinge", "ipo"))
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing: loss_type {self.loss_type} has no label smoothing; set it to 0")

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sigmoid: smoothed(beta (logp_c - logp_r)); hinge: relu(1 - beta (logp_c - logp_r));
        ipo: (logp_c / |c| - logp_r / |r| - 1 / (2 beta))^2; all + cpo_alpha NLL(chosen)."""
        assert out.logps is not None
        sums = batch.sum(out.logps)
        chosen, rejected = pair(sums)
        if self.loss_type == "sigmoid":
            loss = smoothed(self.beta * (chosen - rejected), self.label_smoothing)
        elif self.loss_type == "hinge":
            loss = torch.relu(1 - self.beta * (chosen - rejected))
        else:
            mean_chosen, mean_rejected = pair(sums / batch.lengths)
            loss = (mean_chosen - mean_rejected - 1 / (2 * self.beta)) ** 2
        nll = chosen_nll(batch, out.logps)
        metrics: dict[str, Metric] = {
            **reward_metrics(self.beta * chosen, self.beta * rejected),
            **logp_metrics(batch, out.logps, means=self.loss_type == "ipo"),
            "nll_loss": (nll.detach(), pair(batch.lengths)[0].sum()),
            **entropy_metric(out.entropy),
        }
        return Loss(terms={"pairs": loss.sum(), "chosen_tokens": self.cpo_alpha * nll}, metrics=metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pairs."""
        recipe = {"losses": {self.loss_type: 1.0}, "beta": self.beta, "label_smoothing": self.label_smoothing}
        return Fused("pairs", recipe, nll=self.cpo_alpha, means=self.loss_type == "ipo")

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
