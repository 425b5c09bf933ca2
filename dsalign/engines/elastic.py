"""torch's launcher, `python -m dsalign.engines.elastic` in place of `python -m torch.distributed.run`: it ends with the
exit code of the rank that failed first, and leaves the last word to that rank's message."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SAID = (2, 130)  # exit codes of ranks that have said why they end: see cli.py


def main(argv: Sequence[str]) -> int:
    """Start the ranks that `argv` (as for torchrun) asks for; returns 0, or the exit code of the first that failed.

    A rank that a signal ended gives 128 + its number, as in a shell, and a line that names rank and signal.
    """
    logging.disable(logging.CRITICAL)  # of torch's agent, forty lines that say no more than the exit code does
    try:
        run.main(list(argv))
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
