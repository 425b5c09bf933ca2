"""Which groups an optimizer step trains on, and which of them each rank computes: functions of (seed, epoch, step), so
that a resumed run and every rank agree without asking each other."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dsalign.contract.groups import Batch, Group
from dsalign.data.batches.packing import num_computed


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the groups: a permutation of range(num_rows), the same on every rank and
    machine. epoch: from 0; the negative ones are orders for other uses, such as the split for evaluation."""
    order = list(range(num_rows))
    random.Random(f"dsalign order {seed} {epoch}").shuffle(order)
    return order


class Loader:
    """The global batches of a run, `global_batch` groups each, epoch after epoch; the last of an epoch may be shorter.

    groups: the data set. seed: of the order, which is that of the data set with `shuffle` off. rank, world_size: whose
    share `batch` marks. min_groups: a last batch with fewer groups than that is left out, as KTO needs two; `dropped`
    is the number of groups that an epoch so loses.
    Raises ValueError where a global batch, or the data set, has fewer than min_groups groups.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool = True,
        min_groups: int = 1,
    ) -> None:
        if min_groups > global_batch:
            raise ValueError(
                f"a global batch of {global_batch} is too small: the algorithm needs {min_groups} rows a step; raise "
                "--batch_size or --gradient_accumulation_steps"
            )
        if len(groups) < min_groups:
            raise ValueError(f"the data set has {len(groups)} usable rows, the algorithm needs at least {min_groups}")
        self.groups, self.global_batch, self.seed, self.shuffle = groups, global_batch, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, Sequence[int]] = (-1, ())
        last = len(groups) % global_batch
        self.dropped = last if 0 < last < min_groups else 0
        self.steps_per_epoch = math.ceil((len(groups) - self.dropped) / global_batch)

    def batch(self, step: int) -> Batch:
        """The global batch number `step` of the run, from 0, with this rank's share of it."""
        groups = self.groups_of(step)
        mine = deal([num_computed(g) for g in groups], self.world_size)[self.rank]
        return Batch(groups=groups, mine=mine, seen=self.seen(step))

    def groups_of(self, step: int) -> list[Group]:
        """The groups of global batch number `step`, of all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch
        return [self.groups[i] for i in self._order_of(epoch)[first : first + self.global_batch]]

    def size_of(self, step: int) -> int:
        """How many groups the batch of that step has, over all ranks."""
        end = self.seen((step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        return min(self.global_batch, end - self.seen(step))

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            everyone = range(len(self.groups))
            self._order = epoch, epoch_order(len(everyone), self.seed, epoch) if self.shuffle else everyone
        return self._order[1]

    def seen(self, step: int) -> int:
        """How many groups the run has trained on before global batch number `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * (len(self.groups) - self.dropped) + position * self.global_batch


class Stream:
    """Batches of the same groups beside the loader's, for what `prepare` asks in addition to its own batch: it goes
    through the groups again and again, each time in an order that no epoch of the loader has."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def batch(self, start: int, count: int) -> Batch:
        """Groups number `start` to `start + count` of the stream, counted over all its turns, dealt to the ranks; one
        that comes twice, at the end of a turn and in the next, stands once."""
        groups, loader = self._loader.groups, self._loader
        orders: dict[int, list[int]] = {}
        found: dict[int, Group] = {}
        for number in range(start, start + count):
            turn, position = divmod(number, len(groups))
            if turn not in orders:
                orders[turn] = epoch_order(len(groups), loader.seed, -2 - turn)  # -1 is the split for evaluation
            found[orders[turn][position]] = groups[orders[turn][position]]
        dealt = deal([num_computed(group) for group in found.values()], loader.world_size)
        return Batch(list(found.values()), dealt[loader.rank])


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Which of a batch's groups each rank computes: positions in `sizes`, ascending, a list a rank.

    sizes: tokens of each group. hands: number of ranks. The largest groups are dealt first, to and fro (rank 0, 1, 1,
    0, ...), so that ranks differ by one group at most and have about as many tokens.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    turns = [*range(hands), *reversed(range(hands))]
    found: list[list[int]] = [[] for _ in range(hands)]
    for turn, i in enumerate(order):
        found[turns[turn % len(turns)]].append(i)
    return [sorted(hand) for hand in found]
