"""ORPO: supervised fine-tuning with an odds-ratio penalty, without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dsalign.contract.algorithm import Algorithm, Traits, check_range
from dsalign.contract.groups import Fused, Loss, MicroBatch, Output
from dsalign.contract.maths import chosen_nll, log1mexp, logsigmoid, mean, pair, pair_metrics, pair_units


@dataclass(frozen=True, kw_only=True)
class ORPO(Algorithm):
    """Odds-ratio preference optimisation, arXiv:2403.07691, eq. 6 and 7."""

    beta: float = 0.1  # lambda of the paper: weight of the odds-ratio loss, > 0

    traits: ClassVar[Traits] = Traits(data="pairs", roles={"policy": "train"}, dropout=0.05)

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return pair_units(batch)

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """NLL(chosen) - lambda log sigmoid(log_odds_c - log_odds_r), log_odds = a - log1mexp(a),
        a = min(logp / |y|, -2^-24): a mean of exactly 0 has infinite odds."""
        assert out.logps is not None
        means = batch.sum(out.logps) / batch.lengths
        a = torch.clamp(means, max=-(2.0**-24))
        chosen_odds, rejected_odds = pair(a - log1mexp(a))
        ratio = logsigmoid(chosen_odds - rejected_odds)
        terms = {"chosen_tokens": chosen_nll(batch, out.logps), "pairs": -self.beta * ratio.sum()}
        odds = {"log_odds_ratio": mean(ratio), "log_odds_chosen": mean(chosen_odds - rejected_odds)}
        return Loss(terms, {**pair_metrics(batch, out, *pair(self.beta * means), means=True), **odds})

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pair losses, with the odds ratio and the NLL of chosen completions."""
        recipe = {"losses": {"odds_ratio": self.beta}, "beta": self.beta, "mean_rewards": True}
        return Fused("pairs", recipe, nll=1.0, means=True)
