"""From the files that the parts of `on_gpu.py` leave to rows of one table: what ran, what it took, of what limit."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# value: a time or a rate, in its unit. of_limit: the share of what matrix products, copies or memory allow, where the
# part measured that. peak_mib: memory beyond inputs; of a training run all that torch allocates.
COLUMNS = ("part", "case", "way", "value", "unit", "of_limit", "peak_mib")
MEASURED = ("error", "p20_ms", "p50_ms", "p80_ms", "products", "ceiling", "peak_mb")  # columns of kernel benchmarks
OUTCOME = re.compile(r"^tests/.* (PASSED|FAILED|ERROR|SKIPPED)\s+\[", re.MULTILINE)  # a line of `pytest -vv`

Row = dict[str, Any]


def row(case: str, way: str, value: float | str, unit: str, of_limit: float | str = "", peak: float | str = "") -> Row:
    """One measurement, part left open."""
    return {"case": case, "way": way, "value": value, "unit": unit, "of_limit": of_limit, "peak_mib": peak}


def kernel_rows(folder: Path) -> Iterator[Row]:
    """The rows of a kernel benchmark's rows.csv: medians; the case is every column between the name and the numbers."""
    for one in _csv(folder / "rows.csv"):
        names = list(one)
        shape = [name for name in names[1 : names.index("error")] if name not in MEASURED]
        more = [name for name in names[names.index("peak_mb") + 1 :] if name in ("pairs", "completions", "tokens")]
        case = " ".join(one[name] if name in ("pass", "dtype") else f"{name} {one[name]}" for name in shape + more)
        limit = float(one.get("ceiling") or "nan")
        yield row(case, one["op"], float(one["p50_ms"]), "ms", limit, float(one["peak_mb"]))


def rollout_rows(folder: Path) -> Iterator[Row]:
    """The rows of `compare_rollouts.py`'s results.jsonl, a failed way or check among them; behind every other way how
    many times its rate that of `local` is, which comes first."""
    lines = _jsonl(folder / "results.jsonl")
    about, local = next(lines, {}), 0.0
    for one in lines:
        case = f"{about['model']} {about['dtype']} {one['set']}"
        if "failed" in one:
            yield row(case, one["way"], "failed", one["failed"].splitlines()[0][:80])
        elif "checked" in one:
            yield row(case, "check", max(one["logp_gap"].values()), "nats, gap of log-probabilities")
        elif "bandwidth" in one:
            yield row(case, "copy of memory", one["bandwidth"] / 1e9, "GB/s")
        elif "tokens_per_wall_s" in one:
            yield row(case, one["way"], one["tokens_per_wall_s"], "tokens/s", one["of_limit"], 1024 * one["peak_gib"])
            if one["way"] == "local":
                local = one["tokens_per_wall_s"]
            elif local:
                yield row(case, f"local / {one['way']}", local / one["tokens_per_wall_s"], "times")


def preference_training_rows(folder: Path) -> Iterator[Row]:
    """The rows of `compare_trl.py`'s costs.csv: seconds a step of each side."""
    for one in _csv(folder / "costs.csv"):
        case = f"{one['algo']} {one['set']}"
        yield row(case, one["side"], float(one["step_wall_s"]), "s/step", "", _peak(one))


def ppo_rows(folder: Path) -> Iterator[Row]:
    """The rows of `compare_ppo.py`'s results.jsonl: seconds an iteration of each side."""
    for one in itertools.islice(_jsonl(folder / "results.jsonl"), 1, None):
        yield row(f"ppo {one['setting']}", one["side"], one["wall_s"], "s/iteration", one["of_limit"], _peak(one))


def test_counts(folder: Path) -> Iterator[Row]:
    """How many tests ended how, by the log of `pytest -vv`, which also a run that was stopped leaves."""
    ends = [found[1] for found in OUTCOME.finditer((folder / "log.txt").read_text(errors="replace"))]
    for outcome in dict.fromkeys(ends):
        yield row("kernels", outcome.lower(), ends.count(outcome), "tests")


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "kernel": kernel_rows,
    "rollouts": rollout_rows,
    "training": preference_training_rows,
    "ppo": ppo_rows,
    "tests": test_counts,
}


def rows_of(part: str, kind: str, folder: Path) -> list[Row]:
    """The rows of a part from its folder, as far as it came: none where it left no file, or half a line of one."""
    found: list[Row] = []
    try:
        for one in READERS[kind](folder):
            found.append({"part": part, **one})
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return found


def table(rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> str:
    """Rows in aligned columns."""
    cells = [list(columns), *([_cell(one.get(column, "")) for column in columns] for one in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _peak(one: Mapping[str, Any]) -> float:
    """MiB that torch allocated on the GPU, or where there is none the largest resident set."""
    return 1024 * (float(one["device_peak_gib"]) or float(one["peak_gib"]))


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """A line at a time, as the last one may be half."""
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
