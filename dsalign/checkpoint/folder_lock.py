"""The lock on an output folder: one run writes there at a time. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LOCK = "run.lock"


@dataclass(frozen=True)
class Owner:
    """The process that a lock names. since: local time, as text. here: whether it is one of this machine; of another
    machine's it is not known whether it lives."""

    pid: int
    host: str
    since: str
    here: bool

    def text(self) -> str:
        """The process in words, as the lock has it."""
        return f"pid {self.pid} on {self.host} since {self.since}"


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


def owner(folder: Path) -> Owner | None:
    """The process that writes to an output folder; None where there is none, or one of this machine that is gone. The
    lock itself is not touched, so that a run which starts meanwhile gets it."""
    path = folder / LOCK
    try:
        found = re.fullmatch(r"pid (\d+) on (\S+) since (.+)", path.read_text(errors="replace").strip())
    except OSError:
        return None
    if found is None:
        return None
    named = Owner(int(found[1]), found[2], found[3], found[2] == socket.gethostname())
    return None if named.here and not _holds(named.pid, path) else named


def _holds(pid: int, path: Path) -> bool:
    """Whether a process of this machine has a file open; of another user's, whether it lives."""
    try:
        os.kill(pid, 0)
        for number in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samefile(number, path):
                    return True
        return False
    except PermissionError:
        return True
    except FileNotFoundError:
        return not Path("/proc/self/fd").is_dir()  # a system without /proc: it lives, and more is not known
    except (ProcessLookupError, OverflowError):
        return False
