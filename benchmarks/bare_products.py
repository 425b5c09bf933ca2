"""What bare matrix products cost: the least that a forward through a model's linear layers can take.

The products are those of the model's own weights, one layer after the other as in a forward, so that weights come from
memory as often as they do there; attention, norms, activations and everything around them are left out.
"""

from __future__ import annotations

from typing import Any

import device_costs
import torch
from torch import Tensor, nn

AT_ONCE = 1024  # rows of a product at most: more do not make a row cheaper


def matrices(model: Any) -> tuple[list[Tensor], Tensor]:
    """(weights [out, in] of the decoder's linear layers in their order, the head's weight [V, D])."""
    layers = [m.weight.detach() for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return layers, model.get_output_embeddings().weight.detach()


def seconds_a_row(weights: list[Tensor], rows: int, repeats: int = 3) -> float:
    """Seconds of x W^T over all weights for each of so many rows of x, the least of the repeats: of the process on a
    CPU, of the wall on a GPU."""
    rows, device = min(rows, AT_ONCE), weights[0].device
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=device, dtype=w.dtype) for w in weights}
    taken = []
    for _ in range(repeats + 1):  # the first one warms up
        start = device_costs.clock_s(device)
        for w in weights:
            torch.mm(inputs[w.shape[1]], w.t())
        taken.append(device_costs.clock_s(device) - start)
    return min(taken[1:]) / rows


def row_costs(model: Any, *, at_once: int, decoded: int) -> dict[str, float]:
    """Seconds a row of a model's products: `prompt` of the layers and `head_at_once` of the head for at_once rows,
    `token` of the layers and `head` of the head for as many rows as are decoded at a time."""
    layers, head = matrices(model)
    return {
        "prompt": seconds_a_row(layers, at_once),
        "token": seconds_a_row(layers, decoded),
        "head": seconds_a_row([head], decoded),
        "head_at_once": seconds_a_row([head], at_once),
    }


def sampling_seconds(costs: dict[str, float], *, prompt_tokens: int, tokens: int, answers: int) -> float:
    """The least seconds of sampling: every prompt once through the layers, every sampled token but an answer's last
    through the layers, and a row of logits a token.

    costs: of `row_costs`.
    """
    return prompt_tokens * costs["prompt"] + (tokens - answers) * costs["token"] + tokens * costs["head"]


def ppo_seconds(costs: dict[str, float], *, prompt_tokens: int, tokens: int, answers: int) -> float:
    """The least seconds of an iteration of PPO with one pass over its rollout: the sampling and nine forwards.

    A backward counts as two forwards, so the nine are three of the policy, three of the critic, and one each of the
    reference, the reward model and the critic before its step; log-probabilities of the policy before its step come
    from the sampler. Every prompt goes once through the layers whatever its number of answers; in the four forwards of
    policy and reference answers go through the head. costs: as in `sampling_seconds`, with the head's for many rows at
    once in `head_at_once`.
    """
    rollout = sampling_seconds(costs, prompt_tokens=prompt_tokens, tokens=tokens, answers=answers)
    return rollout + 9 * (prompt_tokens + tokens) * costs["prompt"] + 4 * tokens * costs["head_at_once"]
