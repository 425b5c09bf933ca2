"""The requests that a rollout engine is given, the completions it answers, and the protocol of every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsalign.contract.rollout_options import RolloutOptions


@dataclass(frozen=True)
class Request:
    """A prompt, and the completions that are sampled for it: one a key.

    prompt: token ids, at least one. keys: one unsigned 64-bit number a completion, from `noise.key`; a completion is a
    function of the weights, the prompt and its key. max_new_tokens: tokens of each completion at most, >= 1.
    """

    prompt: Sequence[int]
    keys: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """A completion that an engine sampled.

    ids: its tokens, at least one; the last is an end token where `ended`. logps: [tokens] float32 on the CPU, the
    log-probability of each token under the sampler, nats, of the logits divided by the temperature, before top_p and
    top_k. ended: whether it has its end token; else it was cut at max_new_tokens. version: of the weights that sampled
    it: the number of optimizer steps that they had taken.
    """

    ids: tuple[int, ...]
    logps: Tensor
    ended: bool
    version: int = 0


class Rollout(Protocol):
    """A rollout engine: it samples from the weights of one DeepSpeed engine as they are now.

    name: as --rollout has it. dtype: in which it computes, which may be another one than the trainer's.
    """

    name: str
    dtype: torch.dtype

    def generate(
        self, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int]
    ) -> list[list[Completion]]:
        """Sample the completions of each request, in the order of its keys. Collective: every rank calls it, with any
        number of requests. end_ids: the tokens that end a completion."""
        ...
