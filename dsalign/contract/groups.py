"""What flows between the rooms: groups of token ids, batches of them, and what models and losses give for them."""

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


# {"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant may also have tool_calls,
# [{"type": "function", "function": {"name": text, "arguments": {...}}}], and reasoning_content, text; a tool its name.
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": text, ...}}: a JSON schema


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its k completions."""

    index: int  # position in the tokenised data set: the identity used for order and ties
    where: str  # file and line the row came from
    prompt: tuple[int, ...]  # at least one id
    completions: tuple[tuple[int, ...], ...]  # each at least one id; the last is an end token unless truncated
    prompt_text: str  # rendered prompt, not truncated
    label: bool | None = None  # True = desirable
    margin: float | None = None  # units of reward
    columns: Mapping[str, object] = field(default_factory=dict)  # what no format took
    turns: tuple[Message, ...] = ()  # the prompt's messages, where there is no completion: for another model's template
    masks: tuple[tuple[bool, ...], ...] | None = None  # which completion tokens count; None = all
    tools: tuple[Tool, ...] = ()  # what the prompt lets the assistant call, where there is no completion

    @property
    def lengths(self) -> tuple[int, ...]:
        """|y| of each completion: its tokens that count."""
        return tuple(map(len, self.completions)) if self.masks is None else tuple(map(sum, self.masks))
