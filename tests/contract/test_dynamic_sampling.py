"""Dynamic sampling: groups of equal scores go, further prompts come in their place, on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import Ranks, metrics_of
from recorded import END, Played, Recorded, played, prompts

from dsalign.contract.groups import Batch
from dsalign.contract.rollouts import Rollouts, sample_until_full

G = 2  # completions a prompt
EVERY = prompts(10)
BATCH, STREAM = EVERY[:4], EVERY[4:]


def answers(index: int, *scores: float) -> list[Played]:
    """Completions with these scores, each with its end token; its ids say which number it is."""
    return [played((10 + index, 20 + number, END), index, score) for number, score in enumerate(scores)]


# Of the batch, prompts 0 and 2 have a signal. Of the stream, completions 2 and 3 are those of attempt 1, and of those
# prompt 4's have a signal; completions 4 and 5 are those of attempt 2, and prompt 6 has a signal then.
PLAYS = {
    **{i: answers(i, *scores) for i, scores in enumerate([(1, 2), (1, 1), (3, 0), (5, 5)])},
    4: answers(4, 7, 7, 1, 4),
    5: answers(5, 0, 9, 2, 2),
    6: answers(6, 0, 0, 0, 0, 4, 5),
    **{i: answers(i, *[8] * 8) for i in range(7, 10)},
}


def run(world: int, attempts: int, stream: Sequence[int] = range(4, 10)) -> list[tuple[Rollouts, Recorded]]:
    """What each rank has; prompts go to ranks in turn."""
    ranks = Ranks(world)

    def work(rank: int) -> tuple[Rollouts, Recorded]:
        ctx = Recorded(PLAYS, ranks=ranks, rank=rank, stream=[EVERY[i] for i in stream])
        return sample_until_full(ctx, Batch(BATCH, range(rank, 4, world)), G, attempts), ctx

    return ranks.run(work)


def places(found: Sequence[tuple[Rollouts, Recorded]]) -> dict[int, int]:
    """Position in the global batch -> index of the prompt there, over all ranks."""
    pairs = [
        (position, g.index) for rolled, _ in found for position, g in zip(rolled.positions, rolled.groups, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs)
    return dict(sorted(pairs))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_batch_is_filled_with_further_prompts(world: int) -> None:
    """Prompts 1 and 3 go; 4 and 5 are asked, of which 4 stays; then 6. Attempt n has positions from 4 n on."""
    found = run(world, 8)
    assert places(found) == {0: 0, 2: 2, 4: 4, 8: 6}
    for _, ctx in found:
        assert ctx.drawn == [2, 1, 0]  # the last look finds the batch full
        assert ctx.sampled == [(G, 0), (G, G), (G, 2 * G)]
        assert ctx.warnings == []
    filled = {g.index: g.completions for rolled, _ in found for g in rolled.groups}
    assert filled[4] == ((14, 22, END), (14, 23, END)) and filled[6] == ((16, 24, END), (16, 25, END))
    for rolled, ctx in found:  # each group with its own numbers
        for g, old, scores in zip(rolled.groups, rolled.old, rolled.scores, strict=True):
            assert scores.tolist() == [p.score for p in ctx.of(g)]
            assert old.tolist() == [x for p in ctx.of(g) for x in p.old]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_add_over_attempts_and_ranks(world: int) -> None:
    """7 prompts were sampled, 14 completions of 3 tokens: scores 18, then 5 + 4, then 9, of dropped ones too. All 14
    ended, on every rank; the episode counts the 8 of the data set's own batch; 4 of 4 groups are there."""
    each = [metrics_of(rolled.metrics) for rolled, _ in run(world, 8)]
    means = {name: sum(m[name][0] for m in each) / sum(m[name][1] for m in each) for name in each[0]}
    assert sum(m["objective/scores"][1] for m in each) == 14
    assert means["objective/scores"] == (18 + 9 + 9) / 14
    assert sum(m["rollout/logp_gap"][1] for m in each) == 42
    assert (means["val/num_eos_tokens"], means["episode"], means["rollout/groups_kept"]) == (14, 8, 1.0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_it_gives_up_and_says_so(world: int) -> None:
    """After one attempt 3 of 4 groups are there."""
    found = run(world, 1)
    assert places(found) == {0: 0, 2: 2, 4: 4}
    text = (
        "dynamic sampling: --dynamic_sampling 1 left a batch short of groups with different scores; "
        "rollout/groups_kept has the share of each batch"
    )
    for rolled, ctx in found:
        assert (ctx.drawn, ctx.warnings) == ([2], [text])
        assert rolled.metrics["rollout/groups_kept"] == (3, 4)


def test_without_attempts_nothing_is_dropped() -> None:
    ((rolled, ctx),) = run(1, 0)
    assert (places([(rolled, ctx)]), ctx.drawn) == ({0: 0, 1: 1, 2: 2, 3: 3}, [])
    assert "rollout/groups_kept" not in rolled.metrics


def test_without_further_prompts_as_in_an_evaluation_nothing_is_said() -> None:
    ((rolled, ctx),) = run(1, 8, stream=())
    assert (places([(rolled, ctx)]), ctx.drawn, ctx.warnings) == ({0: 0, 2: 2}, [2], [])
    assert rolled.metrics["rollout/groups_kept"] == (2, 4)


def test_samples_are_those_of_the_first_attempt() -> None:
    """Four at most, dropped groups' too."""
    ((rolled, _),) = run(1, 8)
    assert [row["prompt"] for row in rolled.samples] == [f"prompt {i}" for i in range(4)]
