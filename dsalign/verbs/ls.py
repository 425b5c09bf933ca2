"""The command `dsalign ls`: the runs below a folder, with the state of each and the command that goes on with it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dsalign import endings
from dsalign.config import flags
from dsalign.guard.disk import amount
from dsalign.report.story import duration, number
from dsalign.verbs import arguments, runs
from dsalign.verbs.lines import columns, natural
from dsalign.verbs.runs import Run

SUMMARY = "the runs below a folder: state, steps, best step, checkpoints, how to go on"
USAGE = """usage: dsalign ls [FOLDER] [--verify] [--json]

  FOLDER    where to look, itself and below [output]
  --verify  read checkpoints and compare their checksums, in place of the sizes of their files
  --json    a list of JSON objects on standard output in place of text

States: running; elsewhere (its lock names a process of another machine, which is not asked); done; stopped, which
`dsalign resume RUN` continues; diverged; crashed; never began (no step was taken).
The exit code is 0, or 2 where --verify finds a checkpoint that is not as it was written."""
COLUMNS = ("run", "algorithm", "model", "state", "step", "last", "best", "size", "age", "checkpoints")
RIGHT = ("step", "size", "age")  # aligned to the right
LEAST = (
    "size",
    "model",
    "checkpoints",
    "age",
    "algorithm",
    "best",
    "last",
)  # what a narrow terminal lacks, in order
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Request:
    """A `dsalign ls` command, parsed. whole: whether checkpoints are hashed."""

    folder: Path
    whole: bool
    as_json: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign ls ARGV` makes; None for a request of help.

    Raises ValueError for a flag that it does not have, and for several folders.
    """
    if "--help" in argv or "-h" in argv:
        return None
    own = arguments.parser("ls")
    own.add_argument("--json", action="store_true")
    own.add_argument("--verify", action="store_true")
    asked, rest = own.parse_known_args(list(argv))
    if wrong := [word for word in rest if word.startswith("-")]:
        advice = flags.nearest(wrong[0], ("--verify", "--json")) or "; see dsalign ls --help"
        raise ValueError(f"ls: expected --verify or --json, got {wrong[0]!r}{advice}")
    if len(rest) > 1:
        raise ValueError(f"ls: expected one folder, got {len(rest)}; write dsalign ls {rest[0]}")
    return Request(Path(rest[0] if rest else "output").expanduser(), asked.verify, asked.json)


def run(request: Request | None) -> int:
    """Print the runs; None prints the usage. Returns the exit code: 0, or 2 where --verify finds a damaged checkpoint.

    Raises ValueError where there is no such folder.
    """
    if request is None:
        print(USAGE)
        return endings.DONE
    if not request.folder.is_dir():
        raise ValueError(f"ls: expected a folder in which runs are, got {request.folder}, which is none; give another")
    found = [runs.read(folder, whole=request.whole) for folder in runs.below(request.folder)]
    found.sort(key=lambda one: one.written, reverse=True)
    now = time.time()
    print(json.dumps([one.as_json(now) for one in found]) if request.as_json else text(found, request.folder, now))
    damaged = request.whole and any(kept.fault for one in found for kept in one.checkpoints)
    return endings.INPUT if damaged else endings.DONE


def text(found: Sequence[Run], root: Path, now: float) -> str:
    """The runs as a table, a row each, and below it what is to be said of each that is not done. now: seconds since
    1970."""
    if not found:
        return f"no run in {root} or below it; a run writes to output/ALGORITHM, or to its --output_dir"
    shown = list(COLUMNS)
    table = _table(found, now, shown)
    width = columns(natural(table))
    for name in LEAST:
        if natural(table) > width:
            shown.remove(name)
            table = _table(found, now, shown)
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False, color_system=None)
    console.print(table)
    for line in (line for one in found for line in _lines(one)):
        console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _table(found: Sequence[Run], now: float, shown: Sequence[str]) -> Table:
    """A row a run, with these of COLUMNS."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in shown:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=name != "run", overflow="fold")
    for one in found:
        cells = (
            str(one.folder), one.algo, Path(one.model).name, one.state, _steps(one), _last(one), _best(one),
            amount(one.size), _age(now - one.written), _kept(one),
        )  # fmt: skip
        table.add_row(*(cell for name, cell in zip(COLUMNS, cells, strict=True) if name in shown))
    return table


def _lines(one: Run) -> list[str]:
    """What is to be said of a run below the table: who writes it, what is damaged, the command that goes on."""
    said = [f"{one.folder}: {kept.name} is damaged: {kept.fault}" for kept in one.checkpoints if kept.fault]
    if one.owner is not None:
        said.append(f"{one.folder}: {one.owner.text()}")
    if command := one.next_command():
        verb = {runs.RUNNING: "stop it", runs.NEVER: "start it"}.get(one.state, "go on" if one.whole else "start again")
        said.append(f"{one.folder}: {verb}: {command}")
    return said


def _steps(one: Run) -> str:
    return "" if one.step is None else f"{one.step}/{'?' if one.total is None else one.total}"


def _last(one: Run) -> str:
    return "" if one.last is None else f"{one.last[0]} {number(one.last[1])}"


def _best(one: Run) -> str:
    return "" if one.best is None else f"{number(one.best[1])} at {one.best[0]}"


def _kept(one: Run) -> str:
    if not one.checkpoints:
        return "none"
    good = ", ".join(str(kept.step) for kept in one.whole) or "none"
    bad = len(one.checkpoints) - len(one.whole)
    return good + (f" ({bad} damaged)" if bad else "")


def _age(seconds: float) -> str:
    return f"{int(seconds // DAY_S)}d" if seconds >= 2 * DAY_S else duration(max(0.0, seconds))
