"""The oracle against numbers worked out with a calculator; the arithmetic stands in each docstring."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

LOG_2 = 0.693147180560


def tokens(*values: float) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def close(expected: float) -> Any:
    return pytest.approx(expected, abs=1e-9, rel=1e-9)


# One pair: logp_c = -2 in 2 tokens, logp_r = -4 in 1 token; the reference has -3 and -2.
# delta_c = 1, delta_r = -2, h = 3. With beta 0.5: z = 1.5, R_c = 0.5, R_r = -1, 1 / (2 beta) = 1.
POLICY = [(tokens(-0.5, -1.5), tokens(-4.0))]
REFERENCE = [(tokens(-1.0, -2.0), tokens(-2.0))]


def dpo(policy: oracle.Pairs, reference: oracle.Pairs, *loss_types: str, **options: Any) -> float:
    """The oracle's dpo at beta 0.5 with everything else off."""
    settings: dict[str, Any] = {
        "beta": 0.5,
        "loss_type": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "label_smoothing": 0.0,
        "rpo_alpha": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 1.0,
        "discopop_tau": 0.05,
        "order": range(len(policy)),
    }
    return oracle.dpo(policy, reference, **(settings | options))


# ---- scalars -------------------------------------------------------------------------------------------------------


def test_logsigmoid_by_hand_and_in_the_tails():
    """log(1 / (1 + e^-1)) = -log(1.367879441) = -0.313261688; e^-800 is 0, so -800 and -0 are exact."""
    assert oracle.logsigmoid(1.0) == close(-0.313261687518)
    assert oracle.logsigmoid(-800.0) == -800.0
    assert oracle.logsigmoid(800.0) == 0.0


def test_sigmoid_by_hand_and_in_the_tails():
    """1 / (1 + e^-1) = 1 / 1.367879441 = 0.731058579."""
    assert oracle.sigmoid(1.0) == close(0.731058578630)
    assert oracle.sigmoid(-1.0) == close(1 - 0.731058578630)
    assert (oracle.sigmoid(-800.0), oracle.sigmoid(800.0)) == (0.0, 1.0)


def test_log1mexp_by_hand_on_both_sides_of_its_switch():
    """1 - e^-ln2 = 1/2; 1 - e^ln0.9 = 0.1; 1 - e^ln0.2 = 0.8; 1 - e^-1e-12 = 1e-12 to twelve digits."""
    assert oracle.log1mexp(np.log(0.5)) == close(-LOG_2)
    assert oracle.log1mexp(np.log(0.9)) == close(np.log(0.1))
    assert oracle.log1mexp(np.log(0.2)) == close(np.log(0.8))
    assert oracle.log1mexp(-1e-12) == close(-27.631021116)


def test_log_odds_by_hand_and_at_its_clamp():
    """p = 0.8: log(0.8 / 0.2) = log 4. p = 1 becomes e^-2^-24: odds 2^24 less a half, log = 24 * log 2 = 16.635532."""
    assert oracle.log_odds(np.log(0.8)) == close(np.log(4.0))
    assert oracle.log_odds(0.0) == pytest.approx(24 * LOG_2, abs=1e-7)
    assert oracle.log_odds(-1e-9) == oracle.log_odds(0.0)


# ---- one model -----------------------------------------------------------------------------------------------------


def test_sft_divides_by_tokens_and_not_by_completions():
    """(1 + 2 + 3 + 6) / 4 = 3; the mean of the completions' means would be (2 + 6) / 2 = 4."""
    assert oracle.sft([tokens(-1, -2, -3), tokens(-6)]) == close(3.0)


def test_rm_by_hand():
    """s 2 and 1, margin 0: log(1 + e^-1) = 0.313261688, center 0.1 * 3^2 = 0.9.
    s 0 and 1, margin 0.5: log(1 + e^1.5) = 1.701413276, center 0.1 * 1^2 = 0.1. Mean: 3.014674964 / 2.
    """
    scores = np.array([[2.0, 1.0], [0.0, 1.0]])
    assert oracle.rm(scores, tokens(0, 0.5), center=0.1) == close(1.507337482)
    assert oracle.rm(scores, tokens(0, 0.5), center=0.0) == close(1.507337482 - 0.5)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [("sigmoid", 0.0, 0.313261687518), ("sigmoid", 0.2, 0.513261687518), ("hinge", 0.0, 0.0), ("ipo", 0.0, 4.0)],
)
def test_cpo_by_hand(loss_type: str, label_smoothing: float, expected: float):
    """z = 0.5 (-2 - -4) = 1: log(1 + e^-1) = 0.313261688, and e = 0.2 adds e z = 0.2; relu(1 - 1) = 0;
    (-2/2 - -4/1 - 1)^2 = 4. The NLL of the chosen is 2/2 = 1, weighed by 0.3.
    """
    options = {"beta": 0.5, "label_smoothing": label_smoothing, "loss_type": loss_type}
    assert oracle.cpo(POLICY, cpo_alpha=0.0, **options) == close(expected)
    assert oracle.cpo(POLICY, cpo_alpha=0.3, **options) == close(expected + 0.3)


def test_orpo_at_given_means():
    """Means log 0.8 and log 0.5: log odds log 4 and 0, -log sigmoid(log 4) = log(5/4) = 0.223143551.
    NLL = -log 0.8 = 0.223143551, so with lambda 0.1 the loss is 1.1 * 0.223143551.
    """
    pair = (tokens(np.log(0.8), np.log(0.8)), tokens(np.log(0.5)))
    assert oracle.orpo([pair], beta=0.1) == close(1.1 * 0.223143551314)


def test_orpo_nll_is_a_mean_over_tokens_and_its_ratio_a_mean_over_pairs():
    """Equal sides give log 2 each. NLL: (1 + 1 + 1 + 5) / 4 = 2 over tokens. 2 + 0.1 log 2."""
    pairs = [(tokens(-1, -1, -1), tokens(-1)), (tokens(-5), tokens(-5, -5))]
    assert oracle.orpo(pairs, beta=0.1) == close(2.0693147180560)


def test_simpo_by_hand():
    """Means -1 and -4 with beta 2: margin 6. gamma 0: log(1 + e^-6) = 0.002475685; gamma 1: log(1 + e^-5) =
    0.006715348; e = 0.1 adds 0.1 * 5 there; NLL is 1.
    """
    options = {"beta": 2.0, "cpo_alpha": 0.0, "label_smoothing": 0.0}
    assert oracle.simpo(POLICY, simpo_gamma=0.0, **options) == close(0.002475685137)
    assert oracle.simpo(POLICY, simpo_gamma=1.0, **options) == close(0.006715348489)
    assert oracle.simpo(POLICY, simpo_gamma=1.0, **(options | {"label_smoothing": 0.1})) == close(0.506715348489)
    assert oracle.simpo(POLICY, simpo_gamma=1.0, **(options | {"cpo_alpha": 0.5})) == close(0.506715348489)


# ---- KTO -----------------------------------------------------------------------------------------------------------


def kto(labels: list[bool], loss_type: str = "kto", **options: Any) -> float:
    """Deltas 2 and -1; mismatched deltas 1 and 0.2, so z0 = 0.6; beta 0.5."""
    return oracle.kto(
        [tokens(-1, -2), tokens(-4)],
        [tokens(-2, -3), tokens(-3)],
        labels,
        [tokens(-1), tokens(-2, -0.3)],
        [tokens(-2), tokens(-2, -0.5)],
        **({"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": loss_type} | options),
    )


def test_kto_by_hand():
    """Desirable: 1 - sigmoid(0.5 (2 - 0.6)) = sigmoid(-0.7) = 0.331812228; undesirable:
    1 - sigmoid(0.5 (0.6 - -1)) = sigmoid(-0.8) = 0.310025519. Weights 2 and 3, divided by the
    number of both: (0.663624456 + 0.930076557) / 2.
    """
    assert kto([True, False], desirable_weight=2.0, undesirable_weight=3.0) == close(0.7968505061)


def test_kto_with_desirable_rows_only():
    """sigmoid(-0.7) = 0.331812228 and 1 - sigmoid(0.5 (-1 - 0.6)) = sigmoid(0.8) = 0.689974481: mean 0.510893355."""
    assert kto([True, True]) == close(0.5108933545)


def test_kto_with_undesirable_rows_only():
    """1 - sigmoid(0.5 (0.6 - 2)) = sigmoid(0.7) = 0.668187772 and sigmoid(-0.8) = 0.310025519: mean 0.489106646."""
    assert kto([False, False]) == close(0.4891066455)


def test_kto_apo_zero_unpaired_by_hand():
    """1 - sigmoid(1) = 0.268941421 and sigmoid(-0.5) = 0.377540669: mean 0.323241045."""
    assert kto([True, False], "apo_zero_unpaired") == close(0.3232410451)


def test_kto_z0_is_never_negative_and_can_be_given():
    """Deltas -1 and -0.2 have mean -0.6: z0 = 0. At z0 = 2 the first row is at its reference point: 1/2 both ways."""
    assert oracle.kto_z0([tokens(-2), tokens(-2, -0.5)], [tokens(-1), tokens(-2, -0.3)]) == 0.0
    assert oracle.kto_z0([tokens(-1), tokens(-2, -0.3)], [tokens(-2), tokens(-2, -0.5)]) == close(0.6)
    assert 2 * kto([True, True], z0=2.0) == close(0.5 + 0.817574476194)  # sigmoid(0.5 (2 - -1)) = sigmoid(1.5)


@pytest.mark.parametrize(
    ("prompts", "shift"),
    [("abc", 1), ("aabb", 2), ("aab", 1), ("aaa", 1), ("abab", 1), ("aabaab", 1), ("aaabbb", 3), ("aabbcc", 2)],
)
def test_kto_shift(prompts: str, shift: int):
    """aabb: shift 1 meets a-a and b-b, shift 2 none. aab: shifts 1 and 2 meet a-a once each, so the smaller.
    aabaab: shift 1 two matches, 2 two, 3 six. aaabbb: shift 3 has none.
    """
    assert oracle.kto_shift(prompts) == shift


# ---- DPO -----------------------------------------------------------------------------------------------------------

HINGE_PAIR = [(tokens(-2.0), tokens(-3.0))]  # against equal references of -3: delta_c 1, delta_r 0, z = 0.5


@pytest.mark.parametrize("name", ["sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired"])
def test_dpo_at_policy_equals_reference_is_log_2(name: str):
    assert dpo(POLICY, POLICY, name) == close(LOG_2)


@pytest.mark.parametrize(
    ("name", "at_reference"),
    [
        ("hinge", 1.0),
        ("ipo", 1.0),
        ("nca_pair", 2 * LOG_2),
        ("bco_pair", 2 * LOG_2),
        ("sppo_hard", 2.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * LOG_2 + 0.5),
    ],
)
def test_dpo_types_at_z_0(name: str, at_reference: float):
    """relu(1); (0 - 1)^2; log 2 (1 + 1/2 + 1/2); log 2 + log 2; 1 + 1; 1 - 1/2 + 1/2 twice;
    (1 - 1/2) log 2 + e^0 / 2.
    """
    assert dpo(POLICY, POLICY, name) == close(at_reference)


@pytest.mark.parametrize(
    ("name", "label_smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.201413277983),  # log(1 + e^-1.5)
        ("sigmoid", 0.2, 0.501413277983),  # e adds e z = 0.3
        ("hinge", 0.0, 0.0),  # relu(1 - 1.5)
        ("ipo", 0.0, 2.25),  # (1/2 - -2/1 - 1)^2
        # s = sigmoid(1.5) = 0.817574476: s (-0.201413278 - log 0.9) + (1 - s) (-1.701413278 - log 0.1)
        ("exo_pair", 0.1, 0.031138796406),
        # log(1 + e^-.5) = 0.474076984; half of log(1 + e^.5) = 0.974076984; half of log(1 + e^-1) = 0.313261688
        ("nca_pair", 0.0, 1.117746320032),
        ("robust", 0.2, -0.298586722017),  # (0.8 * 0.201413278 - 0.2 * 1.701413278) / 0.6
        ("bco_pair", 0.0, 0.787338671697),  # 0.474076984 + 0.313261688
        ("sppo_hard", 0.0, 1.0),  # (1 - 1)^2 + (-2 + 1)^2
        ("apo_zero", 0.0, 0.646482090319),  # 1 - sigmoid(0.5) + sigmoid(-1) = 1 - 0.622459331 + 0.268941421
        ("apo_down", 0.0, 0.804884855008),  # sigmoid(0.5) + 1 - sigmoid(1.5) = 0.622459331 + 1 - 0.817574476
        ("sigmoid_norm", 0.0, 0.251929081345),  # log(1 + e^-(0.5 * 2.5)) = log(1 + 0.286504797)
        ("discopop", 0.0, 0.223130160148),  # s = sigmoid(30) = 1 - 1e-13: e^-1.5
        ("aot", 0.0, 0.201413277983),  # with one pair the sigmoid loss
        ("aot_unpaired", 0.2, 0.501413277983),
        ("sft", 0.0, 1.0),  # (0.5 + 1.5) / 2
    ],
)
def test_dpo_types_by_hand(name: str, label_smoothing: float, expected: float):
    """delta_c = 1 over 2 tokens, delta_r = -2 over 1, beta 0.5: z = 1.5, R_c = 0.5, R_r = -1, 1 / (2 beta) = 1;
    the sum of a case stands beside it.
    """
    assert dpo(POLICY, REFERENCE, name, label_smoothing=label_smoothing) == close(expected)


def test_dpo_hinge_and_discopop_inside_their_margins():
    """z = 0.5: relu(1 - 0.5). discopop with tau 1: s = sigmoid(0.5) = 0.622459331,
    (1 - s) 0.474076984 + s e^-0.5 = 0.178983341 + 0.377540669.
    """
    reference = [(tokens(-3.0), tokens(-3.0))]
    assert dpo(HINGE_PAIR, reference, "hinge") == close(0.5)
    assert dpo(HINGE_PAIR, reference, "discopop", discopop_tau=1.0) == close(0.556524010)


def test_dpo_discopop_far_on_the_wrong_side_does_not_overflow():
    """z = -50, tau 0.05: s = e^-1000, so the logistic loss 50 and s e^50 = 0."""
    assert dpo([(tokens(-100.0), tokens(0.0))], [(tokens(0.0), tokens(0.0))], "discopop") == close(50.0)


def test_dpo_averages_over_pairs_and_adds_nll_over_tokens_once():
    """z 1.5 and 0: (0.201413278 + 0.693147181) / 2 = 0.447280229, hinge (0 + 1) / 2. NLL of 3 tokens: (2 + 7) / 3.
    2 * 0.447280229 + 0.5 * 0.5 + 0.1 * 3 = 1.444560459.
    """
    policy = [*POLICY, (tokens(-7.0), tokens(-1.0))]
    reference = [*REFERENCE, policy[1]]
    both = dpo(policy, reference, "sigmoid", "hinge", loss_weights=[2.0, 0.5], rpo_alpha=0.1)
    assert both == close(1.444560459)


@pytest.mark.parametrize(
    ("kind", "alpha", "name", "expected"),
    [
        ("forward_kl", 1.0, "sigmoid", 0.029441640419),
        ("js", 1.0, "sigmoid", 0.339183538932),
        ("alpha", 0.5, "sigmoid", 0.114244198312),
        ("alpha", 1.0, "sigmoid", 0.201413277983),
        ("forward_kl", 1.0, "discopop", 0.029879330392),
    ],
)
def test_dpo_f_divergences_by_hand(kind: str, alpha: float, name: str, expected: float):
    """forward_kl: h = -e^-1 + e^2 = 7.021176658, log(1 + e^-3.510588329).
    js: h = -0.313261688 + 2.126928011 = 1.813666323, log(1 + e^-0.906833162).
    alpha 0.5: (e^-0.5 - e^1) / -0.5 = 4.223502337, log(1 + e^-2.111751169); alpha 1: h = 3 as ever.
    discopop at tau 0.05: sigmoid(70.2) is 1, so e^-3.510588329.
    """
    value = dpo(POLICY, REFERENCE, name, f_divergence_type=kind, f_alpha_divergence_coef=alpha)
    assert value == close(expected)


def test_dpo_f_divergence_exponents_stop_at_80():
    """delta_c = 0 and delta_r = -100: -1 + e^80 under forward_kl, not e^100; hinge of -z is 1 + 0.5 (e^80 - 1)."""
    policy, reference = [(tokens(-100.0), tokens(-1.0))], [(tokens(0.0), tokens(-1.0))]
    assert dpo(policy, reference, "hinge", f_divergence_type="forward_kl") == close(0.5 + 0.5 * np.exp(80.0))


def test_dpo_ld_alpha_weighs_only_the_tokens_beyond_the_shorter():
    """Shorter: 1 token. Chosen -0.5 + 0.2 * -1.5 = -0.8, reference -1 + 0.2 * -2 = -1.4: delta_c = 0.6, h = 2.6,
    log(1 + e^-1.3) = 0.241008454; ipo keeps the length 2: (0.3 + 2 - 1)^2 = 1.69; the NLL keeps every token: 1.
    """
    assert dpo(POLICY, REFERENCE, "sigmoid", ld_alpha=0.2) == close(0.241008453833)
    assert dpo(POLICY, REFERENCE, "ipo", ld_alpha=0.2) == close(1.69)
    assert dpo(POLICY, REFERENCE, "sft", ld_alpha=0.2) == close(1.0)
    assert dpo(POLICY, REFERENCE, "sigmoid", ld_alpha=1.0) == close(0.201413277983)


# Two pairs of one token each. logp_c - logp_r: 2 and -1; ref_c - ref_r: -1 and 1; delta_c: 1, 0; delta_r: -2, 2.
AOT_POLICY = [(tokens(-1.0), tokens(-3.0)), (tokens(-2.0), tokens(-1.0))]
AOT_REFERENCE = [(tokens(-2.0), tokens(-1.0)), (tokens(-2.0), tokens(-3.0))]


def test_dpo_aot_by_hand():
    """Sorted -1, 2 against -1, 1: gaps 0 and 1, z 0 and 0.5: (0.693147181 + 0.474076984) / 2.
    Unsorted the gaps would be 3 and -2.
    """
    assert dpo(AOT_POLICY, AOT_REFERENCE, "aot") == close(0.583612082370)


def test_dpo_aot_unpaired_by_hand():
    """Sorted 0, 1 against -2, 2: gaps 2 and -1, z 1 and -0.5: (0.313261688 + 0.974076984) / 2."""
    assert dpo(AOT_POLICY, AOT_REFERENCE, "aot_unpaired") == close(0.643669335848)


def test_aot_ties_rank_by_example_index():
    """Policy gaps tie at 0, reference gaps are 2 and 1: the lower index has the lower rank and so takes reference 1."""
    policy = [(tokens(-1.0), tokens(-1.0)), (tokens(-2.0), tokens(-2.0))]
    reference = [(tokens(-1.0), tokens(-3.0)), (tokens(-1.0), tokens(-2.0))]
    assert oracle.aot_partners(policy, reference, order=[0, 1], ld_alpha=None)["aot"] == [1, 0]
    assert oracle.aot_partners(policy, reference, order=[7, 3], ld_alpha=None)["aot"] == [0, 1]


def test_aot_pairing_can_be_held_still():
    """Held in file order the gaps are 3 and -2, z 1.5 and -1: (0.201413278 + 1.313261688) / 2."""
    assert dpo(AOT_POLICY, AOT_REFERENCE, "aot", partners={"aot": [0, 1]}) == close(0.757337482751)


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        (["dppo"], {}, "loss_type must be one of .*, got 'dppo'"),
        (["sigmoid", "hinge"], {"label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type 'hinge', got 0.1"),
        (["exo_pair"], {}, "label_smoothing must be above 0 with loss_type 'exo_pair', got 0"),
        (["robust"], {"label_smoothing": 0.5}, "label_smoothing must be below 0.5 with loss_type 'robust', got 0.5"),
        (["ipo"], {"f_divergence_type": "js"}, "f_divergence_type must be reverse_kl with loss_type 'ipo', got 'js'"),
        (["sigmoid"], {"f_divergence_type": "kl"}, "f_divergence_type must be reverse_kl, .* or alpha, got 'kl'"),
        (["sft"], {"rpo_alpha": 1.0}, "rpo_alpha must be 0 with loss_type 'sft', .* got 1.0"),
    ],
)
def test_dpo_refuses(names: list[str], options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        dpo(POLICY, REFERENCE, *names, **options)


def test_the_others_refuse():
    options = {"beta": 0.5, "cpo_alpha": 0.0}
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with loss_type 'hinge', got 0\.1"):
        oracle.cpo(POLICY, label_smoothing=0.1, loss_type="hinge", **options)
    with pytest.raises(ValueError, match=r"loss_type must be one of .*, got 'simpo'"):
        oracle.cpo(POLICY, label_smoothing=0.0, loss_type="simpo", **options)
    with pytest.raises(ValueError, match="loss_type must be 'kto' or 'apo_zero_unpaired', got 'bco'"):
        kto([True, False], "bco")
    with pytest.raises(ValueError, match="at least two prompts, got 1"):
        oracle.kto_shift(["a"])
