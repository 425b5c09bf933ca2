"""GRPO, RLOO, REINFORCE++ and online DPO once more, in float64 and numpy alone: what the tensors are compared with.

Written from the papers, one completion after another, each loss with its derivative worked out on paper: a numerical
slope is good for eight digits, these for all. A batch is a list of prompts, a prompt a list of its sampled answers. The
losses are means over a whole optimizer step; log-probabilities and KL are in nats, scores in units of reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LIMIT = 20.0  # nats: where the exponent of a ratio and of k3 is held


class Answer(NamedTuple):
    """A sampled completion of T tokens, [T] nats each; ended: whether it has its end token."""

    logps: Array  # under the weights of this step
    old: Array  # under the weights that sampled
    reference: Array
    score: float  # after `shaped`
    ended: bool


Batch = Sequence[Sequence[Answer]]
Slopes = list[list[Array]]  # d loss / d logps, nested as the batch


def shaped(score: float, length: int, ended: bool, *, most: int, buffer: int, penalty: float | None) -> float:
    """The score less what an answer without end token pays, and DAPO's eq. 13: falling by 1 over the last `buffer` of
    the `most` tokens."""
    if buffer and length > most - buffer:
        score += max((most - buffer - length) / buffer, -1.0)
    return score - (penalty or 0.0) * (not ended)


def kl(logp: float, reference: float, estimator: str) -> tuple[float, float]:
    """(estimate from one token, its derivative with respect to logp)."""
    gap = logp - reference
    if estimator == "k1":
        return gap, 1.0
    if estimator == "k2":
        return gap * gap / 2, gap
    if gap < -LIMIT:
        return math.exp(LIMIT) - 1 - LIMIT, 0.0
    return math.expm1(-gap) + gap, -math.expm1(-gap)


def clipped(change: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """(-min(rho A, clip(rho, low, high) A), its derivative with respect to the log-ratio)."""
    rho = math.exp(min(max(change, -LIMIT), LIMIT))
    free, held = rho * advantage, min(max(rho, low), high) * advantage
    moves = free <= held and abs(change) <= LIMIT
    return -min(free, held), -rho * advantage if moves else 0.0


def _sum(batch: Batch, token_losses: list[list[list[tuple[float, float]]]], weights: list[list[float]]) -> tuple:
    """(sum of weight x loss of each token, slopes): token_losses has (loss, derivative) of every token."""
    loss, slopes = [], []
    for answers, losses, shares in zip(batch, token_losses, weights, strict=True):
        loss += [w * value for w, tokens in zip(shares, losses, strict=True) for value, _ in tokens]
        slopes.append([np.array([w * d for _, d in t]) for w, t in zip(shares, losses, strict=True)])
        assert [len(s) for s in slopes[-1]] == [len(a.logps) for a in answers]
    return math.fsum(loss), slopes


# ---- GRPO ----------------------------------------------------------------------------------------------------------


def grpo(
    batch: Batch,
    *,
    most: int,
    beta: float = 0.04,
    kl_estimator: str = "k3",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_norm: str = "sequence",
    scale_rewards: bool = True,
    mask_truncated: bool = False,
) -> tuple[float, Slopes]:
    """arXiv:2402.03300, eq. 3: the mean over answers of the mean over their tokens; over all tokens of the step (DAPO,
    eq. 8), or the sum of an answer's tokens / `most` (Dr. GRPO). mask_truncated: only answers that ended count."""
    high = epsilon if epsilon_high is None else epsilon_high
    counted = [a for answers in batch for a in answers if a.ended or not mask_truncated]
    tokens = sum(len(a.logps) for a in counted)
    losses, weights = [], []
    for answers in batch:
        scores = [a.score for a in answers]
        mean = math.fsum(scores) / len(scores)
        deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
        losses.append([])
        weights.append([])
        for a in answers:
            advantage = (a.score - mean) / (deviation + 1e-6 if scale_rewards else 1.0)
            losses[-1].append([])
            for new, old, reference in zip(a.logps, a.old, a.reference, strict=True):
                policy, near = clipped(new - old, advantage, 1 - epsilon, 1 + high), kl(new, reference, kl_estimator)
                losses[-1][-1].append((policy[0] + beta * near[0], policy[1] + beta * near[1]))
            sizes = {"sequence": len(a.logps) * len(counted), "token": tokens, "constant": most * len(counted)}
            weights[-1].append((a.ended or not mask_truncated) / sizes[loss_norm])
    return _sum(batch, losses, weights)


# ---- RLOO ----------------------------------------------------------------------------------------------------------


def rloo(
    batch: Batch, *, kl_coef: float = 0.05, kl_estimator: str = "k1", cliprange: float = 0.2
) -> tuple[float, Slopes]:
    """arXiv:2402.14740, section 3: an answer's reward less the mean of the others', times the ratio of the answer."""
    count = sum(len(answers) for answers in batch)
    loss, slopes = [], []
    for answers in batch:
        rewards = [
            a.score - kl_coef * math.fsum(kl(o, r, kl_estimator)[0] for o, r in zip(a.old, a.reference, strict=True))
            for a in answers
        ]
        slopes.append([])
        for i, a in enumerate(answers):
            others = [r for j, r in enumerate(rewards) if j != i]
            advantage = rewards[i] - math.fsum(others) / len(others)
            value, slope = clipped(math.fsum(a.logps - a.old), advantage, 1 - cliprange, 1 + cliprange)
            loss.append(value / count)
            slopes[-1].append(np.full(len(a.logps), slope / count))
    return math.fsum(loss), slopes


# ---- REINFORCE++ ---------------------------------------------------------------------------------------------------


def reinforce(
    batch: Batch, *, kl_coef: float = 0.01, kl_estimator: str = "k1", cliprange: float = 0.2
) -> tuple[float, Slopes]:
    """arXiv:2501.03262, section 3: A_t = r - kl_coef (KL_t + ... + KL_T), normalised over all tokens of the batch,
    r less the mean of its prompt where that has several answers; a mean over tokens."""
    returns = []
    for answers in batch:
        baseline = math.fsum(a.score for a in answers) / len(answers) if len(answers) > 1 else 0.0
        returns.append([])
        for a in answers:
            nats = [kl(o, r, kl_estimator)[0] for o, r in zip(a.old, a.reference, strict=True)]
            returns[-1].append([a.score - baseline - kl_coef * math.fsum(nats[t:]) for t in range(len(nats))])
    flat = [x for answers in returns for tokens in answers for x in tokens]
    mean = math.fsum(flat) / len(flat)
    scale = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    losses = [
        [
            [
                clipped(new - old, (x - mean) / scale, 1 - cliprange, 1 + cliprange)
                for new, old, x in zip(a.logps, a.old, tokens, strict=True)
            ]
            for a, tokens in zip(answers, of_answers, strict=True)
        ]
        for answers, of_answers in zip(batch, returns, strict=True)
    ]
    return _sum(batch, losses, [[1 / len(flat)] * len(answers) for answers in batch])


# ---- online DPO ----------------------------------------------------------------------------------------------------


def chosen_and_rejected(scores: Sequence[float]) -> tuple[int, int] | None:
    """Which answers are the best and the worst one, the first of each; None where all are as good."""
    best, worst = max(scores), min(scores)
    return None if best == worst else (list(scores).index(best), list(scores).index(worst))


def online_dpo(batch: Batch, *, beta: float = 0.1, loss_type: str = "sigmoid") -> tuple[float, Slopes]:
    """arXiv:2402.04792, algorithm 1, the mean over prompts that have a best answer; other answers have slopes of 0."""
    pairs = [(answers, found) for answers in batch if (found := chosen_and_rejected([a.score for a in answers]))]
    loss, slopes = [], []
    for answers in batch:
        slopes.append([np.zeros(len(a.logps)) for a in answers])
        found = chosen_and_rejected([a.score for a in answers])
        if found is None:
            continue
        chosen, rejected = (answers[i] for i in found)
        deltas = [math.fsum(a.logps - a.reference) for a in (chosen, rejected)]
        sizes = [1, 1]
        if loss_type == "ipo":
            sizes = [len(chosen.logps), len(rejected.logps)]
            off = deltas[0] / sizes[0] - deltas[1] / sizes[1] - 1 / (2 * beta)
            value, slope = off**2, 2 * off
        elif loss_type == "hinge":
            z = beta * (deltas[0] - deltas[1])
            value, slope = max(0.0, 1 - z), -beta if z < 1 else 0.0
        else:
            z = beta * (deltas[0] - deltas[1])
            value, slope = math.log1p(math.exp(-z)), -beta / (1 + math.exp(z))
        loss.append(value / len(pairs))
        for i, size, sign in zip(found, sizes, (1, -1), strict=True):
            slopes[-1][i] += sign * slope / size / len(pairs)
    return math.fsum(loss), slopes
