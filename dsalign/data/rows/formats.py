"""Column layouts: which columns a row may have for each kind of algorithm, and how a prompt and its answers are read
out of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from dsalign.contract.groups import Message
from dsalign.data.rows.fields import Fields, user
from dsalign.data.rows.records import Answer, Row, RowError, Turns, shorten

KINDS = ("pairs", "labels", "prompts", "demonstrations")
ASKS = ("user", "tool")  # whose turns are followed by the assistant's
Parts = tuple[Turns, list[Answer]]


def _prompt(fields: Fields) -> Turns:
    if isinstance(fields.values["prompt"], list):
        return fields.order("prompt", fields.turns("prompt"), last=ASKS)
    return user(fields.text("prompt"))


def _said(turn: Message) -> Answer:
    """What an assistant's turn says: text, or the whole message where it has more."""
    return turn["content"] if turn.keys() == {"role", "content"} else turn


def _answer(fields: Fields, column: str, prompt: Turns) -> Answer:
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
    return _said(turns[-1])


def _prompted(*answers: str) -> Callable[[Fields], Parts]:
    """A reader of rows with a column prompt and a column for each answer."""

    def read(fields: Fields) -> Parts:
        prompt = _prompt(fields)
        return prompt, [_answer(fields, column, prompt) for column in answers]

    return read


def _query(*answers: str) -> Callable[[Fields], Parts]:
    """A reader of rows with columns query and history, and one for each answer."""

    def read(fields: Fields) -> Parts:
        return fields.history() + user(fields.text("query")), [fields.text(column) for column in answers]

    return read


def _instruction(*answers: str) -> Callable[[Fields], Parts]:
    """A reader of Alpaca's columns: instruction, input where there is one, and one for each answer."""

    def read(fields: Fields) -> Parts:
        text, more = fields.text("instruction"), fields.text("input", "")
        prompt = user(f"{text}\n{more}" if more else text)
        return fields.history() + prompt, [fields.text(column) for column in answers]

    return read


def _conversation(column: str, *answers: str) -> Callable[[Fields], Parts]:
    """A reader of conversations whose last turn is the first answer; further answers are text in columns of their
    own."""

    def read(fields: Fields) -> Parts:
        turns = fields.order(column, fields.turns(column), last=("assistant",))
        return turns[:-1], [_said(turns[-1]), *(fields.text(answer) for answer in answers)]

    return read


def _opening(column: str) -> Callable[[Fields], Parts]:
    """A reader of conversations as prompts: all turns up to the last of the user."""

    def read(fields: Fields) -> Parts:
        turns = fields.order(column, fields.turns(column))
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns, []

    return read


def _two_conversations(first: str, second: str, keep: int = 2) -> Callable[[Fields], Parts]:
    """A reader of two whole conversations: the turns that they share are the prompt, and the last turn of each is an
    answer, of which `keep` are kept."""

    def read(fields: Fields) -> Parts:
        for column in (first, second):
            if isinstance(fields.values[column], str):
                fix = "write message lists, or put the question into a column prompt"
                raise fields.bad(column, "a whole conversation", fields.values[column], fix)
        turns = [fields.order(column, fields.turns(column), last=("assistant",)) for column in (first, second)]
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
        return turns[0][:shared], [_said(part[shared]) for part in turns][:keep]

    return read


# Required columns -> reader; the first line whose columns a row has is its format. `system` and `tools` may be beside.
FORMATS: Mapping[str, Mapping[str, Callable[[Fields], Parts]]] = {
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
OPTIONAL = ("system", "history", "input", "margin", "tools")


def convert(fields: Fields, kind: str, system: str | None) -> Row:
    """The row of a record. kind: one of KINDS, what the algorithm reads. system: a system prompt for rows without one.

    Raises RowError where no layout of this kind has the record's columns, or a column cannot be used.
    """
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
    tools = fields.tools()
    kept = {"tools"} if kind == "prompts" else set()  # reward functions may want them as well
    others = {name: value for name, value in fields.values.items() if name not in fields.taken - kept}
    return Row(fields.where, tuple(prompt), tuple(completions), label, margin, others, tools)


def _no_format(fields: Fields, kind: str) -> RowError:
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
