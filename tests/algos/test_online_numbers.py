"""One prompt of each algorithm that samples, with a calculator: loss, gradient a token, and the metrics of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fakes import CPU, divided, metrics_of
from recorded import Played, prepared_from, prompts, tensor

from dsalign import algos
from dsalign.contract.groups import Output
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.packing import cut


class Answer(NamedTuple):
    """A completion: nats a token now, when it was sampled and under the reference; and its score."""

    now: Sequence[float]
    old: Sequence[float]
    reference: Sequence[float]
    score: float


def step(algorithm: Any, *answers: Answer) -> tuple[float, list[float], dict[str, tuple[float, float]]]:
    """(loss, its gradient a token, metrics) of these completions of one prompt, of at most 5 tokens."""
    plays = [
        Played((10 + i,) * len(a.now), *map(np.array, (a.old, a.reference, a.old, a.old)), a.score)
        for i, a in enumerate(answers)
    ]
    ((prepared, _),) = prepared_from(algorithm, {0: plays}, given=prompts(1), rollout=RolloutOptions(max_new_tokens=5))
    now = [a.now for g in prepared.groups for ids in g.completions for a in [answers[ids[0] - 10]]]
    out = Output(logps=tensor([x for tokens in now for x in tokens]).requires_grad_())
    micro = cut(prepared, range(len(prepared.groups)), CPU)
    total = divided(algorithm, "policy", out, micro)
    total.backward()
    assert isinstance(out.logps, torch.Tensor) and out.logps.grad is not None
    metrics = {**prepared.metrics, **algorithm.policy_loss(out, micro).metrics}
    return float(total.detach()), out.logps.grad.tolist(), metrics_of(metrics)


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


LN = math.log
# Scores 1 and 0; ratios 1.5 and 1 of the first completion's tokens, 0.5 of the second's; held in [0.8, 1.2].
GOOD = Answer([LN(1.5) - 1, -2], [-1, -2], [LN(1.5) - 1, -2], 1.0)
BAD = Answer([LN(0.5) - 1], [-1], [-1 - LN(4)], 0.0)


@pytest.mark.parametrize(
    ("loss_norm", "loss", "gradient"),
    [
        ("sequence", (-1.1 / 2 + 0.4) / 2, [0, -0.5 / 2 / 2, 0]),
        ("token", (-1.1 + 0.4) / 3, [0, -0.5 / 3, 0]),
        ("constant", (-1.1 / 5 + 0.4 / 5) / 2, [0, -0.5 / 5 / 2, 0]),
    ],
)
def test_grpo(loss_norm: str, loss: float, gradient: list[float]) -> None:
    """Unscaled advantages 0.5 and -0.5. Tokens: -0.5 x 1.2 = -0.6, -0.5 x 1 = -0.5 and max(0.25, 0.4) = 0.4; clipping
    binds at the first and the last one, so the middle one alone has a slope, -0.5."""
    options = {"num_generations": 2, "beta": 0.0, "scale_rewards": False, "loss_norm": loss_norm}
    found, slopes, metrics = step(algos.load("grpo")(**options), GOOD, BAD)
    assert (found, slopes) == (close(loss), close(gradient))
    assert metrics["policy/clipfrac_avg"] == (2.0, 3.0)
    assert metrics["val/ratio"] == close((3.0, 3.0))
    assert metrics["loss/policy_avg"] == close((-0.7, 3.0))
    assert "objective/kl" not in metrics and "policy/kl_avg" not in metrics


def test_grpo_scales_by_the_deviation() -> None:
    """1 and 0 have a variance, with n - 1, of 0.5: advantages -+0.5 / (0.707106781 + 1e-6) = -+0.707105781, so the loss
    of (-0.55 + 0.4) / 2 with -+0.5 becomes 1.414211562 times as large."""
    found, slopes, _ = step(algos.load("grpo")(num_generations=2, beta=0.0), GOOD, BAD)
    assert (found, slopes) == (close(-0.075 * 1.414211562), close([0, -0.125 * 1.414211562, 0]))


@pytest.mark.parametrize(
    ("kind", "kl", "slope"),
    [("k1", LN(2), 1.0), ("k2", LN(2) ** 2 / 2, LN(2)), ("k3", -0.5 + LN(2), 0.5)],
)
def test_grpo_keeps_near_the_reference(kind: str, kl: float, slope: float) -> None:
    """The second completion lies ln 2 above the reference, the first on it: with beta 0.1 and k3 its token adds
    0.1 (e^-ln 2 - 1 + ln 2) = 0.0193147181 to 0.4 and 0.1 (1 - e^-ln 2) to its slope, over 2 completions. When it was
    sampled it lay ln 4 above, the first ln 1.5 below: the KL that is logged of a completion."""
    options = {"num_generations": 2, "beta": 0.1, "scale_rewards": False, "kl_estimator": kind}
    found, slopes, metrics = step(algos.load("grpo")(**options), GOOD, BAD)
    at_reference = 0.1 if kind == "k1" else 0.0  # k1 has a slope of 1 everywhere
    assert found == close(-0.075 + 0.1 * kl / 2)
    assert slopes == close([at_reference / 4, -0.125 + at_reference / 4, 0.1 * slope / 2])
    assert metrics["policy/kl_avg"] == close((kl, 3.0))
    assert metrics["objective/kl"] == close((LN(4) - LN(1.5), 2.0))
    assert not {"objective/non_score_reward", "objective/rlhf_reward"} & metrics.keys()


def test_rloo() -> None:
    """Scores 3, 1, 2 and KL 1, 0, 0 with kl_coef 0.5: rewards 2.5, 1, 2; less the mean of the others 2.5 - 1.5 = 1,
    1 - 2.25 = -1.25, 2 - 1.75 = 0.25. Ratios of whole completions: e^(0.3 - 0.2) = 1.105170918; 1; 1.5, held at 1.2.
    (-1.105170918 + 1.25 - 0.25 x 1.2) / 3; slopes of all tokens of a completion alike, none where clipping binds."""
    answers = (
        Answer([-0.7, -2.2], [-1, -2], [-1.25, -2.75], 3.0),
        Answer([-1, -1], [-1, -1], [-0.5, -1.5], 1.0),
        Answer([LN(1.5) - 3], [-3], [-3], 2.0),
    )
    found, slopes, metrics = step(algos.load("rloo")(num_generations=3, kl_coef=0.5), *answers)
    assert found == close((-1.105170918 + 1.25 - 0.3) / 3)
    assert slopes == close([-1.105170918 / 3] * 2 + [1.25 / 3] * 2 + [0.0])
    assert metrics["objective/kl"] == close((1.0, 3.0))
    assert metrics["objective/non_score_reward"] == close((-0.5, 3.0))
    assert metrics["objective/rlhf_reward"] == close((5.5, 3.0))
    assert metrics["policy/clipfrac_avg"] == (1.0, 3.0)


def test_reinforce() -> None:
    """Two prompts with scores 1 and 2; KL 2, 0 and 0 with kl_coef 0.5: to go 1 - 1 = 0, 1 and 2, of mean 1 and
    variance 1: whitened -1, 0, 1. Ratios 0.5, 2 and 1: max(0.5, 0.8) + 0 - 1 = -0.2 over 3 tokens, one of which has a
    slope: the first is clipped, the second has no advantage."""
    algorithm = algos.load("reinforce")(kl_coef=0.5)
    plays = {
        0: [Played((10, 10), *map(np.array, ([-1.0, -2.0], [-3.0, -2.0], [-1.0, -2.0], [0.0] * 3)), 1.0)],
        1: [Played((11,), *map(np.array, ([-1.0], [-1.0], [-1.0], [0.0] * 2)), 2.0)],
    }
    ((prepared, _),) = prepared_from(algorithm, plays, given=prompts(2))
    assert torch.cat(list(prepared.fields["advantages"])).tolist() == close([-1, 0, 1])
    out = Output(logps=tensor([LN(0.5) - 1, LN(2) - 2, -1]).requires_grad_())
    total = divided(algorithm, "policy", out, cut(prepared, range(2), CPU))
    total.backward()
    assert out.logps is not None and out.logps.grad is not None
    assert (float(total.detach()), out.logps.grad.tolist()) == (close(-0.2 / 3), close([0, 0, -1 / 3]))


def test_reinforce_with_several_answers_takes_scores_against_their_mean() -> None:
    """Scores 5, 3 and 4 of one token each: 1, -1 and 0, of variance 1; at ratio 1 the slopes are -A / 3."""
    answers = (Answer([-1], [-1], [-1], score) for score in (5.0, 3.0, 4.0))
    found, slopes, _ = step(algos.load("reinforce")(num_generations=3, kl_coef=0.0), *answers)
    assert (found, slopes) == (close(0.0), close([-1 / 3, 1 / 3, 0]))


BEST = Answer([-0.5, -1.5], [-1, -1], [-1, -2], 3.0)  # Delta 1
WORST = Answer([-4.0], [-4], [-2], -1.0)  # Delta -2
BETWEEN = Answer([-1.0], [-1], [-1], 0.0)


@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        ({"beta": 0.5}, 0.201413278, [-0.091212762] * 2 + [0.091212762]),
        ({"beta": 0.25, "loss_type": "hinge"}, 0.25, [-0.25] * 2 + [0.25]),
        ({"beta": 0.5, "loss_type": "ipo"}, 2.25, [1.5] * 2 + [-3.0]),
    ],
)
def test_online_dpo(options: dict[str, Any], loss: float, gradient: list[float]) -> None:
    """Delta 1 of the best and -2 of the worst: log(1 + e^-1.5), slope -0.5 sigmoid(-1.5); 1 - 0.25 x 3; per token
    1/2 + 2 - 1 = 1.5, squared, with slopes 2 x 1.5 / 2 and -2 x 1.5. The answer between them plays no part."""
    found, slopes, metrics = step(algos.load("online_dpo")(num_generations=3, **options), WORST, BETWEEN, BEST)
    assert (found, slopes) == (close(loss), close(gradient))
    assert metrics["rewards/chosen"] == close((options["beta"], 1.0))
    assert metrics["rewards/rejected"] == close((-2 * options["beta"], 1.0))
    assert metrics["objective/scores"] == (2.0, 3.0)
    assert metrics["rollout/groups_kept"] == (1.0, 1.0)
    assert ("logps/mean_chosen" in metrics) == (options.get("loss_type") == "ipo")
