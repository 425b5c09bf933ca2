"""PPO's arithmetic once more, in float64 and pure Python: what the tensors are compared with.

Written from the formulas, one token after another, for clarity and not for speed. Every ragged list holds one 1-D
float64 array for each sampled completion, its valid tokens and nothing else: no padding, so nothing needs a mask.
Log-probabilities and kl are in nats; rewards, scores, values, advantages and returns in units of reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from oracle import Array, mean
from oracle_gradient import gradient as gradient  # so that one import serves a test

Ragged = Sequence[Array]

WHITEN_EPSILON = 1e-8  # under the root, so that constant tokens give 0 and not 0 / 0


def _each(formula: Callable[..., float], *lists: Ragged) -> list[Array]:
    """The formula of every token, in the same ragged shape; ValueError where the shapes differ."""
    rows = zip(*lists, strict=True)
    return [np.array([formula(*tokens) for tokens in zip(*row, strict=True)], dtype=np.float64) for row in rows]


def _token_mean(ragged: Ragged) -> float:
    """The sum over all tokens / their number: not a mean of means."""
    return mean([float(x) for tokens in ragged for x in tokens])


def _sequence_mean(ragged: Ragged) -> float:
    """The sum over each completion, averaged over the completions."""
    return mean([math.fsum(tokens) for tokens in ragged])


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


# ---- the rollout ---------------------------------------------------------------------------------------------------


def kl(logps: Ragged, reference: Ragged, estimator: str) -> list[Array]:
    """k1 = logp - ref, or k3 = e^(ref - logp) - 1 - (ref - logp), a token."""
    formulas: dict[str, Callable[[float, float], float]] = {
        "k1": lambda logp, ref: logp - ref,
        "k3": lambda logp, ref: math.expm1(ref - logp) - (ref - logp),
    }
    if estimator not in formulas:
        raise ValueError(f"estimator must be one of {sorted(formulas)}, got {estimator!r}")
    return _each(formulas[estimator], logps, reference)


def penalised(scores: Array, ends_with_eos: Sequence[bool], missing_eos_penalty: float | None) -> Array:
    """The scores, less the penalty (None: no penalty) where the completion has no end token."""
    penalty = 0.0 if missing_eos_penalty is None else missing_eos_penalty
    rows = zip(scores, ends_with_eos, strict=True)
    return np.array([score if ended else score - penalty for score, ended in rows], dtype=np.float64)


def rewards(kl_tokens: Ragged, scores: Array, kl_coef: float) -> list[Array]:
    """-kl_coef * kl_t, and the score added on the last valid token."""
    result = _each(lambda k: -kl_coef * k, kl_tokens)
    for row, score in zip(result, scores, strict=True):
        row[-1] += score
    return result


def whiten(tokens: Ragged, shift_mean: bool) -> list[Array]:
    """(x - mean) / sqrt(var + 1e-8) over all tokens of the rollout batch, var with n - 1; unchanged if n < 2.

    Without shift_mean the mean is added back: only the scale changes.
    """
    flat = [float(x) for row in tokens for x in row]
    if len(flat) < 2:
        return [row.astype(np.float64) for row in tokens]
    mu = mean(flat)
    variance = math.fsum((x - mu) ** 2 for x in flat) / (len(flat) - 1)
    kept = 0.0 if shift_mean else mu
    return _each(lambda x: (x - mu) / math.sqrt(variance + WHITEN_EPSILON) + kept, tokens)


def _gae_of_one(rewards: Array, values: Array, gamma: float, lam: float) -> Array:
    """A_t as the sum over l of (gamma * lam)^l * delta_(t+l): the recursion written out."""
    following = [*values[1:], 0.0]  # nothing is expected after the last token, cut or not
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    sums = [math.fsum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    return np.array(sums, dtype=np.float64)


def gae(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> list[Array]:
    """Advantages, not yet whitened; values[i][t] is the head at the position that predicts token t."""
    return [_gae_of_one(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]


def returns(advantages: Ragged, values: Ragged) -> list[Array]:
    """A_t + V_t, of advantages before whitening."""
    return _each(lambda a, v: a + v, advantages, values)


def prepare(
    old: Ragged,
    reference: Ragged,
    values: Ragged,
    scores: Array,
    *,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[list[Array], list[Array]]:
    """(whitened advantages, returns) of a rollout batch; the scores are those after the missing-end penalty."""
    earned = rewards(kl(old, reference, kl_estimator), scores, kl_coef)
    if whiten_rewards:
        earned = whiten(earned, shift_mean=False)
    advantages = gae(earned, values, gamma, lam)
    return whiten(advantages, shift_mean=True), returns(advantages, values)


# ---- the losses of one mini-batch ----------------------------------------------------------------------------------


def _policy_terms(logp: float, old: float, advantage: float, cliprange: float) -> tuple[float, float]:
    """(free, clipped) policy loss of a token."""
    ratio = math.exp(logp - old)
    return -advantage * ratio, -advantage * _clip(ratio, 1 - cliprange, 1 + cliprange)


def _value_terms(value: float, old: float, target: float, cliprange_value: float) -> tuple[float, float]:
    """(free, clipped) value loss of a token."""
    near = old + _clip(value - old, -cliprange_value, cliprange_value)
    return (value - target) ** 2 / 2, (near - target) ** 2 / 2


def policy_loss(logps: Ragged, old: Ragged, advantages: Ragged, cliprange: float) -> float:
    """Sum of max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange)) / valid tokens of the mini-batch."""
    return _token_mean(_each(lambda new, was, a: max(_policy_terms(new, was, a, cliprange)), logps, old, advantages))


def value_loss(values: Ragged, old_values: Ragged, returns: Ragged, cliprange_value: float) -> float:
    """1/2 sum of max((V - Ret)^2, (V clipped around V_old - Ret)^2) / valid tokens; without vf_coef."""
    return _token_mean(
        _each(lambda v, was, ret: max(_value_terms(v, was, ret, cliprange_value)), values, old_values, returns)
    )


# ---- metrics -------------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """One optimizer step: what the weights before it say of its mini-batch, and what the rollout said."""

    logps: Ragged
    old: Ragged
    advantages: Ragged
    values: Ragged
    old_values: Ragged
    returns: Ragged


def _binding(terms: tuple[float, float]) -> float:
    """1 where the clipped loss is the one that counts: strictly larger than the free one."""
    free, clipped = terms
    return float(clipped > free)


def update_metrics(update: Update, *, cliprange: float, cliprange_value: float) -> dict[str, float]:
    """The metrics of one optimizer step, each a mean over its valid tokens."""
    logps, old, advantages, values, old_values, targets = update
    policy = (logps, old, advantages)
    value = (values, old_values, targets)
    return {
        "policy/approxkl_avg": _token_mean(_each(lambda new, was: (new - was) ** 2 / 2, logps, old)),
        "policy/clipfrac_avg": _token_mean(
            _each(lambda new, was, a: _binding(_policy_terms(new, was, a, cliprange)), *policy)
        ),
        "loss/policy_avg": policy_loss(*policy, cliprange),
        "loss/value_avg": value_loss(*value, cliprange_value),
        "val/clipfrac_avg": _token_mean(
            _each(lambda v, was, ret: _binding(_value_terms(v, was, ret, cliprange_value)), *value)
        ),
        "val/ratio": _token_mean(_each(lambda new, was: math.exp(new - was), logps, old)),
    }


def metrics(
    old: Ragged,
    reference: Ragged,
    scores: Array,
    updates: Sequence[Update],
    *,
    kl_coef: float,
    kl_estimator: str,
    cliprange: float,
    cliprange_value: float,
) -> dict[str, float]:
    """The metrics of a rollout batch (scores after the missing-end penalty) and the means over its updates."""
    nats = _sequence_mean(kl(old, reference, kl_estimator))
    score = mean([float(s) for s in scores])
    steps = [update_metrics(update, cliprange=cliprange, cliprange_value=cliprange_value) for update in updates]
    return {
        "objective/kl": nats,
        "objective/entropy": -_sequence_mean(old),
        "objective/non_score_reward": -kl_coef * nats,
        "objective/scores": score,
        "objective/rlhf_reward": score - kl_coef * nats,
        **{name: mean([step[name] for step in steps]) for name in (steps[0] if steps else ())},
    }
