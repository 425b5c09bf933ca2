"""LoRA: what is trained, what the reference is, and that switching leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain import plain_logps
from support import random_groups, section
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import padded
from dsalign.models import adapters
from dsalign.models.adapters import with_start_weights
from dsalign.models.heads import CausalModel
from dsalign.models.names import Source

GROUPS = random_groups("pairs", 3)
INPUTS = padded(GROUPS, torch.device("cpu"))
LLAMA_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def options(*targets: str, dropout: float = 0.0) -> ModelOptions:
    wanted = {"lora_dropout": dropout, "lora_target_modules": targets or ("ALL",)}
    return section(ModelOptions, lora_rank=4, lora_alpha=8, **wanted)


def base(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return CausalModel(model)(INPUTS)[0]


def plain(model: Any) -> torch.Tensor:
    return torch.cat(plain_logps(model, GROUPS))


def disturb(model: nn.Module) -> None:
    """What training does, as far as these tests care: every trained parameter moves."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw)


def earlier_run(tiny: Path, folder: Path, **config: Any) -> Source:
    """An adapter folder that does something."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    model = get_peft_model(base(tiny), LoraConfig(**{**settings, **config}, task_type="CAUSAL_LM"))
    disturb(model)
    model.save_pretrained(folder)
    return Source(str(tiny), adapter=folder)


def layers_of(model: nn.Module) -> set[str]:
    """The names of the layers that have an adapter."""
    return {n.split(".lora_A.")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if ".lora_A." in n}


def test_a_new_adapter_changes_nothing_until_it_is_trained(tiny: Path) -> None:
    """The reference is the model before training, after training too."""
    start = plain(base(tiny))
    model = adapters.add(base(tiny), Source(str(tiny)), options(), seed=1)
    torch.testing.assert_close(logps(model), start, atol=2e-6, rtol=1e-5)
    disturb(model)
    assert (logps(model) - start).abs().max() > 0.01
    with with_start_weights(model):
        torch.testing.assert_close(logps(model), start, atol=2e-6, rtol=1e-5)


STARTS = {
    "layers": {},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a whole copy of the head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_adapter_that_training_starts_from_stays_on_in_the_reference(
    start: str, tiny: Path, tmp_path: Path
) -> None:
    """Reference = the folder as PEFT opens it; training moves on from there."""
    source = earlier_run(tiny, tmp_path, **STARTS[start])
    want = plain(PeftModel.from_pretrained(base(tiny), tmp_path))
    assert (want - plain(base(tiny))).abs().max() > 0.01
    model = adapters.add(base(tiny), source, options(), seed=1)
    torch.testing.assert_close(logps(model), want, atol=2e-6, rtol=1e-5)
    disturb(model)
    moved = logps(model)
    assert (moved - want).abs().max() > 0.01
    with with_start_weights(model):
        torch.testing.assert_close(logps(model), want, atol=2e-6, rtol=1e-5)
    assert torch.equal(logps(model), moved)


def test_only_the_trained_adapter_is_trained(tiny: Path, tmp_path: Path) -> None:
    """New: lora_A and lora_B of `default`. On from a folder: not its frozen copy `start`; rank and layers are its."""
    new = adapters.add(base(tiny), Source(str(tiny)), options(), seed=1)
    trained = [n for n, p in new.named_parameters() if p.requires_grad]
    assert {n.split(".")[-2] for n in trained} == {"default"}
    assert len(trained) == 2 * 7 * 2  # layers, linear layers in each, A and B
    on = adapters.add(base(tiny), earlier_run(tiny, tmp_path), options(), seed=1)
    trained_on = {n: p for n, p in on.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trained_on} == {"default"}
    assert {tuple(p.shape) for n, p in trained_on.items() if "lora_A" in n} == {(2, 32)}
    assert layers_of(on) == {"q_proj", "o_proj"}


@pytest.mark.parametrize("started", [False, True])
def test_switching_leaves_no_trace(started: bool, tiny: Path, tmp_path: Path) -> None:
    """requires_grad is the same inside and after, also where the body raises; switches within switches come back."""
    source = earlier_run(tiny, tmp_path) if started else Source(str(tiny))
    model = adapters.add(base(tiny), source, options(), seed=1)
    disturb(model)
    before, flags = logps(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), with_start_weights(model):
        with with_start_weights(model):
            inner = logps(model)
        assert torch.equal(logps(model), inner)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        raise RuntimeError("inside")
    assert not torch.equal(inner, before)
    assert torch.equal(logps(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_targets(tiny: Path) -> None:
    """ALL is every linear layer but the head, DEFAULT query, key and value, else names."""
    for targets, want in (
        (("ALL",), LLAMA_LINEAR),
        (("DEFAULT",), {"q_proj", "k_proj", "v_proj"}),
        (("o_proj", "up_proj"), {"o_proj", "up_proj"}),
        (("lm_head",), {"lm_head"}),
    ):
        assert layers_of(adapters.add(base(tiny), Source(str(tiny)), options(*targets), seed=1)) == want


def test_targets_of_gpt2() -> None:
    """Its layers are transposed and query, key and value are one; the head is tied."""
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    for targets, want in (("ALL", {"c_attn", "c_proj", "c_fc"}), ("DEFAULT", {"c_attn"})):
        assert layers_of(adapters.add(GPT2LMHeadModel(config), Source(""), options(targets), seed=1)) == want


def test_an_unknown_target_is_named_with_the_layers_there_are(tiny: Path) -> None:
    message = (
        r"^lora_target_modules: LlamaForCausalLM has no layer called W_pack, x that .*; write ALL, or some of down_"
    )
    with pytest.raises(ValueError, match=message):
        adapters.add(base(tiny), Source(str(tiny)), options("q_proj", "W_pack", "x"), seed=1)


def test_default_without_a_layer_it_knows_is_refused() -> None:
    """A model that calls its layers otherwise."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(2, 2)

    with pytest.raises(
        ValueError, match=r"^lora_target_modules: Odd has no layer called q_proj, .*; write ALL, or some of mix$"
    ):
        adapters.add(Odd(), Source(""), options("DEFAULT"), seed=1)  # type: ignore[arg-type]


def test_the_adapter_is_a_function_of_the_seed(tiny: Path) -> None:
    """Whatever a rank has drawn before; and what it draws after is not disturbed."""

    def adapter(seed: int, drawn: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = base(tiny)
        torch.manual_seed(drawn)
        found = adapters.add(model, Source(str(tiny)), options(), seed)
        return torch.cat([p.flatten() for n, p in found.named_parameters() if ".lora_A." in n]), torch.rand(1)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        after = torch.rand(1)
        (first, drawn), (again, _), (other, _) = adapter(3, 1), adapter(3, 2), adapter(4, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(drawn, after)


def test_dropout_of_a_continued_adapter_is_what_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    """From a folder without dropout to 0.5, and from 0.5 to none; the adapter's configuration says so too."""
    for before, asked in ((0.0, 0.5), (0.5, 0.0)):
        source = earlier_run(tiny, tmp_path / str(asked), lora_dropout=before)
        model = adapters.add(base(tiny), source, options(dropout=asked), seed=1).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert torch.equal(logps(model), logps(model)) is (asked == 0)
        assert model.peft_config["default"].lora_dropout == asked


def test_merging_is_peft_forward(tiny: Path, tmp_path: Path) -> None:
    """The merged weights give PEFT's log-probabilities; without an adapter the model is the same object."""
    source = earlier_run(tiny, tmp_path)
    want = plain(PeftModel.from_pretrained(base(tiny), tmp_path))
    merged = adapters.merge(base(tiny), source.adapter)
    torch.testing.assert_close(plain(merged), want, atol=1e-5, rtol=1e-5)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    model = base(tiny)
    assert adapters.merge(model, None) is model
    assert torch.equal(plain(copy.deepcopy(model)), plain(base(tiny)))
