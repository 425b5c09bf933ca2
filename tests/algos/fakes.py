"""Numbers in the place of networks, threads in the place of ranks: what `prepare` and the losses are run on here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsalign.contract.groups import Batch, Group, MicroBatch, Output, Prepared, Sampled, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.packing import cut
from dsalign.loop import loss as fused

Array = NDArray[np.float64]
Ids = tuple[int, ...]
Model = Callable[[str, Ids, Ids], Array]  # role, prompt, completion -> the log-probability of each token, nats
T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawn:
    """A model whose numbers are drawn from a generator that role, prompt and completion seed.

    All are multiples of `grain`, a power of two, so that sums of them are exact in float32 too: what is left of float32
    is the rounding of the loss functions. Delta a token is in [gap_low, gap_high] where the reference stays below 0.
    """

    low: float = -6.0  # nats a token of the policy
    high: float = -0.01
    gap_low: float = -0.5  # nats a token, policy less reference
    gap_high: float = 0.5
    grain: float = 2.0**-8  # nats
    seed: int = 0

    def __call__(self, role: str, prompt: Ids, completion: Ids) -> Array:
        rng = np.random.default_rng([self.seed, *prompt, 10**6, *completion])
        policy = self._multiples(rng, self.low, self.high, len(completion))
        if role == "policy":
            return policy
        return np.minimum(policy - self._multiples(rng, self.gap_low, self.gap_high, len(completion)), -self.grain)

    def _multiples(self, rng: np.random.Generator, low: float, high: float, n: int) -> Array:
        first, last = int(np.ceil(low / self.grain)), int(np.floor(high / self.grain))
        return rng.integers(first, last, n, endpoint=True) * self.grain


def table(rows: Mapping[tuple[Ids, Ids], tuple[Sequence[float], Sequence[float]]]) -> Model:
    """The model with these numbers: (prompt, completion) -> (those of the policy, those of the reference)."""
    return lambda role, prompt, completion: np.array(rows[prompt, completion][role == "reference"], dtype=np.float64)


class Ranks:
    """`world` ranks as threads that meet at every collective."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=60)
        self._things: list[Any] = [None] * world

    def exchange(self, rank: int, thing: Any) -> list[Any]:
        """Everybody's thing, in rank order."""
        self._things[rank] = thing
        self._barrier.wait()
        found = list(self._things)
        self._barrier.wait()
        return found

    def run(self, work: Callable[[int], T]) -> list[T]:
        """work(rank) on every rank at once; the results in rank order."""

        def guarded(rank: int) -> T:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()  # or the others would wait for this one
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(guarded, range(self.world)))


class FakeContext:
    """`dsalign.contract.algorithm.Context` over a `Model`; remembers what it was asked and told."""

    def __init__(self, model: Model, *, ranks: Ranks | None = None, rank: int = 0, max_length: int = 64) -> None:
        self.model, self.rank, self.max_length = model, rank, max_length
        self.ranks = ranks or Ranks(1)
        self.step, self.total_batches, self.state = 0, 1, dict[str, Any]()
        self.end_ids, self.rollout = frozenset[int](), RolloutOptions()
        self.asked: list[tuple[str, list[Group]]] = []
        self.warnings: list[str] = []

    def logps(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        self.asked.append((role, list(groups)))
        return [torch.tensor(np.concatenate(given(self.model, role, g))).to(torch.get_default_dtype()) for g in groups]

    def values(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        raise AssertionError("no algorithm trained on rows prepares values")

    def generate(self, role: str, groups: Sequence[Group], samples: int, first: int = 0) -> Sampled:
        raise AssertionError("no algorithm trained on rows samples completions")

    def scores(self, groups: Sequence[Group]) -> Scores:
        raise AssertionError("no algorithm trained on rows asks for scores")

    def more(self, count: int) -> Batch:
        raise AssertionError("no algorithm trained on rows asks for further prompts")

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def gae(self, rewards: Any, values: Any, lengths: Any, gamma: float, lam: float) -> list[Tensor]:
        return fused.gae(rewards, values, lengths, gamma, lam, CPU)

    def total(self, numbers: Sequence[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.ranks.exchange(self.rank, list(numbers)), strict=True)]

    def gather(self, numbers: Tensor) -> Tensor:
        assert numbers.dtype == torch.float64 and numbers.ndim == 1
        return torch.cat(self.ranks.exchange(self.rank, numbers))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def given(model: Model, role: str, group: Group) -> list[Array]:
    """The model's numbers for each completion of a group."""
    return [model(role, group.prompt, completion) for completion in group.completions]


def pairs(model: Model, role: str, groups: Sequence[Group]) -> list[tuple[Array, Array]]:
    """(chosen, rejected) of each group, as the oracle takes them."""
    return [(chosen, rejected) for chosen, rejected in (given(model, role, g) for g in groups)]


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """What the algorithms make of Python numbers; restored afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepared_on(
    algorithm: Any, groups: Sequence[Group], model: Model, *, world: int = 1, max_length: int = 64
) -> list[tuple[Prepared, FakeContext]]:
    """What each of `world` ranks prepares, with the context it was asked through; groups go to ranks in turn."""
    ranks = Ranks(world)

    def work(rank: int) -> tuple[Prepared, FakeContext]:
        ctx = FakeContext(model, ranks=ranks, rank=rank, max_length=max_length)
        return algorithm.prepare(ctx, Batch(groups, range(rank, len(groups), world))), ctx

    return ranks.run(work)


def output(model: Model, groups: Sequence[Group]) -> Output:
    """The policy's token log-probabilities, a leaf that gradients end in."""
    numbers = [x for g in groups for x in given(model, "policy", g)]
    flat = torch.tensor(np.concatenate([*numbers, np.empty(0)])).to(torch.get_default_dtype())
    return Output(logps=flat.requires_grad_())


def divided(algorithm: Any, role: str, out: Output, micro: MicroBatch) -> Tensor:
    """The loss of a global batch that is one micro-batch of one rank, each term over its count as the trainer does."""
    scales = {unit: 1 / count for unit, count in algorithm.units(micro).items() if count}
    return fused.scaled_loss(algorithm, role, out, micro, scales, impl="torch")[0]


def loss_and_gradient(
    algorithm: Any, groups: Sequence[Group], model: Model, dtype: torch.dtype
) -> tuple[float, Array, Prepared]:
    """dsalign's loss of the policy, its gradient with respect to all token log-probabilities, and what was prepared."""
    with precision(dtype):
        ((prepared, _),) = prepared_on(algorithm, groups, model)
        out = output(model, prepared.groups)
        total = divided(algorithm, "policy", out, cut(prepared, range(len(groups)), CPU))
        assert total.dtype == dtype and out.logps is not None
        total.backward()
    assert out.logps.grad is not None
    return float(total.detach()), out.logps.grad.double().numpy(), prepared


def flat(nested: Any) -> Array:
    """All numbers of nested lists and tuples of arrays, in order."""
    if isinstance(nested, np.ndarray):
        return nested.ravel()
    return np.concatenate([flat(child) for child in nested])


def metrics_of(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(sum, count) of each metric as plain numbers."""
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
