"""Where rows come from: files, folders, hub data sets. Every record knows its file and line."""

from __future__ import annotations

import csv
import difflib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import load_dataset

from dsalign import assets

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SHOWN = 200  # characters of a bad value that a message repeats


class RowError(ValueError):
    """A row that cannot be used: names the place, what was expected, what came and what to do."""


class Record(NamedTuple):
    """One row as it was stored."""

    where: str  # "pairs.jsonl:3", the path as the user typed it; "pairs.parquet:row 3"
    values: Mapping[str, Any]
    text_only: bool = False  # CSV: every value is text, so numbers and booleans arrive as words


@dataclass(frozen=True)
class Registered:
    """A hub data set known by a short name."""

    hub_name: str
    files: tuple[str, ...] = ()  # files of the hub repository to read; () = its train split
    columns: Mapping[str, str] = field(default_factory=dict)  # theirs -> ours
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


def _hh_rlhf_cn(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """prompt, chosen, rejected as message lists, from turns {"role": "human", "text": ...}."""

    def message(turn: Mapping[str, Any]) -> dict[str, Any]:
        return {"role": "user" if turn["role"] == "human" else turn["role"], "content": turn["text"]}

    answers = {name: [message(values[name])] for name in ("chosen", "rejected")}
    return {"prompt": [message(turn) for turn in values["context"]], **answers}


REGISTERED: Mapping[str, Registered] = {
    "shareai-llama3-dpo-zh-en-emoji": Registered(
        "shareAI/DPO-zh-en-emoji",
        # The repository also holds the same rows merged in another format.
        files=("0_dpo_loji.jsonl", "1_dpo_zhihu_1.jsonl", "1_dpo_zhihu_2.jsonl", "2_dpo_ruozhiba.jsonl"),
        columns={"question": "query", "answer_zh": "response", "answer_en": "rejected_response"},
    ),
    "hh-rlhf-cn-harmless-base-cn": Registered(
        "dikw/hh_rlhf_cn", files=("harmless_base_cn_train.jsonl",), convert=_hh_rlhf_cn
    ),
    "ultrafeedback-kto": Registered("argilla/ultrafeedback-binarized-preferences-cleaned-kto"),
}


def shorten(value: object) -> str:
    """repr(value), cut to SHOWN characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def rename(where: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """values with each column of `columns` (theirs -> ours) under its new name.

    Raises RowError where two columns end up under one name.
    """
    if not columns:
        return values
    renamed: dict[str, Any] = {}
    for theirs, value in values.items():
        ours = columns.get(theirs, theirs)
        if ours in renamed:
            raise RowError(
                f"{where}: two columns are called {ours!r} after renaming with columns={dict(columns)}; "
                f"expected one, got {sorted(values)}: rename the other {ours!r} too"
            )
        renamed[ours] = value
    return renamed


def read_source(source: str, seed: int) -> Iterator[Record]:
    """The records of one source in stored order: a file, a folder, demo rows, a short name or a hub name.

    source: "name" or "name#n"; with #n a sample of n records without replacement, fixed by `seed`, in stored order.
    Raises ValueError (RowError where a row is to blame) naming the file and line.
    """
    name, mark, count = source.rpartition("#")
    if not mark or not count.isdecimal() or Path(source).expanduser().exists():
        yield from _records(source)
        return
    records = list(_records(name))
    if not 0 < int(count) <= len(records):
        raise ValueError(
            f"data set {source!r}: cannot sample {count} rows of {len(records)}; "
            f"write #n with n from 1 to {len(records)}, or no # for all rows"
        )
    for index in sorted(random.Random(seed).sample(range(len(records)), int(count))):
        yield records[index]


def _records(name: str) -> Iterator[Record]:
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
    elif path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ValueError(f"data set {name!r}: expected a file or a folder, got nothing at this path; {hint}")
    else:
        yield from _hub(name)


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES and not path.name.startswith((".", "_"))


def _file(path: Path, name: str) -> Iterator[Record]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    if path.suffix not in readers:
        raise ValueError(
            f"data file {name!r}: expected a name that ends in {', '.join(SUFFIXES)}, got {path.suffix!r}; "
            "convert or rename the file"
        )
    empty = True
    for record in readers[path.suffix](path, name):
        empty = False
        yield record
    if empty:
        raise RowError(f"{name}: expected at least one row, got an empty file; remove it or write it again")


# --- text ---------------------------------------------------------------------------------------------------------


def _lines(path: Path, name: str) -> Iterator[str]:
    """Lines with their line ends, without the byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RowError(
                    f"{name}:{number}: expected UTF-8, got byte 0x{raw[error.start]:02x} at position {error.start + 1} "
                    f"of {shorten(raw)}; save the file as UTF-8"
                ) from error


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


def _decode(text: str, start: int, name: str, line: int, fix: str) -> tuple[Any, int]:
    """The JSON value at `start`, which is on `line`, and the position of the next character that is not blank."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        column = error.pos - text.rfind("\n", 0, error.pos)
        near = text[max(error.pos - 20, 0) : error.pos + 20]
        raise RowError(
            f"{name}:{line + text.count(chr(10), start, error.pos)}: expected JSON, got {shorten(near)} "
            f"({error.msg} at character {column}); {fix}"
        ) from error
    except ValueError as error:
        raise RowError(f"{name}:{line}: {error}") from error
    return value, _blank(text, end)


def _blank(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]  # the pattern matches everywhere


def _json_lines(path: Path, name: str) -> Iterator[Record]:
    seen = False
    for number, line in enumerate(_lines(path, name), 1):
        start = _blank(line, 0)
        if start == len(line):
            continue
        if not seen and line[start] == "[":
            yield from _json(path, name)
            return
        seen = True
        fix = "each line must be one complete JSON object"
        cut = "" if line.endswith("\n") else ", and this last line looks cut off"
        value, end = _decode(line, start, name, number, fix + cut)
        where = f"{name}:{number}"
        if end != len(line):
            raise RowError(f"{where}: expected one JSON object on a line, got more: {shorten(line[end:])}; {fix}")
        yield Record(where, _row(where, value))


def _json(path: Path, name: str) -> Iterator[Record]:
    """An array of rows, an object that holds one list of rows, or JSON lines under another name."""
    text = "".join(_lines(path, name))
    start = _blank(text, 0)
    if start == len(text):
        return
    if text[start] == "{":
        first, end = _decode(text, start, name, 1, "write an array of rows, or one row a line")
        if end != len(text):
            yield from _json_lines(path, name)
            return
        start = _only_list(text, start, first, name)
    elif text[start] != "[":
        raise RowError(f"{name}:1: expected an array of rows, got {shorten(text[start:])}; write [{{...}}, {{...}}]")
    line, counted = 1, 0
    position = _blank(text, start + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}"
        value, position = _decode(text, position, name, line, "the array must be complete: [row, row, ...]")
        yield Record(where, _row(where, value))
        if text[position : position + 1] == ",":
            position = _blank(text, position + 1)
        elif text[position : position + 1] != "]":
            got = shorten(text[position : position + 20]) if position < len(text) else "the end of the file"
            raise RowError(f"{where}: expected ',' or ']' after this row, got {got}; the array must be complete")
    rest = text[position + 1 :].strip()
    if rest and not text.lstrip().startswith("{"):
        raise RowError(f"{name}: expected nothing after the array, got {shorten(rest)}; keep one array a file")


def _only_list(text: str, start: int, value: Mapping[str, Any], name: str) -> int:
    """Where the one list of the object at `start` begins."""
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if len(lists) != 1:
        raise RowError(
            f"{name}:1: expected an array of rows or an object with one list, got an object whose lists are {lists}; "
            "write an array, or one row a line in a .jsonl file"
        )
    position = _blank(text, start + 1)
    while True:
        key, position = _decode(text, position, name, 1, "")
        position = _blank(text, position + 1)
        if key == lists[0]:
            return position
        _, position = _decode(text, position, name, 1, "")
        position = _blank(text, position + 1)


def _row(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(
            f"{where}: expected a row as a JSON object, got {type(value).__name__} {shorten(value)}; "
            'write {"column": value, ...}'
        )
    return value


def _csv(path: Path, name: str) -> Iterator[Record]:
    reader = csv.reader(_lines(path, name), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise RowError(
                f"{where}: expected CSV, got an error: {error}; quote text that holds quotes, or use .jsonl"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise RowError(f"{where}: expected each column name once, got {shorten(header)}; rename one")
        elif len(cells) != len(header):
            raise RowError(
                f"{where}: expected {len(header)} cells ({', '.join(header)}), got {len(cells)}: {shorten(cells)}; "
                "quote cells that hold commas or line ends"
            )
        else:
            yield Record(where, dict(zip(header, cells, strict=True)), text_only=True)


# --- tables -------------------------------------------------------------------------------------------------------


def _parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(name, rows)
    except pyarrow.lib.ArrowException as error:
        raise ValueError(
            f"data file {name!r}: expected Parquet, got an error: {shorten(str(error))}; write the file again"
        ) from error


def _hub(name: str) -> Iterator[Record]:
    known, short = REGISTERED.get(name, Registered(name)), (*assets.names(), *REGISTERED)
    try:
        files = list(known.files) or None
        dataset = load_dataset(known.hub_name, data_files=files, split="train")
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
        except (KeyError, TypeError) as error:
            raise RowError(
                f"{where}: expected the columns of {name!r}, got {shorten(dict(values))} ({error!r}); "
                "the hub data set has changed: download it and rename its columns"
            ) from error
        yield Record(where, rename(where, converted, known.columns))


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, values in enumerate(rows, 1):
        yield Record(f"{name}:row {number}", values)
