"""Which completion runs in which row: admission of waiting requests, and what moves where rows have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsalign.rollout.api import Request


@dataclass(frozen=True)
class Admitted:
    """A request that starts now. request: its index. samples: the indices of the completions that start, which share
    one pass over the prompt. rows: the row of each."""

    request: int
    samples: range
    rows: range


class Schedule:
    """The rows 0 to `running` - 1 hold running completions, without a hole.

    Requests that may take longest start first, so that no long one is left alone at the end. A request whose
    completions do not all fit into the free rows waits, unless it is larger than all rows together: it starts in parts.
    """

    def __init__(self, requests: Sequence[Request], rows: int) -> None:
        self.rows, self.running = rows, 0
        order = sorted(range(len(requests)), key=lambda i: (-requests[i].max_new_tokens, -len(requests[i].prompt), i))
        self._waiting = [
            (i, range(start, min(start + rows, len(requests[i].keys))))
            for i in order
            for start in range(0, len(requests[i].keys), rows)
        ][::-1]
        self._lengths = [len(request.prompt) for request in requests]

    def admit(self, most_tokens: int) -> list[Admitted]:
        """Start waiting requests in free rows, of at most `most_tokens` prompt tokens together, or one with more."""
        found: list[Admitted] = []
        tokens = 0
        while self._waiting:
            request, samples = self._waiting[-1]
            tokens += self._lengths[request]
            if self.running + len(samples) > self.rows or (found and tokens > most_tokens):
                break
            self._waiting.pop()
            found.append(Admitted(request, samples, range(self.running, self.running + len(samples))))
            self.running += len(samples)
        return found

    def retire(self, ended: Sequence[int]) -> list[tuple[int, int]]:
        """Take rows out; returns the (source, target) moves of running rows that close the holes."""
        gone = set(ended)
        left = self.running - len(gone)
        sources = [row for row in range(left, self.running) if row not in gone]
        targets = sorted(row for row in gone if row < left)
        self.running = left
        return list(zip(sources, targets, strict=True))
