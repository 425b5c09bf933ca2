"""Column layouts: every layout of every kind by hand, and rows that fit none."""

from __future__ import annotations

import csv
import io
import json

import pytest
from row_files import answer, said, turns
from support import read_rows

from dsalign.data.rows.formats import FORMATS, KINDS
from dsalign.data.rows.records import Row, RowError

SYSTEM = {"system": "s"}
HISTORY = {"history": [["a", "b"]]}
FORMS = [
    # kind, columns, prompt, completions
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r"}, turns("q"), ("c", "r")),
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r", **SYSTEM}, turns("q", system="s"), ("c", "r")),
    ("pairs", {"prompt": turns("q"), "chosen": answer("c"), "rejected": answer("r")}, turns("q"), ("c", "r")),
    ("pairs", {"prompt": "q", "chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ("c", "r")),
    ("pairs", {"chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ("c", "r")),
    (
        "pairs",
        {"prompt": "q", "chosen": turns("q", "c", system="s"), "rejected": turns("q", "r", system="s")},
        turns("q", system="s"),
        ("c", "r"),
    ),
    (
        "pairs",
        {"prompt": "q", "chosen": turns("q", "a", "p", "c"), "rejected": turns("q", "a", "p", "r")},
        turns("q", "a", "p"),
        ("c", "r"),
    ),
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
    ("pairs", {"query": "q", "chosen": "c", "rejected": "r", "input": "x"}, turns("q\nx"), ("c", "r")),
    (
        "pairs",
        {"instruction": "i", "input": "x", "chosen": "c", "rejected": "r", **HISTORY},
        turns("a", "b", "i\nx"),
        ("c", "r"),
    ),
    ("pairs", {"prompt": "q", "chosen": "c", "rejected": "r", **HISTORY}, turns("a", "b", "q"), ("c", "r")),
    (
        "pairs",
        {"conversations": said("q"), "chosen": said("", "c")[1], "rejected": said("", "r")[1]},
        turns("q"),
        ("c", "r"),
    ),
    ("pairs", {"messages": turns("q"), "chosen": answer("c")[0], "rejected": answer("r")[0]}, turns("q"), ("c", "r")),
    (
        "pairs",
        {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "Human: q\n\nAssistant: r"},
        turns("q"),
        ("c", "r"),
    ),
    ("pairs", {"input": "q", "preferred_output": "c", "non_preferred_output": "r"}, turns("q"), ("c", "r")),
    (
        "pairs",
        {
            "input": {"messages": turns("q"), "tools": []},
            "preferred_output": answer("c"),
            "non_preferred_output": answer("r"),
        },
        turns("q"),
        ("c", "r"),
    ),
    ("labels", {"instruction": "i", "input": "x", "output": "c", "label": 1}, turns("i\nx"), ("c",)),
    ("labels", {"conversations": said("q", "c"), "label": 1.0}, turns("q"), ("c",)),
    ("labels", {"prompt": "q", "completion": "c", "label": True}, turns("q"), ("c",)),
    ("labels", {"query": "q", "response": "c", "label": True, **SYSTEM}, turns("q", system="s"), ("c",)),
    ("labels", {"query": "q", "response": "c", "label": True, **HISTORY}, turns("a", "b", "q"), ("c",)),
    ("labels", {"messages": turns("q", "c"), "label": True}, turns("q"), ("c",)),
    ("demonstrations", {"messages": turns("q", "a", "p", "c")}, turns("q", "a", "p"), ("c",)),
    (
        "demonstrations",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "human", "content": [{"type": "text", "text": "q"}]},
                {"role": "model", "content": [{"type": "output_text", "text": "c"}]},
            ]
        },
        turns("q", system="s"),
        ("c",),
    ),
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
    ("prompts", {"input": "q", "preferred_output": "c", "non_preferred_output": "r"}, turns("q"), ()),
    ("prompts", {"instruction": "i", "input": "x"}, turns("i\nx"), ()),
    ("prompts", {"conversations": said("q", "a", "p")}, turns("q", "a", "p"), ()),
    ("prompts", {"chosen": turns("q", "c"), "rejected": turns("q", "r")}, turns("q"), ()),
]


@pytest.mark.parametrize(("kind", "row", "prompt", "completions"), FORMS)
def test_formats(one, kind, row, prompt, completions):
    label = True if kind == "labels" else None
    assert one(row, kind) == Row("a.jsonl:1", tuple(prompt), tuple(completions), label)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_single_turns_are_the_same_in_csv(write, delimiter):
    """Every layout whose columns are texts, a number or a label; line ends and quotes in the cells."""
    name, found = "a.csv" if delimiter == "," else "a.tsv", 0
    for kind, row, prompt, completions in FORMS:
        if any(isinstance(value, list | dict) for value in row.values()):
            continue
        table = io.StringIO()
        csv.writer(table, delimiter=delimiter).writerows([row, row.values()])
        (read,) = read_rows([write(name, table.getvalue())], kind)
        label = True if kind == "labels" else None
        assert (read.prompt, read.completions, read.label) == (tuple(prompt), tuple(completions), label)
        found += 1
    assert found >= 12


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
    found = one({"prompt": "q", "completion": "c", "label": False, "id": 7}, "labels")
    assert (found.columns, found.unread) == ({"id": 7}, ("id",))


def test_system_prompt_is_put_in_front_where_there_is_none(one):
    assert one({"prompt": "q"}, "prompts", system="d").prompt == tuple(turns("q", system="d"))
    assert one({"prompt": "q", "system": "s"}, "prompts", system="d").prompt == tuple(turns("q", system="s"))
    own = {"messages": turns("q", system="s")}
    assert one(own, "prompts", system="d").prompt == tuple(turns("q", system="s"))
    assert one({**own, "system": "s"}, "prompts").prompt == tuple(turns("q", system="s"))
    with pytest.raises(RowError, match=r"column 'system': expected one system prompt a row, got 't'"):
        one({**own, "system": "t"}, "prompts")


PAIR = {"prompt": "q", "chosen": "c", "rejected": "r"}
GOOD = {"pairs": PAIR, "labels": {"prompt": "q", "completion": "c", "label": True}}
BAD_LAYOUTS = {
    "missing key": (
        "pairs",
        {"prompt": "q", "chosen": "c"},
        r"expected the columns of a format for pairs \(prompt, cho",
    ),
    "null": ("pairs", {**PAIR, "rejected": None}, r"got prompt, chosen \(null: rejected\) in"),
    "no column": ("pairs", {}, r"got none in \{\}; rename with --columns theirs=ours"),
    "whole conversations without the prompt": (
        "pairs",
        {**PAIR, "chosen": turns("p", "a", "o", "c"), "rejected": turns("p", "a", "o", "r")},
        r"'chosen': expected text, one assistant turn, or",
    ),
    "inside another column": (
        "pairs",
        {"data": PAIR},
        r"these columns are inside data: put prompt, chosen, rejected on the row",
    ),
    "rows by their ids": ("pairs", {"1": PAIR, "2": PAIR}, r"1 and others are rows themselves: write them as a list"),
    "another loss": (
        "pairs",
        {**PAIR, "loss": 1.25},
        r"write one of them, or rename .* \(--columns loss=unused_loss\)",
    ),
    "one text": (
        "pairs",
        {"text": "q"},
        r"question and an answer apart: write columns prompt, chosen, rejected from it",
    ),
    "near name": ("pairs", {"prompt": "q", "choosen": "c", "rejected": "r"}, r"--columns choosen=chosen"),
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
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_bad_layout(write, case):
    kind, row, message = BAD_LAYOUTS[case]
    name = write("a.jsonl", f"{json.dumps(GOOD[kind])}\n\n{json.dumps(row)}\n")
    with pytest.raises(RowError, match=message) as caught:
        read_rows([name], kind)
    assert str(caught.value).startswith("a.jsonl:3: ")
