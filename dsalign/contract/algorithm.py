"""The contract of an algorithm: what it offers the trainer, and what its `prepare` may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from dsalign.contract.groups import Batch, Prepared, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


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


def plain(ctx: Context, batch: Batch) -> Prepared:
    """Nothing to prepare: this rank's groups as they are."""
    return Prepared(groups=batch.local)


def with_reference(ctx: Context, batch: Batch) -> Prepared:
    """This rank's groups with the reference's token log-probabilities: field "reference", one a completion token."""
    return Prepared(groups=batch.local, fields={"reference": ctx.logps("reference", batch.local)})


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with open_low)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
