"""The generators of a rank give the same numbers again after their state came back."""

from __future__ import annotations

import random

import torch

from dsalign.checkpoint.random_state import random_state, restore_random_state, seed_random_state


def test_the_generators_go_on_where_they_were() -> None:
    """Python keeps a second Gaussian, which is part of the state."""
    random.gauss(0.0, 1.0)
    state = random_state()
    drawn = (random.gauss(0.0, 1.0), random.random(), torch.rand(3).tolist())
    restore_random_state(state)
    assert (random.gauss(0.0, 1.0), random.random(), torch.rand(3).tolist()) == drawn


def test_other_ranks_draw_what_seed_step_and_rank_say() -> None:
    """The same again for the same three, and something else where one of them differs."""

    def drawn(*where: int) -> tuple[float, ...]:
        seed_random_state(*where)
        return (random.random(), *torch.rand(2).tolist())

    assert drawn(42, 6, 1) == drawn(42, 6, 1)
    assert len({drawn(42, 6, 1), drawn(42, 6, 0), drawn(42, 7, 1), drawn(1, 6, 1)}) == 4
