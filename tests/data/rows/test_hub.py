"""Hub data sets, for which local folders stand: mapped, streamed, their versions and their failures."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from row_files import parquet, read, register

from dsalign.data.rows import hub
from dsalign.data.rows.readers import version
from dsalign.data.rows.records import RowError


def test_a_version_of_a_hub_data_set_changes_with_it(write, read_hub):
    write("repo/data/train.jsonl", [{"a": 1}])
    first, rows = hub.version("repo")
    assert rows is None and read_hub("repo") == [("repo:row 1", {"a": 1})]
    assert hub.version("repo") == (first, 1)  # known once it was prepared
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 22}])
    assert hub.version("repo")[0] != first


def test_hub_reads_the_train_split(write, read_hub):
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 2}])
    write("repo/data/test.jsonl", [{"a": 3}])
    assert read_hub("repo") == [("repo:row 1", {"a": 1}), ("repo:row 2", {"a": 2})]
    write("parquets/README.md", "")
    parquet("parquets/train-0.parquet", [{"a": "x"}])
    assert read_hub("parquets") == [("parquets:row 1", {"a": "x"})]


def test_a_stream_has_the_rows_of_the_split(write, read_hub, monkeypatch):
    """Nothing is kept: the folder of prepared sets stays as it is."""
    write("repo/data/train.jsonl", [{"a": 1}, {"a": 2}])
    write("repo/data/test.jsonl", [{"a": 3}])
    assert read_hub("repo", streaming=True) == [("repo:row 1", {"a": 1}), ("repo:row 2", {"a": 2})]
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    write("hh/harmless_base_cn_train.jsonl", [{"question": "a"}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    with pytest.raises(RowError, match=r"cn:row 1: expected the columns of .*KeyError"):
        read_hub("hh-rlhf-cn-harmless-base-cn", streaming=True)


def test_a_stream_that_breaks_off_names_the_row(monkeypatch):
    def rows():
        yield {"a": 1}
        raise ConnectionError("reset")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    found = hub.read_hub("a/b", streaming=True)
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
