"""Every loss and its gradient against the float64 oracle: in float32 to 1e-6, in float64 to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from fakes import CPU, Array, Drawn, Model, divided, flat, given, loss_and_gradient, pairs, precision
from support import random_groups

from dsalign import algos
from dsalign.algos import dpo
from dsalign.contract.groups import Group, Output
from dsalign.contract.maths import log1mexp
from dsalign.contract.preference_losses import BY_LENGTH, LOSSES, REVERSE_KL_ONLY, SMOOTHED
from dsalign.data.batches.packing import micro_batch

MODEL = Drawn()
FAR = Drawn(gap_low=-20.0, gap_high=20.0)  # rewards in the tails of the logistic function
PAIRS = random_groups("pairs", 4, seed=14, longest=5)  # ragged, with completions of one token
LABELS = random_groups("labels", 6, seed=6, longest=5)
DEMONSTRATIONS = random_groups("demonstrations", 4, seed=11, longest=5)


def apart(found: Array, want: Array) -> float:
    """|found - want| / |want|; 0 where both are 0."""
    gap, size = float(np.linalg.norm(found - want)), float(np.linalg.norm(want))
    return gap / size if size else gap


# dtype, limit of the value, limit of the gradient: that of float64 is what a numerical slope is good for
LIMITS = ((torch.float32, 1e-6, 1e-6), (torch.float64, 1e-12, 1e-8))


def check(algorithm: Any, groups: list[Group], model: Model, loss: Callable[[Any], float], policy: Any) -> None:
    """dsalign's value and gradient are those of `loss` at `policy`."""
    want, want_gradient = loss(policy), flat(oracle.gradient(loss, policy))
    for dtype, value_limit, limit in LIMITS:
        found, gradient, _ = loss_and_gradient(algorithm, groups, model, dtype)
        assert apart(np.array(found), np.array(want)) <= value_limit, (dtype, found, want)
        assert apart(gradient, want_gradient) <= limit, (dtype, gradient, want_gradient)


def test_the_batches_are_ragged_and_hold_completions_of_one_token() -> None:
    for groups in (PAIRS, LABELS, DEMONSTRATIONS):
        lengths = [len(c) for g in groups for c in g.completions]
        assert min(lengths) == 1 and len(set(lengths)) >= 3
    assert {g.label for g in LABELS} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_from_certain_to_impossible(dtype: torch.dtype) -> None:
    """Both branches, at their seam and where each alone would be infinite; the slope is -1 / (e^-x - 1)."""
    at = [-1e-10, -1e-5, -0.01, -0.69314718, -0.69314719, -2.0, -20.0, -80.0]
    x = torch.tensor(at, dtype=dtype, requires_grad=True)
    found = log1mexp(x)
    found.sum().backward()
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    exact = x.detach().double().numpy()  # what float32 makes of them
    assert found.tolist() == [pytest.approx(oracle.log1mexp(float(one)), rel=limit) for one in exact]
    assert x.grad.tolist() == [pytest.approx(-1 / np.expm1(-one), rel=limit) for one in exact]


def test_sft() -> None:
    policy = [x for g in DEMONSTRATIONS for x in given(MODEL, "policy", g)]
    check(algos.load("sft")(), DEMONSTRATIONS, MODEL, oracle.sft, policy)


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("margins", [(None,) * 4, (0.0, 0.5, -1.25, None)])
def test_rm(center: float, margins: tuple[float | None, ...]) -> None:
    """A score a completion."""
    groups = [replace(g, margin=m) for g, m in zip(PAIRS, margins, strict=True)]
    rng = np.random.default_rng(0)
    scores = [rng.integers(-512, 512, 2) / 256 for _ in groups]

    def loss(at: Any) -> float:
        return oracle.rm(np.array(at), np.array([m or 0.0 for m in margins]), center=center)

    want, want_gradient = loss(scores), np.concatenate(oracle.gradient(loss, scores))
    for dtype, value_limit, limit in LIMITS:
        with precision(dtype):
            leaf = torch.tensor(np.concatenate(scores)).to(dtype).requires_grad_()
            algorithm = algos.load("rm")(center_rewards_coefficient=center)
            found = divided(algorithm, "reward", Output(scores=leaf), micro_batch(groups, CPU))
            found.backward()
        assert apart(found.detach().numpy(), np.array(want)) <= value_limit
        assert apart(leaf.grad.double().numpy(), want_gradient) <= limit


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_cpo(loss_type: str, label_smoothing: float, cpo_alpha: float) -> None:
    options = {"beta": 0.1, "cpo_alpha": cpo_alpha, "loss_type": loss_type, "label_smoothing": label_smoothing}
    policy = pairs(MODEL, "policy", PAIRS)
    check(algos.load("cpo")(**options), PAIRS, MODEL, lambda p: oracle.cpo(p, **options), policy)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta: float) -> None:
    policy = pairs(MODEL, "policy", PAIRS)
    check(algos.load("orpo")(beta=beta), PAIRS, MODEL, lambda p: oracle.orpo(p, beta=beta), policy)


def test_orpo_close_to_certain_completions() -> None:
    """Means around -0.005: the branch of log(1 - e^a) for a near 0."""
    model = Drawn(low=-0.01, high=-0.002, grain=2.0**-12)
    policy = pairs(model, "policy", PAIRS)
    check(algos.load("orpo")(), PAIRS, model, lambda p: oracle.orpo(p, beta=0.1), policy)


@pytest.mark.parametrize("mean", [2.0**-10, 2.0**-16, 2.0**-22])
def test_orpo_still_closer_by_its_derivative(mean: float) -> None:
    """One token each, chosen -m and rejected -2m: d log_odds / da = 1 / (1 - e^a), -1/m at small m; numerical slopes
    do not exist so near to the clamp."""
    (group,) = random_groups("pairs", 1)
    group = replace(group, completions=((5,), (6,)))
    found, gradient, _ = loss_and_gradient(
        algos.load("orpo")(), [group], lambda r, p, c: np.array([-mean if c == (5,) else -2 * mean]), torch.float32
    )
    odds = oracle.log_odds(-mean) - oracle.log_odds(-2 * mean)
    assert found == pytest.approx(mean - 0.1 * oracle.logsigmoid(odds), rel=1e-6)
    slope = 0.1 * oracle.sigmoid(-odds)
    assert gradient[0] == pytest.approx(-1 + slope / np.expm1(-mean), rel=1e-6)
    assert gradient[1] == pytest.approx(-slope / np.expm1(-2 * mean), rel=1e-6)


def test_orpo_of_certain_completions_is_finite() -> None:
    """Means of exactly 0 are held at -2^-24: equal odds give 0.1 log 2, and of the gradient only NLL's -1 is left."""
    (group,) = random_groups("pairs", 1)
    group = replace(group, completions=((5,), (6,)))
    found, gradient, _ = loss_and_gradient(algos.load("orpo")(), [group], lambda r, p, c: np.zeros(1), torch.float32)
    assert found == pytest.approx(0.1 * np.log(2), rel=1e-6)
    assert gradient.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
@pytest.mark.parametrize(("beta", "simpo_gamma"), [(2.0, 1.0), (2.5, 0.0)])
def test_simpo(beta: float, simpo_gamma: float, cpo_alpha: float, label_smoothing: float) -> None:
    options = {
        "beta": beta,
        "simpo_gamma": simpo_gamma,
        "cpo_alpha": cpo_alpha,
        "label_smoothing": label_smoothing,
    }
    policy = pairs(MODEL, "policy", PAIRS)
    check(algos.load("simpo")(**options), PAIRS, MODEL, lambda p: oracle.simpo(p, **options), policy)


RISING = Drawn(gap_low=-0.25, gap_high=0.5)  # the policy likes most completions more than the reference does: z0 > 0
FALLING = Drawn(gap_low=-0.5, gap_high=0.25)  # z0 = 0


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
@pytest.mark.parametrize("labels", ["both", "desirable", "undesirable"])
@pytest.mark.parametrize("model", [RISING, FALLING], ids=["rising", "falling"])
def test_kto(loss_type: str, weights: tuple[float, float], labels: str, model: Drawn) -> None:
    groups = [g if labels == "both" else replace(g, label=labels == "desirable") for g in LABELS]
    shift, n = oracle.kto_shift([g.prompt_text for g in groups]), len(groups)
    mixed = [(groups[i].prompt, groups[(i + shift) % n].completions[0]) for i in range(n)]
    mismatched = [[model(role, *one) for one in mixed] for role in ("policy", "reference")]
    z0 = oracle.kto_z0(*mismatched)
    assert (z0 > 0) == (model is RISING)
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1], "beta": 0.25, "loss_type": loss_type}
    policy, reference = ([x for g in groups for x in given(model, role, g)] for role in ("policy", "reference"))

    def loss(at: Any) -> float:
        return oracle.kto(at, reference, [bool(g.label) for g in groups], *mismatched, z0=z0, **options)

    check(algos.load("kto")(**options), groups, model, loss, policy)
    _, _, prepared = loss_and_gradient(algos.load("kto")(**options), groups, model, torch.float64)
    assert prepared.shared == ({} if loss_type == "apo_zero_unpaired" else {"z0": pytest.approx(z0, rel=1e-14)})


def check_dpo(model: Model, *loss_type: str, **options: Any) -> None:
    """DPO with these settings, beta 0.5 and rpo_alpha 0.3 unless said otherwise; smoothed where the type needs it."""
    own = {
        "beta": 0.5,
        "loss_type": loss_type,
        "loss_weights": tuple(1.0 for _ in loss_type),
        "label_smoothing": 0.1 if "exo_pair" in loss_type else 0.0,
        "rpo_alpha": 0.0 if "sft" in loss_type else 0.3,
        "ld_alpha": 1.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 1.0,
        "discopop_tau": 0.05,
        **options,
    }
    policy, reference = pairs(model, "policy", PAIRS), pairs(model, "reference", PAIRS)
    order = [g.index for g in PAIRS]
    still = oracle.aot_partners(policy, reference, order=order, ld_alpha=own["ld_alpha"])  # constants of the step

    def loss(at: Any) -> float:
        return oracle.dpo(at, reference, order=order, partners=still, **own)

    check(dpo.DPO(**own), PAIRS, model, loss, policy)


def test_the_two_implementations_know_the_same_losses() -> None:
    assert set(LOSSES) == set(oracle.DPO_LOSS_TYPES)
    assert SMOOTHED == oracle.USES_SMOOTHING
    assert REVERSE_KL_ONLY == oracle.REFUSES_DIVERGENCE
    assert BY_LENGTH == oracle.BY_LENGTH


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo(loss_type: str, beta: float) -> None:
    check_dpo(MODEL, loss_type, beta=beta)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo_in_the_tails(loss_type: str) -> None:
    """Rewards of up to 30 either way."""
    check_dpo(FAR, loss_type)


@pytest.mark.parametrize("rpo_alpha", [0.0, 1.0])
@pytest.mark.parametrize("loss_type", [t for t in LOSSES if t != "sft"])
def test_dpo_with_and_without_the_nll_of_the_chosen(loss_type: str, rpo_alpha: float) -> None:
    check_dpo(MODEL, loss_type, rpo_alpha=rpo_alpha)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
@pytest.mark.parametrize("loss_type", sorted(SMOOTHED))
def test_dpo_with_label_smoothing(loss_type: str, label_smoothing: float) -> None:
    check_dpo(MODEL, loss_type, label_smoothing=label_smoothing)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", [t for t in LOSSES if t not in BY_LENGTH])
def test_dpo_with_tokens_beyond_the_shorter_length_weighed(loss_type: str, ld_alpha: float) -> None:
    check_dpo(MODEL, loss_type, ld_alpha=ld_alpha)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha 0.5", "alpha 1", "alpha 2"])
@pytest.mark.parametrize("loss_type", [t for t in LOSSES if t not in REVERSE_KL_ONLY])
def test_dpo_with_an_f_divergence(loss_type: str, kind: str) -> None:
    name, _, coefficient = kind.partition(" ")
    options = {"f_divergence_type": name, "f_alpha_divergence_coef": float(coefficient or 1.0)}
    check_dpo(MODEL, loss_type, discopop_tau=0.25, **options)  # beta / tau times the rounding of e^Delta stays small


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        (("sigmoid", "ipo", "sppo_hard"), {"loss_weights": (0.5, 2.0, 0.125)}),
        (("sigmoid", "bco_pair", "sft"), {"loss_weights": (0.8, 0.2, 1.5)}),
        (("aot", "robust", "aot_unpaired"), {"loss_weights": (1.0, 0.25, 3.0), "label_smoothing": 0.2}),
        (("hinge", "discopop"), {"loss_weights": (1.0, 0.5), "ld_alpha": 0.5, "f_divergence_type": "js"}),
        (("apo_zero", "apo_down"), {}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_dpo_of_several_losses(loss_type: tuple[str, ...], options: dict[str, Any]) -> None:
    """The weighted sum; rpo_alpha NLL(chosen) is added once, and the weight of sft is that of its NLL."""
    check_dpo(MODEL, *loss_type, **options)
