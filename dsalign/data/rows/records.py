"""What the readers pass on: records as they were stored, the rows made of them, and the errors of bad ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsalign.contract.groups import Message, Tool

Answer = str | Message  # text, or an assistant's message that has more than text
Turns = list[Message]
SHOWN_CHARS = 200  # characters of a bad value that a message repeats
MAX_DEPTH = 100  # lists and objects in each other
# C0 and C1 but tab and line end, and the marks that turn the direction of writing
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class RowError(ValueError):
    """A row that cannot be used. The text names file and line, what was expected, what came and what to do."""


class Record(NamedTuple):
    """One row as it was stored: columns with any values."""

    where: str  # "pairs.jsonl:3", the path as the user typed it; "pairs.parquet:row 3"
    values: Mapping[str, Any]
    text_only: bool = False  # CSV: every value is text, so numbers and booleans arrive as words


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and the answers to it, as text or messages."""

    where: str  # file and line, as the user typed the file
    prompt: tuple[Message, ...]  # system?, user, assistant, tool, ..., user or tool
    completions: tuple[Answer, ...]  # "pairs": (chosen, rejected); "labels", "demonstrations": one; "prompts": none
    label: bool | None = None  # "labels" only: True = desirable
    margin: float | None = None  # "pairs" only, units of reward
    columns: Mapping[str, object] = field(default_factory=dict)  # what no format took
    tools: tuple[Tool, ...] = ()  # the functions that the assistant may call
    unlearnt: tuple[int, ...] = ()  # turns of prompt and completion whose weight is 0: nothing is learnt from them
    unread: tuple[str, ...] = ()  # columns, and keys of messages as "messages[].key", that no format reads


def shorten(value: object) -> str:
    """repr(value) for a message, cut to SHOWN_CHARS characters; control characters are written as escapes."""
    if isinstance(value, str | bytes):
        value = value[: SHOWN_CHARS + 1]  # a row may hold 50 MB
    text = printable(repr(value))
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def shorten_name(name: str) -> str:
    """The name of a column or key for a message, without quotes."""
    return shorten(name)[1:-1] or "''"


def printable(text: str) -> str:
    """`text` as a terminal may show it: control characters but tab and line end as escapes, such as \\x1b."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at any depth. Arrow has one struct type a column, so it gives each struct
    the keys of all others, as null."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def too_deep(value: object) -> bool:
    """Whether lists and objects stand in each other more than MAX_DEPTH deep: reading them may overflow the stack."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [x for item in level if isinstance(item, list | dict) for x in _items(item)]
        if not level:
            return False
    return True


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    every = value.values() if isinstance(value, dict) else value
    return [item for item in every if isinstance(item, list | dict)]


def rename(where: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """`values` with columns renamed. columns: their name -> ours. where: file and line, for the error.

    Raises RowError where two columns end up under one name.
    """
    if not columns:
        return values
    renamed: dict[str, Any] = {}
    for theirs, value in values.items():
        ours = columns.get(theirs, theirs)
        if ours in renamed:
            raise RowError(
                f"{where}: two columns are called {ours!r} after renaming with --columns "
                f"{as_flags(columns)}; "
                f"expected one, got {sorted(values)}: rename the other {ours!r} too"
            )
        renamed[ours] = value
    return renamed


def as_flags(columns: Mapping[str, str]) -> str:
    """A renaming as --columns takes it: theirs=ours, one behind the other."""
    return shlex.join(f"{theirs}={ours}" for theirs, ours in columns.items())
