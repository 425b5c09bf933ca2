"""Sources to records: files, folders, globs, demo rows and hub data sets."""

from __future__ import annotations

import difflib
import glob
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from dsalign import assets
from dsalign.data.rows import first_bytes, folders, hub, text_files
from dsalign.data.rows.dataset_info import notes_of
from dsalign.data.rows.folders import SUFFIXES, Files, is_data, suffix_of
from dsalign.data.rows.records import Record, RowError, shorten, without_nulls
from dsalign.data.rows.text_files import Item

READERS: Mapping[str, Callable[[Path, str], Iterator[Item]]] = {
    ".jsonl": text_files.json_lines,
    ".json": text_files.json_array,
    ".csv": text_files.csv_rows,
    ".tsv": text_files.tsv_rows,
}
ARROW_FILE = b"ARROW1"  # how a file begins that is no stream
# What a file of some format is that has no rows and is not empty.
NOTHING = {
    **dict.fromkeys((".csv", ".tsv"), "a header alone"),
    **dict.fromkeys((".parquet", ".arrow"), "a table without rows"),
}


def read_source(source: str, seed: int, streaming: bool = False) -> Iterator[Item]:
    """The records of one source in stored order, and in the place of each that cannot be read its RowError.

    source: a file, a folder, a glob, demo rows, a registered short name or a hub name; "#n" behind it takes a sample of
    n records without replacement, fixed by `seed`, in stored order. streaming: a hub data set is not kept on disk. No
    record is held longer than until the next one.
    Raises ValueError for a source that is not there or cannot be sampled, and RowError, which names file and line,
    where what follows a bad record cannot be read either.
    """
    name, count = _sample(source)
    if count is None:
        yield from _records(name, streaming)
        return
    if streaming and _local(name) is None:
        raise ValueError(
            f"data set {source!r}: cannot sample rows of a stream; leave out #{count} or --streaming, or stop a run "
            "early with --max_steps"
        )
    total = sum(1 for _ in _records(name))
    if not 0 < count <= total:
        raise ValueError(
            f"data set {source!r}: cannot sample {count} rows of {total}; "
            f"write #n with n from 1 to {total}, or no # for all rows"
        )
    chosen = set(random.Random(seed).sample(range(total), count))
    yield from (record for index, record in enumerate(_records(name)) if index in chosen)


def version(source: str) -> tuple[str, int | None]:
    """(text that changes when the records of a source do, about how many there are or None), without parsing them: of
    files it is a hash of names and bytes.

    Raises ValueError where there is no such source.
    """
    name, count = _sample(source)
    files = _local(name)
    if files is None:
        digest, rows = hub.version(name)
    else:
        hashed, counts = hashlib.blake2b(digest_size=16), []
        for path, shown in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()
            hashed.update(f"{shown} {digest} {notes_of(path)}".encode())
            counts.append(_num_rows(path))
        digest, rows = hashed.hexdigest(), None if None in counts else sum(filter(None, counts))
    return f"{source} {digest}", rows if count is None else count


def _sample(source: str) -> tuple[str, int | None]:
    """(name, n) for a source `name#n`; (source, None) for one without a number, or where a file or folder has the # in
    its name."""
    name, mark, count = source.rpartition("#")
    if not mark or not count.isdecimal() or Path(source).expanduser().exists():
        return source, None
    return name, int(count)


def _records(name: str, streaming: bool = False) -> Iterator[Item]:
    files = _local(name)
    if files is None:
        yield from hub.read_hub(name, streaming)
        return
    for path, shown in files:
        yield from _file(path, shown)


def _local(name: str) -> Files | None:
    """(path, name for messages) of each file of a source; None = the source is a hub data set.

    Raises ValueError where a path, folder or glob has no data files.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return folders.files_of(path, name)
    if path.is_file():
        if path.name in folders.NOTES:
            raise ValueError(f"data file {name!r}: expected rows, got notes about them; point at the folder it lies in")
        return [(path, name)]
    if name.startswith(assets.DEMO):
        return [(assets.find(name), name)]
    if any(mark in name for mark in "*?["):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if is_data(Path(file)))
        if not files:
            raise ValueError(
                f"data set {name!r}: expected a pattern that matches files that end in {', '.join(SUFFIXES)}, "
                "got none; check it, and put it into quotes"
            )
        return [(Path(file), file) for file in files]
    if suffix_of(path) in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ValueError(f"data set {name!r}: expected a file or a folder, got nothing at this path; {hint}")
    return None


def reads_at_once(source: str, most: int) -> bool:
    """Whether the first row of a source can be had at once: its files are on this machine, and the first is read line
    by line, or has at most `most` bytes. Raises ValueError where a path, folder or glob has no data files."""
    files = _local(source)
    if not files:
        return False
    path = files[0][0]
    by_row = suffix_of(path) in (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
    return by_row or path.stat().st_size * _packed(path) <= most


def _packed(path: Path) -> int:
    """About how many times larger a file is when it is unpacked."""
    return 8 if path.suffix in text_files.COMPRESSED else 1


def _num_rows(path: Path) -> int | None:
    """About how many rows a file has; None where that cannot be told without parsing it."""
    suffix = path.suffix
    if suffix == ".parquet":
        import pyarrow.parquet  # noqa: PLC0415  # 40 MiB, for few kinds of files

        with suppress(pyarrow.lib.ArrowException):  # whoever reads it will say so
            return int(pyarrow.parquet.read_metadata(path).num_rows)
    if suffix not in (".jsonl", ".csv", ".tsv"):
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _file(path: Path, name: str) -> Iterator[Item]:
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise ValueError(
            f"data file {name!r}: expected a name that ends in {', '.join(SUFFIXES)}, or of text with .gz or .zst "
            f"behind it, got {path.suffix!r}; convert or rename the file"
        )
    first_bytes.check(path, name, suffix)
    empty, notes = True, notes_of(path)
    for record in READERS.get(suffix, _arrow)(path, name):
        empty = False
        if notes is not None and isinstance(record, Record):
            record = record._replace(values=notes.applied(record.values))
        yield record
    if empty:
        got = "an empty file" if _blank(path) else NOTHING.get(suffix, "an empty list")
        raise RowError(f"{name}: expected at least one row, got {got}; remove it or write it again")


def _blank(path: Path) -> bool:
    """Whether a file has nothing but white space in its first bytes."""
    with suppress(*text_files.BROKEN), text_files.opened(path) as file:
        return not file.read(first_bytes.HEAD).strip()
    return False


def _arrow(path: Path, name: str) -> Iterator[Item]:
    """Records of a Parquet file, or of an .arrow file: a stream, as the library `datasets` writes, or Feather. What is
    null within a column is left out: Arrow writes it where another row has the key."""
    import pyarrow.parquet  # noqa: PLC0415  # 40 MiB, for few kinds of files

    try:
        with pyarrow.memory_map(str(path)) as file:
            if path.suffix == ".parquet":
                batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            elif file.read(len(ARROW_FILE)) == ARROW_FILE:
                whole = pyarrow.ipc.open_file(file)
                batches = map(whole.get_batch, range(whole.num_record_batches))
            else:
                file.seek(0)
                batches = pyarrow.ipc.open_stream(file)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (
                Record(f"{name}:row {number}", {column: without_nulls(value) for column, value in row.items()})
                for number, row in enumerate(rows, 1)
            )
    except (pyarrow.lib.ArrowException, OSError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow's format"
        raise ValueError(
            f"data file {name!r}: expected {kind}, got an error: {shorten(str(error))}; write the file again"
        ) from error
