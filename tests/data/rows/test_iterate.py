"""Sources to rows: one after the other, renamed, weighted, with bad rows raised or counted."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from row_files import turns
from support import read_rows

from dsalign.data.rows.iterate import Skipped, iter_rows
from dsalign.data.rows.records import Row, RowError


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
    with pytest.raises(ValueError, match=r"columns: expected names that some row .* got quest; .* have prompt:"):
        one({"prompt": "q"}, "prompts", columns={"quest": "prompt"})


PAIR = {"prompt": "q", "chosen": "c", "rejected": "r"}


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
