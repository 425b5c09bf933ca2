"""What ranks do in tests/guard/test_watchdog.py: steps that sum a number over all ranks, and a fault in one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from dsalign import cli, phases
from dsalign.engines import dist
from dsalign.guard import watchdog

CPU = torch.device("cpu")
LAST_STAMP = 29  # at micro-batch 30 a fault comes, from which the seconds are counted
BURN = "import time; end = time.time() + 11\nwhile time.time() < end: pass"


def as_command(body: Callable[[int, Path], None], folder: Path) -> int:
    """`body(rank, folder)` with the exit codes and the last line of the command."""

    def as_main(argv: Sequence[str], typed: bool) -> int:
        body(int(os.environ["RANK"]), folder)
        return 0

    with mock.patch.object(cli, "_main", as_main):
        return cli.main([])


def stamp(rank: int, folder: Path) -> None:
    """Note that a rank is well at this moment."""
    (folder / f"stamp-{rank}").write_text(str(time.time()))


def steps(rank: int, folder: Path, count: int = 10**6, first: int = 0) -> None:
    """Optimizer steps of 50 ms."""
    for step in range(first, first + count):
        with phases.within("train"):
            phases.mark("micro-batch", step)
            time.sleep(0.05)
            phases.mark("optimizer step")
            dist.total([1.0], CPU)
        if step < LAST_STAMP:
            stamp(rank, folder)
        if step == 10:
            at_step_10(rank, folder)


def at_step_10(rank: int, folder: Path) -> None:
    """What a case does on rank 1: the name of its folder says it."""
    name = folder.name
    if rank != 1:
        return
    with phases.within("score"):
        if name == "key_error":
            raise KeyError("x")
        if name == "value_error":
            raise ValueError("rewards: expected 4 numbers, got 3")
        if name == "sys_exit":
            sys.exit(0)
        if name == "os_exit":
            os._exit(0)


def train(rank: int, folder: Path) -> None:
    """Steps until a fault ends them."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder)


def scored(rank: int, folder: Path) -> None:
    """Twelve scores of 0.3 s between steps, then one on rank 1 that takes 7 s, or never ends in a case of that name.
    30 x 0.3 s are 9 s, and a sixth of --peer_timeout is 4."""
    join(rank)
    with watchdog.watched(folder, 24.0):
        for turn in range(12):
            steps(rank, folder, 1, turn)
            with phases.within("reward function"):
                time.sleep(0.3)
            dist.barrier()
        stamp(rank, folder)
        with phases.within("reward function"):
            if rank == 1:
                time.sleep(3600 if folder.name == "score_hangs" else 7)
        dist.barrier()


def spins(rank: int, folder: Path) -> None:
    """Steps of 50 ms with ten tokens each; at step 30 rank 1 computes for ever. A case of another name ends after 14 s:
    as its micro-batch has 5,000 tokens, or as it is inside a compiler."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder, 30)
        stamp(rank, folder)
        with phases.within("train"):
            phases.mark("micro-batch", work=5000 if folder.name == "much_work" else 1)
            if rank == 1:
                inside = "/torch/_inductor/compile.py" if folder.name == "in_compiler" else "loop.py"
                seconds = 3600 if folder.name == "spins" else 14
                run = "import time\nend = time.time() + seconds\nwhile time.time() < end: pass"
                exec(compile(run, inside, "exec"), {"seconds": seconds})
            dist.barrier()


def join(rank: int) -> None:
    """Join the process group."""
    dist.init(rank, peer_timeout=600.0)


def same_error(rank: int, folder: Path) -> None:
    """Every rank finds the same and nobody agreed on it."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder, 5)
        raise ValueError("step 5: the loss is nan")


def agreed(rank: int, folder: Path) -> None:
    """Rank 1 has an error, all agree on it, and rank 1 takes three seconds to leave."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder, 5)
        try:
            dist.agree(ValueError("no such file: rows.jsonl") if rank == 1 else None)
        finally:
            if rank == 1:
                time.sleep(3)


def early(rank: int, folder: Path) -> None:
    """Rank 1 is done 12 s before rank 0, which writes a report."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder, 20)
        phases.mark("report")
        if rank == 0:
            time.sleep(12)
    stamp(rank, folder)


def long_phase(rank: int, folder: Path) -> None:
    """What takes far longer than a step and is no hang: 11 s on one rank, as the name of the folder says."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        if folder.name == "data":  # on rank 0 alone, before any step
            phases.mark("data")
            time.sleep(11 if rank == 0 else 0)
            dist.barrier()
        steps(rank, folder, 20)
        if folder.name in ("save", "score"):  # a large checkpoint on rank 0, a slow reward server on rank 1
            with phases.within(folder.name):
                time.sleep(11 if rank == (folder.name == "score") else 0)
                dist.barrier()
        with phases.within("train"):
            phases.mark("micro-batch")
            if folder.name == "compile" and rank == 1:  # a kernel, in a process below the rank
                subprocess.run([sys.executable, "-S", "-c", BURN], check=True)
            if folder.name == "no_python" and rank == 1:  # PyDLL, unlike CDLL, keeps Python from running meanwhile
                ctypes.PyDLL(None).usleep(11_000_000)
            dist.barrier()
        steps(rank, folder, 20, 40)


def suspended(rank: int, folder: Path) -> None:
    """All ranks stop for 12 s, as a suspended job, and go on."""
    join(rank)
    with watchdog.watched(folder, 600.0):
        steps(rank, folder, 20)
        helper = f"sleep 12; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", helper], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        steps(rank, folder, 40, 30)
