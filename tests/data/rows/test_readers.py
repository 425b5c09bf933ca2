"""Sources: files, folders, patterns, samples and Parquet; their versions, and sources that are none."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import parquet, read

from dsalign.data.rows.readers import read_source, version
from dsalign.data.rows.records import RowError


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


def test_a_stream_cannot_be_sampled(write):
    with pytest.raises(ValueError, match=r"^data set 'a/b#5': cannot sample rows of a stream; leave out #5 or --strea"):
        list(read_source("a/b#5", 0, streaming=True))
    name = write("a.jsonl", [{"a": 1}, {"a": 2}])
    assert len(list(read_source(f"{name}#1", 0, streaming=True))) == 1  # a file is no stream


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


@pytest.mark.parametrize("made", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_both_kinds_of_arrow_files_are_read(tmp_path, monkeypatch, made):
    """A stream, as the library datasets writes it, and the format with an index, which is Feather's."""
    monkeypatch.chdir(tmp_path)
    rows = pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": "b"}])
    with made("a.arrow", rows.schema) as file:
        file.write_table(rows, max_chunksize=1)
    assert [values for _, values in read("a.arrow")] == [{"prompt": "a"}, {"prompt": "b"}]


def test_nulls_that_arrow_fills_in_are_left_out(write):
    """The same rows as JSON lines and as Parquet, in which each tool has the other's parameters as null."""
    rows = [{"tools": [{"properties": {name: {"type": "string"}}}], "more": None, "prompt": name} for name in "ab"]
    write("a.jsonl", rows)
    parquet("a.parquet", rows)
    assert [values for _, values in read("a.parquet")] == [values for _, values in read("a.jsonl")]
