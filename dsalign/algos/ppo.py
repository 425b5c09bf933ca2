"""PPO: reinforcement learning from a reward, held near a reference by a KL penalty, with a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dsalign.contract import rollouts
from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range
from dsalign.contract.groups import Batch, Fused, Loss, Metric, MicroBatch, Output, Prepared
from dsalign.contract.maths import mean, token_kl

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class PPO(Algorithm):
    """Proximal policy optimisation for language models: arXiv:1707.06347 with the set-up of arXiv:2203.02155."""

    kl_coef: float = 0.05  # weight of the per-token KL penalty inside the reward, >= 0
    kl_estimator: str = "k1"  # k1 or k3
    cliprange: float = 0.2  # the ratio is held in 1 -+ this, > 0
    cliprange_value: float = 0.2  # the value is held within this of its old one, units of reward, > 0
    vf_coef: float = 0.1  # multiplies the value loss before backward, >= 0
    gamma: float = 1.0  # discount a token, in [0, 1]
    lam: float = 0.95  # GAE's decay a token, in [0, 1]
    whiten_rewards: bool = False  # scale rewards to variance 1, keeping their mean: true or false
    num_ppo_epochs: int = 4  # passes over a rollout batch, >= 1
    num_mini_batches: int = 1  # optimizer steps a pass, >= 1
    num_generations: int = 1  # completions sampled a prompt, >= 1
    critic_learning_rate: float | None = None  # of the value model at the peak, > 0; none = learning_rate

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        for name in ("kl_coef", "vf_coef"):
            check_range(name, getattr(self, name), 0)
        for name in ("cliprange", "cliprange_value"):
            check_range(name, getattr(self, name), 0, open_low=True)
        for name in ("gamma", "lam"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("num_ppo_epochs", "num_mini_batches", "num_generations"):
            check_range(name, getattr(self, name), 1)
        if self.critic_learning_rate is not None:
            check_range("critic_learning_rate", self.critic_learning_rate, 0, open_low=True)

    @property
    def traits(self) -> Traits:
        """The four roles, policy and critic trained, the passes, and the critic's own learning rate if it has one."""
        return Traits(
            data="prompts",
            roles={"policy": "train", "value": "train", "reference": "frozen", "reward": "frozen"},
            role_learning_rates={} if self.critic_learning_rate is None else {"value": self.critic_learning_rate},
            epochs=self.num_ppo_epochs,
            mini_batches=self.num_mini_batches,
        )

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Sample completions and score them; fields, each [completion tokens] a group: "old" log-probabilities,
        "values", "returns", and "advantages" by GAE, whitened over the global batch."""
        rolled = rollouts.sample(ctx, batch, self.num_generations)
        groups, reference = rolled.groups, ctx.logps("reference", rolled.groups)
        values = [token_values(v, g) for v, g in zip(ctx.values("value", groups), groups, strict=True)]
        kl = [token_kl(o, r, self.kl_estimator) for o, r in zip(rolled.old, reference, strict=True)]
        each = zip(kl, rolled.scores, groups, strict=True)
        rewards = [rollouts.token_rewards(k, s, g, self.kl_coef) for k, s, g in each]
        if self.whiten_rewards:
            rewards = rollouts.whiten(ctx, rewards, shift_mean=False)
        lengths = [[len(c) for c in group.completions] for group in groups]
        advantages = ctx.gae(rewards, values, lengths, self.gamma, self.lam)
        return rolled.prepared(
            values=values,
            returns=[a + v for a, v in zip(advantages, values, strict=True)],
            advantages=rollouts.whiten(ctx, advantages, shift_mean=True),
            metrics=rollouts.kl_metrics(rolled, kl, self.kl_coef),
        )

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"tokens": len(batch.segment)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = e^(logp - old); arXiv:1707.06347, eq. 7."""
        assert out.logps is not None
        change, advantages = out.logps - batch.fields["old"], batch.fields["advantages"]
        loss, metrics = rollouts.clipped(change, advantages, 1 - self.cliprange, 1 + self.cliprange, out.entropy)
        return Loss(terms={"tokens": loss.sum()}, metrics=metrics)

    def value_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """vf_coef 1/2 sum_t max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)."""
        assert out.values is not None
        values = out.values[torch.arange(len(batch.segment), device=out.values.device) + batch.segment]
        old, returns = batch.fields["values"], batch.fields["returns"]
        clipped = torch.clamp(values, old - self.cliprange_value, old + self.cliprange_value)
        plain, held = (values - returns) ** 2, (clipped - returns) ** 2
        loss = 0.5 * torch.maximum(plain, held)
        metrics: dict[str, Metric] = {
            "loss/value_avg": mean(loss),
            "val/clipfrac_avg": mean((held > plain).float()),
        }
        return Loss(terms={"tokens": self.vf_coef * loss.sum()}, metrics=metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of the clipped value loss for the critic, of the clipped policy loss for the policy."""
        if role == "value":
            return Fused("clipped_value", {"cliprange": self.cliprange_value}, weight=self.vf_coef)
        return Fused("clipped_policy", {"cliprange": self.cliprange})


def token_values(values: Tensor, group: Group) -> Tensor:
    """V(s_t) of each completion token, [tokens]: a group's values [tokens + completions] without the one at each
    completion's last token, after which no token was sampled."""
    parts = torch.split(values, [len(c) + 1 for c in group.completions])
    return torch.cat([v[:-1] for v in parts])
