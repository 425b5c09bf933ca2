"""A reward model as a classifier of transformers: the class, its weights, and the token it pads with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCABULARY, random_model, tiny_config, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from dsalign.data.batches.packing import Inputs
from dsalign.models.classifier import SCORE, classifier_of, describe, padded_apart
from dsalign.models.heads import ValueModel

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2,
}  # fmt: skip
OPT = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.2, pad_token_id=0, do_layer_norm_before=False,
)  # fmt: skip
CONFIGS = {
    "LlamaForSequenceClassification": tiny_config(tie_word_embeddings=True),
    "GPT2ForSequenceClassification": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "OPTForSequenceClassification": OPT,
    "Qwen2ForSequenceClassification": Qwen2Config(**SIZES),
    "Gemma2ForSequenceClassification": Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8),
    "GPTNeoXForSequenceClassification": GPTNeoXConfig(**SIZES),
    "MixtralForSequenceClassification": MixtralConfig(**SIZES, num_local_experts=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_class_takes_the_weights_and_gives_the_score(name: str, tmp_path: Path) -> None:
    """Families whose decoders, heads and norms differ; rows of 4 and 6 tokens padded with 0, scored by both to 1e-5."""
    ours = ValueModel(random_model(CONFIGS[name]), seed=1, reward=True).eval()
    assert ours.classifier is not None and ours.classifier.name == name
    weights = {k: v for k, v in ours.model.state_dict().items() if k not in ours.classifier.left_out}
    ours.model.save_pretrained(tmp_path, state_dict=weights | {SCORE: ours.v_head.summary.weight.detach().clone()})
    describe(ours.model.config, ours.classifier, 0).save_pretrained(tmp_path)
    theirs, found = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    rows, nothing = [[4, 5, 6, 2], [7, 8, 9, 10, 11, 2]], torch.empty(0, dtype=torch.int64)
    ids = torch.tensor([[*row, *[0] * (6 - len(row))] for row in rows])
    with torch.no_grad():
        mine = [ours(Inputs(torch.tensor([r]), nothing, nothing, torch.tensor([len(r) - 1]))) for r in rows]
        got = theirs.eval()(ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(got, torch.cat(mine), atol=1e-5, rtol=0)
    assert abs(float(got[0] - got[1])) > 1e-3


def test_a_family_without_such_a_class_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5 has none for Cohere; the score is then in dsalign's own file alone."""
    with caplog.at_level(logging.WARNING):
        assert classifier_of(random_model(CohereConfig(**SIZES)), 32) is None
    assert caplog.messages == [
        "transformers has no class for sequence classification that takes the weights of CohereForCausalLM and a "
        "score: the score is in value_head.safetensors alone, which dsalign reads"
    ]


def test_a_critic_keeps_its_bias_and_is_no_classifier() -> None:
    """A value needs a bias, a score does not, as only differences count: there it stays what it was at the start."""
    critic, reward = (ValueModel(random_model(tiny_config()), seed=0, reward=reward) for reward in (False, True))
    assert critic.classifier is None and critic.v_head.summary.bias.requires_grad
    assert reward.classifier is not None and not reward.v_head.summary.bias.requires_grad
    assert reward.v_head.summary.weight.requires_grad


@pytest.mark.parametrize(
    ("pad", "ends", "want"),
    [("<pad>", {2}, "<pad>"), ("<|im_end|>", {2}, "<pad>"), (None, {2}, "<pad>"), ("<pad>", {0, 2}, "<unk>"),
     ("<pad>", {0, 2, 3}, "<|im_start|>"), ("<|im_end|>", {0, 1, 2, 3}, None)],
)  # fmt: skip
def test_the_pad_token_ends_no_turn(
    pad: str | None, ends: set[int], want: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer's own where it may stay; one that is called pad; another special one; none, and a line says it."""
    given = tiny_tokenizer()
    given.pad_token = pad
    found = padded_apart(given, ends, VOCABULARY)
    assert found.pad_token == want
    assert given.pad_token == pad  # the run's own tokenizer stays
    said = ["the tokenizer has no pad token that ends no turn: transformers scores one row at a time"]
    assert caplog.messages == ([] if want else said)


def test_a_pad_token_has_an_embedding() -> None:
    """Ids from the number of embeddings on would be outside the table."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad_beyond|>"]})
    assert padded_apart(tokenizer, {0, 2}, VOCABULARY).pad_token == "<unk>"
