"""docs/reliability.md from the rows that the tests of tests/faults keep: python tests/faults/report.py ROWS PAGE."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

Row = dict[str, str | float]  # kind, fault, happens: text; seconds: a number
HEAD = """# Reliability

What happens where something breaks, as `make test-faults` finds it, which writes this page. Two ranks; "equal" is
every weight and both moments of the optimizer, to the last bit, beside a run in which nothing happens. Numbers are
seconds: from the end of the first rank to that of the last one; where no rank ends, what looking at checkpoints and
choosing one took.

A run that is stopped loses nothing. One that is killed loses the steps since its last checkpoint, at most
`--save_steps`, or twice as many where that one was still being written, and computes them again; where that
checkpoint is damaged, those since the one before. With `--save_total_limit 1` there is no other one, and a run whose
only checkpoint is damaged does not start.

A save comes by these points, in this order: in_export (the model's own files), before_shard, mid_shard (DeepSpeed's
files, a rank's own), after_policy and after_value (those of an engine), after_shards, in_seal (checksums and flushing
to the disk), before_manifest, after_manifest, before_rename, after_commit (the folder has its name), in_rotation (an
older one is removed).
"""
# Title -> (kind, what a fault of this table looks like: groups `row` and `column`). What fits none is listed as it is.
TABLES = {
    "Whole runs of the command, a rank killed in their second save": (
        "kill",
        r"(?P<row>\w+ ZeRO-\d \w+): (?P<column>rank \d) killed at (?P<point>\w+)",
    ),
    "Two engines, an actor's and a critic's, a rank killed in the second save": (
        "kill",
        r"(?P<column>rank \d) killed at (?P<row>\w+), (?P<point>ZeRO-\d)",
    ),
    "A file of a checkpoint damaged": (
        "corruption",
        r"(?P<column>flip|halve|zero|empty|unlink) (?P<row>\S+)(?P<point>)",
    ),
}


def table(rows: list[tuple[re.Match[str], Row]]) -> str:
    """Lines of a table of seconds, of faults that all ended in one way, but for those where a cell says another."""
    usual, _ = Counter(str(row["happens"]) for _, row in rows).most_common(1)[0]
    cells: dict[str, dict[str, str]] = {}
    for match, row in rows:
        other = "" if row["happens"] == usual else f", {row['happens']}"
        column = f"{match['column']} {match['point']}".strip()
        cells.setdefault(match["row"], {})[column] = f"{float(row['seconds']):.2f}{other}"
    columns = sorted({column for found in cells.values() for column in found})
    lines = [f"{len(rows)} cases: {usual}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in sorted(cells):
        lines.append(f"| {name} | {' | '.join(cells[name].get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def page(rows: list[Row]) -> str:
    """The page: how many faults of each kind, a table for each group that is alike, and the others one by one."""
    counts = Counter(str(row["kind"]) for row in rows)
    latest = max(float(row["seconds"]) for row in rows)
    said = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(counts.items()))
    parts = [HEAD, f"\n{len(rows)} faults ({said}); the longest time is {latest:.1f} s.\n"]
    for title, (kind, pattern) in TABLES.items():
        fits = [
            (found, row) for row in rows if row["kind"] == kind if (found := re.fullmatch(pattern, str(row["fault"])))
        ]
        if fits:
            parts.append(f"\n## {title}\n\n{table(fits)}")
            rows = [row for row in rows if all(row is not other for _, other in fits)]
    if rows:
        ordered = sorted(rows, key=lambda row: (str(row["kind"]), str(row["fault"])))
        lines = [f"| {r['kind']} | {r['fault']} | {r['happens']} | {float(r['seconds']):.2f} |\n" for r in ordered]
        parts.append(
            "\n## The others\n\n| kind | fault | what happens | seconds |\n|---|---|---|---|\n" + "".join(lines)
        )
    return "".join(parts)


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])
    written.write_text(page([json.loads(line) for line in given.read_text(encoding="utf-8").splitlines()]))
