"""From a configuration to tokens: the tokenizer, its chat template, and the rows of some data sets as groups."""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import mul
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock

from dsalign import data
from dsalign.config.cache import cache_folder
from dsalign.config.schema import RunConfig
from dsalign.data.rows.iterate import Skipped, iter_rows
from dsalign.data.rows.readers import version
from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import Encoder, Tally, Tokenized, tokenize_rows
from dsalign.data.tokens.group_store import GroupStore, Packed, write
from dsalign.data.tokens.processes import count, packed
from dsalign.data.tokens.templates import Template

logger = logging.getLogger(__name__)
STORE_FROM = 10_000  # rows: fewer are tokenised again in less time than it takes to say so
SAID_EVERY_S = 10.0


def tokenized(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float] = ()
) -> tuple[Tokenized, Skipped]:
    """The groups of some data sets, and the bad rows that were left out, where the run leaves them out.

    From STORE_FROM rows on the groups are kept on disk, by a hash of the files and of all that makes tokens of them:
    memory does not grow with them, one process of a machine prepares, and the next run finds them.
    Raises ValueError for the first row that cannot be used, where it does not, or where it loses more than half of them
    unasked; and where no row is left.
    """
    found, skipped = _tokenized(config, template, sources, weights)
    total, lost = counted(found, skipped)
    if lost * 2 > total and config.on_bad_row == "error":
        raise ValueError(
            f"data set {' '.join(sources)}: expected to use at least half of its rows, got {total - lost} of {total}: "
            f"{'; '.join(losses(found, skipped))}; raise --max_length, use --truncation_strategy left or right, or "
            "write --on_bad_row skip if that is meant"
        )
    return found, skipped


def counted(found: Tokenized, skipped: Skipped) -> tuple[int, int]:
    """(how many rows there were, how many of them are not used)."""
    return found.num_rows + skipped.count, sum(found.dropped.values()) + skipped.count


def _tokenized(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float]
) -> tuple[Tokenized, Skipped]:
    gc.freeze()  # a search for garbage would look at all of torch, again and again, as rows become objects
    try:
        return _made_or_found(config, template, sources, weights)
    finally:
        gc.unfreeze()


def _made_or_found(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float]
) -> tuple[Tokenized, Skipped]:
    skipped = Skipped()
    rows = _rows(config, sources, weights, skipped)
    first = deque(islice(rows, STORE_FROM))
    options: dict[str, Any] = {
        "max_length": config.max_length,
        "truncation": config.truncation_strategy,
        "assistant_turns": config.assistant_turns,
    }
    if len(first) < STORE_FROM:
        return tokenize_rows(first, template, **options), skipped
    versions = [version(source) for source in sources]
    made_of = ([digest for digest, _ in versions], weights, _how(config, template))
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    folder = cache_folder() / "data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        store = _found(folder)
        if store is None:
            known = [n for _, n in versions if n is not None]
            times = weights or [1.0] * len(sources)
            total = sum(map(mul, known, times)) if len(known) == len(sources) else None
            encoder, tally = Encoder(template, **options), Tally()
            processes = count(config.dataset_num_proc, total, template.tokenizer)
            parts = packed(chain(_drained(first), rows), encoder, processes)
            store = write(_counted(parts, encoder, tally, total), tally, skipped, folder)
    counts = store.counts
    return Tokenized(store, counts.num_rows, counts.dropped, counts.truncated), counts.skipped


def _rows(config: RunConfig, sources: Sequence[str], weights: Sequence[float], skipped: Skipped) -> Iterator[Row]:
    return iter_rows(
        sources,
        config.algorithm.data,
        columns=config.columns,
        system=config.system,
        seed=config.seed,
        weights=weights,
        streaming=config.streaming,
        skipped=skipped if config.on_bad_row == "skip" else None,
    )


def _drained(rows: deque[Row]) -> Iterator[Row]:
    """The rows, none held once it was taken."""
    while rows:
        yield rows.popleft()


def _how(config: RunConfig, template: Template) -> tuple[Any, ...]:
    """All that makes tokens of files: settings, template, tokenizer, and the code itself."""
    tokenizer = template.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    written = template.chat_template or tokenizer.chat_template
    rows = (config.algorithm.data, sorted(config.columns.items()), config.system, config.seed, config.on_bad_row)
    lengths = (config.max_length, config.truncation_strategy, config.assistant_turns)
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(data.__file__).parent.rglob("*.py"))]
    ends = (sorted(template.end_ids), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return rows, lengths, vocabulary, written, ends, code, transformers.__version__, tokenizers.__version__


def _found(folder: Path) -> GroupStore | None:
    if not folder.exists():
        return None
    try:
        return GroupStore(folder)
    except ValueError as error:
        logger.warning("prepared rows are made again: %s", error)
        return None


def _counted(
    parts: Iterable[tuple[Packed, Tally]], encoder: Encoder, tally: Tally, total: float | None
) -> Iterator[Packed]:
    """The parts, their rows counted in `tally`, with a line every SAID_EVERY_S seconds. total: about how many rows
    there are, where that is known. Raises ValueError where no part has a group."""
    start = said = time.monotonic()
    some = False
    for part, counted in parts:
        tally.add(counted)
        some = some or bool(part.sizes)
        yield part
        now = time.monotonic()
        if now - said >= SAID_EVERY_S:
            said = now
            rate = tally.num_rows / (now - start)
            of, left = "", ""
            if total is not None:
                of, left = f" of about {total:.0f}", f", {max(total - tally.num_rows, 0) / rate:.0f} s left"
            logger.info("tokenised %d%s rows, %.0f rows/s%s", tally.num_rows, of, rate, left)
    encoder.check(some, tally)


def losses(found: Tokenized, skipped: Skipped) -> list[str]:
    """A line for what was dropped or cut, and one for bad rows; none where all is as it was stored."""
    lines = []
    parts = [f"{count} dropped ({rule})" for rule, count in found.dropped.items()]
    if found.truncated:
        parts.append(f"{found.truncated} truncated")
    if parts:
        lines.append(f"of {found.num_rows} rows {', '.join(parts)}")
    if skipped:
        lines.append(f"{skipped.count} bad rows left out, the first: {skipped.first}")
    return lines
