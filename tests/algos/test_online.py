"""The algorithms that sample, by every switch: loss and gradient are the float64 oracle's, in float32 and float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle_online as oracle
import pytest
from fakes import CPU, Array, divided, flat, precision
from recorded import END, LIMITS, SECOND_END, Played, Plays, apart, played, prepared_from, prompts, tensor

from dsalign import algos
from dsalign.contract.groups import Group, Output
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.packing import cut

MOST = 6  # tokens of a completion
ANSWERS = (
    ((5, 0, 5, END), (END,), (9, 9, 9, 9, 9, 9)),
    ((0,), (9, SECOND_END), (8, 8, 8, 8, END)),
    ((4, 4), (3, END), (END,)),
)
SCORES = ((1.0, -0.5, 2.25), (3.0, 3.0, 0.5), (-1.0, -1.0, -1.0))  # the last prompt has a tie and so no pair
PLAYS = {
    i: [played(ids, 7 * i + j, score) for j, (ids, score) in enumerate(zip(*row, strict=True))]
    for i, row in enumerate(zip(ANSWERS, SCORES, strict=True))
}


def moved(p: Played) -> Array:
    """Log-probabilities after some steps: ratios from 0.4 to 2.7."""
    return p.old + np.random.default_rng([99, *p.ids]).integers(-256, 256, len(p.ids), endpoint=True) / 256


def batch_of(plays: Plays, rollout: RolloutOptions, buffer: int = 0) -> list[list[oracle.Answer]]:
    """The rollout as the oracle takes it."""
    shape = {"most": rollout.max_new_tokens, "buffer": buffer, "penalty": rollout.missing_eos_penalty}
    return [
        [
            oracle.Answer(moved(p), p.old, p.reference, oracle.shaped(p.score, len(p.ids), p.ended, **shape), p.ended)
            for p in plays[i]
        ]
        for i in sorted(plays)
    ]


def policy_of(groups: Sequence[Group], plays: Plays) -> Output:
    """What the policy gives for these groups, a leaf that gradients end in."""
    found = [moved(p) for g in groups for ids in g.completions for p in plays[g.index] if p.ids == ids]
    return Output(logps=tensor(flat([*found, np.empty(0)])).requires_grad_())


def check(
    algorithm: Any,
    loss: Callable[..., tuple[float, oracle.Slopes]],
    plays: Plays = PLAYS,
    penalty: float | None = None,
    cap: float | None = None,
    **switches: Any,
) -> None:
    """dsalign's loss of the whole step, and its slope a token, are those of the oracle's `loss`; with a `cap` each
    slope is that of the oracle times min(e^(old - sampler), cap)."""
    rollout = RolloutOptions(max_new_tokens=MOST, missing_eos_penalty=penalty, rollout_is_cap=cap)
    want, slopes = loss(batch_of(plays, rollout, getattr(algorithm, "overlong_buffer", 0)), **switches)
    if cap:
        weights = [[np.minimum(np.exp(p.old - p.sampler), cap) for p in plays[i]] for i in sorted(plays)]
        slopes = [[w * s for w, s in zip(*each, strict=True)] for each in zip(weights, slopes, strict=True)]
    for dtype, limit in LIMITS:
        with precision(dtype):
            ((prepared, _),) = prepared_from(algorithm, plays, given=prompts(len(plays)), rollout=rollout)
            out = policy_of(prepared.groups, plays)
            total = divided(algorithm, "policy", out, cut(prepared, range(len(prepared.groups)), CPU))
            total.backward()
        assert total.dtype == dtype and out.logps is not None and out.logps.grad is not None
        assert float(total.detach()) == pytest.approx(want, rel=limit, abs=limit / 10)  # terms of both signs, near 1
        sampled = {(i, p.ids): s for i in plays for p, s in zip(plays[i], slopes[i], strict=True)}
        there = [sampled.pop((g.index, ids)) for g in prepared.groups for ids in g.completions]
        assert apart(out.logps.grad.double().numpy(), flat(there)) <= limit
        assert not any(s.any() for s in sampled.values())  # what was dropped has no slope


GRPO: list[dict[str, Any]] = [
    {},
    {"beta": 0.0},
    *({"beta": 0.5, "kl_estimator": kind} for kind in ("k1", "k2", "k3")),
    {"epsilon": 0.1, "epsilon_high": 0.28},
    {"epsilon": 1.0, "epsilon_high": 3.0, "beta": 0.0},
    {"loss_norm": "token"},
    {"loss_norm": "constant"},
    {"scale_rewards": False},
    *({"mask_truncated": True, "loss_norm": norm} for norm in ("sequence", "token", "constant")),
    {"overlong_buffer": 4},
    {"beta": 0.0, "loss_norm": "constant", "scale_rewards": False},  # Dr. GRPO
    {"beta": 0.0, "epsilon_high": 0.28, "loss_norm": "token", "overlong_buffer": 2, "mask_truncated": True},  # DAPO
]


@pytest.mark.parametrize("options", GRPO, ids=str)
def test_grpo(options: dict[str, Any]) -> None:
    switches = {name: value for name, value in options.items() if name != "overlong_buffer"}
    check(algos.load("grpo")(num_generations=3, **options), oracle.grpo, most=MOST, **switches)


def test_grpo_with_a_missing_end_that_is_paid_for() -> None:
    """The penalty and the overlong punishment add: six nines of six tokens lose 1.5 and 1."""
    check(algos.load("grpo")(num_generations=3, overlong_buffer=3), oracle.grpo, penalty=1.5, most=MOST)


RATIOS: list[dict[str, Any]] = [
    {},
    {"kl_coef": 0.0},
    {"kl_coef": 0.5, "kl_estimator": "k3"},
    {"cliprange": 0.05},
    {"cliprange": 0.9, "kl_coef": 0.3},
]


@pytest.mark.parametrize("options", RATIOS, ids=str)
def test_rloo(options: dict[str, Any]) -> None:
    check(algos.load("rloo")(num_generations=3, **options), oracle.rloo, **options)


@pytest.mark.parametrize("options", RATIOS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_reinforce(count: int, options: dict[str, Any]) -> None:
    plays = {i: PLAYS[i][:count] for i in PLAYS}
    check(algos.load("reinforce")(num_generations=count, **options), oracle.reinforce, plays, **options)


def drifted(p: Played) -> Played:
    """The same completion by a sampler whose log-probabilities are up to half a nat off."""
    gaps = np.random.default_rng([7, *p.ids]).integers(-128, 128, len(p.ids), endpoint=True) / 256
    return replace(p, sampler=p.old - gaps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"most": MOST, "beta": 0.5}),
        ("grpo", {"most": MOST, "loss_norm": "token", "mask_truncated": True}),
        ("rloo", {}),
        ("reinforce", {}),
    ],
    ids=str,
)
def test_importance_weights(name: str, options: dict[str, Any]) -> None:
    """Each token has its own, also in RLOO, whose ratio is that of a whole completion; the loss is the one without."""
    plays = {i: [drifted(p) for p in PLAYS[i]] for i in PLAYS}
    gaps = np.concatenate([p.old - p.sampler for each in plays.values() for p in each])
    assert 0 < (gaps > np.log(1.25)).mean() < 0.5
    fields = {key: value for key, value in options.items() if key != "most"}
    check(algos.load(name)(num_generations=3, **fields), getattr(oracle, name), plays, cap=1.25, **options)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("count", [2, 3])
def test_online_dpo(count: int, loss_type: str, beta: float) -> None:
    """Of two answers the second prompt has a tie as well."""
    plays, options = {i: PLAYS[i][:count] for i in PLAYS}, {"beta": beta, "loss_type": loss_type}
    check(algos.load("online_dpo")(num_generations=count, **options), oracle.online_dpo, plays, **options)


@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        ("grpo", {}, True),
        ("grpo", {"beta": 0.0}, False),
        *((name, {"kl_coef": coef}, coef > 0) for name in ("rloo", "reinforce") for coef in (0.0, 0.1)),
        ("online_dpo", {}, True),
    ],
)
def test_no_reference_is_asked_where_its_weight_is_0(name: str, options: dict[str, float], asked: bool) -> None:
    algorithm = algos.load(name)(num_generations=2, **options)
    ((_, ctx),) = prepared_from(algorithm)
    assert ("reference" in algorithm.traits.roles, "reference" in [role for role, _ in ctx.asked]) == (asked, asked)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce", "online_dpo"])
def test_a_batch_without_signal_teaches_nothing(name: str) -> None:
    """Equal scores of 1000.1, which float32 adds up with roundings: no slope at all, without a KL."""
    plays = {i: [replace(p, score=1000.1, reference=p.old) for p in PLAYS[i]] for i in PLAYS}
    algorithm = algos.load(name)(**{"num_generations": 3, **({"beta": 0.0} if name == "grpo" else {})})
    ((prepared, _),) = prepared_from(algorithm, plays, given=prompts(len(plays)))
    out = policy_of(prepared.groups, plays)
    total = divided(algorithm, "policy", out, cut(prepared, range(len(prepared.groups)), CPU))
    (total + 0.0 * out.logps.sum()).backward()
    assert out.logps.grad.abs().sum() == 0.0
    assert len(prepared.groups) == (0 if name == "online_dpo" else 3)
