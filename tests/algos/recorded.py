"""Recorded rollouts in the place of a sampler: completions and what every model says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fakes import Array, FakeContext, Ranks, metrics_of
from support import random_groups
from torch import Tensor

from dsalign.contract.groups import Batch, Group, Prepared, Sampled, Scores
from dsalign.contract.rollout_options import RolloutOptions

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

    @property
    def ended(self) -> bool:
        """Whether it has its end token."""
        return self.ids[-1] in (END, SECOND_END)


Plays = Mapping[int, Sequence[Played]]  # index of the prompt -> its completions by their number


def played(ids: Sequence[int], seed: int, score: float | None = None) -> Played:
    """Numbers that are multiples of 2^-8, so that float32 holds them exactly; the sampler agrees with the trainer."""
    rng, n = np.random.default_rng([seed, *ids]), len(ids)
    old = rng.integers(-1200, -3, n) / 256
    reference = np.minimum(old - rng.integers(-128, 128, n, endpoint=True) / 256, -1 / 256)
    values, drawn = rng.integers(-512, 512, n + 1) / 256, float(rng.integers(-512, 512)) / 256
    return Played(tuple(ids), old, reference, old, values, drawn if score is None else score)


# Two completions a prompt, of 1 to 5 tokens; ids 0 and end ids stand where only their place says what they are.
RAGGED = (
    ((0, 5, 0, END), (END,)),
    ((0,), (9, SECOND_END)),
    ((8, 8, 8, 8, 8), (0, 0, SECOND_END)),
    ((6, 0), (4, 5, 6, END)),
)


def played_of(n: int) -> dict[int, list[Played]]:
    """Two completions for each of n prompts, as long as those of RAGGED over and over."""
    return {i: [played(ids, 11 * i + j) for j, ids in enumerate(RAGGED[i % len(RAGGED)])] for i in range(n)}


PLAYS = played_of(len(RAGGED))
ONLINE: dict[str, dict[str, Any]] = {  # settings for two completions a prompt, which make a loss depend on all it can
    "ppo": {"num_generations": 2},
    "grpo": {"num_generations": 2, "mask_truncated": True, "overlong_buffer": 2, "epsilon_high": 0.3},
    "rloo": {"num_generations": 2},
    "reinforce": {"num_generations": 2},
    "online_dpo": {},
}


def prompts(n: int) -> list[Group]:
    """n groups without completions, whose prompts have ids that mean something elsewhere."""
    return [replace(g, prompt=(0, END, 5)[: 1 + g.index % 3]) for g in random_groups("prompts", n)]


PROMPTS = prompts(len(RAGGED))


class Recorded(FakeContext):
    """A context whose sampler plays what was recorded for a prompt; `more` gives the prompts of `stream`, in order."""

    def __init__(
        self,
        plays: Plays,
        *,
        step: int = 0,
        total_batches: int = 1,
        rollout: RolloutOptions | None = None,
        stream: Sequence[Group] = (),
        **ranks: Any,
    ) -> None:
        super().__init__(lambda role, prompt, ids: np.zeros(len(ids)), **ranks)
        self.plays, self.step, self.total_batches, self.stream = plays, step, total_batches, list(stream)
        self.rollout = rollout or RolloutOptions(max_new_tokens=5)
        self.end_ids = frozenset({END, SECOND_END})
        self.sampled: list[tuple[int, int]] = []  # (samples, first) of each call
        self.drawn: list[int] = []  # groups that each call asked `more` for

    def generate(self, role: str, groups: Sequence[Group], samples: int, first: int = 0) -> Sampled:
        assert role == "policy"
        self.sampled.append((samples, first))
        filled = [
            replace(g, completions=tuple(p.ids for p in self.plays[g.index][first : first + samples])) for g in groups
        ]
        assert all(len(g.completions) == samples for g in filled)
        return Sampled(filled, self._each("sampler", filled))

    def logps(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        self.asked.append((role, list(groups)))
        return self._each({"policy": "old", "reference": "reference"}[role], groups)

    def values(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        self.asked.append((role, list(groups)))
        return self._each({"value": "values"}[role], groups)

    def scores(self, groups: Sequence[Group]) -> Scores:
        self.asked.append(("reward", list(groups)))
        total = [tensor([p.score for p in self.of(g)]) for g in groups]
        return Scores(total, {"recorded": total})

    def more(self, count: int) -> Batch:
        self.drawn.append(count)
        given, self.stream = self.stream[:count], self.stream[count:]
        return Batch(given, range(self.rank, len(given), self.ranks.world))

    def of(self, group: Group) -> list[Played]:
        """The recorded completions that a group has."""
        by_ids = {p.ids: p for p in self.plays[group.index]}
        return [by_ids[ids] for ids in group.completions]

    def _each(self, name: str, groups: Sequence[Group]) -> list[Tensor]:
        return [tensor(np.concatenate([getattr(p, name) for p in self.of(g)])) for g in groups]


def tensor(numbers: Any) -> Tensor:
    return torch.tensor(np.asarray(numbers, dtype=np.float64)).to(torch.get_default_dtype())


def prepared_from(
    algorithm: Any, plays: Plays = PLAYS, *, world: int = 1, given: Sequence[Group] = PROMPTS, **of_context: Any
) -> list[tuple[Prepared, Recorded]]:
    """What each rank prepares and the context it asked; prompts go to ranks in turn."""
    ranks = Ranks(world)

    def work(rank: int) -> tuple[Prepared, Recorded]:
        ctx = Recorded(plays, ranks=ranks, rank=rank, **of_context)
        return algorithm.prepare(ctx, Batch(given, range(rank, len(given), world))), ctx

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
