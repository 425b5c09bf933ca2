"""SimPO: preference optimisation on length-normalised log-probabilities, without a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dsalign.contract.algorithm import check_range, plain
from dsalign.contract.groups import Fused, Loss, Metric, MicroBatch, Output
from dsalign.contract.maths import chosen_nll, entropy_metric, logp_metrics, pair, pair_units, reward_metrics, smoothed

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """Simple preference optimisation, arXiv:2405.14734, eq. 6; with cpo_alpha > 0 CPO-SimPO."""

    beta: float = 2.0  # reward per mean nat a token, > 0
    simpo_gamma: float = 1.0  # target margin in units of reward (not the ratio gamma / beta), >= 0
    cpo_alpha: float = 1.0  # weight of the chosen completions' NLL, >= 0; 0 is the original SimPO
    label_smoothing: float = 0.0  # probability that a label is flipped, in [0, 0.5]

    data: ClassVar[str] = "pairs"
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
        check_range("simpo_gamma", self.simpo_gamma, 0, math.inf)
        check_range("cpo_alpha", self.cpo_alpha, 0, math.inf)
        check_range("label_smoothing", self.label_smoothing, 0, 0.5)

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """smoothed(u), u = beta (logp_c / |c| - logp_r / |r|) - gamma, + cpo_alpha NLL(chosen)."""
        assert out.logps is not None
        chosen, rejected = pair(self.beta * batch.sum(out.logps) / batch.lengths)
        loss = smoothed(chosen - rejected - self.simpo_gamma, self.label_smoothing)
        nll = chosen_nll(batch, out.logps)
        metrics: dict[str, Metric] = {
            **reward_metrics(chosen, rejected),
            **logp_metrics(batch, out.logps, means=True),
            "nll_loss": (nll.detach(), pair(batch.lengths)[0].sum()),
            **entropy_metric(out.entropy),
        }
        return Loss(terms={"pairs": loss.sum(), "chosen_tokens": self.cpo_alpha * nll}, metrics=metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pairs."""
        recipe = {
            "losses": {"sigmoid_norm": 1.0},
            "beta": self.beta,
            "gamma": self.simpo_gamma,
            "label_smoothing": self.label_smoothing,
            "mean_rewards": True,
        }
        return Fused("pairs", recipe, nll=self.cpo_alpha, means=True)

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
