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
