"""dataset_info.json beside a file: its columns, keys and roles under our names."""

from __future__ import annotations

import json

import pytest
from row_files import read
from support import read_rows

NOTE = {
    "mine": {
        "file_name": "mine.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "bot"},
    },
    "plain": {"file_name": "plain.jsonl", "columns": {"prompt": "ask", "query": "more", "response": "say"}},
}


def test_columns_keys_and_roles(write):
    write("dataset_info.json", json.dumps(NOTE))
    said = {name: {"who": "bot", "what": name} for name in ("good", "bad")}
    write("mine.json", json.dumps([{"talk": [{"who": "me", "what": "q"}], **said}]))
    (row,) = read_rows(["mine.json"], "pairs")
    assert (row.prompt, row.completions) == (({"role": "user", "content": "q"},), ("good", "bad"))
    write("plain.jsonl", [{"ask": "i", "more": "x", "say": "c"}])
    (row,) = read_rows(["plain.jsonl"], "demonstrations")
    assert (row.prompt[0]["content"], row.completions) == ("i\nx", ("c",))


def test_a_note_of_other_files_and_bad_notes(write):
    write("dataset_info.json", json.dumps({"features": {}, "splits": {}}))
    write("a.jsonl", [{"prompt": "q"}])
    assert read("a.jsonl") == [("a.jsonl:1", {"prompt": "q"})]
    write("dataset_info.json", "{")
    with pytest.raises(ValueError, match=r"dataset_info.json: expected JSON.*what the columns of a.jsonl mean"):
        read("a.jsonl")
    write("dataset_info.json", json.dumps({"a": {"file_name": "a.jsonl", "columns": {"propmt": "x"}}}))
    with pytest.raises(ValueError, match=r"columns of a.jsonl: expected some of prompt, .*got \['propmt'\]"):
        read("a.jsonl")
