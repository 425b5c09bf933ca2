"""The last lines of a run: where things are, and commands that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.report import hints
from dsalign.report.hints import last_lines
from dsalign.report.history import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in a folder with a blank in its name, with two ranks, two checkpoints and final/."""
    run = tmp_path / "my run"
    for name in ("final", "checkpoint-5", "checkpoint-10"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 5, "eval/loss": 0.5}\n{"step": 10, "eval/loss": 0.625}\n')
    (run / "events.jsonl").write_text(json.dumps({"kind": "begin", "time": 0, "ranks": 2}) + "\n")
    return run


def with_verbs(folder: Path, monkeypatch: pytest.MonkeyPatch, *verbs: str) -> None:
    for verb in verbs:
        (folder / f"{verb}.py").touch()
    monkeypatch.setattr(hints, "VERBS", folder)


def test_a_run_that_is_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_verbs(tmp_path, monkeypatch, "chat", "merge", "resume")
    assert last_lines(read(folder), "done") == [
        "best: held-out loss 0.5 at step 5",
        f"model: {folder / 'final'}",
        f"checkpoint: {folder / 'checkpoint-10'}",
        f"report: {folder / 'report.html'}",
        f"  dsalign chat '{folder}'   # talk to it",
        f"  dsalign merge '{folder}'  # merge its adapter into the weights",
    ]


def test_a_run_that_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many ranks; by the verb where there is one."""
    with_verbs(tmp_path, monkeypatch)
    line = last_lines(read(folder), "interrupted")[-1]
    config = folder / "config.yaml"
    assert line == f"  NPROC_PER_NODE=2 dsalign --config '{config}' --resume  # go on from the newest checkpoint"
    with_verbs(tmp_path, monkeypatch, "resume")
    assert f"NPROC_PER_NODE=2 dsalign resume '{folder}'" in last_lines(read(folder), "diverged")[-1]


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert last_lines(read(tmp_path), "failed") == [f"report: {tmp_path / 'report.html'}"]


def test_this_verb_exists() -> None:
    assert hints.exists("report") and not hints.exists("nothing")
