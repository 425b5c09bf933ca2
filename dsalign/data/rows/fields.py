"""The columns of one record, each read with checks whose errors name file, line and column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dsalign.contract.groups import Message, Tool
from dsalign.data.rows.records import RowError, Turns, shorten

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # its content is the call, as JSON
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CALL = '{"name": ..., "arguments": {...}}'
SCHEMA = '{"name": ..., "parameters": {...}}'
FOLLOWS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing


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
        """A message list as messages, in any order of roles: {"role", "content"} or ShareGPT's {"from", "value"}.
        Raises RowError for another value or role."""
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
                    if message[role] == "function_call":
                        call = self._call(f"{column}.{content}", message.get(content))
                        return {"role": "assistant", "content": "", "tool_calls": [call]}
                    return self._message(column, ROLES[message[role]], content, message)
        raise self.bad(column, "a message", message, 'write {"role": ..., "content": ...}')

    def _message(self, column: str, role: str, content: str, message: Mapping[str, Any]) -> Message:
        found: dict[str, Any] = {"role": role}
        calls, text = message.get("tool_calls"), message.get(content)
        if text is not None or not calls:  # who calls a tool need not say anything
            text = self.check_text(f"{column}.{content}", text)
        found["content"] = text or ""
        if role == "tool" and message.get("name") is not None:
            found["name"] = self.check_text(f"{column}.name", message["name"])
        if role == "assistant":
            thought = next((name for name in REASONING if message.get(name) is not None), None)
            if thought:
                found[REASONING[0]] = self.check_text(f"{column}.{thought}", message[thought])
            if calls:
                if not isinstance(calls, list):
                    raise self.bad(f"{column}.tool_calls", "a list of calls", calls, f"write [{CALL}]")
                found["tool_calls"] = [self._call(f"{column}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
        return found

    def _call(self, column: str, value: object) -> Mapping[str, Any]:
        """The call of a function, from {"name", "arguments"}, the same under "function", or either as JSON text; its
        arguments may be JSON text too."""
        call = self._function(column, value, CALL)
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = self._json(f"{column}.arguments", arguments, "an object")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise self.bad(f"{column}.arguments", "an object", arguments, f"write {CALL}")
        return {"type": "function", "function": {"name": call["name"], "arguments": arguments or {}}}

    def tools(self) -> tuple[Tool, ...]:
        """The functions that a conversation may call, from the column `tools`: a list of schemas, each by itself or
        under "function", or that list as JSON text. Empty where the column is absent."""
        value = self.take("tools")
        if isinstance(value, str):
            value = self._json("tools", value, "a list of functions") if value.strip() else []
        if not isinstance(value, list | None):
            raise self.bad("tools", "a list of functions", value, f"write [{SCHEMA}], or name another column")
        found = [self._function(f"tools[{i}]", tool, SCHEMA) for i, tool in enumerate(value or [])]
        return tuple({"type": "function", "function": tool} for tool in found)

    def _function(self, column: str, value: object, example: str) -> Mapping[str, Any]:
        """The mapping that names a function: `value`, what it holds under "function", or either as JSON text."""
        if isinstance(value, str):
            value = self._json(column, value, "an object")
        inner = value.get("function", value) if isinstance(value, Mapping) else value
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise self.bad(column, "a function with a name", value, f"write {example}")
        return inner

    def _json(self, column: str, text: str, expected: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise self.bad(column, f"{expected} as JSON text", text, f"it cannot be read: {error}") from error

    def order(self, column: str, turns: Turns, last: tuple[str, ...] = ("user", "assistant", "tool")) -> Turns:
        """`turns`, where their roles follow each other as a template expects: system?, user, assistant, user, ...;
        turns of a tool stand between two of the assistant.

        last: roles with which the conversation may end. Raises RowError that names the first turn out of order.
        """
        before = "system"
        for i, turn in enumerate(turns):
            expected = ("system", "user") if i == 0 else FOLLOWS[before]
            if turn["role"] not in expected:
                raise self.bad(
                    f"{column}[{i}].role",
                    " or ".join(map(repr, expected)),
                    turn["role"],
                    "order turns: system?, user, assistant, user; tools between two of the assistant",
                )
            before = turn["role"]
        if before not in last:
            raise self.bad(
                column, f"a conversation that ends with a turn of the {last[0]}", turns[-1], "add or remove a turn"
            )
        return turns

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
        """Whether the completion is desirable, from the column `label`. Raises RowError unless it is true or false (in
        CSV also 1 or 0)."""
        value = self.take("label")
        if self.text_only and str(value).lower() in ("true", "1", "false", "0"):
            return str(value).lower() in ("true", "1")
        if not isinstance(value, bool):
            fix = "true or false" if self.text_only else "true or false, without quotes"
            raise self.bad("label", "true or false", value, f"write {fix}")
        return value

    def margin(self) -> float | None:
        """By how much the chosen answer is better, in units of reward, from the column `margin`; None where it is
        absent. Raises RowError for what is no finite number."""
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


def user(text: str) -> Turns:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]
