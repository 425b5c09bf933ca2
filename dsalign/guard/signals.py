"""The signals that ask a run to stop: noted while they arrive, obeyed where all ranks agree. Imports no torch.

Python calls a handler only when the main thread is between two of its instructions, which a collective that waits for a
dead rank never is. So the handlers do nothing: the interpreter writes each signal's number to a pipe at once, and a
thread reads it there and sets a number, or ends the process on a second signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dsalign import endings

POLITE = (signal.SIGUSR1, signal.SIGHUP)  # notices, which never end a process at once
URGENT = (signal.SIGTERM, signal.SIGINT)
GAP_S = 2.0  # launchers pass one signal on twice, so one that comes sooner is the same
STARTED = time.monotonic()  # about when the process did, as this is imported before torch


class Heard:
    """The signals that this process has heard: the first one's number, 0 while there was none."""

    def __init__(self) -> None:
        self.first = 0
        self._urgent_since: float | None = None

    def note(self, number: int) -> None:
        """Note a signal that arrives now; a second urgent one, GAP_S or more after the first, ends the process at once
        with exit code 130."""
        now = time.monotonic()
        self.first = self.first or number
        if number not in URGENT:
            return
        if self._urgent_since is not None and now - self._urgent_since >= GAP_S:
            os._exit(endings.INTERRUPTED)
        if self._urgent_since is None:
            self._urgent_since = now

    @property
    def name(self) -> str:
        """The first signal's name, as SIGTERM; empty where there was none."""
        return signal.Signals(self.first).name if self.first else ""


_heard = Heard()
_before: dict[int, Any] = {}  # signal -> its handler before `listening`


def heard() -> Heard:
    """What this process has heard since `listening` began."""
    return _heard


@contextmanager
def listening(at_once: Callable[[str], BaseException] | None = None) -> Iterator[Heard]:
    """A context in which signals are noted in place of ending this process. A signal that the process was started to
    ignore, as nohup does with SIGHUP, is left alone. In another thread than the main one nothing is heard.

    at_once: while it is set and `begun` was not called, the first signal raises what it makes of the signal's name.
    """
    global _heard
    _heard = Heard()
    if threading.current_thread() is not threading.main_thread():
        yield _heard  # no thread but the main one may have handlers
        return
    _state.update(at_once=at_once, deaf=False)
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)
    wakeup = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    for one in (*URGENT, *POLITE):
        if signal.getsignal(one) != signal.SIG_IGN:
            _before[one] = signal.signal(one, _handle)
    threading.Thread(target=_listen, args=(ears, _heard), name="dsalign signals", daemon=True).start()
    try:
        yield _heard
    finally:
        _heard = Heard()  # another run in this process has heard nothing
        signal.set_wakeup_fd(wakeup)
        while _before:
            number, handler = _before.popitem()
            if not _state["deaf"]:
                signal.signal(number, handler)
        os.close(mouth)  # which ends the thread


_state: dict[str, Any] = {"at_once": None, "deaf": False}


def begun() -> None:
    """Tell that training begins: from here a signal waits until all ranks agree."""
    _state["at_once"] = None


def ignore() -> None:
    """Ignore all further signals: the run is saved and leaves, and a launcher may signal the ranks that are still there
    when the first has left."""
    for number in _before:
        signal.signal(number, signal.SIG_IGN)
    _state["deaf"] = True


def _handle(number: int, frame: FrameType | None) -> None:
    make, _state["at_once"] = _state["at_once"], None
    if make is not None:
        raise make(signal.Signals(number).name)


def _listen(ears: int, noted: Heard) -> None:
    while numbers := os.read(ears, 64):
        for number in numbers:
            noted.note(number)
    os.close(ears)


def _forking() -> None:
    _state["mask"] = signal.pthread_sigmask(signal.SIG_BLOCK, _before)


def _forked() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _state["mask"])


def _forked_child() -> None:
    """A child that was forked is no rank: it dies of signals as any process does, and does not write to the pipe."""
    if _before:
        signal.set_wakeup_fd(-1)
        for number in _before:
            signal.signal(number, signal.SIG_DFL)
    _forked()


os.register_at_fork(before=_forking, after_in_parent=_forked, after_in_child=_forked_child)
