"""Shapes: the published numbers of parameters, tiny models counted by transformers, and adapters counted by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from dsalign.memory import shapes
from dsalign.memory.shapes import UnknownFamilyError, of_config, of_numbers
from dsalign.models import lora_targets

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
PUBLISHED: list[tuple[dict[str, Any], int, int]] = [  # config.json, all parameters, those that a token uses
    (
        LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "intermediate_size": 14336, "vocab_size": 128256},
        8_030_261_248, 8_030_261_248,
    ),
    (
        {"model_type": "qwen2", "tie_word_embeddings": True, "hidden_size": 896, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936},
        494_032_768, 494_032_768,
    ),
    (
        {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
         "num_experts_per_tok": 2},
        46_702_792_704, 12_879_925_248,
    ),
    (
        LLAMA | {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
                 "intermediate_size": 53248, "vocab_size": 128256},
        405_853_388_800, 405_853_388_800,
    ),
]  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "granite": {},
    "smollm3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
                  "decoder_sparse_step": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [1]},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                    "topk_group": 1, "moe_intermediate_size": 24, "q_lora_rank": 12, "kv_lora_rank": 8,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1},
}  # fmt: skip


@pytest.mark.parametrize(("config", "total", "active"), PUBLISHED, ids=["llama-8b", "qwen-0.5b", "mixtral", "405b"])
def test_published_numbers_of_parameters(config: dict[str, Any], total: int, active: int) -> None:
    """What the model cards say, to the last parameter."""
    shape = of_config(config)
    assert (shape.total, shape.active) == (total, active)


def test_llama_8b_by_hand() -> None:
    """Embedding and head 2 x 128256 x 4096; a layer: q and o 2 x 4096^2, k and v 2 x 4096 x 1024, MLP 3 x 4096 x 14336,
    norms 2 x 4096; the last norm 4096. LoRA of rank 8 on q, k, v: 8 x (8192 + 2 x 5120) a layer."""
    shape = of_config(PUBLISHED[0][0])
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert shape.total == 2 * 128256 * 4096 + 32 * layer + 4096
    assert shape.lora(8, ("DEFAULT",)) == 32 * 8 * (8192 + 2 * 5120)
    assert shape.lora(8, ("ALL",)) == 20_971_520
    assert shape.largest == 128256 * 4096


def model_of(kind: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the model that transformers makes, without memory; its config.json as transformers writes it)."""
    config = AutoConfig.for_model(kind, **{**({} if kind == "gpt2" else TINY), "vocab_size": 50, **FAMILIES[kind]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_counts_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """All parameters, and the adapter on all linear layers, whose targets dsalign's own search finds."""
    model, config = model_of(kind, tmp_path)
    shape = of_config(config)
    assert shape.total == sum(p.numel() for p in model.parameters())
    targets = lora_targets.find(model, ("ALL",))
    wanted = LoraConfig(r=4, target_modules=targets.modules, target_parameters=targets.parameters or None)
    adapted = get_peft_model(model, wanted)
    assert shape.lora(4, ("ALL",)) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == set(shapes.FAMILIES)


def test_a_model_for_images_too_is_its_language_model() -> None:
    config = {"model_type": "llava", "text_config": PUBLISHED[0][0], "vision_config": {}}
    assert of_config(config).total == 8_030_261_248


def test_described_by_numbers() -> None:
    """70 billion parameters, 80 layers of width 8192: the inner size that makes them 70 billion within 0.1 %; with it
    given, the number of parameters follows, 70,553,706,496 for Llama 3 70B."""
    assert of_numbers(80, 8192, params=70e9).total == pytest.approx(70e9, rel=1e-3)
    assert of_numbers(80, 8192, intermediate=28672).total == 70_553_706_496
    assert of_numbers(32, 4096, intermediate=14336, vocabulary=32000, experts=8).total == 46_702_792_704


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(UnknownFamilyError, match="model_type 'mamba'"):
        of_config({"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"expected the key 'hidden_size' of a llama model, found none"):
        of_config({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"lora_target_modules: expected some of down_proj, .* got elsewhere"):
        of_config(PUBLISHED[0][0]).lora(8, ("elsewhere",))
    with pytest.raises(ValueError, match=r"--params: expected more than 1,134,579,712, .* got 1,000,000"):
        of_numbers(2, 4096, params=1e6)
