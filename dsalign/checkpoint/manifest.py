"""The manifest of a folder: the size and sha256 of every file in it, which tell a damaged folder from a whole one.
Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dsalign.checkpoint import durable

MANIFEST = "manifest.json"
FORMAT = 1  # raised where a later version writes what this one cannot read
BLOCK = 1 << 20  # bytes read at a time


class BrokenError(ValueError):
    """The error of a folder that is not as it was written; the message says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """One file of a manifest: its size in bytes, and the sha256 of its content as 64 hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint or an export.

    files: path inside the folder, with / -> its entry. run: identity of the run that wrote it. serial: 1 for the first
    folder that the run wrote, then counted up, whatever the clock says. step: optimizer steps taken.
    """

    files: Mapping[str, Entry]
    run: str
    serial: int
    step: int


def entry_of(path: Path) -> Entry:
    """The entry of a file, which is read whole. Raises OSError where it cannot be read."""
    total, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
            size += len(block)
    return Entry(size, total.hexdigest())


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into its folder: whole or not at all. Raises OSError where that fails."""
    content = {"format": FORMAT, **asdict(manifest)}
    content["files"] = {name: asdict(entry) for name, entry in sorted(manifest.files.items())}
    durable.write_text(folder / MANIFEST, json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """The manifest of a folder; no other file is looked at.

    Raises BrokenError where there is none, where it is damaged or of a later version, or names a path outside.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        claimed, number = content.pop("sha256"), content.pop("format")
        if isinstance(number, int) and number > FORMAT:
            raise BrokenError(f"{MANIFEST} is of format {number}, written by a later version of dsalign")
        if claimed != _checksum({"format": number, **content}):
            raise BrokenError(f"{MANIFEST} does not match its own checksum")
        files = {name: Entry(**entry) for name, entry in content.pop("files").items()}
        found = Manifest(files=files, **content)
    except FileNotFoundError:
        raise BrokenError(f"it has no {MANIFEST}") from None
    except BrokenError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenError(f"{MANIFEST} cannot be read ({error or type(error).__name__})") from None
    for name in files:
        if name == MANIFEST or not is_inside(name):
            raise BrokenError(f"{MANIFEST} names {name!r}, which is no path inside the folder")
    return found


def is_inside(name: str) -> bool:
    """Whether a path of a manifest stays inside its folder, by its text alone."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


def fault_of(folder: Path, name: str, entry: Entry, *, whole: bool = True) -> str | None:
    """What is wrong with a file of the folder, None where it is as it was written. whole: whether the file is read and
    hashed; if not, its size alone is compared."""
    path = folder / name
    if any(one.is_symlink() for one in (path, *path.parents) if one.is_relative_to(folder) and one != folder):
        return f"{name} is a link or lies behind one"
    try:
        size = path.stat().st_size
        if not path.is_file():
            return f"{name} is no file"
        if size != entry.size:
            return f"{name} has {size} bytes, expected {entry.size}"
        return None if not whole or entry_of(path) == entry else f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
