"""The messages of a conversation, each read with checks whose errors name file, line, column and key.

Every key of known meaning is used, or the row is refused naming it; the names of other keys are kept in
`Fields.unread`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsalign.contract.groups import Message
from dsalign.data.rows.fields import EMPTY, FOLLOWS, LEARNT, MEDIA, NO_MEDIA, Fields
from dsalign.data.rows.records import Turns, shorten_name

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # its content is the call, as JSON
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CALL = '{"name": ..., "arguments": {...}}'
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing
OTHER_PARTS = "write text; a thought goes into the message's reasoning_content, a call into its tool_calls"
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content's parts
# Keys that only one role has, and what to do about one that another role has.
OF_ASSISTANT = {
    **dict.fromkeys(REASONING, "only the assistant thinks: move it to the answer, or remove it"),
    "tool_calls": "only the assistant calls: move it to its turn, or remove it",
    "function_call": "only the assistant calls: move it to its turn, or remove it",
}
OF_ROW = {"tools": "functions belong to the row: move them to a column tools"}
KEYS = (("role", "content"), ("from", "value"))  # of a message's role and text, as OpenAI and ShareGPT call them
TEXTS = tuple(text for _, text in KEYS)  # some write one's role with the other's text
READ = {"name", "tool_call_id", *OF_ASSISTANT, *OF_ROW, *LEARNT, *MEDIA}


def turns(fields: Fields, column: str) -> Turns:
    """The messages in a column, in any order of roles: {"role", "content"} or ShareGPT's {"from", "value"}; one message
    may stand without its list. A turn whose weight is 0 keeps a key "weight", 0.

    Raises RowError for another value or role, and for a key of known meaning that cannot be used.
    """
    value = fields.take(column)
    if isinstance(value, Mapping) and value:
        value = [value]
    if not isinstance(value, list) or not value:
        fix = "CSV holds single turns: use .jsonl" if fields.text_only else 'write [{"role": ..., "content": ...}]'
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")) and not fields.text_only:
            fix = "it is JSON as text: write the list itself, without quotes"
        raise fields.bad(column, "a list of messages", value, fix)
    return [_turn(fields, f"{column}[{i}]", column, message) for i, message in enumerate(value)]


def _turn(fields: Fields, column: str, list_name: str, message: object) -> Message:
    if isinstance(message, Mapping):
        for role, content in KEYS:
            theirs = message.get(role)
            if theirs is not None:
                content = next((key for key in (content, *TEXTS) if message.get(key) is not None), content)
                ours = ROLES.get(theirs) if isinstance(theirs, str) else None
                if ours is None:
                    small = theirs.lower() if isinstance(theirs, str) else ""
                    fix = f"write {small!r}" if small in ROLES else "rename the role, or leave the row out"
                    raise fields.bad(f"{column}.{role}", f"one of {', '.join(ROLES)}", theirs, fix)
                if len(message) == 2 and isinstance(message.get(content), str) and theirs != "function_call":
                    return {"role": ours, "content": fields.check_text(f"{column}.{content}", message[content])}
                keys = (role, content)
                return _message(fields, column, list_name, ours, keys, message, is_call=theirs == "function_call")
    alone = ", or the text alone, not in a list" if isinstance(message, str) else ""
    raise fields.bad(column, "a message", message, f'write {{"role": ..., "content": ...}}{alone}')


def _message(
    fields: Fields,
    column: str,
    list_name: str,
    role: str,
    keys: tuple[str, str],
    given: Mapping[str, Any],
    *,
    is_call: bool,
) -> Message:
    """A message with more than a role and a text. keys: of its role and its text. is_call: the text is a call."""
    content = keys[1]
    message = {name: value for name, value in given.items() if value is not None and value not in EMPTY}
    _check_keys(fields, column, role, message)
    read = READ | set(keys)
    unread = [name for name in message if name not in read or (name == "name" and role != "tool")]
    fields.unread.update(dict.fromkeys(f"{list_name}[].{name}" for name in unread))
    found: dict[str, Any] = {"role": role, "content": ""}
    calls = _calls(fields, column, message, given.get(content) if is_call else None)
    if not is_call and (given.get(content) is not None or not calls):  # who calls a tool need not say anything
        if given.get(content) is None:
            has = ", ".join(map(shorten_name, given))
            fix = f"the keys of this message are {has}: write its text under {content}"
            raise fields.bad(f"{column}.{content}", "text", None, fix)
        found["content"] = _text(fields, f"{column}.{content}", given[content])
    for name in ("name", "tool_call_id") if role == "tool" else ():
        if name in message:
            found[name] = fields.check_text(f"{column}.{name}", message[name])
    thoughts = {name: message[name] for name in REASONING if name in message}
    for name, thought in thoughts.items():
        if found.setdefault(REASONING[0], fields.check_text(f"{column}.{name}", thought)) != thought:
            fix = f"it differs from another of {', '.join(REASONING)}: keep one of them"
            raise fields.bad(f"{column}.{name}", "one reasoning a message", thought, fix)
    if calls:
        found["tool_calls"] = calls
    if not _learnt(fields, column, role, given):
        found["weight"] = 0
    return found


def _check_keys(fields: Fields, column: str, role: str, message: Mapping[str, Any]) -> None:
    """Raises RowError for a key of known meaning that this role's message cannot have."""
    for name, fix in (OF_ROW if role == "assistant" else OF_ROW | OF_ASSISTANT).items():
        if name in message:
            raise fields.bad(f"{column}.{name}", f"no {name} in a turn of the {role}", message[name], fix)
    if role != "tool" and "tool_call_id" in message:
        fix = "it names the call that a tool answers: remove it, or make this a turn of the tool"
        raise fields.bad(f"{column}.tool_call_id", f"none in a turn of the {role}", message["tool_call_id"], fix)
    for name in MEDIA:
        if name in message:
            raise fields.bad(f"{column}.{name}", "text alone", message[name], NO_MEDIA)


def _learnt(fields: Fields, column: str, role: str, message: Mapping[str, Any]) -> bool:
    """Whether a turn may be learnt from; the keys weight, loss and train say so."""
    said = {name: fields.weight(f"{column}.{name}", message[name]) for name in LEARNT if message.get(name) is not None}
    if role != "assistant":
        for name, value in said.items():
            if value:
                fix = "only turns of the assistant are learnt: write 0, or remove it"
                raise fields.bad(f"{column}.{name}", f"0 in a turn of the {role}", message[name], fix)
        return True
    if len(set(said.values())) > 1:
        raise fields.bad(column, f"one of {', '.join(said)}", message, "they contradict each other: keep one")
    return all(said.values())


def _text(fields: Fields, column: str, value: object) -> str:
    """The text of a message, which may come as a list of parts."""
    if not isinstance(value, list):
        return fields.check_text(column, value)
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS:
            texts.append(fields.check_text(f"{column}[{i}].text", part.get("text")))
        elif isinstance(part, str):
            texts.append(fields.check_text(f"{column}[{i}]", part))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else part
            media = isinstance(kind, str) and re.search("image|audio|video|file|media", kind)
            raise fields.bad(f"{column}[{i}]", "parts of type text", kind, NO_MEDIA if media else OTHER_PARTS)
    return "".join(texts)


def _calls(fields: Fields, column: str, message: Mapping[str, Any], own: object) -> list[Mapping[str, Any]]:
    """The calls of a message. own: what a turn of role function_call says, which is one call."""
    calls = message.get("tool_calls", [])
    if isinstance(calls, str):
        calls = fields.json(f"{column}.tool_calls", calls, "a list of calls")
    if not isinstance(calls, list):
        raise fields.bad(f"{column}.tool_calls", "a list of calls", calls, f"write [{CALL}]")
    found = [_call(fields, f"{column}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if own is not None:
        every = fields.json(column, own, "a call") if isinstance(own, str) else own
        found += [_call(fields, column, call) for call in (every if isinstance(every, list) else [every])]
    if "function_call" in message:
        found.append(_call(fields, f"{column}.function_call", message["function_call"]))
    return found


def _call(fields: Fields, column: str, value: object) -> Mapping[str, Any]:
    """The call of a function, from {"name", "arguments"}, the same under "function", or either as JSON text; its
    arguments may be JSON text too. The id that it has is kept."""
    if isinstance(value, str):
        value = fields.json(column, value, "an object")
    call = fields.function(column, value, CALL)
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = fields.json(f"{column}.arguments", arguments, "an object")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise fields.bad(f"{column}.arguments", "an object", arguments, f"write {CALL}")
    known = value.get("id") if isinstance(value, Mapping) else None
    own = {} if known is None else {"id": fields.check_text(f"{column}.id", known)}
    return {**own, "type": "function", "function": {"name": call["name"], "arguments": arguments or {}}}


def order(fields: Fields, column: str, given: Turns, last: tuple[str, ...] = ("user", "assistant", "tool")) -> Turns:
    """`given`, where their roles follow each other as a template expects: system?, user, assistant, user, ...;
    turns of a tool stand between two of the assistant.

    last: roles with which the conversation may end. Raises RowError that names the first turn out of order.
    """
    before = "system"
    for i, turn in enumerate(given):
        expected = ("system", "user") if i == 0 else FOLLOWS[before]
        if turn["role"] not in expected:
            raise fields.bad(
                f"{column}[{i}].role",
                " or ".join(map(repr, expected)),
                turn["role"],
                "order turns: system?, user, assistant, user; tools between two of the assistant",
            )
        before = turn["role"]
    if before not in last:
        raise fields.bad(
            column, f"a conversation that ends with a turn of the {last[0]}", given[-1], "add or remove a turn"
        )
    _check_ids(fields, column, given)
    return given


def _check_ids(fields: Fields, column: str, given: Turns) -> None:
    """Raises RowError where a tool answers a call by an id that no call before it has."""
    known: set[str] = set()
    for i, turn in enumerate(given):
        calls = turn.get("tool_calls", ())
        if calls:
            known = {call["id"] for call in calls if "id" in call}
        answered = turn.get("tool_call_id")
        if answered is not None and known and answered not in known:
            fix = "let it be the id of the call that this turn answers"
            raise fields.bad(f"{column}[{i}].tool_call_id", f"one of {', '.join(sorted(known))}", answered, fix)
