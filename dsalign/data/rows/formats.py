"""Column layouts: which columns a row may have for each kind of algorithm, and how a prompt and its answers are read
out of them.

A column of known meaning (KNOWN) is used, or the row is refused naming it. The names of columns that nothing reads are
kept in `Row.unread`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from dsalign.contract.groups import Message
from dsalign.data.rows.fields import LEARNT, MEDIA, NO_MEDIA, Fields, user
from dsalign.data.rows.messages import REASONING, order, turns
from dsalign.data.rows.records import Answer, Row, RowError, Turns, as_flags, shorten, shorten_name
from dsalign.data.rows.registry import is_transcript, transcript

KINDS = ("pairs", "labels", "prompts", "demonstrations")
ALGORITHMS = {
    "pairs": "dpo, rm, cpo, orpo or simpo",
    "labels": "kto",
    "prompts": "ppo, grpo, rloo, reinforce or online_dpo",
    "demonstrations": "sft",
}
ASKS = ("user", "tool")  # whose turns are followed by the assistant's
Parts = tuple[Turns, list[Answer]]


def _question(fields: Fields, column: str) -> Turns:
    """The conversation that a text asks: history, and the text with the column input behind it."""
    text, more = fields.text(column), "" if column == "input" else fields.text("input", "")
    return fields.history() + user(f"{text}\n{more}" if more else text)


def _prompt(fields: Fields, column: str = "prompt") -> Turns:
    if isinstance(fields.values[column], list | Mapping):
        given = fields.values[column]
        if column == "input" and isinstance(given, Mapping) and "messages" in given:  # OpenAI's, with tools beside
            fields.take("input")
            fields.values = {**given, **fields.values}
            column = "messages"
        return order(fields, column, turns(fields, column), last=ASKS)
    return _question(fields, column)


def _said(turn: Message) -> Answer:
    """What an assistant's turn says: text, or the whole message where it has more."""
    return turn["content"] if turn.keys() == {"role", "content"} else turn


def _answer(fields: Fields, column: str, prompt: Turns) -> Answer:
    """Text, one assistant turn, or the whole conversation: the prompt and one assistant turn."""
    if not isinstance(fields.values[column], list | Mapping):
        return fields.text(column)
    given = turns(fields, column)
    if given[-1]["role"] != "assistant" or given[:-1] not in ([], prompt):
        more = [f"'{name}'" for name in ("history", "input") if fields.filled([name])]
        raise fields.bad(
            column,
            "text, one assistant turn, or the turns of the prompt"
            f"{', that is with ' + ' and '.join(more) if more else ''} and one assistant turn",
            fields.values[column],
            "let it begin with the prompt, or hold the answer alone",
        )
    return _said(given[-1])


def _asked(column: str, *answers: str) -> Callable[[Fields], Parts]:
    """A reader of rows with a question or a conversation in a column, history and input beside it, and a column for
    each answer."""

    def read(fields: Fields) -> Parts:
        beside = answers or tuple(name for name in ("chosen", "rejected") if name in fields.values)
        prompt = _fuller(fields, _prompt(fields, column), beside)
        fields.taken.difference_update(set(beside) - set(answers))  # of prompts they reach the reward functions
        return prompt, [_answer(fields, name, prompt) for name in answers]

    return read


def _fuller(fields: Fields, prompt: Turns, answers: tuple[str, ...]) -> Turns:
    """The prompt, or where it is one question, and the columns of the answers hold whole conversations with this
    question among other turns, what those begin with."""
    whole = [fields.values[name] for name in answers]
    if len(prompt) > 1 or not whole or not all(isinstance(given, list) and len(given) > 2 for given in whole):
        return prompt
    first, *others = ([*turns(fields, name)[:-1]] for name in answers)
    return (
        order(fields, answers[0], first, last=ASKS)
        if prompt[0] in first and all(x == first for x in others)
        else prompt
    )


def _conversation(column: str, *answers: str) -> Callable[[Fields], Parts]:
    """A reader of conversations whose last turn is the first answer; further answers have columns of their own."""

    def read(fields: Fields) -> Parts:
        given = order(fields, column, turns(fields, column), last=("assistant",))
        return given[:-1], [_said(given[-1]), *(_answer(fields, answer, given[:-1]) for answer in answers)]

    return read


def _opening(column: str) -> Callable[[Fields], Parts]:
    """A reader of conversations as prompts: all turns up to the last of the user."""

    def read(fields: Fields) -> Parts:
        given = order(fields, column, turns(fields, column))
        return given[:-1] if given[-1]["role"] == "assistant" else given, []

    return read


def _open_conversation(column: str) -> Callable[[Fields], Parts]:
    """A reader of conversations that end with a question, and its two answers in columns chosen and rejected."""

    def read(fields: Fields) -> Parts:
        given = order(fields, column, turns(fields, column), last=ASKS)
        return given, [_answer(fields, name, given) for name in ("chosen", "rejected")]

    return read


def _two_conversations(first: str, second: str, keep: int = 2) -> Callable[[Fields], Parts]:
    """A reader of two whole conversations: the turns that they share are the prompt, and the last turn of each is an
    answer, of which `keep` are kept."""

    def read(fields: Fields) -> Parts:
        given = [_whole(fields, column) for column in (first, second)]
        shared = 0
        while shared < min(map(len, given)) - 1 and given[0][shared] == given[1][shared]:
            shared += 1
        if {len(part) - shared for part in given} != {1}:
            raise fields.bad(
                second,
                f"the turns of {first!r} with another last answer",
                fields.values[second],
                f"the two part at turn {shared}: let both hold the same turns before one last assistant turn",
            )
        return given[0][:shared], [_said(part[shared]) for part in given][:keep]

    return read


def _whole(fields: Fields, column: str) -> Turns:
    """A whole conversation: a list of messages, or one text with turns of Human and Assistant."""
    value = fields.values[column]
    if isinstance(value, str):
        if not is_transcript(value):
            fix = f"write message lists, or put the question into a column prompt{_flag_for_question(fields)}"
            raise fields.bad(column, "a whole conversation", value, fix)
        text = fields.text(column)
        return order(fields, column, list(transcript(text)), last=("assistant",))
    given = turns(fields, column)
    if len(given) == 1:
        flag = _flag_for_question(fields) or ": --columns theirs=prompt"
        fix = f"an answer alone needs its question in a column prompt{flag}"
        raise fields.bad(column, "a whole conversation", value, fix)
    return order(fields, column, given, last=("assistant",))


def _flag_for_question(fields: Fields) -> str:
    """How to rename the column that looks like the question of these answers; "" where none does."""
    renamed = _renaming(set(fields.values), "pairs")
    return f": --columns {as_flags(renamed)}" if renamed else ""


# Required columns -> reader; the first line whose columns a row has is its format. `system` and `tools` may be beside,
# `history` and `input` beside a question that is text.
PAIRS: Mapping[str, Callable[[Fields], Parts]] = {
    "prompt, chosen, rejected": _asked("prompt", "chosen", "rejected"),
    "query, chosen, rejected": _asked("query", "chosen", "rejected"),
    "instruction, chosen, rejected": _asked("instruction", "chosen", "rejected"),
    "conversations, chosen, rejected": _open_conversation("conversations"),
    "messages, chosen, rejected": _open_conversation("messages"),
    "chosen, rejected": _two_conversations("chosen", "rejected"),
    "query, response, rejected_response": _asked("query", "response", "rejected_response"),
    "messages, rejected_response": _conversation("messages", "rejected_response"),
    "messages, rejected_messages": _two_conversations("messages", "rejected_messages"),
    "input, preferred_output, non_preferred_output": _asked("input", "preferred_output", "non_preferred_output"),
}
FORMATS: Mapping[str, Mapping[str, Callable[[Fields], Parts]]] = {
    "pairs": PAIRS,
    "labels": {
        "prompt, completion, label": _asked("prompt", "completion"),
        "query, response, label": _asked("query", "response"),
        "instruction, output, label": _asked("instruction", "output"),
        "messages, label": _conversation("messages"),
        "conversations, label": _conversation("conversations"),
    },
    "prompts": {
        "prompt": _asked("prompt"),
        "query": _asked("query"),
        "messages": _opening("messages"),
        "instruction": _asked("instruction"),
        "conversations": _opening("conversations"),
        "chosen, rejected": _two_conversations("chosen", "rejected", keep=0),
        "input, preferred_output, non_preferred_output": lambda fields: (
            PAIRS["input, preferred_output, non_preferred_output"](fields)[0],
            [],
        ),
    },
    "demonstrations": {
        "messages": _conversation("messages"),
        "prompt, completion": _asked("prompt", "completion"),
        "instruction, output": _asked("instruction", "output"),
        "conversations": _conversation("conversations"),
        "query, response": _asked("query", "response"),
    },
}
# Columns of known meaning that only some rows can use -> where the meaning would be read.
KNOWN = {
    "history": "earlier turns are read beside a question that is text: put them into the messages",
    "input": "it is read behind a question that is text: put it into the messages",
    "label": f"rows with a label are for --algo {ALGORITHMS['labels']}",
    "margin": f"it is read for pairs, --algo {ALGORITHMS['pairs']}",
    **dict.fromkeys(REASONING, "put it into the assistant's message, as reasoning_content"),
    **dict.fromkeys(("tool_calls", "tool_call_id"), "put it into the message that it belongs to"),
}
REWARDED = ("label", "margin", *REASONING)  # of a prompt, these reach the reward functions


def convert(fields: Fields, kind: str, system: str | None) -> Row:
    """The row of a record. kind: one of KINDS, what the algorithm reads. system: a system prompt for rows without one.

    Raises RowError where no layout of this kind has the record's columns, a column cannot be used, or a column of known
    meaning would not be.
    """
    has = fields.values.keys()
    read = next((read for needs, read in FORMATS[kind].items() if has >= set(needs.split(", "))), None)
    if read is None:
        raise _no_format(fields, kind)
    media = fields.filled(MEDIA)
    if media is not None:
        raise fields.bad(media, "text alone", fields.values[media], NO_MEDIA)
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
    weights = () if kind == "prompts" else tuple(_weights(fields, kind, prompt, completions))
    if weights:
        prompt, completions = [_unweighted(turn) for turn in prompt], [_said(_unweighted(a)) for a in completions]
    if not fields.taken.issuperset(fields.values):
        _refuse_unused(fields, kind)
    kept = {"tools"} if kind == "prompts" else set()  # reward functions may want them as well
    others = {name: value for name, value in fields.values.items() if name not in fields.taken - kept}
    unread = (*(name for name in others if kind != "prompts"), *fields.unread)
    return Row(fields.where, tuple(prompt), tuple(completions), label, margin, others, tools, weights, unread)


def _weights(fields: Fields, kind: str, prompt: Turns, completions: list[Answer]) -> Iterable[int]:
    """The turns of prompt and completion that have weight 0. Raises RowError for an answer of a pair or a labelled row
    that has it."""
    for i, turn in enumerate([*prompt, *completions]):
        if isinstance(turn, Mapping) and "weight" in turn:
            if kind != "demonstrations" and i >= len(prompt):
                fix = "it cannot be compared without being learnt: remove the weight, or leave the row out"
                raise RowError(f"{fields.where}: weight: expected 1 for an answer of {kind}, got 0; {fix}")
            yield i


def _unweighted(turn: Answer) -> Message:
    given = {"role": "assistant", "content": turn} if isinstance(turn, str) else turn
    return {name: value for name, value in given.items() if name != "weight"}


def _refuse_unused(fields: Fields, kind: str) -> None:
    """Raises RowError for a column of known meaning that was not read and has something in it."""
    usable = REWARDED if kind == "prompts" else ()
    column = fields.filled([name for name in KNOWN if name not in fields.taken and name not in usable])
    if column is not None:
        fix = f"{KNOWN[column]}; or rename it (--columns {column}=unused_{column}), or remove it"
        raise fields.bad(column, f"none in this layout of {kind}", fields.values[column], fix)
    for name in LEARNT if kind != "prompts" else ():
        value = fields.values.get(name)
        if value is not None and not (fields.text_only and value == ""):
            if not fields.weight(name, value):
                fix = "a row with weight 0 teaches nothing: leave it out (--on_bad_row skip), or remove the column"
                raise fields.bad(name, "1 or true", value, fix)
            fields.taken.add(name)


def _no_format(fields: Fields, kind: str) -> RowError:
    null = f" (null: {', '.join(fields.null)})" if fields.null else ""
    return RowError(
        f"{fields.where}: expected the columns of a format for {kind} ({' | '.join(FORMATS[kind])}), "
        f"got {', '.join(map(shorten_name, fields.values)) or 'none'}{null} in {shorten(fields.values)}; "
        f"{_advice(fields, kind)}"
    )


# Names that others give a column -> ours, in the order in which they are tried.
ALIASES = {
    "prompt": ("question", "instruction", "query", "input", "user"),
    "completion": ("answer", "response", "output", "assistant"),
    "chosen": ("chosen_response", "preferred", "accepted", "response_chosen"),
    "rejected": ("rejected_response", "dispreferred", "non_preferred", "response_rejected"),
    "label": ("kto_tag", "desirable", "is_desirable"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
}


def _advice(fields: Fields, kind: str) -> str:
    """What to do about a row without a format: a null to fill, names to change where that gives it one, or the
    algorithm for rows like this."""
    columns, null = set(fields.values), set(fields.null)
    renamed = _renaming(columns, kind)
    if renamed:
        return f"rename with --columns {as_flags(renamed)}"
    layouts = {name: [set(needs.split(", ")) for needs in FORMATS[name]] for name in FORMATS}
    lacking = [sorted(needs - columns) for needs in layouts[kind] if needs & columns and columns | null >= needs]
    if lacking:
        return f"give {', '.join(lacking[0])} a value, or leave such rows out with --on_bad_row skip"
    others = [name for name in ("pairs", "labels", "demonstrations", "prompts") if name != kind]
    for other in others:
        if any(columns >= needs for needs in layouts[other]):
            alone = f"the row has no answer, which {kind} need; " if other == "prompts" else ""
            return f"{alone}these are rows for --algo {ALGORITHMS[other]}"
    every = [needs for one in layouts.values() for needs in one]
    inside = {
        name: value
        for name, value in fields.values.items()
        if isinstance(value, Mapping) and any(value.keys() >= needs for needs in every)
    }
    if len(inside) > 1:
        return f"{shorten_name(next(iter(inside)))} and others are rows themselves: write them as a list, or one a line"
    for name, value in inside.items():
        return f"these columns are inside {shorten_name(name)}: put {', '.join(map(shorten_name, value))} on the row"
    for other in others:
        if renamed := _renaming(columns, other):
            return f"these are rows for --algo {ALGORITHMS[other]} once renamed with --columns {as_flags(renamed)}"
    known = {*KNOWN, "system", "tools"}.union(*(needs for every in layouts.values() for needs in every))
    if fields.text_only and columns.isdisjoint(known):
        return "is the first line of the file a row? It must name the columns, as prompt,completion does"
    if len(columns) == 1 and kind != "prompts" and isinstance(next(iter(fields.values.values())), str):
        layout = next(needs for needs in FORMATS[kind] if "prompt" in needs)
        return f"{kind} need a question and an answer apart: write columns {layout} from it"
    return "rename with --columns theirs=ours"


def _renaming(columns: set[str], kind: str) -> dict[str, str]:
    """Their name -> ours, for the layout of this kind that needs the fewest new names; empty where none can be had."""
    best: dict[str, str] = {}
    for needs in FORMATS[kind]:
        absent = [name for name in needs.split(", ") if name not in columns]
        spare = columns - set(needs.split(", ")) - set(KNOWN) - {"system", "tools"} | (columns & {"input"})
        found: dict[str, str] = {}
        for ours in absent:
            left = {theirs.lower(): theirs for theirs in spare - found.keys()}
            near = [alias for alias in ALIASES.get(ours, ()) if alias in left]
            near = difflib.get_close_matches(ours, left, 2, 0.8) or near
            if len(near) == 1 or (near and near[0] in ALIASES.get(ours, ())):
                found[left[near[0]]] = ours
        if absent and len(found) == len(absent) and not 0 < len(best) <= len(found):
            best = found
    return best
