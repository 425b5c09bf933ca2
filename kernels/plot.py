"""An SVG of a benchmark's CSV: a bar for each operation from p20 to p80, its length p50, one block a pass.

python kernels/plot.py kernels/measured/h100-linear_logps.csv --where hidden=4096 > linear_logps.svg
"""

from __future__ import annotations

import argparse
import csv
import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROW, LABEL, BAR, NUMBER = 18, 210, 420, 90  # pixels: height of a row; widths of name, longest bar, number
OURS = ("linear_lo", "selective_logps", "dsalign")


def drawing(rows: Sequence[Mapping[str, str]]) -> str:
    """The SVG of rows with the columns op, pass, p20_ms, p50_ms, p80_ms; rows without a time are left out."""
    timed = [row for row in rows if row["p50_ms"] not in ("", "nan")]
    parts: list[str] = []
    y = ROW
    for name in dict.fromkeys(row["pass"] for row in timed):
        block = sorted((row for row in timed if row["pass"] == name), key=lambda row: float(row["p50_ms"]))
        longest = max(float(row["p80_ms"]) for row in block)
        parts.append(f'<text x="0" y="{y}" font-weight="bold">{html.escape(name)}, ms</text>')
        y += ROW // 2
        for row in block:
            low, middle, high = (float(row[f"p{p}_ms"]) / longest * BAR for p in (20, 50, 80))
            colour = "#2457a6" if row["op"].startswith(OURS) else "#b8bfc9"
            centre = y + ROW / 2
            parts += [
                f'<text x="{LABEL - 6}" y="{centre + 4}" text-anchor="end">{html.escape(row["op"])}</text>',
                f'<rect x="{LABEL}" y="{y + 3}" width="{middle:.1f}" height="{ROW - 6}" fill="{colour}"/>',
                f'<path d="M{LABEL + low:.1f} {centre}H{LABEL + high:.1f}" stroke="#222"/>',
                f'<text x="{LABEL + high + 6:.1f}" y="{centre + 4}">{float(row["p50_ms"]):.3g}</text>',
            ]
            y += ROW
        y += ROW
    width = LABEL + BAR + NUMBER
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>", ""])


def main() -> None:
    """Reads the CSV named, writes the SVG to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--where", nargs="*", default=[], help="column=value that a row must have")
    args = parser.parse_args()
    wanted = [one.partition("=")[::2] for one in args.where]
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(column) == value for column, value in wanted)]
    if not rows:
        sys.exit(f"{args.csv}: expected rows with {' '.join(args.where) or 'anything'}, found none")
    sys.stdout.write(drawing(rows))


if __name__ == "__main__":
    main()
