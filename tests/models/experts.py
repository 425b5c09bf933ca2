"""Tiny mixtures of experts of three shapes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support import VOCABULARY
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": 0,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, decoder_sparse_step=1
    ),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, head_dim=8),
}


def model_of(shape: str, seed: int = 0) -> Any:
    """A model of this shape with random weights, those of experts among them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.2)
    return model.eval()
