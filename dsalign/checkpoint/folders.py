"""The folders of a run: its output folder, opened new or moved aside, and the checkpoints in it, found by name."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from dsalign.checkpoint import folder_lock
from dsalign.config.rules import PROGRESS_FILE
from dsalign.config.schema import RunConfig
from dsalign.config.secrets import redacted

logger = logging.getLogger(__name__)


def new_folder(config: RunConfig, command: str) -> None:
    """Make the output folder, with config.yaml and command.txt; an earlier run's folder of that name is moved aside."""
    output_dir, models = Path(config.output.output_dir), config.models
    read = [models.model, models.ref_model, models.reward_model, *config.data.dataset, *config.data.val_dataset]
    if moved := move_aside(output_dir, read):
        logger.warning("%s holds an earlier run: moved to %s", output_dir, moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    if moved:
        folder_lock.keep(moved, output_dir)
    config.to_yaml(output_dir / "config.yaml")
    (output_dir / "command.txt").write_text(redacted(command) + "\n")


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder of each whole checkpoint in an output folder."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output_dir.glob("checkpoint-*"))
    return {int(m[1]): output_dir / m[0] for m in found if m and (output_dir / m[0] / PROGRESS_FILE).exists()}


def find(resume: str, output_dir: Path) -> Path:
    """The checkpoint folder that the value of --resume names: a path, or `latest` for the newest in `output_dir`.

    Raises ValueError where the path is no checkpoint, or `output_dir` has none.
    """
    if resume != "latest":
        folder = Path(resume).expanduser()
        if not (folder / PROGRESS_FILE).exists():
            raise ValueError(f"resume: {resume} is no checkpoint folder (it has no {PROGRESS_FILE})")
        return folder
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume: no checkpoint-N in {output_dir}; leave --resume out to start a new run")
    return found[max(found)]


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
