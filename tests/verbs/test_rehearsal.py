"""Tiny models of many families, and the rows of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsalign.config import parse
from dsalign.models.names import Source
from dsalign.verbs import rehearsal
from tests.support import tiny_folder

LARGE = {  # numbers of real models of each family
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128},
    "gemma2": {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma3_text": {"hidden_size": 2304, "num_hidden_layers": 26},
    "mixtral": {"hidden_size": 4096, "num_hidden_layers": 32},
    "qwen2_moe": {"hidden_size": 2048, "num_hidden_layers": 24},
    "gpt2": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "opt": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192},
    "phi3": {"hidden_size": 3072, "num_hidden_layers": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", LARGE)
def test_a_tiny_model_of_the_family_computes(family: str) -> None:
    """Two layers, 64 wide, as many token ids as the model has, and numbers that are finite."""
    config: Any = AutoConfig.for_model(family, **LARGE[family])
    if getattr(config, "pad_token_id", None) is not None and config.pad_token_id >= 100:
        config.pad_token_id = 0
    cut = rehearsal.tiny(config, 100)
    model = AutoModelForCausalLM.from_config(cut)
    assert len(model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h) == 2
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 100) and bool(torch.isfinite(logits).all())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_a_family_that_cannot_be_built_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse.parse(["--algo", "dpo"], world_size=1).config
    source = Source(str(tiny_folder(tmp_path / "base")))
    monkeypatch.setitem(rehearsal.SIZES, "hidden_size", 7)
    with pytest.raises(rehearsal.TooOddError, match="no tiny llama can be built from its config"):
        rehearsal.build_tiny("policy", source, config, tmp_path / "small")
