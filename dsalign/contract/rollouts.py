"""The steps that online algorithms share: sampling, the check of the sampler, scores and penalties, KL, advantages, the
clipped loss and the metrics objective/*."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsalign.contract.algorithm import Context, Traits
from dsalign.contract.groups import Batch, Group, Metric, Metrics, Prepared, Sampled
from dsalign.contract.importance import WEIGHTS, truncated_weights
from dsalign.contract.maths import mean, ratio, token_kl

if TYPE_CHECKING:
    from torch import Tensor

WARN_GAP = 0.05  # nats a token: a larger mean gap between the log-probabilities of sampler and trainer is a warning
SHOWN = 4  # rows of a table of sampled completions


def traits_of(reference: bool, *, epochs: int = 1, mini_batches: int = 1) -> Traits:
    """The traits of an online algorithm that trains the policy alone.

    reference: whether it reads a frozen reference. epochs, mini_batches: as in `Traits`.
    """
    roles = {"policy": "train", "reference": "frozen", "reward": "frozen"}
    kept = {role: how for role, how in roles.items() if reference or role != "reference"}
    return Traits(data="prompts", roles=kept, epochs=epochs, mini_batches=mini_batches)


@dataclass(frozen=True)
class Rollouts:
    """This rank's share of a global batch of prompts, with sampled and scored completions.

    groups: each prompt with its completions. positions: the place of each group in the global batch, as in `Prepared`.
    old: one [completion tokens] float32 tensor a group, log-probabilities that the trainer computed under the weights
    that sampled, nats. scores: one [completions] float32 tensor a group, units of reward, after missing_eos_penalty and
    the overlong punishment. metrics, samples: as in `Prepared`.
    """

    groups: Sequence[Group]
    positions: Sequence[int]
    old: Sequence[Tensor]
    scores: Sequence[Tensor]
    metrics: Metrics
    samples: Sequence[Mapping[str, Any]] = ()
    weights: Sequence[Tensor] = ()

    def select(self, kept: Sequence[int]) -> Rollouts:
        """The rollouts of the groups with the indices `kept`; metrics and samples stay those of all groups."""
        return Rollouts(
            [self.groups[i] for i in kept],
            [self.positions[i] for i in kept],
            [self.old[i] for i in kept],
            [self.scores[i] for i in kept],
            self.metrics,
            self.samples,
            [self.weights[i] for i in kept] if self.weights else (),
        )

    def with_signal(self) -> Rollouts:
        """The rollouts of the groups whose completions do not all have one score; a group with one score has advantages
        of 0 and so no gradient."""
        return self.select([i for i, scores in enumerate(self.scores) if bool((scores != scores[0]).any())])

    def joined(self, other: Rollouts) -> Rollouts:
        """These rollouts followed by those of `other`: groups are concatenated, sums and counts of metrics are added,
        and the table of samples is this one's. The positions in both must be different."""
        return Rollouts(
            [*self.groups, *other.groups],
            [*self.positions, *other.positions],
            [*self.old, *other.old],
            [*self.scores, *other.scores],
            _added(self.metrics, other.metrics),
            self.samples,
            [*self.weights, *other.weights],
        )

    def prepared(
        self, *, metrics: Metrics | None = None, shared: Mapping[str, float] | None = None, **fields: Sequence[Tensor]
    ) -> Prepared:
        """The prepared batch of these rollouts.

        metrics: logged beside the rollouts' own. shared: as in `Prepared`. fields: one 1-D tensor a group, kept beside
        the field "old" and the weights.
        """
        return Prepared(
            self.groups,
            {"old": self.old, **({WEIGHTS: self.weights} if self.weights else {}), **fields},
            shared or {},
            {**self.metrics, **(metrics or {})},
            self.samples,
            self.positions,
        )


def sample(ctx: Context, batch: Batch, num_generations: int, *, overlong_buffer: int = 0, first: int = 0) -> Rollouts:
    """Sample completions of this rank's prompts, score them and check the sampler. Collective.

    num_generations: completions a prompt. overlong_buffer: tokens, see `overlong`, whose punishment is added to the
    scores; 0 = none. first: number of a prompt's first completion, see `Context.generate`.
    Raises ValueError where the sampler's log-probabilities are not the trainer's: it ran on other weights.
    """
    options = ctx.rollout
    sampled = ctx.generate("policy", batch.local, num_generations, first)
    groups, (old, gap) = sampled.groups, old_logps(ctx, sampled)
    check_sampler(ctx, gap)
    cap = options.rollout_is_cap
    weights, of_weights = truncated_weights(sampled.logps, old, cap) if cap is not None else ([], {})
    found = ctx.scores(groups)
    scores = [
        missing_end(s, g, ctx.end_ids, options.missing_eos_penalty)
        + overlong(g, options.max_new_tokens, overlong_buffer)
        for s, g in zip(found.total, groups, strict=True)
    ]
    count = sum(len(g.completions) for g in groups)
    (with_end,) = ctx.total([float(sum(c[-1] in ctx.end_ids for g in groups for c in g.completions))])
    by_source = found.sources if len(found.sources) > 1 else {}
    metrics: dict[str, Metric] = {
        "objective/entropy": (-_sum(old), count),
        "objective/scores": (_sum(scores), count),
        **{f"objective/scores/{name}": (_sum(of), count) for name, of in by_source.items()},
        "val/num_eos_tokens": (with_end, 1),  # of all ranks, said by each
        "rollout/length": (sum(len(c) for g in groups for c in g.completions), count),
        "rollout/logp_gap": gap,
        **of_weights,
        "episode": ((batch.seen + len(batch.groups)) * num_generations, 1),  # completions so far
    }
    return Rollouts(groups, batch.mine, old, scores, metrics, table(ctx, groups, scores), weights)


def old_logps(ctx: Context, sampled: Sampled) -> tuple[Sequence[Tensor], Metric]:
    """The log-probabilities under the weights that sampled, from which ratios start, and the metric of `logp_gap`.

    With old_logps auto they are the sampler's own where it computes as exactly as the trainer, which saves a forward
    pass over the rollout; else the trainer computes them. Collective.
    """
    wanted = ctx.rollout.old_logps
    if wanted == "sampler" or (wanted == "auto" and sampled.exact):
        return sampled.logps, sampled.gap
    old = ctx.logps("policy", sampled.groups)
    return old, logp_gap(sampled.logps, old)


def sample_until_full(
    ctx: Context, batch: Batch, num_generations: int, attempts: int, overlong_buffer: int = 0
) -> Rollouts:
    """Dynamic sampling, arXiv:2503.14476, eq. 11: drop groups whose completions all have one score, as they give no
    gradient, and sample further prompts in their place until the batch is full, at most `attempts` times. Collective.

    attempts 0: nothing is dropped. The other arguments are those of `sample`.
    """
    size, rolled = len(batch.groups), sample(ctx, batch, num_generations, overlong_buffer=overlong_buffer)
    if not attempts:
        return rolled
    rolled = rolled.with_signal()
    for attempt in range(1, attempts + 1):
        missing = size - int(ctx.total([float(len(rolled.groups))])[0])
        extra = ctx.more(missing)
        if not extra.groups:
            break
        first = num_generations * attempt  # a prompt that comes again gets other completions
        more = sample(ctx, extra, num_generations, overlong_buffer=overlong_buffer, first=first).with_signal()
        places = [size * attempt + position for position in more.positions]
        rolled = rolled.joined(dataclasses.replace(more, positions=places))
    left = int(ctx.total([float(len(rolled.groups))])[0])
    if left < size and extra.groups:  # an evaluation has no further prompts
        ctx.warn(
            f"dynamic sampling: --dynamic_sampling {attempts} left a batch short of groups with different scores; "
            "rollout/groups_kept has the share of each batch"
        )
    return dataclasses.replace(rolled, metrics={**rolled.metrics, "rollout/groups_kept": (left, size)})


def check_sampler(ctx: Context, gap: Metric) -> None:
    """Check that the sampler ran on the trainer's weights. gap: this rank's `logp_gap`. Collective.

    Raises ValueError where the log-probabilities of sampler and trainer differ by more than rollout_logp_limit nats a
    token on average over all ranks, or are NaN; a mean above WARN_GAP is a warning.
    """
    total, count = ctx.total([float(x) for x in gap])
    found, limit = total / max(count, 1), ctx.rollout.rollout_logp_limit
    if not found <= limit:  # NaN too
        raise ValueError(
            f"rollout_logp_limit: the sampler's log-probabilities differ from the trainer's by {found:.3g} nats a "
            f"token on average, more than {limit}: not from the weights being trained? Try --rollout plain"
        )
    if found > WARN_GAP:
        ctx.warn(
            f"rollout: sampler and trainer differ by more than {WARN_GAP} nats a token on average; see rollout/logp_gap"
        )


def logp_gap(sampler: Sequence[Tensor], old: Sequence[Tensor]) -> Metric:
    """The metric |sampler - old|: (sum, count) over this rank's completion tokens, nats.

    sampler, old: one [completion tokens] tensor a group, log-probabilities of the sampler and of the trainer.
    """
    gaps = (float((s.double() - o.double()).abs().sum()) for s, o in zip(sampler, old, strict=True))
    return sum(gaps), sum(len(o) for o in old)


def missing_end(scores: Tensor, group: Group, end_ids: frozenset[int], penalty: float | None) -> Tensor:
    """A group's [completions] scores, less the penalty where a completion has no end token; None = no penalty."""
    if penalty is None:
        return scores
    missing = torch.tensor([c[-1] not in end_ids for c in group.completions])
    return torch.where(missing, scores - penalty, scores)


def ended(ctx: Context, groups: Sequence[Group]) -> list[Tensor]:
    """One [completions] float32 tensor a group: 1 where a completion has its end token, 0 where it was cut."""
    return [torch.tensor([float(c[-1] in ctx.end_ids) for c in g.completions]) for g in groups]


def overlong(group: Group, max_new_tokens: int, buffer: int) -> Tensor:
    """The soft overlong punishment of a group's completions, arXiv:2503.14476, eq. 13: [completions] in [-1, 0].

    0 up to max_new_tokens - buffer tokens, from there it falls linearly to -1 at max_new_tokens; buffer 0 = always 0.
    """
    lengths = torch.tensor([float(len(c)) for c in group.completions])
    return ((max_new_tokens - buffer - lengths) / buffer).clamp(-1, 0) if buffer else torch.zeros_like(lengths)


def token_rewards(kl: Tensor, scores: Tensor, group: Group, kl_coef: float) -> Tensor:
    """A group's [tokens] rewards r_t = -kl_coef kl_t, with each completion's score on its last token."""
    ends = torch.tensor([len(c) for c in group.completions]).cumsum(0) - 1
    return (-kl_coef * kl).index_add(0, ends, scores)


def rewards_to_go(rewards: Tensor, group: Group) -> Tensor:
    """The undiscounted return of each token: the sum of a group's [tokens] rewards from it to its completion's end."""
    parts = torch.split(rewards, [len(c) for c in group.completions])
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts])


def completion_sums(tokens: Tensor, group: Group) -> Tensor:
    """The sums of a group's [tokens] numbers over each of its completions, [completions]."""
    return torch.stack([part.sum() for part in torch.split(tokens, [len(c) for c in group.completions])])


def kl_metrics(rolled: Rollouts, kl: Sequence[Tensor], kl_coef: float) -> dict[str, Metric]:
    """The metrics objective/{kl,non_score_reward,rlhf_reward}: sums over a completion, averaged over completions.

    kl: one [completion tokens] tensor a group, nats. kl_coef: weight of the KL in the reward.
    """
    count = sum(len(g.completions) for g in rolled.groups)
    divergence, score = _sum(kl), _sum(rolled.scores)
    return {
        "objective/kl": (divergence, count),
        "objective/non_score_reward": (-kl_coef * divergence, count),
        "objective/rlhf_reward": (score - kl_coef * divergence, count),
    }


def kl_penalty(
    ctx: Context, rolled: Rollouts, estimator: str, kl_coef: float
) -> tuple[list[Tensor], dict[str, Metric]]:
    """The KL of the sampled tokens to the reference, for an algorithm that subtracts kl_coef times it from the reward.

    Returns (one [completion tokens] tensor a group, nats, the metrics of `kl_metrics`); with kl_coef 0 zeros and none,
    and no reference is asked. Collective.
    """
    if kl_coef == 0:
        return [old.new_zeros(len(old)) for old in rolled.old], {}
    reference = ctx.logps("reference", rolled.groups)
    kl = [token_kl(o, r, estimator) for o, r in zip(rolled.old, reference, strict=True)]
    return kl, kl_metrics(rolled, kl, kl_coef)


def group_advantages(scores: Sequence[Tensor], *, scale: bool) -> list[Tensor]:
    """GRPO's advantages, arXiv:2402.03300, section 4.1.2: (r - mean(r)) / (std(r) + 1e-6) of each group's [completions]
    scores r, std with n - 1; with `scale` off r - mean(r). A group of one completion has advantage 0."""
    return [(centred(s) / (s.double().std() + 1e-6 if scale and len(s) > 1 else 1.0)).to(s.dtype) for s in scores]


def leave_one_out(scores: Sequence[Tensor]) -> list[Tensor]:
    """RLOO's advantages: r_i less the mean of the other k - 1 scores of its group; [completions] a group, k >= 2."""
    return [(centred(s) * (len(s) / (len(s) - 1))).to(s.dtype) for s in scores]


def centred(scores: Tensor) -> Tensor:
    """Scores less their mean, in float64: exactly 0 where all scores are equal. A float32 mean can be off by a
    rounding, which the division by a standard deviation near 0 would make as large as a signal."""
    exact = scores.double()
    return exact - exact.mean()


def whiten(ctx: Context, tokens: Sequence[Tensor], *, shift_mean: bool) -> list[Tensor]:
    """Whitened numbers of tokens: (x - mu) / sqrt(var + 1e-8) with mu and var (n - 1) over all groups of all ranks.

    tokens: one [completion tokens] tensor a group. shift_mean off: mu is added back, so that only the scale changes.
    Fewer than two numbers are returned unchanged. Collective.
    """
    flat = torch.cat([*tokens, torch.empty(0)]).double()
    n, total = ctx.total([float(len(flat)), float(flat.sum())])
    if n < 2:
        return list(tokens)
    mu = total / n
    (squares,) = ctx.total([float(((flat - mu) ** 2).sum())])
    scale = 1 / math.sqrt(squares / (n - 1) + 1e-8)
    return [((x.double() - mu) * scale + (0.0 if shift_mean else mu)).to(x.dtype) for x in tokens]


def clipped(
    change: Tensor, advantages: Tensor, low: float, high: float, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """PPO's clipped policy loss, arXiv:1707.06347, eq. 7: max(-A rho, -A clip(rho, low, high)), rho = e^change.

    change: [N] logp - old logp of each token, or of each whole completion, nats; held within -+20, so that no gradient
    is infinite. advantages: [N]. low, high: bounds of the ratio, such as 0.8 and 1.2. entropy: [tokens] nats, for its
    metric alone. Returns ([N] losses with gradient, the metrics of loss, KL, clipped share, ratio and entropy).
    """
    rho = ratio(change)
    plain, held = -advantages * rho, -advantages * torch.clamp(rho, low, high)
    loss = torch.maximum(plain, held)
    return loss, {
        **({} if entropy is None else {"policy/entropy_avg": mean(entropy)}),
        "loss/policy_avg": mean(loss),
        "policy/approxkl_avg": mean(0.5 * change**2),
        "policy/clipfrac_avg": mean((held > plain).float()),
        "val/ratio": mean(rho),
    }


def table(ctx: Context, groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Mapping[str, Any]]:
    """Rows of a table of samples: the first completion of each of this rank's first SHOWN prompts. Such a table is made
    for num_sample_generations batches, evenly spaced over the run; for any other batch there are no rows."""
    times, total = ctx.rollout.num_sample_generations, ctx.total_batches
    if ctx.step * times // total == (ctx.step - 1) * times // total:  # no new n-th of the run begins here
        return []
    return [
        {"prompt": g.prompt_text, "completion": ctx.decode(g.completions[0]), "score": float(s[0])}
        for g, s in list(zip(groups, scores, strict=True))[:SHOWN]
    ]


def _sum(numbers: Sequence[Tensor]) -> float:
    return float(sum(x.double().sum() for x in numbers))


def _added(one: Metrics, other: Metrics) -> dict[str, Metric]:
    """The metrics of two rollouts, sums and counts added. Two are no means over this rank: "episode" stays that of the
    batch's own prompts, and the end tokens of all ranks keep the count 1 that each rank gives them."""
    added = {name: (one[name][0] + other[name][0], one[name][1] + other[name][1]) for name in one}
    ended = "val/num_eos_tokens"
    return added | {ended: (added[ended][0], 1), "episode": one["episode"]}
