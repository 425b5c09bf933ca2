"""The lock on an output folder: one run writes there at a time. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made where it is not there; a killed process holds it no longer.

    Raises ValueError where another process holds it, naming its host and pid, and where the folder cannot be written.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _open(folder / LOCK)
    except OSError as error:
        raise ValueError(
            f"output_dir: expected a folder that can be written, got {folder} ({error.strerror}); name another"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), (folder / LOCK).stat()):
                (folder / LOCK).unlink()
        os.close(number)
        for one in made:
            with suppress(OSError):  # a run wrote there
                one.rmdir()


def keep(moved: Path, folder: Path) -> None:
    """Take the lock along when the folder of an earlier run was moved aside and `folder` was made anew."""
    with suppress(FileNotFoundError):
        (moved / LOCK).rename(folder / LOCK)


def _open(path: Path) -> int:
    """The descriptor of a lock file that this process has locked."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(number, 500).decode(errors="replace").strip() or "a process that does not say which"
            os.close(number)
            raise ValueError(
                f"output_dir: {path.parent} is being written by another run, {owner}; wait for it or give another "
                "--output_dir. If both are tasks of one run, set RANK, LOCAL_RANK and WORLD_SIZE in each"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"dsalign: {path}: no lock ({error.strerror}): let no other run write there", file=sys.stderr)
            return number
        try:
            current = os.path.samestat(os.fstat(number), path.stat())
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(number)  # its last owner removed it between the two calls
    os.truncate(number, 0)
    text = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    os.write(number, text.encode())
    return number
