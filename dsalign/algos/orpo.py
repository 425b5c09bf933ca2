"""ORPO: supervised fine-tuning with an odds-ratio penalty, without a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dsalign.contract.algorithm import check_range, plain
from dsalign.contract.groups import Fused, Loss, Metric, MicroBatch, Output
from dsalign.contract.maths import (
    chosen_nll,
    entropy_metric,
    log1mexp,
    logp_metrics,
    logsigmoid,
    mean,
    pair,
    pair_units,
    reward_metrics,
)

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """Odds-ratio preference optimisation, arXiv:2403.07691, eq. 6 and 7."""

    beta: float = 0.1  # lambda of the paper: weight of the odds-ratio loss, > 0

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

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """NLL(chosen) - lambda log sigmoid(log_odds_c - log_odds_r), log_odds = a - log1mexp(a),
        a = min(logp / |y|, -2^-24): a mean of exactly 0 has infinite odds."""
        assert out.logps is not None
        means = batch.sum(out.logps) / batch.lengths
        a = torch.clamp(means, max=-(2.0**-24))
        chosen_odds, rejected_odds = pair(a - log1mexp(a))
        ratio = logsigmoid(chosen_odds - rejected_odds)
        nll = chosen_nll(batch, out.logps)
        chosen, rejected = pair(self.beta * means)
        metrics: dict[str, Metric] = {
            **reward_metrics(chosen, rejected),
            **logp_metrics(batch, out.logps, means=True),
            "nll_loss": (nll.detach(), pair(batch.lengths)[0].sum()),
            "log_odds_ratio": mean(ratio),
            "log_odds_chosen": mean(chosen_odds - rejected_odds),
            **entropy_metric(out.entropy),
        }
        return Loss(terms={"chosen_tokens": nll, "pairs": -self.beta * ratio.sum()}, metrics=metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pairs."""
        recipe = {"losses": {"odds_ratio": self.beta}, "beta": self.beta, "mean_rewards": True}
        return Fused("pairs", recipe, nll=1.0, means=True)

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
