"""The data files of a folder: plain files, what `save_to_disk` of the library `datasets` writes, and clones of hub data
sets with their splits."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dsalign.data.rows import text_files
from dsalign.data.rows.records import shorten

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # about rows, never rows
SPLIT = re.compile(r"(?:^|[-_./\\])(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_./\\]|\d|$)", re.I)
PART = re.compile(r"(.*?)-(\d{5})-of-(\d{5})(?!\d)")
SHOWN = 8  # files that a message names
Files = list[tuple[Path, str]]  # (path, name for messages)


def suffix_of(path: Path) -> str:
    """The suffix that tells a file's format: .jsonl for rows.jsonl and rows.jsonl.gz. Parquet compresses itself, so
    .parquet.gz is none."""
    packed = path.suffix in text_files.COMPRESSED and Path(path.stem).suffix in TEXT_SUFFIXES
    return Path(path.stem).suffix if packed else path.suffix


def is_data(path: Path) -> bool:
    """Whether a file holds rows, by its name."""
    named = suffix_of(path) in SUFFIXES and not path.name.startswith((".", "_"))
    return named and path.name not in NOTES and path.is_file()


def files_of(folder: Path, name: str) -> Files:
    """The files of a folder whose rows are read, in order. name: how messages call the folder.

    Raises ValueError where there are none.
    """
    saved = _saved(folder, name)
    if saved is not None:
        return saved
    found = _plain(folder, name) or _plain(folder / "data", os.path.join(name, "data"))
    if not found:
        inside = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"data folder {name!r}: expected files that end in {', '.join(SUFFIXES)}, "
            f"got {shorten(inside)}; point at the folder that holds them"
        )
    read = train_split(found)
    _refuse_gaps(read, name)
    _say_twice(read, name)
    return read


def _refuse_gaps(files: Files, name: str) -> None:
    """Raises ValueError where files say in their names that they are parts of more, and some of these are not there."""
    parts: dict[tuple[str, int], set[int]] = {}
    for path, _ in files:
        if found := PART.match(path.name):
            parts.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (front, total), have in parts.items():
        first = 1 if 0 not in have and total in have else 0
        gone = sorted(set(range(first, first + total)) - have)
        if gone:
            raise ValueError(
                f"data folder {name!r}: expected all {total} parts of {front}, as their names say, got no "
                f"{', '.join(f'{i:05}' for i in gone[:SHOWN])}; copy them too, or name the files that are meant"
            )


def _say_twice(files: Files, name: str) -> None:
    """Say which files of a folder have one name and several formats: they may hold the same rows."""
    stems = Counter(path.name.split(".")[0] for path, _ in files)
    twice = [path.name for path, _ in files if stems[path.name.split(".")[0]] > 1]
    if twice:
        _say(f"{name}: read {', '.join(twice[:SHOWN])}; if they hold the same rows, name one of them")


def train_split(files: Files) -> Files:
    """The files without those that are named as another split than train, such as test.jsonl, where some others are
    left; a line on the log names them."""
    splits = [_split(shown) for _, shown in files]
    others = [file for file, split in zip(files, splits, strict=True) if split not in ("", "train")]
    kept = [file for file, split in zip(files, splits, strict=True) if split in ("", "train")]
    if not kept or not others:
        return files
    _say(f"not read, as their names say that they are for evaluation: {', '.join(shown for _, shown in others)}")
    return kept


def _split(shown: str) -> str:
    """ "train", the name of another split, or "" for a file whose name has none."""
    found = SPLIT.findall(Path(shown).name.split(".")[0])
    split = found[0].lower() if found else ""
    return "train" if split == "training" else split


@cache
def _say(line: str) -> None:
    logger.warning(line)  # once, however often the folder is looked at


def _plain(folder: Path, name: str) -> Files:
    if not folder.is_dir():
        return []
    return [(folder / e, os.path.join(name, e)) for e in sorted(x.name for x in folder.iterdir() if is_data(x))]


def _saved(folder: Path, name: str) -> Files | None:
    """The files of a folder that save_to_disk wrote; None = it is none."""
    splits = _note(folder / "dataset_dict.json", "splits", name)
    if splits is not None:
        split = "train" if "train" in splits else splits[0]
        if len(splits) > 1:
            left = ", ".join(x for x in splits if x != split)
            _say(f"{name}: read split {split}; not read: {left}; to read one, point at its folder in {name}")
        return files_of(folder / split, os.path.join(name, split))
    entries = _note(folder / "state.json", "_data_files", name)
    if entries is None:
        return None
    if _note(folder / "state.json", "_indices_data_files", name):
        raise ValueError(
            f"data folder {name!r}: expected rows in stored order, got a selection of them by an index file; "
            "write it again with flatten_indices().save_to_disk, or with to_parquet"
        )
    files = [entry["filename"] for entry in entries]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or not files:
        raise ValueError(
            f"data folder {name!r}: expected the files that its state.json names, got no {shorten(missing)}; "
            "copy the whole folder, or write it again with save_to_disk"
        )
    return [(folder / file, os.path.join(name, file)) for file in files]


def _note(path: Path, key: str, name: str) -> Sequence[Any] | None:
    """A list in a note of the library `datasets`; None where there is no such note, or it has no such list."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data folder {name!r}: expected JSON in {path.name}, got an error: {shorten(str(error))}; write the "
            "folder again with save_to_disk"
        ) from error
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, list) and value else None
