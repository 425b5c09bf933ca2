"""What bare matrix products cost: the least that a forward through a model's linear layers can take on a CPU.

The products are those of the model's own weights, one layer after the other as in a forward, so that weights come from
memory as often as they do there; attention, norms, activations and everything around them are left out.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 1024  # rows of a product at most; more do not make a row cheaper


def matrices(model: Any) -> tuple[list[Tensor], Tensor]:
    """(weights [out, in] of the decoder's linear layers in their order, the head's weight [V, D])."""
    layers = [m.weight.detach() for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return layers, model.get_output_embeddings().weight.detach()


def seconds_a_row(weights: list[Tensor], rows: int, repeats: int = 3) -> float:
    """CPU-seconds of x W^T over all weights for each of so many rows of x, the least of the repeats."""
    rows = min(rows, AT_ONCE)
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    taken = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.process_time()
        for w in weights:
            torch.mm(inputs[w.shape[1]], w.t())
        taken.append(time.process_time() - start)
    return min(taken[1:]) / rows


def sampling_seconds(costs: dict[str, float], *, prompt_tokens: int, tokens: int, answers: int) -> float:
    """The least CPU-seconds of sampling: every prompt once through the layers, every sampled token but an answer's last
    through the layers, and a row of logits a token.

    costs: CPU-seconds a row, `prompt` through the layers for many rows at once, `token` for as many as are decoded at a
    time, `head` of logits.
    """
    return prompt_tokens * costs["prompt"] + (tokens - answers) * costs["token"] + tokens * costs["head"]
