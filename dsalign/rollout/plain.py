"""The engine `plain`: transformers' own forward and cache, for any architecture; the truth that others are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dsalign import phases
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.pick import Pick, signed


def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    options: RolloutOptions,
    end_ids: frozenset[int],
    rows: int = 64,
) -> list[list[Completion]]:
    """Sample the completions of each request, in the order of its keys: batches of `rows` completions, prompts padded
    on the left, each batch until its last completion has ended.

    model: a causal language model of transformers in evaluation mode. end_ids: the tokens that end a completion.
    """
    each = [(request, key) for request in requests for key in request.keys]
    found: list[Completion] = []
    with torch.no_grad():
        for start in range(0, len(each), rows):
            found += _batch(model, each[start : start + rows], options, end_ids)
    answers = iter(found)
    return [[next(answers) for _ in request.keys] for request in requests]


def _batch(
    model: PreTrainedModel, each: Sequence[tuple[Request, int]], options: RolloutOptions, end_ids: frozenset[int]
) -> list[Completion]:
    """A completion for each (request, key)."""
    device, pick = model.get_input_embeddings().weight.device, Pick(model, options)
    width = max(len(request.prompt) for request, _ in each)
    ids = torch.zeros(len(each), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (request, _) in enumerate(each):  # on the left: the next token comes at the same column for all
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    keys = torch.tensor([signed(key) for _, key in each], device=device)
    most = torch.tensor([request.max_new_tokens for request, _ in each], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
    running = torch.ones(len(each), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(each), dtype=torch.int64, device=device)
    tokens, logps, cache = [], [], None
    for t in range(int(most.max())):
        phases.mark()
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = out.past_key_values
        chosen, logp = pick.of_logits(out.logits[:, -1], keys, torch.full_like(keys, t))
        tokens.append(chosen)
        logps.append(logp)
        lengths += running
        running = running & ~torch.isin(chosen, ends) & (lengths < most)
        if not bool(running.any()):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(each), 1)], 1)
        positions = positions[:, -1:] + 1
    all_tokens, all_logps = torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).cpu()
    each_row = zip(all_tokens, all_logps, lengths.tolist(), strict=True)
    return [Completion(tuple(row[:n]), logp[:n].clone(), row[n - 1] in end_ids) for row, logp, n in each_row]
