"""What online algorithms share: checked samplers, scores and their penalties, advantages, the clipped loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import Ranks, metrics_of
from recorded import PLAYS, PROMPTS, RAGGED, Plays, Recorded, prompts

from dsalign.config.parse import ConfigError, parse
from dsalign.contract import rollouts
from dsalign.contract.groups import Batch, Group, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.contract.rollouts import Rollouts, sample, whiten


def sampled(plays: Plays = PLAYS, given: list[Group] = PROMPTS, **of_context: Any) -> tuple[Rollouts, Recorded]:
    """Two completions a prompt on one rank."""
    ctx = Recorded(plays, **of_context)
    return sample(ctx, Batch(given, range(len(given))), 2), ctx


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
        ctx = Recorded(shifted(4.0, -4.0), ranks=ranks, rank=rank)
        with pytest.raises(ValueError) as caught:
            sample(ctx, Batch(PROMPTS, range(rank, len(PROMPTS), world)), 2)
        return str(caught.value)

    want = (
        "rollout_logp_limit: the sampler's log-probabilities differ from the trainer's by 0.909 nats a token on "
        "average, more than 0.5: not from the weights being trained? Try --rollout plain"
    )
    assert ranks.run(work) == [want] * world
    sampled(shifted(4.0, -4.0), rollout=RolloutOptions(rollout_logp_limit=0.91))


def test_a_sampler_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rollout_logp_limit: .* by nan nats a token"):
        sampled(shifted(math.nan))


def test_a_small_gap_is_warned_about_and_logged() -> None:
    """4 of 22 tokens are 0.5 nats off: 2 / 22; below 0.05 nothing is said."""
    rolled, ctx = sampled(shifted(0.5))
    assert ctx.warnings == [
        "rollout: sampler and trainer differ by more than 0.05 nats a token on average; see rollout/logp_gap"
    ]
    assert metrics_of(rolled.metrics)["rollout/logp_gap"] == (2.0, 22.0)
    assert sampled(shifted(0.25))[1].warnings == []


def test_samples_are_the_first_completions_with_their_scores() -> None:
    """At most four prompts of a rank, and the score is the one after the penalty."""
    rolled, _ = sampled(rollout=RolloutOptions(missing_eos_penalty=1.0))
    assert rolled.samples == [
        {"prompt": f"prompt {i}", "completion": " ".join(map(str, RAGGED[i][0])), "score": PLAYS[i][0].score - (i > 0)}
        for i in range(4)
    ]
    more, _ = sampled({i: PLAYS[0] for i in range(6)}, [replace(PROMPTS[0], index=i) for i in range(6)])
    assert len(more.samples) == 4


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
    options = RolloutOptions(num_sample_generations=times)
    assert [s for s in range(total) if sampled(step=s, total_batches=total, rollout=options)[0].samples] == steps


def test_metrics_of_several_sources_and_of_one() -> None:
    """Each by its name before its weight, where there are several; scores by their sum."""

    class Two(Recorded):
        def scores(self, groups: Any) -> Scores:
            total = super().scores(groups).total
            return Scores([3 * x for x in total], {"a": total, "b": [2 * x for x in total]})

    score = sum(p.score for plays in PLAYS.values() for p in plays)
    rolled = sample(Two(PLAYS), Batch(PROMPTS, range(4)), 2)
    names = {"objective/scores": 3.0, "objective/scores/a": 1.0, "objective/scores/b": 2.0}
    found = metrics_of(rolled.metrics)
    assert {n: found[n] for n in found if "scores" in n} == {n: pytest.approx((w * score, 8)) for n, w in names.items()}
    assert [n for n in sampled()[0].metrics if "scores" in n] == ["objective/scores"]


def test_the_episode_goes_on_where_the_batches_before_ended() -> None:
    rolled = sample(Recorded(PLAYS), Batch(PROMPTS, range(4), seen=10), 2)
    assert rolled.metrics["episode"] == (28, 1)


@pytest.mark.parametrize(
    ("buffer", "want"),
    [(0, [0.0] * 6), (4, [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]), (2, [0.0, 0.0, 0.0, -0.5, -1.0, -1.0])],
)
def test_the_soft_overlong_punishment(buffer: int, want: list[float]) -> None:
    """Of at most 8 tokens: with a buffer of 4 it starts behind the fourth and falls by 1/4 a token (DAPO, eq. 13)."""
    lengths = (1, 4, 5, 7, 8, 9)
    group = replace(PROMPTS[0], completions=tuple((5,) * n for n in lengths))
    assert rollouts.overlong(group, 8, buffer).tolist() == want


def test_a_buffer_longer_than_completions_is_refused() -> None:
    """It would punish completions of any length. Whoever writes it is told before a model is loaded."""
    words = ["--algo", "grpo", "--max_new_tokens", "5", "--overlong_buffer"]
    with pytest.raises(ConfigError, match=r"^--overlong_buffer: expected a number >= 0 and <= 5, got 6$"):
        parse([*words, "6"], world_size=1)
    assert parse([*words, "5"], world_size=1).config.algorithm.overlong_buffer == 5


def test_the_missing_end_is_paid_for_by_completions_without_one() -> None:
    """Of RAGGED these are (0,), the five eights and (6, 0); both end ids count as ends, 0 does not."""
    rolled, ctx = sampled(rollout=RolloutOptions(missing_eos_penalty=2.0))
    paid = [[p.score - x for p, x in zip(PLAYS[i], s.tolist(), strict=True)] for i, s in enumerate(rolled.scores)]
    assert paid == [[0, 0], [2, 0], [2, 0], [2, 0]]
    assert [x.tolist() for x in rollouts.ended(ctx, rolled.groups)] == [[1, 1], [0, 1], [0, 1], [0, 1]]
    assert rolled.metrics["val/num_eos_tokens"] == (5.0, 1)
    assert rolled.metrics["rollout/length"] == (4 + 1 + 1 + 2 + 5 + 3 + 2 + 4, 8)


def test_advantages_within_a_group_by_hand() -> None:
    """1, 2, 6: less 3; variance (4 + 1 + 9) / 2 = 7. The mean of the others: 4, 3.5, 1.5."""
    scores = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0, 5.0])]
    plain = [x.tolist() for x in rollouts.group_advantages(scores, scale=False)]
    assert plain == [[-2.0, -1.0, 3.0], [0.0, 0.0]]
    scaled = rollouts.group_advantages(scores, scale=True)
    assert scaled[0].tolist() == pytest.approx([x / (math.sqrt(7) + 1e-6) for x in (-2, -1, 3)])
    assert rollouts.leave_one_out(scores)[0].tolist() == pytest.approx([-3.0, -1.5, 4.5])
    assert [x.tolist() for x in rollouts.group_advantages([torch.tensor([4.0])], scale=True)] == [[0.0]]


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 8, 11, 64])
def test_equal_scores_have_no_advantage_at_all(n: int) -> None:
    """float32's own mean of 1000.1 seven times is 6e-5 off, and so is the deviation: 0.9 where 0 is meant."""
    for score in (0.1, 5.3, 100.1, 1000.1):
        (advantages,) = rollouts.group_advantages([torch.full((n,), score)], scale=True)
        assert advantages.tolist() == [0.0] * n and advantages.dtype == torch.float32
        assert rollouts.leave_one_out([torch.full((n,), score)])[0].tolist() == [0.0] * n


def test_rewards_of_tokens_and_what_they_add_up_to() -> None:
    """Completions of 2 and 1 tokens: -0.5 KL, the score on each last token; to go 0.5 + 2 and 2; the sums alike."""
    group = replace(PROMPTS[0], completions=((5, 5), (6,)))
    rewards = rollouts.token_rewards(torch.tensor([-1.0, 2.0, 4.0]), torch.tensor([3.0, 7.0]), group, 0.5)
    assert rewards.tolist() == [0.5, 2.0, 5.0]
    assert rollouts.rewards_to_go(rewards, group).tolist() == [2.5, 2.0, 5.0]
    assert rollouts.completion_sums(rewards, group).tolist() == [2.5, 5.0]


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_whitening_is_over_the_tokens_of_all_ranks(world: int, shift_mean: bool) -> None:
    """1, 2, 3, 4, 10 has mean 4 and variance 50 / 4; one rank may have nothing at all."""
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 10.0])]
    shares = {1: [rows], 2: [rows[:2], rows[2:]], 3: [rows[:1], [], rows[1:]]}[world]
    ranks = Ranks(world)
    found = ranks.run(lambda rank: whiten(Recorded({}, ranks=ranks, rank=rank), shares[rank], shift_mean=shift_mean))
    assert [len(x) for part in found for x in part] == [2, 1, 2]
    want = [(x - 4) / math.sqrt(12.5) + (0 if shift_mean else 4) for x in (1, 2, 3, 4, 10)]
    assert torch.cat([x for part in found for x in part]).tolist() == pytest.approx(want, rel=1e-6)


def test_whitening_leaves_one_token_alone_and_makes_equal_ones_zero() -> None:
    """Below two tokens there is no variance; with a variance of 0 the 1e-8 keeps 0 / 0 away."""
    ctx = Recorded({})
    assert whiten(ctx, [], shift_mean=True) == []
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0])], shift_mean=True)] == [[5.0]]
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0, 5.0])], shift_mean=True)] == [[0.0, 0.0]]
    assert [x.tolist() for x in whiten(ctx, [torch.tensor([5.0, 5.0])], shift_mean=False)] == [[5.0, 5.0]]


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_the_clipped_loss_is_finite_at_any_log_ratio(advantage: float) -> None:
    """Held at e^-+20: with A = 2 the loss is -2 e^-20 far below and -2 x 1.2 far above, with A = -2 the worse of both,
    1.6 and 2 e^20; no slope in either case."""
    change = torch.tensor([-100.0, -89.0, -25.0, 25.0, 89.0, 100.0], requires_grad=True)
    loss, metrics = rollouts.clipped(change, torch.full((6,), advantage), 0.8, 1.2)
    loss.sum().backward()
    assert change.grad is not None and change.grad.tolist() == [0.0] * 6
    low, high = {2.0: (-2 * math.exp(-20), -2.4), 0.0: (0.0, 0.0), -2.0: (1.6, 2 * math.exp(20))}[advantage]
    assert loss.tolist() == pytest.approx([low] * 3 + [high] * 3, rel=1e-6)
    assert all(math.isfinite(total) for total, _ in metrics_of(metrics).values())


def test_a_rank_without_prompts_reports_the_names_of_the_others() -> None:
    ranks = Ranks(3)
    found = ranks.run(
        lambda rank: sample(Recorded(PLAYS, ranks=ranks, rank=rank), Batch(prompts(2), range(rank, 2, 3)), 2)
    )
    assert [len(rolled.groups) for rolled in found] == [1, 1, 0]
    assert list(found[2].metrics) == list(found[0].metrics)
