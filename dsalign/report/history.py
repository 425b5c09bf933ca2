"""A run's folder read back: numbers, samples, events and settings, as far as they are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsalign.config.secrets import HIDDEN, redacted
from dsalign.report.events import BEGIN, END, EVENTS, WARNING
from dsalign.report.metric_names import EVAL

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class History:
    """The record of one run.

    series: metric -> [(step, value), ...] by step. samples: rows of samples.jsonl. settings: option -> value.
    command: as it was given. events: those of events.jsonl, in order. checkpoints: steps of checkpoint-N. has_final:
    whether final/ is there. written: when metrics.jsonl was last written, seconds since 1970.
    """

    folder: Path
    series: Mapping[str, Points]
    samples: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    command: str
    events: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[int]
    has_final: bool
    written: float

    @property
    def begin(self) -> Mapping[str, Any]:
        """The last beginning, as a resumed run has several; empty where none was noted."""
        return next((e for e in reversed(self.events) if e.get("kind") == BEGIN), {})

    @property
    def end(self) -> Mapping[str, Any]:
        """The end that came behind the last beginning; empty where the run was killed or still goes on."""
        ends = (e for e in reversed(self.events) if e.get("kind") in (BEGIN, END))
        last: Mapping[str, Any] = next(ends, {})
        return last if last.get("kind") == END else {}

    @property
    def warnings(self) -> list[Mapping[str, Any]]:
        """The warnings of the run in order, each text once."""
        texts = {str(e.get("text")): e for e in reversed(self.events) if e.get("kind") == WARNING}
        return list(reversed(texts.values()))

    @property
    def step(self) -> int:
        """The last step that is known: of a logged number or of the end."""
        logged = max((points[-1][0] for points in self.series.values()), default=0)
        return int(max(logged, self.end.get("step", 0)))

    @property
    def seconds(self) -> float:
        """How long the run took over all its beginnings, seconds; one that was killed counts to its last line."""
        total, since = 0.0, None
        for event in self.events:
            if event.get("kind") == BEGIN:
                since = event["time"]
            elif event.get("kind") == END and since is not None:
                total, since = total + event["time"] - since, None
        return total + (max(0.0, self.written - since) if since is not None else 0.0)

    @property
    def memory(self) -> dict[str, float]:
        """What of the run's memory was measured, in GiB: "peak", the most that a rank held, and by role what one rank
        held more once that role's model was loaded; empty where nothing was."""
        peak = self.series.get("memory/peak", [])
        found = {"peak": peak[-1][1]} if peak else {}
        by_role = self.begin.get("memory")
        return found | (dict(by_role) if isinstance(by_role, Mapping) else {})

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest loss on held-out rows; None where none was measured."""
        points = [(value, step) for step, value in self.series.get(f"{EVAL}loss", []) if value == value]
        value, step = min(points, default=(0.0, -1.0))
        return (int(step), value) if step >= 0 else None


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; none where it is missing. A line that a kill broke off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def read_metrics(path: Path) -> dict[str, Points]:
    """Metric -> [(step, value), ...] from a metrics.jsonl, by step. A step that stands there twice, as a resumed run's
    may, counts with its last value."""
    found: dict[str, dict[float, float]] = {}
    for record in lines(path):
        step = record.pop("step", None)
        if isinstance(step, (int, float)):
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    found.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def read(folder: Path) -> History:
    """The history of the run in `folder`.

    Raises ValueError where it is no run's folder.
    """
    metrics = folder / METRICS
    if not metrics.exists() and not (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder}: expected the output folder of a run (with {METRICS} and config.yaml), got "
            f"{'a folder without them' if folder.is_dir() else 'no such folder'}; name the run's --output_dir"
        )
    config, command = folder / "config.yaml", folder / "command.txt"
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = {}
    steps = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return History(
        folder,
        read_metrics(metrics),
        [one for one in lines(folder / SAMPLES) if "completion" in one],
        {str(k): _shown(v) for k, v in settings.items()} if isinstance(settings, dict) else {},
        redacted(command.read_text(encoding="utf-8", errors="replace").strip()) if command.exists() else "",
        list(lines(folder / EVENTS)),
        sorted(int(step[1]) for step in steps if step),
        (folder / "final").is_dir(),
        metrics.stat().st_mtime if metrics.exists() else 0.0,
    )


def _shown(value: Any) -> Any:
    """A setting without a secret; one that was left out when it was written reads as a list in YAML."""
    if value == [HIDDEN.strip("[]")]:
        return HIDDEN
    return redacted(value) if isinstance(value, str) else value
