"""GRPO: policy optimisation against the other completions of the prompt, with the switches of Dr. GRPO and DAPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsalign.contract import rollouts
from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range
from dsalign.contract.groups import Batch, Loss, MicroBatch, Output, Prepared
from dsalign.contract.maths import KL_ESTIMATORS, mean, token_kl
from dsalign.contract.rollout_options import RolloutOptions


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Group relative policy optimisation, arXiv:2402.03300, eq. 3.

    Dr. GRPO, arXiv:2503.20783: --loss_norm constant --scale_rewards false. DAPO, arXiv:2503.14476: --beta 0
    --epsilon_high 0.28 --loss_norm token --dynamic_sampling 8 --overlong_buffer N.
    """

    num_generations: int = 8  # completions sampled a prompt, >= 2
    beta: float = 0.04  # weight of the KL to the reference in the loss, >= 0; at 0 there is no reference
    kl_estimator: str = "k3"  # k1, k2 or k3
    epsilon: float = 0.2  # the ratio is held above 1 - this, in (0, 1]
    epsilon_high: float | None = None  # and below 1 + this, > 0; none = epsilon
    loss_norm: str = "sequence"  # a mean over tokens is taken a sequence, over every token of a step, or constant
    scale_rewards: bool = True  # divide a group's advantages by its standard deviation: true or false
    dynamic_sampling: int = 0  # times that groups of equal scores are replaced by further prompts, >= 0
    overlong_buffer: int = 0  # tokens before max_new_tokens over which the score falls by 1, >= 0; 0 = no penalty
    mask_truncated: bool = False  # leave completions without an end token out of the loss: true or false
    num_iterations: int = 1  # passes over a rollout batch, >= 1
    num_mini_batches: int = 1  # optimizer steps a pass, >= 1

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("loss_norm", self.loss_norm, ("sequence", "token", "constant"))
        check_range("num_generations", self.num_generations, 2)
        check_range("epsilon", self.epsilon, 0, 1, open_low=True)
        for name in ("beta", "dynamic_sampling", "overlong_buffer"):
            check_range(name, getattr(self, name), 0)
        for name in ("num_iterations", "num_mini_batches"):
            check_range(name, getattr(self, name), 1)
        if self.epsilon_high is not None:
            check_range("epsilon_high", self.epsilon_high, 0, open_low=True)

    def check(self, rollout: RolloutOptions) -> None:
        """Raise ValueError where overlong_buffer exceeds max_new_tokens."""
        check_range("overlong_buffer", self.overlong_buffer, 0, rollout.max_new_tokens)

    @property
    def traits(self) -> Traits:
        """The roles of sampling, without the reference where beta is 0, and the passes."""
        return rollouts.traits_of(self.beta > 0, epochs=self.num_iterations, mini_batches=self.num_mini_batches)

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Sample completions and score them; fields: "advantages" [completions], "reference" [tokens] where beta > 0,
        and with mask_truncated "counts" [completions], 1 where the loss counts the completion, else 0."""
        sampling = self.num_generations, self.dynamic_sampling, self.overlong_buffer
        rolled = rollouts.sample_until_full(ctx, batch, *sampling)
        fields = {"advantages": rollouts.group_advantages(rolled.scores, scale=self.scale_rewards)}
        if self.mask_truncated:
            fields["counts"] = rollouts.ended(ctx, rolled.groups)
        metrics = {}
        if self.beta > 0:
            fields["reference"] = ctx.logps("reference", rolled.groups)
            kl = [o - r for o, r in zip(rolled.old, fields["reference"], strict=True)]
            metrics = {"objective/kl": rollouts.kl_metrics(rolled, kl, 0.0)["objective/kl"]}  # not in the reward
        return rolled.prepared(metrics=metrics, shared={"max_new_tokens": ctx.rollout.max_new_tokens}, **fields)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        kept = batch.lengths[batch.fields["counts"] > 0] if self.mask_truncated else batch.lengths
        return {"completions": len(kept), "tokens": int(kept.sum())}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps_high)) + beta KL_t, of each completion divided by its length
        (loss_norm sequence) or by max_new_tokens (constant), or of all tokens by their number (token)."""
        assert out.logps is not None
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        change, advantages = out.logps - batch.fields["old"], batch.spread(batch.fields["advantages"])
        loss, metrics = rollouts.clipped(change, advantages, 1 - self.epsilon, 1 + high, out.entropy)
        if self.beta > 0:
            kl = token_kl(out.logps, batch.fields["reference"], self.kl_estimator)
            loss, metrics = loss + self.beta * kl, metrics | {"policy/kl_avg": mean(kl)}
        if self.mask_truncated:
            loss = loss * batch.spread(batch.fields["counts"])
        if self.loss_norm == "token":
            return Loss({"tokens": loss.sum()}, metrics)
        sizes = batch.lengths if self.loss_norm == "sequence" else batch.shared["max_new_tokens"]
        return Loss({"completions": (batch.sum(loss) / sizes).sum()}, metrics)
