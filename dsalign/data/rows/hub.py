"""Data sets of the Hugging Face hub: mapped from the files that `datasets` keeps, or streamed and not kept."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NoReturn

from dsalign import assets
from dsalign.data.rows.records import Record, RowError, rename, shorten, without_nulls
from dsalign.data.rows.registry import REGISTERED, Registered


def read_hub(name: str, streaming: bool = False) -> Iterator[Record | RowError]:
    """The records of a hub data set, and in the place of each that the registry's converter cannot read its RowError.

    name: on the hub, or a registered short name. streaming: rows come over the network as they are asked for.
    Raises ValueError where it cannot be loaded, or a stream breaks off.
    """
    known, number = _known(name), 0
    try:
        dataset = _datasets().load_dataset(known.hub_name, split=known.split, streaming=streaming, **_files(known))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to the user
        _refuse(name, known, error)
    rows = iter(dataset)
    while True:
        try:
            values = next(rows, None)
        except Exception as error:
            raise ValueError(
                f"data set {name!r}: expected a row after row {number}, got {type(error).__name__}: "
                f"{shorten(str(error))}; check the network, or leave out --streaming to download it first"
            ) from error
        if values is None:
            return
        number += 1
        where = f"{name}:row {number}"
        try:
            converted = known.convert(without_nulls(dict(values)) | _empty(values))
        except (KeyError, TypeError, ValueError) as error:
            yield RowError(
                f"{where}: expected the columns of {name!r}, got {shorten(dict(values))} ({error!r}); "
                "the hub data set has changed: download it and rename its columns"
            )
            continue
        yield Record(where, rename(where, converted, known.columns))


def version(name: str) -> tuple[str, int | None]:
    """(text that changes when the rows of a hub data set do, their number or None where the hub does not say it); no
    row is read.

    Raises ValueError where it cannot be loaded.
    """
    known = _known(name)
    try:
        builder = _datasets().load_dataset_builder(known.hub_name, **_files(known))
    except Exception as error:  # as above
        _refuse(name, known, error)
    splits = builder.info.splits or {}
    num_rows = splits[known.split].num_examples if known.split in splits else None
    return f"{builder.hash} {builder.config_id} {known.split}", num_rows


@cache
def _datasets() -> Any:
    """The library `datasets`, without its progress bars. It is imported only where a hub data set is read, as it takes
    a second and 50 MiB."""
    library = importlib.import_module("datasets")
    library.disable_progress_bars()
    return library


def _empty(values: Mapping[str, Any]) -> dict[str, None]:
    """The columns that are null, which stay so that a message can name them."""
    return {name: None for name, value in values.items() if value is None}


def _known(name: str) -> Registered:
    return REGISTERED.get(name, Registered(name))


def _files(known: Registered) -> dict[str, Any]:
    return {"data_files": list(known.files) or None}


def _refuse(name: str, known: Registered, error: Exception) -> NoReturn:
    short = (*assets.names(), *REGISTERED)
    near = difflib.get_close_matches(name, short, 1)
    hint = f"did you mean {near[0]!r}?" if near and near[0] != name else "check the name and the network"
    raise ValueError(
        f"data set {name!r}: expected a file, a folder, a hub data set with a train split or one of "
        f"{', '.join(short)}; loading {known.hub_name!r} from the hub gave {type(error).__name__}: "
        f"{shorten(str(error))}; {hint}"
    ) from error
