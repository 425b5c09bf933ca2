"""The command `dsalign report`: writes report.html of a run anew, or a page that compares several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign.config import flags
from dsalign.report import history, page
from dsalign.report.story import story
from dsalign.verbs import arguments

SUMMARY = "what happened in a run as a page, or several compared: dsalign report RUN [RUN ...]"
USAGE = """usage: dsalign report RUN [RUN ...] [--output FILE] [--json]

  RUN            the --output_dir of a run, whether it has ended or not
  --output FILE  where to write [RUN/report.html; of several runs comparison.html in this folder]
  --json         one JSON object on standard output: the page's path, and of each run what happened

One RUN: its page is written anew. Several: their curves in one chart each, settings that differ, last numbers."""


@dataclass(frozen=True)
class Request:
    """A `dsalign report` command, parsed. output: the page's path, None = the usual one."""

    runs: tuple[Path, ...]
    output: Path | None
    as_json: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign report ARGV` makes; None for a request of help.

    Raises ValueError for a flag that it does not have, or where no run is named.
    """
    own = arguments.parser("report")
    own.add_argument("--json", action="store_true")
    own.add_argument("--output")
    if "--help" in argv or "-h" in argv:
        return None
    asked, runs = own.parse_known_args(list(argv))
    if wrong := [word for word in runs if word.startswith("-")]:
        advice = flags.nearest(wrong[0], ("--output", "--json")) or "; see dsalign report --help"
        raise ValueError(f"report: expected --output FILE or --json, got {wrong[0]!r}{advice}")
    if not runs:
        raise ValueError("report: expected the folder of a run, got none; write dsalign report output/dpo")
    output = Path(asked.output).expanduser() if asked.output else None
    return Request(tuple(Path(run).expanduser() for run in runs), output, asked.json)


def run(request: Request | None) -> int:
    """Write the page and say where it is; None prints the usage. Returns the exit code 0.

    Raises ValueError where a folder is no run's, or the page cannot be written.
    """
    if request is None:
        print(USAGE)
        return 0
    try:
        if len(request.runs) == 1:
            path = page.write_report(request.runs[0], request.output)
        else:
            path = page.write_comparison(request.runs, request.output or Path(page.COMPARISON))
    except OSError as error:
        raise ValueError(f"report: the page cannot be written: {error}; give another place with --output") from error
    found = dict(zip(page.names_of(request.runs), map(history.read, request.runs), strict=True))
    if request.as_json:
        print(json.dumps({"report": str(path), "runs": {name: _plain(one) for name, one in found.items()}}))
        return 0
    for name, one in found.items():
        print(f"{name}: {' '.join(story(one))}")
    print(f"written to {path}")
    return 0


def _plain(one: history.History) -> dict[str, Any]:
    """What a script wants of a run: {"folder", "step", "seconds", "ended": how, or None while it runs or where it was
    killed, "best": [step, loss] or None, "checkpoints": steps, "last": metric -> value or None, if not finite}."""
    last = {name: points[-1][1] for name, points in one.series.items()}
    return {
        "folder": str(one.folder),
        "step": one.step,
        "seconds": round(one.seconds, 1),
        "ended": one.end.get("how"),
        "best": one.best,
        "checkpoints": list(one.checkpoints),
        "last": {name: value if abs(value) < float("inf") else None for name, value in last.items()},
    }
