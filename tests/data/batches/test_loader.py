"""Order and shards are functions of (seed, epoch, step)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support import random_groups

from dsalign.data.batches.loader import Loader, Stream, deal, epoch_order

GROUPS = random_groups("labels", 10)


def loader(**changes: Any) -> Loader:
    settings = {"global_batch": 4, "seed": 3, "rank": 0, "world_size": 1}
    return Loader(changes.pop("groups", GROUPS), **{**settings, **changes})


def epoch(of: Loader, number: int) -> list[list[int]]:
    """The indices of each batch of an epoch."""
    first = number * of.steps_per_epoch
    return [[g.index for g in of.batch(step).groups] for step in range(first, first + of.steps_per_epoch)]


def flat(lists: list[list[int]]) -> list[int]:
    return [x for one in lists for x in one]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    """A permutation; the same again, another one for another epoch or seed; and this one on every machine."""
    assert sorted(epoch_order(10, 3, 0)) == list(range(10))
    assert epoch_order(10, 3, 0) == epoch_order(10, 3, 0)
    assert len({tuple(epoch_order(10, seed, at)) for seed in (3, 4) for at in (-1, 0, 1)}) == 6
    assert epoch_order(6, 42, 0) == [2, 5, 3, 0, 1, 4]


def test_an_epoch_sees_every_row_once_with_a_short_last_batch() -> None:
    """10 rows in batches of 4, 4 and 2; the next epoch in another order."""
    first, second = epoch(loader(), 0), epoch(loader(), 1)
    assert loader().steps_per_epoch == 3
    assert loader().dropped == 0
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(10))
    assert first != second
    assert flat(first) == epoch_order(10, 3, 0)


def test_without_shuffling_rows_keep_their_order() -> None:
    assert epoch(loader(shuffle=False), 0) == epoch(loader(shuffle=False), 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    """What a resume relies on."""
    assert loader().batch(5) == loader().batch(5)
    used = loader()
    for step in range(5):
        used.batch(step)
    assert used.batch(5) == loader().batch(5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shards_are_disjoint_complete_and_even(world_size: int) -> None:
    """Every rank sees the same global batch, and of its positions no rank has more than one more than another."""
    ranks = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        batches = [r.batch(step) for r in ranks]
        assert all(b.groups == batches[0].groups for b in batches)
        positions = [list(b.mine) for b in batches]
        assert sorted(flat(positions)) == list(range(len(batches[0].groups)))
        assert max(map(len, positions)) - min(map(len, positions)) <= 1
        assert all(b.local == [b.groups[i] for i in b.mine] for b in batches)


def test_a_rank_may_get_nothing() -> None:
    """Two rows in the last batch of an epoch, and three ranks."""
    hands = [list(loader(rank=rank, world_size=3).batch(2).mine) for rank in range(3)]
    assert sorted(hands) == [[], [0], [1]]


def test_dealing_by_hand() -> None:
    """9, 7, 6, 5, 4 to and fro over two: 9 + 5 + 4 and 7 + 6; equal sizes by position; a rank may go without."""
    assert deal([5, 9, 4, 7, 6], 2) == [[0, 1, 2], [3, 4]]
    assert deal([3, 3, 3, 3], 2) == [[0, 3], [1, 2]]
    assert deal([3, 8], 3) == [[1], [0], []]
    assert deal([], 2) == [[], []]
    assert deal([4, 5], 1) == [[0, 1]]


def test_ranks_have_about_as_many_tokens() -> None:
    """64 groups of 1 to 1000 tokens over four ranks: 16 groups each, within 2% of each other."""
    draw = random.Random(0)
    sizes = [draw.randint(1, 1000) for _ in range(64)]
    hands = deal(sizes, 4)
    tokens = [sum(sizes[i] for i in hand) for hand in hands]
    assert [len(hand) for hand in hands] == [16] * 4
    assert max(tokens) <= 1.02 * min(tokens)


def test_a_last_batch_that_is_too_small_is_left_out() -> None:
    """9 rows in batches of 4, at least 2 a batch: two steps an epoch, one row dropped, another one the next epoch."""
    cut = loader(groups=GROUPS[:9], min_groups=2)
    assert (cut.steps_per_epoch, cut.dropped) == (2, 1)
    left_out = [set(range(9)) - set(flat(epoch(cut, number))) for number in range(4)]
    assert all(len(rows) == 1 for rows in left_out)
    assert len(set.union(*left_out)) > 1
    exact = loader(groups=GROUPS[:8], min_groups=2)
    assert (exact.steps_per_epoch, exact.dropped) == (2, 0)
    kept = loader(min_groups=2)
    assert (kept.steps_per_epoch, kept.dropped) == (3, 0)


def test_a_batch_larger_than_the_data_set_is_the_data_set() -> None:
    assert [len(b) for b in epoch(loader(global_batch=64), 0)] == [10]


def test_too_small_a_batch_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^a global batch of 1 is too small: the algorithm needs 2 rows a step; raise --ba"
    ):
        loader(global_batch=1, min_groups=2)


def test_too_small_a_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the data set has 1 usable rows, the algorithm needs at least 2$"):
        loader(groups=GROUPS[:1], min_groups=2)
    with pytest.raises(ValueError, match=r"^the data set has 0 usable rows, the algorithm needs at least 1$"):
        loader(groups=[])


def test_sizes_of_batches() -> None:
    """10 rows in batches of 4 are 4, 4 and 2, in every epoch; of 9 with at least 2 a batch the last row is left out."""
    assert [loader().size_of(step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [loader(groups=GROUPS[:9], min_groups=2).size_of(step) for step in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("world", [1, 3])
def test_a_second_stream(world: int) -> None:
    """A turn of the stream has every group once, in an order that no epoch has, whatever the requests; ranks share what
    is asked for. A request over the end of a turn has no group twice."""
    streams = [Stream(loader(rank=rank, world_size=world)) for rank in range(world)]
    one = [streams[0].batch(start, 2).groups for start in range(0, 20, 2)]
    first, second = ([g.index for part in half for g in part] for half in (one[:5], one[5:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    epochs = [flat(epoch(loader(), number)) for number in range(6)]
    assert first not in epochs and second not in epochs
    assert [g.index for g in streams[0].batch(0, 10).groups] == first
    dealt = [stream.batch(3, 5) for stream in streams]
    assert sorted(i for batch in dealt for i in batch.mine) == list(range(5))
    over = [g.index for g in streams[0].batch(7, 8).groups]
    assert len(over) == len(set(over)) == len({*first[7:], *second[:5]})
