"""The contract of an algorithm, and the algorithms found by their file names.

An algorithm is one frozen dataclass in `dsalign/algos/NAME.py`: fields are hyper-parameters, methods are mathematics.
`prepare` does all that has no gradient, `<role>_loss` all that has one. Losses are sums; the trainer divides by units.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

if TYPE_CHECKING:  # the algorithms must be readable before torch and transformers are imported
    from torch import Tensor

    from dsalign.data.tokenize import Group

Metric: TypeAlias = "tuple[Tensor | float, Tensor | float]"  # (sum, count); both add over ranks
Metrics = Mapping[str, Metric]


@dataclass(frozen=True)
class Loss:
    """What a loss method returns: sums that add over chunks, micro-batches and ranks.

    terms: unit -> scalar sum, float32, with gradient; the trainer divides each by the global count of its unit.
    metrics: name -> (sum, count), detached.
    """

    terms: Mapping[str, Tensor]
    metrics: Metrics


@dataclass(frozen=True)
class Fused:
    """A kernel that computes a loss method, its metrics and its gradient in one launch: `dsalign.fused` has them.

    kernel: "pairs", "labels", "clipped_policy" or "clipped_value"; arguments: what it is given beside the batch.
    nll: weight of the term "chosen_tokens"; weight: of the whole loss; means: whether metrics a token are logged.
    """

    kernel: str
    arguments: Mapping[str, Any]
    nll: float = 0.0
    weight: float = 1.0
    means: bool = False


@dataclass(frozen=True)
class Batch:
    """The groups of one global batch, in global order, and which of them this rank computes."""

    groups: Sequence[Group]
    mine: Sequence[int]  # positions in `groups`, ascending
    seen: int = 0  # groups of all batches before this one

    @property
    def local(self) -> list[Group]:
        """This rank's groups."""
        return [self.groups[i] for i in self.mine]


@dataclass(frozen=True)
class Prepared:
    """All that a global batch needs and that has no gradient: this rank's part.

    groups: this rank's groups with their completions. fields: name -> one 1-D tensor a group (a number a token, a
    completion or a group: the algorithm knows). shared: numbers equal on all ranks. metrics: this rank's (sum, count).
    """

    groups: Sequence[Group]
    fields: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()  # sampled completions to show and keep: JSON-able


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature > 0; top_p in (0, 1], 1 = off; top_k >= 0, 0 = off, 1 = greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1  # completions a prompt


@dataclass(frozen=True)
class MicroBatch:
    """Some groups of a prepared batch, flattened: S completions, N completion tokens, no padding.

    lengths: [S] int64, tokens a completion. segment: [N] int64, completion of each token. position: [N] int64, index of
    the token in its completion. fields: the groups' fields, concatenated.
    """

    groups: Sequence[Group]
    lengths: Tensor
    segment: Tensor
    position: Tensor
    fields: Mapping[str, Tensor]
    shared: Mapping[str, float]

    def sum(self, tokens: Tensor) -> Tensor:
        """[N] a number a token -> [S] its sum over each completion, in the dtype of the numbers."""
        return tokens.new_zeros(len(self.lengths)).index_add(0, self.segment, tokens)


@dataclass(frozen=True)
class Output:
    """What a model gives for a micro-batch.

    logps: [N] float32, log-probability of each completion token, nats. entropy: [N] float32, nats, no gradient.
    values: of the role "value", [N + S] float32, one a position from the last prompt token to the last completion
    token. scores: of the role "reward", [S] float32, the value at the last token of each completion.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None

    @classmethod
    def of(cls, role: str, numbers: Tensor, entropy: Tensor | None = None) -> Output:
        """What the model of a role gives, from its numbers."""
        if role == "reward":
            return cls(scores=numbers)
        return cls(values=numbers) if role == "value" else cls(logps=numbers, entropy=entropy)

    @property
    def numbers(self) -> Tensor:
        """Log-probabilities, values or scores: what there is."""
        return next(x for x in (self.logps, self.values, self.scores) if x is not None)

    def size(self, group: Group) -> int:
        """How many of the numbers are a group's."""
        if self.logps is not None:
            return sum(group.lengths)
        return sum(len(c) + 1 for c in group.completions) if self.values is not None else len(group.completions)


class Context(Protocol):
    """What `prepare` may ask for. Every method is collective: all ranks call it, in the same order."""

    step: int  # prepared batches before this one
    total_batches: int  # prepared batches of the whole run
    max_length: int  # tokens of a prompt and a completion
    end_ids: frozenset[int]  # the tokens that end a completion
    generator: torch.Generator  # seeded by (seed, step): the same stream on every rank
    state: dict[str, Any]  # JSON-able, equal on all ranks, checkpointed

    def logps(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        """One [tokens of the group's completions] float32 tensor a group, no gradient. batch_size: groups a forward."""

    def logps_beside(self, role: str, own: Sequence[Group], groups: Sequence[Group]) -> list[Tensor]:
        """`logps` of groups by a trained role. own: this rank's groups of the batch, all of them in one optimizer step,
        which have the same prompts in the same order: those may then be computed once for both."""

    def values(self, role: str, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        """One [tokens + completions of the group] float32 tensor a group, no gradient. batch_size: groups a forward."""

    def generate(
        self, role: str, groups: Sequence[Group], sampling: Sampling, batch_size: int
    ) -> tuple[list[Group], list[Tensor]]:
        """(the groups with sampled completions, the sampler's log-probability of each token, one tensor a group)."""

    def scores(self, groups: Sequence[Group], batch_size: int) -> list[Tensor]:
        """One [completions] float32 tensor a group: rewards of the reward model and functions, weighted and added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""

    def gae(
        self,
        rewards: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[Sequence[int]],
        gamma: float,
        lam: float,
    ) -> list[Tensor]:
        """Advantages of each group's tokens: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
        V and A 0 after a completion's last token; lengths: tokens of each completion. arXiv:1506.02438, eq. 16."""

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks, in float64."""

    def gather(self, numbers: Tensor) -> Tensor:
        """1-D float64 tensors of all ranks, concatenated in rank order; lengths may differ."""

    def warn(self, text: str) -> None:
        """One line on rank 0, once a run for each text."""


class Algorithm(Protocol):
    """The contract; see CONTRIBUTING.md for how to add one.

    Optional: `fused(role, batch) -> Fused | None`, the kernel that does <role>_loss on a GPU; `asks(groups, max_length)
    -> list[Group]`, what `prepare` asks the reference about beside the groups of a global batch: as many, or none."""

    data: ClassVar[str]  # "demonstrations", "pairs", "labels", "prompts"
    learning_rates: ClassVar[Mapping[str, float]]  # tuner -> default learning rate
    dropout: ClassVar[float]  # LoRA dropout by default; 0 = the algorithm runs with all dropout off

    @property
    def needs(self) -> frozenset[str]:
        """Beyond log-probabilities: "entropy"; "NAME_var": a metric's variance over the updates of one prepared
        batch."""

    @property
    def temperature(self) -> float:
        """Logits are divided by it in every log-probability of the run."""

    @property
    def role_learning_rates(self) -> Mapping[str, float]:
        """Trained role -> peak learning rate, where it is not the run's."""

    @property
    def roles(self) -> Mapping[str, str]:
        """Role -> "train" or "frozen"."""

    @property
    def epochs(self) -> int:
        """Passes over one prepared batch."""

    @property
    def mini_batches(self) -> int:
        """Optimizer steps a pass."""

    @property
    def min_groups(self) -> int:
        """The smallest global batch the mathematics allows."""

    def notes(self, groups: Sequence[Group]) -> list[str]:
        """Lines to say about the data set at the start, on rank 0."""

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """All that has no gradient, once a global batch."""

    def units(self, groups: Sequence[Group]) -> Mapping[str, int]:
        """This rank's count of what each term is divided by; the trainer adds them over ranks."""

    def stop(self, metrics: Mapping[str, float]) -> bool:
        """Whether the passes over this prepared batch should end (a target KL)."""


def names() -> tuple[str, ...]:
    """The algorithms: one a file of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(name: str) -> type[Any]:
    """The dataclass of the algorithm `name`.

    Raises ValueError where there is no such file.
    """
    if name not in names():
        raise ValueError(f"algo: no algorithm is called {name!r}; choose one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    mine = [c for c in vars(module).values() if getattr(c, "__module__", None) == module.__name__]
    found = [c for c in mine if dataclasses.is_dataclass(c) and hasattr(c, "roles")]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one dataclass with roles, it has {len(found)}")
    algorithm: type[Any] = found[0]  # type: ignore[assignment]
    return algorithm
