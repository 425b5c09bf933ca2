"""Log-probabilities are the model's own, and values sit where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain import plain_logps, plain_values
from safetensors.torch import save_file
from support import SIZES, VOCABULARY, random_groups, random_model, tiny_config
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from dsalign.data.batches.packing import padded
from dsalign.models.heads import BIAS, WEIGHT, CausalModel, ValueHead, ValueModel, num_ids
from dsalign.models.logps import Head, LogitTransform

CPU = torch.device("cpu")
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
CONFIGS = {
    "llama": tiny_config(),
    "llama tied": tiny_config(tie_word_embeddings=True),
    "gpt2": GPT2,
    "qwen2": Qwen2Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_the_models_own(name: str) -> None:
    """Five pairs of uneven lengths in one padded batch against one sequence at a time through the whole model."""
    model = random_model(CONFIGS[name])
    groups = random_groups("pairs", 5)
    inputs = padded(groups, CPU)
    with torch.no_grad():
        logps, entropy = CausalModel(model)(inputs, True)
        own = torch.log_softmax(CausalModel(model).whole_logits(inputs.ids).flatten(0, 1)[inputs.predict], -1)
    torch.testing.assert_close(logps, torch.cat(plain_logps(model, groups)), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, -(own.exp() * own).sum(-1), atol=2e-6, rtol=1e-5)
    assert float(logps.max() - logps.min()) > 0.5  # a head that does something


@pytest.mark.parametrize(("name", "key"), [("gemma2", "softcap"), ("granite", "scale"), ("cohere", "scale")])
def test_the_transform_matters_in_the_test_above(name: str, key: str) -> None:
    """Without it the log-probabilities are other ones."""
    wrapped, inputs = (
        CausalModel(random_model(CONFIGS[name]).requires_grad_(False)),
        padded(random_groups("pairs", 5), CPU),
    )
    right, _ = wrapped(inputs)
    assert getattr(wrapped.head.transform, key) not in (None, 1.0)
    wrapped.head = Head(LogitTransform())
    wrong, _ = wrapped(inputs)
    assert float((right - wrong).abs().max()) > 0.01


def test_nothing_to_predict_keeps_the_graph() -> None:
    """What a rank without rows runs: no log-probabilities, and a gradient of 0 for every parameter."""
    model = random_model(CONFIGS["llama"])
    inputs = padded([], CPU)
    logps, entropy = CausalModel(model)(inputs, True)
    assert logps.shape == (0,)
    assert entropy is not None
    (0 * logps.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_values_are_at_the_right_positions() -> None:
    """v . state + b from the last prompt token to the last completion token of each completion."""
    model = random_model(CONFIGS["llama"])
    wrapped = ValueModel(model, seed=3)
    with torch.no_grad():
        wrapped.v_head.summary.bias.fill_(0.5)
    groups = random_groups("pairs", 5)
    inputs = padded(groups, CPU)
    weight, bias = wrapped.v_head.summary.weight, wrapped.v_head.summary.bias
    want = torch.cat(plain_values(model, weight, bias, groups))
    with torch.no_grad():
        values = wrapped(inputs)
    assert values.shape == (sum(len(c) + 1 for g in groups for c in g.completions),)
    torch.testing.assert_close(values, want, atol=2e-6, rtol=1e-5)


def test_a_new_value_head() -> None:
    """Bias 0; 4095 weights of variance 1 / 4096; a function of the seed alone. Without one all is 0."""
    assert not any(parameter.any() for parameter in ValueHead(4, seed=None).parameters())
    torch.manual_seed(1)
    head = ValueHead(4095, seed=3)
    torch.manual_seed(2)
    assert torch.equal(head.summary.weight, ValueHead(4095, seed=3).summary.weight)
    assert not torch.equal(head.summary.weight, ValueHead(4095, seed=4).summary.weight)
    assert head.summary.weight.shape == (1, 4095)
    assert head.summary.bias.tolist() == [0.0]
    assert float(head.summary.weight.detach().std()) * 64 == pytest.approx(1, abs=0.04)  # its own error is 0.011
    assert float(head.summary.weight.detach().mean()) * 64 == pytest.approx(0, abs=0.06)  # its own error is 0.016


def test_a_value_head_computes_in_float32() -> None:
    """Weights and states in bfloat16: the product of 1 + 2**-7 with itself is not rounded."""
    head = ValueHead(1, seed=0)
    with torch.no_grad():
        head.summary.weight.fill_(1 + 2**-7)
    values = head.bfloat16()(torch.tensor([[1 + 2**-7]], dtype=torch.bfloat16))
    assert (values.dtype, values.item()) == (torch.float32, (1 + 2**-7) ** 2)


def test_an_unused_language_model_head_is_frozen_and_a_tied_one_is_not() -> None:
    """A head of its own would get no gradient; a tied one is the embedding."""
    untied, tied = (ValueModel(random_model(CONFIGS[name]), seed=0) for name in ("llama", "llama tied"))
    assert [n for n, p in untied.named_parameters() if not p.requires_grad] == ["model.lm_head.weight"]
    assert all(p.requires_grad for p in tied.parameters())


def value_model() -> ValueModel:
    with torch.random.fork_rng():
        return ValueModel(LlamaForCausalLM(tiny_config()), seed=0)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_value_head_is_read(name: str, tmp_path: Path) -> None:
    """Ours, or a foreign one with tensors only."""
    state = {WEIGHT: torch.arange(32.0)[None], BIAS: torch.tensor([7.0])}
    if name.endswith("bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    model = value_model()
    assert model.load_head(tmp_path)
    assert torch.equal(model.v_head.summary.weight, state[WEIGHT])
    assert torch.equal(model.v_head.summary.bias, state[BIAS])


def test_no_folder_and_no_file_is_no_head(tmp_path: Path) -> None:
    model = value_model()
    before = model.v_head.summary.weight.clone()
    assert not model.load_head(None)
    assert not model.load_head(tmp_path)
    assert torch.equal(model.v_head.summary.weight, before)


@pytest.mark.parametrize(
    "state",
    [
        {WEIGHT: torch.zeros(1, 16), BIAS: torch.zeros(1)},
        {WEIGHT: torch.zeros(1, 32)},
        {WEIGHT: torch.zeros(1, 32), BIAS: torch.zeros(1), "more": torch.zeros(1)},
    ],
)
def test_a_value_head_that_does_not_fit_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "value_head.safetensors")
    with pytest.raises(
        ValueError, match=r"its value head holds \{.*; expected v_head\.summary\.weight \(1, 32\) and v_h"
    ):
        value_model().load_head(tmp_path)


class Code:
    """Unpickling this makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({WEIGHT: Code(tmp_path / "ran")}, tmp_path / "value_head.bin")
    with pytest.raises(
        ValueError, match=r"value_head\.bin holds more than tensors and is not opened; save its tensors alone$"
    ):
        value_model().load_head(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "how",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
     {"target_modules": ["q_proj"], "trainable_token_indices": [5]}],
)  # fmt: skip
def test_how_many_ids_a_model_reads_under_an_adapter(how: dict[str, Any]) -> None:
    """What PEFT puts around an embedding lacks some of its attributes, and final/ of a reward model needs this one."""
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    assert num_ids(model) == num_ids(get_peft_model(model, LoraConfig(r=2, **how))) == VOCABULARY
