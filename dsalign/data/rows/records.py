"""What every reader gives, what is made of it, and what is said of a row that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsalign.contract.groups import Message, Tool

Answer = str | Message  # text, or an assistant's message that has more than text
Turns = list[Message]
SHOWN = 200  # characters of a bad value that a message repeats


class RowError(ValueError):
    """A row that cannot be used: names the place, what was expected, what came and what to do."""


class Record(NamedTuple):
    """One row as it was stored."""

    where: str  # "pairs.jsonl:3", the path as the user typed it; "pairs.parquet:row 3"
    values: Mapping[str, Any]
    text_only: bool = False  # CSV: every value is text, so numbers and booleans arrive as words


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and the answers to it, as text."""

    where: str  # file and line, as the user typed the file
    prompt: tuple[Message, ...]  # system?, user, assistant, tool, ..., user or tool
    completions: tuple[Answer, ...]  # "pairs": (chosen, rejected); "labels", "demonstrations": one; "prompts": none
    label: bool | None = None  # "labels" only: True = desirable
    margin: float | None = None  # "pairs" only, units of reward
    columns: Mapping[str, object] = field(default_factory=dict)  # what no format took
    tools: tuple[Tool, ...] = ()  # the functions that the assistant may call


def shorten(value: object) -> str:
    """repr(value), cut to SHOWN characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def rename(where: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """values with each column of `columns` (theirs -> ours) under its new name.

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
