"""The runs below a folder and the state of each, read from what they wrote. `ls` and `stop` use it. Imports no
torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dsalign import algos
from dsalign.checkpoint import folder_lock, manifest, run_folders
from dsalign.checkpoint.folder_lock import Owner
from dsalign.config.secrets import redacted
from dsalign.report import events
from dsalign.report.events import BEGIN, END, EVENTS
from dsalign.report.history import METRICS

FINAL = "final"
MARKED = tuple(f'"{kind}"'.encode() for kind in (BEGIN, END))  # in lines of events.jsonl that are parsed
MARKS = (run_folders.CONFIG, METRICS, run_folders.RUN_FILE, folder_lock.LOCK)  # a folder with one of them is a run's
PARTS = re.compile(r"checkpoint-.*|aside-\d+|final|bad|crash|rollout.*|\..*|__pycache__")  # folders inside a run
TAIL, LINES = 1 << 16, 20  # bytes and lines at the end of metrics.jsonl, of which one has the last loss
SHOWN = (("objective/scores", "reward"), ("loss", "loss"), ("eval/loss", "eval loss"))
RUNNING, ELSEWHERE, DONE, STOPPED, DIVERGED, CRASHED, NEVER = (
    "running", "elsewhere", "done", "stopped", "diverged", "crashed", "never began",
)  # fmt: skip
ENDED = {
    events.DONE: DONE, events.STOPPED: STOPPED, events.DIVERGED: DIVERGED, events.INTERRUPTED: STOPPED,
    events.FAILED: CRASHED,
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """A checkpoint of a run. fault: what is wrong with it, empty where it is as it was written."""

    name: str
    step: int
    fault: str


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    algo, model: empty where config.yaml does not say. state: one of the words above. owner: the process that writes
    there. step, total: optimizer steps taken and of the run, None = not known. last: (what, value) of the last log
    line. best: (step, lowest eval/loss). size: bytes on disk. written: when it last wrote, seconds since 1970.
    checkpoints: the last one written first.
    """

    folder: Path
    algo: str
    model: str
    state: str
    owner: Owner | None
    step: int | None
    total: int | None
    last: tuple[str, float] | None
    best: tuple[int, float] | None
    size: int
    written: float
    checkpoints: tuple[Kept, ...]
    command: str

    @property
    def whole(self) -> list[Kept]:
        """The checkpoints that nothing is wrong with, the last one written first."""
        return [one for one in self.checkpoints if not one.fault]

    def next_command(self) -> str:
        """The command that goes on with the run: stop it, resume it, or start it again; empty where it is done."""
        folder = shlex.quote(str(self.folder))
        if self.state == RUNNING:
            return f"dsalign stop {folder}"
        if self.state in (DONE, ELSEWHERE):
            return ""
        begins = not self.checkpoints and (self.folder / run_folders.CONFIG).is_file()
        return f"dsalign resume {folder}" if self.whole or begins else self.command

    def as_json(self, now: float) -> dict[str, Any]:
        """The run as an object for JSON. now: seconds since 1970, from which its age counts."""
        return {
            "run": str(self.folder),
            "algorithm": self.algo,
            "model": self.model,
            "state": self.state,
            "process": None if self.owner is None else {"pid": self.owner.pid, "host": self.owner.host},
            "step": self.step,
            "total_steps": self.total,
            "last": None if self.last is None else {self.last[0]: self.last[1]},
            "best": None if self.best is None else {"step": self.best[0], "eval/loss": self.best[1]},
            "bytes": self.size,
            "age_s": round(now - self.written, 1),
            "checkpoints": [{"name": one.name, "step": one.step, "fault": one.fault} for one in self.checkpoints],
            "next": self.next_command(),
        }


def below(root: Path) -> Iterator[Path]:
    """The folders of runs in and below `root`, by name. Links are not followed, and what a run's folder holds of its
    own is not looked into."""
    for path, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not PARTS.fullmatch(name))
        if is_run(files):
            yield Path(path)


def is_run(files: list[str]) -> bool:
    """Whether a folder with these files is a run's. config.yaml alone, as in a folder of recipes, makes none."""
    there = set(files)
    return bool(there.intersection(MARKS[1:])) or {run_folders.CONFIG, run_folders.COMMANDS} <= there


def read(folder: Path, *, whole: bool = False) -> Run:
    """The run in a folder. whole: whether checkpoints are read and hashed, in place of a look at their sizes."""
    options = _options(folder / run_folders.CONFIG)
    found = run_folders.newest_first(folder)
    kept = tuple(_kept(one, whole=whole) for one in found)
    logged = last_lines(folder / METRICS)
    begin, end = _events(folder / EVENTS)
    final = _final(folder / FINAL)
    steps = [one["step"] for one in logged] + [one.step for one in kept] + [end.get("step"), final]
    step = max((int(one) for one in steps if isinstance(one, (int, float))), default=None)
    owner = folder_lock.owner(folder)
    state = _state(folder, owner, step, final, end, kept, bool(begin))
    size, written = _size(folder)
    commands = _text(folder / run_folders.COMMANDS).splitlines()
    return Run(
        folder,
        str(options.get("algo") or ""),
        str(options.get("model") or ""),
        state,
        owner,
        step,
        step if state == DONE else _total(found, options, begin),
        _last(logged),
        _best(folder / METRICS),
        size,
        written,
        kept,
        redacted(commands[-1]) if commands else "",
    )


def _state(
    folder: Path,
    owner: Owner | None,
    step: int | None,
    final: int | None,
    end: Mapping[str, Any],
    kept: tuple[Kept, ...],
    begun: bool,
) -> str:
    """The state of a run. step: its last, as far as one was written down. final: that of final/, -1 where that does not
    say. end: the event of its end; begun: whether that of its beginning is there. Without events a run that wrote a
    checkpoint after its last step was stopped."""
    if owner is not None:
        return RUNNING if owner.here else ELSEWHERE
    if end:
        return ENDED.get(str(end.get("how")), CRASHED)
    if begun:  # and killed, or it would have noted its end
        return CRASHED
    if final is not None and (final < 0 or final == step):
        return DONE
    if step is None:
        return CRASHED if (folder / "crash").is_dir() else NEVER
    bad = sorted(int(path.name[5:]) for path in (folder / "bad").glob("step-*") if path.name[5:].isdecimal())
    if bad and bad[-1] > step and not (folder / "crash").is_dir():
        return DIVERGED
    return STOPPED if kept and kept[0].step == step else CRASHED


def _kept(path: Path, *, whole: bool) -> Kept:
    try:
        listed = manifest.read(path)
    except manifest.BrokenError as error:
        return Kept(path.name, run_folders.step_of(path) or 0, str(error))
    faults = filter(None, (manifest.fault_of(path, name, one, whole=whole) for name, one in listed.files.items()))
    return Kept(path.name, run_folders.step_of(path) or 0, next(faults, ""))


def _final(folder: Path) -> int | None:
    """The step of final/, -1 where it does not say, None where there is none."""
    if not folder.is_dir():
        return None
    try:
        return manifest.read(folder).step
    except manifest.BrokenError:
        return -1


def _options(path: Path) -> Mapping[str, Any]:
    """The values of algo, model and max_steps in a config.yaml. It has a line an option, and YAML reads three of them
    alone, as all of them take 20 times as long."""
    lines = re.findall(r"^(?:algo|model|max_steps):.*$", _text(path), re.MULTILINE)
    with suppress(yaml.YAMLError):
        found = yaml.safe_load("\n".join(lines))
        return found if isinstance(found, dict) else {}
    return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _objects(lines: Iterator[bytes] | list[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of lines of JSON; a line that a kill broke off is passed over."""
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl, as objects with a step."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[-LINES:]
            return [one for one in _objects(lines) if isinstance(one.get("step"), (int, float))]
    except OSError:
        return []


def _last(logged: list[dict[str, Any]]) -> tuple[str, float] | None:
    for name, said in SHOWN:
        for one in reversed(logged):
            if isinstance(one.get(name), (int, float)):
                return said, float(one[name])
    return None


def _best(path: Path) -> tuple[int, float] | None:
    """(step, loss) of the lowest eval/loss of metrics.jsonl."""
    best: tuple[float, int] | None = None
    with suppress(OSError), path.open("rb") as file:
        for one in _objects(line for line in file if b'"eval/loss"' in line):
            loss, step = one.get("eval/loss"), one.get("step")
            if isinstance(loss, (int, float)) and isinstance(step, (int, float)) and loss == loss:
                best = min(best or (float(loss), int(step)), (float(loss), int(step)))
    return None if best is None else (best[1], best[0])


def _events(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the last beginning, the end that came after it) among a run's events; empty where there is none."""
    begin: Mapping[str, Any] = {}
    end: Mapping[str, Any] = {}
    with suppress(OSError), path.open("rb") as file:
        for one in _objects(line for line in file if any(mark in line for mark in MARKED)):
            if one.get("kind") == BEGIN:
                begin, end = one, {}
            elif one.get("kind") == END:
                end = one
    return begin, end


def _total(found: list[Path], options: Mapping[str, Any], begin: Mapping[str, Any]) -> int | None:
    """The steps of a whole run: as it said when it began, else as its checkpoints have it, else as its options have.
    found: the folders of its checkpoints."""
    if isinstance(begin.get("total"), int):
        return int(begin["total"])
    read = run_folders.kept(found)
    kept = read[1].get("fingerprint", {}) if read else {}
    batches, most = kept.get("batches"), options.get("max_steps")
    if not isinstance(batches, int):
        return most if isinstance(most, int) else None
    total = batches * _passes(str(options.get("algo")), kept.get("options", {}))
    return min(total, most) if isinstance(most, int) else total


def _passes(algo: str, kept: Mapping[str, str]) -> int:
    """The optimizer steps that a run takes on each batch. kept: its options as its checkpoint has them, YAML each."""
    with suppress(ValueError, TypeError, yaml.YAMLError):
        of = algos.load(algo)
        own = {one.name: yaml.safe_load(kept[one.name]) for one in fields(of) if one.name in kept}
        return int(of(**{name: tuple(x) if isinstance(x, list) else x for name, x in own.items()}).traits.passes)
    return 1


def _size(folder: Path) -> tuple[int, float]:
    """(bytes of all files, when one of the folder's own was last written) of a run; links count as nothing."""
    total, last = 0, 0.0
    for path, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                found = os.lstat(os.path.join(path, name))
                total += found.st_size
                last = max(last, found.st_mtime)
    return total, last or time.time()
