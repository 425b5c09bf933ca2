"""Models with random weights, for measurements that need the shape of a model and not what it knows.

A shape is a configuration built in code, so nothing is downloaded: `qwen2.5-0.5b` and `llama-3.1-8b` have the sizes of
the models of these names (arXiv:2412.15115, table 1; arXiv:2407.21783, table 3), `small` is a trial on a CPU.

    python benchmarks/random_models.py FOLDER    # a stand-in for SmolLM2 in trials
"""

from __future__ import annotations

import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compare_rows
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PREFIX = "random:"  # random:small, in place of the folder of a model
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # token ids 0, 1 and 2, as those of SmolLM2
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: Mapping[str, tuple[type[PretrainedConfig], Mapping[str, Any]]] = {
    "qwen2.5-0.5b": (
        Qwen2Config,
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": False,
        },
    ),
    "small": (
        LlamaConfig,
        {
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2,
        },
    ),
}  # fmt: skip


def config_of(name: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a shape. name: random:NAME. layers: how many of its layers, None = all.

    Raises ValueError where there is no such shape.
    """
    if name.removeprefix(PREFIX) not in SHAPES:
        raise ValueError(f"{name}: expected one of {', '.join(PREFIX + shape for shape in SHAPES)}")
    kind, sizes = SHAPES[name.removeprefix(PREFIX)]
    few = {} if layers is None else {"num_hidden_layers": min(layers, sizes["num_hidden_layers"])}
    return kind(**{**SPECIAL, **sizes, **few})


def made(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A model of a shape (random:NAME) whose weights are drawn on the device, the same ones for the same arguments."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(name, layers), dtype=dtype, attn_implementation="sdpa")


def write_small_smollm(folder: Path) -> None:
    """A folder that stands for SmolLM2 in a trial: two random layers 32 wide, and a tokenizer of 100 words, in whose
    chat template a prompt has as many tokens around it as in SmolLM2's."""
    letters = string.ascii_lowercase
    words = [f"word{a}{b}" for a in letters for b in letters][:100]
    tokens = [PAD, START, END, "<unk>", ".", *words, *(compare_rows.BLANK + word for word in words)]
    tokens += ["system", "user", "assistant", *pre_tokenizers.ByteLevel.alphabet()]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([PAD, START, END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token="<unk>")
    turn = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    answer = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    around = len(tokenizer(f"{START}system\n{END}\n{START}user\n{END}\n{START}assistant\n")["input_ids"])
    said = " ".join(words[: compare_rows.TEMPLATE_TOKENS - around])
    tokenizer.chat_template = f"{START}system\n{said}{END}\n{turn}{answer}"
    torch.manual_seed(0)
    config = config_of(PREFIX + "small")
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 512
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_small_smollm(Path(sys.argv[1]))
