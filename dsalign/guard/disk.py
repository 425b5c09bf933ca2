"""The room on a disk, and bytes with a unit. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def free(path: Path) -> int:
    """Bytes that this user may still write to the file system of a path, which may not be there yet."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def amount(number: float) -> str:
    """Bytes with a unit that people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
