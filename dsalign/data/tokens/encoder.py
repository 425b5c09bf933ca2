"""Rows of text to groups of token ids: one prompt and its completions, at most max_length tokens."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from dsalign.contract.groups import Group
from dsalign.data.rows.iterate import Skipped
from dsalign.data.rows.records import Row
from dsalign.data.tokens.templates import Encoded, Template, assistant
from dsalign.data.tokens.words import Ids
from dsalign.report import screen

TRUNCATIONS = ("delete", "left", "right", "raise")
CHUNK = 1024  # rows a tokenizer call: enough for its threads, little memory
THREADS = 2  # chunks that are encoded at a time: one is rendered while another is read, without the interpreter lock
TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no completion token left"
# What is noticed of rows: a text that spells a special token; answers that do not begin as the template opens them;
# no text in the question or in an answer; the same answer as chosen and rejected; characters without a token.
SPELLED, UNOPENED, BLANK, IDENTICAL, UNKNOWN = "spelled", "unopened", "blank", "identical", "unknown"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The groups of a data set, and how many of its rows did not become whole groups."""

    groups: Sequence[Group]
    num_rows: int  # read
    dropped: Mapping[str, int]  # rule -> rows
    truncated: int  # groups that lost tokens
    unread: Mapping[str, int] = field(default_factory=dict)  # column or key of messages that nothing reads -> rows
    noticed: Mapping[str, int] = field(default_factory=dict)  # SPELLED, UNOPENED, ... -> rows


@dataclass
class Tally:
    """How many rows were read, dropped and truncated, counted while they are tokenised."""

    num_rows: int = 0  # read
    dropped: Counter[str] = field(default_factory=Counter)  # rule -> rows
    truncated: int = 0  # groups that lost tokens
    unread: Counter[str] = field(default_factory=Counter)  # column or key of messages that nothing reads -> rows
    noticed: Counter[str] = field(default_factory=Counter)  # SPELLED, UNOPENED, ... -> rows
    refused: Skipped = field(default_factory=Skipped)  # rows that the template refused, not among num_rows

    def add(self, other: Tally) -> None:
        """Add another tally's counts to this one's."""
        self.num_rows += other.num_rows
        self.dropped.update(other.dropped)
        self.truncated += other.truncated
        self.unread.update(other.unread)
        self.noticed.update(other.noticed)
        self.refused.merge(other.refused)


@dataclass(frozen=True)
class Encoder:
    """Makes a group of each row, in their order, of at most max_length tokens: len(prompt) + len(longest completion).

    template: writes the conversation and tokenises it. truncation, for a longer row: "delete" drops it; "left" cuts the
    prompt's beginning, down to one token, then the completions' ends; "right" cuts the completions' ends and drops the
    row where no token is left; "raise" refuses it. A cut completion has no end token, so that the model does not learn
    to stop there. assistant_turns: "last", or "all" for demonstrations in which every answer is learnt from
    (`Template.encode_turns`). lenient: rows that the template refuses are left out and counted.
    Raises ValueError for a truncation that is not one of TRUNCATIONS, and for max_length below 2.
    """

    template: Template
    max_length: int
    truncation: str
    assistant_turns: str = "last"
    lenient: bool = False

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
        tally, found, unknown = Tally(), list[Group](), self.template.unknown
        for row, encoded in zip(rows, self._encoded(rows), strict=True):
            if isinstance(encoded, ValueError):
                tally.refused.add(encoded)
                continue
            tally.num_rows += 1
            tally.noticed.update(_noticed(row, encoded))
            if unknown is not None and encoded.holds(unknown):
                tally.noticed[UNKNOWN] += 1
            if row.unread:
                tally.unread.update(row.unread)
            cut = self._cut(row, encoded, tally)
            if cut is not None:
                prompt, completions, masks = cut
                ids = tuple(map(tuple, completions))
                known = (row.label, row.margin, row.columns, () if ids else row.prompt)
                kept = None if masks is None or all(map(all, masks)) else tuple(map(tuple, masks))
                tools = () if ids else row.tools
                found.append(Group(len(found), row.where, tuple(prompt), ids, encoded.prompt_text, *known, kept, tools))
        return found, tally

    def _encoded(self, rows: Sequence[Row]) -> Sequence[Encoded | ValueError]:
        """The ids of each row; where lenient, in the place of one that the template refuses its error.

        Raises ValueError that names the first such row.
        """
        tools = [row.tools for row in rows]
        try:
            if self.assistant_turns == "last":
                _check_weights(rows)
                return self.template.encode_many([(row.prompt, row.completions) for row in rows], tools)
            _check_some(rows)
            whole = [[*row.prompt, assistant(row.completions[0])] for row in rows]
            return self.template.encode_turns(whole, tools, [row.unlearnt for row in rows])
        except ValueError as error:
            if len(rows) == 1:
                named = ValueError(f"{rows[0].where}: {error}")
                if self.lenient:
                    return [named]
                raise named from error
            half = len(rows) // 2  # to find it, and to read all others in few calls
            found = [*self._encoded(rows[:half]), *self._encoded(rows[half:])]
            if not any(isinstance(one, ValueError) for one in found):
                raise  # no row shows it alone
            return found

    def _cut(self, row: Row, encoded: Encoded, tally: Tally) -> tuple[Ids, list[Ids], list[list[bool]] | None] | None:
        """Prompt, completions and masks that fit; None where the row is dropped, which is counted."""
        prompt, completions, masks = encoded.prompt, encoded.completions, encoded.masks
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

    def check(self, some: bool, tally: Tally, skipped: Skipped) -> None:
        """Raises ValueError where `some` is false: of all rows in `tally` no group was made. skipped: the bad rows."""
        if not some and skipped and not tally.num_rows:
            raise ValueError(
                f"data set: expected rows that can be used, got {skipped.count} bad of "
                f"{tally.num_rows + skipped.count}, the first: {skipped.first}"
            )
        if not some:
            counts = ", ".join(f"{n} {rule}" for rule, n in tally.dropped.items()) or "there was none"
            counts += f"; {skipped.count} more are bad, the first: {skipped.first}" if skipped else ""
            raise ValueError(
                f"data set: expected rows of at most max_length = {self.max_length} tokens, got none of "
                f"{tally.num_rows} rows ({counts}); raise --max_length, or use --truncation_strategy left"
            )


def tokenize_rows(rows: Iterable[Row], template: Template, *, skipped: Skipped | None = None, **how: Any) -> Tokenized:
    """The groups of all rows, kept in memory and numbered from 0 without gaps.

    how: arguments of `Encoder`. skipped: the bad rows that were left out before; those that the template refuses are
    added.

    Raises ValueError as `Encoder` does, and where no row is left.
    """
    encoder, tally, groups = Encoder(template, **how), Tally(), list[Group]()
    share = dict[int, int]().setdefault  # one int object an id: 8 bytes a token instead of 40
    with thread_pool(encoder) as pool:
        for found, counted in in_order(pool, encoder, rows, THREADS):
            tally.add(counted)
            screen.progress(tally.num_rows, len(rows) if isinstance(rows, Sized) else None)
            for group in found:
                prompt, *completions = (tuple(map(share, x, x)) for x in (group.prompt, *group.completions))
                groups.append(replace(group, index=len(groups), prompt=prompt, completions=tuple(completions)))
    bad = skipped if skipped is not None else Skipped()
    bad.merge(tally.refused)
    encoder.check(bool(groups), tally, bad)
    return Tokenized(
        tuple(groups), tally.num_rows, dict(tally.dropped), tally.truncated, dict(tally.unread), dict(tally.noticed)
    )


def _noticed(row: Row, encoded: Encoded) -> Iterator[str]:
    """What is worth a line about a row that is used all the same."""
    if encoded.spelled:
        yield SPELLED
    if encoded.unopened:
        yield UNOPENED
    asked = row.prompt[-1]
    if not (asked["content"].strip() and all(a.strip() for a in row.completions if isinstance(a, str))):
        yield BLANK
    if len(row.completions) == 2 and row.completions[0] == row.completions[1]:
        yield IDENTICAL


def _check_weights(rows: Sequence[Row]) -> None:
    """Raises ValueError for a row whose one answer to learn has weight 0."""
    for row in rows:
        if row.unlearnt and len(row.prompt) in row.unlearnt and row.completions:
            raise ValueError(
                "expected weight 1 for the last answer, which alone is learnt, got 0: nothing of this row would be; "
                "use --assistant_turns all, or leave it out"
            )


def _check_some(rows: Sequence[Row]) -> None:
    """Raises ValueError for a row in which every answer has weight 0."""
    for row in rows:
        answers = [i for i, turn in enumerate(row.prompt) if turn["role"] == "assistant"] + [len(row.prompt)]
        if row.unlearnt and set(answers) <= set(row.unlearnt):
            raise ValueError("expected an answer to learn from, but every answer of the row has weight 0; leave it out")


@contextmanager
def thread_pool(encoder: Encoder) -> Iterator[ThreadPoolExecutor]:
    """A pool of THREADS threads for `encoder`, closed at the end of the block.

    What the encoder computes once for its tokenizer is computed before the threads start, as they must not race for it.
    """
    encoder.template.prepare()
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


def _cut_left(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    completions = [ids[: max_length - 1] for ids in completions]
    return prompt[-(max_length - max(map(len, completions), default=0)) :], completions


def _cut_right(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    return prompt, [ids[: max(max_length - len(prompt), 0)] for ids in completions]
