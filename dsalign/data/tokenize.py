"""Rows to groups: one prompt and its completions as token ids, cut to the maximal length."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dsalign.data.records import Message, Row, Tool
from dsalign.data.templates import Encoded, Template, assistant

TRUNCATIONS = ("delete", "left", "right", "raise")
CHUNK = 1024  # rows a tokenizer call: enough for its threads, little memory
THREADS = 2  # chunks that are encoded at a time
TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no completion token left"


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


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The groups of a data set and what was left out of it."""

    groups: Sequence[Group]
    num_rows: int  # read
    dropped: Mapping[str, int]  # rule -> rows
    truncated: int  # groups that lost tokens


@dataclass
class Tally:
    """What happened to rows, counted while they are tokenised."""

    num_rows: int = 0  # read
    dropped: Counter[str] = field(default_factory=Counter)  # rule -> rows
    truncated: int = 0  # groups that lost tokens


def tokenize_rows(rows: Iterable[Row], template: Template, **how: Any) -> Tokenized:
    """The groups of `iter_groups`, in memory."""
    tally = Tally()
    groups = tuple(iter_groups(rows, template, tally=tally, **how))
    return Tokenized(groups, tally.num_rows, dict(tally.dropped), tally.truncated)


def iter_groups(
    rows: Iterable[Row],
    template: Template,
    *,
    max_length: int,
    truncation: str,
    assistant_turns: str = "last",
    tally: Tally,
) -> Iterator[Group]:
    """The rows as groups of at most max_length tokens, in order, numbered from 0 without gaps.

    A group's length is len(prompt) + len(longest completion). truncation: "delete" drops a longer row; "left" cuts its
    prompt from the left to no less than one token, then completions at their right end; "right" cuts completions at
    their right end and drops the row where no token is left; "raise" refuses it. A cut completion has no end token.
    assistant_turns: "all" for demonstrations whose earlier answers are learnt from too, see `Template.encode_turns`.
    tally: counted up as rows are taken.
    Raises ValueError for bad arguments, a row that the template refuses, a long row ("raise"), or no row left.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation_strategy: expected one of {', '.join(TRUNCATIONS)}, got {truncation!r}")
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2 (a prompt and a completion token), got {max_length}")
    made = 0
    share = dict[int, int]().setdefault  # one int object an id: 8 bytes a token instead of 40
    for row, (text, prompt, completions, masks) in _encode(rows, template, assistant_turns):
        tally.num_rows += 1
        length = len(prompt) + max(map(len, completions), default=0)
        if length > max_length:
            if truncation == "raise":
                raise ValueError(
                    f"{row.where}: expected at most max_length = {max_length} tokens, got {length} (prompt "
                    f"{len(prompt)}); raise --max_length, or use --truncation_strategy delete, left or right"
                )
            if truncation == "delete":
                tally.dropped[TOO_LONG] += 1
                continue
            prompt, completions = (_cut_left if truncation == "left" else _cut_right)(prompt, completions, max_length)
            masks = masks and [mask[: len(ids)] for mask, ids in zip(masks, completions, strict=True)]
            if len(prompt) > max_length or not all(completions) or (masks and not all(map(any, masks))):
                tally.dropped[NOTHING_LEFT] += 1
                continue
            tally.truncated += 1
        ids = tuple(tuple(map(share, x, x)) for x in completions)
        shared_prompt = tuple(map(share, prompt, prompt))
        known = (row.label, row.margin, row.columns, () if ids else row.prompt)
        kept = None if masks is None or all(map(all, masks)) else tuple(map(tuple, masks))
        yield Group(made, row.where, shared_prompt, ids, text, *known, kept, () if ids else row.tools)
        made += 1
    if not made:
        counts = ", ".join(f"{count} {rule}" for rule, count in tally.dropped.items()) or "there was none"
        raise ValueError(
            f"data set: expected rows of at most max_length = {max_length} tokens, got none of {tally.num_rows} rows "
            f"({counts}); raise --max_length, or use --truncation_strategy left"
        )


def _encode(rows: Iterable[Row], template: Template, assistant_turns: str) -> Iterator[tuple[Row, Encoded]]:
    """The rows with their ids, in order. Chunks are encoded THREADS at a time: while one is tokenised, which needs no
    interpreter lock, another is rendered and a third is taken on from here."""
    template.text_ids  # noqa: B018  # made here, before there are threads
    left, waiting = iter(rows), deque[tuple[list[Row], Future[list[Encoded]]]]()
    with ThreadPoolExecutor(THREADS, "tokenize") as pool:
        while chunk := list(islice(left, CHUNK)):
            waiting.append((chunk, pool.submit(_encoded, chunk, template, assistant_turns)))
            if len(waiting) > THREADS:
                first, found = waiting.popleft()
                yield from zip(first, found.result(), strict=True)
        for first, found in waiting:
            yield from zip(first, found.result(), strict=True)


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


Ids = list[int]


def _cut_left(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    completions = [ids[: max_length - 1] for ids in completions]
    return prompt[-(max_length - max(map(len, completions), default=0)) :], completions


def _cut_right(prompt: Ids, completions: list[Ids], max_length: int) -> tuple[Ids, list[Ids]]:
    return prompt, [ids[: max(max_length - len(prompt), 0)] for ids in completions]
