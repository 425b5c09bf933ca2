"""The folders of a run: its output folder, opened new or moved aside, and the checkpoints in it, found by name."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsalign.checkpoint import durable, folder_lock, manifest
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.config.schema import RunConfig
from dsalign.config.secrets import redacted

logger = logging.getLogger(__name__)
RUN_FILE = "run.json"
CONFIG, COMMANDS = "config.yaml", "command.txt"
ASIDE = "aside-"  # and a number: a folder of checkpoints that the run has turned back from
NEWEST = ("latest", "auto")  # values of --resume that name no folder


def new_folder(config: RunConfig, command: str) -> None:
    """Make the output folder, with config.yaml and command.txt; an earlier run's folder of that name is moved aside,
    also with --resume auto, where it has no checkpoint: nothing of it could be gone on with, and nothing is removed."""
    output_dir, models = Path(config.output.output_dir), config.models
    read = [models.model, models.ref_model, models.reward_model, *config.data.dataset, *config.data.val_dataset]
    if moved := move_aside(output_dir, read):
        what = "an earlier run:"
        if config.output.resume == "auto":
            what = "a run without a checkpoint, which begins again at step 0: what it left was"
        logger.warning("%s holds %s moved to %s", output_dir, what, moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    if moved:
        folder_lock.keep(moved, output_dir)
    config.to_yaml(output_dir / CONFIG)
    (output_dir / COMMANDS).write_text(redacted(command) + "\n")


def record(config: RunConfig, command: str, step: int, changes: Sequence[str]) -> None:
    """Note in a run's folder that it goes on: the command becomes a further line of command.txt. Where config.yaml
    would read differently it is written anew, with `changes` and the step from which they hold above it; the one before
    stays as config.1.yaml, the next as config.2.yaml."""
    output_dir = Path(config.output.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / COMMANDS).open("a", encoding="utf-8") as file:
        file.write(redacted(command) + "\n")
    current, staged = output_dir / CONFIG, output_dir / f".{CONFIG}"
    kept = config.model_copy(update={"output": config.output.model_copy(update={"resume": None})})
    heading = "".join(f"# {line}\n" for line in (f"from step {step + 1} on:", *changes))
    kept.to_yaml(staged, heading if changes else "")
    if current.exists() and _values(current) == _values(staged):
        staged.unlink()
        return
    if current.exists():
        number = next(n for n in itertools.count(1) if not (output_dir / f"config.{n}.yaml").exists())
        current.rename(output_dir / f"config.{number}.yaml")
    staged.rename(current)


def _values(path: Path) -> list[str]:
    """The lines of a config.yaml that set something."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("#", "resume:"))]


def run_of(output_dir: Path) -> str | None:
    """The identity of the run in an output folder, None where it has none yet.

    Raises ValueError where the file that holds it is damaged.
    """
    path = output_dir / RUN_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"output_dir: {path} cannot be read ({error}); the run knows its checkpoints by it: "
            "remove it, and resume with --trust_checkpoint true"
        ) from None


def begun_run(output_dir: Path) -> str:
    """The identity of the run in an output folder, which is given one if it has none. Raises as `run_of` does."""
    if (known := run_of(output_dir)) is not None:
        return known
    identity = uuid.uuid4().hex
    output_dir.mkdir(parents=True, exist_ok=True)
    durable.write_text(output_dir / RUN_FILE, json.dumps({"run": identity}) + "\n")
    return identity


def newest_first(output_dir: Path) -> list[Path]:
    """The folders checkpoint-N of an output folder, in the order in which they were written, the last one first.

    The manifest says the order, not the clock nor the step, which falls where a run went back. A folder whose manifest
    cannot be read is taken for one that came after those with fewer steps.
    """
    found = {step: path for path in output_dir.glob("checkpoint-*") if (step := step_of(path)) is not None}
    serials = {step: serial for step, path in found.items() if (serial := _serial(path)) is not None}

    def place(step: int) -> tuple[float, int]:
        before = max((serial for other, serial in serials.items() if other < step), default=0)
        return serials.get(step, before + 0.5), step

    return [found[step] for step in sorted(found, key=place, reverse=True)]


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder, None where it has another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def last_serial(output_dir: Path) -> int:
    """The highest serial number of the run's checkpoints, also of those that were set aside; 0 where there is none."""
    every = [*output_dir.glob("checkpoint-*"), *output_dir.glob(f"{ASIDE}*/checkpoint-*")]
    return max((serial for path in every if (serial := _serial(path)) is not None), default=0)


def _serial(folder: Path) -> int | None:
    try:
        return manifest.read(folder).serial
    except manifest.BrokenError:
        return None


def find(resume: str | None, output_dir: Path) -> list[Path]:
    """The checkpoint folders that the value of --resume names, the best first: a path is one, and `latest` and `auto`
    are those of `output_dir`, the last one written first. There is none for a new run: where --resume is not given, and
    with `auto` where there is no checkpoint.

    Raises ValueError where the path is no checkpoint, or `output_dir` has none.
    """
    if resume is None:
        return []
    if resume not in NEWEST:
        folder = Path(resume).expanduser()
        if not (folder / PROGRESS_FILE).exists() and not (folder / manifest.MANIFEST).exists():
            raise ValueError(f"resume: {resume} is no checkpoint folder (it has no {PROGRESS_FILE})")
        return [folder]
    found = newest_first(output_dir)
    if not found and resume == "auto":
        return []
    if not found:
        raise ValueError(f"resume: no checkpoint-N in {output_dir}; leave --resume out to start a new run")
    return found


def kept(found: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """(folder, content of its PROGRESS_FILE) of the first checkpoint in which that can be read; None where none is.
    Whether it is whole is not looked at."""
    for folder in found:
        with suppress(OSError, ValueError):
            content = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return folder, content
    return None


def set_aside(output_dir: Path, step: int, resumed: Path) -> Path | None:
    """Move what came after a checkpoint out of the way of a run that goes on from it: it would write over it, and
    --resume would go back to it. Returns the folder that has it now, aside-1, aside-2, ... of the output folder, None
    where there was nothing.

    step: optimizer steps of the checkpoint, whose folder is `resumed`. Checkpoints of as many steps or more, and those
    that were written later, are moved, and final/ where it has more steps; metrics and samples are copied. Where
    `resumed` was set aside itself, it comes back.
    """
    serial = _serial(resumed) if resumed.resolve().is_relative_to(output_dir.resolve()) else None
    later = []
    for path in newest_first(output_dir):
        after = serial is not None and (_serial(path) or 0) > serial
        if path.resolve() != resumed.resolve() and (after or (step_of(path) or 0) >= step):
            later.append(path)
    with suppress(manifest.BrokenError):  # there is none, or it says nothing of its step
        later += [output_dir / "final"] if manifest.read(output_dir / "final").step > step else []
    aside = None
    if later:
        number = next(n for n in itertools.count(1) if not (output_dir / f"{ASIDE}{n}").exists())
        aside = output_dir / f"{ASIDE}{number}"
        aside.mkdir()
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (output_dir / name).exists():
                shutil.copy2(output_dir / name, aside / name)
        for path in later:
            path.rename(aside / path.name)
        names = ", ".join(path.name for path in later)
        logger.warning("going on from step %d: %s came later, kept in %s", step, names, aside)
    if serial is not None and resumed.resolve().parent != output_dir.resolve():
        resumed.rename(output_dir / resumed.name)
    return aside


def move_aside(output_dir: Path, inputs: Sequence[str | None]) -> Path | None:
    """Rename the folder of an earlier run to NAME.1, NAME.2, ...; returns its new path, or None where there was no run.

    Raises ValueError where one of `inputs` (paths or names) lies inside it, as it would be gone from its place.
    """
    if not (output_dir / "metrics.jsonl").exists():
        return None
    for name in inputs:
        if name and Path(name).expanduser().resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"output_dir: {output_dir} holds an earlier run that this one reads from ({name}); give another "
                "--output_dir"
            )
    number = next(n for n in itertools.count(1) if not output_dir.with_name(f"{output_dir.name}.{n}").exists())
    return output_dir.rename(output_dir.with_name(f"{output_dir.name}.{number}"))
