"""The columns of one record, each read with checks whose errors name file, line and column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsalign.contract.groups import Tool
from dsalign.data.rows.records import RowError, Turns, shorten, too_deep

SCHEMA = '{"name": ..., "parameters": {...}}'
FOLLOWS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
LEARNT = ("weight", "loss", "train")  # names of one thing: whether a turn, or a row, is learnt from
EMPTY: tuple[object, ...] = ("", [], {})
NO_MEDIA = "dsalign trains on text: remove it and its placeholder, or leave such rows out with --on_bad_row skip"


class Fields:
    """The columns of one record; a column that is null counts as absent.

    where: file and line. text_only: the record is of a CSV file, so numbers and booleans are words. `taken` holds the
    columns that were read: the others go on with the row, for reward functions.
    """

    def __init__(self, where: str, values: Mapping[str, Any], text_only: bool) -> None:
        self.where = where
        self.values = {name: value for name, value in values.items() if value is not None}
        self.null = [name for name, value in values.items() if value is None]
        self.text_only = text_only
        self.taken: set[str] = set()
        self.unread: dict[str, None] = {}  # keys of messages that nothing reads, as "messages[].key"

    def bad(self, column: str, expected: str, got: object, fix: str) -> RowError:
        """The error of a column: what was expected in it, what came, and how to mend it."""
        return RowError(f"{self.where}: column {column!r}: expected {expected}, got {shorten(got)}; {fix}")

    def take(self, column: str) -> Any:
        """The value of a column, None where it is absent; the column counts as taken."""
        self.taken.add(column)
        return self.values.get(column)

    def text(self, column: str, default: str | None = None) -> str:
        """The text in a column. default: where it is absent, None = it must be there. Raises RowError for anything
        else."""
        value = self.take(column)
        return default if value is None and default is not None else self.check_text(column, value)

    def check_text(self, column: str, value: object) -> str:
        """`value`, where it is text that a tokenizer can read. Raises RowError where it is none, or holds a NUL or half
        of a surrogate pair."""
        if not isinstance(value, str):
            renamed = "" if "[" in column else ", or name another column with --columns theirs=ours"
            raise self.bad(column, "text", value, f"write a string{renamed}")
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

    def tools(self) -> tuple[Tool, ...]:
        """The functions that a conversation may call, from the column `tools`: a list of schemas, each by itself or
        under "function", or that list as JSON text. Empty where the column is absent."""
        value = self.take("tools")
        if isinstance(value, str):
            value = self.json("tools", value, "a list of functions") if value.strip() else []
        if not isinstance(value, list | None):
            raise self.bad("tools", "a list of functions", value, f"write [{SCHEMA}], or name another column")
        found = [self.function(f"tools[{i}]", tool, SCHEMA) for i, tool in enumerate(value or [])]
        return tuple({"type": "function", "function": tool} for tool in found)

    def function(self, column: str, value: object, example: str) -> Mapping[str, Any]:
        """The mapping that names a function: `value`, what it holds under "function", or either as JSON text."""
        if isinstance(value, str):
            value = self.json(column, value, "an object")
        inner = value.get("function", value) if isinstance(value, Mapping) else value
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise self.bad(column, "a function with a name", value, f"write {example}")
        return inner

    def json(self, column: str, text: str, expected: str) -> Any:
        """The value of JSON text. expected: what it should be, for the RowError of text that is no JSON."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.bad(column, f"{expected} as JSON text", text, f"it cannot be read: {error}") from error
        if too_deep(value):
            raise self.bad(column, f"{expected} as JSON text", text, "its brackets are nested too deep")
        return value

    def history(self) -> Turns:
        """Earlier turns, from the column `history`: [[question, answer], ...]. Empty where it is absent."""
        turns: Turns = []
        value = self.take("history") or []
        if not isinstance(value, list):
            raise self.bad("history", "a list of pairs", value, "write [[question, answer], ...]")
        for i, pair in enumerate(value):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.bad(f"history[{i}]", "a pair", pair, "write [[question, answer], ...]")
            turns += user(self.check_text(f"history[{i}][0]", pair[0]))
            turns.append({"role": "assistant", "content": self.check_text(f"history[{i}][1]", pair[1])})
        return turns

    def label(self) -> bool:
        """Whether the completion is desirable, from the column `label`. Raises RowError unless it is true, false, 1 or
        0."""
        value = self.take("label")
        found = self.yes_or_no(value)
        if found is None:
            fix = "true or false" if self.text_only else "true or false, without quotes"
            raise self.bad("label", "true or false", value, f"write {fix}")
        return found

    def yes_or_no(self, value: object) -> bool | None:
        """True for true and 1, false for false and 0, in CSV as words too; None for anything else."""
        if self.text_only and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        return bool(value) if isinstance(value, int | float) and value in (0, 1) else None

    def margin(self) -> float | None:
        """By how much the chosen answer is better, in units of reward, from the column `margin`; None where it is
        absent. Raises RowError for what is no finite number."""
        value = self.take("margin")
        if value is None or (self.text_only and value == ""):
            return None
        try:
            number = float(value) if self.text_only or type(value) in (int, float) else math.nan
        except (TypeError, ValueError, OverflowError):  # 1 and 400 zeros is a whole number to JSON
            number = math.nan
        if not math.isfinite(number):
            raise self.bad("margin", "a finite number", value, "write a number, or leave the column out")
        return number

    def filled(self, names: Sequence[str]) -> str | None:
        """The first of these columns that has something in it; an empty text, list or object is nothing."""
        return next((n for n in names if (value := self.values.get(n)) is not None and value not in EMPTY), None)

    def weight(self, column: str, value: object) -> bool:
        """Whether a turn, or a row, with this weight is learnt from. Raises RowError for a weight between 0 and 1, or
        anything else that is no yes or no."""
        found = self.yes_or_no(value)
        if found is None:
            renamed = "" if "." in column else f", or rename what is no such thing (--columns {column}=unused_{column})"
            fix = f"write one of them{renamed}"
            raise self.bad(column, "1 or true (learnt from), 0 or false (not)", value, fix)
        return found


def user(text: str) -> Turns:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]
