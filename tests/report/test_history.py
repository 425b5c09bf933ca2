"""What is read back from a run's folder, whole or broken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.report.history import read, read_metrics


def test_a_step_logged_twice_counts_once(tmp_path: Path) -> None:
    """A resumed run logs step 2 again: the later value stands, in order of steps. A line that a kill broke off, one
    that is no object and text in place of a number are left out."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 9, "a": "b"}\n7\n{"step": 2, "loss": 2}\n{"step": 3, "lo'
    )
    assert read_metrics(path) == {"loss": [(1, 3.0), (2, 2.0)]}


def test_time_and_warnings_over_two_beginnings(tmp_path: Path) -> None:
    """10 s to an end, then 5 s to another; a warning said in both counts once."""
    (tmp_path / "config.yaml").write_text("algo: dpo\nnote: hf_abcdefghijklmnopqrstuv\n")
    lines = [
        '{"kind": "begin", "time": 0}',
        '{"kind": "warning", "text": "w", "step": 1}',
        '{"kind": "end", "time": 10}',
    ]
    lines += [
        '{"kind": "begin", "time": 100}',
        '{"kind": "warning", "text": "w"}',
        '{"kind": "end", "time": 105, "step": 7}',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    run = read(tmp_path)
    assert (run.seconds, run.step, [w["text"] for w in run.warnings]) == (15, 7, ["w"])
    assert run.settings == {"algo": "dpo", "note": "[redacted]"}
    assert run.best is None and run.end["time"] == 105


def test_the_best_step_is_no_nan(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/loss": NaN}\n{"step": 2, "eval/loss": 1}\n{"step": 3, "eval/loss": 2}\n'
    )
    assert read(tmp_path).best == (2, 1.0)


@pytest.mark.parametrize(("name", "got"), [("", "a folder without them"), ("none", "no such folder")])
def test_no_run(name: str, got: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"expected the output folder of a run .*, got {got}; name the run's"):
        read(tmp_path / name)
