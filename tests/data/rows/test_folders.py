"""Folders: what save_to_disk writes, clones with their splits, notes that are no rows."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
from row_files import parquet, read

ROWS = [{"prompt": f"q{i}", "chosen": "c", "rejected": "r"} for i in range(3)]


def test_a_folder_of_save_to_disk(tmp_path, monkeypatch, caplog):
    """One set, and several splits of which train is read and the other named."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk("saved")
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk("splits")
    assert [values for _, values in read("saved")] == ROWS
    with caplog.at_level(logging.WARNING):
        assert [values for _, values in read("splits")] == ROWS
    assert "splits: read split train; not read: test" in caplog.text
    assert [values for _, values in read("splits/test")] == ROWS[:1]
    with pytest.raises(ValueError, match=r"saved/state.json': expected rows, got notes about them"):
        read("saved/state.json")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(ValueError, match=r"data folder 'saved': expected the files that its state.json names"):
        read("saved")


def test_a_clone_of_a_hub_data_set(write, tmp_path, caplog):
    """Rows lie in data/; the file of another split is left out and named."""
    write("clone/README.md", "# Rows")
    (tmp_path / "clone/data").mkdir()
    for split in ("train", "test"):
        parquet(tmp_path / f"clone/data/{split}-00000-of-00001.parquet", [{"prompt": split}])
    with caplog.at_level(logging.WARNING):
        assert [values for _, values in read("clone")] == [{"prompt": "train"}]
    assert "not read, as their names say" in caplog.text and "clone/data/test-00000-of-00001.parquet" in caplog.text


def test_names_that_only_look_like_a_split_and_notes(write):
    write("d/latest.jsonl", [{"prompt": "a"}])
    write("d/contest.jsonl", [{"prompt": "b"}])
    write("d/dataset_infos.json", json.dumps({"rows": [1]}))
    assert [values for _, values in read("d")] == [{"prompt": "b"}, {"prompt": "a"}]
    write("d/state.json", "{")
    with pytest.raises(ValueError, match=r"data folder .d.: expected JSON in state\.json"):
        read("d")


@pytest.mark.parametrize(
    ("names", "gone"),
    [
        (["train-00001-of-00003", "train-00002-of-00003"], "00000"),
        (["train-00001-of-00002"], "00000"),
        (["a-00000-of-00001", "b-00000-of-00012"], "00001, 00002, 00003, 00004, 00005, 00006, 00007, 00008"),
    ],
)
def test_a_part_that_was_not_copied_is_missed(write, names, gone):
    """Half of the rows would be trained on, and a run would look whole."""
    for name in names:
        write(f"d/{name}.jsonl", [{"prompt": "a"}])
    with pytest.raises(
        ValueError, match=rf"data folder 'd': expected all \d+ parts of .*, got no {gone}; copy them too"
    ):
        read("d")
    assert [values for _, values in read(f"d/{names[0]}.jsonl")] == [{"prompt": "a"}]


def test_all_parts_are_read_counted_from_0_or_1(write):
    for name in ("a-00000-of-00002", "a-00001-of-00002-f3", "b-00001-of-00002", "b-00002-of-00002", "c-00000-of-2"):
        write(f"d/{name}.jsonl", [{"prompt": "a"}])
    assert len(read("d")) == 5


def test_one_name_in_two_formats_is_said(write, caplog):
    """A clone may hold its rows as JSON and as CSV: both are read, in a line."""
    write("d/a.jsonl", [{"prompt": "a"}])
    write("d/a.csv", "prompt\na\n")
    write("d/b.jsonl", [{"prompt": "b"}])
    with caplog.at_level(logging.WARNING):
        assert len(read("d")) == 3
    assert "d: read a.csv, a.jsonl; if they hold the same rows, name one of them" in caplog.text
