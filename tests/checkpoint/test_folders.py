"""A new run never writes over an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.checkpoint.folders import checkpoints, find, move_aside
from dsalign.config.rules import PROGRESS_FILE


def earlier_run(folder: Path) -> Path:
    (folder / "final").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_earlier_runs_are_numbered(tmp_path: Path) -> None:
    """dpo -> dpo.1, and the next one -> dpo.2; everything in them is kept."""
    for number in (1, 2):
        run = earlier_run(tmp_path / "dpo")
        assert move_aside(run, ["hub/name", None]) == tmp_path / f"dpo.{number}"
        assert not run.exists()
        assert (tmp_path / f"dpo.{number}" / "final").is_dir()


def test_a_folder_without_a_run_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert move_aside(tmp_path, []) is None
    assert move_aside(tmp_path / "new", []) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_is_read_from_is_not_moved(tmp_path: Path) -> None:
    run = earlier_run(tmp_path / "sft")
    with pytest.raises(
        ValueError, match=r"sft holds an earlier run that this one reads from \(.*final\); give another"
    ):
        move_aside(run, [str(run / "final")])
    assert run.exists()


def checkpoint(folder: Path, step: int) -> None:
    """A folder that looks like a checkpoint."""
    found = folder / f"checkpoint-{step}"
    found.mkdir(parents=True)
    (found / PROGRESS_FILE).write_text("{}")


def test_find(tmp_path: Path) -> None:
    """latest is the highest number that is whole; a path is itself."""
    for step in (9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # no trainer.json
    checkpoint(tmp_path / "checkpoint-x", 1)
    assert checkpoints(tmp_path) == {9: tmp_path / "checkpoint-9", 10: tmp_path / "checkpoint-10"}
    assert find("latest", tmp_path) == tmp_path / "checkpoint-10"
    assert find(str(tmp_path / "checkpoint-9"), tmp_path) == tmp_path / "checkpoint-9"


def test_find_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: .*/x is no checkpoint folder \(it has no trainer.json\)$"):
        find(str(tmp_path / "x"), tmp_path)
    with pytest.raises(ValueError, match=r"^resume: no checkpoint-N in .*; leave --resume out to start a new run$"):
        find("latest", tmp_path)
