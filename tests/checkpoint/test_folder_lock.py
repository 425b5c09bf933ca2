"""The lock on an output folder: one process at a time, whatever became of the last."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsalign.checkpoint import folder_lock

HOLD = """
import pathlib, sys
from dsalign.checkpoint import folder_lock
with folder_lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError) as caught, folder_lock.held(tmp_path / "out"):
        pass
    assert str(caught.value).startswith(
        f"output_dir: {tmp_path}/out is being written by another run, pid {other.pid} on {socket.gethostname()} since "
    )
    other.kill()
    other.communicate()
    assert (tmp_path / "out" / folder_lock.LOCK).exists()
    with folder_lock.held(tmp_path / "out"):
        assert (tmp_path / "out" / folder_lock.LOCK).read_text().startswith(f"pid {os.getpid()} on ")
    assert not (tmp_path / "out" / folder_lock.LOCK).exists()


def test_folders_that_nobody_wrote_to_are_gone_again(tmp_path: Path) -> None:
    with folder_lock.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with folder_lock.held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["metrics.jsonl"]


def test_the_lock_goes_along_when_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / "out.1"
    with folder_lock.held(out):
        out.rename(aside)
        out.mkdir()
        folder_lock.keep(aside, out)
        assert not (aside / folder_lock.LOCK).exists()
        with pytest.raises(ValueError, match=f"another run, pid {os.getpid()} "), folder_lock.held(out):
            pass
    with folder_lock.held(out):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = r"^output_dir: expected a folder that can be written, got .*file/in \(Not a d"
    with pytest.raises(ValueError, match=said), folder_lock.held(tmp_path / "file" / "in"):
        pass
