"""torch's launcher, `python -m dsalign.engines.elastic` in place of `python -m torch.distributed.run`: it ends with the
exit code of the rank that failed first, and its last line is that rank's message. Signals are passed on to the ranks,
which have as long as they need: torch's own would kill them after 30 seconds.

Ranks that guard/watchdog.py watches end by themselves where one is lost, and write why into their error files: they are
left the time for that, and what they wrote is said here, once and last.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dsalign.endings import DIVERGED, FAULT, INPUT, INTERRUPTED, PEER_LOST, RESUMABLE

SAID = (INPUT, FAULT, RESUMABLE, DIVERGED, PEER_LOST, INTERRUPTED)  # ranks with these codes said why they end: cli.py
SIGNALS = "--signals_to_handle"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE_S, TERM_S = 10.0, 3.0  # for ranks to end by themselves where one is lost; then between SIGTERM and SIGKILL


def main(argv: Sequence[str]) -> int:
    """Start the ranks that `argv` (as for torchrun) asks for; returns 0, or the exit code of the first that failed.

    A rank that a signal ended gives 128 + its number, as in a shell, and a line that names rank and signal.
    """
    logging.disable(logging.CRITICAL)  # of torch's agent, forty lines that say no more than the exit code does
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _pass_on)
    os.environ["DSALIGN_LAUNCHER"] = "1"  # then ranks leave the last line to this process
    SubprocessContext._close = _patient(SubprocessContext._close)  # type: ignore[method-assign]
    try:
        older = SIGNALS not in run.get_args_parser().format_help()  # then torch passes signals on itself, for 30 s
        run.main([*([] if older else [SIGNALS, "SIGQUIT"]), *argv])
    except ChildFailedError as error:
        return _told(error.failures)
    except SignalException as ended:
        return 128 + int(ended.sigval)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to every rank; without ranks there is nothing to wait for."""
    ranks = psutil.Process().children()
    for one in ranks:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    if not ranks:
        raise SignalException(f"signal {number} before the ranks were started", signal.Signals(number))


def _told(failures: dict[int, ProcessFailure]) -> int:
    """Say why the run ended, if no rank has; returns its exit code. failures: by rank."""
    causes = {rank: one for rank, one in failures.items() if one.exitcode != PEER_LOST} or failures
    rank, failure = min(causes.items(), key=lambda one: one[1].timestamp)
    written = [one.message for one in failures.values() if Path(one.error_file).is_file()]
    code = int(failure.exitcode)
    name = f"{signal.Signals(-code).name} (exit code {128 - code})" if code < 0 else ""
    if written:
        text = f"{written[0]} ({name.replace(' (', ', ')}" if name else written[0]
    elif name:
        text = f"rank {rank} was ended by {name}"
    else:
        text = "" if code in SAID else f"rank {rank} failed first, with exit code {code}; see above"
    if text:
        print(f"dsalign: error: {text}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _patient(close: Callable[..., None]) -> Callable[..., None]:
    """The end of all ranks of this machine as torch has it, which waits first where watched ranks end by themselves."""

    def closing(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        ranks = self.subprocess_handlers
        codes = [one.proc.poll() for one in ranks.values()]
        failed = any(codes)
        lost = any(code is not None and (code < 0 or code == PEER_LOST) for code in codes)  # nothing is left to save
        until = time.monotonic() + PATIENCE_S
        while failed and time.monotonic() < until:
            running = [local for local, one in ranks.items() if one.proc.poll() is None]
            if not any(Path(f"{self.error_files[local]}.watched").exists() for local in running):
                break
            time.sleep(0.05)
        close(self, death_sig, TERM_S if lost else timeout)

    return closing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
