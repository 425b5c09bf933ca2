"""JSON lines, JSON arrays and CSV, plain and compressed: values, places and what is refused."""

from __future__ import annotations

import gzip
import json

import pyarrow.parquet
import pytest
from row_files import read

from dsalign.data.rows import text_files
from dsalign.data.rows.readers import read_source
from dsalign.data.rows.records import RowError


def test_json_lines_with_blank_lines_bom_crlf_and_no_last_line_end(write):
    name = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9"}')
    assert read(name) == [("a.jsonl:1", {"a": 1}), ("a.jsonl:4", {"a": "é"})]


def test_json_array_names_the_line_each_row_begins_on(write):
    name = write("a.json", '[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert read(name) == [("a.json:2", {"a": 1}), ("a.json:4", {"a": 2}), ("a.json:5", {"a": 3})]


def test_json_object_with_one_list(write):
    name = write("a.json", '{"version": {"rows": 2},\n "rows": [\n{"a": [1]},\n{"a": [2]}], "n": 2}')
    assert read(name) == [("a.json:3", {"a": [1]}), ("a.json:4", {"a": [2]})]


def test_one_row_in_a_json_file_is_a_row(write):
    """Whatever lists of its own it has: messages, tools, texts."""
    said = [{"role": "user", "content": "q"}]
    for row in ({"a": 1}, {"messages": said}, {"messages": said, "tools": [{"name": "f"}]}, {"a": ["x"], "b": "y"}):
        assert read(write("a.json", json.dumps(row, indent=1))) == [("a.json:1", row)]


def test_json_lines_named_json_and_an_array_named_jsonl(write):
    assert read(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]
    assert read(write("a.jsonl", '\n[{"a": 1},\n{"a": 2}]')) == [("a.jsonl:2", {"a": 1}), ("a.jsonl:3", {"a": 2})]


def test_csv_with_quotes_line_ends_in_a_cell_and_a_blank_line(write):
    name = write("a.csv", '\ufeffq,a\n"one, ""two""","x\ny"\n\nthree,\n')
    assert read(name) == [("a.csv:2", {"q": 'one, "two"', "a": "x\ny"}), ("a.csv:5", {"q": "three", "a": ""})]
    assert all(record.text_only for record in read_source(name, 0))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize(("suffix", "text"), [(".jsonl", '{"a": "\u00e9"}\n{"a": 2}\n'), (".csv", "a\n\u00e9\n2\n")])
def test_packed_text_is_the_text(write, packed, suffix, text):
    name = f"rows{suffix}{packed}"
    if packed == ".gz":
        write(name, gzip.compress(text.encode()))
    else:
        write(name, "")
        with pyarrow.CompressedOutputStream(name, "zstd") as stream:
            stream.write(text.encode())
    plain = read(write(f"rows{suffix}", text))
    assert [row for _, row in read(name)] == [row for _, row in plain]
    assert [where for where, _ in read(name)] == [f"{name}:{where.rpartition(':')[2]}" for where, _ in plain]


def test_a_packed_file_that_was_cut_off(write):
    whole = gzip.compress(b'{"a": 1}\n' * 100)
    with pytest.raises(RowError, match=r"^a.jsonl.gz: expected a whole .gz file, got an error: .*; pack it again$"):
        read(write("a.jsonl.gz", whole[:-10]))
    with pytest.raises(RowError, match=r"^b.jsonl.zst: expected a whole .zst file"):
        read(write("b.jsonl.zst", b"not packed"))


def test_what_can_be_read_behind_a_bad_line_is_read(write):
    """Bad JSON, bad UTF-8, no object, and a cell too many: each an error in its place."""
    name = write("a.jsonl", b'{"a": 1}\n{"a": }\n{"a": "\xff"}\n3\n{"a": 5}\n')
    items = list(read_source(name, 0))
    assert [type(item).__name__ for item in items] == ["Record", "RowError", "RowError", "RowError", "Record"]
    assert [str(item).partition(": expected")[0] for item in items[1:4]] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    name = write("a.csv", "a,b\n1,2\n3\n4,5\n")
    assert [type(item).__name__ for item in read_source(name, 0)] == ["Record", "RowError", "Record"]


def test_a_line_of_many_megabytes_is_no_row(write, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 20)
    name = write("a.jsonl", '{"a": "' + "x" * 30 + '"}\n{"a": 1}\n')
    first, second = read_source(name, 0)
    assert str(first).startswith("a.jsonl:1: expected a line of at most 20 bytes, got a longer one that begins with b")
    assert second.values == {"a": 1}


BAD_FILES = {
    "empty file": ("a.jsonl", "", "a.jsonl: expected at least one row, got an empty file"),
    "blank json": ("a.json", " \n", "a.json: expected at least one row"),
    "csv without rows": ("a.csv", "a,b\n", "a.csv: expected at least one row"),
    "not json": ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl:2: expected JSON, got .* at character 7.*one complete"),
    "cut off": ("a.jsonl", '{"a": 1}\n{"a": "b', "a.jsonl:2: expected JSON.*this last line looks cut off"),
    "two on a line": ("a.jsonl", '{"a": 1} {"a": 2}\n', "a.jsonl:1: expected one JSON object on a line, got more"),
    "not an object": ("a.jsonl", '{"a": 1}\n3\n', "a.jsonl:2: expected a row as a JSON object, got int 3"),
    "bad utf-8": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: expected UTF-8, got byte 0xff at position 8"),
    "duplicate key": ("a.jsonl", '{"a": 1, "b": 2, "a": 3}\n', "a.jsonl:1: expected each key once, got 'a' twice"),
    "nan": ("a.jsonl", '{"a": NaN}\n', "a.jsonl:1: expected a JSON number, got NaN"),
    "scalar json": ("a.json", "3", "a.json:1: expected an array of rows, got '3'"),
    "two lists": ("a.json", '{"a": [], "b": []}', r"whose lists are \['a', 'b'\]; write an array"),
    "two lists of rows": ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', r"lists are \['train', 'test'\]"),
    "columns": (
        "a.json",
        '{"a": [1, 2], "b": [3, 4]}',
        r"a.json:1: expected an array of rows, got columns, \['a', 'b'",
    ),
    "columns of pandas": ("a.json", '{"a": {"0": 1}, "b": {"0": 3}}', 'pandas: to_json with orient="records"'),
    "rows as lists": (
        "a.jsonl",
        '["q", "c"]\n["p", "d"]\n',
        r"a.jsonl:1: expected a row as a JSON object, got list \[",
    ),
    "printed by Python": (
        "a.jsonl",
        "{'a': True}\n",
        r"a.jsonl:1: expected JSON, .*; Python wrote this: let json.dumps",
    ),
    "a word of Python": ("a.json", '[{"a": None}]', r"a.json:1: .*Python wrote this"),
    "csv quote left open": ("a.csv", 'a,b\n"1,2\n3,4\n', r"a.csv:2: .*the quote that opens a cell .* is never closed"),
    "csv blanks": ("a.csv", "a, b\n1, 2\n", r"a.csv:1: expected names of columns without a blank .*, got \[' b'\]"),
    "array cut off": ("a.json", '[{"a": 1},\n{"a": 2}\n', "a.json:2: expected ',' or ']' after this row, got the end"),
    "array broken": ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json:1: expected ',' or ']' after this row, got '{"),
    "row broken": ("a.json", '[{"a": 1},\n{"a":\n,}]', "a.json:3: expected JSON.*the array must be complete"),
    "after the array": ("a.json", '[{"a": 1}] [', r"a.json: expected nothing after the array, got '\['"),
    "csv cells": ("a.csv", "a,b\n1,2\n3\n", r"a.csv:3: expected 2 cells \(a, b\), got 1: \['3'\]; quote cells"),
    "csv header": ("a.csv", "a,a\n1,2\n", "a.csv:1: expected each column name once"),
    "csv quotes": ("a.csv", 'a\n"b" c\n', "a.csv:2: expected CSV, got an error"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(write, case):
    name, content, message = BAD_FILES[case]
    with pytest.raises(RowError, match=message):
        read(write(name, content))


def test_long_cells_and_tabs(write):
    """A CSV cell may be a long document: the module csv stops at 131,072 characters by itself."""
    cell = "x" * 200_000
    write("long.csv", f"prompt,completion\n{cell},b\n")
    write("rows.tsv", "prompt\tcompletion\nq, r\tc\n")
    assert [item.values for item in read_source("long.csv", 0)] == [{"prompt": cell, "completion": "b"}]
    assert [item.values for item in read_source("rows.tsv", 0)] == [{"prompt": "q, r", "completion": "c"}]
    write("semicolons.csv", "prompt;completion\nq;c\n")
    with pytest.raises(RowError, match=r"semicolons.csv:1: expected ',' between the names of the columns, got ';'"):
        list(read_source("semicolons.csv", 0))


def test_a_compressed_line_is_bounded_before_it_is_read(write, tmp_path, monkeypatch):
    """1 MB of a line of zeros packs to 1 kB. At most MAX_ROW_BYTES + 1 are asked for at a time."""
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1000)
    write("a.jsonl.gz", gzip.compress(b"0" * 1_000_000 + b'\n{"a": 1}\n'))
    asked, opened = [], text_files.opened

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def readline(self, size):
            asked.append(size)
            return self.file.readline(size)

    monkeypatch.setattr(text_files, "opened", lambda path: Counted(opened(path)))
    first, second = read_source("a.jsonl.gz", 0)
    assert "at most 1000 bytes, got a longer one" in str(first) and second.values == {"a": 1}
    assert set(asked) == {1001}
    monkeypatch.setattr(text_files, "MAX_UNPACKED_BYTES", 10)
    write("b.json.gz", gzip.compress(b'[\n{"a": 1}\n]'))
    with pytest.raises(RowError, match=r"b.json.gz: expected at most 10 bytes once it is unpacked"):
        list(read_source("b.json.gz", 0))


@pytest.mark.parametrize("depth", [101, 900, 200_000])
def test_nested_brackets_do_not_overflow_the_stack(write, depth):
    nested = f'{{"a": {"[" * depth}{"]" * depth}}}'
    write("a.jsonl", f'{nested}\n{{"a": {"[" * 90}{"]" * 90}}}\n')
    first, second = read_source("a.jsonl", 0)
    assert "a.jsonl:1: expected lists and objects at most 100 deep" in str(first) and "a" in second.values
    write("a.json", f"[{nested}]")
    with pytest.raises(RowError, match=r"a.json:1: expected lists and objects at most 100 deep"):
        list(read_source("a.json", 0))


def test_a_comma_behind_the_last_row(write):
    write("a.json", '[{"a": 1},]')
    with pytest.raises(RowError, match=r"a.json:1: expected a row behind the ',' after this row, got '\]'"):
        list(read_source("a.json", 0))
