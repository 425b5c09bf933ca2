from __future__ import annotations

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dsalign.data import readers
from dsalign.data.readers import REGISTERED, RowError, read_source, rename, shorten


def read(source, seed=42):
    return [(record.where, dict(record.values)) for record in read_source(source, seed)]


def parquet(name, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)


# --- what is read -------------------------------------------------------------------------------------------------


def test_json_lines_with_blank_lines_bom_crlf_and_no_last_line_end(write):
    name = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9"}')
    assert read(name) == [("a.jsonl:1", {"a": 1}), ("a.jsonl:4", {"a": "é"})]


def test_json_array_names_the_line_each_row_begins_on(write):
    name = write("a.json", '[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert read(name) == [("a.json:2", {"a": 1}), ("a.json:4", {"a": 2}), ("a.json:5", {"a": 3})]


def test_json_object_with_one_list(write):
    name = write("a.json", '{"version": {"rows": 2},\n "rows": [\n{"a": [1]},\n{"a": [2]}], "n": 2}')
    assert read(name) == [("a.json:3", {"a": [1]}), ("a.json:4", {"a": [2]})]


def test_json_lines_named_json_and_an_array_named_jsonl(write):
    assert read(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]
    assert read(write("a.jsonl", '\n[{"a": 1},\n{"a": 2}]')) == [("a.jsonl:2", {"a": 1}), ("a.jsonl:3", {"a": 2})]


def test_csv_with_quotes_line_ends_in_a_cell_and_a_blank_line(write):
    name = write("a.csv", '\ufeffq,a\n"one, ""two""","x\ny"\n\nthree,\n')
    assert read(name) == [("a.csv:2", {"q": 'one, "two"', "a": "x\ny"}), ("a.csv:5", {"q": "three", "a": ""})]
    assert all(record.text_only for record in read_source(name, 0))


def test_parquet_counts_rows_from_one(write):
    parquet(
        write("a.parquet", ""), [{"m": [{"role": "user", "content": "hi"}], "label": True}, {"m": None, "label": False}]
    )
    assert read("a.parquet") == [
        ("a.parquet:row 1", {"m": [{"role": "user", "content": "hi"}], "label": True}),
        ("a.parquet:row 2", {"m": None, "label": False}),
    ]


def test_folder_reads_its_data_files_in_order_of_names(write):
    write("d/b.jsonl", [{"a": 2}])
    write("d/a.csv", "a\n1\n")
    for other in ("d/README.md", "d/.hidden.jsonl", "d/_notes.json", "d/deeper/c.jsonl"):
        write(other, "no rows")
    assert read("d") == [("d/a.csv:2", {"a": "1"}), ("d/b.jsonl:1", {"a": 2})]


def test_sample_is_fixed_by_the_seed_and_keeps_the_order(write):
    name = write("a.jsonl", [{"a": i} for i in range(100)])
    sample = read(f"{name}#10", seed=7)
    values = [row["a"] for _, row in sample]
    assert sample == read(f"{name}#10", seed=7) != read(f"{name}#10", seed=8)
    assert len(set(values)) == 10 and values == sorted(values)
    assert sample[0][0] == f"a.jsonl:{values[0] + 1}"
    assert read(f"{name}#100") == read(name)


def test_a_file_may_have_a_hash_in_its_name(write):
    assert read(write("rows#2.jsonl", [{"a": 1}])) == [("rows#2.jsonl:1", {"a": 1})]
    write("folder#1/a.jsonl", [{"a": 1}, {"a": 2}])
    assert len(read("folder#1")) == 2


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Local folders stand for hub repositories: the code path of the library is the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lambda name: [(record.where, dict(record.values)) for record in readers._hub(name)]


def register(monkeypatch, short, folder):
    """The registered data set, with a local folder in the place of its hub repository."""
    known = REGISTERED[short]
    moved = readers.Registered(folder, known.files, known.columns, known.convert)
    monkeypatch.setattr(readers, "REGISTERED", {**REGISTERED, short: moved})


def test_hub_reads_the_train_split(write, hub):
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 2}])
    write("repo/data/test.jsonl", [{"a": 3}])
    assert hub("repo") == [("repo:row 1", {"a": 1}), ("repo:row 2", {"a": 2})]
    write("parquets/README.md", "")
    parquet("parquets/train-0.parquet", [{"a": "x"}])
    assert hub("parquets") == [("parquets:row 1", {"a": "x"})]


def test_hub_failure_names_the_cause_and_the_short_names(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(readers, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"data set 'ultrafeedback-kt'.*gave ConnectionError: 'no route'; did you mean"
    ):
        read("ultrafeedback-kt")
    with pytest.raises(ValueError, match=r"one of .*ultrafeedback-kto; loading 'a/b' .*check the name and the network"):
        read("a/b")
    with pytest.raises(ValueError, match=r"loading 'dikw/hh_rlhf_cn' .*check the name and the network"):
        read("hh-rlhf-cn-harmless-base-cn")


def test_registered_emoji_pairs(write, hub, monkeypatch):
    row = {"question": "q", "answer_zh": "zh", "answer_en": "en"}
    for file in REGISTERED["shareai-llama3-dpo-zh-en-emoji"].files:
        write(f"emoji/{file}", [row])
    write("emoji/merged.jsonl", [{"other": "format"}])
    register(monkeypatch, "shareai-llama3-dpo-zh-en-emoji", "emoji")
    found = read("shareai-llama3-dpo-zh-en-emoji")
    expected = {"query": "q", "response": "zh", "rejected_response": "en"}
    assert found == [(f"shareai-llama3-dpo-zh-en-emoji:row {i}", expected) for i in (1, 2, 3, 4)]


def test_registered_hh_rlhf_cn(write, hub, monkeypatch):
    context = [{"role": "human", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "human", "text": "c"}]
    answers = {"chosen": {"role": "assistant", "text": "d"}, "rejected": {"role": "assistant", "text": "e"}}
    write("hh/harmless_base_cn_train.jsonl", [{"context": context, **answers}])
    write("hh/helpful_base_cn_train.jsonl", [{"context": [], **answers}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    ((_, row),) = read("hh-rlhf-cn-harmless-base-cn")
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert row["chosen"] == [{"role": "assistant", "content": "d"}]
    assert row["rejected"] == [{"role": "assistant", "content": "e"}]


def test_registered_data_set_that_has_changed(write, hub, monkeypatch):
    write("hh/harmless_base_cn_train.jsonl", [{"question": "a"}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    with pytest.raises(RowError, match=r"cn:row 1: expected the columns of .*KeyError.*the hub data set has changed"):
        read("hh-rlhf-cn-harmless-base-cn")


# --- what is refused ----------------------------------------------------------------------------------------------

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
    "no list": ("a.json", '{"a": 1}', r"a.json:1: expected an array .* whose lists are \[\]"),
    "two lists": ("a.json", '{"a": [], "b": []}', r"whose lists are \['a', 'b'\]; write an array"),
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


def test_bad_parquet(write):
    with pytest.raises(ValueError, match=r"data file 'a[.]parquet': expected Parquet, got an error"):
        read(write("a.parquet", "not parquet"))


def test_bad_sources(write):
    write("rows.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match=r"'row.jsonl': expected a file or a folder.*did you mean 'rows.jsonl'\?"):
        read("row.jsonl")
    with pytest.raises(ValueError, match="expected a file or a folder, got nothing at this path; check the path"):
        read("./nowhere/at/all")
    with pytest.raises(ValueError, match=r"data file 'rows.txt': expected a name that ends in .jsonl.*got '.txt'"):
        read(write("rows.txt", "a"))
    write("bare/notes.txt", "a")
    with pytest.raises(ValueError, match=r"data folder 'bare': expected files that end in .*got \['notes.txt'\]"):
        read("bare")


@pytest.mark.parametrize("count", [0, 2])
def test_sample_larger_than_the_data_set(write, count):
    name = write("a.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match=f"cannot sample {count} rows of 1; write #n with n from 1 to 1"):
        read(f"{name}#{count}")


def test_rename_may_swap_but_not_collide():
    assert rename("f:1", {"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    with pytest.raises(RowError, match=r"f:1: two columns are called 'b' after renaming.*rename the other 'b' too"):
        rename("f:1", {"a": 1, "b": 2}, {"a": "b"})


def test_a_message_repeats_at_most_200_characters():
    assert shorten("x") == "'x'"
    assert len(shorten("x" * 1000)) == 200
