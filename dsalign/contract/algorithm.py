"""The contract: `Traits` and `Algorithm` are what an algorithm declares and computes, `Context` is what the trainer
offers to its `prepare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dsalign.contract.groups import Batch, Fused, Loss, MicroBatch, Output, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group, Sampled, Scores
    from dsalign.contract.rollout_options import RolloutOptions


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The declarations of an algorithm: the rows and models that a run of it needs, its schedule and its defaults."""

    data: str  # the kind of rows it reads: "demonstrations", "pairs", "labels" or "prompts"
    roles: Mapping[str, str]  # role -> "train" or "frozen"
    main: str = "policy"  # the trained role whose tokenizer, gradient norm and learning rate are logged as the run's
    learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"full": 1e-6, "lora": 5e-5}
    )  # tuner -> default
    role_learning_rates: Mapping[str, float] = field(
        default_factory=dict
    )  # trained role -> its own peak, if it has one
    dropout: float = 0.0  # LoRA dropout by default; 0 = the algorithm runs with all dropout off
    needs: frozenset[str] = frozenset({"entropy"})  # what of `Output` the losses read beside logps
    min_groups: int = 1  # groups in the smallest global batch that the mathematics allows
    epochs: int = 1  # training passes over one prepared batch
    mini_batches: int = 1  # optimizer steps in one such pass
    # option -> value -> the algorithm that is run in place of this one where the option has that value
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the trained roles, the main role first."""
        others = [role for role, how in self.roles.items() if how == "train" and role != self.main]
        return (self.main, *others)

    @property
    def passes(self) -> int:
        """The number of optimizer steps over one prepared batch."""
        return self.epochs * self.mini_batches

    @property
    def online(self) -> bool:
        """Whether the algorithm samples its completions; if not, it reads them from rows."""
        return self.data == "prompts"


class Context(Protocol):
    """The services of the trainer to `prepare`. Every method is collective: all ranks call it, in the same order."""

    step: int  # index of this prepared batch in the run, from 0
    total_batches: int  # prepared batches of the whole run
    max_length: int  # tokens of a prompt with one completion, at most
    end_ids: frozenset[int]  # the tokens that end a completion
    rollout: RolloutOptions  # how completions are sampled
    state: dict[str, Any]  # the algorithm's memory from batch to batch: JSON-able, equal on all ranks, checkpointed

    def logps(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        """Log-probabilities of the completion tokens of `groups` under the role's model, without gradient.

        Returns one [completion tokens of the group] float32 tensor a group, nats, completions one after the other and
        without the tokens that `Group.masks` leaves out; on the CPU.
        """

    def values(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        """The critic's values of `groups`, without gradient: one value for each position from the last prompt token to
        a completion's last token.

        Returns one [tokens + completions of the group] float32 tensor a group, units of reward; on the CPU.
        """

    def generate(self, role: str, groups: Sequence[Group], samples: int, first: int = 0) -> Sampled:
        """Sample `samples` completions of each group's prompt from the role's model, with the options `self.rollout`.

        first: the number of a prompt's first completion; a completion is a function of (seed, step, prompt, number), so
        a later call for the same prompt takes higher numbers to get other completions.
        Raises ValueError where the sampler is seen to use other weights than the role's model.
        """

    def scores(self, groups: Sequence[Group]) -> Scores:
        """Score the completions of `groups` with the run's reward model and reward functions.

        Raises ValueError where the run has neither.
        """

    def more(self, count: int) -> Batch:
        """Draw `count` further training prompts, as a batch that is dealt to the ranks like any other.

        They come from a second stream over the training set, in an order that no epoch has; its position is
        checkpointed. A prompt drawn twice in one call is returned once. In an evaluation the batch is empty.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""

    def gae(
        self,
        rewards: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[Sequence[int]],
        gamma: float,
        lam: float,
    ) -> list[Tensor]:
        """Generalised advantage estimates, arXiv:1506.02438, eq. 16: delta_t = r_t + gamma V_{t+1} - V_t and
        A_t = delta_t + gamma lam A_{t+1}, with V and A 0 after a completion's last token.

        rewards, values: one [completion tokens] float32 tensor a group, units of reward; lengths: for each group the
        number of tokens of each completion. Returns the advantages in the same shape as the rewards.
        """

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks, in float64."""

    def gather(self, numbers: Tensor) -> Tensor:
        """The 1-D float64 tensors of all ranks, concatenated in rank order; their lengths may differ. On the CPU."""

    def warn(self, text: str) -> None:
        """Log `text` as a warning on rank 0, once in a run however often it is given."""


class Algorithm(Protocol):
    """An algorithm: one frozen dataclass whose fields are hyper-parameters and whose methods are mathematics.

    The class in `dsalign/algos/NAME.py` derives from this protocol, inherits the defaults below, and must define
    `traits`, `units` and one <role>_loss for each trained role. CONTRIBUTING.md shows how.
    """

    @property
    def traits(self) -> Traits:
        """The traits of the algorithm: a class variable, or a property where they depend on the hyper-parameters."""
        raise NotImplementedError

    def check(self, rollout: RolloutOptions) -> None:
        """Raise ValueError where a hyper-parameter contradicts the run's sampling options."""

    def notes(self, groups: Sequence[Group]) -> list[str]:
        """Lines about the training groups that rank 0 logs when the run starts, such as the balance of labels."""
        return []

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Compute everything of a global batch that has no gradient: rollouts, rewards, reference log-probabilities.

        Called once a global batch, on every rank. By default the batch is this rank's groups, without fields.
        """
        return Prepared(batch.local)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        """Unit of a loss term ("pairs", "tokens", ...) -> how many of it this rank's groups of an optimizer step have.

        The trainer adds the counts of all ranks and divides each term of a loss by the total of its unit.
        """
        raise NotImplementedError

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """The policy's loss, summed over the micro-batch. out: the policy's `logps`, and `entropy` where needed."""
        raise NotImplementedError

    def value_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """The critic's loss, summed over the micro-batch. out: the critic's `values`."""
        raise NotImplementedError

    def reward_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """The reward model's loss, summed over the micro-batch. out: the reward model's `scores`."""
        raise NotImplementedError

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Further metrics computed from `means`, the global means of a step's metrics, such as a difference of two."""
        return {}

    def fused(self, role: str, batch: MicroBatch) -> Fused | None:
        """The GPU kernel that computes <role>_loss, its gradient and its metrics in one launch; None = no such kernel,
        and <role>_loss itself is run."""
        return None


def loss_of(algorithm: Algorithm, role: str, out: Output, batch: MicroBatch) -> Loss:
    """The algorithm's loss for a trained role: what its <role>_loss returns for `out` and `batch`."""
    methods = {"policy": algorithm.policy_loss, "value": algorithm.value_loss, "reward": algorithm.reward_loss}
    return methods[role](out, batch)


def with_reference(ctx: Context, batch: Batch) -> Prepared:
    """This rank's groups as a prepared batch with the field "reference": one [completion tokens] float32 tensor a
    group, the reference's log-probabilities, nats. Collective."""
    return Prepared(groups=batch.local, fields={"reference": ctx.logps("reference", batch.local)})


def check_range(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with open_low)."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
