"""The base in 4 bits: its values by the paper's code, gradients through it, and adapters that remember it.

What packs weights needs bitsandbytes and is skipped without: pip install 'dsalign[4bit]'."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_groups, random_model, section, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, MixtralConfig

from dsalign import cli
from dsalign.checkpoint.export import export
from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import packed
from dsalign.engines.alone import Alone
from dsalign.models import four_bit, load
from dsalign.models.heads import CausalModel
from dsalign.models.names import BASE_FILE, Source, located_base, resolve
from dsalign.rollout.view import view_of

CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="4-bit weights need bitsandbytes: dsalign[4bit]"
)
# The 16 values of NF4, arXiv:2305.14314, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with rows of 64, as many as a block has."""
    return tiny_folder(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


def trained(folder: Path | str, **changes: Any) -> Any:
    """A policy with a LoRA adapter of which every part is random, on weights in 4 bits."""
    options = section(ModelOptions, **{"load_in_4bit": True, "lora_rank": 2, "lora_alpha": 8, **changes})
    module = load.load_trained("policy", resolve(str(folder)), options, device=CPU, dropout=False, seed=1).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return module


def logps(module: CausalModel) -> torch.Tensor:
    """Of the completions of some groups, packed as in training."""
    found: torch.Tensor = module(packed(random_groups("pairs", 3), CPU), False, 1.0)[0]
    return found


@packs
def test_values_are_those_of_the_paper() -> None:
    """Each weight becomes the value of NF4 next to weight / largest of its 64, times the largest one, which is kept in
    8 bits for itself: within 1 % of it."""
    layer = torch.nn.Linear(128, 6)
    blocks = layer.weight.detach().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)]
    found = four_bit.FourBitLinear(layer, CPU)
    assert found.packed.nbytes == 128 * 6 / 2 and list(found.state_dict()) == ["bias"]
    assert [name for name, _ in found.named_parameters()] == ["bias"]
    error = (found.weight.reshape(-1, 64) - nearest * scale).abs() / scale
    assert float(error.max()) < 0.01


@packs
def test_forward_and_gradient_are_of_those_values() -> None:
    layer = torch.nn.Linear(64, 32)
    found, weight = four_bit.FourBitLinear(layer, CPU), four_bit.FourBitLinear(layer, CPU).weight
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = found(x)
    torch.testing.assert_close(y, x @ weight.T + layer.bias)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(2, 5, 64))
    torch.testing.assert_close(found.plain()(x), y)
    assert found.plain().weight.requires_grad is False


@packs
def test_the_base_is_that_of_transformers(wide: Path) -> None:
    """With the adapter off, logits are those of BitsAndBytesConfig's NF4 with double quantisation; the head and the
    embedding stay as they are. An adapter that is new changes nothing."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(wide, quantization_config=how, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    module = trained(wide)
    with torch.no_grad(), module.model.disable_adapter():
        torch.testing.assert_close(module.whole_logits(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(wide).eval()
        assert float((theirs(ids).logits - plain(ids).logits).abs().max()) > 0.05, "4 bits are seen"


@packs
@pytest.mark.parametrize("words", [("ALL",), ("DEFAULT",)])
def test_only_the_adapter_gets_a_gradient(wide: Path, words: tuple[str, ...]) -> None:
    """And every part of it: with all layers adapted, and where the MLP's are in 4 bits without an adapter."""
    module = trained(wide, lora_target_modules=words).train()
    logps(module).sum().backward()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and all("lora_" in name for name, p in module.named_parameters() if p.requires_grad)


@packs
@pytest.mark.parametrize("words", [("ALL",), ("DEFAULT",)])
def test_a_view_unpacks_and_merges(wide: Path, words: tuple[str, ...]) -> None:
    """A rollout samples from ordinary linear layers with the same numbers; the model that is trained stays packed."""
    module = trained(wide, lora_target_modules=words)
    view, ids = view_of(module.model), torch.tensor([[5, 6, 7, 8, 9]])
    assert not any(isinstance(m, four_bit.FourBitLinear) or "lora" in n for n, m in view.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(view(ids).logits, module.whole_logits(ids), atol=1e-5, rtol=1e-5)
    assert sum(isinstance(m, four_bit.FourBitLinear) for m in module.modules()) == 14


@packs
def test_an_adapter_remembers_its_base(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported and opened again, frozen, to be trained further on either base, or merged by `dsalign merge`, it
    computes what it computed in training; a hub's name as base is remembered too."""
    module, folder = trained(wide), tmp_path / "adapter"
    export(Alone(module), folder, tiny_tokenizer(), str(wide))
    source = resolve(str(folder))
    assert source.four_bit and source.adapter == folder and json.loads((folder / BASE_FILE).read_text())["quantised"]
    assert located_base("org/name", folder, four_bit=True) == ("org/name", {"quantised": "nf4"})
    with torch.no_grad():
        want = logps(module)
        options = section(ModelOptions, tuner="full")
        torch.testing.assert_close(
            logps(load.load_frozen("policy", source, options, device=CPU)), want, atol=1e-4, rtol=1e-4
        )
        for packed_too in (True, False):
            more = section(ModelOptions, load_in_4bit=packed_too)
            again = load.load_trained("policy", source, more, device=CPU, dropout=False, seed=1).eval()
            torch.testing.assert_close(logps(again), want, atol=1e-4, rtol=1e-4)
        export(Alone(again), tmp_path / "further", tiny_tokenizer(), str(wide))
        assert resolve(str(tmp_path / "further")).four_bit
        assert cli.main(["merge", str(folder), "--output_dir", str(tmp_path / "merged")]) == 0
        assert "as 4 bits" in capsys.readouterr().out
        merged = load.load_frozen("policy", resolve(str(tmp_path / "merged")), options, device=CPU)
        torch.testing.assert_close(logps(merged), want, atol=1e-4, rtol=1e-4)
    assert cli.main(["export", str(folder), str(tmp_path / "copy")]) == 0
    assert resolve(str(tmp_path / "copy")).four_bit


@packs
def test_what_stays_as_it_is() -> None:
    """Of a mixture of experts the attention goes into 4 bits; routers and experts do not. A model without linear layers
    of torch is refused."""
    experts = random_model(MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    ))  # fmt: skip
    four_bit.pack(experts, CPU)
    names = {n.rpartition(".")[2] for n, m in experts.named_modules() if isinstance(m, four_bit.FourBitLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    gpt2 = random_model(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(ValueError, match=r"^load_in_4bit: expected linear layers, .* got GPT2LMHeadModel"):
        four_bit.pack(gpt2, CPU)


def test_without_the_package_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that was trained on 4-bit weights is refused by its name before its base is looked for."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    source = Source(str(tmp_path / "nothing"), adapter=tmp_path / "adapter", four_bit=True)
    with pytest.raises(ValueError, match=rf"^{source.adapter}, which was trained on 4-bit weights: .*dsalign\[4bit\]"):
        load.load_frozen("policy", source, section(ModelOptions), device=CPU)
    with pytest.raises(ValueError, match=r"^load_in_4bit: 4-bit weights need the package bitsandbytes"):
        four_bit.library()
