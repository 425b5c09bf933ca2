"""Columns with checks: labels, margins, turns, tools and calls; each bad row names its column."""

from __future__ import annotations

import json

import pytest
from row_files import answer, turns
from support import read_rows

from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.records import Row, RowError


def test_label_and_margin(one):
    assert one({"prompt": "q", "completion": "c", "label": False}, "labels").label is False
    pair = {"prompt": "q", "chosen": "c", "rejected": "r"}
    assert one(pair, "pairs").margin is None
    assert one({**pair, "margin": 2}, "pairs") == Row("a.jsonl:1", tuple(turns("q")), ("c", "r"), margin=2.0)


def test_csv_words_are_labels_and_margins(write):
    labels = write("l.csv", "prompt,completion,label\nq,c,true\nq,c,FALSE\nq,c,1\nq,c,0\n")
    assert [row.label for row in read_rows([labels], "labels")] == [True, False, True, False]
    pairs = write("p.csv", "prompt,chosen,rejected,margin,system,history\nq,c,r,0.5,,\nq,c,r,,s,\n")
    rows = read_rows([pairs], "pairs")
    assert [(row.margin, row.prompt[0]["role"]) for row in rows] == [(0.5, "user"), (None, "system")]
    with pytest.raises(RowError, match=r"m.csv:2: column 'messages': .*got 'hi'; CSV holds single turns: use .jsonl"):
        read_rows([write("m.csv", "messages\nhi\n")], "demonstrations")
    with pytest.raises(RowError, match=r"n.csv:2: column 'label': expected true or false, got 'yes'; write true or"):
        read_rows([write("n.csv", "prompt,completion,label\nq,c,yes\n")], "labels")
    with pytest.raises(RowError, match=r"o.csv:2: column 'margin': expected a finite number, got 'big'"):
        read_rows([write("o.csv", "prompt,chosen,rejected,margin\nq,c,r,big\n")], "pairs")


ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOLD = {"role": "tool", "content": "2", "name": "add"}


@pytest.mark.parametrize("tools", [[ADD], [{"type": "function", "function": ADD}], json.dumps([ADD])])
def test_tools_are_schemas_by_themselves_wrapped_or_as_text(one, tools):
    row = one({"messages": [*ASKED, TOLD, *answer("2")], "tools": tools}, "demonstrations")
    assert row.tools == ({"type": "function", "function": ADD},)
    assert row.prompt == (*ASKED, TOLD) and row.completions == ("2",) and row.columns == {}


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools(one, tools):
    assert one({"messages": turns("q", "c"), "tools": tools}, "demonstrations").tools == ()


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}},
        '{"name": "add", "arguments": {"a": 1}}',
    ],
)
def test_a_call_is_itself_wrapped_or_text_and_may_be_the_answer(one, call):
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = one({"prompt": turns("q"), "chosen": [said], "rejected": "r"}, "pairs")
    known = {"id": call["id"]} if isinstance(call, dict) and "id" in call else {}
    want = {**ASKED[1], "tool_calls": [{**known, **CALL}]}
    assert row.completions == (want, "r")
    row = one({"messages": [*turns("q"), said]}, "demonstrations")
    assert (row.prompt, row.completions) == (tuple(turns("q")), (want,))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    row = one({"conversations": [*sharegpt, {"from": "observation", "value": "2"}]}, "prompts")
    assert row.prompt == (*ASKED, {"role": "tool", "content": "2"})


def test_several_tools_answer_and_a_prompt_may_end_with_one(one):
    row = one({"prompt": [*ASKED, TOLD, TOLD], "tools": [ADD]}, "prompts")
    assert row.prompt == (*ASKED, TOLD, TOLD) and row.completions == ()
    assert row.columns == {"tools": [ADD]}, "reward functions get them"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_assistant_thought_is_kept(one, name):
    row = one({"messages": [*turns("q"), {"role": "assistant", "content": "c", name: "t"}]}, "demonstrations")
    assert row.completions == ({"role": "assistant", "content": "c", "reasoning_content": "t"},)
    assert one({"messages": turns("q", "c")}, "demonstrations").completions == ("c",)


PAIR = {"prompt": "q", "chosen": "c", "rejected": "r"}
LABELLED = {"prompt": "q", "completion": "c"}
GOOD = {"pairs": PAIR, "labels": {**LABELLED, "label": True}, "prompts": {"prompt": "q"}, "demonstrations": LABELLED}
BAD_ROWS = {
    "text label": ("labels", {**LABELLED, "label": "false"}, r"'label': expected true or false, got 'false'; .*quotes"),
    "number label": ("labels", {**LABELLED, "label": 2}, r"column 'label': expected true or false, got 2"),
    "margin text": ("pairs", {**PAIR, "margin": "1"}, r"column 'margin': expected a finite number, got '1'"),
    "margin flag": ("pairs", {**PAIR, "margin": True}, r"column 'margin': expected a finite number, got True"),
    "not text": ("pairs", {**PAIR, "chosen": 3}, r"column 'chosen': expected text, got 3; write a string"),
    "surrogate": ("pairs", {**PAIR, "chosen": "x\ud83d"}, r"column 'chosen': expected text, .*character at 1 is half"),
    "messages text": (
        "demonstrations",
        {"messages": "hi"},
        r"'messages': expected a list of messages, got 'hi'; write \[",
    ),
    "no messages": ("demonstrations", {"messages": []}, r"column 'messages': expected a list of messages, got \[\]"),
    "not a message": ("demonstrations", {"messages": ["hi"]}, r"'messages\[0\]': expected a message, got 'hi'"),
    "role": (
        "demonstrations",
        {"messages": [*turns("q"), {"role": "critic", "content": "4"}]},
        r"'messages\[1\].role': expected one of system, developer, .*got 'critic'; rename the role",
    ),
    "role type": (
        "prompts",
        {"messages": [{"role": ["user"], "content": "x"}]},
        r"'messages\[0\].role': expected one of",
    ),
    "content": (
        "prompts",
        {"messages": [{"role": "user"}]},
        r"column 'messages\[0\].content': expected text, got None",
    ),
    "order": (
        "demonstrations",
        {"messages": answer("x")},
        r"'messages\[0\].role': expected 'system' or 'user', got 'assi",
    ),
    "tool first": (
        "prompts",
        {"messages": [*turns("q"), {"role": "tool", "content": "4"}]},
        r"'messages\[1\].role': expected 'assistant', got 'tool'; order turns",
    ),
    "tool last": (
        "demonstrations",
        {"messages": [*turns("q", "a"), {"role": "tool", "content": "4"}]},
        r"'messages': expected a conversation that ends with a turn of the assistant",
    ),
    "tool says nothing": (
        "prompts",
        {"messages": [*turns("q", "a"), {"role": "tool"}]},
        r"'messages\[2\].content': expected text, got None",
    ),
    "tools": ("prompts", {"prompt": "q", "tools": 3}, r"'tools': expected a list of functions, got 3; write \[{\"name"),
    "tools text": (
        "prompts",
        {"prompt": "q", "tools": "x"},
        r"'tools': expected a list of functions as JSON text, got",
    ),
    "tool": (
        "prompts",
        {"prompt": "q", "tools": [{}]},
        r"'tools\[0\]': expected a function with a name, got {}; write",
    ),
    "calls": (
        "prompts",
        {"messages": [*turns("q"), {"role": "assistant", "content": "", "tool_calls": {"name": "f"}}, TOLD]},
        r"'messages\[1\].tool_calls': expected a list of calls",
    ),
    "call": (
        "prompts",
        {"messages": [*turns("q"), {"role": "assistant", "tool_calls": [{"arguments": {}}]}, TOLD]},
        r"'messages\[1\].tool_calls\[0\]': expected a function with a name",
    ),
    "arguments": (
        "prompts",
        {"messages": [*turns("q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, TOLD]},
        r"'messages\[1\].tool_calls\[0\].arguments': expected an object as JSON text, got '{'; it cannot be read",
    ),
    "arguments list": (
        "prompts",
        {"messages": [*turns("q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, TOLD]},
        r"'messages\[1\].tool_calls\[0\].arguments': expected an object, got \[1\]",
    ),
    "late system": (
        "prompts",
        {"messages": turns("q") + turns("p", system="s")},
        r"\[1\].role': .*got 'system'; order",
    ),
    "system only": ("prompts", {"messages": turns(system="s")}, r"'messages': expected a conversation that ends with"),
    "history": (
        "labels",
        {"query": "q", "response": "c", "label": True, "history": "a"},
        r"'history': expected a list",
    ),
    "history pair": ("prompts", {"query": "q", "history": [["a"]]}, r"'history\[0\]': expected a pair, got \['a'\]"),
    "history text": ("prompts", {"query": "q", "history": [["a", 1]]}, r"'history\[0\]\[1\]': expected text, got 1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(write, case):
    kind, row, message = BAD_ROWS[case]
    name = write("a.jsonl", f"{json.dumps(GOOD[kind])}\n\n{json.dumps(row)}\n")
    with pytest.raises(RowError, match=message) as caught:
        read_rows([name], kind)
    assert str(caught.value).startswith("a.jsonl:3: ")


def test_text_with_a_nul_is_no_text(write):
    write("a.jsonl", '{"prompt": "a\\u0000b"}\n')
    with pytest.raises(RowError, match=r"^a.jsonl:1: column 'prompt': expected text, .*at 1 is NUL: leave the row out"):
        list(iter_rows(["a.jsonl"], "prompts"))
