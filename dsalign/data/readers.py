"""From sources to records: files, folders, globs, demo rows and hub data sets."""

from __future__ import annotations

import difflib
import glob
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import load_dataset

from dsalign import assets
from dsalign.data import text_files
from dsalign.data.records import Record, RowError, rename, shorten
from dsalign.data.registry import REGISTERED, Registered
from dsalign.data.text_files import Item

FORMATS: Mapping[str, Callable[[Path, str], Iterator[Item]]] = {
    ".jsonl": text_files.json_lines,
    ".json": text_files.json_array,
    ".csv": text_files.csv_rows,
}
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read_source(source: str, seed: int) -> Iterator[Item]:
    """The records of one source in stored order, and in its place the RowError of each that cannot be read.

    source: a file, a folder, a glob, demo rows, a short name or a hub name; with "#n" behind it a sample of n records
    without replacement, fixed by `seed`, in stored order. A record is held no longer than until the next.
    Raises ValueError (RowError where a row is to blame, and what follows it cannot be read) naming the file and line.
    """
    name, mark, count = source.rpartition("#")
    if not mark or not count.isdecimal() or Path(source).expanduser().exists():
        yield from _records(source)
        return
    total = sum(1 for _ in _records(name))
    if not 0 < int(count) <= total:
        raise ValueError(
            f"data set {source!r}: cannot sample {count} rows of {total}; "
            f"write #n with n from 1 to {total}, or no # for all rows"
        )
    chosen = set(random.Random(seed).sample(range(total), int(count)))
    yield from (record for index, record in enumerate(_records(name)) if index in chosen)


def _records(name: str) -> Iterator[Item]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if _is_data(entry))
        if not files:
            raise ValueError(
                f"data folder {name!r}: expected files that end in {', '.join(SUFFIXES)}, "
                f"got {shorten(sorted(entry.name for entry in path.iterdir()))}; point at the folder that holds them"
            )
        for file in files:
            yield from _file(path / file, os.path.join(name, file))
    elif path.is_file():
        yield from _file(path, name)
    elif name.startswith(assets.PREFIX):
        yield from _file(assets.find(name), name)
    elif any(mark in name for mark in "*?["):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if _is_data(Path(file)))
        if not files:
            raise ValueError(
                f"data set {name!r}: expected a pattern that matches files that end in {', '.join(SUFFIXES)}, "
                "got none; check it, and put it into quotes"
            )
        for file in files:
            yield from _file(Path(file), file)
    elif _suffix(path) in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ValueError(f"data set {name!r}: expected a file or a folder, got nothing at this path; {hint}")
    else:
        yield from _hub(name)


def _suffix(path: Path) -> str:
    """.jsonl of rows.jsonl and rows.jsonl.gz; Parquet packs itself."""
    packed = path.suffix in text_files.PACKED and Path(path.stem).suffix in FORMATS
    return Path(path.stem).suffix if packed else path.suffix


def _is_data(path: Path) -> bool:
    return path.is_file() and _suffix(path) in SUFFIXES and not path.name.startswith((".", "_"))


def _file(path: Path, name: str) -> Iterator[Item]:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise ValueError(
            f"data file {name!r}: expected a name that ends in {', '.join(SUFFIXES)}, or of text with .gz or .zst "
            f"behind it, got {path.suffix!r}; convert or rename the file"
        )
    empty = True
    for record in FORMATS.get(suffix, _parquet)(path, name):
        empty = False
        yield record
    if empty:
        raise RowError(f"{name}: expected at least one row, got an empty file; remove it or write it again")


def _parquet(path: Path, name: str) -> Iterator[Item]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(name, rows)
    except pyarrow.lib.ArrowException as error:
        raise ValueError(
            f"data file {name!r}: expected Parquet, got an error: {shorten(str(error))}; write the file again"
        ) from error


def _hub(name: str) -> Iterator[Item]:
    """A hub data set, which `datasets` keeps on disk and maps: its rows are never all in memory."""
    known, short = REGISTERED.get(name, Registered(name)), (*assets.names(), *REGISTERED)
    try:
        dataset = load_dataset(known.hub_name, data_files=list(known.files) or None, split=known.split)
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to the user
        near = difflib.get_close_matches(name, short, 1)
        hint = f"did you mean {near[0]!r}?" if near and near[0] != name else "check the name and the network"
        raise ValueError(
            f"data set {name!r}: expected a file, a folder, a hub data set with a train split or one of "
            f"{', '.join(short)}; loading {known.hub_name!r} from the hub gave {type(error).__name__}: "
            f"{shorten(str(error))}; {hint}"
        ) from error
    for where, values, _ in _numbered(name, dataset):
        try:
            converted = known.convert(values)
        except (KeyError, TypeError, ValueError) as error:
            yield RowError(
                f"{where}: expected the columns of {name!r}, got {shorten(dict(values))} ({error!r}); "
                "the hub data set has changed: download it and rename its columns"
            )
            continue
        yield Record(where, rename(where, converted, known.columns))


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, values in enumerate(rows, 1):
        yield Record(f"{name}:row {number}", values)
