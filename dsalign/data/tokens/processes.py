"""Large data sets are tokenised in several processes: rendering and reading text holds Python's lock."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import CHUNK, THREADS, Encoder, Tally, in_order, threads
from dsalign.data.tokens.group_store import Packed, pack

logger = logging.getLogger(__name__)
MOST = 8  # processes: more are faster than rows can be read
LEAST = 4 * CHUNK  # rows a process, which takes a second to start
_encoder: Encoder  # of a process that was started here


def count(wanted: int | None, rows: float | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many processes to use. wanted: what the user asked for, None = as many as pay; rows: about how many there
    are, None = unknown. One for a tokenizer that comes with its own code, which another process would not find, and
    in a process that may not start others."""
    if not type(tokenizer).__module__.startswith("transformers."):
        if wanted not in (None, 1):
            logger.warning("dataset_num_proc: 1 instead of %d, as the tokenizer comes with its own code", wanted)
        return 1
    if multiprocessing.current_process().daemon:
        return 1
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(min(cores, MOST, MOST if rows is None else max(1, rows // LEAST)))


def packed(rows: Iterable[Row], encoder: Encoder, processes: int) -> Iterator[tuple[Packed, Tally]]:
    """The groups of each CHUNK rows as a store keeps them, in order, with what happened to those rows.

    Raises ValueError as the encoder does, and where a process is ended from outside.
    """
    if processes < 2:
        with threads(encoder) as pool:
            yield from in_order(pool, partial(_packed, encoder), rows, THREADS)
        return
    fresh = replace(encoder, template=replace(encoder.template))  # without what it keeps for this process
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of torch hold
    try:
        with ProcessPoolExecutor(processes, context, _start, (fresh,)) as pool:
            yield from in_order(pool, _packed_there, rows, processes + 1)
    except BrokenProcessPool as error:
        raise ValueError(
            f"data set: one of {processes} processes that tokenise was ended from outside, most likely for want of "
            "memory; give --dataset_num_proc 1, or free some"
        ) from error


def _packed(encoder: Encoder, rows: list[Row]) -> tuple[Packed, Tally]:
    groups, tally = encoder(rows)
    return pack(groups), tally


def _start(encoder: Encoder) -> None:
    """What a new process does first."""
    global _encoder  # sent once, not with every chunk
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()


def _end_with_parent() -> None:
    """A process that is killed cannot end those it started, and a launcher kills."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _packed_there(rows: list[Row]) -> tuple[Packed, Tally]:
    return _packed(_encoder, rows)
