"""A new run never writes over an earlier one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsalign.checkpoint import manifest
from dsalign.checkpoint.manifest import Manifest
from dsalign.checkpoint.run_folders import (
    begun_run,
    find,
    kept,
    last_serial,
    move_aside,
    new_folder,
    newest_first,
    record,
    run_of,
    set_aside,
)
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.config.parse import parse


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


def checkpoint(folder: Path, step: int, serial: int | None) -> Path:
    """A folder that looks like a checkpoint, the `serial`-th of its run, or one without a manifest."""
    found = folder / f"checkpoint-{step}"
    found.mkdir(parents=True)
    (found / PROGRESS_FILE).write_text("{}")
    if serial is not None:
        manifest.write(found, Manifest({}, run="r", serial=serial, step=step))
    return found


def test_the_newest_is_the_one_written_last(tmp_path: Path) -> None:
    """Steps 100, 200, then back to 2: 3 and 4 are newer. The clock has no say. One without a manifest counts as newer
    than those of fewer steps."""
    for step, serial in ((100, 1), (200, 2), (3, 3), (4, 4)):
        checkpoint(tmp_path, step, serial)
    checkpoint(tmp_path, 5, None)
    os.utime(tmp_path / "checkpoint-4", (0, 0))
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-6").touch()
    assert [p.name for p in newest_first(tmp_path)] == [f"checkpoint-{n}" for n in (5, 4, 3, 200, 100)]
    assert last_serial(tmp_path) == 4
    assert find("latest", tmp_path) == newest_first(tmp_path)
    assert find(str(tmp_path / "checkpoint-3"), tmp_path) == [tmp_path / "checkpoint-3"]


def test_what_came_later_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Back from 200 to 2, then to 100, which comes back from aside, while 3 and 4 leave."""
    for step, serial in ((2, 1), (100, 2), (200, 3)):
        checkpoint(tmp_path, step, serial)
    (tmp_path / "final").mkdir()
    manifest.write(tmp_path / "final", Manifest({}, run="r", serial=4, step=201))
    (tmp_path / "metrics.jsonl").write_text('{"step": 200}\n')
    assert set_aside(tmp_path, 2, tmp_path / "checkpoint-2") == tmp_path / "aside-1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside-1", "checkpoint-2", "metrics.jsonl"]
    names = ["checkpoint-100", "checkpoint-200", "final", "metrics.jsonl"]
    assert sorted(p.name for p in (tmp_path / "aside-1").iterdir()) == names
    assert caplog.messages == [
        f"going on from step 2: checkpoint-200, checkpoint-100, final came later, kept in {tmp_path}/aside-1"
    ]
    assert last_serial(tmp_path) == 3
    for step, serial in ((3, 5), (4, 6)):
        checkpoint(tmp_path, step, serial)
    assert set_aside(tmp_path, 4, tmp_path / "checkpoint-4") is None
    set_aside(tmp_path, 100, tmp_path / "aside-1" / "checkpoint-100")
    assert [p.name for p in newest_first(tmp_path)] == ["checkpoint-100", "checkpoint-2"]
    assert sorted(p.name for p in tmp_path.glob("aside-*/checkpoint-*")) == [f"checkpoint-{n}" for n in (200, 3, 4)]


def test_a_run_has_one_identity(tmp_path: Path) -> None:
    assert run_of(tmp_path) is None
    identity = begun_run(tmp_path)
    assert begun_run(tmp_path) == identity == run_of(tmp_path) != begun_run(tmp_path / "other")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"^output_dir: .*/run.json cannot be read .*: remove it, and resume with --tr"
    ):
        run_of(tmp_path)


def test_find_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: .*/x is no checkpoint folder \(it has no trainer.json\)$"):
        find(str(tmp_path / "x"), tmp_path)
    with pytest.raises(ValueError, match=r"^resume: no checkpoint-N in .*; leave --resume out to start a new run$"):
        find("latest", tmp_path)


def test_auto_starts_or_goes_on(tmp_path: Path) -> None:
    assert find(None, tmp_path) == find("auto", tmp_path) == []
    checkpoint(tmp_path, 3, None)
    assert find("auto", tmp_path) == [tmp_path / "checkpoint-3"] and find(None, tmp_path) == []


def test_auto_begins_again_where_a_run_left_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where it was killed before its first: one line says so, and its log is kept beside the folder."""
    run = earlier_run(tmp_path / "sft")
    words = ["--algo", "sft", "--output_dir", str(run), "--resume", "auto"]
    assert find("auto", run) == []
    new_folder(parse(words, world_size=1).config, "again")
    assert [one.message for one in caplog.records] == [
        f"{run} holds a run without a checkpoint, which begins again at step 0: what it left was moved to {run}.1"
    ]
    assert (tmp_path / "sft.1" / "metrics.jsonl").read_text() == "{}\n" and (run / "config.yaml").exists()


def test_what_the_newest_checkpoint_keeps_is_read(tmp_path: Path) -> None:
    """Of the first one in which it can be read."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, text in zip(folders, ("{", '{"progress": 1}', "{}"), strict=True):
        folder.mkdir()
        (folder / PROGRESS_FILE).write_text(text)
    assert kept(folders) == (tmp_path / "b", {"progress": 1}) and kept(folders[:1]) is None


def test_what_a_resume_changes_is_written_down(tmp_path: Path) -> None:
    """config.yaml is what holds now, with the changes and the step from which they hold above; earlier ones stay with
    a number. A resume that changes nothing leaves it as it is; every command has its line."""
    out = tmp_path / "out"
    words = ["--algo", "sft", "--output_dir", str(out)]
    new_folder(parse(words, world_size=1).config, "one")
    first = (out / "config.yaml").read_text()
    again = [*words, "--resume", "auto"]
    record(parse(again, world_size=1).config, "two", 4, [])
    assert (out / "config.yaml").read_text() == first and not (out / "config.1.yaml").exists()
    for number, rate in ((1, "0.1"), (2, "0.2")):
        config = parse([*again, "--lr", rate], world_size=1).config
        record(config, f"lr {rate}", 4, [f"--learning_rate was it, is {rate}"])
        lines = (out / "config.yaml").read_text().splitlines()
        assert lines[:2] == ["# from step 5 on:", f"# --learning_rate was it, is {rate}"]
        found = parse(["--config", str(out / "config.yaml")], world_size=1).config
        assert (found.optim.learning_rate, found.output.resume) == (float(rate), None)
        assert (out / f"config.{number}.yaml").exists()
    assert (out / "config.1.yaml").read_text() == first
    assert "learning_rate: 0.1\n" in (out / "config.2.yaml").read_text()
    assert (out / "command.txt").read_text().splitlines() == ["one", "two", "lr 0.1", "lr 0.2"]
    assert not list(out.glob(".*"))
