"""Whole runs inside ranks that live on: from the words of a command to final/."""

from __future__ import annotations

from unittest import mock

import torch

from dsalign.config.parse import parse
from dsalign.engines import dist
from dsalign.ranks import Process
from dsalign.verbs import train as run


def train(words: list[str]) -> dict[str, float]:
    """`dsalign WORDS` on every rank of the pool; the last metrics."""
    rank, world = dist.rank(), dist.world_size()
    config = parse(words, world_size=world).config
    with mock.patch.object(dist, "shutdown"):
        try:
            return run.train(config, Process(rank, rank, world, world), "dsalign " + " ".join(words))
        finally:
            torch.set_num_threads(1)


def refusal(words: list[str]) -> str:
    """The message that such a run ends with."""
    try:
        train(words)
    except ValueError as error:
        return str(error)
    return "nothing was refused"
