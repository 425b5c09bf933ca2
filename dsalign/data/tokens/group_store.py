"""Token groups on disk: written once while they are made, mapped by every rank, never all in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from dsalign.contract.groups import Group
from dsalign.data.rows.iterate import Skipped
from dsalign.data.tokens.encoder import Tally

IDS, KNOWN, INDEX, MANIFEST = "ids.bin", "known.bin", "index.bin", "manifest.json"
STORE_FORMAT = 4  # of the files
BLOCK = 1 << 20


@dataclass(frozen=True)
class Counts:
    """How many rows of a store's data set were read, dropped (rule -> rows), truncated, and skipped as bad; how often
    nothing read a column or a key of messages; and of how many rows each thing of `encoder._noticed` was."""

    num_rows: int
    dropped: Mapping[str, int]
    truncated: int
    skipped: Skipped
    unread: Mapping[str, int]
    noticed: Mapping[str, int]


class LazyGroups(Sequence[Group], ABC):
    """A sequence that makes a group each time it is asked for, so that no group stays in memory."""

    @abstractmethod
    def _at(self, index: int) -> Group:
        """The group at an index in [0, len)."""

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> list[Group]: ...
    def __getitem__(self, at: int | slice) -> Group | list[Group]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"group {at} of {len(self)}")
        return self._at(at % len(self))


class GroupStore(LazyGroups):
    """The groups in a folder that `write_store` made: a group's ids and text are read from mapped files when it is
    asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder is not what was written: a file is missing, cut off or changed."""
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files = {name: _digest(folder / name) for name in (IDS, KNOWN, INDEX)}
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: its files cannot be read: {error}; remove the folder") from error
        if manifest.get("format") != STORE_FORMAT or manifest["files"] != files:
            raise ValueError(f"{folder}: its files are not those that were written; remove the folder")
        skipped = Skipped(*manifest["skipped"])
        self.counts = Counts(
            manifest["num_rows"],
            manifest["dropped"],
            manifest["truncated"],
            skipped,
            manifest["unread"],
            manifest["noticed"],
        )
        self._index = np.memmap(folder / INDEX, dtype=np.int64, mode="r").reshape(-1, 2)
        self._ids, self._known = (_map(folder / name) for name in (IDS, KNOWN))

    def __len__(self) -> int:
        return len(self._index) - 1

    def _at(self, index: int) -> Group:
        (start, first), (stop, last) = self._index[index : index + 2].tolist()
        return _restored(array("i", self._ids[start * 4 : stop * 4]), json.loads(self._known[first:last]), index)


class Part(Sequence[Group]):
    """Some of a sequence's groups, given by their positions in it: a split of a data set without a copy."""

    def __init__(self, groups: Sequence[Group], positions: Sequence[int]) -> None:
        self._groups, self._positions = groups, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> Part: ...
    def __getitem__(self, at: int | slice) -> Group | Part:
        if isinstance(at, slice):
            return Part(self._groups, self._positions[at])
        return self._groups[self._positions[at]]


class Stored(NamedTuple):
    """Groups in the form in which a store's files hold them; those of several chunks are joined by appending.

    sizes: int64 [groups, 2], of each group the number of its ids and of the bytes of the rest. ids: int32, prompts and
    completions. known: JSON of everything else, a group behind the other.
    """

    sizes: bytes  # int64
    ids: bytes  # int32
    known: bytes


def stored(groups: Iterable[Group]) -> Stored:
    """The groups in the form of a store's files. A value of a further column that JSON cannot hold becomes its text."""
    sizes, ids, known = array("q"), array("i"), list[bytes]()
    for group in groups:
        before = len(ids)
        for part in (group.prompt, *group.completions):
            ids.extend(part)
        known.append(json.dumps(_kept(group), ensure_ascii=False, default=str).encode())
        sizes.extend((len(ids) - before, len(known[-1])))
    return Stored(sizes.tobytes(), ids.tobytes(), b"".join(known))


def write_store(parts: Iterable[Stored], tally: Tally, skipped: Skipped, folder: Path) -> GroupStore:
    """Write groups to `folder` and return the store, in which they are numbered from 0 as they come.

    parts: groups as they are made. tally, skipped: read after the last part was taken, as they are counted meanwhile.
    The folder appears when it is whole, under another name until then, so that a run that is stopped leaves no half
    store.
    """
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)  # what a run that was stopped left
    staging.mkdir(parents=True)
    try:
        _fill(parts, staging)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # of a file that is read, perhaps
            raise
        written = sum(file.stat().st_size for file in staging.iterdir())
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            error.errno, f"{error.strerror}, after {written / 2**20:.1f} MiB of tokens", str(folder)
        ) from error
    manifest = {
        "format": STORE_FORMAT,
        "num_rows": tally.num_rows,
        "dropped": dict(tally.dropped),
        "truncated": tally.truncated,
        "unread": dict(tally.unread),
        "noticed": dict(tally.noticed),
        "skipped": [skipped.count, skipped.first],
        "files": {name: _digest(staging / name) for name in (IDS, KNOWN, INDEX)},
    }
    (staging / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return GroupStore(folder)


def _fill(parts: Iterable[Stored], staging: Path) -> None:
    """Write the ids, the rest and the index of groups to the files of a store."""
    start = np.zeros((1, 2), dtype=np.int64)  # in ids and in bytes
    with (staging / IDS).open("wb") as a, (staging / KNOWN).open("wb") as b, (staging / INDEX).open("wb") as c:
        c.write(start.tobytes())
        for part in parts:
            ends = start + np.frombuffer(part.sizes, dtype=np.int64).reshape(-1, 2).cumsum(0)
            for file, content in ((a, part.ids), (b, part.known), (c, ends.tobytes())):
                file.write(content)
            start = ends[-1:] if len(ends) else start


def _kept(group: Group) -> dict[str, Any]:
    """What is not token ids, as JSON: short, because it is read with every group."""
    found: dict[str, Any] = {"n": [len(group.prompt), *map(len, group.completions)]}
    found |= {"w": group.where, "t": group.prompt_text, "l": group.label, "m": group.margin}
    found |= {"c": group.columns, "u": group.turns, "k": group.masks and [list(map(int, m)) for m in group.masks]}
    found["o"] = group.tools
    return {name: value for name, value in found.items() if value not in (None, {}, ())}


def _restored(ids: array[int], known: Mapping[str, Any], index: int) -> Group:
    ends = np.cumsum(known["n"]).tolist()
    prompt, *completions = (tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False))
    masks = known.get("k")
    return Group(
        index,
        known["w"],
        prompt,
        tuple(completions),
        known.get("t", ""),
        known.get("l"),
        known.get("m"),
        known.get("c", {}),
        tuple(known.get("u", ())),
        masks and tuple(tuple(map(bool, mask)) for mask in masks),
        tuple(known.get("o", ())),
    )


def _digest(path: Path) -> list[Any]:
    """[size, checksum] of a file."""
    hashed, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hashed.update(block)
            size += len(block)
    return [size, hashed.hexdigest()]


def _map(path: Path) -> Any:
    """The bytes of a file, mapped; an empty one cannot be."""
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
