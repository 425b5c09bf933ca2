"""Online DPO: preference optimisation on pairs that the policy samples and the reward orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsalign.contract import rollouts
from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range
from dsalign.contract.groups import Batch, Fused, Loss, MicroBatch, Output, Prepared
from dsalign.contract.maths import pair, pair_metrics
from dsalign.contract.preference_losses import LOSSES, Ratios
from dsalign.contract.rollout_options import RolloutOptions


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Algorithm):
    """Direct alignment from online feedback (OAIF), arXiv:2402.04792, algorithm 1.

    The completion of a prompt with the highest score is chosen, the one with the lowest rejected; a prompt whose
    completions all have one score is dropped from the batch.
    """

    beta: float = 0.1  # reward a nat, > 0
    loss_type: str = "sigmoid"  # sigmoid (DPO), ipo or hinge (SLiC)
    num_generations: int = 2  # completions sampled a prompt, >= 2
    num_mini_batches: int = 1  # optimizer steps over a rollout batch, >= 1

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)
        check_choice("loss_type", self.loss_type, ("sigmoid", "ipo", "hinge"))
        check_range("num_generations", self.num_generations, 2)
        check_range("num_mini_batches", self.num_mini_batches, 1)

    def check(self, rollout: RolloutOptions) -> None:
        """Raise ValueError where rollout_is_cap is set: importance weights are of policy gradients."""
        if rollout.rollout_is_cap is not None:
            raise ValueError(
                "rollout_is_cap: expected none with online_dpo, whose pairs are compared with the reference, not with "
                f"what sampled them, got {rollout.rollout_is_cap}"
            )

    @property
    def traits(self) -> Traits:
        """The roles of sampling with a reference, and one pass over a rollout batch: its pairs stay on policy."""
        return rollouts.traits_of(reference=True, mini_batches=self.num_mini_batches)

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Sample completions, score them and keep each prompt's best and worst as a pair, chosen first; the field
        "reference" has the reference's log-probabilities of both."""
        sampled = rollouts.sample(ctx, batch, self.num_generations)
        rolled = sampled.with_signal()
        groups = [
            replace(g, completions=(g.completions[int(s.argmax())], g.completions[int(s.argmin())]))
            for g, s in zip(rolled.groups, rolled.scores, strict=True)
        ]
        fields = {"reference": ctx.logps("reference", groups)}
        metrics = {**rolled.metrics, "rollout/groups_kept": (len(groups), len(sampled.groups))}
        return Prepared(groups, fields, {}, metrics, rolled.samples, rolled.positions)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"pairs": len(batch.groups)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """-log sigmoid(beta h), relu(1 - beta h) or ipo, with h = Delta_c - Delta_r, as DPO has on given pairs."""
        assert out.logps is not None
        delta = batch.sum(out.logps - batch.fields["reference"])
        loss = LOSSES[self.loss_type](Ratios(*pair(delta), *pair(delta / batch.lengths), beta=self.beta))
        rewards = pair(self.beta * delta)
        return Loss({"pairs": loss.sum()}, pair_metrics(batch, out, *rewards, means=self.loss_type == "ipo"))

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of pair losses, with `loss_type`."""
        recipe = {"losses": {self.loss_type: 1.0}, "beta": self.beta}
        return Fused("pairs", recipe, reference=True, means=self.loss_type == "ipo")
