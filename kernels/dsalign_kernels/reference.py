"""The twins of the operations in plain torch: same names and signatures, the textbook formula on whole tensors.

They are what every implementation is measured against; nothing in a run calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
MOST_LOSSES = 3  # that a recipe adds


class Logps(NamedTuple):
    """What the head says about one target a row; all [N].

    logps: float32, nats, <= 0, differentiable; 0 where the target is ignored. lse: float32, log-sum-exp of the row's
    logits. entropy: float32, nats, or None. top: bool, whether the target is the most likely token, or None.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    top: Tensor | None


@dataclass(frozen=True)
class Recipe:
    """A loss of pairs, or of single labelled completions. Delta = logp - reference, of a completion, nats.

    losses: name -> weight; names of `reference.PAIR_LOSSES`, at most three, or "kto" alone, with `desirable`.
    beta: reward a nat, > 0. label_smoothing: in [0, 1/2). gamma: target margin of sigmoid_norm. tau: of discopop, > 0.
    divergence, alpha: what replaces Delta, arXiv:2309.16240. tail: weight of tokens beyond the shorter completion,
    arXiv:2409.06411. mean_rewards: rewards are beta times means a token, not sums.
    desirable_weight, undesirable_weight, z0: of kto, arXiv:2402.01306, eq. 8.
    """

    losses: Mapping[str, float]
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 1.0
    tail: float = 1.0
    mean_rewards: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    z0: float = 0.0


class Preference(NamedTuple):
    """loss: scalar float32. sums: [S] float32, of each completion's log-probabilities, nats. metrics: name -> scalar
    float32, a sum over pairs (or over desirable or undesirable completions: their number is "desirable")."""

    loss: Tensor
    sums: Tensor
    metrics: Mapping[str, Tensor]


class Advantages(NamedTuple):
    """advantages: [N] float32. means: [S] float32, of each completion's; squares: [S] float32, the sum of their squared
    distances from it: sums of both over completions, and over ranks, give the variance of all without cancelling."""

    advantages: Tensor
    means: Tensor
    squares: Tensor


class Clipped(NamedTuple):
    """loss: scalar float32. metrics: name -> scalar float32, a sum over tokens."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


def selective_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """logp = z_y - log sum_v e^(z_v), entropy = sum_v p_v (log sum_w e^(z_w) - z_v); z = softcap tanh(scale x /
    softcap) / temperature, or scale x / temperature without a softcap. Float64 stays float64."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    log_p = torch.log_softmax(z / temperature, 1)
    kept = targets != ignore_index
    picked = log_p.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(1).detach() if entropy else None
    tops = (kept & (picked >= log_p.amax(1)) if logits.shape[0] else kept) if top else None
    return Logps(torch.where(kept, picked, 0.0), torch.logsumexp(z / temperature, 1).detach(), entropies, tops)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """`selective_logps` of hidden [N, D] x weight [V, D] + bias [V], with the logits in memory."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_logps(
        logits,
        targets,
        entropy=entropy,
        top=top,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
    )


def preference(
    logps: Tensor,
    lengths: Tensor,
    recipe: Recipe,
    *,
    reference: Tensor | None = None,
    desirable: Tensor | None = None,
    scale: float = 1.0,
    nll_scale: float = 0.0,
) -> Preference:
    """The losses of a recipe by autograd. Float64 stays float64."""
    segment = torch.repeat_interleave(lengths)
    position = torch.arange(len(segment), device=logps.device) - (lengths.cumsum(0) - lengths)[segment]

    def total(tokens: Tensor) -> Tensor:
        return tokens.new_zeros(len(lengths)).index_add(0, segment, tokens)

    ratios, sums = logps if reference is None else logps - reference, total(logps)
    if desirable is not None:
        delta, sign = total(ratios), torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, recipe.desirable_weight, recipe.undesirable_weight)
        loss = scale * (weight * torch.sigmoid(-sign * recipe.beta * (delta - recipe.z0))).sum()
        rewards, flat = recipe.beta * delta.detach(), sums.detach()
        return Preference(
            loss,
            flat,
            {
                "rewards/chosen": rewards[desirable].sum(),
                "rewards/rejected": rewards[~desirable].sum(),
                "logps/chosen": flat[desirable].sum(),
                "logps/rejected": flat[~desirable].sum(),
                "desirable": desirable.to(flat.dtype).sum(),
            },
        )
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    delta = total(torch.where(position < shorter[segment], 1.0, recipe.tail) * ratios)
    means = delta / lengths
    c, r = _diverged(delta, recipe).view(-1, 2).unbind(1)
    mc, mr = means.view(-1, 2).unbind(1)
    pairs = [weight * PAIR_LOSSES[name](recipe, c, r, mc, mr).sum() for name, weight in recipe.losses.items()]
    chosen, rejected = sums.view(-1, 2).unbind(1)
    loss = scale * torch.stack(pairs).sum() - nll_scale * chosen.sum()
    reward_c, reward_r = (recipe.beta * (means if recipe.mean_rewards else delta)).detach().view(-1, 2).unbind(1)
    mean_c, mean_r = (sums / lengths).view(-1, 2).unbind(1)
    each = {
        "rewards/chosen": reward_c,
        "rewards/rejected": reward_r,
        "rewards/accuracies": (reward_c > reward_r).to(delta.dtype),
        "rewards/margins": reward_c - reward_r,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/mean_chosen": mean_c,
        "logps/mean_rejected": mean_r,
    }
    metrics = {name: x.detach().sum() for name, x in each.items()}
    if "odds_ratio" in recipe.losses:
        gap = (_log_odds(mc) - _log_odds(mr)).detach()
        metrics |= {"log_odds_ratio": _ls(gap).sum(), "log_odds_chosen": gap.sum()}
    return Preference(loss, sums.detach(), metrics)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float, lam: float) -> Advantages:
    """By doubling, all completions at a time: sum_k (gamma lam)^k delta_{t+k}."""
    longest = int(lengths.max()) if len(lengths) else 0
    back = torch.arange(longest, device=rewards.device)
    inside = back < lengths[:, None]
    at = torch.where(inside, lengths.cumsum(0)[:, None] - 1 - back, 0)
    r, v = (torch.where(inside, x[at], 0) for x in (rewards, values))
    delta = r - v
    delta[:, 1:] += gamma * v[:, :-1]
    shift, factor = 1, gamma * lam  # after each turn a number holds the terms of twice as many tokens
    while shift < longest:
        delta = torch.cat([delta[:, :shift], delta[:, shift:] + factor * delta[:, :-shift]], 1)
        shift, factor = 2 * shift, factor * factor
    advantages = torch.empty_like(rewards)
    advantages[at[inside]] = delta[inside]
    kept = torch.where(inside, delta, 0)
    means = kept.sum(1) / lengths.clamp_min(1)
    return Advantages(advantages, means, torch.where(inside, (kept - means[:, None]) ** 2, 0).sum(1))


def clipped_policy(logps: Tensor, old: Tensor, advantages: Tensor, *, cliprange: float, scale: float = 1.0) -> Clipped:
    """By autograd."""
    change = logps - old
    ratio = torch.exp(change)
    free, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - cliprange, 1 + cliprange)
    loss = torch.maximum(free, clipped).sum()
    parts = {"loss": loss, "approxkl": 0.5 * change**2, "clipfrac": clipped > free, "ratio": ratio}
    return Clipped(scale * loss, {name: x.detach().to(logps.dtype).sum() for name, x in parts.items()})


def clipped_value(
    values: Tensor, old: Tensor, returns: Tensor, segment: Tensor, *, cliprange: float, scale: float = 1.0
) -> Clipped:
    """By autograd."""
    mine = values[torch.arange(len(segment), device=values.device) + segment]
    near = torch.clamp(mine, old - cliprange, old + cliprange)
    plain, held = (mine - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * torch.maximum(plain, held).sum()
    metrics = {"loss": loss.detach(), "clipfrac": (held > plain).to(values.dtype).sum()}
    return Clipped(scale * loss, metrics)


def _diverged(delta: Tensor, recipe: Recipe) -> Tensor:
    a = recipe.alpha
    if recipe.divergence == "forward_kl":
        return -torch.exp(torch.clamp(-delta, max=80))
    if recipe.divergence == "js":
        return _ls(delta)
    return (
        torch.exp(torch.clamp((a - 1) * delta, max=80)) / (a - 1) if recipe.divergence == "alpha" and a != 1 else delta
    )


def _ls(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


def _smoothed(z: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * _ls(z) - eps * _ls(-z)


def _log_odds(mean: Tensor) -> Tensor:
    a = torch.clamp(mean, max=-(2.0**-24))
    return a - torch.log(-torch.expm1(a))


def _exo_pair(p: Recipe, c: Tensor, r: Tensor, mc: Tensor, mr: Tensor) -> Tensor:
    z, eps = p.beta * (c - r), p.label_smoothing
    return torch.sigmoid(z) * (_ls(z) - math.log1p(-eps)) + torch.sigmoid(-z) * (_ls(-z) - math.log(eps))


def _robust(p: Recipe, c: Tensor, r: Tensor, mc: Tensor, mr: Tensor) -> Tensor:
    z, eps = p.beta * (c - r), p.label_smoothing
    return (-(1 - eps) * _ls(z) + eps * _ls(-z)) / (1 - 2 * eps)


def _discopop(p: Recipe, c: Tensor, r: Tensor, mc: Tensor, mr: Tensor) -> Tensor:
    z = p.beta * (c - r)
    return -torch.sigmoid(-z / p.tau) * _ls(z) + torch.exp(-z + _ls(z / p.tau))


# Losses of n pairs: c, r [n] the log-ratios of chosen and rejected, mc, mr [n] the same a token; the sources stand in
# the algorithms' files.
PAIR_LOSSES: Mapping[str, Callable[[Recipe, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda p, c, r, mc, mr: torch.zeros_like(c),
    "sigmoid": lambda p, c, r, mc, mr: _smoothed(p.beta * (c - r), p.label_smoothing),
    "hinge": lambda p, c, r, mc, mr: torch.relu(1 - p.beta * (c - r)),
    "ipo": lambda p, c, r, mc, mr: (mc - mr - 0.5 / p.beta) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": lambda p, c, r, mc, mr: -_ls(p.beta * c) - 0.5 * _ls(-p.beta * c) - 0.5 * _ls(-p.beta * r),
    "robust": _robust,
    "bco_pair": lambda p, c, r, mc, mr: -_ls(p.beta * c) - _ls(-p.beta * r),
    "sppo_hard": lambda p, c, r, mc, mr: (c - 0.5 / p.beta) ** 2 + (r + 0.5 / p.beta) ** 2,
    "apo_zero": lambda p, c, r, mc, mr: torch.sigmoid(-p.beta * c) + torch.sigmoid(p.beta * r),
    "apo_down": lambda p, c, r, mc, mr: torch.sigmoid(p.beta * c) + torch.sigmoid(-p.beta * (c - r)),
    "sigmoid_norm": lambda p, c, r, mc, mr: _smoothed(p.beta * (mc - mr) - p.gamma, p.label_smoothing),
    "discopop": _discopop,
    "odds_ratio": lambda p, c, r, mc, mr: -_ls(_log_odds(mc) - _log_odds(mr)),
}
LABEL_LOSSES = ("kto",)
