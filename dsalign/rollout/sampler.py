"""Sampling with a key-value cache: a forward pass of the prompts, then one a token until all completions have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.rollouts import RolloutOptions


def noise(seed: int, step: int, index: int, sample: int, count: int) -> Tensor:
    """The randomness of one completion: [count] float64 in [0, 1), one number a token.

    It is a function of (seed, step, index of the group, number of the sample) alone, so that a completion depends
    neither on the number of ranks nor on the other prompts of its batch.
    """
    key = hash((seed, step, index, sample)) % 2**63
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(key))


@torch.no_grad()
def sample_completions(
    model: Any, prompts: Sequence[Sequence[int]], draws: Tensor, options: RolloutOptions, end_ids: frozenset[int]
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Sample one completion for each of B prompts: (token ids, log-probabilities [tokens] float32 on the CPU, nats).

    model: a causal language model of transformers. draws: [B, max_new_tokens] float64 in [0, 1), see `noise`. A
    completion ends with its first end token, or has max_new_tokens. Log-probabilities are of the logits divided by the
    temperature, before top_p and top_k.
    """
    device = draws.device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left: the next token comes at the same column for all
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(end_ids), device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    tokens, logps, cache = [], [], None
    for t in range(options.max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen, logp = pick(out.logits[:, -1].float() / options.temperature, draws[:, t], options)
        tokens.append(chosen)
        logps.append(logp)
        lengths += running
        running = running & ~torch.isin(chosen, ends)
        if not bool(running.any()):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        positions = positions[:, -1:] + 1
    all_tokens, all_logps = torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu()
    found = zip(all_tokens.tolist(), all_logps, lengths.tolist(), strict=True)
    return [(tuple(row[:n]), logp[:n].clone()) for row, logp, n in found]


def pick(logits: Tensor, draws: Tensor, options: RolloutOptions) -> tuple[Tensor, Tensor]:
    """Sample a token for each of B rows by inverting the cumulative distribution at draws, [B] in [0, 1).

    logits: [B, V] float32, divided by the temperature already.
    Returns (tokens [B] int64, their log-probabilities [B] float32, nats, before top_p and top_k).
    """
    logps = torch.log_softmax(logits, -1)
    if options.top_k == 1:
        chosen = logps.argmax(-1)
    elif options.top_k == 0 and options.top_p == 1:
        chosen = _invert(logps.double().exp(), draws)
    else:
        ordered, order = torch.sort(logps, dim=-1, descending=True, stable=True)
        p = ordered.double().exp()
        before = p.cumsum(-1) - p  # a token is kept while those above it hold less than top_p
        kept = before < options.top_p
        if options.top_k:
            kept[:, options.top_k :] = False
        chosen = order.gather(1, _invert(p * kept, draws)[:, None])[:, 0]
    return chosen, logps.gather(1, chosen[:, None])[:, 0]


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """The first index of each row of `weights` [B, V] whose cumulative weight exceeds draw x total, [B]; never one of
    weight 0, as a draw is < 1."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)
