"""The data that flows between the rooms: groups of token ids, batches of groups, outputs of models, and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Metric: TypeAlias = "tuple[Tensor | float, Tensor | float]"  # (sum, count); both add over ranks
Metrics = Mapping[str, Metric]


@dataclass(frozen=True)
class Loss:
    """The result of a loss method, as sums: those of slices, micro-batches and ranks add up to those of the batch.

    terms: unit -> the sum of the loss over that unit, scalar float32 with gradient; the trainer divides each term by
    the global count of its unit. metrics: name -> (sum, count), detached.
    """

    terms: Mapping[str, Tensor]
    metrics: Metrics


@dataclass(frozen=True)
class Fused:
    """The choice of a GPU kernel that computes a loss method, its metrics and its gradient in one launch.

    kernel: its name in loop/loss.py: "pairs", "labels", "clipped_policy" or "clipped_value". arguments: the kernel's
    hyper-parameters, by keyword. reference: whether the field "reference" is subtracted from the policy's
    log-probabilities. nll: weight of the term "chosen_tokens". weight: of the whole loss. means: whether the
    length-normalised log-probabilities of chosen and rejected completions are logged too.
    """

    kernel: str
    arguments: Mapping[str, Any]
    reference: bool = False
    nll: float = 0.0
    weight: float = 1.0
    means: bool = False


@dataclass(frozen=True)
class Batch:
    """The groups of one global batch, the same on every rank, and which of them this rank computes."""

    groups: Sequence[Group]
    mine: Sequence[int]  # positions in `groups` of this rank's share, ascending
    seen: int = 0  # groups in all the run's batches before this one

    @property
    def local(self) -> list[Group]:
        """This rank's share of the groups, in the order of `mine`."""
        return [self.groups[i] for i in self.mine]


@dataclass(frozen=True)
class Prepared:
    """This rank's part of a global batch with everything that the losses read and that has no gradient.

    groups: this rank's groups with their completions; `prepare` may have dropped groups of the batch or added others.
    fields: name -> one 1-D tensor a group, with one number a token, a completion or a group, as the algorithm defines.
    shared: name -> a number that is equal on all ranks. metrics: this rank's (sum, count). samples: rows of the table
    of sampled completions, JSON-able. positions: one integer a group, its place in the global batch, by which groups
    are shuffled into optimizer steps; no two groups of any ranks share a place. None = `Batch.mine`: `groups` are those
    of the batch, none dropped and none added.
    """

    groups: Sequence[Group]
    fields: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    positions: Sequence[int] | None = None


@dataclass(frozen=True)
class Sampled:
    """Completions that a rollout engine sampled for the groups of this rank.

    groups: each with its completions. logps: one [completion tokens] float32 tensor a group, log-probabilities that the
    sampler had, nats. exact: whether they are the trainer's own up to rounding: it computes in float32, and the probe
    of this rollout has seen so. gap: |sampler - trainer| over the probed tokens, (sum, count), nats.
    """

    groups: Sequence[Group]
    logps: Sequence[Tensor]
    exact: bool = False
    gap: Metric = (0.0, 0)


@dataclass(frozen=True)
class Scores:
    """The rewards of sampled completions; each tensor is [completions of a group] float32, units of reward.

    total: one tensor a group, the weighted sum over all sources. sources: name of the reward model or of a reward
    function -> one tensor a group, the scores of that source alone, before its weight.
    """

    total: Sequence[Tensor]
    sources: Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class MicroBatch:
    """Groups of a prepared batch, flattened without padding into S completions with N completion tokens in all.

    Tokens that `Group.masks` leaves out are not among the N. lengths: [S] int64, tokens of each completion. segment:
    [N] int64, index in 0..S-1 of the completion that each token belongs to. position: [N] int64, index of each token
    among its completion's. fields: `Prepared.fields` of these groups, concatenated over groups. shared: as prepared.
    """

    groups: Sequence[Group]
    lengths: Tensor
    segment: Tensor
    position: Tensor
    fields: Mapping[str, Tensor]
    shared: Mapping[str, float]

    def spread(self, completions: Tensor) -> Tensor:
        """Repeat numbers of completions, [S], for each token of the completion, [N]."""
        return completions[self.segment]

    def sum(self, tokens: Tensor) -> Tensor:
        """Sum numbers of tokens, [N], over each completion, [S], in the dtype of the numbers."""
        return tokens.new_zeros(len(self.lengths)).index_add(0, self.segment, tokens)


@dataclass(frozen=True)
class Output:
    """The output of a role's model for a micro-batch; one of logps, values and scores is set, by the role.

    logps: [N] float32, log-probability of each completion token, nats. entropy: [N] float32, entropy of the
    distribution that predicts each token, nats, no gradient. values: of the role "value", [N + S] float32, for each
    completion one value a position from the last prompt token to its last token. scores: of the role "reward", [S]
    float32, the value head at the last token of each completion.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None

    @classmethod
    def of(cls, role: str, numbers: Tensor, entropy: Tensor | None = None) -> Output:
        """The output of a role's model from the tensor that the model returned: scores, values or log-probabilities."""
        if role == "reward":
            return cls(scores=numbers)
        return cls(values=numbers) if role == "value" else cls(logps=numbers, entropy=entropy)

    @property
    def numbers(self) -> Tensor:
        """The one of log-probabilities, values and scores that is set."""
        return next(x for x in (self.logps, self.values, self.scores) if x is not None)

    def size(self, group: Group) -> int:
        """The number of elements of `numbers` that belong to a group."""
        if self.logps is not None:
            return sum(group.lengths)
        return sum(len(c) + 1 for c in group.completions) if self.values is not None else len(group.completions)


# {"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant may also have tool_calls,
# [{"type": "function", "function": {"name": text, "arguments": {...}}}], and reasoning_content, text; a tool its name.
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": text, ...}}: a JSON schema


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its k completions, as token ids: a pair has k = 2 (chosen, rejected), a prompt alone k = 0."""

    index: int  # position in the tokenised data set: seeds the sampling, breaks ties
    where: str  # file and line of its row
    prompt: tuple[int, ...]  # at least one id
    completions: tuple[tuple[int, ...], ...]  # each at least one id; the last is an end token unless truncated
    prompt_text: str  # rendered prompt, not truncated
    label: bool | None = None  # True = desirable, None = unlabelled
    margin: float | None = None  # by how much chosen is better, units of reward
    columns: Mapping[str, object] = field(default_factory=dict)  # the row's other columns, for reward functions
    turns: tuple[Message, ...] = ()  # of a prompt alone: its messages, for a reward model with another template
    masks: tuple[tuple[bool, ...], ...] | None = None  # which completion tokens the losses count; None = all
    tools: tuple[Tool, ...] = ()  # of a prompt alone: the functions that the assistant may call

    @property
    def counted(self) -> Sequence[Sequence[bool]]:
        """One mask a completion: whether the losses count each token. They are `masks`, or True where it is None."""
        return [[True] * len(c) for c in self.completions] if self.masks is None else self.masks

    @property
    def lengths(self) -> tuple[int, ...]:
        """|y| of each completion: the number of its tokens that `masks` keeps."""
        return tuple(map(len, self.completions)) if self.masks is None else tuple(map(sum, self.masks))
