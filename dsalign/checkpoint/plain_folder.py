"""A new folder of one process that appears whole or not at all, for what is made of a run after it ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from dsalign.checkpoint import durable
from dsalign.checkpoint.staged import STAGING


def refuse_taken(folder: Path, option: str) -> None:
    """Raise ValueError where a folder that is to be made is there already. option: the word that named it."""
    if folder.exists():
        raise ValueError(
            f"{option}: expected a folder that is not there yet, got {folder}, which exists; name another one or "
            "remove it"
        )


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder: `fill` writes its files under another name beside it, they are flushed to the disk, and then it
    is renamed. Where `fill` raises, nothing is left.

    Raises ValueError where the disk refuses a file, with the cause.
    """
    staging = folder.with_name(f"{STAGING}{folder.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed command left
        staging.mkdir(parents=True)
        fill(staging)
        paths = [staging, *staging.rglob("*")]
        for path in paths:
            durable.sync(path)
        staging.rename(folder)
        durable.sync(folder.parent)
    except OSError as error:
        where = error.filename or folder
        raise ValueError(
            f"{folder} was not written: {error.strerror or error}: {where}; make room there, or name another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
