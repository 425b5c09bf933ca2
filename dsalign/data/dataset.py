"""Data sets of a run as token groups: read, tokenised, and kept on disk where they are large."""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from dsalign.contract.groups import Group
from dsalign.data.batches.loader import epoch_order
from dsalign.data.rows.iterate import Skipped, iter_rows
from dsalign.data.rows.readers import version
from dsalign.data.rows.records import Row, shorten_name
from dsalign.data.tokens.encoder import (
    BLANK,
    IDENTICAL,
    SPELLED,
    UNKNOWN,
    UNOPENED,
    Encoder,
    Tally,
    Tokenized,
    tokenize_rows,
)
from dsalign.data.tokens.group_store import GroupStore, Part, Stored, write_store
from dsalign.data.tokens.processes import num_processes, tokenised_chunks
from dsalign.data.tokens.templates import Template
from dsalign.report import screen

logger = logging.getLogger(__name__)
STORE_FROM = 10_000  # rows: fewer are tokenised again in less time than it takes to say so
SAID_EVERY_S = 10.0
MOST_NAMED = 20  # columns in one line


@dataclass(frozen=True)
class Data:
    """The token groups of a run, to train on and to evaluate on; the same on every rank."""

    train: Sequence[Group]
    held_out: Sequence[Group]


def data_of(config: RunConfig, template: Template) -> Data:
    """The groups that a run trains on and those it holds out: `val_dataset`, else the share `split_dataset_ratio` of
    all.

    Raises ValueError for rows that cannot be used, as `tokenized` does, and where the share leaves no group on one
    side.
    """

    def groups(sources: Sequence[str], weights: Sequence[float] = ()) -> Sequence[Group]:
        found, skipped = tokenized(config, template, sources, weights)
        for line in [*what_was_lost(found, skipped), *what_was_noticed(template, found)]:
            logger.warning("%s: %s", " ".join(sources), line)
        return found.groups

    options = config.data
    every = groups(options.dataset, options.dataset_weights)
    if options.val_dataset:
        return Data(every, groups(options.val_dataset))
    held = round(len(every) * options.split_dataset_ratio)
    if options.split_dataset_ratio and not 0 < held < len(every):
        raise ValueError(
            f"split_dataset_ratio: {options.split_dataset_ratio} of {len(every)} rows leaves {len(every) - held} for "
            f"training and {held} for evaluation; both need at least one"
        )
    order = epoch_order(len(every), config.seed, -1)
    return Data(Part(every, sorted(order[held:])), Part(every, sorted(order[:held])))


def tokenized(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float] = ()
) -> tuple[Tokenized, Skipped]:
    """The token groups of some data sets, and the bad rows that `on_bad_row skip` left out.

    weights: how many times each source is read, none = once. From STORE_FROM rows on the groups are kept in the cache
    folder, under a hash of the files and of all that makes tokens of them: memory does not grow with the data, one
    process of a machine does the work while the others wait for it, and the next run finds it done.
    Raises ValueError where no row is left and, unless `on_bad_row` is skip, for the first bad row and where more than
    half of the rows are lost.
    """
    found, skipped = _tokenized(config, template, sources, weights)
    total, lost = counted(found, skipped)
    if lost * 2 > total and config.data.on_bad_row == "error":
        raise ValueError(
            f"data set {' '.join(sources)}: expected to use at least half of its rows, got {total - lost} of {total}: "
            f"{'; '.join(what_was_lost(found, skipped))}; raise --max_length, use --truncation_strategy left or right, "
            "or write --on_bad_row skip if that is meant"
        )
    return found, skipped


def counted(found: Tokenized, skipped: Skipped) -> tuple[int, int]:
    """(number of rows read, number of those that became no group). skipped: the bad rows of the same reading."""
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
        "max_length": config.data.max_length,
        "truncation": config.data.truncation_strategy,
        "assistant_turns": config.data.assistant_turns,
        "lenient": config.data.on_bad_row == "skip",
    }
    if len(first) < STORE_FROM:
        return tokenize_rows(first, template, skipped=skipped, **options), skipped
    versions = [version(source) for source in sources]
    made_of = ([digest for digest, _ in versions], weights, _token_recipe(config, template))
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
            processes = num_processes(config.data.dataset_num_proc, total, template.tokenizer)
            parts = tokenised_chunks(chain(_drained(first), rows), encoder, processes)
            store = write_store(_counted(parts, encoder, tally, total, skipped), tally, skipped, folder)
    counts = store.counts
    found = Tokenized(store, counts.num_rows, counts.dropped, counts.truncated, counts.unread, counts.noticed)
    return found, counts.skipped


def _rows(config: RunConfig, sources: Sequence[str], weights: Sequence[float], skipped: Skipped) -> Iterator[Row]:
    return iter_rows(
        sources,
        config.algorithm.traits.data,
        columns=config.data.columns,
        system=config.data.system,
        seed=config.seed,
        weights=weights,
        streaming=config.data.streaming,
        skipped=skipped if config.data.on_bad_row == "skip" else None,
    )


def _drained(rows: deque[Row]) -> Iterator[Row]:
    """The rows, none held once it was taken."""
    while rows:
        yield rows.popleft()


def _token_recipe(config: RunConfig, template: Template) -> tuple[Any, ...]:
    """All that decides which tokens a file becomes: options, template, tokenizer, and the code of this package, so that
    a corrected template does not find old tokens."""
    tokenizer = template.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    written = template.chat_template or tokenizer.chat_template, template.day if template.dated else ""
    options = config.data
    rows = (
        config.algorithm.traits.data,
        sorted(options.columns.items()),
        options.system,
        config.seed,
        options.on_bad_row,
    )
    lengths = (options.max_length, options.truncation_strategy, options.assistant_turns, template.special_in_text)
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
    parts: Iterable[tuple[Stored, Tally]], encoder: Encoder, tally: Tally, total: float | None, skipped: Skipped
) -> Iterator[Stored]:
    """The parts as they come, their rows added to `tally` and those refused to `skipped`, with a line on the log every
    SAID_EVERY_S seconds. total: about how many rows there are, None = unknown. Raises ValueError where no part has a
    group."""
    start = said = time.monotonic()
    some = False
    for part, counted in parts:
        tally.add(counted)
        skipped.merge(counted.refused)
        some = some or bool(part.sizes)
        screen.progress(tally.num_rows, total)
        yield part
        now = time.monotonic()
        if now - said >= SAID_EVERY_S:
            said = now
            rate = tally.num_rows / (now - start)
            of, left = "", ""
            if total is not None:
                of, left = f" of about {total:.0f}", f", {max(total - tally.num_rows, 0) / rate:.0f} s left"
            logger.info("tokenised %d%s rows, %.0f rows/s%s", tally.num_rows, of, rate, left)
    encoder.check(some, tally, skipped)


def what_was_lost(found: Tokenized, skipped: Skipped) -> list[str]:
    """Lines that say how many rows were dropped, truncated or bad; no line where every row became a whole group."""
    lines = []
    parts = [f"{count} dropped ({rule})" for rule, count in found.dropped.items()]
    if found.truncated:
        parts.append(f"{found.truncated} truncated")
    if parts:
        lines.append(f"of {found.num_rows} rows {', '.join(parts)}")
    if skipped:
        lines.append(f"{skipped.count} bad rows left out, the first: {skipped.first}")
    return lines


def what_was_noticed(template: Template, found: Tokenized) -> list[str]:
    """Lines that name the columns and keys that nothing reads, say how text that spells special tokens is read, and
    which rows have no text, or answers that do not begin as the template opens them."""
    lines, unread = [], dict(found.unread)
    if unread:
        named = ", ".join(f"{shorten_name(name)} ({count} rows)" for name, count in sorted(unread.items())[:MOST_NAMED])
        more = ", ..." if len(unread) > MOST_NAMED else ""
        keys = "; a key of messages is renamed in the file" if any("[]." in name for name in unread) else ""
        lines.append(f"not read: {named}{more}; rename what is meant with --columns theirs=ours, or remove it{keys}")
    if spelled := found.noticed.get(SPELLED):
        how = "as these tokens" if template.special_in_text else "as text"
        other = "false" if template.special_in_text else "true"
        lines.append(
            f"{spelled} rows spell special tokens in their texts, which are read {how}; "
            f"--special_tokens_in_text {other} reads them the other way"
        )
    if blank := found.noticed.get(BLANK):
        lines.append(
            f"{blank} rows have a question or an answer without any text; leave them out if they are not meant"
        )
    if identical := found.noticed.get(IDENTICAL):
        lines.append(
            f"{identical} rows have the same answer as chosen and rejected: they teach nothing, leave them out"
        )
    if unknown := found.noticed.get(UNKNOWN):
        lines.append(
            f"{unknown} rows have characters for which the tokenizer has no token: they are read, and learnt, as "
            f"{template.tokenizer.unk_token}; leave these rows out, or take a model whose tokenizer has them"
        )
    if template.dated:
        lines.append(f"the template writes today's date: {template.day[:10] or 'that of each moment'} in every row")
    opened = template.opened.strip()
    if unopened := found.noticed.get(UNOPENED):
        begin = f"{opened}, with which the template opens every answer" if opened else "all that opens an answer there"
        lines.append(
            f"{unopened} rows have answers that do not begin with {begin}: they are learnt behind a prompt "
            "without it, and the model will be asked with it; let the answers begin with it, or use another --template"
        )
    if opened and len(found.groups) and not found.groups[0].completions:
        lines.append(
            f"the template opens every answer with {opened}: it is part of the prompt, so the completions that reward "
            "functions get begin behind it"
        )
    return lines
