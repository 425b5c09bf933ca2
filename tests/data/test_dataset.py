"""From a configuration to groups: kept on disk from some size on, found again, and made again where they must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from support import tiny_folder

from dsalign.config.parse import parse
from dsalign.data import dataset
from dsalign.data.rows import readers
from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.records import Row
from dsalign.data.tokens.group_store import GroupStore
from dsalign.models.names import resolve
from dsalign.models.tokenizer import template_of

ROWS = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no" * (i % 3)} for i in range(8)]


class Case:
    """A small data set, with every set of four rows or more kept on disk."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.kept = folder / "rows.jsonl", folder / "cache"
        self.model = tiny_folder(folder / "model")
        self.write(ROWS)

    def write(self, rows: list[dict[str, str]]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(self, *words: str, template: str = "chatml") -> tuple[dataset.Tokenized, dataset.Skipped]:
        argv = ["--algo", "dpo", "--model", str(self.model), "--dataset", str(self.rows), "--template", template]
        config = parse([*argv, *words], world_size=1).config
        loaded = template_of(config, resolve(config.models.model))
        return dataset.tokenized(config, loaded, config.data.dataset)

    def stores(self) -> set[str]:
        return {p.name for p in (self.kept / "data").glob("*") if not p.name.startswith(".")}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(dataset, "STORE_FROM", 4)
    monkeypatch.setenv("DSALIGN_CACHE", str(tmp_path / "cache"))
    return Case(tmp_path)


def test_what_is_kept_is_what_is_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same groups and counts from memory, when they are written, and when they are found."""
    written, _ = case.read("--max_length", "64")
    assert isinstance(written.groups, GroupStore) and len(case.stores()) == 1
    monkeypatch.setattr(dataset, "tokenised_chunks", None)  # found: nothing is tokenised
    found, _ = case.read("--max_length", "64")
    assert isinstance(found.groups, GroupStore) and len(case.stores()) == 1
    monkeypatch.setattr(dataset, "STORE_FROM", 100)
    memory, _ = case.read("--max_length", "64")
    assert isinstance(memory.groups, tuple)
    assert list(memory.groups) == list(written.groups) == list(found.groups)
    assert (memory.num_rows, memory.truncated) == (written.num_rows, written.truncated) == (8, 0)


@pytest.mark.parametrize("words", [["--max_length", "63"], ["--truncation_strategy", "left"], ["--system", "s"]])
def test_whatever_makes_other_tokens_is_a_miss(words: list[str], case: Case) -> None:
    case.read()
    case.read(*words)
    assert len(case.stores()) == 2
    case.read(template="zephyr")
    assert len(case.stores()) == 3


def test_a_changed_row_is_a_miss_and_the_same_rows_are_found(case: Case) -> None:
    case.read()
    case.write([*ROWS[:-1], {**ROWS[-1], "chosen": "yes!"}])
    changed, _ = case.read()
    assert len(case.stores()) == 2
    assert changed.groups[7].lengths[0] == len("yes!") + 1
    case.write(ROWS)
    case.read()
    assert len(case.stores()) == 2


def test_rows_are_read_once_when_they_are_kept_and_the_first_when_they_are_found(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def counted(*args: Any, **how: Any) -> Iterator[Row]:
        for row in iter_rows(*args, **how):
            taken.append(row.where)
            yield row

    monkeypatch.setattr(dataset, "iter_rows", counted)
    case.read()
    assert len(taken) == 8
    case.read()
    assert len(taken) == 8 + 4


def test_other_code_is_a_miss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter or template that was corrected makes other tokens of the same files."""
    case.read()
    monkeypatch.setattr(dataset.data, "__file__", str(case.rows))
    case.read()
    assert len(case.stores()) == 2


def test_a_hub_data_set_is_found_again_and_streamed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the hub's: its rows are the file's, streamed or not."""
    rows = list(case.read()[0].groups)
    monkeypatch.chdir(case.rows.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(case.kept / "datasets"))
    (case.rows.parent / "repo").mkdir()
    case.rows.rename(case.rows.parent / "repo" / "train.jsonl")
    monkeypatch.setattr(readers, "_local", lambda name: None)
    case.rows = Path("repo")
    for words in (["--streaming", "true"], []):
        found, _ = case.read(*words)
        assert [replace(group, where="") for group in found.groups] == [replace(group, where="") for group in rows]
        assert [group.where for group in found.groups[:2]] == ["repo:row 1", "repo:row 2"]
        assert len(case.stores()) == 2


def test_a_broken_store_is_made_again_and_said(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    before = list(case.read()[0].groups)
    (name,) = case.stores()
    (case.kept / "data" / name / "ids.bin").write_bytes(b"")
    assert list(case.read()[0].groups) == before
    assert [r.message.partition(":")[0] for r in caplog.records] == ["prepared rows are made again"]


def test_bad_rows_are_counted_also_where_the_rest_is_found(case: Case) -> None:
    case.rows.write_text(case.rows.read_text() + "broken\n")
    for _ in range(2):
        tokenized, skipped = case.read("--on_bad_row", "skip")
        assert (len(tokenized.groups), skipped.count) == (8, 1)
        assert dataset.what_was_lost(tokenized, skipped)[0].startswith("1 bad rows left out, the first: ")


def test_what_was_lost_is_said_by_rule(case: Case) -> None:
    """A prompt has 1 + 4 + 1 + 10 + 1 + 1 + 1 + 9 + 1 = 29 tokens, its answer yes 4, no 3 and nono 5: with at most 33
    the two rows with nono are dropped."""
    tokenized, skipped = case.read("--max_length", "33")
    assert tokenized.dropped == {"longer than max_length": 2}
    assert dataset.what_was_lost(tokenized, skipped) == ["of 8 rows 2 dropped (longer than max_length)"]
    assert dataset.what_was_lost(*case.read("--max_length", "34")) == []


def test_progress_is_said(case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dataset, "SAID_EVERY_S", 0.0)
    with caplog.at_level("INFO", logger="dsalign"):
        case.read()
    assert caplog.records[-1].message.startswith("tokenised 8 of about 8 rows, ")
