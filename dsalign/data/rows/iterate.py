"""Sources to rows, one at a time: columns renamed, sources weighted, bad rows raised or counted."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsalign.data.rows.fields import Fields
from dsalign.data.rows.formats import KINDS, convert
from dsalign.data.rows.readers import read_source
from dsalign.data.rows.records import Record, Row, RowError, rename


@dataclass
class Skipped:
    """The bad rows that were left out: how many there were, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, error: ValueError) -> None:
        """Count a bad row."""
        self.first = self.first or str(error)
        self.count += 1

    def merge(self, other: Skipped) -> None:
        """Count the bad rows of another count as well."""
        self.first = self.first or other.first
        self.count += other.count


def iter_rows(
    sources: Sequence[str],
    kind: str,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    seed: int = 42,
    weights: Sequence[float] = (),
    streaming: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[Row]:
    """The rows of all sources, one source after the other, in stored order, each read when it is asked for.

    sources: files, folders, globs, demo rows, hub names or registered short names, each with an optional "#n" (a sample
    of n rows, fixed by `seed`). kind: one of KINDS. columns: their name of a column -> ours. system: a system prompt
    for rows without one. weights: how many times the rows of each source come; 2.5 = twice, and each once more with
    probability 0.5, fixed by `seed`; none = once. streaming: hub data sets are not kept on disk. skipped: counts bad
    rows, which are left out; None = the first is raised.
    A prompt that is a string is one turn of the user. In a conversation with several answers the last is the
    completion.
    Raises RowError (a ValueError) for the first bad row, ValueError for a bad argument or source.
    """
    if kind not in KINDS:
        raise ValueError(f"kind of rows: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not sources:
        raise ValueError("data set: expected at least one file, folder or hub name, got none; name one with --dataset")
    renamed = columns or {}
    missing, present = set(renamed), set[str]()

    def read(item: Record | RowError) -> Row | None:
        try:
            if isinstance(item, RowError):
                raise item
            if missing:
                missing.difference_update(item.values)
                present.update(item.values)
            values = rename(item.where, item.values, renamed)
            return convert(Fields(item.where, values, item.text_only), kind, system)
        except RowError as error:
            if missing and not isinstance(item, RowError):
                names = ", ".join(sorted(missing))
                error = RowError(f"{error}; no row up to here has {names}, which --columns names")
            if skipped is None:
                raise error
            skipped.add(error)
            return None

    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        for turn in range(math.ceil(weight)):
            draw = random.Random(f"dsalign weights {seed} {source}")
            share = min(1.0, weight - turn)
            for item in read_source(source, seed, streaming):
                if (share == 1 or draw.random() < share) and (row := read(item)) is not None:
                    yield row
    if missing:
        raise ValueError(
            f"columns: expected names that some row of {', '.join(sources)} has, got {', '.join(sorted(missing))}; "
            f"the rows have {', '.join(sorted(present)) or 'none'}: write --columns theirs=ours"
        )
