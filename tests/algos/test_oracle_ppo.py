"""The PPO oracle against arithmetic done by hand, and its gradients against formulas."""

from __future__ import annotations

import math

import numpy as np
import oracle_ppo as oracle
import pytest
from oracle_ppo import Array, Update, gradient


def ragged(*rows: list[float]) -> list[Array]:
    return [np.array(row, dtype=np.float64) for row in rows]


def same(got: list[Array], *rows: list[float], rel: float = 1e-13) -> bool:
    """Whether the ragged list has these rows: shapes exactly, numbers within rounding (abs 1e-12)."""
    assert [len(row) for row in got] == [len(row) for row in rows]
    return all(row.tolist() == pytest.approx(want, rel=rel, abs=1e-12) for row, want in zip(got, rows, strict=True))


def logs(*ratios: float) -> list[float]:
    return [math.log(ratio) for ratio in ratios]


def drawn(seed: int, lengths: tuple[int, ...] = (3, 1, 5)) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=length) for length in lengths]


# ---- kl and rewards ------------------------------------------------------------------------------------------------


def test_k1_is_the_difference_of_log_probabilities() -> None:
    """-1 + 1.5 = 0.5; -2 + 2 = 0; -3 + 2.5 = -0.5."""
    assert same(oracle.kl(ragged([-1, -2, -3]), ragged([-1.5, -2, -2.5]), "k1"), [0.5, 0, -0.5])


def test_k3_of_three_tokens() -> None:
    """d = ref - logp = -ln 2, 0, ln 2: 1/2 - 1 + ln 2; 1 - 1 - 0; 2 - 1 - ln 2."""
    two = math.log(2)
    got = oracle.kl(ragged([-1, -2, -3]), ragged([-1 - two, -2, -3 + two]), "k3")
    assert same(got, [two - 0.5, 0, 1 - two])


def test_k3_is_never_negative_and_is_zero_only_where_both_agree() -> None:
    gaps = [0.0] + [sign * 10.0**power for power in range(-7, 2) for sign in (-1, 1)]
    (got,) = oracle.kl(ragged(gaps), ragged([0.0] * len(gaps)), "k3")
    assert got[0] == 0 and (got[1:] > 0).all()


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match=r"estimator must be one of \['k1', 'k3'\], got 'k2'"):
        oracle.kl(ragged([-1]), ragged([-1]), "k2")


def test_rows_of_different_length_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match="shorter"):
        oracle.kl(ragged([-1, -2, -3]), ragged([-1]), "k1")


def test_the_score_lands_on_the_last_valid_token() -> None:
    """kl_coef 0.1: -0.05, 0, 0.05 + 2; the completion of one token: -0.1 * 1 - 3."""
    got = oracle.rewards(ragged([0.5, 0, -0.5], [1]), np.array([2.0, -3.0]), 0.1)
    assert same(got, [-0.05, 0, 2.05], [-3.1])


def test_only_a_completion_without_its_end_token_pays_the_penalty() -> None:
    """1 stays; 2 - 0.5 = 1.5; a negative score falls too: -1 - 0.5 = -1.5."""
    scores = np.array([1.0, 2.0, -1.0])
    assert oracle.penalised(scores, [True, False, False], 0.5).tolist() == [1.0, 1.5, -1.5]
    assert oracle.penalised(scores, [True, False, False], None).tolist() == scores.tolist()
    assert scores.tolist() == [1.0, 2.0, -1.0]


# ---- whitening -----------------------------------------------------------------------------------------------------


def test_whitening_one_two_three() -> None:
    """Mean 2, var (1 + 0 + 1) / (3 - 1) = 1: (-1, 0, 1) / sqrt(1 + 1e-8); keeping the mean adds 2."""
    one = 1 / math.sqrt(1 + 1e-8)
    assert same(oracle.whiten(ragged([1, 2, 3]), True), [-one, 0, one])
    assert same(oracle.whiten(ragged([1, 2, 3]), False), [2 - one, 2, 2 + one])


def test_whitening_is_over_the_rollout_batch_and_not_a_completion() -> None:
    one = 1 / math.sqrt(1 + 1e-8)
    assert same(oracle.whiten(ragged([1], [2, 3]), True), [-one], [0, one])


def test_the_variance_divides_by_n_minus_one() -> None:
    """1, 3: mean 2, var (1 + 1) / 1 = 2, so -+1 / sqrt(2); dividing by n would give -+1."""
    root = math.sqrt(2 + 1e-8)
    assert same(oracle.whiten(ragged([1, 3]), True), [-1 / root, 1 / root])


def test_constant_tokens_whiten_to_zero() -> None:
    """Var 0: 0 / sqrt(1e-8) = 0; keeping the mean leaves the constant."""
    assert same(oracle.whiten(ragged([5, 5], [5]), True), [0, 0], [0])
    assert same(oracle.whiten(ragged([5, 5], [5]), False), [5, 5], [5])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_tokens_stay_as_they_are(shift_mean: bool) -> None:
    assert same(oracle.whiten(ragged([7]), shift_mean), [7])
    assert oracle.whiten([], shift_mean) == []


# ---- advantages and returns ----------------------------------------------------------------------------------------

REWARDS = ragged([1, 2, 3])
VALUES = ragged([0.5, 1, 2])


def test_lambda_one_gives_return_minus_value() -> None:
    """Rewards to go 6, 5, 3, less the values 0.5, 1, 2."""
    advantages = oracle.gae(REWARDS, VALUES, 1.0, 1.0)
    assert same(advantages, [5.5, 4, 1])
    assert same(oracle.returns(advantages, VALUES), [6, 5, 3])


def test_lambda_zero_gives_the_errors_of_one_step() -> None:
    """1 + 1 - 0.5 = 1.5; 2 + 2 - 1 = 3; 3 + 0 - 2 = 1."""
    assert same(oracle.gae(REWARDS, VALUES, 1.0, 0.0), [1.5, 3, 1])


def test_the_default_lambda() -> None:
    """The errors are 1.5, 3, 1: A3 = 1; A2 = 3 + 0.95 = 3.95; A1 = 1.5 + 0.95 * 3.95 = 5.2525."""
    assert same(oracle.gae(REWARDS, VALUES, 1.0, 0.95), [5.2525, 3.95, 1])


def test_gamma_and_lambda_of_a_half() -> None:
    """Errors 1 + 0.5 - 0.5 = 1, 2 + 1 - 1 = 2, 1; A3 = 1, A2 = 2 + 1/4, A1 = 1 + 2.25/4 = 1.5625."""
    advantages = oracle.gae(REWARDS, VALUES, 0.5, 0.5)
    assert same(advantages, [1.5625, 2.25, 1])
    assert same(oracle.returns(advantages, VALUES), [2.0625, 3.25, 3])


def test_a_completion_of_one_token() -> None:
    """A = r + 0 - V = 2 - 0.5, whatever gamma and lambda; its return is the reward."""
    for gamma, lam in [(1.0, 0.95), (0.5, 0.0), (0.9, 1.0)]:
        advantages = oracle.gae(ragged([2]), ragged([0.5]), gamma, lam)
        assert same(advantages, [1.5])
        assert same(oracle.returns(advantages, ragged([0.5])), [2])


def test_the_sum_written_out_is_the_recursion() -> None:
    rewards, values = drawn(1), drawn(2)
    got = oracle.gae(rewards, values, 0.9, 0.8)
    for a, r, v in zip(got, rewards, values, strict=True):
        after, value_after = 0.0, 0.0
        for t in reversed(range(len(r))):
            after = r[t] + 0.9 * value_after - v[t] + 0.9 * 0.8 * after
            value_after = v[t]
            assert a[t] == pytest.approx(after, rel=1e-13)


def prepared(scores: list[float], whiten_rewards: bool = False, lengths: tuple[int, ...] = (3,)) -> tuple:
    """kl 0, values 0, gamma 1, lam 1: advantages and returns are the rewards to go."""
    zeros = [np.zeros(length) for length in lengths]
    settings = {"kl_coef": 0.05, "kl_estimator": "k1", "gamma": 1.0, "lam": 1.0, "whiten_rewards": whiten_rewards}
    return oracle.prepare(zeros, zeros, zeros, np.array(scores), **settings)


def test_returns_are_taken_before_the_advantages_are_whitened() -> None:
    """Rewards 0, 0, 3: each token's reward to go is 3; constant advantages whiten to 0."""
    advantages, returns = prepared([3.0])
    assert same(advantages, [0, 0, 0])
    assert same(returns, [3, 3, 3])


def test_rewards_are_whitened_with_the_score_and_keep_their_mean() -> None:
    """0, 0, 3: mean 1, var (1 + 1 + 4) / 2 = 3; 1 - q, 1 - q, 1 + 2q with q = 1 / sqrt(3): to go 3, 2 + q, 1 + 2q."""
    q = 1 / math.sqrt(3 + 1e-8)
    _, returns = prepared([3.0], whiten_rewards=True)
    assert same(returns, [3, 2 + q, 1 + 2 * q])


def test_a_cut_completion_ends_like_any_other_but_for_the_penalty() -> None:
    """Scores 2 and 2 - 1 on completions of 3 and 1 tokens: to go 2, 2, 2 and 1; mean 7/4, var (3/16 + 9/16) / 3 = 1/4.

    Whitened: (2 - 7/4) / (1/2) = 1/2 and (1 - 7/4) / (1/2) = -3/2, up to the 1e-8 under the root.
    """
    scores = oracle.penalised(np.array([2.0, 2.0]), [True, False], 1.0).tolist()
    advantages, returns = prepared(scores, lengths=(3, 1))
    assert same(returns, [2, 2, 2], [1])
    assert same(advantages, [0.5, 0.5, 0.5], [-1.5], rel=1e-7)


def test_prepare_of_three_tokens_with_kl_and_values() -> None:
    """k1 1, -1, 2, kl_coef 0.5, score 4: rewards -0.5, 0.5, 3; values 1, 2, 1; gamma 1, lam 0.

    Errors -0.5 + 2 - 1 = 0.5; 0.5 + 1 - 2 = -0.5; 3 - 1 = 2; returns 1.5, 1.5, 3.
    The errors' mean is 2/3, their var (1/36 + 49/36 + 64/36) / 2 = 19/12.
    """
    settings = {"kl_coef": 0.5, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.0, "whiten_rewards": False}
    old, reference, values = ragged([-1, -3, -1]), ragged([-2, -2, -3]), ragged([1, 2, 1])
    advantages, returns = oracle.prepare(old, reference, values, np.array([4.0]), **settings)
    root = math.sqrt(19 / 12 + 1e-8)
    assert same(returns, [1.5, 1.5, 3])
    assert same(advantages, [-1 / 6 / root, -7 / 6 / root, 4 / 3 / root])


# ---- losses --------------------------------------------------------------------------------------------------------

RATIOS = ragged(logs(1.5, 0.5, 1.5), logs(0.5))  # old log-probabilities 0
OLD = ragged([0, 0, 0], [0])
BOTH_SIGNS = ragged([1, 1, -1], [-1])


def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage() -> None:
    """-(1 - 2 + 4 + 5) / 4 = -2: four tokens, not two completions."""
    logps = ragged([-1, -2, -3], [-4])
    assert oracle.policy_loss(logps, logps, ragged([1, -2, 4], [5]), 0.2) == -2


def test_clipping_takes_the_worse_of_both_on_either_sign() -> None:
    """A = 1: max(-1.5, -1.2) = -1.2, max(-0.5, -0.8) = -0.5; A = -1: max(1.5, 1.2) = 1.5, max(0.5, 0.8) = 0.8.

    The sum is 0.6, over 4 tokens 0.15.
    """
    assert oracle.policy_loss(RATIOS, OLD, BOTH_SIGNS, 0.2) == pytest.approx(0.15, rel=1e-14)


def test_the_policy_gradient_stops_where_the_clip_binds() -> None:
    """-A * ratio / 4 = -0.125 and 0.375 on the tokens in the middle; none at (1.5, A 1) and (0.5, A -1)."""
    got = gradient(lambda logps: oracle.policy_loss(logps, OLD, BOTH_SIGNS, 0.2), RATIOS)
    assert same(got, [0, -0.125, 0.375], [0], rel=1e-8)


def test_the_policy_gradient_at_ratio_one_is_minus_the_advantage_a_token() -> None:
    logps, advantages = drawn(3), drawn(4)
    got = gradient(lambda moved: oracle.policy_loss(moved, logps, advantages, 0.2), logps)
    assert same(got, *[(-a / 9).tolist() for a in advantages], rel=1e-8)


NEW_VALUES, OLD_VALUES, TARGETS = ragged([0.5, -0.5, 0.1]), ragged([0, 0, 0]), ragged([1, 1, 1])


def test_the_value_loss_takes_the_worse_of_free_and_clipped() -> None:
    """Free 0.25, 2.25, 0.81; clipped to 0.2, -0.2, 0.1: 0.64, 1.44, 0.81; (0.64 + 2.25 + 0.81) / 3 / 2 = 3.7 / 6."""
    assert oracle.value_loss(NEW_VALUES, OLD_VALUES, TARGETS, 0.2) == pytest.approx(3.7 / 6, rel=1e-14)


def test_the_value_loss_is_half_the_squared_error_where_nothing_moved() -> None:
    """(1 + 4 + 9 + 0) / 2 / 4 = 1.75, over four tokens of two completions."""
    values = ragged([0, 0, 0], [5])
    assert oracle.value_loss(values, values, ragged([1, 2, -3], [5]), 0.2) == 1.75


def test_the_value_gradient_stops_where_the_clip_binds() -> None:
    """0 at the clipped token; (V - Ret) / 3 = -1.5 / 3 and -0.9 / 3 at the others."""
    got = gradient(lambda values: oracle.value_loss(values, OLD_VALUES, TARGETS, 0.2), NEW_VALUES)
    assert same(got, [0, -0.5, -0.3], rel=1e-8)


def test_the_losses_of_random_tokens_are_the_formulas_on_flat_arrays() -> None:
    new, old, third = drawn(5), drawn(6), drawn(7)
    x, y, z = np.concatenate(new), np.concatenate(old), np.concatenate(third)
    ratio = np.exp(x - y)
    policy = np.maximum(-z * ratio, -z * np.clip(ratio, 0.8, 1.2)).sum() / 9
    value = np.maximum((x - z) ** 2, (y + np.clip(x - y, -0.2, 0.2) - z) ** 2).sum() / 18
    assert oracle.policy_loss(new, old, third, 0.2) == pytest.approx(policy, rel=1e-13)
    assert oracle.value_loss(new, old, third, 0.2) == pytest.approx(value, rel=1e-13)


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_rollout_and_two_updates() -> None:
    """k1 1, 1 and 1: sums 2 and 1, mean 1.5 (not 1 a token); entropy sums 3 and 3; scores 1 and 2.

    Update 1 moved nothing. Update 2, one step of three tokens: ratios 2, 1, 1; values 0.5, 0, 0 from 0, returns 1.
    Ratio (1 + 4/3) / 2 = 7/6; approxkl (0 + ln(2)^2 / 2 / 3) / 2; both clips bind on one token of three in one of two.
    Policy loss, A = 1: (-1 - (1.2 + 1 + 1) / 3) / 2; value loss: (1/2 + (0.64 + 1 + 1) / 6) / 2.
    """
    old, reference = ragged([-1, -2], [-3]), ragged([-2, -3], [-4])
    ones, zeros = ragged([1, 1], [1]), ragged([0, 0], [0])
    moved = ragged([-1 + math.log(2), -2], [-3])
    updates = [
        Update(old, old, ones, zeros, zeros, ones),
        Update(moved, old, ones, ragged([0.5, 0], [0]), zeros, ones),
    ]
    settings = {"kl_coef": 0.1, "kl_estimator": "k1", "cliprange": 0.2, "cliprange_value": 0.2}
    got = oracle.metrics(old, reference, np.array([1.0, 2.0]), updates, **settings)
    assert got == pytest.approx(
        {
            "objective/kl": 1.5,
            "objective/entropy": 3,
            "objective/non_score_reward": -0.15,
            "objective/scores": 1.5,
            "objective/rlhf_reward": 1.35,
            "policy/approxkl_avg": math.log(2) ** 2 / 12,
            "policy/clipfrac_avg": 1 / 6,
            "loss/policy_avg": -(1 + 3.2 / 3) / 2,
            "loss/value_avg": (0.5 + 2.64 / 6) / 2,
            "val/clipfrac_avg": 1 / 6,
            "val/ratio": 7 / 6,
        },
        rel=1e-13,
    )


def test_a_token_without_advantage_is_never_clipped() -> None:
    """A = 0 makes both losses 0, and a tie does not count as clipped."""
    zeros = ragged([0, 0])
    update = Update(ragged(logs(2, 0.5)), zeros, zeros, zeros, zeros, zeros)
    assert oracle.update_metrics(update, cliprange=0.2, cliprange_value=0.2)["policy/clipfrac_avg"] == 0
