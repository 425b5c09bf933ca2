"""The engine `local`: sampling from the training weights, with a key-value cache in which every row has its own place.

Each prompt is computed once, whatever the number of its completions, in packed rows without padding, and what several
prompts begin with (a system turn) once for all that start together. A completion that has ended leaves its row at once:
another request takes it, or the last row moves into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsalign import cpu
from dsalign.contract.rollouts import RolloutOptions
from dsalign.models.attention import SharedPrefix
from dsalign.models.last_layer import skip_unread_mlp
from dsalign.rollout.admission import Admitted, Schedule
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.pick import Pick, signed
from dsalign.rollout.prompts import packed
from dsalign.rollout.slots import Slots

PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}  # prompt tokens in one forward pass
READ_EVERY = {"cpu": 1, "cuda": 8}  # decoding steps between two looks at which rows have ended: each waits for the GPU


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    options: RolloutOptions,
    end_ids: frozenset[int],
    rows: int = 64,
) -> list[list[Completion]]:
    """Sample the completions of each request, in the order of its keys.

    model: a causal language model whose attention takes packed rows (`dsalign.models.attention.share`), in evaluation
    mode. end_ids: the tokens that end a completion. rows: completions that run at a time, at most.
    """
    if not requests:
        return []
    with torch.no_grad():
        return _Run(model, requests, options, end_ids, rows).all()


class _Run:
    """The state of the running rows. One number a row: token, the last one sampled; count, tokens sampled; start,
    tokens of the prompt; most, tokens at most; key. One line a row: ids and logps, what was sampled."""

    def __init__(
        self, model: Any, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int], rows: int
    ) -> None:
        self.requests, self.device = requests, model.get_input_embeddings().weight.device
        rows = min(rows, sum(len(request.keys) for request in requests))
        self.schedule = Schedule(requests, rows)
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        self.slots, self.pick = Slots(rows, longest), Pick(model, options)
        self.decoder = model.get_decoder()
        self.ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=self.device)
        self.end_ids = end_ids
        self.most_tokens = PREFILL_TOKENS.get(self.device.type, 16384)
        self.read_every = READ_EVERY.get(self.device.type, 8)
        zeros = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.token, self.count, self.start, self.most, self.key = (zeros.clone() for _ in range(5))
        length = max(request.max_new_tokens for request in requests)
        self.ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.logps = torch.zeros(rows, length, device=self.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.longest = [0] * rows  # tokens in each row's slot at most, known without asking the device
        self.who: list[tuple[int, int]] = [(0, 0)] * rows  # the request and the sample of each row
        self.found: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        self.mask = torch.zeros(1, 1, 1, 1, device=self.device)  # of four dimensions: transformers makes none

    def all(self) -> list[list[Completion]]:
        """Run to the end of every request."""
        while True:
            while admitted := self.schedule.admit(self.most_tokens):
                self._prefill(admitted)
                self._retire()
            if not self.schedule.running:
                return [[one for one in row if one is not None] for row in self.found]
            for _ in range(self.read_every):
                self._step()
            self._retire()

    def _prefill(self, admitted: Sequence[Admitted]) -> None:
        """Compute the prompts of requests that start, and sample the first token of each of their completions."""
        prompts = packed([self.requests[one.request].prompt for one in admitted], [one.rows for one in admitted])
        ids, last = (torch.tensor(x, device=self.device) for x in ([prompts.ids], prompts.last))
        prefix = SharedPrefix(prompts.spans, self.device, read=last)
        self.slots.prefill(prompts.places, self.device)
        out = self.decoder(
            input_ids=ids, position_ids=prefix.position[None], attention_mask=self.mask, use_cache=True,
            past_key_values=self.slots, shared_prefix=prefix,
        )  # fmt: skip
        rows = [row for one in admitted for row in one.rows]
        numbers = []
        for i, one in enumerate(admitted):
            request = self.requests[one.request]
            for row, sample in zip(one.rows, one.samples, strict=True):
                self.who[row], self.longest[row] = (one.request, sample), len(request.prompt)
                numbers.append((i, len(request.prompt), request.max_new_tokens, signed(request.keys[sample])))
        which, start, most, key = torch.tensor(numbers, dtype=torch.int64, device=self.device).T
        part = slice(rows[0], rows[-1] + 1)
        self.start[part], self.most[part], self.key[part] = start, most, key
        self.count[part], self.ended[part] = 0, False
        self._sample(out.last_hidden_state[0, last][which], part)

    def _step(self) -> None:
        """Sample one more token of every running row. A row that ended since the last look goes on to no effect."""
        n = self.schedule.running
        part = slice(0, n)
        positions = self.start[part] + self.count[part] - 1
        self.slots.decode(positions, max(self.longest[:n]))
        self.longest[:n] = [length + 1 for length in self.longest[:n]]
        out = self.decoder(
            input_ids=self.token[part, None], position_ids=positions[:, None], attention_mask=self.mask, use_cache=True,
            past_key_values=self.slots, cached_rows=self.slots.attend,
        )  # fmt: skip
        self._sample(out.last_hidden_state[:, 0], part)

    def _sample(self, states: Tensor, part: slice) -> None:
        """Sample the next token of the rows `part` from their last hidden states, [n, D]."""
        count = self.count[part]
        tokens, logps = self.pick(states, self.key[part], count)
        rows = torch.arange(part.start, part.stop, device=self.device)
        at = count.clamp(max=self.ids.shape[1] - 1)
        running = ~self.ended[part]
        self.ids[rows, at] = torch.where(running, tokens, self.ids[rows, at])
        self.logps[rows, at] = torch.where(running, logps, self.logps[rows, at])
        self.count[part] += running
        self.token[part] = tokens
        self.ended[part] |= torch.isin(tokens, self.ends) | (self.count[part] >= self.most[part])

    def _retire(self) -> None:
        """Take out the rows that have ended, and close the holes."""
        n = self.schedule.running
        ended = torch.nonzero(self.ended[:n])[:, 0].tolist()
        if not ended:
            return
        ids, logps, counts = self.ids[ended].tolist(), self.logps[ended].cpu(), self.count[ended].tolist()
        for row, tokens, its_logps, count in zip(ended, ids, logps, counts, strict=True):
            request, sample = self.who[row]
            kept = tuple(tokens[:count])
            self.found[request][sample] = Completion(kept, its_logps[:count].clone(), kept[-1] in self.end_ids)
        moves = self.schedule.retire(ended)
        if moves:
            sources, targets = (torch.tensor(list(x), device=self.device) for x in zip(*moves, strict=True))
            for numbers in (self.token, self.count, self.start, self.most, self.key, self.ids, self.logps, self.ended):
                numbers[targets] = numbers[sources]
            self.slots.move(sources, targets, max(self.longest[source] for source, _ in moves))
            for source, target in moves:
                self.who[target], self.longest[target] = self.who[source], self.longest[source]


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Let a generation view skip, over prompts, the part of its last layer that nothing reads; and what a CPU needs."""
    skip_unread_mlp(model.get_decoder())
    if model.device.type == "cpu":
        cpu.sampling(model)
    return model
