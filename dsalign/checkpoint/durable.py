"""Files that outlive a power cut: written whole or not at all, and flushed to the disk. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsalign import faults

HALF = 1024  # bytes behind which a test's "mid_shard" lies


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError where the disk could not take it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that its path holds the old content or the new one whole, after a power cut too."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    sync(path.parent)


class PatientFile:
    """A new binary file for a library that cannot leave what it is in the middle of: a failure to write is kept in
    `error` and not raised, and what follows is dropped. size: bytes written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._number = path, 0, -1
        self.error = _caught(self._open)

    def _open(self) -> None:
        self._number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, content: Any) -> int:
        """Write bytes or what has a buffer of them; returns how many were given."""
        view = memoryview(content).cast("B")
        if self.error is None:
            self.error = _caught(lambda: self._write(view))
        return len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            count = os.write(self._number, view)
            if self.size < HALF <= self.size + count:
                faults.at("mid_shard")
            self.size += count
            view = view[count:]

    def flush(self) -> None:
        """Do nothing, as nothing is held back: libraries call it."""

    def close(self) -> None:
        """Close the file, which is not flushed to the disk by that. A failure goes to `error`."""
        if self._number >= 0:
            self.error = _caught(lambda: os.close(self._number)) or self.error
            self._number = -1


def _caught(call: Callable[[], Any]) -> OSError | None:
    try:
        call()
    except OSError as error:
        return error
    return None
