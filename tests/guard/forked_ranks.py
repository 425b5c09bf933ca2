"""Ranks that may be killed: forked from a process that has imported everything, so that a case costs a second or two.

Each rank has its own environment, standard error in a file, and the exit codes of the command.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as cli.py does, before torch is imported

from dsalign.launcher import free_port

LONGEST = 60.0  # seconds, then what is left of a case is killed


@dataclass(frozen=True)
class Ended:
    """How the ranks of a case ended."""

    codes: list[int]  # by rank; minus the signal where one ended it
    seconds: float  # from the last step of any rank to the end of the last rank; 999 where one had to be killed
    said: str  # standard error of all ranks

    def lines(self) -> list[str]:
        """The lines that dsalign said."""
        return [line for line in self.said.splitlines() if line.startswith("dsalign:")]


class Forge:
    """A process that forks ranks. run: world ranks that call `body(rank, folder)`, a function of a module."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, body: Callable[[int, Path], Any], folder: Path, world: int = 2, faults: str = "") -> Ended:
        """Run one case and wait for its end. faults: as DSALIGN_FAULT has them."""
        self.start(body, folder, world, faults)
        return self.end(folder)

    def start(self, body: Callable[[int, Path], Any], folder: Path, world: int = 2, faults: str = "") -> None:
        """Start a case, which runs beside others; each has a folder of its own."""
        self._pipe.send(("start", body, folder, world, faults))

    def end(self, folder: Path) -> Ended:
        """Wait for the end of the case that was started with this folder."""
        self._pipe.send(("end", folder))
        codes, ended = self._pipe.recv()
        stamps = [float(path.read_text()) for path in folder.glob("stamp-*")]
        said = "".join(path.read_text() for path in sorted(folder.glob("stderr-*")))
        return Ended(codes, ended - max(stamps, default=0.0), said)

    def close(self) -> None:
        """End the process that forks."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)


@contextmanager
def forge() -> Iterator[Forge]:
    """A forge, for a fixture."""
    made = Forge()
    yield made
    made.close()


def stamp(rank: int, folder: Path) -> None:
    """Note that a rank is well at this moment."""
    (folder / f"stamp-{rank}").write_text(str(time.time()))


def _serve(pipe: Any) -> None:
    from dsalign import cli  # noqa: F401, PLC0415
    from dsalign.verbs import train  # noqa: F401, PLC0415

    running: dict[Path, Future[tuple[list[int], float]]] = {}
    with ThreadPoolExecutor(16) as waiting:
        while True:
            try:
                order, *rest = pipe.recv()
            except EOFError:
                return
            if order == "start":
                body, folder, world, faults = rest
                port = free_port()
                pids = [_fork(rank, world, port, body, folder, faults) for rank in range(world)]
                running[folder] = waiting.submit(_reap, pids)
            else:
                pipe.send(running.pop(rest[0]).result())


def _fork(rank: int, world: int, port: int, body: Callable[[int, Path], Any], folder: Path, faults: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    file = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    os.dup2(file, 1)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DSALIGN_TEST": "1", "DSALIGN_FAULT": faults}
    for name in ("TORCHELASTIC_ERROR_FILE", "DSALIGN_LAUNCHER"):
        os.environ.pop(name, None)
    code = 1
    try:
        code = _as_command(lambda: body(rank, folder))
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _as_command(work: Callable[[], Any]) -> int:
    from dsalign import cli  # noqa: PLC0415

    def as_main(argv: Sequence[str], typed: bool) -> int:
        work()
        return 0

    cli._main = as_main  # the exit codes are those of the command
    return cli.main([])


def _reap(pids: list[int]) -> tuple[list[int], float]:
    """(exit code of each, the time when the last one ended)."""
    codes, late, until = dict[int, int](), 0.0, time.time() + LONGEST
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.time() > until:
                late = 999.0
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids], time.time() + late
