"""From records of any accepted format to rows: one prompt, its completions, and what is known about them."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsalign.data.readers import read_source
from dsalign.data.records import Record, RowError, rename, shorten

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Turns = list[Message]

KINDS = ("pairs", "labels", "prompts", "demonstrations")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and the answers to it, as text."""

    where: str  # file and line, as the user typed the file
    prompt: tuple[Message, ...]  # system?, user, assistant, ..., user
    completions: tuple[
        str, ...
    ]  # (chosen, rejected) of "pairs", one of "labels" and "demonstrations", none of "prompts"
    label: bool | None = None  # "labels" only: True = desirable
    margin: float | None = None  # "pairs" only, units of reward
    columns: Mapping[str, object] = field(default_factory=dict)  # what no format took


@dataclass
class Skipped:
    """The bad rows that were left out: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, error: RowError) -> None:
        self.first = self.first or str(error)
        self.count += 1


def iter_rows(
    sources: Sequence[str],
    kind: str,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    seed: int = 42,
    weights: Sequence[float] = (),
    streaming: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[Row]:
    """The rows of all sources, one source after the other, in stored order, read as they are asked for.

    sources: files, folders, globs, demo rows, hub names or registered short names, each with an optional "#n" (a sample
    of n rows, fixed by `seed`). kind: one of KINDS. columns: {theirs: ours}. system: put in front where a row has none.
    weights: how many times the rows of each source are taken; 2.5 = twice, and each with probability 0.5 once more,
    fixed by `seed`; none = once each. streaming: hub data sets are read without keeping them on disk. skipped: where
    bad rows are counted instead of raised.
    A string prompt is one user turn. Of a conversation with several answers the last is the completion.
    Raises RowError (a ValueError) for the first row that cannot be used, ValueError for a bad argument or source.
    """
    if kind not in KINDS:
        raise ValueError(f"kind of rows: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not sources:
        raise ValueError("data set: expected at least one file, folder or hub name, got none; name one with --dataset")
    renamed = columns or {}
    missing = set(renamed)

    def convert(item: Record | RowError) -> Row | None:
        try:
            if isinstance(item, RowError):
                raise item
            missing.difference_update(item.values)
            values = rename(item.where, item.values, renamed)
            return _convert(_Fields(item.where, values, item.text_only), kind, system)
        except RowError as error:
            if skipped is None:
                raise
            skipped.add(error)
            return None

    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        for turn in range(math.ceil(weight)):
            draw = random.Random(f"dsalign weights {seed} {source}")
            share = min(1.0, weight - turn)
            for item in read_source(source, seed, streaming):
                if (share == 1 or draw.random() < share) and (row := convert(item)) is not None:
                    yield row
    if missing:
        raise ValueError(
            f"columns: expected names that some row of {', '.join(sources)} has, got {sorted(missing)}; "
            "write columns={theirs: ours}"
        )


class _Fields:
    """The columns of one record, read with checks; remembers which were taken. Null counts as absent."""

    def __init__(self, where: str, values: Mapping[str, Any], text_only: bool) -> None:
        self.where = where
        self.values = {name: value for name, value in values.items() if value is not None}
        self.null = [name for name, value in values.items() if value is None]
        self.text_only = text_only
        self.taken: set[str] = set()

    def bad(self, column: str, expected: str, got: object, fix: str) -> RowError:
        return RowError(f"{self.where}: column {column!r}: expected {expected}, got {shorten(got)}; {fix}")

    def take(self, column: str) -> Any:
        self.taken.add(column)
        return self.values.get(column)

    def text(self, column: str, default: str | None = None) -> str:
        value = self.take(column)
        return default if value is None and default is not None else self.check_text(column, value)

    def check_text(self, column: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.bad(column, "text", value, "write a string, or name another column with columns={theirs: ours}")
        if "\0" in value:
            fix = f"the character at {value.index(chr(0))} is NUL: leave the row out, or write it again"
            raise self.bad(column, "text", value, fix)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise self.bad(
                    column, "text", value, f"the character at {error.start} is half of a surrogate pair: write it again"
                ) from error
        return value

    def turns(self, column: str) -> Turns:
        """A message list: {"role", "content"} or {"from", "value"}, known roles, in any order."""
        value = self.take(column)
        if not isinstance(value, list) or not value:
            fix = "CSV holds single turns: use .jsonl" if self.text_only else 'write [{"role": ..., "content": ...}]'
            raise self.bad(column, "a list of messages", value, fix)
        return [self._turn(f"{column}[{i}]", message) for i, message in enumerate(value)]

    def _turn(self, column: str, message: object) -> Message:
        if isinstance(message, Mapping):
            for role, content in (("role", "content"), ("from", "value")):
                if message.get(role) is not None:
                    if str(message[role]) not in ROLES:
                        fix = "rename the role, or leave the row out"
                        raise self.bad(f"{column}.{role}", f"one of {', '.join(ROLES)}", message[role], fix)
                    text = self.check_text(f"{column}.{content}", message.get(content))
                    return {"role": ROLES[message[role]], "content": text}
        raise self.bad(column, "a message", message, 'write {"role": ..., "content": ...}')

    def order(self, column: str, turns: Turns, last: str | None = None) -> Turns:
        """turns, which must be system?, user, assistant, user, ... and end with the role `last`."""
        start = 1 if turns[0]["role"] == "system" else 0
        for i, turn in enumerate(turns[start:]):
            role = ("user", "assistant")[i % 2]
            if turn["role"] != role:
                raise self.bad(
                    f"{column}[{i + start}].role",
                    repr(role),
                    turn["role"],
                    "order turns: system?, user, assistant, user",
                )
        if len(turns) == start or (last and turns[-1]["role"] != last):
            raise self.bad(
                column,
                f"a conversation that ends with a turn of the {last or 'user'}",
                turns[-1],
                "add or remove a turn",
            )
        return turns

    def history(self) -> Turns:
        """Earlier turns from history: [[question, answer], ...]."""
        turns: Turns = []
        value = self.take("history") or []
        if not isinstance(value, list):
            raise self.bad("history", "a list of pairs", value, "write [[question, answer], ...]")
        for i, pair in enumerate(value):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.bad(f"history[{i}]", "a pair", pair, "write [[question, answer], ...]")
            turns += _user(self.check_text(f"history[{i}][0]", pair[0]))
            turns.append({"role": "assistant", "content": self.check_text(f"history[{i}][1]", pair[1])})
        return turns

    def label(self) -> bool:
        value = self.take("label")
        if self.text_only and str(value).lower() in ("true", "1", "false", "0"):
            return str(value).lower() in ("true", "1")
        if not isinstance(value, bool):
            fix = "true or false" if self.text_only else "true or false, without quotes"
            raise self.bad("label", "true or false", value, f"write {fix}")
        return value

    def margin(self) -> float | None:
        value = self.take("margin")
        if value is None or (self.text_only and value == ""):
            return None
        try:
            number = float(value) if self.text_only or type(value) in (int, float) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.bad("margin", "a finite number", value, "write a number, or leave the column out")
        return number


def _user(text: str) -> Turns:
    return [{"role": "user", "content": text}]


# --- formats: each reads a prompt and completions out of the columns it needs ----------------------------------------

Parts = tuple[Turns, list[str]]


def _prompt(fields: _Fields) -> Turns:
    if isinstance(fields.values["prompt"], list):
        return fields.order("prompt", fields.turns("prompt"), last="user")
    return _user(fields.text("prompt"))


def _answer(fields: _Fields, column: str, prompt: Turns) -> str:
    """Text, one assistant turn, or the whole conversation: the prompt and one assistant turn."""
    if not isinstance(fields.values[column], list):
        return fields.text(column)
    turns = fields.turns(column)
    if turns[-1]["role"] != "assistant" or turns[:-1] not in ([], prompt):
        raise fields.bad(
            column,
            "text, one assistant turn, or the turns of the prompt and one assistant turn",
            fields.values[column],
            "let it begin with the prompt, or hold the answer alone",
        )
    return turns[-1]["content"]


def _prompted(*answers: str) -> Callable[[_Fields], Parts]:
    def read(fields: _Fields) -> Parts:
        prompt = _prompt(fields)
        return prompt, [_answer(fields, column, prompt) for column in answers]

    return read


def _query(*answers: str) -> Callable[[_Fields], Parts]:
    def read(fields: _Fields) -> Parts:
        return fields.history() + _user(fields.text("query")), [fields.text(column) for column in answers]

    return read


def _instruction(*answers: str) -> Callable[[_Fields], Parts]:
    def read(fields: _Fields) -> Parts:
        text, more = fields.text("instruction"), fields.text("input", "")
        prompt = _user(f"{text}\n{more}" if more else text)
        return fields.history() + prompt, [fields.text(column) for column in answers]

    return read


def _conversation(column: str, *answers: str) -> Callable[[_Fields], Parts]:
    """A conversation whose last turn is the first completion; further completions are text."""

    def read(fields: _Fields) -> Parts:
        turns = fields.order(column, fields.turns(column), last="assistant")
        return turns[:-1], [turns[-1]["content"], *(fields.text(answer) for answer in answers)]

    return read


def _opening(column: str) -> Callable[[_Fields], Parts]:
    """The prompt side of a conversation: all turns up to the last of the user."""

    def read(fields: _Fields) -> Parts:
        turns = fields.order(column, fields.turns(column))
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns, []

    return read


def _two_conversations(first: str, second: str, keep: int = 2) -> Callable[[_Fields], Parts]:
    """Two whole conversations: the turns they share are the prompt, then each has one assistant turn."""

    def read(fields: _Fields) -> Parts:
        for column in (first, second):
            if isinstance(fields.values[column], str):
                fix = "write message lists, or put the question into a column prompt"
                raise fields.bad(column, "a whole conversation", fields.values[column], fix)
        turns = [fields.order(column, fields.turns(column), last="assistant") for column in (first, second)]
        shared = 0
        while shared < min(map(len, turns)) - 1 and turns[0][shared] == turns[1][shared]:
            shared += 1
        if {len(part) - shared for part in turns} != {1}:
            raise fields.bad(
                second,
                f"the turns of {first!r} with another last answer",
                fields.values[second],
                f"the two part at turn {shared}: let both hold the same turns before one last assistant turn",
            )
        return turns[0][:shared], [part[shared]["content"] for part in turns][:keep]

    return read


# Required columns -> reader; the first line whose columns a row has is its format. `system` may stand beside each.
FORMATS: Mapping[str, Mapping[str, Callable[[_Fields], Parts]]] = {
    "pairs": {
        "prompt, chosen, rejected": _prompted("chosen", "rejected"),
        "chosen, rejected": _two_conversations("chosen", "rejected"),
        "query, response, rejected_response": _query("response", "rejected_response"),
        "messages, rejected_response": _conversation("messages", "rejected_response"),
        "messages, rejected_messages": _two_conversations("messages", "rejected_messages"),
    },
    "labels": {
        "prompt, completion, label": _prompted("completion"),
        "query, response, label": _query("response"),
        "messages, label": _conversation("messages"),
    },
    "prompts": {
        "prompt": _prompted(),
        "query": _query(),
        "messages": _opening("messages"),
        "instruction": _instruction(),
        "conversations": _opening("conversations"),
        "chosen, rejected": _two_conversations("chosen", "rejected", keep=0),
    },
    "demonstrations": {
        "messages": _conversation("messages"),
        "prompt, completion": _prompted("completion"),
        "instruction, output": _instruction("output"),
        "conversations": _conversation("conversations"),
        "query, response": _query("response"),
    },
}
OPTIONAL = ("system", "history", "input", "margin")


def _convert(fields: _Fields, kind: str, system: str | None) -> Row:
    has = fields.values.keys()
    read = next((read for needs, read in FORMATS[kind].items() if has >= set(needs.split(", "))), None)
    if read is None:
        raise _no_format(fields, kind)
    prompt, completions = read(fields)
    own = fields.text("system", "")
    if own and prompt[0]["role"] == "system" and prompt[0]["content"] != own:
        raise fields.bad(
            "system", "one system prompt a row", own, "the messages hold another one: remove one of the two"
        )
    front = own or system
    if front and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": front}, *prompt]
    label = fields.label() if kind == "labels" else None
    margin = fields.margin() if kind == "pairs" else None
    others = {name: value for name, value in fields.values.items() if name not in fields.taken}
    return Row(fields.where, tuple(prompt), tuple(completions), label, margin, others)


def _no_format(fields: _Fields, kind: str) -> RowError:
    names = {name for formats in FORMATS[kind] for name in formats.split(", ")} | set(OPTIONAL)
    absent = sorted(names - fields.values.keys())
    near = {
        theirs: ours[0]
        for theirs in fields.values
        if theirs not in names and (ours := difflib.get_close_matches(theirs, absent, 1, 0.7))
    }
    fix = f"rename with columns={near}" if near else "rename with columns={theirs: ours}"
    null = f" (null: {', '.join(fields.null)})" if fields.null else ""
    return RowError(
        f"{fields.where}: expected the columns of a format for {kind} ({' | '.join(FORMATS[kind])}), "
        f"got {', '.join(fields.values) or 'none'}{null} in {shorten(fields.values)}; {fix}"
    )
