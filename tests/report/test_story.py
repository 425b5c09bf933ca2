"""Numbers for people, and the paragraph that says what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsalign.report.history import read
from dsalign.report.story import duration, number, short, story

BEGIN = {"kind": "begin", "time": 100.0, "total": 4, "rows": 8, "held_out": 2, "ranks": 1, "device": "cpu"}
SETTINGS = "algo: dpo\nmodel: tiny\ntuner: lora\ndataset: [a.jsonl]\n"


def told(folder: Path, records: list[dict[str, float]], *events: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(SETTINGS)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return " ".join(story(read(folder)))


def test_a_run_that_came_to_its_end(tmp_path: Path) -> None:
    """100 s to 165 s; the loss on held-out rows was lowest at step 2."""
    (tmp_path / "final").mkdir()
    records = [{"step": 1, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    records += [{"step": 0, "eval/loss": 0.75}, {"step": 2, "eval/loss": 0.5}, {"step": 4, "eval/loss": 0.625}]
    end = {"kind": "end", "time": 165.0, "step": 4, "how": "done", "text": ""}
    assert told(tmp_path, records, BEGIN, end) == (
        "DPO of tiny (LoRA adapters) on 8 rows of a.jsonl, 2 more held out took 4 of 4 optimizer steps in 1m05s on 1 "
        "process (cpu). The loss fell from 0.5 to 0.25. The loss on held-out rows fell from 0.75 to 0.625; it was "
        f"lowest at step 2, with 0.5. It came to its end. The trained model is in {tmp_path / 'final'}."
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"how": "interrupted", "text": ""}, "It was interrupted (Ctrl-C) at step 3. No checkpoint was written."),
        ({"how": "diverged", "text": "the loss is nan."}, "It diverged at step 3: the loss is nan. No checkpoint was"),
        ({"how": "failed", "text": "OSError: disk"}, "It failed at step 3: OSError: disk. No checkpoint was written."),
    ],
)
def test_a_run_that_ended_early(end: dict[str, str], said: str, tmp_path: Path) -> None:
    record = {"step": 2, "loss": 0.5}
    assert said in told(tmp_path, [record], BEGIN, {"kind": "end", "time": 101, "step": 3, **end})


def test_a_run_without_an_end(tmp_path: Path) -> None:
    """Killed after a resume: the end before the last beginning is not its end; one measurement is no change, and a
    value that is not finite none."""
    end = {"kind": "end", "time": 101.0, "step": 1, "how": "stopped", "text": ""}
    (tmp_path / "checkpoint-1").mkdir()
    text = told(tmp_path, [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}], BEGIN, end, BEGIN)
    assert "The loss was 0.5 at step 1, its one measurement." in text
    assert "No end is noted: it is still running, or it was killed." in text and "checkpoint-1." in text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-0.25, "-0.25"),
        (0.123456, "0.1235"),
        (100.0, "100"),
        (5e-5, "5.00e-05"),
        (-123456.0, "-1.23e+05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_number(x: float, text: str) -> None:
    assert number(x) == text


@pytest.mark.parametrize(("x", "text"), [(0.69314, "0.6931"), (14060.0, "14,060"), (1.5e-7, "1.5e-07"), (-2.0, "-2")])
def test_short(x: float, text: str) -> None:
    assert short(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0s"), (59.9, "59s"), (60, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rounding_is_no_change_and_a_command_is_no_sentence(tmp_path: Path) -> None:
    command = "stopped by SIGTERM on rank 0 at step 2 of 9, saved in out/checkpoint-2; resume with\ndsalign --resume"
    end = {"kind": "end", "time": 101.0, "step": 2, "how": "stopped", "text": command}
    text = told(tmp_path, [{"step": 1, "loss": 3e-7}, {"step": 2, "loss": -2.8e-6}], BEGIN, end)
    assert "The loss stayed near 0." in text
    assert "at step 2: stopped by SIGTERM on rank 0 at step 2 of 9, saved in out/checkpoint-2. No checkpoint" in text
