"""How a run ends other than by its last step: exceptions that carry the exit code of the process. Imports no torch.

Exit codes: 0 done, 2 configuration or data, 3 a fault in the program or a library, 75 stopped and saved, to be resumed,
76 diverged, 77 another rank was lost, 130 interrupted at once.
"""

from __future__ import annotations

import re
import shlex
from itertools import pairwise

DONE, INPUT, FAULT, RESUMABLE, DIVERGED, PEER_LOST, INTERRUPTED = 0, 2, 3, 75, 76, 77, 130


class Ending(Exception):
    """A run that ends early for a reason that is known; the message says which, and how to go on."""

    code = FAULT


class Stopped(Ending):
    """The run was asked to stop, and is saved."""

    code = RESUMABLE


class Diverged(Ending):
    """The numbers of the run are no longer finite, or more steps than --max_bad_steps in a row had to be skipped."""

    code = DIVERGED


class PeerLost(Ending):
    """Another rank ended or no longer answers."""

    code = PEER_LOST


def resuming(command: str) -> str:
    """The command that goes on with the newest checkpoint of a run. command: the one that started the run, a training
    or `dsalign resume RUN`."""
    kept, value_next = list[str](), False
    for word in shlex.split(command):
        name, equals, _ = word.replace("-", "_").partition("=")
        is_value, value_next = value_next and not word.startswith("--"), False
        if name in ("__resume", "__resume_from_checkpoint"):
            value_next = not equals
        elif not is_value:
            kept.append(word)
    verb = next((i for i, (a, b) in enumerate(pairwise(kept)) if b == "resume" and not a.startswith("--")), None)
    if verb is None:
        return shlex.join([*kept, "--resume"])
    return shlex.join([*kept[: verb + 2], *(re.sub(r"/checkpoint-\d+/*$", "", word) for word in kept[verb + 2 :])])
