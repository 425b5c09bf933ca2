"""What is told of a process from outside, and of this one from inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support import RankPool

from dsalign.engines.board import Pulse
from dsalign.guard import vitals

pytestmark = pytest.mark.skipif(not vitals.PROC.is_dir(), reason="needs /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_states_of_a_process_of_this_machine(child: subprocess.Popen[bytes]) -> None:
    mine = vitals.card_of(0, "", 0)
    card = replace(mine, rank=1, pid=child.pid, born=vitals._stat(child.pid)[1])
    assert vitals.state_of(card, mine) == "runs"
    assert vitals.state_of(card, replace(mine, space="another machine")) == "unknown"
    assert vitals.state_of(replace(card, born="1"), mine) == "gone", "the pid is another process by now"
    child.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 10
    while vitals.state_of(card, mine) == "runs" and time.monotonic() < until:
        time.sleep(0.01)
    assert vitals.state_of(card, mine) == "stopped"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert vitals.state_of(card, mine) == "gone", "a zombie"
    child.wait()
    assert vitals.state_of(card, mine) == "gone"


def test_a_pulse_answers_while_its_process_lives() -> None:
    pulse = Pulse()
    card = replace(vitals.card_of(0, "127.0.0.1", pulse.port), space="")
    assert vitals.answers(card) == "runs"
    del pulse
    assert vitals.answers(card) == "gone"


def test_asking_does_not_wait() -> None:
    """A process counts as one that runs until its answer is there; the next question comes three seconds later."""
    asked, told = threading.Event(), threading.Event()

    def ask(card: vitals.Card) -> vitals.State:
        asked.set()
        told.wait(10)
        return "unknown"

    known = vitals.Questions(ask)
    card = vitals.card_of(1, "", 0)
    assert known(card) == "runs" and asked.wait(10) and known(card) == "runs"
    told.set()
    asked.clear()
    until = time.monotonic() + 2
    while known(card) == "runs" and time.monotonic() < until:
        time.sleep(0.01)
    assert known(card) == "unknown" and not asked.is_set()


def test_a_compiler_is_seen_on_any_stack() -> None:
    def frame() -> types.FrameType:
        return sys._getframe()

    inside = {"frame": frame}
    exec(compile("def run():\n    return frame()", f"{sys.prefix}/torch/_inductor/codecache.py", "exec"), inside)
    assert vitals.compiles([sys._getframe(), inside["run"]()]) and not vitals.compiles([sys._getframe()])


def test_what_a_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeping 0.3 s of 0.3 is nothing, though the three seconds of slack are over; computing all of them is that, with
    a compiler on the stack or computing a little it is not known; nor on a GPU, where waiting for it is as busy."""
    idle = vitals.Idleness(_sleeper(), lambda: 5.0)
    idle.seconds = 7.0
    assert idle.doing(10.0, []) == "nothing" and idle.doing(10.1, []) == "other"
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    idle.look()
    assert idle.seconds == 0.0
    frame = sys._getframe()
    assert idle.doing(3.1, [frame]) == "other", "0.2 s of work in 3.1 s"
    idle._first -= 2.0
    assert idle.doing(3.1, [frame]) == "computes"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert idle.doing(3.1, [frame]) == "other"


def waiting() -> list[bool]:
    """Whether this thread is seen to wait: in a collective of torch, and outside one."""
    found = [vitals.waits(sys._getframe())]
    original = torch.distributed.distributed_c10d._get_default_group

    def looked() -> object:
        found.append(vitals.waits(sys._getframe()))
        return original()

    torch.distributed.distributed_c10d._get_default_group = looked
    try:
        torch.distributed.barrier()
    finally:
        torch.distributed.distributed_c10d._get_default_group = original
    return found[:2]


def test_a_thread_in_a_collective_waits(one_rank: RankPool) -> None:
    assert one_rank.run(waiting) == [False, True]


def test_idleness_counts_neither_work_here_nor_below() -> None:
    """Sleep counts from the second look on; 0.1 s of work in 0.1 s, or of a process below, begins anew."""
    below = [5.0]
    idle = vitals.Idleness(_sleeper(), lambda: below[0])
    found = []
    for work in (False, False, True, False, False):
        until = time.process_time() + 0.1
        while work and time.process_time() < until:
            pass
        if not work:
            time.sleep(0.1)
        found.append(idle.look() > 0)
    assert found == [False, True, False, False, True]
    time.sleep(0.1)
    below[0] += 0.1
    assert idle.look() == 0
    idle.restart()
    assert idle.seconds == 0


def _sleeper() -> int:
    """The native id of a thread that sleeps until the end."""
    thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    thread.start()
    while thread.native_id is None or vitals._stat(os.getpid(), thread.native_id)[0] != "S":
        time.sleep(0.01)
    return thread.native_id
