"""The engine `hybrid`: DeepSpeed's `RolloutEngine` with our own sampling inside, for its own trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines.engine import version
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.in_process import InProcess
from dsalign.rollout.pick import token_key


@dataclass
class SampledBatch(RolloutBatch):  # type: ignore[misc]
    """DeepSpeed's batch with what it lacks: lengths, [B'] int64, tokens of each response, its end token included;
    logps, [B', longest response] float32, the sampler's log-probabilities, nats, 0 behind the end."""

    lengths: Tensor
    logps: Tensor


class HybridRollout(RolloutEngine):  # type: ignore[misc]
    """A rollout engine over any DeepSpeed engine that has a causal language model as its module.

    It holds no second copy of the weights, so `sync_weights` has nothing to send; it only says which step the next
    rollout is of. end_ids: the tokens that end a response. pad_id: fills the rows. seed: of the draws, which are a
    function of (seed, number of the call, row, sample). rows: responses that run at a time.
    """

    name = "hybrid"

    def __init__(self, engine: Any, end_ids: frozenset[int], pad_id: int, *, seed: int = 0, rows: int = 64) -> None:
        self.end_ids, self.pad_id, self.seed, self._calls = end_ids, pad_id, seed, 0
        self._inside = InProcess(engine, "auto", rows)

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> SampledBatch:
        """Sample n_samples_per_prompt responses of each prompt. Collective at ZeRO-3.

        request: prompts padded on the left. sampling: continuous_batch_size is not read, as rows are always refilled.
        Returns rows of [prompt, response], the prompt as it was padded, the responses of one prompt next to each other.
        """
        padded = request.prompt_ids, request.prompt_attention_mask
        prompts = [row[mask.bool()].tolist() for row, mask in zip(*padded, strict=True)]
        n = sampling.n_samples_per_prompt
        requests = [
            Request(prompt, [token_key(self.seed, self._calls, i, k) for k in range(n)], sampling.max_new_tokens)
            for i, prompt in enumerate(prompts)
        ]
        options = RolloutOptions(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
        )
        self._calls += 1
        flat = [one for answer in self._inside.generate(requests, options, self.end_ids) for one in answer]
        return self._batch(request, flat, n)

    def sync_weights(self, step: int) -> None:
        """Check that the weights are those of the optimizer step `step`, counted by DeepSpeed from 0.

        Raises ValueError where they are not.
        """
        found = version(self._inside.engine)
        if found != step:
            raise ValueError(f"rollout: expected the weights of step {step}, the engine is at step {found}")

    def shutdown(self) -> None:
        """Nothing is held between two calls."""

    def _batch(self, request: RolloutRequest, flat: Sequence[Completion], n: int) -> SampledBatch:
        ids, mask = (x.repeat_interleave(n, 0) for x in (request.prompt_ids, request.prompt_attention_mask))
        device, width = ids.device, ids.shape[1]
        responses = [torch.tensor(one.ids, device=device) for one in flat]
        padded = pad_sequence(responses, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(one.ids) for one in flat], device=device)
        seen = torch.arange(padded.shape[1], device=device) < lengths[:, None]
        return SampledBatch(
            input_ids=torch.cat([ids, padded], 1),
            attention_mask=torch.cat([mask, seen.to(mask.dtype)], 1),
            response_start_idx=torch.full((len(flat),), width, device=device),
            lengths=lengths,
            logps=pad_sequence([one.logps for one in flat], batch_first=True).to(device),
        )
