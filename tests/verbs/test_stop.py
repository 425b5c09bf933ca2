"""`dsalign stop`: whom it asks, how long it waits and what it says."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.checkpoint import folder_lock
from tests.verbs.test_runs import checkpoint, write

TEXT = "algo: dpo\nmodel: base\nmax_steps: 40\n"


def obeying(run: Path, wish: str, *, leaves: bool) -> threading.Thread:
    """A thread that is a run: it holds the lock, saves checkpoint-7 when it sees the wish, and then leaves or not for
    two seconds."""
    ready = threading.Event()

    def go() -> None:
        with folder_lock.held(run):
            ready.set()
            until = time.monotonic() + 20
            while not (run / wish).exists() and time.monotonic() < until:
                time.sleep(0.02)
            checkpoint(run, 7, 2)
            (run / wish).unlink()
            if not leaves:
                time.sleep(1)

    thread = threading.Thread(target=go)
    thread.start()
    ready.wait()
    return thread


def test_stop_waits_until_the_process_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", TEXT, 5)
    thread = obeying(run, "STOP", leaves=True)
    assert cli.main(["stop", str(run), "--wait"]) == 0
    thread.join()
    out = capsys.readouterr().out
    first, second, third = out.splitlines()
    assert first.startswith(f"{run}: pid ") and first.endswith("was asked; it saves and stops after its step")
    assert second == f"{run}: it has left, saved at step 7 of 40 in {run / 'checkpoint-7'}"
    assert third == f"dsalign resume {run}"


def test_save_waits_for_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", TEXT, 5)
    thread = obeying(run, "SAVE", leaves=False)
    assert cli.main(["stop", str(run), "--save", "--wait", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    thread.join()
    assert found["saved_step"] == 7 and found["state"] == "running" and found["next"] == ""


def test_the_time_may_be_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", TEXT, 5)
    with folder_lock.held(run):
        assert cli.main(["stop", str(run), "--wait", "0.3"]) == 3
        assert "not done after 0.3 s; it is still asked" in capsys.readouterr().out
        assert (run / "STOP").exists()
        (run / "STOP").unlink()
        assert cli.main(["stop", str(run), "--save"]) == 0
        assert (run / "SAVE").exists() and "saves and goes on" in capsys.readouterr().out


def test_a_run_that_is_not_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written there: a file STOP would end the next run at once."""
    run = write(tmp_path / "run", TEXT, 5)
    checkpoint(run, 5)
    assert cli.main(["stop", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"got one that does not: it is stopped at step 5; to go on with it: dsalign resume {run}" in said
    assert not (run / "STOP").exists()


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "pairs", TEXT, 5)
    assert cli.main(["stop", str(tmp_path / "pair")]) == 2
    assert "which is no folder; did you mean pairs?" in capsys.readouterr().err
    assert cli.main(["stop", str(tmp_path)]) == 2
    assert "which has no run in it; dsalign ls lists runs" in capsys.readouterr().err
    for words, said in (([], "expected one folder of a run, got 0"), ([str(run), "--sav"], "got '--sav'")):
        assert cli.main(["stop", *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["stop", "--help"]) == 0
