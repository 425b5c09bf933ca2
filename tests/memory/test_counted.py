"""A model whose family has no formula: counted from its modules."""

from __future__ import annotations

import pytest

from dsalign.memory.counted import by_modules
from dsalign.memory.shapes import of_config

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_known_family_counts_as_by_its_formula() -> None:
    """Llama both ways: the same linear layers, so the same adapters and the same activations."""
    config = {"model_type": "llama", **TINY}
    counted, formula = by_modules(config), of_config(config)
    assert counted.source == "a count of the modules of llama"
    assert counted.layers == formula.layers
    assert (counted.total, counted.active, counted.tied) == (formula.total, formula.active, False)


def test_experts_of_an_unknown_family() -> None:
    """OLMoE, by hand: embedding and head 2 x 50 x 32; a layer: q and o 2 x 32 x 32, k and v 2 x 32 x 16, norms of
    queries 32 and keys 16, 2 norms of 32, router 4 x 32, 4 experts 3 x 32 x 48; the last norm 32. A token uses 2."""
    config = {"model_type": "olmoe", **TINY, "num_experts": 4, "num_experts_per_tok": 2}
    counted = by_modules(config)
    rest = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 16 + 2 * 32 + 4 * 32
    assert counted.total == 2 * 50 * 32 + 3 * (rest + 4 * 3 * 32 * 48) + 32
    assert counted.active == 2 * 50 * 32 + 3 * (rest + 2 * 3 * 32 * 48) + 32


def test_a_family_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"expected a model_type that transformers .* got 'nothing'.*--params"):
        by_modules({"model_type": "nothing", **TINY})
