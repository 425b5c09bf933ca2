"""Small models for the tests of the verbs on models: an adapter of known factors, and a head of known weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip  # noqa: E501


def adapter_of(base: Path, folder: Path, *, scale: float = 0.1, head: float | None = None) -> Path:
    """A LoRA adapter of rank 2 and alpha 6 on q_proj and v_proj, with random factors times `scale`, a tokenizer with a
    chat template and a generation config. head: the value of each weight of a value head, bias 0.5; None = none."""
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    )
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 5]).save_pretrained(folder)
    if head is not None:
        save_head(folder, torch.full((1, 32), head), 0.5)
    return folder


def save_head(folder: Path, weight: torch.Tensor, bias: float) -> None:
    """Write value_head.safetensors. weight: [1, width]."""
    state = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([bias])}
    save_file(state, folder / "value_head.safetensors")


def base_adapter_and_rm(tiny: Path, folder: Path) -> None:
    """Write base, adapter and rm, which share a chat template, into `folder`. tiny: the model that all are made of."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    for name in ("base", "rm"):
        shutil.copytree(tiny, folder / name)
        tokenizer.save_pretrained(folder / name)
    save_head(folder / "rm", torch.full((1, 32), 0.25), 0.5)
    adapter_of(folder / "base", folder / "adapter", scale=0.5)
    GenerationConfig(eos_token_id=2).save_pretrained(folder / "adapter")
