"""Signs of life: the state of a process, whether the main thread waits for other ranks or for nothing that runs, and
whether a process on another machine answers. Of a system without /proc nothing is known."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from dsalign.engines.board import Pulse
from dsalign.engines.dist import is_collective

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
IDLE, BUSY = 0.2, 0.5  # a process that takes less of a core computes nothing; one that takes more computes itself
SLACK_S = 3.0  # of the time without progress that need not have been idle
DEPTH = 12  # frames from the innermost one in which a collective is looked for
ANSWER_S = 2.0  # a process that lives answers in a millisecond
AGAIN_S = 3.0  # between two questions to one process
COMPILERS = ("/triton/", "/torch/_inductor/", "/torch/_dynamo/")  # in the paths of their files

State = Literal["runs", "stopped", "gone", "unknown"]
Doing = Literal["nothing", "computes", "disk", "other"]  # "other": too little to tell, or it may be a compiler


@dataclass(frozen=True)
class Card:
    """Who a rank is, as it tells the others once."""

    rank: int
    host: str
    pid: int
    born: str  # when the process began, so that a pid is not taken for another process that has it later
    space: str  # the machine's boot and the namespaces of pids and network: within one, /proc tells all of a process
    address: str  # where its pulse answers
    port: int


def card_of(rank: int, address: str, port: int) -> Card:
    """The card of this process. address, port: of its pulse."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        space = " ".join([boot, *(os.readlink(PROC / "self/ns" / kind) for kind in ("pid", "net"))])
    except OSError:
        space = ""
    return Card(rank, socket.gethostname(), os.getpid(), _stat(os.getpid())[1], space, address, port)


def _stat(pid: int, thread: int | None = None) -> tuple[str, str, float]:
    """(state, time of birth, CPU seconds) of a process or of one of its threads; state "" where there is none."""
    path = PROC / str(pid) / (f"task/{thread}/stat" if thread else "stat")
    try:
        words = path.read_text().rpartition(")")[2].split()
    except OSError:
        return "", "", 0.0
    return words[0], words[19], (int(words[11]) + int(words[12])) / TICKS


def state_of(card: Card, mine: Card) -> State:
    """What the process of another rank does; "unknown" where it is on another machine than this rank's card `mine`."""
    if not card.space or card.space != mine.space:
        return "unknown"
    state, born, _ = _stat(card.pid)
    if born != card.born or state in ("Z", "X", "x"):
        return "gone"
    return "stopped" if state in ("T", "t") else "runs"


def answers(card: Card) -> State:
    """What a process on another machine does, as its pulse tells: "runs", "gone" (the machine answers and the process
    does not), "unknown" (nothing came back within ANSWER_S)."""
    try:
        socket.create_connection((card.address, card.port), timeout=ANSWER_S).close()
    except ConnectionRefusedError:
        return "gone"
    except OSError:
        return "unknown"
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(Pulse.beats(card.address, card.port, ANSWER_S)), daemon=True)
    asking.start()  # the kernel takes a connection for a stopped process too, and then no time limit holds
    asking.join(ANSWER_S)
    return "runs" if found == [True] else "unknown"


class Questions:
    """`answers` without waiting: a thread asks, and until it has an answer that is recent a process counts as "runs".

    ask: a card -> what its process does; it may last for seconds.
    """

    def __init__(self, ask: Callable[[Card], State] = answers) -> None:
        self._ask = ask
        self._asked: dict[int, tuple[float, list[State]]] = {}  # rank -> when, and the answer where it is there

    def __call__(self, card: Card) -> State:
        """What is known of a process; asks again where that is old."""
        now = time.monotonic()
        at, found = self._asked.get(card.rank, (-1e9, []))
        if now - at >= AGAIN_S:
            fresh: list[State] = []
            self._asked[card.rank] = now, fresh
            threading.Thread(target=lambda: fresh.append(self._ask(card)), daemon=True).start()
        return found[0] if found and now - at < 2 * AGAIN_S else "runs"


def waits(frame: FrameType | None) -> bool:
    """Whether a thread with this innermost frame waits inside a collective for other ranks."""
    innermost = True
    for _ in range(DEPTH):
        if frame is None:
            return False
        if is_collective(frame.f_code.co_filename, frame.f_code.co_name, innermost=innermost):
            return True
        frame, innermost = frame.f_back, False
    return False


def compiles(frames: Iterable[FrameType]) -> bool:
    """Whether a thread with one of these innermost frames is inside a compiler of kernels, or what one has compiled."""
    for innermost in frames:
        frame: FrameType | None = innermost
        while frame is not None:
            if any(name in frame.f_code.co_filename for name in COMPILERS):
                return True
            frame = frame.f_back
    return False


class Idleness:
    """A watch over this process: for how long neither it nor a process that it started has computed anything.

    thread: the native id of the main thread. children: the CPU seconds of the processes below this one.
    """

    def __init__(self, thread: int, children: Callable[[], float] | None = None) -> None:
        self._thread, self._children = thread, children or _of_children
        self.restart()

    def restart(self) -> None:
        """Begin anew, as the main thread has made progress."""
        self._cpu, self._below, self._at, self.seconds = time.process_time(), -1.0, time.monotonic(), 0.0
        self._first, self._state = self._cpu, ""

    def doing(self, age: float, frames: Iterable[FrameType]) -> Doing:
        """What this process does, as seen by the last `look`. age: seconds since `restart`. frames: the innermost ones
        of its threads. Where it uses a GPU, nobody can tell that it computes: a process that waits there for another
        rank's part of a collective is as busy."""
        if self.seconds >= age - SLACK_S:
            return "nothing"
        if self._state == "D":
            return "disk"
        busy = self._cpu - self._first >= BUSY * age
        return "computes" if busy and not compiles(frames) and not on_gpu() else "other"

    def look(self) -> float:
        """The seconds of idleness up to now, 0 where there is none; to be called about once a second."""
        at, cpu = time.monotonic(), time.process_time()
        passed = max(at - self._at, 1e-3)
        self._state = _stat(os.getpid(), self._thread)[0]
        below = self._children() if cpu - self._cpu < IDLE * passed and self._state == "S" else -1.0
        same = self._below >= 0 and below >= 0 and below - self._below < IDLE * passed
        self.seconds = self.seconds + min(passed, 2.0) if same else 0.0
        self._cpu, self._at, self._below = cpu, at, below
        return self.seconds


def on_gpu() -> bool:
    """Whether this process has begun to use a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _of_children() -> float:
    """CPU seconds of the processes below this one that are still there."""
    total, parents = 0.0, [str(os.getpid())]
    while parents:
        for listed in PROC.glob(f"{parents.pop()}/task/*/children"):
            with suppress(OSError):
                found = listed.read_text().split()
                total += sum(_stat(int(pid))[2] for pid in found)
                parents += found
    return total
