"""The oracle's numerical gradients against derivatives worked out on paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from strategies import near, random_completions, random_pairs

DPO: dict[str, Any] = {
    "beta": 0.5,
    "loss_type": ["sigmoid"],
    "loss_weights": [1.0],
    "label_smoothing": 0.0,
    "rpo_alpha": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 1.0,
    "discopop_tau": 0.05,
}


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-8, abs=1e-13)


def test_gradient_keeps_nesting_shapes_and_input():
    """The derivative of x^2 y is 2xy and x^2; an empty array has an empty gradient, a matrix a matrix."""
    given = [(np.array([3.0]), np.array([])), [np.array([[2.0, 5.0]])]]
    result = oracle.gradient(lambda t: t[0][0][0] ** 2 * t[1][0][0, 0], given)
    assert isinstance(result[0], tuple) and isinstance(result[1], list)
    assert result[0][0] == close(12.0) and result[0][1].shape == (0,)
    np.testing.assert_allclose(result[1][0], [[9.0, 0.0]], rtol=1e-10)
    assert given[0][0][0] == 3.0 and given[1][0].tolist() == [[2.0, 5.0]]


def test_gradient_close_to_a_kink():
    """max(0, x) at 0.001 and -0.001 has slopes 1 and 0, though the first steps reach across the kink."""
    result = oracle.gradient(lambda t: float(np.maximum(t, 0).sum()), np.array([0.001, -0.001]))
    np.testing.assert_allclose(result, [1.0, 0.0], rtol=1e-9, atol=1e-13)


def test_gradient_of_an_inactive_hinge_is_exactly_zero():
    """z = 0.5 * 30 is beyond 1."""
    policy, reference = [(np.array([-1.0]), np.array([-31.0]))], [(np.array([-1.0]), np.array([-1.0]))]
    settings = DPO | {"loss_type": ["hinge"], "order": [0]}
    ((chosen, rejected),) = oracle.gradient(lambda p: oracle.dpo(p, reference, **settings), policy)
    assert (chosen.tolist(), rejected.tolist()) == ([0.0], [0.0])


def test_gradient_of_sft():
    """-1 / tokens for each of the six tokens; a completion without tokens takes no part."""
    result = oracle.gradient(oracle.sft, [np.full(2, -1.0), np.array([]), np.full(4, -3.0)])
    assert [array.tolist() for array in result] == [close([-1 / 6] * 2), [], close([-1 / 6] * 4)]


def test_gradient_of_dpo_sigmoid():
    """-beta sigmoid(-z) / n for each token of the chosen, the opposite for the rejected."""
    rng = np.random.default_rng(1)
    policy = random_pairs(rng, 3, 5)
    reference = near(rng, policy, 0.3)
    result = oracle.gradient(lambda p: oracle.dpo(p, reference, order=range(3), **DPO), policy)
    for got, (c, r), (c_ref, r_ref) in zip(result, policy, reference, strict=True):
        slope = 0.5 / (1 + np.exp(0.5 * (c.sum() - c_ref.sum() - r.sum() + r_ref.sum()))) / 3
        assert got[0].tolist() == close([-slope] * len(c))
        assert got[1].tolist() == close([slope] * len(r))


def test_gradient_of_dpo_ipo():
    """2 u / |c| / n for the chosen, -2 u / |r| / n for the rejected, u the number that is squared."""
    rng = np.random.default_rng(2)
    policy = random_pairs(rng, 3, 5)
    reference = near(rng, policy, 0.3)
    settings = DPO | {"loss_type": ["ipo"], "order": range(3)}
    result = oracle.gradient(lambda p: oracle.dpo(p, reference, **settings), policy)
    for got, (c, r), (c_ref, r_ref) in zip(result, policy, reference, strict=True):
        u = (c - c_ref).mean() - (r - r_ref).mean() - 1
        assert got[0].tolist() == close([2 * u / len(c) / 3] * len(c))
        assert got[1].tolist() == close([-2 * u / len(r) / 3] * len(r))


def test_gradient_of_discopop_at_a_sharp_temperature():
    """At z = 0: s = 1/2, s' = 1 / (4 tau) = 5, so -s' log 2 - (1 - s) / 2 + s' e^0 - s e^0 = 5 (1 - log 2) - 3/4;
    times beta 0.5.
    """
    policy = [(np.array([-1.0]), np.array([-2.0]))]
    settings = DPO | {"loss_type": ["discopop"], "order": [0]}
    ((chosen, rejected),) = oracle.gradient(
        lambda p: oracle.dpo(p, [(c.copy(), r.copy()) for c, r in policy], **settings), policy
    )
    slope = 0.5 * (5 * (1 - np.log(2)) - 0.75)
    assert (chosen[0], rejected[0]) == (close(slope), close(-slope))


def test_gradient_of_forward_kl():
    """Delta_c = 0.5, delta_r = 0: h = 1 - e^-0.5, dh/dc = e^-0.5, dh/dr = -1, dloss/dh = -0.5 sigmoid(-0.5 h)."""
    policy, reference = [(np.array([-1.0]), np.array([-2.0]))], [(np.array([-1.5]), np.array([-2.0]))]
    settings = DPO | {"f_divergence_type": "forward_kl", "order": [0]}
    ((chosen, rejected),) = oracle.gradient(lambda p: oracle.dpo(p, reference, **settings), policy)
    slope = -0.5 / (1 + np.exp(0.5 * (1 - np.exp(-0.5))))
    assert (chosen[0], rejected[0]) == (close(slope * np.exp(-0.5)), close(-slope))


def test_gradient_of_ld_dpo():
    """The third of the chosen's tokens lies beyond the rejected's two and counts 0.2."""
    policy = [(np.full(3, -1.0), np.full(2, -1.0))]
    settings = DPO | {"ld_alpha": 0.2, "order": [0]}
    ((chosen, rejected),) = oracle.gradient(
        lambda p: oracle.dpo(p, [(np.full(3, -1.0), np.full(2, -1.0))], **settings), policy
    )
    assert chosen.tolist() == close([-0.25, -0.25, -0.05])
    assert rejected.tolist() == close([0.25, 0.25])


def test_gradient_of_aot_at_a_tie_with_the_pairing_held():
    """Policy gaps tie at 0; by index they take the reference gaps 1 and 2: z -0.5 and -1.
    The slope is -beta sigmoid(-z) / 2.
    """
    policy = [(np.array([-1.0]), np.array([-1.0])), (np.array([-2.0]), np.array([-2.0]))]
    reference = [(np.array([-1.0]), np.array([-3.0])), (np.array([-1.0]), np.array([-2.0]))]
    partners = oracle.aot_partners(policy, reference, order=[0, 1], ld_alpha=None)
    settings = DPO | {"loss_type": ["aot"], "order": [0, 1], "partners": partners}
    result = oracle.gradient(lambda p: oracle.dpo(p, reference, **settings), policy)
    slopes = [-0.25 / (1 + np.exp(z)) for z in (-0.5, -1.0)]
    assert [(c[0], r[0]) for c, r in result] == [(close(s), close(-s)) for s in slopes]


def test_gradient_of_aot_unpaired_is_that_of_its_two_halves():
    """L(c, const r) + L(const c, r) has the gradient of L(c, r): the two sides do not share a number."""
    rng = np.random.default_rng(3)
    policy = random_pairs(rng, 4, 3)
    reference = near(rng, policy, 0.5)
    partners = oracle.aot_partners(policy, reference, order=range(4), ld_alpha=None)
    settings = DPO | {"loss_type": ["aot_unpaired"], "order": range(4)}
    whole = oracle.gradient(lambda p: oracle.dpo(p, reference, **settings), policy)

    def halves(moved: Any) -> float:
        rows = list(zip(moved, policy, strict=True))
        sides = [(m[0], p[1]) for m, p in rows], [(p[0], m[1]) for m, p in rows]
        return sum(oracle.dpo(side, reference, partners=partners, **settings) for side in sides)

    for (c, r), (half_c, half_r) in zip(whole, oracle.gradient(halves, policy), strict=True):
        assert (c.tolist(), r.tolist()) == (close(half_c.tolist()), close(half_r.tolist()))


def test_gradient_of_kto_with_z0_held():
    """-lambda_D beta s (1 - s) / n with s = sigmoid(beta (delta - z0)), and + lambda_U for the undesirable."""
    rng = np.random.default_rng(4)
    policy = random_completions(rng, 2, 4)
    reference = near(rng, policy, 0.5)
    options = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 2.0, "loss_type": "kto", "z0": 0.3}
    result = oracle.gradient(lambda p: oracle.kto(p, reference, [True, False], [], [], **options), policy)
    for got, p, q, weight in zip(result, policy, reference, (-1.5, 2.0), strict=True):
        s = 1 / (1 + np.exp(-0.5 * (p.sum() - q.sum() - 0.3)))
        assert got.tolist() == close([weight * 0.5 * s * (1 - s) / 2] * len(p))


def test_gradient_of_orpo_near_certainty():
    """d log_odds / d mean = 1 / (1 - p); with p_c = e^-0.001 and p_r = 1/2 the odds ratio o is p_c / (1 - p_c).
    The chosen: -1 - 0.1 (1 - o / (1 + o)) / (1 - p_c) = -1.1, as o / (1 + o) is p_c;
    the rejected: 0.1 (1 - p_c) / (1 / 2).
    """
    pair = (np.array([-0.001]), np.array([np.log(0.5)]))
    ((chosen, rejected),) = oracle.gradient(lambda p: oracle.orpo(p, beta=0.1), [pair])
    assert (chosen[0], rejected[0]) == (close(-1.1), close(-0.2 * np.expm1(-0.001)))


def test_gradient_of_simpo():
    """-beta sigmoid(-u) / |c| / n - alpha / tokens for the chosen, beta sigmoid(-u) / |r| / n for the rejected."""
    pairs = random_pairs(np.random.default_rng(5), 2, 4)
    options = {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5, "label_smoothing": 0.0}
    result = oracle.gradient(lambda p: oracle.simpo(p, **options), pairs)
    count = sum(len(c) for c, _ in pairs)
    for got, (c, r) in zip(result, pairs, strict=True):
        slope = 2 / (1 + np.exp(2 * (c.mean() - r.mean()) - 1)) / 2
        assert got[0].tolist() == close([-slope / len(c) - 0.5 / count] * len(c))
        assert got[1].tolist() == close([slope / len(r)] * len(r))


def test_gradient_of_rm():
    """s 2 and 1: -sigmoid(-1) = -0.268941421 and its opposite, each with 2 * 0.1 * 3 for the centre."""
    result = oracle.gradient(lambda s: oracle.rm(s, np.zeros(1), center=0.1), np.array([[2.0, 1.0]]))
    np.testing.assert_allclose(result, [[0.6 - 0.268941421370, 0.6 + 0.268941421370]], rtol=1e-10)
