"""The state of a run as its folder has it, and how fast many are read."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsalign.checkpoint import folder_lock, manifest
from dsalign.verbs import runs


def write(folder: Path, text: str, *steps: float, **more: Any) -> Path:
    """A run's folder with config.yaml `text`, a command, and a line of metrics for each step; its loss is 1 / step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text + "dataset:\n- rows.jsonl\n")
    (folder / "command.txt").write_text("dsalign --algo dpo --seed 1\n")
    lines = [json.dumps({"step": step, "loss": 1 / step, **more}) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def checkpoint(run: Path, step: int, serial: int = 1, name: str = "", **fingerprint: Any) -> Path:
    """A checkpoint of one file beside trainer.json, with its manifest."""
    folder = run / (name or f"checkpoint-{step}")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0123456789")
    (folder / "trainer.json").write_text(json.dumps({"progress": {"step": step}, "fingerprint": fingerprint}))
    files = {path.name: manifest.entry_of(path) for path in folder.iterdir()}
    manifest.write(folder, manifest.Manifest(files, run="r", serial=serial, step=step))
    return folder


@contextmanager
def alive(run: Path) -> Iterator[None]:
    """A context in which this process holds the lock of a run."""
    with folder_lock.held(run):
        yield


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    """Its last checkpoint was written after its last logged step: resume goes on. 3 epochs of PPO's 2 mini-batches over
    10 batches are 60 steps, of which --max_steps leaves 50."""
    run = write(tmp_path / "a b", "algo: ppo\nmodel: base\nmax_steps: 50\n", 5, 10)
    options = {"num_ppo_epochs": "3", "num_mini_batches": "2"}
    checkpoint(run, 8)
    checkpoint(run, 12, 2, batches=10, options=options)
    found = runs.read(run)
    assert (found.algo, found.model, found.state, found.step, found.total) == ("ppo", "base", "stopped", 12, 50)
    assert [one.step for one in found.checkpoints] == [12, 8] and found.last == ("loss", 0.1)
    assert found.next_command() == f"dsalign resume '{run}'"
    (run / "config.yaml").write_text("algo: ppo\nmodel: base\n")
    assert runs.read(run).total == 60


def test_a_damaged_checkpoint_is_found_by_size_or_by_its_checksum(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "algo: dpo\nmodel: base\n", 5)
    one, two = checkpoint(run, 2), checkpoint(run, 5, 2)
    (two / "model.safetensors").write_bytes(b"012345678")
    found = runs.read(run)
    assert [kept.fault for kept in found.checkpoints] == ["model.safetensors has 9 bytes, expected 10", ""]
    (one / "model.safetensors").write_bytes(b"012345678X")
    assert [kept.step for kept in runs.read(run).whole] == [2]
    hashed = runs.read(run, whole=True)
    assert hashed.checkpoints[1].fault == "model.safetensors does not match its checksum" and not hashed.whole
    assert hashed.next_command() == "dsalign --algo dpo --seed 1"


def test_states(tmp_path: Path) -> None:
    """Done: final/ of the last step. Crashed: steps were logged behind the last checkpoint. Diverged: a step behind the
    last one that counted was not finite. Never began: no step. Running: a living process has the lock."""
    text = "algo: dpo\nmodel: base\n"
    done = write(tmp_path / "done", text, 5)
    checkpoint(done, 5, name="final")
    assert runs.read(done).state == runs.DONE and runs.read(done).next_command() == ""
    write(done, text, 5, 10)
    assert runs.read(done).state == runs.CRASHED
    crashed = write(tmp_path / "crashed", text, 5)
    checkpoint(crashed, 3)
    assert runs.read(crashed).state == runs.CRASHED and runs.read(crashed).step == 5
    diverged = write(tmp_path / "diverged", text, 5)
    (diverged / "bad" / "step-8").mkdir(parents=True)
    assert runs.read(diverged).state == runs.DIVERGED
    never = write(tmp_path / "never", text)
    assert runs.read(never).state == runs.NEVER
    assert runs.read(diverged).next_command() == f"dsalign resume {diverged}"  # begins again, from any folder
    with alive(crashed):
        found = runs.read(crashed)
        assert found.state == runs.RUNNING and found.owner is not None and found.owner.pid == os.getpid()
        assert found.next_command() == f"dsalign stop {crashed}"
    assert runs.read(crashed).state == runs.CRASHED


@pytest.mark.parametrize(("how", "state"), [("stopped", "stopped"), ("failed", "crashed"), ("diverged", "diverged")])
def test_the_event_of_the_end_says_more_than_files(how: str, state: str, tmp_path: Path) -> None:
    """An end counts until the run begins again."""
    run = write(tmp_path / "run", "algo: dpo\nmodel: base\n", 5)
    events = [{"kind": "begin", "total": 40}, {"kind": "end", "how": how, "step": 7}]
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events) + '{"kind": "be')
    found = runs.read(run)
    assert (found.state, found.step, found.total) == (state, 7, 40)
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*events, events[0]]))
    assert runs.read(run).state == runs.CRASHED


def test_a_lock_that_nobody_holds(tmp_path: Path) -> None:
    """Left by a killed process: its pid is gone, or is another program's that has the file not open. A name of another
    machine is not judged. A reader takes no lock, so that a run may start meanwhile."""
    run = write(tmp_path / "run", "algo: dpo\nmodel: base\n", 5)
    lock = run / folder_lock.LOCK
    for pid in (os.getpid(), 2**22 + 1):
        lock.write_text(f"pid {pid} on {socket.gethostname()} since 2026-01-02 03:04:05")
        assert folder_lock.owner(run) is None
    lock.write_text("pid 7 on elsewhere since 2026-01-02 03:04:05")
    found = runs.read(run)
    assert found.state == runs.ELSEWHERE and found.owner is not None and not found.owner.here
    assert found.owner.text() == "pid 7 on elsewhere since 2026-01-02 03:04:05"
    lock.write_text(f"pid {os.getpid()} on {socket.gethostname()} since now")
    with lock.open() as file:
        assert folder_lock.owner(run) is not None
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_best_and_the_lines_of_a_broken_file(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "algo: grpo\nmodel: base\n", 2, 4, **{"objective/scores": 0.5})
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in ((2, 0.75), (4, 0.5), (6, 0.625), (8, float("nan"))):
            file.write(json.dumps({"step": step, "eval/loss": loss}) + "\n")
        file.write('{"step": 99, "eval/lo')
    found = runs.read(run)
    assert found.best == (4, 0.5) and found.last == ("reward", 0.5) and found.step == 8


def test_folders_of_runs_are_found_and_their_parts_are_none(tmp_path: Path) -> None:
    for name in ("one", "deep/er/two", "one/inner"):
        write(tmp_path / name, "algo: dpo\nmodel: base\n", 5)
    for name in ("one/checkpoint-4", "one/final", "one/aside-1", ".hidden"):
        write(tmp_path / name, "algo: dpo\nmodel: base\n", 5)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "config.yaml").write_text("algo: dpo\n")
    assert [str(path.relative_to(tmp_path)) for path in runs.below(tmp_path)] == ["deep/er/two", "one", "one/inner"]


def test_two_hundred_runs_take_less_than_a_second(tmp_path: Path) -> None:
    """Of CPU time, each with two checkpoints, 200 lines, 19 evaluations and the config.yaml of a whole run."""
    text = "algo: dpo\nmodel: base\n" + "".join(f"option_{i}: {i}\n" for i in range(70))
    for i in range(200):
        run = write(tmp_path / f"run-{i}", text, *range(1, 200))
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(f'{{"step": {step}, "eval/loss": {1 / step}}}\n' for step in range(10, 200, 10))
        for serial in (1, 2):
            checkpoint(run, serial * 100, serial)
    start = time.process_time()
    assert len([runs.read(folder) for folder in runs.below(tmp_path)]) == 200
    assert time.process_time() - start < 1
