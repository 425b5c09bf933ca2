"""CPO: preference optimisation without a reference, anchored by the likelihood of the chosen completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dsalign.contract.algorithm import Algorithm, Traits, check_choice, check_range
from dsalign.contract.groups import Fused, Loss, MicroBatch, Output
from dsalign.contract.maths import chosen_nll, pair, pair_metrics, pair_units, smoothed


@dataclass(frozen=True, kw_only=True)
class CPO(Algorithm):
    """Contrastive preference optimisation, arXiv:2401.08417, eq. 3."""

    beta: float = 0.1  # reward a nat, > 0
    cpo_alpha: float = 1.0  # weight of the chosen completions' NLL, >= 0
    label_smoothing: float = 0.0  # probability that a label is flipped, in [0, 0.5]; sigmoid only
    loss_type: str = "sigmoid"  # sigmoid, hinge or ipo

    traits: ClassVar[Traits] = Traits(
        data="pairs", roles={"policy": "train"}, dropout=0.05, aliases={"loss_type": {"simpo": "simpo"}}
    )

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)
        check_range("cpo_alpha", self.cpo_alpha, 0)
        check_range("label_smoothing", self.label_smoothing, 0, 0.5)
        check_choice("loss_type", self.loss_type, ("sigmoid", "hinge", "ipo"))
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing: loss_type {self.loss_type} has no label smoothing; set it to 0")

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return pair_units(batch)

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
        terms = {"pairs": loss.sum(), "chosen_tokens": self.cpo_alpha * chosen_nll(batch, out.logps)}
        rewards = self.beta * chosen, self.beta * rejected
        return Loss(terms, pair_metrics(batch, out, *rewards, means=self.loss_type == "ipo"))

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pair losses, with `loss_type` and the NLL of chosen completions."""
        recipe = {"losses": {self.loss_type: 1.0}, "beta": self.beta, "label_smoothing": self.label_smoothing}
        return Fused("pairs", recipe, nll=self.cpo_alpha, means=self.loss_type == "ipo")
