"""The command `dsalign bench`: the benchmarks of the kernels, where a checkout has them, and a few steps of a training,
each in a process of its own."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsalign import endings
from dsalign.config import flags
from dsalign.report.history import METRICS
from dsalign.verbs import arguments, runs

SUMMARY = "how fast the kernels and a training step are here: dsalign bench [NAME ...]"
USAGE = """usage: dsalign bench [NAME ...] [--list] [--seconds N] [--json] [-- options of a run]

  NAME         what to measure: step, or a benchmark of the kernels; without a name all of them
  --list       only say which there are
  --seconds N  give each so long at most [600]
  --json       one JSON object on standard output in place of text

The benchmarks of the kernels lie in kernels/ of a checkout; a wheel has them not. `step` trains a few steps on demo
rows and takes their median; behind -- options of a run, such as -- --model output/sft/final --algo dpo.
The exit code is 0, or 3 where a benchmark fails or is not done in time."""
ROOT = Path(__file__).resolve().parent.parent.parent
STEP, STEPS, WARM = "step", 8, 3  # name of the training benchmark, its steps, those at its start that are left out
FLAGS = ("--list", "--seconds", "--json")
CLI = Path(__file__).resolve().parent.parent / "cli.py"


@dataclass(frozen=True)
class Request:
    """A `dsalign bench` command, parsed. names: what is measured. options: of the run that `step` starts."""

    names: tuple[str, ...]
    only_list: bool
    seconds: float
    as_json: bool
    options: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What became of a benchmark. state: done, failed, late or missing. said: its output, or why it has no rows."""

    name: str
    state: str
    said: str
    rows: list[dict[str, str | float]] = field(default_factory=list)


def files(root: Path = ROOT) -> dict[str, Path]:
    """Name -> file of each benchmark of the kernels; empty outside a checkout."""
    return {path.stem.removeprefix("bench_"): path for path in sorted((root / "kernels").glob("bench_*.py"))}


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign bench ARGV` makes; None for a request of help. Raises ValueError for an unknown name
    or a wrong number."""
    words = list(argv)
    options = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    if "--help" in words or "-h" in words:
        return None
    own = arguments.parser("bench")
    own.add_argument("--json", action="store_true")
    own.add_argument("--list", action="store_true")
    own.add_argument("--seconds", default="600")
    asked, names = own.parse_known_args(words)
    if not asked.seconds.isdecimal() or int(asked.seconds) < 1:
        raise ValueError(f"--seconds: expected a whole number >= 1, got {asked.seconds!r}; write --seconds 600")
    known = [STEP, *files()]
    for name in names:
        if name not in known:
            choices = FLAGS if name.startswith("-") else known
            advice = flags.nearest(name, choices) or "; dsalign bench --list says which there are"
            raise ValueError(f"bench: expected one of {', '.join(choices)}, got {name!r}{advice}")
    return Request(tuple(names or known), asked.list, float(asked.seconds), asked.json, tuple(options))


def run(request: Request | None) -> int:
    """Measure and print; None prints the usage. Returns the exit code: 0, or 3 where a benchmark fails."""
    if request is None:
        print(USAGE)
        return endings.DONE
    there = files()
    lacking = [] if there else [Result("kernels", "missing", f"no kernels/bench_*.py in {ROOT}: measure in a checkout")]
    if request.only_list:
        listed = {STEP: "a training", **{name: str(path) for name, path in there.items()}}
        print(
            json.dumps(listed) if request.as_json else "\n".join(f"{name:20} {what}" for name, what in listed.items())
        )
        return endings.DONE
    results = list(lacking)
    for one in lacking if not request.as_json else []:
        print(f"{one.name}: {one.state}: {one.said}")
    for name in request.names:
        result = _step(request) if name == STEP else _kernel(name, there[name], request.seconds)
        results.append(result)
        if not request.as_json:
            print(f"-- {name}: {result.state}\n{result.said}", flush=True)
    if request.as_json:
        print(json.dumps({"results": [asdict(one) for one in results]}))
    return endings.DONE if all(one.state in ("done", "missing") for one in results) else endings.FAULT


def _kernel(name: str, path: Path, seconds: float) -> Result:
    with tempfile.TemporaryDirectory(prefix="dsalign-bench-") as folder:
        table = Path(folder) / "rows.csv"
        state, said = _started([sys.executable, str(path), "--csv", str(table)], seconds)
        rows = list(csv.DictReader(table.open(encoding="utf-8", newline=""))) if table.exists() else []
    return Result(name, state, said, [{key: value for key, value in row.items() if value} for row in rows])


def _step(request: Request) -> Result:
    with tempfile.TemporaryDirectory(prefix="dsalign-bench-") as folder:
        out = Path(folder) / "run"
        own = ["--algo", "sft"] if "--algo" not in request.options else []
        words = [
            "--max_steps",
            str(STEPS),
            "--num_train_epochs",
            "100",
            "--logging_steps",
            "1",
            "--output_dir",
            str(out),
        ]
        command = [sys.executable, str(CLI), *own, *request.options, *words]
        state, said = _started(command, request.seconds)
        logged = runs.last_lines(out / METRICS)
    rates = [float(one["tokens_per_s"]) for one in logged if one["step"] > WARM and one.get("tokens_per_s")]
    if state != "done" or not rates:
        return Result(STEP, state if state != "done" else "failed", said)
    rate = statistics.median(rates)
    text = f"{rate:,.0f} tokens/s, the median of steps {WARM + 1} to {STEPS}; {min(rates):,.0f} to {max(rates):,.0f}"
    return Result(STEP, state, text, [{"tokens_per_s": rate, "steps": len(rates)}])


def _started(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """(done, failed or late; what it printed, or the end of its error) of a process."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "late", f"not done after {seconds:g} s; give more with --seconds"
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        return "failed", f"exit code {done.returncode}: {last}"
    return "done", done.stdout.strip()
