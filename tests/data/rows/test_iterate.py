"""?"""

from __future__ import annotations

import json
import tracemalloc

import pytest
from support import read_rows

from dsalign.data.rows.formats import FORMATS, KINDS
from dsalign.data.rows.iterate import Skipped, iter_rows
from dsalign.data.rows.records import Row, RowError


def turns(*texts, system=None):
    """user, assistant, user, ... messages."""
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *found] if system else found


def said(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def answer(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def one(write):
    """one(row, kind, ...) -> the Row of a file with this row alone."""

    def one(row, kind, **options):
        (found,) = read_rows([write("a.jsonl", [row])], kind, **options)
        return found

    return one


SYSTEM = {"system": "s"}
HISTORY = {"history": [["a", "b"]]}
FORMS = [
    # kind, columns, prompt, completions
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r"}, turns("q"), ("c", "r")),
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r", **SYSTEM}, turns("q", system="s"), ("c", "r")),
    ("pairs", {"prompt": turns("q"), "chosen": answer("c"), "rejected": answer("r")}, turns("q"), ("c", "r")),
    ("pairs", {"prompt": "q", "chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ("c", "r")),
    ("pairs", {"chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ("c", "r")),
    ("pairs", {"chosen": turns("q", "c", "d", "e"), "rejected": turns("q", "c", "d", "f")}, turns("q", "c", "d"), "ef"),
    ("pairs", {"chosen": turns("q", "c"), "rejected": turns("q", "c")}, turns("q"), ("c", "c")),
    ("pairs", {"query": "q", "response": "c", "rejected_response": "r"}, turns("q"), ("c", "r")),
    (
        "pairs",
        {"query": "q", "response": "c", "rejected_response": "r", **SYSTEM, **HISTORY},
        turns("a", "b", "q", system="s"),
        ("c", "r"),
    ),
    ("pairs", {"messages": turns("q", "c", system="s"), "rejected_response": "r"}, turns("q", system="s"), ("c", "r")),
    ("pairs", {"messages": turns("q", "c"), "rejected_messages": turns("q", "r")}, turns("q"), ("c", "r")),
    ("labels", {"prompt": "q", "completion": "c", "label": True}, turns("q"), ("c",)),
    ("labels", {"query": "q", "response": "c", "label": True, **SYSTEM}, turns("q", system="s"), ("c",)),
    ("labels", {"query": "q", "response": "c", "label": True, **HISTORY}, turns("a", "b", "q"), ("c",)),
    ("labels", {"messages": turns("q", "c"), "label": True}, turns("q"), ("c",)),
    ("demonstrations", {"messages": turns("q", "a", "p", "c")}, turns("q", "a", "p"), ("c",)),
    ("demonstrations", {"prompt": "q", "completion": ""}, turns("q"), ("",)),
    ("demonstrations", {"prompt": turns("q"), "completion": answer("c")}, turns("q"), ("c",)),
    ("demonstrations", {"instruction": "i", "input": "x", "output": "c"}, turns("i\nx"), ("c",)),
    ("demonstrations", {"instruction": "i", "input": "", "output": "c"}, turns("i"), ("c",)),
    ("demonstrations", {"instruction": "i", "output": "c", **HISTORY}, turns("a", "b", "i"), ("c",)),
    ("demonstrations", {"conversations": said("q", "c")}, turns("q"), ("c",)),
    ("demonstrations", {"query": "q", "response": "c", **SYSTEM, **HISTORY}, turns("a", "b", "q", system="s"), ("c",)),
    ("prompts", {"prompt": "q", **SYSTEM}, turns("q", system="s"), ()),
    ("prompts", {"prompt": turns("q", "a", "p")}, turns("q", "a", "p"), ()),
    ("prompts", {"messages": turns("q", system="s")}, turns("q", system="s"), ()),
    ("prompts", {"messages": turns("q", "a")}, turns("q"), ()),
    ("prompts", {"query": "q", **HISTORY}, turns("a", "b", "q"), ()),
    ("prompts", {"instruction": "i", "input": "x"}, turns("i\nx"), ()),
    ("prompts", {"conversations": said("q", "a", "p")}, turns("q", "a", "p"), ()),
    ("prompts", {"chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ()),
]


@pytest.mark.parametrize(("kind", "row", "prompt", "completions"), FORMS)
def test_formats(one, kind, row, prompt, completions):
    label = True if kind == "labels" else None
    assert one(row, kind) == Row("a.jsonl:1", tuple(prompt), tuple(completions), label)


def test_every_format_has_a_case_above():
    for kind, formats in FORMATS.items():
        for required in formats:
            columns = set(required.split(", "))
            assert any(kind == k and columns <= row.keys() for k, row, _, _ in FORMS), (kind, required)
    assert tuple(FORMATS) == KINDS


def test_prompt_side_of_every_other_row(one):
    """Any row of another kind is a prompt as well: the same prompt, without completions."""
    for _, row, prompt, _ in FORMS:
        found = one(row, "prompts")
        assert (found.prompt, found.completions) == (tuple(prompt), ())


def test_further_columns_are_kept(one):
    assert one({"prompt": "q", "answer": 4, "label": "easy", "gone": None}, "prompts").columns == {
        "answer": 4,
        "label": "easy",
    }
    assert one({"prompt": "q", "completion": "c", "label": False, "id": 7}, "labels").columns == {"id": 7}


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


def test_sources_follow_each_other_and_are_sampled(write):
    first = write("a.jsonl", [{"prompt": str(i)} for i in range(5)])
    second = write("b.csv", "prompt\nx\n")
    assert [row.where for row in read_rows([second, first], "prompts")] == [
        "b.csv:2",
        *(f"a.jsonl:{i}" for i in range(1, 6)),
    ]
    assert len(read_rows([f"{first}#2", second], "prompts", seed=1)) == 3


def test_renamed_columns(one):
    row = one(
        {"question": "q", "good": "c", "bad": "r"},
        "pairs",
        columns={"question": "prompt", "good": "chosen", "bad": "rejected"},
    )
    assert row == Row("a.jsonl:1", tuple(turns("q")), ("c", "r"))
    with pytest.raises(ValueError, match=r"columns: expected names that some row of a.jsonl has, got \['quest'\]"):
        one({"prompt": "q"}, "prompts", columns={"quest": "prompt"})


def test_system_prompt_is_put_in_front_where_there_is_none(one):
    assert one({"prompt": "q"}, "prompts", system="d").prompt == tuple(turns("q", system="d"))
    assert one({"prompt": "q", "system": "s"}, "prompts", system="d").prompt == tuple(turns("q", system="s"))
    own = {"messages": turns("q", system="s")}
    assert one(own, "prompts", system="d").prompt == tuple(turns("q", system="s"))
    assert one({**own, "system": "s"}, "prompts").prompt == tuple(turns("q", system="s"))
    with pytest.raises(RowError, match=r"column 'system': expected one system prompt a row, got 't'"):
        one({**own, "system": "t"}, "prompts")


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
    assert row.completions == (ASKED[1], "r")
    row = one({"messages": [*turns("q"), said]}, "demonstrations")
    assert (row.prompt, row.completions) == (tuple(turns("q")), (ASKED[1],))
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
BAD_ROWS = {
    "missing key": (
        "pairs",
        {"prompt": "q", "chosen": "c"},
        r"expected the columns of a format for pairs \(prompt, cho",
    ),
    "null": ("pairs", {**PAIR, "rejected": None}, r"got prompt, chosen \(null: rejected\) in"),
    "no column": ("pairs", {}, r"got none in \{\}; rename with columns=\{theirs: ours\}"),
    "near name": ("pairs", {"prompt": "q", "choosen": "c", "rejected": "r"}, r"columns=\{'choosen': 'chosen'\}"),
    "text label": ("labels", {**LABELLED, "label": "false"}, r"'label': expected true or false, got 'false'; .*quotes"),
    "number label": ("labels", {**LABELLED, "label": 1}, r"column 'label': expected true or false, got 1"),
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
        r"'messages\[1\].role': expected one of system, user, .*got 'critic'; rename the role",
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
    "ends with user": ("labels", {"messages": turns("q"), "label": True}, r"ends with a turn of the assistant, got"),
    "prompt end": ("pairs", {**PAIR, "prompt": turns("q", "a")}, r"'prompt': .* ends with a turn of the user, got"),
    "other prompt": ("pairs", {**PAIR, "chosen": turns("p", "c")}, r"'chosen': expected text, one assistant turn, or"),
    "answer role": ("pairs", {**PAIR, "chosen": turns("q")}, r"column 'chosen': expected text, one assistant turn, or"),
    "no prompt": (
        "pairs",
        {"chosen": "c", "rejected": "r"},
        r"'chosen': expected a whole conversation.*a column prompt",
    ),
    "parted early": (
        "pairs",
        {"chosen": turns("q", "a", "b", "c"), "rejected": turns("q", "x", "b", "c")},
        r"'rejected': expected the turns of 'chosen' with another last answer.*the two part at turn 1",
    ),
    "other lengths": ("pairs", {"chosen": turns("q", "a", "b", "c"), "rejected": turns("q", "a")}, r"part at turn 1"),
    "other question": ("pairs", {"chosen": turns("q", "c"), "rejected": turns("p", "r")}, r"the two part at turn 0"),
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
    good = FORMS[[form[0] for form in FORMS].index(kind)][1]
    name = write("a.jsonl", f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(RowError, match=message) as caught:
        read_rows([name], kind)
    assert str(caught.value).startswith("a.jsonl:3: ")


def test_bad_arguments(write):
    with pytest.raises(ValueError, match=r"kind of rows: expected one of pairs, labels, .*got 'pair'"):
        read_rows([write("a.jsonl", [PAIR])], "pair")
    with pytest.raises(ValueError, match=r"data set: expected at least one file, .*got none"):
        read_rows([], "pairs")


def prompts(rows):
    return [row.prompt[0]["content"] for row in rows]


def test_weights_take_rows_more_than_once_or_a_random_part(write):
    """2 = twice in order; 0.5 of 400 rows is about half of them, the same half for a seed; 1.25 all and some again."""
    write("a.jsonl", [{"prompt": f"a{i}"} for i in range(3)])
    write("b.jsonl", [{"prompt": f"b{i}"} for i in range(400)])
    found = prompts(iter_rows(["a.jsonl", "b.jsonl"], "prompts", weights=[2, 0.5], seed=1))
    assert found[:6] == ["a0", "a1", "a2"] * 2
    half = found[6:]
    assert (
        160 <= len(half) <= 240 and half == sorted(half, key=lambda name: int(name[1:])) and len(set(half)) == len(half)
    )
    again = prompts(iter_rows(["b.jsonl"], "prompts", weights=[0.5], seed=1))
    assert again == half != prompts(iter_rows(["b.jsonl"], "prompts", weights=[0.5], seed=2))
    more = prompts(iter_rows(["b.jsonl"], "prompts", weights=[1.25]))
    assert len(set(more[:400])) == 400 and 70 <= len(more[400:]) <= 130


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(write):
    """A line that is no JSON, a label in quotes, a NUL: three of five; the first is kept to be shown."""
    good = '{"prompt": "p", "completion": "c", "label": true}'
    lines = [good, '{"prompt": ', good.replace("true", '"false"'), good.replace('"c"', '"\\u0000"'), good]
    write("a.jsonl", "\n".join(lines) + "\n")
    skipped = Skipped()
    assert [row.where for row in iter_rows(["a.jsonl"], "labels", skipped=skipped)] == ["a.jsonl:1", "a.jsonl:5"]
    assert skipped.count == 3 and skipped.first.startswith("a.jsonl:2: expected JSON")
    with pytest.raises(RowError, match=r"^a.jsonl:2: expected JSON"):
        list(iter_rows(["a.jsonl"], "labels"))


def test_text_with_a_nul_is_no_text(write):
    write("a.jsonl", '{"prompt": "a\\u0000b"}\n')
    with pytest.raises(RowError, match=r"^a.jsonl:1: column 'prompt': expected text, .*at 1 is NUL: leave the row out"):
        list(iter_rows(["a.jsonl"], "prompts"))


def test_rows_are_read_as_they_are_asked_for(write):
    """The first rows come before the broken one behind them is seen; memory does not grow with the file."""
    write("a.jsonl", "".join(json.dumps({"prompt": "x" * 1000}) + "\n" for _ in range(2000)) + "broken\n")
    rows = iter_rows(["a.jsonl"], "prompts")
    assert next(rows).where == "a.jsonl:1"
    tracemalloc.start()
    with pytest.raises(RowError, match=r"^a.jsonl:2001: expected JSON"):
        for _ in rows:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000, "of 2 MB"
