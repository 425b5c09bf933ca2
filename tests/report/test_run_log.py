"""The line on the console, metrics.jsonl and samples.jsonl, resumed and killed."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsalign.report import events, history, run_log
from dsalign.report.run_log import RunLog
from dsalign.report.trackers import Tracker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands until it is set."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_log.time, "monotonic", lambda: time.now)
    return time


def of(folder: Path, trackers: tuple[str, ...] = (), **changes: Any) -> RunLog:
    return RunLog(folder, trackers, **{"rank": 0, "total_steps": 10, "resumed": False, **changes})


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_by_hand(tmp_path: Path, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Start at step 2 with 100 tokens; 4 s later step 4 with 500: 100 tokens/s, 2 s a step, 6 steps to go."""
    shown = of(tmp_path)
    shown.start(2, 100)
    clock.now += 4
    metrics = {"entropy": 1.25, "lr": 5e-5, "loss": 0.69314718, "num_tokens": 500, "epoch": 0.5}
    shown.log(4, metrics)
    line = "step 4/10 | loss 0.6931 | 100 tok/s | ETA 12s\n"
    assert capsys.readouterr().out == line
    assert lines(tmp_path) == [{"step": 4, **metrics, "tokens_per_s": 100.0}]


def test_a_line_has_the_main_numbers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of many numbers five at most, in words; all are in metrics.jsonl."""
    metrics = {"loss": 0.5, "time/rollout": 3.14, "objective/scores": 1.5, "objective/kl": 2.0, "val/ratio": 1.0}
    of(tmp_path).log(4, metrics)
    assert capsys.readouterr().out == "step 4/10 | reward 1.5 | KL 2 | loss 0.5\n"
    assert lines(tmp_path) == [{"step": 4, **metrics}]


def test_the_first_step_is_shown_and_not_logged(
    tmp_path: Path, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next log line's rate counts from the start: 60 tokens in 3 s."""
    shown = of(tmp_path)
    shown.start(0, 0)
    for step, tell in ((1, shown.show), (3, shown.log)):
        clock.now = 100 + step
        tell(step, {"loss": 0.5, "num_tokens": 20 * step})
    assert capsys.readouterr().out == (
        "step 1/10 | loss 0.5 | 20 tok/s | ETA 9s\nstep 3/10 | loss 0.5 | 20 tok/s | ETA 7s\n"
    )
    assert [one["step"] for one in lines(tmp_path)] == [3]


def test_rates_count_from_the_line_before(tmp_path: Path, clock: SimpleNamespace) -> None:
    """10 tokens in 1 s, then 30 in 2 s; 4 s of another pass over these, which has no rate, and 18 in 2 s."""
    shown = of(tmp_path)
    shown.start(0, 0)
    for seconds, tokens in ((1, 10), (2, 40), (4, 40), (2, 58)):
        clock.now += seconds
        shown.log(1, {"num_tokens": tokens})
    assert [line.get("tokens_per_s") for line in lines(tmp_path)] == [10.0, 15.0, None, 3.0]


def test_an_evaluation_has_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = of(tmp_path)
    shown.log(0, {"eval/nll_loss": 2.0, "eval/loss": 1e6})
    assert capsys.readouterr().out == "step 0/10 | held-out loss 1.00e+06\n"
    assert lines(tmp_path) == [{"step": 0, "eval/nll_loss": 2.0, "eval/loss": 1e6}]


def test_a_resumed_run_goes_on_with_the_file_and_a_new_one_starts_it(tmp_path: Path) -> None:
    of(tmp_path).log(1, {"loss": 1.0})
    of(tmp_path, resumed=True).log(2, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    of(tmp_path).log(3, {"loss": 3.0})
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    """Killed after step 6 and in the middle of a line; it goes on at 4, and takes that rollout again."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 6, "loss": 3}\n')
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 0, "completion": "é\u2028"}\n{"step": 4, "completion": "b"}\n{"st'
    )
    report = RunLog(tmp_path, (), rank=0, total_steps=8, resumed=True)
    report.start(4, 0)
    report.log(6, {"loss": 3})
    report.samples(4, [{"completion": "b", "score": 1.0}])
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [(one["step"], one["completion"]) for one in samples] == [(0, "é\u2028"), (4, "b")]


def test_other_ranks_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No line, no file, no tracker: one that does not exist would raise."""
    shown = of(tmp_path / "out", ("wandb",), rank=1)
    shown.say("hello")
    shown.start(0, 0)
    shown.log(1, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_is_left_out_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[tuple[Any, ...]] = []

    def broken(*told: Any) -> None:
        raise ConnectionError("no route")

    def keep(*told: Any) -> None:
        got.append(told)

    def refused(folder: Path) -> Tracker:
        raise RuntimeError("no login")

    monkeypatch.setattr(run_log, "memory_gib", lambda: {"GPU memory": 2.0})
    made = {"trackio": Tracker(broken, broken, broken, broken), "wandb": Tracker(keep, keep, keep, keep)}
    trackers = {name: (lambda folder, one=one: one) for name, one in made.items()} | {"tensorboard": refused}
    monkeypatch.setattr(run_log, "TRACKERS", trackers)
    with caplog.at_level(logging.WARNING):
        shown = of(tmp_path, ("trackio", "wandb", "tensorboard"))
        shown.begin({"beta": 0.1, "model": "hf_abcdefghijklmnopqrstuv"})
        shown.log(1, {"loss": 1.0})
        shown.log(2, {"loss": 2.0})
        shown.samples(2, [{"completion": "a", "score": 1.0}])
        shown.close(None)
    assert [r.message for r in caplog.records] == [
        "report_to tensorboard failed and is left out from here: no login",
        "report_to trackio failed and is left out from here: no route",
    ]
    memory = {"system/gpu_memory_gib": 2.0}
    assert got == [
        ({"beta": 0.1, "model": "[redacted]"},),
        (1, {"loss": 1.0} | memory),
        (2, {"loss": 2.0} | memory),
        (2, [{"completion": "a", "score": 1.0}]),
        (),
    ]
    assert len(lines(tmp_path)) == 2


def test_training_outlives_its_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the output is gone (`| head`): nothing is raised, and metrics.jsonl still gets every line."""

    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    report = RunLog(tmp_path, (), rank=0, total_steps=2, resumed=False)
    monkeypatch.setattr(sys, "stdout", Gone())
    report.log(1, {"loss": 2.0})
    report.log(2, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_report_is_written_however_a_run_ends(tmp_path: Path) -> None:
    """Ctrl-C at step 3, after a warning of a library call before the folder was open, and one that was printed."""
    events.KEEPER.restart()
    events.KEEPER.emit(logging.LogRecord("dsalign.data", logging.WARNING, "", 0, "%d rows dropped", (2,), None))
    (tmp_path / "config.yaml").write_text("algo: dpo\nmodel: tiny\n")
    report = of(tmp_path)
    report.begin({}, rows=8, held_out=0, ranks=1, device="cpu", data={}, origins={})
    report.log(3, {"loss": 1.0})
    report.say("warning: the last 3 row(s) are left out")
    report.close(KeyboardInterrupt())
    found = [(e["kind"], e.get("step"), e.get("text")) for e in history.lines(tmp_path / "events.jsonl")]
    assert found == [
        ("begin", None, None),
        ("warning", 0, "2 rows dropped"),
        ("warning", 3, "warning: the last 3 row(s) are left out"),
        ("end", 3, ""),
    ]
    assert "took 3 of 10 optimizer steps" in (tmp_path / "report.html").read_text()
    assert "It was interrupted (Ctrl-C) at step 3" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_written_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder stands in its place: one warning, and nothing raised."""
    (tmp_path / "report.html").mkdir()
    report = of(tmp_path)
    report.begin({}, rows=8, held_out=0, ranks=1, device="cpu", data={}, origins={})
    with caplog.at_level(logging.WARNING):
        report.close(ValueError("the real one"))
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("report.html was not written (") and f"`dsalign report {tmp_path}` tries again" in said


def test_a_full_disk_ends_nothing_and_loses_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two lines while the disk takes none (/dev/full is such a disk), with one warning; both come with the third."""
    log = RunLog(tmp_path, (), rank=0, total_steps=3, resumed=False)
    path = tmp_path / "metrics.jsonl"
    path.unlink()
    path.symlink_to("/dev/full")
    with caplog.at_level("WARNING", "dsalign.report.run_log"):
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{path}: No space left on device (errno 28, " in warning and "MiB free" in warning
    path.unlink()
    log.log(3, {"loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
