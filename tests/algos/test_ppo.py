"""PPO without networks: rollouts from a table on one, two and three ranks, its numbers against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import oracle_ppo as oracle
import pytest
import torch
from fakes import CPU, Array, divided, flat, metrics_of, precision
from recorded import (
    END,
    LIMITS,
    PLAYS,
    PROMPTS,
    RAGGED,
    SECOND_END,
    Played,
    all_played,
    apart,
    field,
    means,
    prepared_from,
    tensor,
)

from dsalign.algos.ppo import PPO
from dsalign.contract.algorithm import loss_of
from dsalign.contract.groups import Output, Prepared
from dsalign.contract.importance import WEIGHTS
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.packing import cut, micro_batch


def algorithm(**options: Any) -> PPO:
    """PPO with two completions a prompt."""
    return PPO(**{"num_generations": 2, **options})


SETTINGS: list[tuple[dict[str, Any], float | None]] = [  # options, missing_eos_penalty
    ({}, None),
    ({"kl_estimator": "k3", "kl_coef": 0.5}, None),
    ({"whiten_rewards": True, "gamma": 0.9, "lam": 0.5}, None),
    ({"lam": 1.0, "whiten_rewards": True, "kl_estimator": "k3"}, 1.5),
    ({"kl_coef": 0.0, "gamma": 0.0, "lam": 0.0}, 0.0),
]
each_setting = pytest.mark.parametrize(("options", "penalty"), SETTINGS, ids=str)


def paying(penalty: float | None) -> RolloutOptions:
    return RolloutOptions(max_new_tokens=5, missing_eos_penalty=penalty)


def penalised(plays: Sequence[Played], penalty: float | None) -> Array:
    return oracle.penalised(np.array([p.score for p in plays]), [p.ended for p in plays], penalty)


def wanted(ppo: PPO, plays: Sequence[Played], penalty: float | None) -> tuple[Array, Array]:
    """(advantages, returns) by the oracle."""
    advantages, returns = oracle.prepare(
        [p.old for p in plays],
        [p.reference for p in plays],
        [p.values[:-1] for p in plays],
        penalised(plays, penalty),
        kl_coef=ppo.kl_coef,
        kl_estimator=ppo.kl_estimator,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten_rewards=ppo.whiten_rewards,
    )
    return flat(advantages), flat(returns)


@each_setting
@pytest.mark.parametrize("world", [1, 2, 3])
def test_prepare_is_the_oracles_on_any_number_of_ranks(
    world: int, options: dict[str, Any], penalty: float | None
) -> None:
    ppo, plays = algorithm(**options), all_played()
    for dtype, limit in LIMITS:
        with precision(dtype):
            found = prepared_from(ppo, world=world, rollout=paying(penalty))
        advantages, returns = wanted(ppo, plays, penalty)
        assert apart(field(found, "advantages"), advantages) <= limit
        assert apart(field(found, "returns"), returns) <= limit
        assert field(found, "old").tolist() == flat([p.old for p in plays]).tolist()
        assert field(found, "values").tolist() == flat([p.values[:-1] for p in plays]).tolist()
        assert all(x.dtype == dtype for p, _ in found for tensors in p.fields.values() for x in tensors)


@each_setting
@pytest.mark.parametrize("world", [1, 3])
def test_metrics_of_a_rollout(world: int, options: dict[str, Any], penalty: float | None) -> None:
    """Five of eight completions have an end token; the scores are those after the penalty and before whitening."""
    ppo, plays = algorithm(**options), all_played()
    want = oracle.metrics(
        [p.old for p in plays],
        [p.reference for p in plays],
        penalised(plays, penalty),
        [],
        kl_coef=ppo.kl_coef,
        kl_estimator=ppo.kl_estimator,
        cliprange=ppo.cliprange,
        cliprange_value=ppo.cliprange_value,
    )
    found = means(prepared_from(ppo, world=world, rollout=paying(penalty)))
    counted = {"val/num_eos_tokens": 5, "episode": 8, "rollout/logp_gap": 0, "rollout/length": 22 / 8}
    assert found == pytest.approx({**want, **counted}, rel=1e-6, abs=1e-7)


def test_the_reward_is_on_the_last_valid_token() -> None:
    """Without KL, values and decay the return of each token is the score that is still to come; with lam 0 and
    gamma 0 it is the reward of that token alone."""
    plays = {
        0: [replace(p, values=np.zeros(len(p.ids) + 1), score=s) for p, s in zip(PLAYS[0], (3.0, -1.0), strict=True)]
    }
    for options, want in (
        ({"gamma": 1.0, "lam": 1.0}, [3.0, 3.0, 3.0, 3.0, -1.0]),
        ({"gamma": 0.0, "lam": 0.0}, [0.0, 0.0, 0.0, 3.0, -1.0]),
    ):
        found = prepared_from(algorithm(kl_coef=0.0, **options), plays, given=PROMPTS[:1])
        assert field(found, "returns").tolist() == want


def test_the_missing_end_is_paid_for_by_completions_without_one() -> None:
    """Of RAGGED these are (0,), the five eights and (6, 0); both end ids count as ends, 0 does not."""
    plays = {i: [replace(p, score=0.0, values=0 * p.values) for p in PLAYS[i]] for i in PLAYS}
    ppo = algorithm(kl_coef=0.0, gamma=0.0, lam=0.0)
    found = field(prepared_from(ppo, plays, rollout=paying(2.0)), "returns")
    ends = np.cumsum([len(p.ids) for p in all_played()]) - 1
    assert found[ends].tolist() == [0, 0, -2, 0, -2, 0, -2, 0]
    assert found.sum() == -6


def test_ids_play_no_role_beyond_the_last_one() -> None:
    """The same numbers with other ids, 0 and both ends among them: the same fields."""
    others = {
        i: [replace(p, ids=(*((0, END, SECOND_END) * 2)[: len(p.ids) - 1], p.ids[-1])) for p in PLAYS[i]] for i in PLAYS
    }
    one, other = (prepared_from(algorithm(), plays, rollout=paying(1.0)) for plays in (PLAYS, others))
    for name in ("old", "values", "returns", "advantages"):
        assert field(one, name).tolist() == field(other, name).tolist()
    assert means(one) == means(other)


def test_a_rank_without_prompts_takes_part() -> None:
    """Two prompts on three ranks: the third has nothing, meets the others and reports the same names."""
    plays = {i: PLAYS[i] for i in (0, 1)}
    found = prepared_from(algorithm(whiten_rewards=True), plays, world=3, given=PROMPTS[:2])
    alone = prepared_from(algorithm(whiten_rewards=True), plays, given=PROMPTS[:2])
    assert apart(field(found, "advantages"), field(alone, "advantages")) <= 1e-6
    assert means(found) == pytest.approx(means(alone))
    last = found[2][0]
    assert list(last.groups) == [] and list(last.metrics) == list(alone[0][0].metrics)
    micro = cut(last, [], CPU)
    assert algorithm().units(micro) == {"tokens": 0}
    weight = torch.ones(2, requires_grad=True)
    nothing = weight[torch.zeros(0, dtype=torch.int64)]
    for role, out in (("policy", Output(logps=nothing, entropy=nothing.detach())), ("value", Output(values=nothing))):
        loss = loss_of(algorithm(), role, out, micro)
        assert float(loss.terms["tokens"].detach()) == 0.0
        assert set(metrics_of(loss.metrics).values()) == {(0.0, 0.0)}


def test_what_prepare_asks_for() -> None:
    """Two completions a prompt from the first on, then each model once about all of them."""
    ((prepared, ctx),) = prepared_from(algorithm())
    assert ctx.sampled == [(2, 0)]
    assert sorted(role for role, _ in ctx.asked) == ["policy", "reference", "reward", "value"]
    assert all(groups == prepared.groups for _, groups in ctx.asked)
    assert [g.completions for g in prepared.groups] == list(RAGGED)
    assert algorithm().units(cut(prepared, range(4), CPU)) == {"tokens": sum(len(p.ids) for p in all_played())}


def update(seed: int = 0) -> oracle.Update:
    """Log-probabilities and values after some steps: ratios from 0.4 to 2.7, values up to 1 from the old ones."""
    rng, plays = np.random.default_rng(seed), all_played()
    lengths = [len(p.ids) for p in plays]
    moved = [rng.integers(-256, 256, n, endpoint=True) / 256 for n in lengths]
    drawn = [[rng.integers(-512, 512, n) / 256 for n in lengths] for _ in range(2)]
    return oracle.Update(
        logps=[p.old + m for p, m in zip(plays, moved, strict=True)],
        old=[p.old for p in plays],
        advantages=drawn[0],
        values=[p.values[:-1] + rng.integers(-256, 256, len(p.ids)) / 256 for p in plays],
        old_values=[p.values[:-1] for p in plays],
        returns=drawn[1],
    )


def ready(made: oracle.Update) -> Prepared:
    """The four groups with the fields of an update."""
    groups = [replace(g, completions=answers) for g, answers in zip(PROMPTS, RAGGED, strict=True)]
    lists = {"old": made.old, "advantages": made.advantages, "values": made.old_values, "returns": made.returns}
    fields = {name: [tensor(flat(rows[2 * i : 2 * i + 2])) for i in range(4)] for name, rows in lists.items()}
    return Prepared(groups, fields)


def outputs(made: oracle.Update) -> tuple[Output, Output]:
    """What policy and critic give; the value after each last token is 99, and nothing may read it."""
    logps = tensor(flat(made.logps)).requires_grad_()
    values = tensor(flat([np.append(v, 99.0) for v in made.values])).requires_grad_()
    return Output(logps=logps, entropy=torch.full_like(logps, 0.5).detach()), Output(values=values)


@pytest.mark.parametrize("cliprange", [0.2, 0.05, 0.9])
def test_policy_loss_and_gradient(cliprange: float) -> None:
    """Clipping binds for some tokens and not for others."""
    made, ppo = update(), algorithm(cliprange=cliprange)
    share = oracle.update_metrics(made, cliprange=cliprange, cliprange_value=0.2)["policy/clipfrac_avg"]
    assert 0 < share < 1
    want = oracle.policy_loss(made.logps, made.old, made.advantages, cliprange)
    slopes = flat(oracle.gradient(lambda x: oracle.policy_loss(x, made.old, made.advantages, cliprange), made.logps))
    for dtype, limit in LIMITS:
        with precision(dtype):
            prepared, (out, _) = ready(made), outputs(made)
            found = ppo.policy_loss(out, cut(prepared, range(4), CPU)).terms["tokens"]
            (found / 22).backward()
        assert out.logps is not None and out.logps.grad is not None
        assert float(found.detach()) / 22 == pytest.approx(want, rel=limit)
        assert apart(out.logps.grad.double().numpy(), slopes) <= max(limit, 1e-8)


def test_importance_weights_are_of_the_policy_alone() -> None:
    """A token's slope of the policy loss is multiplied by its weight, and the critic's is as it was."""
    made, ppo = update(), algorithm()
    weights = [np.random.default_rng(i).uniform(0.2, 2.0, len(x)) for i, x in enumerate(made.old)]
    slopes = oracle.gradient(lambda x: oracle.policy_loss(x, made.old, made.advantages, ppo.cliprange), made.logps)
    with precision(torch.float64):
        prepared, found = ready(made), dict[str, Array]()
        of_groups = [tensor(flat(weights[2 * i : 2 * i + 2])) for i in range(4)]
        for name, fields in (("plain", {}), ("weighted", {WEIGHTS: of_groups})):
            micro = cut(replace(prepared, fields={**prepared.fields, **fields}), range(4), CPU)
            for role, out in zip(("policy", "value"), outputs(made), strict=True):
                divided(ppo, role, out, micro).backward()
                found[f"{name} {role}"] = out.numbers.grad.numpy()  # type: ignore[union-attr]
    assert apart(found["plain policy"], flat(slopes)) <= 1e-8
    assert apart(found["weighted policy"], flat(weights) * flat(slopes)) <= 1e-8
    assert found["weighted value"].tolist() == found["plain value"].tolist()


@pytest.mark.parametrize("vf_coef", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("cliprange_value", [0.2, 0.6])
def test_value_loss_and_gradient(cliprange_value: float, vf_coef: float) -> None:
    made, ppo = update(), algorithm(cliprange_value=cliprange_value, vf_coef=vf_coef)
    share = oracle.update_metrics(made, cliprange=0.2, cliprange_value=cliprange_value)["val/clipfrac_avg"]
    assert 0 < share < 1

    def loss(values: Any) -> float:
        return vf_coef * oracle.value_loss(values, made.old_values, made.returns, cliprange_value)

    slopes = oracle.gradient(loss, made.values)
    for dtype, limit in LIMITS:
        with precision(dtype):
            prepared, (_, out) = ready(made), outputs(made)
            found = ppo.value_loss(out, cut(prepared, range(4), CPU)).terms["tokens"]
            (found / 22).backward()
        assert out.values is not None and out.values.grad is not None
        assert float(found.detach()) / 22 == pytest.approx(loss(made.values), rel=limit, abs=1e-12)
        want = flat([np.append(row, 0.0) for row in slopes])  # none for the value after the last token
        assert apart(out.values.grad.double().numpy(), want) <= max(limit, 1e-8)


def test_at_ratio_1_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    """-A for each token, whatever the clipping; and nothing is clipped."""
    made = update()
    made = made._replace(logps=made.old)
    prepared, (out, _) = ready(made), outputs(made)
    loss = algorithm().policy_loss(out, cut(prepared, range(4), CPU))
    loss.terms["tokens"].backward()
    assert out.logps is not None and out.logps.grad is not None
    assert out.logps.grad.tolist() == [-a for a in flat(made.advantages).tolist()]
    metrics = metrics_of(loss.metrics)
    assert (metrics["policy/clipfrac_avg"], metrics["val/ratio"]) == ((0.0, 22.0), (22.0, 22.0))


def test_metrics_of_an_update() -> None:
    """Sums over tokens that divide to the oracle's means; entropy where the model gives it."""
    made, ppo = update(), algorithm()
    want = oracle.update_metrics(made, cliprange=0.2, cliprange_value=0.2)
    micro, (policy, value) = cut(ready(made), range(4), CPU), outputs(made)
    metrics = metrics_of({**ppo.policy_loss(policy, micro).metrics, **ppo.value_loss(value, micro).metrics})
    assert all(count == 22 for _, count in metrics.values())
    found = {name: total / count for name, (total, count) in metrics.items()}
    assert found == pytest.approx({**want, "policy/entropy_avg": 0.5}, rel=1e-6)
    assert "policy/entropy_avg" not in ppo.policy_loss(replace(policy, entropy=None), micro).metrics


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [], [0, 2]], [[2], [3, 0, 1]]], ids=str
)
def test_losses_and_metrics_add_over_micro_batches(parts: list[list[int]]) -> None:
    with precision(torch.float64):
        made, ppo = update(1), algorithm()
        prepared, (policy, value) = ready(made), outputs(made)
        assert policy.logps is not None and policy.entropy is not None and value.values is not None
        tokens = [sum(map(len, answers)) for answers in RAGGED]
        logps, entropy, values = (
            x.split([n + extra for n in tokens])
            for x, extra in ((policy.logps, 0), (policy.entropy, 0), (value.values, 2))
        )
        losses = []
        for part in parts:
            micro = cut(prepared, part, CPU)
            out = Output(
                logps=torch.cat([*(logps[i] for i in part), torch.empty(0)]),
                entropy=torch.cat([*(entropy[i] for i in part), torch.empty(0)]),
                values=torch.cat([*(values[i] for i in part), torch.empty(0)]),
            )
            losses += [ppo.policy_loss(out, micro), ppo.value_loss(out, micro)]
        whole = cut(prepared, range(4), CPU)
        at_once = [ppo.policy_loss(policy, whole), ppo.value_loss(value, whole)]
    for some, want in ((losses[::2], at_once[0]), (losses[1::2], at_once[1])):
        terms = [float(x.terms["tokens"].detach()) for x in (want, *some)]
        assert sum(terms[1:]) == pytest.approx(terms[0], rel=1e-12)
        for name, (total, count) in metrics_of(want.metrics).items():
            found = [metrics_of(x.metrics)[name] for x in some]
            assert (sum(t for t, _ in found), sum(c for _, c in found)) == (pytest.approx(total, rel=1e-12), count)


def test_fields_of_the_last_completion_stay_with_it() -> None:
    """A micro-batch of one prompt alone reads the second completion's own values: 1 token, V 3 and return 1."""
    group = replace(PROMPTS[0], completions=((0, 0), (END,)))
    fields = {"values": [torch.tensor([0.0, 0.0, 3.0])], "returns": [torch.tensor([0.0, 0.0, 1.0])]}
    micro = micro_batch([group], CPU, fields)
    out = Output(values=torch.tensor([0.0, 0.0, 99.0, 3.0, 99.0]))
    assert float(algorithm(vf_coef=1.0).value_loss(out, micro).terms["tokens"]) == 0.5 * (3 - 1) ** 2


def test_what_it_tells_the_trainer() -> None:
    traits = PPO(num_ppo_epochs=3, num_mini_batches=2).traits
    assert (traits.epochs, traits.mini_batches, traits.passes, traits.online) == (3, 2, 6, True)
    assert (traits.main, traits.trained, traits.role_learning_rates) == ("policy", ("policy", "value"), {})
    assert PPO(critic_learning_rate=1e-5).traits.role_learning_rates == {"value": 1e-5}
