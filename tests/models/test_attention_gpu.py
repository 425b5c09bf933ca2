"""On a GPU a packed row goes through FlexAttention; it must say what each sequence alone says, in float32."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from plain import plain_logps
from support import VOCABULARY, random_groups
from test_attention import SIZES, build
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from dsalign.contract.groups import Group
from dsalign.data.batches.packing import packed, padded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is the GPU's path")
WIDE = {**SIZES, "hidden_size": 128, "head_dim": 32, "max_position_embeddings": 4096}
WINDOW = 100
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDE),
    "qwen3": Qwen3Config(**WIDE),
    "mistral window": MistralConfig(**WIDE, sliding_window=WINDOW),
    "gemma2 window": Gemma2Config(**WIDE, query_pre_attn_scalar=32, attn_logit_softcapping=2.0, sliding_window=WINDOW),
}


def groups() -> list[Group]:
    """Prompts of up to 200 tokens with 2, 1 and 3 completions of up to 150: over several blocks of 128. Two prompts
    begin with the same 140 tokens."""
    draw = random.Random(0)
    found = random_groups("prompts", 3, longest=200)
    turn = tuple(4 + i % 40 for i in range(140))
    found = [dataclasses.replace(g, prompt=(*turn, *g.prompt[:9]) if i != 1 else g.prompt) for i, g in enumerate(found)]
    return [
        dataclasses.replace(
            g,
            completions=tuple(
                (*(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(20, 150))), 2) for _ in range(count)
            ),
        )
        for g, count in zip(found, (2, 1, 3), strict=True)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_is_every_sequence_alone(name: str) -> None:
    """Values to 1e-5 and gradients to 1e-5 of their norm, against the untouched model."""
    device = torch.device("cuda")
    ours, theirs = build(CONFIGS[name]).to(device), build(CONFIGS[name], shares=False)
    want = torch.cat(plain_logps(theirs.model, groups()))
    theirs = theirs.to(device)
    assert ours.shares
    found, _ = ours(packed(groups(), device))
    torch.testing.assert_close(found.detach().cpu(), want, atol=2e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, len(found), device=device)
    (weights * found).sum().backward()
    (weights * theirs(padded(groups(), device))[0]).sum().backward()
    grads = dict(theirs.named_parameters())
    size = max(float(p.grad.norm()) for p in grads.values() if p.grad is not None)
    for parameter, mine in ours.named_parameters():
        other = grads[parameter].grad
        if other is not None:
            assert mine.grad is not None and float((mine.grad - other).norm()) <= 1e-5 * size, parameter
    assert ours.unsupported == ""
