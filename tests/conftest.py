"""Fixtures that live for the whole session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # then Triton kernels run in its interpreter, chosen before it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

from forks import Forks
from support import RankPool, tiny_folder

for number in (signal.SIGINT, signal.SIGHUP):  # nohup, and a shell's background, start what they run to ignore them
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and its tokenizer, as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo ranks that live for the session."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """A process group of one."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Ranks that are forked from a process that has imported everything."""
    found = Forks()
    yield found
    found.close()
