"""Launchers above a process: which they are, that their end is seen, and the command that a user typed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from dsalign.guard import parents
from dsalign.guard.parents import Launchers

PYTHON = "/venv/bin/python"
DEEPSPEED = (PYTHON, "/venv/bin/deepspeed", "--num_accelerators", "2", "launch/train.py", "--algo", "sft")
LAUNCH = (PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "launch/train.py", "--algo", "sft")
RANK = (PYTHON, "-u", "launch/train.py", "--local_rank=0", "--algo", "sft")


def proc(folder: Path, processes: Mapping[int, tuple[int, tuple[str, ...]]]) -> None:
    """A folder like /proc of these processes, pid -> (parent, words)."""
    for pid, (parent, words) in processes.items():
        (folder / str(pid)).mkdir(exist_ok=True)
        (folder / str(pid) / "stat").write_text(f"{pid} (a ) name) S {parent} 1 1 0")
        (folder / str(pid) / "cmdline").write_bytes("".join(word + "\0" for word in words).encode())


@pytest.mark.parametrize(
    ("above", "links", "command"),
    [
        ([(LAUNCH), (DEEPSPEED), ("-bash",)], 2, DEEPSPEED),
        ([(LAUNCH), ("bash", "-c", "cd x; deepspeed y"), ("sshd: me",)], 1, ()),  # by pdsh: a remote shell
        ([(PYTHON, "-m", "torch.distributed.run", "t.py")], 1, (PYTHON, "-m", "torch.distributed.run", "t.py")),
        ([("mpirun", "-np", "2", *RANK), ("bash", "job.sh")], 1, ("mpirun", "-np", "2", *RANK)),
        ([(PYTHON, "-m", "dsalign.engines.elastic", "-m", "dsalign.cli")], 1, ()),
        ([("-bash",), ("tmux",)], 0, ()),
        ([("bash", "train_with_deepspeed.sh"), ("slurmstepd: [1.0]",)], 0, ()),
    ],
)
def test_launchers_are_known_by_their_commands(
    above: list[tuple[str, ...]], links: int, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell, ssh or tmux above them may end without a word: nohup is meant to survive it."""
    monkeypatch.setattr(parents, "PROC", tmp_path)
    words = [RANK, *above, ("/sbin/init",)]
    proc(tmp_path, {1000 - i: (1000 - i - 1, one) for i, one in enumerate(words)})
    found = Launchers.of(1000)
    assert found == Launchers(tuple((1000 - i, 999 - i) for i in range(links)), command)
    assert found.lost() == ""


@pytest.mark.parametrize("gone", [0, 1])
def test_the_end_of_any_launcher_is_seen(gone: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its child has another parent then: deepspeed's is launch.py, whose are the ranks."""
    monkeypatch.setattr(parents, "PROC", tmp_path)
    proc(tmp_path, {30: (20, RANK), 20: (10, LAUNCH), 10: (5, DEEPSPEED), 5: (1, ("-bash",))})
    launchers = Launchers.of(30)
    proc(tmp_path, {5: (1, ("-bash",))})
    assert launchers.lost() == ""
    child = (30, 20)[gone]
    proc(tmp_path, {child: (1, (RANK, LAUNCH)[gone])})
    assert launchers.lost() == f"the end of its launcher, process {(20, 10)[gone]},"


def test_an_orphan_notices_within_a_second(tmp_path: Path) -> None:
    """Three real processes: the middle one, called torchrun, is killed, and the lowest writes what it sees."""
    lowest = (
        "import os, sys, time; from dsalign.guard.parents import Launchers; one = Launchers.of(os.getpid())\n"
        "open(sys.argv[1] + '.go', 'w').close()\n"
        "while not one.lost(): time.sleep(0.05)\n"
        "open(sys.argv[1] + '.part', 'w').write(one.lost()); os.rename(sys.argv[1] + '.part', sys.argv[1])"
    )
    torchrun, found = tmp_path / "torchrun", tmp_path / "found"
    torchrun.write_text("import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])")
    root = str(Path(__file__).resolve().parents[2])
    middle = subprocess.Popen(
        [sys.executable, str(torchrun), lowest, str(found)], env={**os.environ, "PYTHONPATH": root}
    )
    _until(Path(f"{found}.go"))
    middle.kill()
    middle.wait()
    _until(found)
    assert found.read_text() == f"the end of its launcher, process {middle.pid},"


def _until(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} was not written"
        time.sleep(0.02)


def test_the_command_is_the_launchers_ours_or_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parents, "words_of", lambda pid: RANK)
    monkeypatch.setattr(Launchers, "of", classmethod(lambda cls, pid: cls((), DEEPSPEED)))
    assert parents.typed("dsalign --algo sft", "x") == " ".join(DEEPSPEED)
    monkeypatch.setattr(Launchers, "of", classmethod(lambda cls, pid: cls()))
    assert parents.typed("dsalign --algo sft", "x") == "dsalign --algo sft"
    assert parents.typed(None, "x") == " ".join(RANK)
    monkeypatch.setattr(parents, "words_of", lambda pid: ())
    assert parents.typed(None, "x") == "x"
