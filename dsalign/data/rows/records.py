"""What the readers pass on: records as they were stored, the rows made of them, and the errors of bad ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsalign.contract.groups import Message, Tool

Answer = str | Message  # text, or an assistant's message that has more than text
Turns = list[Message]
SHOWN_CHARS = 200  # characters of a bad value that a message repeats


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


def shorten(value: object) -> str:
    """repr(value) for a message, cut to SHOWN_CHARS characters."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


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
                f"{where}: two columns are called {ours!r} after renaming with columns={dict(columns)}; "
                f"expected one, got {sorted(values)}: rename the other {ours!r} too"
            )
        renamed[ours] = value
    return renamed
