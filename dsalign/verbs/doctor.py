"""The command `dsalign doctor`: what this machine, and the machines of a hostfile, have for a run. It imports none of
the libraries that it looks at, so that it works where one of them does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsalign.config import flags
from dsalign.verbs import arguments, hosts, lines, this_machine

SUMMARY = "what is wrong with this machine, or those of a hostfile: versions, GPUs, builds, network"
USAGE = """usage: dsalign doctor [--hostfile FILE] [--json]

Looks at versions, GPUs and driver, what DeepSpeed can build, locks that a killed build left, disk, memory, the hub,
ports, network and runs that go on here.

  --hostfile FILE  check its lines, reach every machine of it by ssh at once, and compare versions
  --json           one JSON object on standard output in place of text

The exit code is 2 where something is an error."""
FLAGS = ("--hostfile", "--json")


@dataclass(frozen=True)
class Request:
    """A `dsalign doctor` command, parsed."""

    hostfile: Path | None
    as_json: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign doctor ARGV` makes; None for a request of help. Raises ValueError for any other word
    than its flags."""
    if "--help" in argv or "-h" in argv:
        return None
    own = arguments.parser("doctor")
    own.add_argument("--json", action="store_true")
    own.add_argument("--hostfile")
    asked, rest = own.parse_known_args(list(argv))
    if rest:
        advice = flags.nearest(rest[0], FLAGS) or "; see dsalign doctor --help"
        raise ValueError(f"doctor: expected {' or '.join(FLAGS)}, got {rest[0]!r}{advice}")
    return Request(Path(asked.hostfile).expanduser() if asked.hostfile else None, asked.json)


def run(request: Request | None) -> int:
    """Look at everything and print it; None prints the usage. Returns the exit code: 0, or 2 where something is an
    error."""
    if request is None:
        print(USAGE)
        return 0
    found = this_machine.examined()
    if request.hostfile is not None:
        found += hosts.examined(request.hostfile)
    return lines.answer(found, as_json=request.as_json)
