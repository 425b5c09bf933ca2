"""The command `dsalign stop RUN`: asks the process that writes to a run's folder to save, and to stop unless told
otherwise, by the files that it looks for there."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign import endings
from dsalign.checkpoint import folder_lock, run_folders
from dsalign.checkpoint.folder_lock import Owner
from dsalign.config import flags
from dsalign.guard.wishes import SAVE, STOP
from dsalign.verbs import arguments, runs

SUMMARY = "let a run save and stop, or with --save only save: dsalign stop RUN [--save] [--wait]"
USAGE = """usage: dsalign stop RUN [--save] [--wait [SECONDS]] [--json]

  RUN     the --output_dir of a run; dsalign ls lists them
  --save  save a checkpoint and go on
  --wait  return when it is done; with a number, after so many seconds at the latest
  --json  one JSON object on standard output in place of text

The run looks once a second, between two steps, and saves after the step that it is in. The exit code is 0, 2 where no
run goes on there, and 3 where the seconds of --wait are over."""
LOOK_S = 0.2  # between two looks
FLAGS = ("--save", "--wait", "--json")


@dataclass(frozen=True)
class Request:
    """A `dsalign stop` command, parsed. wish: the name of the file to write. wait: seconds, 0 = not, infinite = as
    long as it takes."""

    folder: Path
    wish: str
    wait: float
    as_json: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign stop ARGV` makes; None for a request of help.

    Raises ValueError for a flag that it does not have, a wrong number of seconds, and where not one run is named.
    """
    if "--help" in argv or "-h" in argv:
        return None
    own = arguments.parser("stop")
    own.add_argument("--save", action="store_true")
    own.add_argument("--json", action="store_true")
    words, wait = list(argv), 0.0
    if "--wait" in words:
        at = words.index("--wait")
        number = words[at + 1] if at + 1 < len(words) and words[at + 1].replace(".", "", 1).isdecimal() else None
        wait = float("inf") if number is None else float(number)
        del words[at : at + (1 if number is None else 2)]
    asked, rest = own.parse_known_args(words)
    if wrong := [word for word in rest if word.startswith("-")]:
        advice = flags.nearest(wrong[0], FLAGS) or "; see dsalign stop --help"
        raise ValueError(f"stop: expected {', '.join(FLAGS)}, got {wrong[0]!r}{advice}")
    if len(rest) != 1:
        raise ValueError(f"stop: expected one folder of a run, got {len(rest)}; dsalign ls lists runs")
    return Request(Path(rest[0]).expanduser(), SAVE if asked.save else STOP, wait, asked.json)


def run(request: Request | None) -> int:
    """Write the wish and, if so asked, wait for it; None prints the usage. Returns the exit code: 0, or 3 where the
    time is over and the run goes on.

    Raises ValueError where there is no such run, nothing writes to it, or the wish cannot be written.
    """
    if request is None:
        print(USAGE)
        return endings.DONE
    folder = _folder(request.folder)
    owner = folder_lock.owner(folder)
    if owner is None:
        state = runs.read(folder)
        onward = state.next_command()
        raise ValueError(
            f"stop: expected a run that goes on in {folder}, got one that does not: it is {state.state}"
            + (f" at step {state.step}" if state.step is not None else "")
            + (f"; to go on with it: {onward}" if onward else "; nothing is left to stop")
        )
    before = {one.name for one in run_folders.newest_first(folder)}
    try:
        (folder / request.wish).touch()
    except OSError as error:
        raise ValueError(
            f"stop: expected to write {folder / request.wish}, got {error.strerror}; as a user who may, send SIGTERM "
            f"to {owner.text()}"
        ) from None
    verb = "saves and stops" if request.wish == STOP else "saves and goes on"
    said = f"{folder}: {owner.text()} was asked; it {verb} after its step"
    if not request.wait:
        return _tell(request, owner, "asked", None, said)
    if not request.as_json:
        print(said, flush=True)
    until = time.monotonic() + request.wait
    while not _done(folder, request.wish, owner):
        if time.monotonic() >= until:
            _tell(request, owner, "waiting", None, f"{folder}: not done after {request.wait:g} s; it is still asked")
            return endings.FAULT
        time.sleep(LOOK_S)
    return _after(request, folder, owner, before)


def _folder(given: Path) -> Path:
    """The run's folder for what the user named, which may be one of its checkpoints.

    Raises ValueError where it is no run's.
    """
    folder = given.parent if run_folders.step_of(given) is not None else given
    if folder.is_dir() and runs.is_run([path.name for path in folder.iterdir()]):
        return folder
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    what = "which has no run in it" if folder.is_dir() else "which is no folder"
    advice = flags.nearest(folder.name, there) if not folder.is_dir() else ""
    raise ValueError(
        f"stop: expected the folder of a run, its --output_dir, got {given}, {what}"
        f"{advice or '; dsalign ls lists runs'}"
    )


def _done(folder: Path, wish: str, owner: Owner) -> bool:
    """Whether a wish is fulfilled: for a stop the process is gone, for a save it has taken the file away and its
    checkpoint is there."""
    now = folder_lock.owner(folder)
    if now is None or (now.pid, now.host) != (owner.pid, owner.host):
        return True
    half = any(folder.glob(".*checkpoint-*"))  # one that is being written has a name that begins with a dot
    return wish == SAVE and not (folder / SAVE).exists() and not half


def _after(request: Request, folder: Path, owner: Owner, before: set[str]) -> int:
    """Say what became of a run that was waited for, and remove a wish that nobody read."""
    gone = folder_lock.owner(folder) is None
    if gone:  # one that ended by itself has read no wish, which would stop the next run at once
        (folder / request.wish).unlink(missing_ok=True)
    state = runs.read(folder)
    kept = state.whole[0] if state.whole else None
    if kept is None:
        text = f"{folder}: {'it has left' if gone else 'it goes on'}, and saved no checkpoint"
    else:
        new = "saved at step" if kept.name not in before else "saved before, at step"
        of = "" if state.total is None else f" of {state.total}"
        text = f"{folder}: {'it has left' if gone else 'it goes on'}, {new} {kept.step}{of} in {folder / kept.name}"
    onward = state.next_command() if gone else ""
    text += f", {state.state}" if gone and state.state != runs.STOPPED else ""
    return _tell(request, owner, state.state, kept.step if kept else None, text, onward)


def _tell(request: Request, owner: Owner, state: str, step: int | None, text: str, onward: str = "") -> int:
    """Print the answer; returns exit code 0. state: of the run, or asked or waiting. step: of the newest checkpoint."""
    if request.as_json:
        answer: dict[str, Any] = {"run": str(request.folder), "pid": owner.pid, "host": owner.host, "state": state}
        print(json.dumps({**answer, "saved_step": step, "next": onward}))
    else:
        print(text + (f"\n{onward}" if onward else ""))
    return endings.DONE
