"""Files that outlive a power cut: written whole or not at all, hashed as they are written, and flushed to the disk.
Imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsalign import faults

PIECE = 1 << 23  # bytes written at a time, and hashed meanwhile
HALF = 1024  # bytes behind which a test's "mid_shard" lies
_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE
_libc: Any = ctypes.CDLL(None)


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


class HashedFile:
    """A new binary file that is hashed by a thread while it is written, and whose pages are sent to the disk early.

    A failure to write is kept in `error` and not raised, as the library that writes may be in the middle of something
    that it cannot leave; what follows is dropped. size: bytes written.
    """

    def __init__(self, path: Path, threads: ThreadPoolExecutor) -> None:
        self.path, self.size = path, 0
        self._threads, self._total, self._number = threads, hashlib.sha256(), -1
        self.error = _caught(self._open)

    def _open(self) -> None:
        self._number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, content: Any) -> int:
        """Write bytes or what has a buffer of them; returns how many were given."""
        view = memoryview(content).cast("B")
        if self.error is None and len(view) < PIECE // 8:  # a thread would cost more than it saves
            self._total.update(view)
            self.error = _caught(lambda: self._write(view))
        elif self.error is None:
            hashed = self._threads.submit(self._total.update, view)
            try:
                self.error = _caught(lambda: self._write(view))
            finally:
                hashed.result()  # the buffer is the caller's again after this call
        return len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            count = os.write(self._number, view[:PIECE])
            if hasattr(_libc, "sync_file_range") and count > PIECE // 8:
                _libc.sync_file_range(
                    self._number, ctypes.c_int64(self.size), ctypes.c_int64(count), ctypes.c_uint(_START_WRITEBACK)
                )
            if self.size < HALF <= self.size + count:
                faults.at("mid_shard")
            self.size += count
            view = view[count:]

    def flush(self) -> None:
        """Do nothing, as nothing is held back: libraries call it."""

    def digest(self) -> str:
        """The sha256 of what was written, as hexadecimal digits."""
        return self._total.hexdigest()

    def close(self) -> None:
        """Flush the file to the disk and close it. Failures go to `error`."""
        if self._number >= 0:
            self.error = self.error or _caught(lambda: os.fsync(self._number))
            self.error = _caught(lambda: os.close(self._number)) or self.error
            self._number = -1


def _caught(call: Callable[[], Any]) -> OSError | None:
    try:
        call()
    except OSError as error:
        return error
    return None
