"""What the algorithms refuse, by the text of each message; and the values at the edges that they take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dsalign import algos

POSITIVE = "expected a number > 0, got"
NOT_NEGATIVE = "expected a number >= 0, got"
LOSSES = (
    "sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, sigmoid_norm, discopop, "
    "aot, aot_unpaired, sft"
)
AT_LEAST_0: dict[str, tuple[str, ...]] = {
    "ppo": ("kl_coef", "vf_coef"),
    "grpo": ("beta", "dynamic_sampling", "overlong_buffer"),
    "rloo": ("kl_coef",),
    "reinforce": ("kl_coef",),
}
ABOVE_0: dict[str, tuple[str, ...]] = {
    "ppo": ("cliprange", "cliprange_value", "critic_learning_rate"),
    "grpo": ("epsilon_high",),
    "rloo": ("cliprange",),
    "reinforce": ("cliprange",),
}
AT_LEAST_1: dict[str, tuple[str, ...]] = {
    "ppo": ("num_ppo_epochs", "num_mini_batches", "num_generations"),
    "grpo": ("num_iterations", "num_mini_batches"),
    "rloo": ("num_iterations", "num_mini_batches"),
    "reinforce": ("num_iterations", "num_mini_batches", "num_generations"),
    "online_dpo": ("num_mini_batches",),
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"beta": 0.0}, f"beta: {POSITIVE} 0.0") for name in ("dpo", "kto", "cpo", "orpo", "simpo", "online_dpo")),
    *(
        (name, {"beta": math.nan}, f"beta: {POSITIVE} nan")
        for name in ("dpo", "kto", "cpo", "orpo", "simpo", "online_dpo")
    ),
    ("rm", {"center_rewards_coefficient": -0.1}, f"center_rewards_coefficient: {NOT_NEGATIVE} -0.1"),
    ("dpo", {"rpo_alpha": -1.0}, f"rpo_alpha: {NOT_NEGATIVE} -1.0"),
    ("dpo", {"ld_alpha": 1.5}, "ld_alpha: expected a number >= 0 and <= 1, got 1.5"),
    ("dpo", {"ld_alpha": -0.5}, "ld_alpha: expected a number >= 0 and <= 1, got -0.5"),
    ("dpo", {"discopop_tau": 0.0}, f"discopop_tau: {POSITIVE} 0.0"),
    (
        "dpo",
        {"f_divergence_type": "kl"},
        "f_divergence_type: expected one of reverse_kl, forward_kl, js, alpha, got 'kl'",
    ),
    ("dpo", {"loss_type": ()}, f"loss_type: expected one or several of {LOSSES}, got none"),
    ("dpo", {"loss_type": ("sigmoid", "aot_pear")}, f"loss_type: expected one of {LOSSES}, got 'aot_pear'"),
    (
        "dpo",
        {"loss_type": ("aot_pair", "aot_unpaired")},
        "loss_type: each loss once, got aot_unpaired aot_unpaired; use loss_weights",
    ),
    ("dpo", {"loss_type": ("ipo", "ipo")}, "loss_type: each loss once, got ipo ipo; use loss_weights"),
    ("dpo", {"loss_weights": (1.0, 2.0)}, "loss_weights: expected one for each of the 1 loss types, got 2"),
    ("dpo", {"label_smoothing": 0.5}, "label_smoothing: expected a number >= 0 and < 0.5, got 0.5"),
    ("dpo", {"label_smoothing": -0.1}, "label_smoothing: expected a number >= 0 and < 0.5, got -0.1"),
    (
        "dpo",
        {"label_smoothing": 0.1, "loss_type": ("sigmoid", "hinge", "ipo")},
        "label_smoothing: loss_type hinge, ipo has no label smoothing; set it to 0",
    ),
    (
        "dpo",
        {"loss_type": ("exo_pair",)},
        "label_smoothing: loss_type exo_pair needs a number > 0 (its label has log eps), got 0.0",
    ),
    (
        "dpo",
        {"loss_type": ("sft",)},
        "loss_type sft and rpo_alpha > 0 both add NLL(chosen); keep one, with --rpo_alpha 0",
    ),
    (
        "dpo",
        {"f_divergence_type": "js", "loss_type": ("sigmoid", "ipo", "aot")},
        "f_divergence_type: js is not defined for loss_type aot, ipo; leave it out, or take another loss_type",
    ),
    *(
        (
            "dpo",
            {"ld_alpha": 0.5, "loss_type": given},
            f"ld_alpha: expected 1 with loss_type {said}, which divides by length already, got 0.5; set it to 1 or "
            "choose another loss_type",
        )
        for given, said in (
            (("ipo",), "ipo"),
            (("hinge", "sigmoid_norm"), "sigmoid_norm"),
            (("sigmoid_norm", "ipo"), "ipo, sigmoid_norm"),
        )
    ),
    ("kto", {"desirable_weight": -1.0}, f"desirable_weight: {NOT_NEGATIVE} -1.0"),
    ("kto", {"undesirable_weight": -1.0}, f"undesirable_weight: {NOT_NEGATIVE} -1.0"),
    ("kto", {"loss_type": "sigmoid"}, "loss_type: expected one of kto, apo_zero_unpaired, got 'sigmoid'"),
    ("cpo", {"cpo_alpha": -1.0}, f"cpo_alpha: {NOT_NEGATIVE} -1.0"),
    ("cpo", {"label_smoothing": 0.6}, "label_smoothing: expected a number >= 0 and <= 0.5, got 0.6"),
    ("cpo", {"loss_type": "simpo"}, "loss_type: expected one of sigmoid, hinge, ipo, got 'simpo'"),
    (
        "cpo",
        {"loss_type": "hinge", "label_smoothing": 0.1},
        "label_smoothing: loss_type hinge has no label smoothing; set it to 0",
    ),
    ("simpo", {"simpo_gamma": -1.0}, f"simpo_gamma: {NOT_NEGATIVE} -1.0"),
    ("simpo", {"cpo_alpha": -1.0}, f"cpo_alpha: {NOT_NEGATIVE} -1.0"),
    ("simpo", {"label_smoothing": 0.6}, "label_smoothing: expected a number >= 0 and <= 0.5, got 0.6"),
    *((name, {field: -1}, f"{field}: {NOT_NEGATIVE} -1") for name, fields in AT_LEAST_0.items() for field in fields),
    *((name, {field: 0.0}, f"{field}: {POSITIVE} 0.0") for name, fields in ABOVE_0.items() for field in fields),
    *((name, {field: math.nan}, f"{field}: {POSITIVE} nan") for name, fields in ABOVE_0.items() for field in fields),
    *(
        (name, {field: 0}, f"{field}: expected a number >= 1, got 0")
        for name, fields in AT_LEAST_1.items()
        for field in fields
    ),
    *(
        (name, {"num_generations": 1}, "num_generations: expected a number >= 2, got 1")
        for name in ("grpo", "rloo", "online_dpo")
    ),
    *(
        (name, {"kl_estimator": "k2"}, "kl_estimator: expected one of k1, k3, got 'k2'")
        for name in ("ppo", "rloo", "reinforce")
    ),
    *(
        ("ppo", {name: value}, f"{name}: expected a number >= 0 and <= 1, got {value}")
        for name in ("gamma", "lam")
        for value in (1.5, -0.5)
    ),
    *(("grpo", {"epsilon": x}, f"epsilon: expected a number > 0 and <= 1, got {x}") for x in (0.0, 1.5)),
    ("grpo", {"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
    ("grpo", {"loss_norm": "group"}, "loss_norm: expected one of sequence, token, constant, got 'group'"),
    ("online_dpo", {"loss_type": "robust"}, "loss_type: expected one of sigmoid, ipo, hinge, got 'robust'"),
]


@pytest.mark.parametrize(
    ("name", "options", "text"), REFUSED, ids=lambda x: str(x) if isinstance(x, (str, dict)) else ""
)
def test_refused(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        algos.load(name)(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize(
    "loss_type",
    [
        "aot", "aot_unpaired", "apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard", "sft", "ipo", "sigmoid_norm"
    ],
)  # fmt: skip
def test_losses_that_know_reverse_kl_alone(loss_type: str, kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"f_divergence_type: {kind} is not defined for loss_type {loss_type}; leave it out"
    ):
        algos.load("dpo")(loss_type=(loss_type,), f_divergence_type=kind, rpo_alpha=0.0)


@pytest.mark.parametrize(
    "loss_type",
    ["hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "discopop", "sft"],
)
def test_losses_without_label_smoothing(loss_type: str) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing: loss_type {loss_type} has no label smoothing"):
        algos.load("dpo")(loss_type=(loss_type,), label_smoothing=0.1, rpo_alpha=0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rm", {"center_rewards_coefficient": 0.0}),
        ("dpo", {"rpo_alpha": 0.0, "ld_alpha": 0.0, "label_smoothing": 0.49, "loss_type": ("robust", "exo_pair")}),
        ("dpo", {"rpo_alpha": 0.0, "loss_type": ("sft", "hinge"), "loss_weights": (0.0, 1.0)}),
        ("kto", {"desirable_weight": 0.0, "undesirable_weight": 0.0}),
        ("cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.5}),
        ("simpo", {"simpo_gamma": 0.0, "cpo_alpha": 0.0, "label_smoothing": 0.5}),
        ("dpo", {"ld_alpha": 1.0, "loss_type": ("ipo", "sigmoid_norm")}),
        *((name, dict.fromkeys(fields, 0)) for name, fields in AT_LEAST_0.items()),
        *((name, dict.fromkeys(fields, 1)) for name, fields in AT_LEAST_1.items()),
        *((name, {"num_generations": 2}) for name in ("grpo", "rloo", "online_dpo")),
        ("ppo", {"gamma": 0.0, "lam": 1.0}),
        ("grpo", {"epsilon": 1.0}),
    ],
)
def test_values_at_the_edges_are_taken(name: str, options: dict[str, Any]) -> None:
    algorithm = algos.load(name)(**options)
    assert {field: getattr(algorithm, field) for field in options} == options


def test_aot_pair_is_read_as_aot_unpaired() -> None:
    """As ms-swift calls it; with its weight."""
    algorithm = algos.load("dpo")(loss_type=("sigmoid", "aot_pair"), loss_weights=(1.0, 0.5))
    assert algorithm == algos.load("dpo")(loss_type=("sigmoid", "aot_unpaired"), loss_weights=(1.0, 0.5))
    assert algorithm.weights == {"sigmoid": 1.0, "aot_unpaired": 0.5}


def test_no_algorithm_of_that_name() -> None:
    with pytest.raises(ValueError) as caught:
        algos.load("dpoo")
    assert str(caught.value) == ("algo: no algorithm is called 'dpoo'; choose one of " + ", ".join(algos.names()))
