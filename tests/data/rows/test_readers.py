"""?"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsalign.data.rows import hub as hub_module
from dsalign.data.rows import text_files
from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.readers import read_source, version
from dsalign.data.rows.records import RowError, rename, shorten
from dsalign.data.rows.registry import REGISTERED, transcript


def raised(items):
    for item in items:
        if isinstance(item, RowError):
            raise item
        yield item.where, dict(item.values)


def read(source, seed=42):
    return list(raised(read_source(source, seed)))


def parquet(name, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)


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


def test_a_pattern_reads_what_it_matches_in_order(write):
    write("d/b.jsonl", [{"a": 2}])
    write("d/a.jsonl", [{"a": 1}])
    write("d/e/c.jsonl", [{"a": 3}])
    write("d/notes.txt", "no rows")
    assert read("d/*.jsonl") == [("d/a.jsonl:1", {"a": 1}), ("d/b.jsonl:1", {"a": 2})]
    assert [row["a"] for _, row in read("d/**/*")] == [1, 2, 3]
    assert [row["a"] for _, row in read("d/[b]*#1")] == [2]
    with pytest.raises(ValueError, match=r"^data set 'd/x\*': expected a pattern that .*put it into quotes$"):
        read("d/x*")


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
    assert str(first).startswith('a.jsonl:1: expected a line of at most 20 bytes, got 40, beginning with b\'{"a": "xxx')
    assert second.values == {"a": 1}


@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".jsonl.zst"]))
def test_any_bytes_are_rows_or_errors_that_name_the_file(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"x{suffix}"
    path.write_bytes(content)
    try:
        for item in read_source(str(path), 0):
            assert str(path) in (str(item) if isinstance(item, RowError) else item.where)
    except ValueError as error:
        assert str(path) in str(error)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.lists(st.fixed_dictionaries({"prompt": TEXT, "answer": TEXT}), min_size=1, max_size=5))
def test_what_is_written_is_read_in_every_format(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.json").write_text(json.dumps(rows))
    with (folder / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    parquet(folder / "e.parquet", rows)
    for path in sorted(folder.iterdir()):
        assert [row for _, row in read(str(path))] == rows, path.name


def test_a_version_is_that_of_names_and_bytes(write):
    name = write("d/a.jsonl", [{"a": 1}, {"a": 2}])
    first = version(name)
    write("d/a.jsonl", [{"a": 1}, {"a": 2}])
    assert version(name) == first and first[1] == 2
    others = [version(source) for source in ("d", f"{name}#1", "d/*.jsonl", "./d/a.jsonl")]
    write("d/b.csv", "a\n1\n")
    others += [version("d")]
    write("d/a.jsonl", [{"a": 1}, {"a": 3}])
    others += [version(name), version("d")]
    assert len({first, *others}) == 8


def test_how_many_rows_there_are_about_is_known_without_parsing(write):
    parquet(write("a.parquet", ""), [{"a": 1}] * 5)
    write("b.csv", "a\n1\n2\n")
    write("c.json", "[]")
    assert [version(name)[1] for name in ("a.parquet", "b.csv", "c.json", "a.parquet#2")] == [5, 3, None, 2]
    assert version(write("d.parquet", "no parquet"))[1] is None


def test_a_version_of_a_hub_data_set_changes_with_it(write, hub):
    write("repo/data/train.jsonl", [{"a": 1}])
    first, rows = hub_module.version("repo")
    assert rows is None and hub("repo") == [("repo:row 1", {"a": 1})]
    assert hub_module.version("repo") == (first, 1)  # known once it was prepared
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 22}])
    assert hub_module.version("repo")[0] != first


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Local folders stand for hub repositories: the code path of the library is the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lambda name, **how: list(raised(hub_module.records(name, **how)))


def register(monkeypatch, short, folder):
    """The registered data set, with a local folder in the place of its hub repository."""
    known = REGISTERED[short]
    moved = dataclasses.replace(known, hub_name=folder)
    monkeypatch.setattr(hub_module, "REGISTERED", {**REGISTERED, short: moved})


def test_hub_reads_the_train_split(write, hub):
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 2}])
    write("repo/data/test.jsonl", [{"a": 3}])
    assert hub("repo") == [("repo:row 1", {"a": 1}), ("repo:row 2", {"a": 2})]
    write("parquets/README.md", "")
    parquet("parquets/train-0.parquet", [{"a": "x"}])
    assert hub("parquets") == [("parquets:row 1", {"a": "x"})]


def test_a_stream_has_the_rows_of_the_split(write, hub, monkeypatch):
    """Nothing is kept: the folder of prepared sets stays as it is."""
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 2}])
    write("repo/data/test.jsonl", [{"a": 3}])
    assert hub("repo", streaming=True) == [("repo:row 1", {"a": 1}), ("repo:row 2", {"a": 2})]
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    write("hh/harmless_base_cn_train.jsonl", [{"question": "a"}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    with pytest.raises(RowError, match=r"cn:row 1: expected the columns of .*KeyError"):
        hub("hh-rlhf-cn-harmless-base-cn", streaming=True)


def test_a_stream_cannot_be_sampled(write):
    with pytest.raises(ValueError, match=r"^data set 'a/b#5': cannot sample rows of a stream; leave out #5 or --strea"):
        list(read_source("a/b#5", 0, streaming=True))
    name = write("a.jsonl", [{"a": 1}, {"a": 2}])
    assert len(list(read_source(f"{name}#1", 0, streaming=True))) == 1  # a file is no stream


def test_a_stream_that_breaks_off_names_the_row(monkeypatch):
    def rows():
        yield {"a": 1}
        raise ConnectionError("reset")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    found = hub_module.records("a/b", streaming=True)
    assert next(found).where == "a/b:row 1"
    with pytest.raises(ValueError, match=r"^data set 'a/b': expected a row after row 1, got ConnectionError: 'reset'"):
        next(found)


def test_hub_failure_names_the_cause_and_the_short_names(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(
        ValueError, match=r"data set 'ultrafeedback-kt'.*gave ConnectionError: 'no route'; did you mean"
    ):
        read("ultrafeedback-kt")
    for find in (read, version):
        with pytest.raises(ValueError, match=r"one of .*ultrafeedback-kto, .*; loading 'a/b' .*check the name and"):
            find("a/b")
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


TRANSCRIPT = "\n\nHuman: Hi\n\nthere?\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"


def test_a_transcript_by_hand():
    """A blank line inside a turn stays; an answer may be empty; what does not begin like one is none."""
    assert [(m["role"], m["content"]) for m in transcript(TRANSCRIPT)] == [
        ("user", "Hi\n\nthere?"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", ""),
    ]
    with pytest.raises(ValueError, match=r"^a transcript begins with a blank line and 'Human:', not with 'Hello'$"):
        transcript("Hello")


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OTHER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
SCHEMAS = {  # short name -> (kind, a row as the hub has it, prompt and completions)
    "hh-rlhf": (
        "pairs",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        ("a", "b", "c"),
    ),
    "ultrafeedback-kto": ("labels", {"prompt": "a", "completion": "b", "label": True}, ("a", "b")),
    "kto-mix-14k": ("labels", {"prompt": CHAT[:1], "completion": CHAT[1:], "label": False}, ("a", "b")),
    "orpo-dpo-mix-40k": (
        "pairs",
        {"source": "s", "chosen": CHAT, "rejected": OTHER, "prompt": "a", "question": "a"},
        ("a", "b", "c"),
    ),
    "ultrafeedback-binarized": (
        "pairs",
        {"prompt": "a", "prompt_id": "1", "chosen": CHAT, "rejected": OTHER, "messages": CHAT, "score_chosen": 1.0},
        ("a", "b", "c"),
    ),
    "orca-dpo-pairs": ("pairs", {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
    "distilabel-orca-dpo-pairs": (
        "pairs",
        {"system": "s", "input": "a", "chosen": "b", "rejected": "c", "generations": ["b", "c"], "status": "tie"},
        ("a", "b", "c"),
    ),
    "ultrachat-200k": ("demonstrations", {"prompt": "a", "prompt_id": "1", "messages": CHAT}, ("a", "b")),
    "no-robots": ("demonstrations", {"prompt": "a", "messages": CHAT, "category": "x"}, ("a", "b")),
    "alpaca": ("demonstrations", {"instruction": "a", "input": "", "output": "b", "text": "a b"}, ("a", "b")),
}


@pytest.mark.parametrize("short", SCHEMAS)
def test_registered_schemas_become_rows(short, write, hub, monkeypatch):
    """A local folder of the same schema in the place of the hub's: prompt and completions as they should be."""
    kind, row, (prompt, *completions) = SCHEMAS[short]
    write(f"there/data/{REGISTERED[short].split}.jsonl", [row])
    register(monkeypatch, short, "there")
    if REGISTERED[short].split != "train":
        split = {REGISTERED[short].split: f"data/{REGISTERED[short].split}.jsonl"}
        load = datasets.load_dataset
        monkeypatch.setattr("datasets.load_dataset", lambda name, **how: load(name, **{**how, "data_files": split}))
    (found,) = iter_rows([short], kind)
    assert found.prompt[-1]["content"] == prompt and list(found.completions) == completions
    if "system" in row:
        assert found.prompt[0] == {"role": "system", "content": "s"}


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
