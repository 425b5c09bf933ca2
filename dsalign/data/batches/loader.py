"""Which groups an optimizer step sees, and which of them a rank computes: pure functions of (seed, epoch, step)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dsalign.contract.groups import Batch, Group
from dsalign.data.batches.packing import num_computed


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(num_rows), the same on every rank and every machine."""
    order = list(range(num_rows))
    random.Random(f"dsalign order {seed} {epoch}").shuffle(order)
    return order


class Loader:
    """Global batches of `global_batch` groups; the last batch of an epoch may be shorter.

    min_groups: a last batch with fewer groups is left out (KTO needs two); `dropped` counts its groups an epoch.
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
        """The batch of the step-th prepared batch of the run, counted from 0."""
        groups = self.groups_of(step)
        mine = deal([num_computed(g) for g in groups], self.world_size)[self.rank]
        return Batch(groups=groups, mine=mine, seen=self.seen(step))

    def groups_of(self, step: int) -> list[Group]:
        """The groups of that batch, of all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch
        return [self.groups[i] for i in self._order_of(epoch)[first : first + self.global_batch]]

    def left_out(self, epoch: int) -> list[Group]:
        """The groups that no batch of that epoch has."""
        return [self.groups[i] for i in self._order_of(epoch)[len(self.groups) - self.dropped :]]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            everyone = range(len(self.groups))
            self._order = epoch, epoch_order(len(everyone), self.seed, epoch) if self.shuffle else everyone
        return self._order[1]

    def seen(self, step: int) -> int:
        """How many groups the batches before that one have."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * (len(self.groups) - self.dropped) + position * self.global_batch


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Positions of `sizes` for each rank, ascending: the largest first and to and fro (0, 1, 1, 0, ...), so that ranks
    have as many groups, one more at most, and about as many tokens."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    turns = [*range(hands), *reversed(range(hands))]
    found: list[list[int]] = [[] for _ in range(hands)]
    for turn, i in enumerate(order):
        found[turns[turn % len(turns)]].append(i)
    return [sorted(hand) for hand in found]
