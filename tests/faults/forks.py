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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign.launcher import free_port

GRACE_S = 15.0  # that the other ranks may live on when one has ended


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, -9 for SIGKILL; seconds after the first rank that ended; and what it printed."""

    code: int
    after_s: float
    text: str


class Forks:
    """A process that has imported dsalign and forks ranks, each a process group of its own.

    `run(function, *args, fault=...)` calls a module-level function in `world` forked ranks; a rank's exit code is what
    it returns, or 1 where it raises. Ranks that live on GRACE_S seconds after another has ended are killed.
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
        self._pipe.send((function, args, world, fault, limit_s))
        found: list[Ended] = self._pipe.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()


def _serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp())
    import torch  # noqa: PLC0415  here, so that the tests' own process stays without DeepSpeed
    from deepspeed.runtime.zero import stage3  # noqa: F401, PLC0415
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401, PLC0415  and with it torch's compiler: seconds

    import dsalign.verbs.train  # noqa: F401, PLC0415  imports everything

    torch.set_num_threads(1)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(_forked(*asked))


def _forked(function: Callable[..., Any], args: Sequence[Any], world: int, fault: str, limit_s: float) -> list[Ended]:
    port = free_port()
    with tempfile.TemporaryDirectory() as logs:
        texts = [Path(logs, str(rank)) for rank in range(world)]
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _rank(function, args, {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}, fault, texts[rank])
            pids.append(pid)
        ended = _waited(pids, limit_s)
        first = min(at for _, at in ended.values())
        return [
            Ended(ended[pid][0], ended[pid][1] - first, text.read_text(errors="replace"))
            for pid, text in zip(pids, texts, strict=True)
        ]


def _waited(pids: Sequence[int], limit_s: float) -> dict[int, tuple[int, float]]:
    """pid -> (exit code, time) of each."""
    ended: dict[int, tuple[int, float]] = {}
    until = time.monotonic() + limit_s
    while len(ended) < len(pids):
        for pid in pids:
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
                    until = min(until, time.monotonic() + GRACE_S)
        if time.monotonic() > until:
            for pid in set(pids) - set(ended):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until += 60
        time.sleep(0.005)
    return ended


def _rank(
    function: Callable[..., Any], args: Sequence[Any], place: dict[str, int], fault: str, text: Path
) -> None:  # never returns
    code = 1
    try:
        os.setpgid(0, 0)
        number = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"LOCAL_RANK": str(place["RANK"]), "LOCAL_WORLD_SIZE": str(place["WORLD_SIZE"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "DSALIGN_TEST": "1", "DSALIGN_FAULT": fault}
        code = int(function(*args) or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
