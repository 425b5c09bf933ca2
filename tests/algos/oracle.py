"""Every preference loss once more, in float64 and numpy alone: what the tensors are compared with.

Written from the formulas, one completion after another, for clarity and not for speed. `policy` and `reference` hold
the log-probabilities of completion tokens in nats, one 1-D float64 array a completion; a pair is (chosen, rejected).
The losses return the mean over the whole global batch: over pairs, labelled examples, or tokens for NLL terms.
Names of the formulas: delta = logp_policy - logp_reference, R = beta * delta, z = beta * (delta_c - delta_r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from oracle_gradient import gradient as gradient  # so that one import serves a test

Array = NDArray[np.float64]
Pairs = Sequence[tuple[Array, Array]]

ORPO_CEILING = -(2.0**-24)  # the largest mean log-probability whose odds are finite in float32
LARGEST_EXPONENT = 80.0  # of the f-divergences: e^80 still fits float32

USES_SMOOTHING = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}
BY_LENGTH = {"ipo", "sigmoid_norm"}
REFUSES_DIVERGENCE = {
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "sft",
} | BY_LENGTH


# ---- scalars -------------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def logsigmoid(x: float) -> float:
    """log sigmoid(x), without overflow and exact in both tails."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log1mexp(x: float) -> float:
    """log(1 - e^x) for x < 0; the two forms meet at -ln 2, where each loses least."""
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


def log_odds(mean: float) -> float:
    """log(p / (1 - p)) of p = e^mean, a mean log-probability; finite at p = 1 by the clamp."""
    a = min(mean, ORPO_CEILING)
    return a - log1mexp(a)


def smoothed(z: float, epsilon: float) -> float:
    """-(1 - epsilon) log sigmoid(z) - epsilon log sigmoid(-z)."""
    return -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)


def logp(tokens: Array) -> float:
    """The log-probability of a completion: the sum over its tokens."""
    return math.fsum(tokens)


def mean_logp(tokens: Array) -> float:
    """The log-probability a token; ZeroDivisionError for a completion without tokens, which no batch may hold."""
    return logp(tokens) / len(tokens)


def mean(values: Sequence[float]) -> float:
    """The mean, 0 for an empty batch."""
    return math.fsum(values) / len(values) if len(values) else 0.0


def nll(completions: Sequence[Array]) -> float:
    """-(sum of all tokens' log-probabilities) / (their number over the batch), not a mean of means; 0 without any."""
    return -mean([float(token) for tokens in completions for token in tokens])


# ---- losses of one model -------------------------------------------------------------------------------------------


def sft(policy: Sequence[Array]) -> float:
    """Cross-entropy a completion token."""
    return nll(policy)


def rm(scores: Array, margins: Array, *, center: float) -> float:
    """-log sigmoid(s_c - s_r - margin) + center * (s_c + s_r)^2, the mean over pairs. scores: [n, 2], margins: [n]."""
    rows = zip(scores, margins, strict=True)
    return mean([-logsigmoid(c - r - margin) + center * (c + r) ** 2 for (c, r), margin in rows])


def cpo(policy: Pairs, *, beta: float, cpo_alpha: float, label_smoothing: float, loss_type: str) -> float:
    """The loss_type on beta * (logp_c - logp_r), the mean over pairs, plus cpo_alpha * NLL(chosen)."""
    if label_smoothing > 0 and loss_type in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing must be 0 with loss_type {loss_type!r}, got {label_smoothing}")
    losses: dict[str, Callable[[Array, Array], float]] = {
        "sigmoid": lambda c, r: smoothed(beta * (logp(c) - logp(r)), label_smoothing),
        "hinge": lambda c, r: max(0.0, 1 - beta * (logp(c) - logp(r))),
        "ipo": lambda c, r: (mean_logp(c) - mean_logp(r) - 1 / (2 * beta)) ** 2,
    }
    if loss_type not in losses:
        raise ValueError(f"loss_type must be one of {sorted(losses)}, got {loss_type!r}")
    return mean([losses[loss_type](c, r) for c, r in policy]) + cpo_alpha * nll([c for c, _ in policy])


def orpo(policy: Pairs, *, beta: float) -> float:
    """NLL(chosen) - beta * (mean over pairs of log sigmoid(log_odds_c - log_odds_r))."""
    ratios = [logsigmoid(log_odds(mean_logp(c)) - log_odds(mean_logp(r))) for c, r in policy]
    return nll([c for c, _ in policy]) - beta * mean(ratios)


def simpo(policy: Pairs, *, beta: float, simpo_gamma: float, cpo_alpha: float, label_smoothing: float) -> float:
    """Smoothed sigmoid of u = beta * (mean_logp_c - mean_logp_r) - simpo_gamma, plus cpo_alpha * NLL(chosen)."""
    margins = [beta * (mean_logp(c) - mean_logp(r)) - simpo_gamma for c, r in policy]
    return mean([smoothed(u, label_smoothing) for u in margins]) + cpo_alpha * nll([c for c, _ in policy])


# ---- KTO -----------------------------------------------------------------------------------------------------------


def deltas(policy: Sequence[Array], reference: Sequence[Array]) -> list[float]:
    """logp_policy - logp_reference of each completion, nats."""
    return [logp(p) - logp(q) for p, q in zip(policy, reference, strict=True)]


def kto_shift(prompt_texts: Sequence[str]) -> int:
    """The s >= 1 by which prompt i takes the completion of example i + s (mod n).

    The smallest shift for which no prompt meets an equal one; where there is none, the smallest with fewest matches.
    Raises ValueError for fewer than two prompts.
    """
    n = len(prompt_texts)
    if n < 2:
        raise ValueError(f"a mismatched pair needs at least two prompts, got {n}")

    def matches(shift: int) -> int:
        return sum(prompt_texts[i] == prompt_texts[(i + shift) % n] for i in range(n))

    return min(range(1, n), key=lambda shift: (matches(shift), shift))


def kto_z0(policy_mismatched: Sequence[Array], reference_mismatched: Sequence[Array]) -> float:
    """max(0, mean delta over the mismatched pairs), nats: the one reference point of the step, without gradient."""
    return max(0.0, mean(deltas(policy_mismatched, reference_mismatched)))


def kto(
    policy: Sequence[Array],
    reference: Sequence[Array],
    labels: Sequence[bool],
    policy_mismatched: Sequence[Array],
    reference_mismatched: Sequence[Array],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    loss_type: str,
    z0: float | None = None,
) -> float:
    """The weighted mean over labelled examples (desirable and undesirable counted together).

    Pass z0 where a gradient is taken: it is a constant of the step. apo_zero_unpaired is the same loss at z0 = 0.
    """
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"loss_type must be 'kto' or 'apo_zero_unpaired', got {loss_type!r}")
    if loss_type == "apo_zero_unpaired":
        z0 = 0.0
    elif z0 is None:
        z0 = kto_z0(policy_mismatched, reference_mismatched)
    losses = []
    for delta, desirable in zip(deltas(policy, reference), labels, strict=True):
        if desirable:
            losses.append(desirable_weight * (1 - sigmoid(beta * (delta - z0))))
        else:
            losses.append(undesirable_weight * (1 - sigmoid(beta * (z0 - delta))))
    return mean(losses)


# ---- DPO -----------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the DPO losses of one pair are parametrised by."""

    beta: float  # reward a nat
    epsilon: float  # label smoothing, a probability
    tau: float  # temperature of discopop's mixture


class Pair(NamedTuple):
    """One pair: deltas in nats (after the f-divergence, if any) and lengths in tokens."""

    delta_c: float
    delta_r: float
    length_c: int
    length_r: int
    beta: float

    @property
    def z(self) -> float:
        return self.beta * (self.delta_c - self.delta_r)

    @property
    def reward_c(self) -> float:
        return self.beta * self.delta_c

    @property
    def reward_r(self) -> float:
        return self.beta * self.delta_r

    @property
    def normed(self) -> float:
        return self.delta_c / self.length_c - self.delta_r / self.length_r


def _exo_pair(p: Pair, s: Settings) -> float:
    agree = sigmoid(p.z) * (logsigmoid(p.z) - math.log(1 - s.epsilon))
    return agree + sigmoid(-p.z) * (logsigmoid(-p.z) - math.log(s.epsilon))


def _robust(p: Pair, s: Settings) -> float:
    return (-(1 - s.epsilon) * logsigmoid(p.z) + s.epsilon * logsigmoid(-p.z)) / (1 - 2 * s.epsilon)


def _discopop(p: Pair, s: Settings) -> float:
    logistic = -logsigmoid(p.z) * (1 - sigmoid(p.z / s.tau))
    return logistic + math.exp(-p.z + logsigmoid(p.z / s.tau))


PAIR_LOSSES: dict[str, Callable[[Pair, Settings], float]] = {
    "sigmoid": lambda p, s: smoothed(p.z, s.epsilon),
    "hinge": lambda p, s: max(0.0, 1 - p.z),
    "ipo": lambda p, s: (p.normed - 1 / (2 * s.beta)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": lambda p, s: -logsigmoid(p.reward_c) - 0.5 * logsigmoid(-p.reward_c) - 0.5 * logsigmoid(-p.reward_r),
    "robust": _robust,
    "bco_pair": lambda p, s: -logsigmoid(p.reward_c) - logsigmoid(-p.reward_r),
    "sppo_hard": lambda p, s: (p.delta_c - 1 / (2 * s.beta)) ** 2 + (p.delta_r + 1 / (2 * s.beta)) ** 2,
    "apo_zero": lambda p, s: 1 - sigmoid(p.reward_c) + sigmoid(p.reward_r),
    "apo_down": lambda p, s: sigmoid(p.reward_c) + 1 - sigmoid(p.z),
    "sigmoid_norm": lambda p, s: -logsigmoid(s.beta * p.normed),
    "discopop": _discopop,
}
DPO_LOSS_TYPES = (*PAIR_LOSSES, "aot", "aot_unpaired", "sft")


def divergence(delta: float, kind: str, alpha: float) -> float:
    """What an f-divergence puts in the place of delta; reverse_kl is delta itself."""
    if kind == "reverse_kl" or (kind == "alpha" and alpha == 1):
        return delta
    if kind == "forward_kl":
        return -math.exp(min(-delta, LARGEST_EXPONENT))
    if kind == "js":
        return logsigmoid(delta)
    if kind == "alpha":
        return math.exp(min((alpha - 1) * delta, LARGEST_EXPONENT)) / (alpha - 1)
    raise ValueError(f"f_divergence_type must be reverse_kl, forward_kl, js or alpha, got {kind!r}")


def _pair_logps(pairs: Pairs, ld_alpha: float | None) -> list[tuple[float, float]]:
    """(logp_c, logp_r) of each pair; with ld_alpha the tokens beyond the shorter completion count ld_alpha each."""
    rest = 1.0 if ld_alpha is None else ld_alpha

    def weighed(tokens: Array, shared: int) -> float:
        return logp(np.concatenate([tokens[:shared], rest * tokens[shared:]]))

    return [(weighed(c, min(len(c), len(r))), weighed(r, min(len(c), len(r)))) for c, r in pairs]


def _rank_partners(left: Sequence[float], right: Sequence[float], order: Sequence[int]) -> list[int]:
    """For each left value the position of the right value of the same rank; ties rank by example index."""
    by_left = sorted(range(len(left)), key=lambda i: (left[i], order[i]))
    by_right = sorted(range(len(right)), key=lambda i: (right[i], order[i]))
    partners = [0] * len(left)
    for i, j in zip(by_left, by_right, strict=True):
        partners[i] = j
    return partners


def _aot_sides(name: str, policy: Pairs, reference: Pairs, ld_alpha: float | None) -> tuple[list[float], list[float]]:
    """The two lists that aot and aot_unpaired sort."""
    rows = list(zip(_pair_logps(policy, ld_alpha), _pair_logps(reference, ld_alpha), strict=True))
    if name == "aot":
        return [p[0] - p[1] for p, _ in rows], [q[0] - q[1] for _, q in rows]
    return [p[0] - q[0] for p, q in rows], [p[1] - q[1] for p, q in rows]


def aot_partners(
    policy: Pairs, reference: Pairs, *, order: Sequence[int], ld_alpha: float | None
) -> dict[str, list[int]]:
    """Who is paired with whom by rank: `dpo` takes it to hold the pairing still in a gradient at or near a tie."""
    sides = {name: _aot_sides(name, policy, reference, ld_alpha) for name in ("aot", "aot_unpaired")}
    return {name: _rank_partners(left, right, order) for name, (left, right) in sides.items()}


def _check_dpo(loss_type: Sequence[str], label_smoothing: float, rpo_alpha: float, f_divergence_type: str) -> None:
    for name in loss_type:
        if name not in DPO_LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {DPO_LOSS_TYPES}, got {name!r}")
        if label_smoothing > 0 and name not in USES_SMOOTHING:
            raise ValueError(f"label_smoothing must be 0 with loss_type {name!r}, got {label_smoothing}")
        if f_divergence_type != "reverse_kl" and name in REFUSES_DIVERGENCE:
            raise ValueError(f"f_divergence_type must be reverse_kl with loss_type {name!r}, got {f_divergence_type!r}")
    if "exo_pair" in loss_type and not label_smoothing > 0:
        raise ValueError(f"label_smoothing must be above 0 with loss_type 'exo_pair', got {label_smoothing}")
    if "robust" in loss_type and not label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be below 0.5 with loss_type 'robust', got {label_smoothing}")
    if "sft" in loss_type and rpo_alpha > 0:
        raise ValueError(f"rpo_alpha must be 0 with loss_type 'sft', which is the same term, got {rpo_alpha}")


def dpo(
    policy: Pairs,
    reference: Pairs,
    *,
    beta: float,
    loss_type: Sequence[str],
    loss_weights: Sequence[float],
    label_smoothing: float,
    rpo_alpha: float,
    ld_alpha: float | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
    order: Sequence[int],
    partners: Mapping[str, Sequence[int]] | None = None,
) -> float:
    """The weighted sum of the loss types, each the mean over pairs, plus rpo_alpha * NLL(chosen) once.

    ld_alpha weighs logp alone, never NLL or lengths. order: the example index of each pair, for ties of aot sorting.
    """
    _check_dpo(loss_type, label_smoothing, rpo_alpha, f_divergence_type)
    settings = Settings(beta, label_smoothing, discopop_tau)
    nll_chosen = nll([c for c, _ in policy])
    if partners is None:
        partners = aot_partners(policy, reference, order=order, ld_alpha=ld_alpha)

    pairs = []
    logps = zip(_pair_logps(policy, ld_alpha), _pair_logps(reference, ld_alpha), strict=True)
    for (p, q), (c, r) in zip(logps, policy, strict=True):
        f_c, f_r = (divergence(p[k] - q[k], f_divergence_type, f_alpha_divergence_coef) for k in (0, 1))
        pairs.append(Pair(f_c, f_r, len(c), len(r), beta))

    def one(name: str) -> float:
        if name == "sft":
            return nll_chosen
        if name in ("aot", "aot_unpaired"):
            left, right = _aot_sides(name, policy, reference, ld_alpha)
            gaps = [left[i] - right[j] for i, j in enumerate(partners[name])]
            return mean([smoothed(beta * gap, label_smoothing) for gap in gaps])
        return mean([PAIR_LOSSES[name](pair, settings) for pair in pairs])

    weighted = [weight * one(name) for name, weight in zip(loss_type, loss_weights, strict=True)]
    return math.fsum(weighted) + rpo_alpha * nll_chosen
