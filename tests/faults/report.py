"""docs/reliability.md from the rows that the tests of tests/faults keep: python tests/faults/report.py ROWS PAGE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """# Reliability

What happens where something breaks, as `make test-faults` finds it, which writes this page. Two ranks; "equal" is every
weight and both moments of the optimizer, to the last bit, beside a run in which nothing happens. Seconds: from the end
of the first rank to that of the last one; where no rank ends, what looking at checkpoints and choosing one took.

A run that is stopped loses nothing. One that is killed loses the steps since its last checkpoint, at most
`--save_steps`, and computes them again; where that checkpoint is damaged, those since the one before. With
`--save_total_limit 1` there is no other one, and a run whose only checkpoint is damaged does not start.

| kind | fault | what happens | seconds |
|---|---|---|---|
"""


def page(rows: list[dict[str, str | float]]) -> str:
    """The page with a line for each row, by kind and fault."""
    ordered = sorted(rows, key=lambda row: (str(row["kind"]), str(row["fault"])))
    lines = [f"| {r['kind']} | {r['fault']} | {r['happens']} | {float(r['seconds']):.2f} |\n" for r in ordered]
    return HEAD + "".join(lines)


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])
    written.write_text(page([json.loads(line) for line in given.read_text(encoding="utf-8").splitlines()]))
