"""Large data sets are tokenised in several processes: threads would wait for each other, as rendering a template and
making token groups hold Python's lock."""

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
from dsalign.data.tokens.encoder import CHUNK, THREADS, Encoder, Tally, in_order, thread_pool
from dsalign.data.tokens.group_store import Stored, stored

logger = logging.getLogger(__name__)
MOST = 8  # processes: more are faster than rows can be read
LEAST = 4 * CHUNK  # rows a process, which takes a second to start
_encoder: Encoder  # of a process that was started here


def num_processes(wanted: int | None, rows: float | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many processes should tokenise.

    wanted: what --dataset_num_proc says, None = as many as pay. rows: about how many there are, None = unknown. It is 1
    for a tokenizer whose code came with the model, which another process could not import, and in a process that may
    not start others.
    """
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


def tokenised_chunks(rows: Iterable[Row], encoder: Encoder, processes: int) -> Iterator[tuple[Stored, Tally]]:
    """(groups in the form of a store, tally) of each CHUNK rows, in the rows' order. processes: 1 = in threads of this
    one.

    Raises ValueError for rows as the encoder does, and where a process was ended from outside, which mostly means that
    memory ran out.
    """
    if processes < 2:
        with thread_pool(encoder) as pool:
            yield from in_order(pool, partial(_tokenised, encoder), rows, THREADS)
        return
    fresh = replace(encoder, template=replace(encoder.template))  # without what it keeps for this process
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of torch hold
    try:
        with ProcessPoolExecutor(processes, context, _start, (fresh,)) as pool:
            yield from in_order(pool, _tokenised_there, rows, processes + 1)
    except BrokenProcessPool as error:
        raise ValueError(
            f"data set: one of {processes} processes that tokenise was ended from outside, most likely for want of "
            "memory; give --dataset_num_proc 1, or free some"
        ) from error


def _tokenised(encoder: Encoder, rows: list[Row]) -> tuple[Stored, Tally]:
    groups, tally = encoder(rows)
    return stored(groups), tally


def _start(encoder: Encoder) -> None:
    """The first thing that a new process runs: it keeps the encoder and ends with its parent."""
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


def _tokenised_there(rows: list[Row]) -> tuple[Stored, Tally]:
    return _tokenised(_encoder, rows)
