"""REINFORCE++: policy gradients without a critic, their advantages normalised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsalign.contract import rollouts
from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range
from dsalign.contract.groups import Batch, Fused, Loss, MicroBatch, Output, Prepared


@dataclass(frozen=True, kw_only=True)
class Reinforce(Algorithm):
    """REINFORCE++, arXiv:2501.03262, section 3: A_t = r - kl_coef sum_{i >= t} KL_i, whitened over the global batch.

    With several completions a prompt, r is first taken against the mean of its group (REINFORCE++ with baseline).
    """

    num_generations: int = 1  # completions sampled a prompt, >= 1
    kl_coef: float = 0.01  # weight of the per-token KL penalty inside the reward, >= 0; at 0 there is no reference
    kl_estimator: str = "k1"  # k1 or k3
    cliprange: float = 0.2  # the ratio of a token is held in 1 -+ this, > 0
    num_iterations: int = 1  # passes over a rollout batch, >= 1
    num_mini_batches: int = 1  # optimizer steps a pass, >= 1

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        check_range("kl_coef", self.kl_coef, 0)
        check_range("cliprange", self.cliprange, 0, open_low=True)
        for name in ("num_generations", "num_iterations", "num_mini_batches"):
            check_range(name, getattr(self, name), 1)

    @property
    def traits(self) -> Traits:
        """The roles of sampling, without the reference where kl_coef is 0, and the passes."""
        return rollouts.traits_of(self.kl_coef > 0, epochs=self.num_iterations, mini_batches=self.num_mini_batches)

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Sample completions and score them; the field "advantages" has each token's return, the sum of rewards from it
        to the end of its completion, whitened over the global batch, [completion tokens] a group."""
        rolled = rollouts.sample(ctx, batch, self.num_generations)
        several = self.num_generations > 1
        scores = rollouts.group_advantages(rolled.scores, scale=False) if several else rolled.scores
        kl, metrics = rollouts.kl_penalty(ctx, rolled, self.kl_estimator, self.kl_coef)
        each = zip(kl, scores, rolled.groups, strict=True)
        returns = [rollouts.rewards_to_go(rollouts.token_rewards(k, s, g, self.kl_coef), g) for k, s, g in each]
        return rolled.prepared(metrics=metrics, advantages=rollouts.whiten(ctx, returns, shift_mean=True))

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"tokens": len(batch.segment)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = e^(logp - old)."""
        assert out.logps is not None
        change, advantages = out.logps - batch.fields["old"], batch.fields["advantages"]
        loss, metrics = rollouts.clipped(change, advantages, 1 - self.cliprange, 1 + self.cliprange, out.entropy)
        return Loss({"tokens": loss.sum()}, metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of the clipped policy loss."""
        return Fused("clipped_policy", {"cliprange": self.cliprange})
