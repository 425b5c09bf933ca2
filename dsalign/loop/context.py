"""The context that an algorithm's `prepare` is given, over the engines of a run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dsalign import phases
from dsalign.checkpoint.random_state import random_state, restore_random_state
from dsalign.contract.groups import Batch, Group, Sampled, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.loader import Stream
from dsalign.engines import dist
from dsalign.engines.roles import ReferenceLogps, Roles
from dsalign.guard.wishes import Wishes
from dsalign.loop import loss
from dsalign.loop.clock import Clock
from dsalign.rollout.generate import Keys, Sampler

logger = logging.getLogger(__name__)
DRAWN = "second stream"  # the key of `state` under which the groups drawn by `more` are counted


class Interrupted(Exception):
    """The signal, on every rank alike, that a wish to stop was agreed within `prepare` or an evaluation."""


class RunContext:
    """The `dsalign.contract.algorithm.Context` of one run; its methods are described there.

    rewards: (groups, how many a forward pass takes) -> their scores; None = no reward. reference: reads the reference's
    log-probabilities from a cache; None = the reference's model computes them. rollout: the options of sampling, None =
    completions are read from rows. stream: the source of further prompts, None = `more` has none. wishes: what asks the
    run to stop or to save; where any rank is told to stop within `prepare` or an evaluation, every rank raises
    Interrupted at its next sum over the ranks.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        seed: int,
        max_length: int,
        state: dict[str, Any],
        end_ids: frozenset[int] = frozenset(),
        total_batches: int = 1,
        rewards: Callable[[Sequence[Group], int], Scores] | None = None,
        reference: ReferenceLogps | None = None,
        decode: Callable[[Sequence[int]], str] = str,
        rollout: RolloutOptions | None = None,
        stream: Stream | None = None,
        wishes: Wishes | None = None,
    ) -> None:
        self._roles, self._seed, self.max_length, self.state = roles, seed, max_length, state
        self.end_ids, self.total_batches, self._rewards, self._decode = end_ids, total_batches, rewards, decode
        self._reference, self._stream, self._online = reference, stream, rollout is not None
        self.rollout = rollout or RolloutOptions()
        self._engines: dict[str, Sampler] = {}  # role -> what samples from its model
        self.clock = Clock()
        self._said: set[str] = set()
        self.wishes = wishes or Wishes()
        self.step = 0

    def at(self, step: int) -> RunContext:
        """This same context, set to prepared batch number `step`, from 0."""
        self.step = step
        return self

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A context manager for an evaluation: meanwhile `state` is a copy and `more` has no prompts, so that training
        goes on as if there had been no evaluation."""
        state, stream, clock = self.state, self._stream, self.clock
        self.state, self._stream, self.clock = copy.deepcopy(state), None, Clock()
        try:
            with self.undone():
                yield
        finally:
            self.state, self._stream, self.clock = state, stream, clock

    @contextmanager
    def undone(self) -> Iterator[Callable[[], None]]:
        """A context manager that sets `state` and the random numbers back where what is inside it is Interrupted, so
        that a resumed run can do it again. It yields a function that sets `state` back, for later."""
        state, drawn = copy.deepcopy(self.state), random_state() if self._online else {}

        def set_back() -> None:
            self.state.clear()
            self.state.update(state)

        try:
            yield set_back
        except Interrupted:
            set_back()
            if drawn:
                restore_random_state(drawn)
            raise

    def logps(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        with self.clock.phase("reference"):
            if role == "reference" and self._reference is not None:
                return self._reference(self._roles, groups, self._size(groups))
            return self._roles.each_group(role, groups, self._size(groups))

    def values(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        with self.clock.phase("reference"):
            return self._roles.each_group(role, groups, self._size(groups))

    def _size(self, groups: Sequence[Group]) -> int | None:
        """How many groups a forward pass without gradient takes: with sampling local_rollout_forward_batch_size divided
        by the completions of a group, >= 1; else None, as many as a micro-batch of training."""
        if not self._online:
            return None
        most = max((len(group.completions) for group in groups), default=1)
        return max(1, self.rollout.local_rollout_forward_batch_size // max(1, most))

    def generate(self, role: str, groups: Sequence[Group], samples: int, first: int = 0) -> Sampled:
        keys = Keys(self._seed, self.step, first)
        if role not in self._engines:
            self._engines[role] = Sampler(self._roles, role, self.rollout, self.end_ids)
        rollout = self._engines[role]
        where = "vLLM" if self.rollout.rollout == "vllm" else "rollout"  # that one may wait for a server
        error: ValueError | None = None
        with self.clock.phase("rollout"), phases.within(where):
            try:
                filled, logps, versions = rollout.sample(groups, samples, keys, self.rollout)
            except ValueError as caught:  # the other ranks are done with theirs, and wait for this one
                error = caught
        with self.clock.phase("wait"):
            (failed,) = self.total([float(error is not None)])
        if failed:
            dist.agree(error)
        with self.clock.phase("rollout"):
            return rollout.probed(filled, logps, versions, self.rollout)

    def scores(self, groups: Sequence[Group]) -> Scores:
        if self._rewards is None:
            raise ValueError("reward: expected a reward model or function, got none; give --reward_model")
        with self.clock.phase("score"):
            return self._rewards(groups, self._size(groups) or 1)

    def more(self, count: int) -> Batch:
        if self._stream is None or count < 1:
            return Batch([], ())
        start = self.state.get(DRAWN, 0)
        self.state[DRAWN] = start + count
        return self._stream.batch(start, count)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids)

    def gae(
        self,
        rewards: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[Sequence[int]],
        gamma: float,
        lam: float,
    ) -> list[Tensor]:
        return loss.gae(rewards, values, lengths, gamma, lam, self._roles.device)

    def total(self, numbers: Sequence[float]) -> list[float]:
        wished = self.wishes.numbers()
        found = dist.total([*wished, *numbers], self._roles.device)
        self.wishes.agreed(found[: len(wished)])
        if self.wishes.stop:
            raise Interrupted
        return found[len(wished) :]

    def gather(self, numbers: Tensor) -> Tensor:
        return dist.gather(numbers, self._roles.device)

    def warn(self, text: str) -> None:
        if text not in self._said and dist.rank() == 0:
            logger.warning(text)
        self._said.add(text)
