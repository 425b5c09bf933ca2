"""PPO: reinforcement learning from a reward, held near a reference by a KL penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dsalign.contract.algorithm import Context, check_choice, check_range
from dsalign.contract.groups import Batch, Fused, Loss, Metric, MicroBatch, Output, Prepared, Sampling
from dsalign.contract.maths import mean
from dsalign.contract.rollouts import logp_gap, token_kl, token_values, whiten

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class PPO:
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
    missing_eos_penalty: float | None = None  # subtracted from the score of a completion without end token, >= 0
    local_rollout_forward_batch_size: int = 64  # completions in a forward without gradient, of one rank, >= 1
    num_sample_generations: int = 10  # times in a run that sample completions are shown and saved, >= 0
    max_new_tokens: int = 512  # tokens of a sampled completion at most, >= 1
    temperature: float = 1.0  # logits are divided by it, > 0
    top_p: float = 1.0  # share of probability that is sampled from, in (0, 1]; 1 = all
    top_k: int = 0  # most probable tokens that are sampled from, >= 0; 0 = all, 1 = greedy
    critic_learning_rate: float | None = None  # of the value model at the peak, > 0; none = learning_rate
    rollout_logp_limit: float = 0.5  # nats: stop when sampler and trainer differ by more on average, > 0

    data: ClassVar[str] = "prompts"
    roles: ClassVar[Mapping[str, str]] = {
        "policy": "train",
        "value": "train",
        "reference": "frozen",
        "reward": "frozen",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"entropy", "val/ratio_var"})
    learning_rates: ClassVar[Mapping[str, float]] = {"full": 1e-6, "lora": 5e-5}
    dropout: ClassVar[float] = 0.0
    min_groups: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k3"))
        for name in ("kl_coef", "vf_coef", "num_sample_generations", "top_k"):
            check_range(name, getattr(self, name), 0, math.inf)
        for name in ("cliprange", "cliprange_value", "temperature", "rollout_logp_limit"):
            check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        for name in ("gamma", "lam"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        for name in (
            "num_ppo_epochs",
            "num_mini_batches",
            "num_generations",
            "local_rollout_forward_batch_size",
            "max_new_tokens",
        ):
            check_range(name, getattr(self, name), 1, math.inf)
        if self.missing_eos_penalty is not None:
            check_range("missing_eos_penalty", self.missing_eos_penalty, 0, math.inf)
        if self.critic_learning_rate is not None:
            check_range("critic_learning_rate", self.critic_learning_rate, 0, math.inf, open_low=True)

    @property
    def epochs(self) -> int:
        """Passes over a rollout batch."""
        return self.num_ppo_epochs

    @property
    def mini_batches(self) -> int:
        """Optimizer steps a pass."""
        return self.num_mini_batches

    @property
    def role_learning_rates(self) -> Mapping[str, float]:
        """The critic's own learning rate, where it has one."""
        return {} if self.critic_learning_rate is None else {"value": self.critic_learning_rate}

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return []

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Rollouts, their scores, the log-probabilities and values before the update, advantages and returns."""
        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.num_generations)
        rows = self.local_rollout_forward_batch_size
        groups, sampler = ctx.generate("policy", batch.local, sampling, rows)
        size = max(1, rows // self.num_generations)
        old, reference = ctx.logps("policy", groups, size), ctx.logps("reference", groups, size)
        values = [token_values(v, g) for v, g in zip(ctx.values("value", groups, size), groups, strict=True)]
        self._check_sampler(ctx, sampler, old)
        scores = [self._penalised(ctx, s, g) for s, g in zip(ctx.scores(groups, size), groups, strict=True)]
        kl = [token_kl(o, r, self.kl_estimator) for o, r in zip(old, reference, strict=True)]
        rewards = [self._rewards(k, s, g) for k, s, g in zip(kl, scores, groups, strict=True)]
        if self.whiten_rewards:
            rewards = whiten(ctx, rewards, shift_mean=False)
        lengths = [[len(c) for c in group.completions] for group in groups]
        advantages = ctx.gae(rewards, values, lengths, self.gamma, self.lam)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        fields = {
            "old": old,
            "values": values,
            "returns": returns,
            "advantages": whiten(ctx, advantages, shift_mean=True),
        }
        metrics = {**self._objective(ctx, groups, old, kl, scores), "rollout/logp_gap": logp_gap(sampler, old)}
        metrics["episode"] = ((batch.seen + len(batch.groups)) * self.num_generations, 1)  # completions so far
        return Prepared(groups, fields, {}, metrics, self._samples(ctx, groups, scores))

    def _check_sampler(self, ctx: Context, sampler: Sequence[Tensor], old: Sequence[Tensor]) -> None:
        total, count = ctx.total([float(x) for x in logp_gap(sampler, old)])
        gap = total / max(count, 1)
        if not gap <= self.rollout_logp_limit:  # NaN too
            raise ValueError(
                f"rollout_logp_limit: the sampler's log-probabilities differ from the trainer's by {gap:.3g} "
                f"nats a token on average, more than {self.rollout_logp_limit}: rollouts do not come from the weights "
                "being trained"
            )
        if gap > 0.05:
            ctx.warn(f"ppo: sampler and trainer differ by {gap:.3g} nats a token on average")

    def _penalised(self, ctx: Context, scores: Tensor, group: Group) -> Tensor:
        """Scores [k] less missing_eos_penalty where a completion has no end token."""
        if self.missing_eos_penalty is None:
            return scores
        missing = torch.tensor([c[-1] not in ctx.end_ids for c in group.completions])
        return torch.where(missing, scores - self.missing_eos_penalty, scores)

    def _rewards(self, kl: Tensor, scores: Tensor, group: Group) -> Tensor:
        """r_t = -kl_coef kl_t, and the score on the last valid token of each completion; [tokens of the group]."""
        rewards = -self.kl_coef * kl
        ends = torch.tensor([len(c) for c in group.completions]).cumsum(0) - 1
        return rewards.index_add(0, ends, scores)

    def _objective(self, ctx: Context, groups: Sequence[Group], old: Any, kl: Any, scores: Any) -> dict[str, Metric]:
        """objective/*: sums over a completion, averaged over completions."""
        count = sum(len(g.completions) for g in groups)
        score, divergence, entropy = (float(sum(x.double().sum() for x in xs)) for xs in (scores, kl, old))
        (ended,) = ctx.total([float(sum(c[-1] in ctx.end_ids for g in groups for c in g.completions))])
        return {
            "objective/kl": (divergence, count),
            "objective/entropy": (-entropy, count),
            "objective/non_score_reward": (-self.kl_coef * divergence, count),
            "objective/scores": (score, count),
            "objective/rlhf_reward": (score - self.kl_coef * divergence, count),
            "val/num_eos_tokens": (ended, 1),  # of all ranks, said by each
        }

    def _samples(self, ctx: Context, groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        """The first completions of this rank, `num_sample_generations` times in a run."""
        times, total = self.num_sample_generations, ctx.total_batches
        if ctx.step * times // total == (ctx.step - 1) * times // total:  # no new n-th of the run begins here
            return []
        return [
            {"prompt": g.prompt_text, "completion": ctx.decode(g.completions[0]), "score": float(s[0])}
            for g, s in list(zip(groups, scores, strict=True))[:4]
        ]

    def units(self, groups: Sequence[Group]) -> Mapping[str, int]:
        return {"tokens": sum(len(c) for g in groups for c in g.completions)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """sum_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = e^(logp - old); arXiv:1707.06347, eq. 7."""
        assert out.logps is not None
        advantages, change = batch.fields["advantages"], out.logps - batch.fields["old"]
        ratio = torch.exp(change)
        clipped = torch.clamp(ratio, 1 - self.cliprange, 1 + self.cliprange)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        metrics: dict[str, Metric] = {
            "loss/policy_avg": mean(loss),
            "policy/approxkl_avg": mean(0.5 * change**2),
            "policy/clipfrac_avg": mean((-advantages * clipped > -advantages * ratio).float()),
            "val/ratio": mean(ratio),
        }
        if out.entropy is not None:
            metrics["policy/entropy_avg"] = mean(out.entropy)
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
        """The kernels of both clipped losses."""
        if role == "value":
            return Fused("clipped_value", {"cliprange": self.cliprange_value}, weight=self.vf_coef)
        return Fused("clipped_policy", {"cliprange": self.cliprange})

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
