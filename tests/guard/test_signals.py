"""Signals are noted while they arrive, also where the main thread waits in C, and a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsalign.guard import signals

ROOT = Path(__file__).resolve().parents[2]
# "go" is printed once signals are heard; the body says what the main thread does, and what was heard is printed last
PROGRAM = """
import os, signal, sys, threading, time
from dsalign.guard import signals
signals.GAP_S = 0.3
with signals.listening() as heard:
    print("go", flush=True)
    {body}
print(heard.name, flush=True)
"""
STUCK = "lock = threading.Lock(); lock.acquire(); lock.acquire()"  # no signal handler of Python's runs in it
WAIT = "\n    ".join(["while not heard.first:", "    time.sleep(0.01)"])


def started(body: str, **options: object) -> subprocess.Popen[str]:
    """A process that listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # type: ignore[call-overload]  # fmt: skip
    assert process.stdout.readline() == "go\n"
    return process  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", [*signals.URGENT, *signals.POLITE], ids=lambda number: signal.Signals(number).name)
def test_a_signal_is_noted_and_nothing_ends(number: int) -> None:
    process = started(WAIT)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, signal.Signals(number).name + "\n")


def test_a_second_signal_ends_a_process_that_waits_in_c() -> None:
    """The main thread waits for a lock for ever, as for a peer that is gone; two that come at once are one."""
    process = started(STUCK)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 130


def test_notices_never_end_a_process_and_do_not_make_a_signal_the_second() -> None:
    process = started(STUCK)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


def test_a_child_that_is_forked_dies_of_a_signal_and_the_parent_hears_nothing() -> None:
    body = "\n    ".join(
        [
            "child = os.fork()",
            "if not child: time.sleep(60)",
            "os.kill(child, signal.SIGTERM)",
            "assert os.waitpid(child, 0)[1] == signal.SIGTERM",
            "time.sleep(0.2)",
        ]
    )
    out, _ = started(body).communicate(timeout=20)
    assert out == "\n"


def test_what_is_ignored_at_the_start_stays_ignored() -> None:
    """As nohup and a shell's background jobs ask for it."""
    process = started(WAIT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == "SIGUSR1\n"


def test_before_training_begins_a_signal_may_raise_at_once() -> None:
    with pytest.raises(InterruptedError, match="SIGUSR1"), signals.listening(InterruptedError):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    with signals.listening(InterruptedError) as heard:
        signals.begun()
        os.kill(os.getpid(), signal.SIGUSR1)
        while not heard.first:
            time.sleep(0.01)


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (*signals.URGENT, *signals.POLITE)]
    with signals.listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (*signals.URGENT, *signals.POLITE)] == before


def test_a_run_that_is_saved_ignores_what_a_launcher_still_sends() -> None:
    process = started("signals.ignore(); time.sleep(1)")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "\n")
