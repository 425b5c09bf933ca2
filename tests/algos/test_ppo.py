"""PPO without networks: rollouts from a table on one, two and three ranks, its numbers against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle_ppo as oracle
import pytest
import torch
from fakes import CPU, Array, FakeContext, Ranks, flat, metrics_of, precision
from support import random_groups
from torch import Tensor

from dsalign.algos.ppo import PPO
from dsalign.contract.groups import Batch, Group, Loss, MicroBatch, Output, Prepared, Sampling
from dsalign.contract.rollouts import token_kl, whiten
from dsalign.data.batches.packing import cut, micro_batch

END, SECOND_END = 2, 7  # two tokens end a completion; 0 is the id of padding
LIMITS = ((torch.float32, 1e-6), (torch.float64, 1e-12))


@dataclass(frozen=True)
class Played:
    """A sampled completion and what every model says of it."""

    ids: tuple[int, ...]
    old: Array  # [T] nats
    reference: Array
    sampler: Array
    values: Array  # [T + 1], the last one of no token
    score: float


def played(ids: Sequence[int], seed: int) -> Played:
    """Numbers that are multiples of 2^-8, so that float32 holds them exactly; the sampler agrees with the trainer."""
    rng, n = np.random.default_rng([seed, *ids]), len(ids)
    old = rng.integers(-1200, -3, n) / 256
    reference = np.minimum(old - rng.integers(-128, 128, n, endpoint=True) / 256, -1 / 256)
    values, score = rng.integers(-512, 512, n + 1) / 256, float(rng.integers(-512, 512)) / 256
    return Played(tuple(ids), old, reference, old, values, score)


# Two completions a prompt, of 1 to 5 tokens; ids 0 and end ids stand where only their place says what they are.
RAGGED = (
    ((0, 5, 0, END), (END,)),
    ((0,), (9, SECOND_END)),
    ((8, 8, 8, 8, 8), (0, 0, SECOND_END)),
    ((6, 0), (4, 5, 6, END)),
)
PLAYS = {i: [played(ids, 11 * i + j) for j, ids in enumerate(answers)] for i, answers in enumerate(RAGGED)}
PROMPTS = [replace(g, prompt=(0, END, 5)[: 1 + g.index % 3]) for g in random_groups("prompts", len(RAGGED))]
Plays = Mapping[int, Sequence[Played]]


class Rollouts(FakeContext):
    """A context whose sampler plays what was recorded for a prompt."""

    def __init__(self, plays: Plays, *, step: int = 0, total_batches: int = 1, **ranks: Any) -> None:
        super().__init__(lambda role, prompt, ids: np.zeros(len(ids)), **ranks)
        self.plays, self.step, self.total_batches = plays, step, total_batches
        self.end_ids = frozenset({END, SECOND_END})
        self.sampled: list[tuple[Sampling, int]] = []
        self.sizes: list[tuple[str, int | None]] = []

    def generate(
        self, role: str, groups: Sequence[Group], sampling: Sampling, batch_size: int
    ) -> tuple[list[Group], list[Tensor]]:
        assert role == "policy"
        self.sampled.append((sampling, batch_size))
        filled = [replace(g, completions=tuple(p.ids for p in self.plays[g.index])) for g in groups]
        return filled, self._each("sampler", groups)

    def logps(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        self.sizes.append((role, batch_size))
        return self._each({"policy": "old", "reference": "reference"}[role], groups)

    def values(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        self.sizes.append((role, batch_size))
        return self._each({"value": "values"}[role], groups)

    def scores(self, groups: Sequence[Group], batch_size: int) -> list[Tensor]:
        self.sizes.append(("reward", batch_size))
        return [tensor([p.score for p in self.plays[g.index]]) for g in groups]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def _each(self, name: str, groups: Sequence[Group]) -> list[Tensor]:
        return [tensor(np.concatenate([getattr(p, name) for p in self.plays[g.index]])) for g in groups]


def tensor(numbers: Any) -> Tensor:
    return torch.tensor(np.asarray(numbers, dtype=np.float64)).to(torch.get_default_dtype())


def algorithm(**options: Any) -> PPO:
    """PPO with two completions a prompt, of at most 5 tokens."""
    return PPO(**{"num_generations": 2, "max_new_tokens": 5, **options})


def prepared_on(
    algorithm: PPO, plays: Plays = PLAYS, *, world: int = 1, prompts: Sequence[Group] = PROMPTS, **of_context: Any
) -> list[tuple[Prepared, Rollouts]]:
    """What each rank prepares and the context it asked; prompts go to ranks in turn."""
    ranks = Ranks(world)

    def work(rank: int) -> tuple[Prepared, Rollouts]:
        ctx = Rollouts(plays, ranks=ranks, rank=rank, **of_context)
        return algorithm.prepare(ctx, Batch(prompts, range(rank, len(prompts), world))), ctx

    return ranks.run(work)


def all_played(plays: Plays = PLAYS) -> list[Played]:
    return [p for i in sorted(plays) for p in plays[i]]


def field(found: Sequence[tuple[Prepared, Any]], name: str) -> Array:
    """A field of all ranks, in the order of the prompts."""
    by_index = {
        g.index: x for prepared, _ in found for g, x in zip(prepared.groups, prepared.fields[name], strict=True)
    }
    return torch.cat([by_index[i] for i in sorted(by_index)]).double().numpy()


def means(found: Sequence[tuple[Prepared, Any]]) -> dict[str, float]:
    """The metrics over all ranks, as the trainer takes them."""
    each = [metrics_of(prepared.metrics) for prepared, _ in found]
    return {name: sum(m[name][0] for m in each) / sum(m[name][1] for m in each) for name in each[0]}


def apart(found: Array, want: Array) -> float:
    """|found - want| / |want|; 0 where both are 0."""
    assert found.shape == want.shape
    gap, size = float(np.linalg.norm(found - want)), float(np.linalg.norm(want))
    return gap / size if size else gap


def test_kl_of_a_token() -> None:
    """k1 is 0.5 - 1; k3 is e^0.5 - 1 - 0.5. Equal log-probabilities have 0, and k3 is never below it."""
    logps, reference = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-0.5, -1.0, -9.0])
    assert token_kl(logps, reference, "k1").tolist() == [-0.5, 0.0, 6.0]
    want = [math.exp(0.5) - 1.5, 0.0, math.exp(-6) + 5]
    assert token_kl(logps, reference, "k3").tolist() == pytest.approx(want, rel=1e-6)


def test_k3_of_close_log_probabilities_keeps_its_digits() -> None:
    """A gap of d has d^2 / 2 (1 - d / 3 + ...): at 2^-12 that is 2^-25, below float32's spacing at 1, and not 0."""
    found = float(token_kl(torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-12]), "k3"))
    assert found == pytest.approx(2**-25, rel=2e-3)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_whitening_is_over_the_tokens_of_all_ranks(world: int, shift_mean: bool) -> None:
    """1, 2, 3, 4, 10 has mean 4 and variance 50 / 4; one rank may have nothing at all."""
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 10.0])]
    shares = {1: [rows], 2: [rows[:2], rows[2:]], 3: [rows[:1], [], rows[1:]]}[world]
    ranks = Ranks(world)
    found = ranks.run(lambda rank: whiten(Rollouts({}, ranks=ranks, rank=rank), shares[rank], shift_mean=shift_mean))
    assert [len(x) for part in found for x in part] == [2, 1, 2]
    want = [(x - 4) / math.sqrt(12.5) + (0 if shift_mean else 4) for x in (1, 2, 3, 4, 10)]
    assert torch.cat([x for part in found for x in part]).tolist() == pytest.approx(want, rel=1e-6)


def test_whitening_leaves_one_token_alone_and_makes_equal_ones_zero() -> None:
    """Below two tokens there is no variance; with a variance of 0 the 1e-8 keeps 0 / 0 away."""
    ctx = Rollouts({})
    assert whiten(ctx, [], shift_mean=True) == []
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0])], shift_mean=True)] == [[5.0]]
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0, 5.0])], shift_mean=True)] == [[0.0, 0.0]]
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0, 5.0])], shift_mean=False)] == [[5.0, 5.0]]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"kl_estimator": "k3", "kl_coef": 0.5},
    {"whiten_rewards": True, "gamma": 0.9, "lam": 0.5},
    {"missing_eos_penalty": 1.5, "lam": 1.0, "whiten_rewards": True, "kl_estimator": "k3"},
    {"kl_coef": 0.0, "gamma": 0.0, "lam": 0.0, "missing_eos_penalty": 0.0},
]


def penalised(plays: Sequence[Played], penalty: float | None) -> Array:
    ended = [p.ids[-1] in (END, SECOND_END) for p in plays]
    return oracle.penalised(np.array([p.score for p in plays]), ended, penalty)


def wanted(ppo: PPO, plays: Sequence[Played]) -> tuple[Array, Array]:
    """(advantages, returns) by the oracle."""
    advantages, returns = oracle.prepare(
        [p.old for p in plays],
        [p.reference for p in plays],
        [p.values[:-1] for p in plays],
        penalised(plays, ppo.missing_eos_penalty),
        kl_coef=ppo.kl_coef,
        kl_estimator=ppo.kl_estimator,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten_rewards=ppo.whiten_rewards,
    )
    return flat(advantages), flat(returns)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_prepare_is_the_oracles_on_any_number_of_ranks(world: int, options: dict[str, Any]) -> None:
    ppo, plays = algorithm(**options), all_played()
    for dtype, limit in LIMITS:
        with precision(dtype):
            found = prepared_on(ppo, world=world)
        advantages, returns = wanted(ppo, plays)
        assert apart(field(found, "advantages"), advantages) <= limit
        assert apart(field(found, "returns"), returns) <= limit
        assert field(found, "old").tolist() == flat([p.old for p in plays]).tolist()
        assert field(found, "values").tolist() == flat([p.values[:-1] for p in plays]).tolist()
        assert all(x.dtype == dtype for p, _ in found for tensors in p.fields.values() for x in tensors)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_metrics_of_a_rollout(world: int, options: dict[str, Any]) -> None:
    """Five of eight completions have an end token; the scores are those after the penalty and before whitening."""
    ppo, plays = algorithm(**options), all_played()
    want = oracle.metrics(
        [p.old for p in plays],
        [p.reference for p in plays],
        penalised(plays, ppo.missing_eos_penalty),
        [],
        kl_coef=ppo.kl_coef,
        kl_estimator=ppo.kl_estimator,
        cliprange=ppo.cliprange,
        cliprange_value=ppo.cliprange_value,
    )
    found = means(prepared_on(ppo, world=world))
    counted = {"val/num_eos_tokens": 5, "episode": 8, "rollout/logp_gap": 0}
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
        found = prepared_on(algorithm(kl_coef=0.0, **options), plays, prompts=PROMPTS[:1])
        assert field(found, "returns").tolist() == want


def test_the_missing_end_is_paid_for_by_completions_without_one() -> None:
    """Of RAGGED these are (0,), the five eights and (6, 0); both end ids count as ends, 0 does not."""
    plays = {i: [replace(p, score=0.0, values=0 * p.values) for p in PLAYS[i]] for i in PLAYS}
    ppo = algorithm(kl_coef=0.0, missing_eos_penalty=2.0, gamma=0.0, lam=0.0)
    found = field(prepared_on(ppo, plays), "returns")
    ends = np.cumsum([len(p.ids) for p in all_played()]) - 1
    assert found[ends].tolist() == [0, 0, -2, 0, -2, 0, -2, 0]
    assert found.sum() == -6


def test_ids_play_no_role_beyond_the_last_one() -> None:
    """The same numbers with other ids, 0 and both ends among them: the same fields."""
    others = {
        i: [replace(p, ids=(*((0, END, SECOND_END) * 2)[: len(p.ids) - 1], p.ids[-1])) for p in PLAYS[i]] for i in PLAYS
    }
    one, other = (
        prepared_on(algorithm(missing_eos_penalty=1.0)),
        prepared_on(algorithm(missing_eos_penalty=1.0), others),
    )
    for name in ("old", "values", "returns", "advantages"):
        assert field(one, name).tolist() == field(other, name).tolist()
    assert means(one) == means(other)


def test_a_rank_without_prompts_takes_part() -> None:
    """Two prompts on three ranks: the third has nothing, meets the others and reports the same names."""
    plays = {i: PLAYS[i] for i in (0, 1)}
    found = prepared_on(algorithm(whiten_rewards=True), plays, world=3, prompts=PROMPTS[:2])
    alone = prepared_on(algorithm(whiten_rewards=True), plays, prompts=PROMPTS[:2])
    assert apart(field(found, "advantages"), field(alone, "advantages")) <= 1e-6
    assert means(found) == pytest.approx(means(alone))
    last = found[2][0]
    assert list(last.groups) == [] and list(last.metrics) == list(alone[0][0].metrics)
    assert algorithm().units(last.groups) == {"tokens": 0}
    micro = cut(last, [], CPU)
    weight = torch.ones(2, requires_grad=True)
    nothing = weight[torch.zeros(0, dtype=torch.int64)]
    for role, out in (("policy", Output(logps=nothing, entropy=nothing.detach())), ("value", Output(values=nothing))):
        loss = loss_of(algorithm(), role, out, micro)
        assert float(loss.terms["tokens"].detach()) == 0.0
        assert set(metrics_of(loss.metrics).values()) == {(0.0, 0.0)}


def test_what_prepare_asks_for() -> None:
    """64 completions a forward are 32 prompts with two completions each; never less than one prompt."""
    for rows, size in ((64, 32), (1, 1), (5, 2)):
        ppo = algorithm(temperature=0.7, top_p=0.9, top_k=3, local_rollout_forward_batch_size=rows)
        ((prepared, ctx),) = prepared_on(ppo)
        assert ctx.sampled == [(Sampling(5, 0.7, 0.9, 3, 2), rows)]
        assert sorted(ctx.sizes) == [("policy", size), ("reference", size), ("reward", size), ("value", size)]
    assert [g.completions for g in prepared.groups] == list(RAGGED)
    assert ppo.units(prepared.groups) == {"tokens": sum(len(c) for answers in RAGGED for c in answers)}


def shifted(*gaps: float) -> Plays:
    """The first completions with these gaps between sampler and trainer, the others without."""
    plays = {i: list(PLAYS[i]) for i in PLAYS}
    for i, gap in enumerate(gaps):
        plays[i][0] = replace(plays[i][0], sampler=plays[i][0].old + gap)
    return plays


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sampler_that_disagrees_is_refused(world: int) -> None:
    """4 of 22 tokens are 4 nats too high and one 4 nats too low: 20 / 22 of a nat on average. Every rank says so, also
    one whose own samples are right, and none waits for another."""
    ranks = Ranks(world)

    def work(rank: int) -> str:
        ctx = Rollouts(shifted(4.0, -4.0), ranks=ranks, rank=rank)
        with pytest.raises(ValueError) as caught:
            algorithm().prepare(ctx, Batch(PROMPTS, range(rank, len(PROMPTS), world)))
        return str(caught.value)

    assert (
        ranks.run(work)
        == [
            "rollout_logp_limit: the sampler's log-probabilities differ from the trainer's by 0.909 nats a token on "
            "average, more than 0.5: rollouts do not come from the weights being trained"
        ]
        * world
    )
    prepared_on(algorithm(rollout_logp_limit=0.91), shifted(4.0, -4.0), world=world)


def test_a_sampler_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rollout_logp_limit: .* by nan nats a token"):
        prepared_on(algorithm(), shifted(math.nan))


def test_a_small_gap_is_warned_about_and_logged() -> None:
    """4 of 22 tokens are 0.5 nats off: 2 / 22; below 0.05 nothing is said."""
    ((prepared, ctx),) = prepared_on(algorithm(), shifted(0.5))
    assert ctx.warnings == ["ppo: sampler and trainer differ by 0.0909 nats a token on average"]
    assert metrics_of(prepared.metrics)["rollout/logp_gap"] == (2.0, 22.0)
    ((_, ctx),) = prepared_on(algorithm(), shifted(0.25))
    assert ctx.warnings == []


def test_samples_are_the_first_completions_with_their_scores() -> None:
    """At most four prompts of a rank, and the score is the one after the penalty."""
    ((prepared, _),) = prepared_on(algorithm(missing_eos_penalty=1.0))
    assert prepared.samples == [
        {"prompt": f"prompt {i}", "completion": " ".join(map(str, RAGGED[i][0])), "score": PLAYS[i][0].score - (i > 0)}
        for i in range(4)
    ]
    more = [replace(PROMPTS[0], index=i) for i in range(6)]
    ((prepared, _),) = prepared_on(algorithm(), {i: PLAYS[0] for i in range(6)}, prompts=more)
    assert len(prepared.samples) == 4


@pytest.mark.parametrize(
    ("times", "total", "steps"),
    [
        (3, 9, [0, 3, 6]),
        (2, 5, [0, 3]),
        (10, 15, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14]),
        (10, 3, [0, 1, 2]),
        (1, 4, [0]),
        (0, 4, []),
    ],
)
def test_samples_are_shown_that_many_times_in_a_run(times: int, total: int, steps: list[int]) -> None:
    ppo = algorithm(num_sample_generations=times)
    shown = [step for step in range(total) if prepared_on(ppo, step=step, total_batches=total)[0][0].samples]
    assert shown == steps


def loss_of(ppo: PPO, role: str, out: Output, micro: MicroBatch) -> Loss:
    found: Loss = getattr(ppo, f"{role}_loss")(out, micro)
    return found


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
            (found / ppo.units(prepared.groups)["tokens"]).backward()
        assert out.logps is not None and out.logps.grad is not None
        assert float(found.detach()) / 22 == pytest.approx(want, rel=limit)
        assert apart(out.logps.grad.double().numpy(), slopes) <= max(limit, 1e-8)


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
            (found / ppo.units(prepared.groups)["tokens"]).backward()
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
    ppo = PPO(num_ppo_epochs=3, num_mini_batches=2, temperature=0.5)
    assert (ppo.epochs, ppo.mini_batches, ppo.temperature) == (3, 2, 0.5)
    assert ppo.role_learning_rates == {}
    assert PPO(critic_learning_rate=1e-5).role_learning_rates == {"value": 1e-5}
    assert ppo.notes(PROMPTS) == [] and ppo.stop({}) is False


NOT_NEGATIVE = ("kl_coef", "vf_coef", "num_sample_generations", "top_k", "missing_eos_penalty")
POSITIVE = ("cliprange", "cliprange_value", "temperature", "rollout_logp_limit", "critic_learning_rate")
AT_LEAST_1 = (
    "num_ppo_epochs",
    "num_mini_batches",
    "num_generations",
    "local_rollout_forward_batch_size",
    "max_new_tokens",
)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator: expected one of k1, k3, got 'k2'"),
        *(({name: -1}, f"{name}: expected a number >= 0, got -1") for name in NOT_NEGATIVE),
        *(({name: 0.0}, f"{name}: expected a number > 0, got 0.0") for name in POSITIVE),
        *(({name: math.nan}, f"{name}: expected a number > 0, got nan") for name in POSITIVE),
        *(({name: 0}, f"{name}: expected a number >= 1, got 0") for name in AT_LEAST_1),
        *(({name: 1.5}, f"{name}: expected a number >= 0 and <= 1, got 1.5") for name in ("gamma", "lam")),
        *(({name: -0.5}, f"{name}: expected a number >= 0 and <= 1, got -0.5") for name in ("gamma", "lam")),
        ({"top_p": 0.0}, "top_p: expected a number > 0 and <= 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected a number > 0 and <= 1, got 1.5"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        PPO(**options)
    assert str(caught.value) == text


def test_values_at_the_edges_are_taken() -> None:
    edges = {**dict.fromkeys(NOT_NEGATIVE, 0), **dict.fromkeys(AT_LEAST_1, 1), "gamma": 0.0, "lam": 1.0, "top_p": 1.0}
    ppo = PPO(**edges)
    assert {name: getattr(ppo, name) for name in edges} == edges
