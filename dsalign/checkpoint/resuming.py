"""What is checked when a run is resumed, as early as it is known: options before torch is imported, data and models
before weights are loaded. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsalign.checkpoint import fingerprint, run_folders
from dsalign.config.parse import ConfigError
from dsalign.config.schema import RunConfig


def check_options(config: RunConfig, ranks: int) -> None:
    """Compare the options of a run that --resume continues with those of its checkpoint; nothing else is read.

    ranks: their number. Raises ConfigError where an option differs that may not, as `fingerprint.compare` says it.
    """
    mine = {"options": fingerprint.options(config), "global_batch": config.global_batch(ranks)}
    try:
        check(config, mine)
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def check(config: RunConfig, mine: dict[str, Any]) -> None:
    """Compare settings of a run that --resume continues with those of its checkpoint; nothing happens for a new run.

    mine: some of `fingerprint.settings`. A checkpoint that cannot be read is passed over: loading it says so.
    Raises ValueError as `fingerprint.compare` and `run_folders.find` do.
    """
    read = run_folders.kept(run_folders.find(config.output.resume, Path(config.output.output_dir)))
    if read is None:
        return
    folder, content = read
    fingerprint.compare(content.get("fingerprint", {}), mine, folder)


def day(config: RunConfig) -> str:
    """The day that templates wrote in the run that --resume continues, "" for a new run, or where none is known."""
    read = run_folders.kept(run_folders.find(config.output.resume, Path(config.output.output_dir)))
    return str(read[1].get("fingerprint", {}).get("day", "")) if read is not None else ""
