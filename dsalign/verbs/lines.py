"""What `dsalign check` and `dsalign doctor` print: a line for each thing that was looked at, and what to do."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dsalign import endings
from dsalign.config.secrets import redacted

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"
WIDTH = 118  # columns


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. state: ok, warning, error or skipped. found: what was found, in words. advice: what
    to do, empty where nothing is to be done."""

    name: str
    state: str
    found: str
    advice: str = ""


def looked(name: str, look: Callable[[], Sequence[Line] | Line | str]) -> list[Line]:
    """The lines of one look: of what `look` returns, a text being what is fine, or an error where it raises ValueError,
    OSError or ImportError. The text of the error is what was found."""
    try:
        said = look()
    except (ValueError, OSError, ImportError) as error:
        return [Line(name, ERROR, str(error) or type(error).__name__)]
    if isinstance(said, str):
        return [Line(name, OK, said)]
    return [said] if isinstance(said, Line) else list(said)


def columns(widest: int) -> int:
    """The width of a table on standard output, in characters: `widest`, or that of a terminal that is narrower."""
    return min(widest, shutil.get_terminal_size((widest, 0)).columns) if sys.stdout.isatty() else widest


def natural(table: Table) -> int:
    """The width, in characters, at which no cell of a table is wrapped."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def text(lines: Sequence[Line]) -> str:
    """The lines as a table, and how many are in which state."""
    width = columns(WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), width=width)
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold", ratio=1)
    for one in lines:
        table.add_row(one.name, one.state, one.found + (f"\n-> {one.advice}" if one.advice else ""))
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False, color_system=None).print(table)
    counts = [(state, sum(one.state == state for one in lines)) for state in (ERROR, WARNING, SKIPPED, OK)]
    last = ", ".join(f"{count} {state}" for state, count in counts if count)
    return redacted("\n".join([*(row.rstrip() for row in out.getvalue().strip("\n").splitlines()), last]))


def answer(lines: Sequence[Line], *, as_json: bool) -> int:
    """Print the lines, as a table or as one JSON object {"ok", "lines"}; returns the exit code: 0, or 2 where one is an
    error."""
    wrong = any(one.state == ERROR for one in lines)
    if as_json:
        print(redacted(json.dumps({"ok": not wrong, "lines": [asdict(one) for one in lines]}, ensure_ascii=False)))
    else:
        print(text(lines))
    return endings.INPUT if wrong else endings.DONE
