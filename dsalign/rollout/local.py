"""The engine `local`: sampling from the training weights, with a key-value cache in which every row has its own place.

Each prompt is computed once, whatever the number of its completions, in packed rows without padding, and what several
prompts begin with (a system turn) once for all that start together. A completion that has ended leaves its row at once:
another request takes it, or the last row moves into it. On a GPU a step's shapes are rounded up to buckets, so that it
is replayed as a graph; rows of a bucket that do not run compute one token each, of a slot that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsalign import cpu, phases
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.models.attention import SharedPrefix
from dsalign.models.last_layer import skip_unread_mlp
from dsalign.rollout.admission import Admitted, Schedule
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.graphs import FEWEST_ROWS, FEWEST_TOKENS, Graphs, bucket, obstacle
from dsalign.rollout.machine import LARGE, Machine, rows_that_fit, warn_once
from dsalign.rollout.pick import Pick, signed
from dsalign.rollout.prompts import packed
from dsalign.rollout.slots import Slots


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    options: RolloutOptions,
    end_ids: frozenset[int],
    rows: int = 64,
    machine: Machine | None = None,
) -> list[list[Completion]]:
    """Sample the completions of each request, in the order of its keys.

    model: a causal language model whose attention takes packed rows (`dsalign.models.attention.share`), in evaluation
    mode. end_ids: the tokens that end a completion. rows: completions that run at a time, at most. machine: how its
    device is used; None = as `Machine.of` says.
    Raises ValueError where the memory that is free does not hold one completion.
    """
    if not requests:
        return []
    with torch.no_grad():
        run = _Run(model, requests, options, end_ids, rows, machine)
        try:
            return run.all()
        finally:
            run.close()


class _Run:
    """The state of the running rows. One number a row: token, the last one sampled; count, tokens sampled; start,
    tokens of the prompt; most, tokens at most; key. One line a row: ids and logps, what was sampled."""

    def __init__(
        self,
        model: Any,
        requests: Sequence[Request],
        options: RolloutOptions,
        end_ids: frozenset[int],
        rows: int,
        machine: Machine | None,
    ) -> None:
        self.requests, self.device = requests, model.get_input_embeddings().weight.device
        self.machine = machine or Machine.of(self.device)
        self.decoder, self.pick = model.get_decoder(), Pick(model, options)
        self.mask = torch.zeros(1, 1, 1, 1, device=self.device)  # of four dimensions: transformers makes none
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        rows = self._rows(min(rows, sum(len(request.keys) for request in requests)), longest)
        self.schedule, self.slots = Schedule(requests, rows), Slots(rows, longest)
        if self.machine.free is not None:
            self.slots.reserve(longest)
        capture = self.machine.capture
        why = "" if capture is None else obstacle(model)
        if why:
            warn_once(f"rollout: decoding steps are not recorded as CUDA graphs, as {why}")
        self.graphs = None if capture is None or why else Graphs(capture, model)
        self.ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=self.device)
        self.end_ids = end_ids
        zeros = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.token, self.count, self.start, self.most, self.key = (zeros.clone() for _ in range(5))
        self.every = torch.arange(rows, device=self.device)
        length = max(request.max_new_tokens for request in requests)
        self.ids = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.logps = torch.zeros(rows, length, device=self.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self._rest()
        self.longest = [0] * rows  # tokens in each row's slot at most, known without asking the device
        self.who: list[tuple[int, int]] = [(0, 0)] * rows  # the request and the sample of each row
        self.found: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]

    def _rows(self, asked: int, longest: int) -> int:
        """The rows that memory holds, at most `asked`; a forward of one token shows what a row of `longest` takes."""
        if self.machine.free is None:
            return asked
        slots, first = Slots(1, longest), torch.zeros(1, dtype=torch.int64, device=self.device)
        slots.reserve(1)
        slots.decode(first, first, 1)
        self._decoded(first, first, slots)
        return rows_that_fit(asked, slots.row_bytes, self.machine.free(), longest)

    def all(self) -> list[list[Completion]]:
        """Run to the end of every request."""
        while True:
            while admitted := self.schedule.admit(self.machine.prefill_tokens):
                self._prefill(admitted)
                self._retire()
            if not self.schedule.running:
                return [[one for one in row if one is not None] for row in self.found]
            phases.mark()
            for _ in range(self.machine.read_every):
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
        live = min(max(self.longest[:n]) + 1, self.slots.longest)
        self.longest[:n] = [length + 1 for length in self.longest[:n]]
        self.slots.reserve(live)
        if self.graphs is None:
            self._compute(n, live)
            return
        which = bucket(n, FEWEST_ROWS, len(self.every)), bucket(live, FEWEST_TOKENS, self.slots.length)
        self.graphs.run(which, partial(self._compute, *which), [*self._numbers(), *self.slots.tensors()])

    def _compute(self, n: int, live: int) -> None:
        """Sample the next token of the rows 0 to n - 1, none of which has more than `live` tokens. It waits for nothing
        on the device and leaves its results in tensors that stay, as a graph of it must."""
        part = slice(0, n)
        positions = self.start[part] + self.count[part] - 1
        self.slots.decode(self.every[part], positions, live)
        self._sample(self._decoded(self.token[part], positions, self.slots), part)

    def _decoded(self, tokens: Tensor, positions: Tensor, slots: Slots) -> Tensor:
        """The last hidden states, [n, D], of one token a slot, [n] int64, at positions [n] int64."""
        out = self.decoder(
            input_ids=tokens[:, None], position_ids=positions[:, None], attention_mask=self.mask, use_cache=True,
            past_key_values=slots, cached_rows=slots.attend,
        )  # fmt: skip
        states: Tensor = out.last_hidden_state[:, 0]
        return states

    def _sample(self, states: Tensor, part: slice) -> None:
        """Sample the next token of the rows `part` from their last hidden states, [n, D]."""
        count = self.count[part]
        tokens, logps = self.pick(states, self.key[part], count)
        rows = self.every[part]
        at = count.clamp(max=self.ids.shape[1] - 1)
        running = ~self.ended[part]
        self.ids[rows, at] = torch.where(running, tokens, self.ids[rows, at])
        self.logps[rows, at] = torch.where(running, logps, self.logps[rows, at])
        self.count[part] += running
        self.token[part] = tokens
        at_end = (tokens[:, None] == self.ends).any(1)  # torch.isin would wait for the device where ends are many
        self.ended[part] |= at_end | (self.count[part] >= self.most[part])

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
            for numbers in self._numbers():
                numbers[targets] = numbers[sources]
            self.slots.move(sources, targets, max(self.longest[source] for source, _ in moves))
            for source, target in moves:
                self.who[target], self.longest[target] = self.who[source], self.longest[source]
        self._rest()

    def _numbers(self) -> tuple[Tensor, ...]:
        """The tensors that hold something of each row."""
        return self.token, self.count, self.start, self.most, self.key, self.ids, self.logps, self.ended

    def _rest(self) -> None:
        """Let the rows that do not run stand at the start of their slots, where a step of theirs costs least."""
        idle = slice(self.schedule.running, None)
        self.ended[idle], self.start[idle], self.count[idle] = True, 1, 0

    def close(self) -> None:
        """Let go of graphs and slots; the memory of large ones goes back to the device, for training."""
        held = self.slots.nbytes
        if self.graphs is not None:
            self.graphs.drop()
        self.slots.clear()
        if self.machine.give_back is not None and held >= LARGE:
            self.machine.give_back()


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Let a generation view skip, over prompts, the part of its last layer that nothing reads; and what a CPU needs."""
    skip_unread_mlp(model.get_decoder())
    if model.device.type == "cpu":
        cpu.sampling(model)
    return model
