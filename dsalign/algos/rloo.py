"""RLOO: REINFORCE on whole completions, with the mean reward of the prompt's other completions as baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsalign.contract import rollouts
from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range
from dsalign.contract.groups import Batch, Loss, MicroBatch, Output, Prepared


@dataclass(frozen=True, kw_only=True)
class RLOO(Algorithm):
    """REINFORCE leave-one-out, arXiv:2402.14740, section 3: a completion is one action, its reward r - kl_coef KL.

    While the weights are those that sampled, the gradient is REINFORCE's, -A grad log pi(y | x); in later optimizer
    steps over a rollout batch the ratio of a whole completion is clipped as in PPO.
    """

    num_generations: int = 4  # completions sampled a prompt, >= 2
    kl_coef: float = 0.05  # weight of a completion's KL inside its reward, >= 0; at 0 there is no reference
    kl_estimator: str = "k1"  # k1 or k3
    cliprange: float = 0.2  # the ratio of a completion is held in 1 -+ this, > 0
    num_iterations: int = 1  # passes over a rollout batch, >= 1
    num_mini_batches: int = 1  # optimizer steps a pass, >= 1

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        check_range("kl_coef", self.kl_coef, 0)
        check_range("cliprange", self.cliprange, 0, open_low=True)
        check_range("num_generations", self.num_generations, 2)
        for name in ("num_iterations", "num_mini_batches"):
            check_range(name, getattr(self, name), 1)

    @property
    def traits(self) -> Traits:
        """The roles of sampling, without the reference where kl_coef is 0, and the passes."""
        return rollouts.traits_of(self.kl_coef > 0, epochs=self.num_iterations, mini_batches=self.num_mini_batches)

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Sample completions and score them; the field "advantages", [completions] a group, is R_i less the mean of the
        prompt's other R_j, with R = r - kl_coef sum_t KL_t."""
        rolled = rollouts.sample(ctx, batch, self.num_generations)
        kl, metrics = rollouts.kl_penalty(ctx, rolled, self.kl_estimator, self.kl_coef)
        each = zip(rolled.scores, kl, rolled.groups, strict=True)
        rewards = [r - self.kl_coef * rollouts.completion_sums(k, g) for r, k, g in each]
        return rolled.prepared(metrics=metrics, advantages=rollouts.leave_one_out(rewards))

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"completions": len(batch.lengths)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sum_i max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = e^(log pi(y_i | x) - its old one)."""
        assert out.logps is not None
        change = batch.sum(out.logps - batch.fields["old"])  # not a difference of sums, which would lose its digits
        loss, metrics = rollouts.clipped(
            change, batch.fields["advantages"], 1 - self.cliprange, 1 + self.cliprange, out.entropy
        )
        return Loss({"completions": loss.sum()}, metrics)
