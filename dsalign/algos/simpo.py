"""SimPO: preference optimisation on length-normalised log-probabilities, without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dsalign.contract.algorithm import Algorithm, Traits, check_range
from dsalign.contract.groups import Fused, Loss, MicroBatch, Output
from dsalign.contract.maths import chosen_nll, pair, pair_metrics, pair_units, smoothed


@dataclass(frozen=True, kw_only=True)
class SimPO(Algorithm):
    """Simple preference optimisation, arXiv:2405.14734, eq. 6; with cpo_alpha > 0 CPO-SimPO."""

    beta: float = 2.0  # reward per mean nat a token, > 0
    simpo_gamma: float = 1.0  # target margin in units of reward (not the ratio gamma / beta), >= 0
    cpo_alpha: float = 1.0  # weight of the chosen completions' NLL, >= 0; 0 is the original SimPO
    label_smoothing: float = 0.0  # probability that a label is flipped, in [0, 0.5]

    traits: ClassVar[Traits] = Traits(data="pairs", roles={"policy": "train"}, dropout=0.05)

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)
        check_range("simpo_gamma", self.simpo_gamma, 0)
        check_range("cpo_alpha", self.cpo_alpha, 0)
        check_range("label_smoothing", self.label_smoothing, 0, 0.5)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return pair_units(batch)

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """smoothed(u), u = beta (logp_c / |c| - logp_r / |r|) - gamma, + cpo_alpha NLL(chosen)."""
        assert out.logps is not None
        chosen, rejected = pair(self.beta * batch.sum(out.logps) / batch.lengths)
        loss = smoothed(chosen - rejected - self.simpo_gamma, self.label_smoothing)
        terms = {"pairs": loss.sum(), "chosen_tokens": self.cpo_alpha * chosen_nll(batch, out.logps)}
        return Loss(terms, pair_metrics(batch, out, chosen, rejected, means=True))

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pair losses, with length-normalised log-probabilities and the target margin."""
        recipe = {
            "losses": {"sigmoid_norm": 1.0},
            "beta": self.beta,
            "gamma": self.simpo_gamma,
            "label_smoothing": self.label_smoothing,
            "mean_rewards": True,
        }
        return Fused("pairs", recipe, nll=self.cpo_alpha, means=True)
