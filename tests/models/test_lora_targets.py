"""Which layers an adapter is put on: words as other trainers spell them, experts and not routers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experts import SHAPES, model_of
from peft import PeftModel
from support import random_groups, section, tiny_config
from test_adapters import disturb
from transformers import LlamaForCausalLM

from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import padded
from dsalign.models import adapters
from dsalign.models.heads import CausalModel
from dsalign.models.lora_targets import find
from dsalign.models.names import Source

INPUTS = padded(random_groups("demonstrations", 3), torch.device("cpu"))
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MORE = {"qwen2_moe": {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"}}


def logps(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return CausalModel(model)(INPUTS)[0]


def add(shape: str, dropout: float = 0.0, words: tuple[str, ...] = ("ALL",)) -> PeftModel:
    options = section(ModelOptions, lora_rank=2, lora_alpha=4, lora_dropout=dropout, lora_target_modules=words)
    return adapters.add(model_of(shape), Source(""), options, seed=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_is_every_layer_and_expert_but_no_router(shape: str) -> None:
    """Two tensors of experts a layer, each adapted; no weight of a router or of the head."""
    model = add(shape)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    last = {name.split(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for name in trained}
    assert last == ATTENTION | MORE.get(shape, set()) | {"experts"}
    assert len([name for name in trained if ".experts." in name]) == 2 * 2 * 2  # layers, tensors, A and B


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_of_adapted_experts_is_the_start(shape: str) -> None:
    start = logps(model_of(shape))
    model = add(shape).eval()
    torch.testing.assert_close(logps(model), start, atol=1e-5, rtol=1e-5)
    disturb(model)
    assert (logps(model) - start).abs().max() > 0.01
    with adapters.with_start_weights(model):
        torch.testing.assert_close(logps(model), start, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapted_experts_are_opened_again(shape: str, tmp_path: Path) -> None:
    """By PEFT, and by a run that goes on with the adapter."""
    model = add(shape, dropout=0.1).eval()
    disturb(model)
    want = logps(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logps(PeftModel.from_pretrained(model_of(shape), tmp_path)), want, atol=1e-5, rtol=1e-5)
    options = section(ModelOptions)
    again = adapters.add(model_of(shape), Source("", adapter=tmp_path), options, seed=2).eval()
    torch.testing.assert_close(logps(again), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logps(adapters.merge(model_of(shape), tmp_path)), want, atol=1e-4, rtol=1e-4)


def test_dropout_is_on_all_layers_but_experts_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The default of SFT on a Mixtral: PEFT would refuse it."""
    model = add("mixtral", dropout=0.05)
    assert "lora_dropout 0.05: not on the weights of experts" in caplog.text
    kinds = {
        name.split(".")[-3] for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.05
    }
    assert kinds == ATTENTION
    assert model.peft_config["default"].lora_dropout == 0.0


@pytest.mark.parametrize("word", ["all-linear", "all", "All", "ALL-LINEAR"])
def test_other_words_for_all(word: str) -> None:
    assert find(LlamaForCausalLM(tiny_config()), [word]) == find(LlamaForCausalLM(tiny_config()), ["ALL"])
    assert find(model_of("gpt_oss"), [word]) == find(model_of("gpt_oss"), ["ALL"])


def test_ends_of_names_and_all_beside_a_name() -> None:
    """self_attn.q_proj is no mlp's; one layer by its whole name; ALL with the head; a tensor of experts by name."""
    llama = LlamaForCausalLM(tiny_config())
    assert find(llama, ["self_attn.q_proj"]).modules == ["self_attn.q_proj"]
    assert find(llama, ["model.layers.1.mlp.up_proj"]).modules == ["model.layers.1.mlp.up_proj"]
    assert len(find(llama, ["ALL", "lm_head"]).modules) == 2 * 7 + 1
    assert find(model_of("mixtral"), ["experts.down_proj"]).parameters == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]


@pytest.mark.parametrize("word", ["norm", "input_layernorm", "mlp.q_proj", "proj"])
def test_a_layer_that_lora_cannot_take_is_refused(word: str) -> None:
    """A norm has weights but is no matrix; half a name is none; norms are not among those that are offered."""
    with pytest.raises(
        ValueError, match=rf"no layer called {word} that LoRA can take; write ALL, or some of (?!.*norm)"
    ):
        find(LlamaForCausalLM(tiny_config()), [word])
