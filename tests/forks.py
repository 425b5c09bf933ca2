"""Real processes to kill, without paying for their imports: one process imports everything and forks ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsalign.launcher import free_port

GRACE_S = 15.0  # within which the other ranks should have left when one has ended


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, -9 for SIGKILL; when, in seconds of time.time(), and how long after the first
    rank that ended; and what it printed."""

    code: int
    at: float
    after_s: float
    text: str


class Forks:
    """A process that has imported dsalign and forks ranks, each a session of its own.

    `run(function, *args, fault=...)` calls a module-level function in `world` forked ranks; a rank's exit code is what
    it returns, or 1 where it raises. Ranks that live on twice GRACE_S after another has ended are killed. With
    `start` and `end` several such runs go on side by side.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(
        self, function: Callable[..., Any], *args: Any, world: int = 2, fault: str = "", limit_s: float = 1200.0
    ) -> list[Ended]:
        """How each rank ended. fault: as in DSALIGN_FAULT. limit_s: seconds for all."""
        return self.end(self.start(function, *args, world=world, fault=fault, limit_s=limit_s))

    def start(
        self, function: Callable[..., Any], *args: Any, world: int = 2, fault: str = "", limit_s: float = 1200.0
    ) -> int:
        """Start such a run; its number."""
        self._pipe.send((function, args, world, fault, limit_s))
        number: int = self._pipe.recv()
        return number

    def end(self, number: int) -> list[Ended]:
        """How each rank of a run ended that was started; waits for it."""
        self._pipe.send(number)
        found: list[Ended] = self._pipe.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()


@dataclass
class _Run:
    """Ranks that live or lived. until: time.monotonic() when what lives is killed. ended: pid -> (exit code, time)."""

    pids: list[int]
    logs: tempfile.TemporaryDirectory[str]
    until: float
    ended: dict[int, tuple[int, float]] = field(default_factory=dict)

    def look(self) -> None:
        """Take note of ranks that have ended, and end those that live too long."""
        for pid in self.pids:
            if pid not in self.ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ended[pid] = os.waitstatus_to_exitcode(status), time.time()
                    self.until = min(self.until, time.monotonic() + 2 * GRACE_S)
        if time.monotonic() > self.until:
            for pid in set(self.pids) - set(self.ended):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.until += 60

    def result(self) -> list[Ended] | None:
        """How each rank ended, or None where one lives."""
        if len(self.ended) < len(self.pids):
            return None
        first = min(at for _, at in self.ended.values())
        found = []
        for rank, pid in enumerate(self.pids):
            code, at = self.ended[pid]
            found.append(Ended(code, at, at - first, Path(self.logs.name, str(rank)).read_text(errors="replace")))
        self.logs.cleanup()
        return found


def _serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as cli.py does, before torch is imported
    import torch  # noqa: PLC0415  here, so that the tests' own process stays without DeepSpeed
    from deepspeed.runtime.zero import stage3  # noqa: F401, PLC0415
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401, PLC0415  and with it torch's compiler: seconds

    import dsalign.verbs.train  # noqa: F401, PLC0415  imports everything

    torch.set_num_threads(1)
    runs = list[_Run]()
    wanted: int | None = None
    while True:
        for one in runs:
            one.look()
        if wanted is not None:
            if (found := runs[wanted].result()) is not None:
                pipe.send(found)
                wanted = None
        elif pipe.poll(0.005):
            try:
                asked = pipe.recv()
            except EOFError:
                return
            if isinstance(asked, int):
                wanted = asked
            else:
                runs.append(_forked(*asked))
                pipe.send(len(runs) - 1)
        time.sleep(0.005)


def _forked(function: Callable[..., Any], args: Sequence[Any], world: int, fault: str, limit_s: float) -> _Run:
    port, logs = free_port(), tempfile.TemporaryDirectory()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            _rank(function, args, place, fault, Path(logs.name, str(rank)))
        pids.append(pid)
    return _Run(pids, logs, time.monotonic() + limit_s)


def _rank(
    function: Callable[..., Any], args: Sequence[Any], place: dict[str, int], fault: str, text: Path
) -> None:  # never returns
    code = 1
    try:
        os.setsid()
        number = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  whole lines, and not those of the parent
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"LOCAL_RANK": str(place["RANK"]), "LOCAL_WORLD_SIZE": str(place["WORLD_SIZE"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "DSALIGN_TEST": "1", "DSALIGN_FAULT": fault}
        for name in ("TORCHELASTIC_ERROR_FILE", "DSALIGN_LAUNCHER"):
            os.environ.pop(name, None)
        code = int(function(*args) or 0)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
