"""Readers of JSON lines, JSON, CSV and TSV, also compressed as .gz and .zst. They are our own so that every message
names file and line.

A bad row is passed on as its RowError where what follows it can still be read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from dsalign.data.rows.records import MAX_DEPTH, SHOWN_CHARS, Record, RowError, shorten, too_deep

MAX_ROW_BYTES = 50_000_000  # of a line; longer ones are other files' contents by mistake
MAX_UNPACKED_BYTES = 1 << 31  # of a compressed file that must be read as a whole
COMPRESSED = (".gz", ".zst")
NO_ROWS = ("tools", "history", "images", "videos", "audios")  # lists that belong to a row
BROKEN = (OSError, EOFError, zlib.error)  # what reading a damaged compressed file raises
Item = Record | RowError


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".zst":
        import pyarrow  # noqa: PLC0415  # 40 MiB, for few kinds of files

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _lines(path: Path, name: str) -> Iterator[str | RowError]:
    """The lines with their line ends, without a byte order mark; in the place of one that cannot be read its error."""
    try:
        with opened(path) as file:
            number = 0
            while raw := file.readline(MAX_ROW_BYTES + 1):  # never more, as 14 MB may unpack to a line of 3 GB
                number += 1
                yield _line(raw, f"{name}:{number}", "utf-8-sig" if number == 1 else "utf-8")
                while len(raw) > MAX_ROW_BYTES and raw[-1:] != b"\n":
                    raw = file.readline(MAX_ROW_BYTES + 1)
    except BROKEN as error:
        if path.suffix not in COMPRESSED:
            raise
        raise RowError(f"{name}: expected a whole {path.suffix} file, got an error: {error}; pack it again") from error


def _line(raw: bytes, where: str, encoding: str) -> str | RowError:
    if len(raw) > MAX_ROW_BYTES:
        return RowError(
            f"{where}: expected a line of at most {MAX_ROW_BYTES} bytes, got a longer one that begins with "
            f"{shorten(raw[:SHOWN_CHARS])}; one row a line"
        )
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        return RowError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x} at position {error.start + 1} "
            f"of {shorten(raw)}; save the file as UTF-8"
        )


def _whole_lines(path: Path, name: str) -> Iterator[str]:
    """The lines of a format that must be read as a whole. Raises RowError for the first that cannot be read."""
    left = MAX_UNPACKED_BYTES if path.suffix in COMPRESSED else None
    for line in _lines(path, name):
        if isinstance(line, RowError):
            raise line
        if left is not None and (left := left - len(line)) < 0:
            raise RowError(
                f"{name}: expected at most {MAX_UNPACKED_BYTES} bytes once it is unpacked, got more; "
                "write one row a line (.jsonl), or unpack it"
            )
        yield line


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"expected each key once, got {max(names, key=names.count)!r} twice; remove one")
    return values


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"expected a JSON number, got {word}, which JSON does not have; write null or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")
PYTHON = re.compile(r"'|True\b|False\b|None\b")  # what a dict looks like that was printed


def _decode(text: str, start: int, name: str, line: int, fix: str) -> tuple[Any, int]:
    """(the JSON value at `start`, the position of the next character that is not blank). line: that of `start`. Raises
    RowError with `fix`, what to do about it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        column = error.pos - text.rfind("\n", 0, error.pos)
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        python = "; Python wrote this: let json.dumps write it" if PYTHON.match(text, error.pos) else ""
        raise RowError(
            f"{name}:{line + text.count(chr(10), start, error.pos)}: expected JSON, got {shorten(near)} "
            f"({error.msg} at character {column}); {fix}{python}"
        ) from error
    except RecursionError as error:
        raise _nested(name, line) from error
    except ValueError as error:
        raise RowError(f"{name}:{line}: {error}") from error
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and too_deep(value):
        raise _nested(name, line)
    return value, _blank(text, end)


def _nested(name: str, line: int) -> RowError:
    return RowError(
        f"{name}:{line}: expected lists and objects at most {MAX_DEPTH} deep in each other, got deeper ones; "
        "leave the row out, or write the value as text"
    )


def _blank(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]  # the pattern matches everywhere


def json_lines(path: Path, name: str) -> Iterator[Item]:
    """Records of a file with one object a line; blank lines are skipped, and an array under such a name is read as one.
    name: how messages call the file."""
    seen = False
    for number, line in enumerate(_lines(path, name), 1):
        if isinstance(line, RowError):
            yield line
            continue
        start = _blank(line, 0)
        if start == len(line):
            continue
        if not seen and line[start] == "[" and line[_blank(line, start + 1) :][:1] in ("", "{", "]"):
            yield from json_array(path, name)
            return
        seen = True
        try:
            yield _object(line, start, f"{name}:{number}", name, number)
        except RowError as error:
            yield error


def _object(line: str, start: int, where: str, name: str, number: int) -> Record:
    fix = "each line must be one complete JSON object"
    cut = "" if line.endswith("\n") else ", and this last line looks cut off"
    text = line.rstrip("\r\n")  # an error at the end of the line is one of this line
    value, end = _decode(text, start, name, number, fix + cut)
    if end != len(text):
        raise RowError(f"{where}: expected one JSON object on a line, got more: {shorten(text[end:])}; {fix}")
    return Record(where, _row(where, value))


def json_array(path: Path, name: str) -> Iterator[Item]:
    """Records of an array of objects, of an object that holds one list of them, or of JSON lines under another name.
    name: how messages call the file."""
    text = "".join(_whole_lines(path, name))
    start = _blank(text, 0)
    if start == len(text):
        return
    if text[start] == "{":
        first, end = _decode(text, start, name, 1, "write an array of rows, or one row a line")
        if end != len(text):
            yield from json_lines(path, name)
            return
        rows = _rows_of(first, name)
        if rows is None:
            yield Record(f"{name}:1", first)
            return
        start = _start_of(text, start, rows, name)
    elif text[start] != "[":
        raise RowError(f"{name}:1: expected an array of rows, got {shorten(text[start:])}; write [{{...}}, {{...}}]")
    line, counted = 1, 0
    position = _blank(text, start + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}"
        value, position = _decode(text, position, name, line, "the array must be complete: [row, row, ...]")
        yield _record(where, value)
        if text[position : position + 1] == ",":
            position = _blank(text, position + 1)
            if text[position : position + 1] == "]":
                raise RowError(f"{where}: expected a row behind the ',' after this row, got ']'; remove the ','")
        elif text[position : position + 1] != "]":
            got = shorten(text[position : position + 20]) if position < len(text) else "the end of the file"
            raise RowError(f"{where}: expected ',' or ']' after this row, got {got}; the array must be complete")
    rest = text[position + 1 :].strip()
    if rest and not text.lstrip().startswith("{"):
        raise RowError(f"{name}: expected nothing after the array, got {shorten(rest)}; keep one array a file")


def _rows_of(value: Mapping[str, Any], name: str) -> str | None:
    """The key under which an object holds the rows of a file; None where it is a row itself. Raises RowError where it
    holds columns, or several lists of rows."""
    lists = [key for key, item in value.items() if isinstance(item, list) and _may_be_rows(key, item)]
    if len(lists) == 1:
        return lists[0]
    if lists:
        raise RowError(
            f"{name}:1: expected an array of rows or an object with one list, got an object whose lists are {lists}; "
            "write an array, or one row a line in a .jsonl file"
        )
    columns = [key for key, item in value.items() if _may_be_column(item)]
    if len(columns) > 1 and len(columns) == len(value):
        raise RowError(
            f"{name}:1: expected an array of rows, got columns, {shorten(columns)}, each with the values of all rows; "
            'write one object a row (pandas: to_json with orient="records")'
        )
    return None


def _may_be_rows(key: str, items: list[Any]) -> bool:
    """Whether a list in an object may hold the rows of a file: objects that are neither messages nor functions."""
    return key not in NO_ROWS and all(isinstance(item, dict) and not item.keys() & {"role", "from"} for item in items)


def _may_be_column(item: object) -> bool:
    """Whether a value of an object holds one value of each row: texts or numbers in a list, or under 0, 1, 2, ..."""
    if isinstance(item, dict):
        return "0" in item
    return isinstance(item, list) and bool(item) and not any(isinstance(one, dict) for one in item)


def _start_of(text: str, start: int, rows: str, name: str) -> int:
    """Position at which the list under the key `rows` of the object at `start` begins."""
    position = _blank(text, start + 1)
    while True:
        key, position = _decode(text, position, name, 1, "")
        position = _blank(text, position + 1)
        if key == rows:
            return position
        _, position = _decode(text, position, name, 1, "")
        position = _blank(text, position + 1)


def _record(where: str, value: object) -> Item:
    try:
        return Record(where, _row(where, value))
    except RowError as error:
        return error


def _row(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(
            f"{where}: expected a row as a JSON object, got {type(value).__name__} {shorten(value)}; "
            'write {"column": value, ...}'
        )
    return value


def csv_rows(path: Path, name: str) -> Iterator[Item]:
    """Records of a CSV file with a header line; every value is text. name: how messages call the file."""
    return _cells(path, name, ",")


def tsv_rows(path: Path, name: str) -> Iterator[Item]:
    """Records of a file like CSV with tabs between its cells."""
    return _cells(path, name, "\t")


def _cells(path: Path, name: str, delimiter: str) -> Iterator[Item]:
    csv.field_size_limit(MAX_ROW_BYTES)  # one number for the process; a text of 131,072 characters is a long document
    reader = csv.reader(_whole_lines(path, name), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            open_quote = (
                "; the quote that opens a cell in this row is never closed" if "end of data" in str(error) else ""
            )
            raise RowError(
                f"{where}: expected CSV, got an error: {error}{open_quote}; quote text that holds quotes, or use .jsonl"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(header, where, delimiter)
        elif len(cells) != len(header):
            yield RowError(
                f"{where}: expected {len(header)} cells ({', '.join(header)}), got {len(cells)}: {shorten(cells)}; "
                "quote cells that hold commas or line ends"
            )
        else:
            yield Record(where, dict(zip(header, cells, strict=True)), text_only=True)


def _check_header(header: list[str], where: str, delimiter: str) -> None:
    if len(set(header)) != len(header):
        raise RowError(f"{where}: expected each column name once, got {shorten(header)}; rename one")
    blank = [column for column in header if column != column.strip()]
    if blank:
        raise RowError(
            f"{where}: expected names of columns without a blank around them, got {shorten(blank)}; remove the blanks "
            f"beside each {delimiter!r}, in all lines, as they belong to the cells"
        )
    other = next((mark for mark in ";\t,|" if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        fix = {"\t": "call it .tsv", ",": "call it .csv"}.get(other, "write it again with commas")
        raise RowError(
            f"{where}: expected {delimiter!r} between the names of the columns, got {other!r} in {shorten(header[0])}; "
            f"{fix}"
        )
