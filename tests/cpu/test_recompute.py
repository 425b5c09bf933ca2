"""What is made again in a backward leaves every number as it was, and the graph keeps less."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import Live, random_groups, section, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dsalign.config.schema import ModelOptions
from dsalign.cpu.recompute import recompute_cheap
from dsalign.data.batches.packing import padded
from dsalign.models import load
from dsalign.models.heads import CausalModel
from dsalign.models.names import resolve

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = ("llama", "mistral", "qwen3", "gemma2", "phi3", "olmo2", "gpt2")


def small(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of an architecture, the same at every call."""
    torch.manual_seed(0)
    if kind == "gpt2":
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)).to(dtype)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES)).to(dtype)


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probabilities of some tokens, and the gradient of their squares by parameter."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logps, _ = CausalModel(model)(padded(random_groups("pairs", 3), CPU))
    logps.square().sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To the last bit; gradients in float32 to a few of them, as three sums of a norm's input come in another order."""
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys() and one[1]
    for name, found in one[1].items():
        want = other[1][name]
        exact = found.dtype != torch.float32
        assert torch.equal(found, want) if exact else float((found - want).norm() / want.norm()) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_stays(kind: str, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    recompute_cheap(model.get_decoder())
    same(gradients(model), gradients(small(kind, dtype)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_number_of_lora_stays(dropout: float) -> None:
    def adapted() -> Any:
        options = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
        return get_peft_model(small("llama"), options).double()

    model = adapted()
    recompute_cheap(model.get_base_model().get_decoder())
    torch.manual_seed(1)
    found = gradients(model)
    torch.manual_seed(1)
    same(found, gradients(adapted()))


def kept(module: Any, x: Tensor) -> float:
    """The numbers a token that a graph over module(x) holds when its forward is over, the output left out."""
    with Live(x, *module.parameters()) as live:
        y = module(x)
    assert y.requires_grad
    return (live.now - 4 * y.numel()) / (4 * x.shape[1])


class Block(nn.Module):
    """A norm before a gated MLP, as in a layer of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = LlamaRMSNorm(32), LlamaMLP(tiny_config())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def test_what_a_block_keeps() -> None:
    """D = 32, I = 64. As ever: x / |x| and the norm's output, 2 D, and |x|; the gate, its activation, the other branch,
    their product, 4 I. Of those the gate and the other branch stay, 2 I, and 1 / |x|. The input is the caller's."""
    x = torch.randn(1, 50, 32, requires_grad=True)
    torch.manual_seed(0)
    plain = Block()
    less = copy.deepcopy(plain)
    recompute_cheap(less)
    assert kept(plain, x) == 2 * 32 + 1 + 4 * 64
    assert kept(less, x) == 1 + 2 * 64


def test_a_model_keeps_less_in_every_architecture() -> None:
    ids = torch.randint(4, 96, (10, 20))
    for kind in KINDS:
        held = []
        for change in (False, True):
            model = small(kind)
            decoder = model.get_decoder()
            if change:
                recompute_cheap(decoder)
            with Live(ids, *decoder.parameters()) as live:
                out = decoder(ids, use_cache=False).last_hidden_state
            held.append(live.now)
            del out
        assert held[1] < 0.8 * held[0], (kind, held)


def test_one_norm_is_made_again_once_for_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers with two norms each and the last one: five in a forward, five more in its backward. In bfloat16, as
    RMSNorm in float32 is not the module's own."""
    model, calls = LlamaForCausalLM(tiny_config()).bfloat16(), []
    recompute_cheap(model.get_decoder())
    plain = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: calls.append(0) or plain(self, x))
    out = model.get_decoder()(torch.tensor([[4, 5, 6]]), use_cache=False).last_hidden_state
    assert len(calls) == 5
    out.sum().backward(retain_graph=True)
    assert len(calls) == 10
    out.sum().backward()
    assert len(calls) == 15


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_backward_of_rms_norm_by_hand(offset: float) -> None:
    """x = (3, 4), |x|^2 / 2 = 12.5, u = x / sqrt(12.5) = (0.848528, 1.131371), factor (1, 2), gradient (1, 0):
    g = (1, 0), mean(g u) = 0.424264, of x (1 - 0.36, -0.48) / 3.535534, of the factor (0.848528, 0)."""
    norm = (GemmaRMSNorm if offset else LlamaRMSNorm)(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]) - offset)
    recompute_cheap(norm)
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    y = norm(x)
    assert "RMSNorm" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, torch.tensor([[0.848528, 2.262742]]))
    y.backward(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[0.64, -0.48]]) / 3.535534)
    torch.testing.assert_close(norm.weight.grad, torch.tensor([0.848528, 0.0]))


def test_rms_norm_is_as_exact_as_autograd() -> None:
    """Gradients of 4-dimensional states in float32, beside float64: no larger an error than autograd's by a fifth."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2, 50, 3, 64, generator=generator) for _ in range(2))
    weight = torch.rand(64, generator=generator) + 0.5
    found = []
    for dtype, change in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        norm = LlamaRMSNorm(64)
        norm.weight.data = weight.to(dtype)
        if dtype is torch.float64:
            norm.forward = partial(torch.nn.functional.rms_norm, normalized_shape=(64,), weight=norm.weight, eps=1e-6)
        if change:
            recompute_cheap(norm)
        states = x.clone().to(dtype).requires_grad_()
        norm(states).backward(gradient.to(dtype))
        found.append((states.grad.double(), norm.weight.grad.double()))
    exact, plain, ours = found
    for want, theirs, mine in zip(exact, plain, ours, strict=True):
        assert float((mine - want).norm()) <= 1.2 * float((theirs - want).norm())
        assert float((mine - want).norm() / want.norm()) < 2e-7


def test_a_copy_uses_its_own_weights() -> None:
    block = Block()
    recompute_cheap(block)
    twin, x = copy.deepcopy(block), torch.randn(1, 3, 32)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert float(block(x).detach().abs().max()) > 0
    assert float(twin(x).detach().abs().max()) == 0


class Halved(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_model_is_loaded_so(checkpointing: bool, tiny: Path) -> None:
    """But not where whole layers are made again, nor a frozen one, which keeps nothing."""
    options, source = section(ModelOptions, tuner="full", gradient_checkpointing=checkpointing), resolve(str(tiny))
    trained = load.load_trained("policy", source, options, device=CPU, dropout=False, seed=42)
    frozen = load.load_frozen("reference", source, options, device=CPU)
    changed = ["forward" in vars(model.model.model.norm) for model in (trained, frozen)]
    assert changed == [not checkpointing, False]


def test_other_formulas_are_left_alone() -> None:
    """An MLP with the same parts and another formula; an activation in place; a norm whose weight is ZeRO-3's."""
    torch.manual_seed(0)
    mlp, in_place, norm = Halved(tiny_config()), nn.ReLU(inplace=True), LlamaRMSNorm(32)
    norm.weight.ds_id = 1
    model = nn.ModuleList([mlp, in_place, norm])
    x = torch.randn(1, 3, 32, requires_grad=True)
    before = mlp(x)
    recompute_cheap(model)
    assert torch.equal(mlp(x), before)
    assert "forward" not in vars(mlp) and "forward" not in vars(in_place)
    assert "Again" not in type(norm(x).grad_fn).__name__
    del norm.weight.ds_id
    assert "Again" in type(norm(x).grad_fn).__name__
    with torch.no_grad():
        assert norm(x).grad_fn is None
