"""Rows of text to groups of token ids: one prompt and its completions, at most max_length tokens."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from dsalign.contract.groups import Group
from dsalign.data.rows.records import Row
from dsalign.data.tokens.templates import Encoded, Template, assistant
from dsalign.data.tokens.words import Ids

TRUNCATIONS = ("delete", "left", "right", "raise")
CHUNK = 1024  # rows a tokenizer call: enough for its threads, little memory
THREADS = 2  # chunks that are encoded at a time: one is rendered while another is read, without the interpreter lock
TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no completion token left"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The groups of a data set, and how many of its rows did not become whole groups."""

    groups: Sequence[Group]
    num_rows: int  # read
    dropped: Mapping[str, int]  # rule -> rows
    truncated: int  # groups that lost tokens


@dataclass
class Tally:
    """How many rows were read, dropped and truncated, counted while they are tokenised."""

    num_rows: int = 0  # read
    dropped: Counter[str] = field(default_factory=Counter)  # rule -> rows
    truncated: int = 0  # groups that lost tokens

    def add(self, other: Tally) -> None:
        """Add another tally's counts to this one's."""
        self.num_rows += other.num_rows
        self.dropped.update(other.dropped)
        self.truncated += other.truncated


@dataclass(frozen=True)
class Encoder:
    """Makes a group of each row, in their order, of at most max_length tokens: len(prompt) + len(longest completion).

    template: writes the conversation and tokenises it. truncation, for a longer row: "delete" drops it; "left" cuts the
    prompt's beginning, down to one token, then the completions' ends; "right" cuts the completions' ends and drops the
    row where no token is left; "raise" refuses it. A cut completion has no end token, so that the model does not learn
    to stop there. assistant_turns: "last", or "all" for demonstrations in which every answer is learnt from
    (`Template.encode_turns`).
    Raises ValueError for a truncation that is not one of TRUNCATIONS, and for max_length below 2.
    """

    template: Template
    max_length: int
    truncation: str
    assistant_turns: str = "last"

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation_strategy: expected one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}")
        if self.max_length < 2:
            raise ValueError(
                f"max_length: expected at least 2 (a prompt and a completion token), got {self.max_length}"
            )

    def __call__(self, rows: Sequence[Row]) -> tuple[list[Group], Tally]:
        """(groups, tally): the groups of these rows, numbered from 0 without gaps, and what became of the rows.

        Raises ValueError for a row that the template refuses, and for one that is too long where truncation is "raise".
        """
        tally, found = Tally(num_rows=len(rows)), list[Group]()
        for row, encoded in zip(rows, _encoded(rows, self.template, self.assistant_turns), strict=True):
            cut = self._cut(row, encoded, tally)
            if cut is not None:
                prompt, completions, masks = cut
                ids = tuple(map(tuple, completions))
                known = (row.label, row.margin, row.columns, () if ids else row.prompt)
                kept = None if masks is None or all(map(all, masks)) else tuple(map(tuple, masks))
                tools = () if ids else row.tools
                found.append(Group(len(found), row.where, tuple(prompt), ids, encoded.prompt_text, *known, kept, tools))
        return found, tally

    def _cut(self, row: Row, encoded: Encoded, tally: Tally) -> tuple[Ids, list[Ids], list[list[bool]] | None] | None:
        """Prompt, completions and masks that fit; None where the row is dropped, which is counted."""
        _, prompt, completions, masks = encoded
        length = len(prompt) + max(map(len, completions), default=0)
        if length <= self.max_length:
            return prompt, completions, masks
        if self.truncation == "raise":
            raise ValueError(
                f"{row.where}: expected at most max_length = {self.max_length} tokens, got {length} (prompt "
                f"{len(prompt)}); raise --max_length, or use --truncation_strategy delete, left or right"
            )
        if self.truncation == "delete":
            tally.dropped[TOO_LONG] += 1
            return None
        cut = _cut_left if self.truncation == "left" else _cut_right
        prompt, completions = cut(prompt, completions, self.max_length)
        masks = masks and [mask[: len(ids)] for mask, ids in zip(masks, completions, strict=True)]
        if len(prompt) > self.max_length or not all(completions) or (masks and not all(map(any, masks))):
            tally.dropped[NOTHING_LEFT] += 1
            return None
        tally.truncated += 1
        return prompt, completions, masks

    def check(self, some: bool, tally: Tally) -> None:
        """Raises ValueError where `some` is false: of all rows in `tally` no group was made."""
        if not some:
            counts = ", ".join(f"{n} {rule}" for rule, n in tally.dropped.items()) or "there was none"
            raise ValueError(
                f"data set: expected rows of at most max_length = {self.max_length} tokens, got none of "
                f"{tally.num_rows} rows ({counts}); raise --max_length, or use --truncation_strategy left"
            )


def tokenize_rows(rows: Iterable[Row], template: Template, **how: Any) -> Tokenized:
    """The groups of all rows, kept in memory and numbered from 0 without gaps. how: arguments of `Encoder`.

    Raises ValueError as `Encoder` does, and where no row is left.
    """
    encoder, tally, groups = Encoder(template, **how), Tally(), list[Group]()
    share = dict[int, int]().setdefault  # one int object an id: 8 bytes a token instead of 40
    with thread_pool(encoder) as pool:
        for found, counted in in_order(pool, encoder, rows, THREADS):
            tally.add(counted)
            for group in found:
                prompt, *completions = (tuple(map(share, x, x)) for x in (group.prompt, *group.completions))
                groups.append(replace(group, index=len(groups), prompt=prompt, completions=tuple(completions)))
    encoder.check(bool(groups), tally)
    return Tokenized(tuple(groups), tally.num_rows, dict(tally.dropped), tally.truncated)


@contextmanager
def thread_pool(encoder: Encoder) -> Iterator[ThreadPoolExecutor]:
    """A pool of THREADS threads for `encoder`, closed at the end of the block.

    What the encoder computes once for its tokenizer is computed before the threads start, as they must not race for it.
    """
    encoder.template.text_ids  # noqa: B018
    with ThreadPoolExecutor(THREADS, "tokenize") as pool:
        yield pool


def in_order(pool: Executor, work: Callable[[list[Row]], T], rows: Iterable[Row], ahead: int) -> Iterator[T]:
    """work(chunk) of each CHUNK rows, in the rows' order.

    ahead: chunks that the pool may work on beside the one that is waited for; so many rows are in memory at once.
    """
    left, waiting = iter(rows), deque[Future[T]]()
    while chunk := list(islice(left, CHUNK)):
        waiting.append(pool.submit(work, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encoded(rows: Sequence[Row], template: Template, assistant_turns: str) -> list[Encoded]:
    """Raises ValueError that names the first row that the template refuses."""
    tools = [row.tools for row in rows]
    try:
        if assistant_turns == "last":
            return template.encode_many([(row.prompt, row.completions) for row in rows], tools)
        return template.encode_turns([[*row.prompt, assistant(row.completions[0])] for row in rows], tools)
    except ValueError as error:
        if len(rows) == 1:
            raise ValueError(f"{rows[0].where}: {error}") from error
        for row in rows:
            _encoded([row], template, assistant_turns)
        raise


def _cut_left(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    completions = [ids[: max_length - 1] for ids in completions]
    return prompt[-(max_length - max(map(len, completions), default=0)) :], completions


def _cut_right(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    return prompt, [ids[: max(max_length - len(prompt), 0)] for ids in completions]
