"""The least time that sampling takes where memory limits it: what must be read, by the bandwidth of a copy.

A decoding step reads every weight that it multiplies by, and the keys and values of every token that a running
completion sees. All completions run at once, so there are as many steps as the longest one has tokens. Prompts, whose
forward is limited by arithmetic, are left out, as are activations and logits: a real run reads more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import device_costs


def costs(model: Any) -> dict[str, float]:
    """`bandwidth`, bytes a second; `weight_bytes` of a decoding step; `token_bytes`, the keys and values of a token."""
    weight = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    read = {id(p): p for p in model.parameters()}
    if model.get_output_embeddings().weight is not weight:
        read.pop(id(weight))  # an embedding that is no head is looked up, a row a token
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return {
        "bandwidth": device_costs.bytes_a_second(weight.device),
        "weight_bytes": float(sum(p.numel() * p.element_size() for p in read.values())),
        "token_bytes": float(numbers * weight.element_size()),
    }


def reads(prompts: Sequence[int], answers: Sequence[int]) -> dict[str, int]:
    """`steps`, decoding steps, and `seen`, the tokens whose keys and values they read, from the tokens of each
    completion's prompt and of the completion itself. A prompt's forward gives the first token; the step that gives
    token t sees the prompt and t - 1 tokens."""
    seen = sum((n - 1) * prompt + n * (n - 1) // 2 for prompt, n in zip(prompts, answers, strict=True))
    return {"steps": max(answers) - 1, "seen": seen}


def seconds(found: Mapping[str, float], *, steps: int, seen: int) -> float:
    """The least seconds of decoding. found: of `costs`; steps and seen: of `reads`."""
    return (steps * found["weight_bytes"] + seen * found["token_bytes"]) / found["bandwidth"]
