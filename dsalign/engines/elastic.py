"""torch's launcher, `python -m dsalign.engines.elastic` in place of `python -m torch.distributed.run`: it ends with the
exit code of the rank that failed first, and leaves the last word to that rank's message. Signals are passed on to the
ranks, which have as long as they need: torch's own would kill them after 30 seconds."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil  # type: ignore[import-untyped]
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dsalign.endings import DIVERGED, INPUT, INTERRUPTED, PEER_LOST, RESUMABLE

SAID = (INPUT, RESUMABLE, DIVERGED, PEER_LOST, INTERRUPTED)  # exit codes of ranks that have said why they end: cli.py
SIGNALS = "--signals_to_handle"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main(argv: Sequence[str]) -> int:
    """Start the ranks that `argv` (as for torchrun) asks for; returns 0, or the exit code of the first that failed.

    A rank that a signal ended gives 128 + its number, as in a shell, and a line that names rank and signal.
    """
    logging.disable(logging.CRITICAL)  # of torch's agent, forty lines that say no more than the exit code does
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _pass_on)
    try:
        older = SIGNALS not in run.get_args_parser().format_help()  # then torch passes signals on itself, for 30 s
        run.main([*([] if older else [SIGNALS, "SIGQUIT"]), *argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code < 0:
            name = signal.Signals(-code).name
            print(f"dsalign: error: rank {rank} was ended by {name} (exit code {128 - code})", file=sys.stderr)
            return 128 - code
        if code not in SAID:
            print(f"dsalign: error: rank {rank} failed first, with exit code {code}; see above", file=sys.stderr)
        return code
    except SignalException as ended:
        return 128 + int(ended.sigval)
    except KeyboardInterrupt:
        return 130
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to every rank; without ranks there is nothing to wait for."""
    ranks = psutil.Process().children()
    for one in ranks:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(number)
    if not ranks:
        raise SignalException(f"signal {number} before the ranks were started", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
