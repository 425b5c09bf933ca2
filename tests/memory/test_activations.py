"""Activations: against what autograd keeps of tiny models, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Live, quick_if, section
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from dsalign.config.schema import ModelOptions
from dsalign.contract.groups import Group
from dsalign.data.batches.packing import packed
from dsalign.memory import activations
from dsalign.memory.activations import MIB, Tuning
from dsalign.memory.shapes import Shape, of_config
from dsalign.models import load
from dsalign.models.names import Source

BASE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LLAMA_8B = of_config({
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
})  # fmt: skip
CASES = {
    "llama": (LlamaConfig(**BASE), Tuning()),
    "llama float32": (LlamaConfig(**BASE), Tuning(itemsize=4)),
    "llama lora": (LlamaConfig(**BASE), Tuning(rank=4)),
    "llama lora on q, k, v": (LlamaConfig(**BASE), Tuning(rank=4, words=("DEFAULT",))),
    "qwen3": (Qwen3Config(**BASE, head_dim=16), Tuning()),
    "gemma": (GemmaConfig(**BASE, head_dim=16), Tuning()),
    "experts": (Qwen3MoeConfig(**BASE, **EXPERTS), Tuning()),
    "experts lora": (Qwen3MoeConfig(**BASE, **EXPERTS), Tuning(rank=4)),
}


def module_of(config: PretrainedConfig, tuning: Tuning, folder: Path) -> tuple[Any, Shape]:
    """The policy as a GPU would have it, without what saves memory on CPUs, and its shape from the config.json."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    options = section(
        ModelOptions, tuner="lora" if tuning.rank else "full", lora_rank=tuning.rank or 8,
        dtype="bfloat16" if tuning.itemsize == 2 else "float32", lora_target_modules=tuning.words,
        gradient_checkpointing=tuning.checkpointing,
    )  # fmt: skip
    cuda = torch.device("cuda")  # nothing goes there
    module = load.load_trained("policy", Source(str(folder)), options, device=cuda, dropout=False, seed=0)
    module.to(torch.bfloat16 if tuning.itemsize == 2 else torch.float32).train()  # adapters too, as an engine does
    return module, of_config(json.loads((folder / "config.json").read_text()))


def rows() -> Any:
    """Four rows of 48 tokens, of which a prompt has 2: nearly all are read, so the last MLP computes nearly all."""
    groups = [
        Group(index=i, where="", prompt=(4, 5), completions=((*range(6, 52),),), prompt_text="") for i in range(4)
    ]
    return packed(groups, torch.device("cpu"))


def kept(module: Any, inputs: Any) -> int:
    """The bytes of everything that autograd keeps of a forward, parameters left out."""
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = module.states(inputs)
    assert states.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("name", [quick_if(name in ("llama", "llama lora"), name) for name in CASES])
def test_what_autograd_keeps(name: str, tmp_path: Path) -> None:
    """Within 10 % of every tensor that a forward saves for its backward, each counted once."""
    config, tuning = CASES[name]
    module, shape = module_of(config, tuning, tmp_path)
    inputs = rows()
    assert activations.training_bytes(shape, tuning, inputs.ids.numel()) == pytest.approx(kept(module, inputs), rel=0.1)


@pytest.mark.parametrize("rank", [quick_if(True, 4), quick_if(False, 0)])
def test_checkpointing_keeps_the_inputs_of_layers(rank: int, tmp_path: Path) -> None:
    """At the end of a forward: 4 layers x 128 x 2 bytes a token and the last norm, within 10 % (LoRA: its frozen norm
    keeps the float32 input alone); the estimate of the peak has one layer beside them and is no lower than measured."""
    tuning = Tuning(rank=rank, checkpointing=True)
    module, shape = module_of(LlamaConfig(**BASE), tuning, tmp_path)
    inputs = rows()
    tokens = inputs.ids.numel()
    final = 128 * (4 + (0 if rank else 2))
    assert kept(module, inputs) == pytest.approx(tokens * (4 * 128 * 2 + final), rel=0.1)
    live = Live(*module.parameters())
    with live:
        module.states(inputs).sum().backward()
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    most = activations.training_bytes(shape, tuning, tokens) + activations.backward_bytes(shape, tuning, tokens)
    assert live.peak - gradients <= most <= 1.5 * live.peak


def test_a_forward_without_gradient(tmp_path: Path) -> None:
    """The most that is in memory at a time, within 10 %."""
    module, shape = module_of(LlamaConfig(**BASE), Tuning(), tmp_path)
    inputs = rows()
    live = Live(*module.parameters())
    with live, torch.no_grad():
        module.states(inputs)
    assert activations.forward_bytes(shape, 2, inputs.ids.numel()) == pytest.approx(live.peak, rel=0.1)


def test_a_token_of_llama_8b_by_hand() -> None:
    """A layer, all weights trained: two norms 2 x 4096 x (4 + 2); queries, output, keys, values (2 x 4096 + 2 x 1024)
    x 2; gate, activated gate and up 3 x 14336 x 2; the inputs of q, k, v, of o, of gate and up, of down (3 x 4096 +
    14336) x 2: 49,152 + 20,480 + 86,016 + 53,248 = 208,896 bytes. 32 of them and the last norm: 6,709,248."""
    layer = LLAMA_8B.layers[0][0]
    assert activations.layer_bytes(layer, Tuning(), 4096) == 208_896
    assert activations.training_bytes(LLAMA_8B, Tuning(), 1) == 32 * 208_896 + 4096 * 6
    checkpointing = activations.training_bytes(LLAMA_8B, Tuning(checkpointing=True), 1)
    assert checkpointing == 32 * 4096 * 2 + 208_896 + 4096 * 6


def test_keys_and_values_by_hand() -> None:
    """Llama 8B: 2 x 8 heads x 128 x 2 bytes x 32 layers = 131,072 bytes a token; 64 rows of 1,000 tokens have 1,024."""
    assert activations.cache_bytes(LLAMA_8B, 64, 1000, 2) == 64 * 1024 * 131_072


@pytest.mark.parametrize(
    ("predicted", "how", "want"),
    [
        (100, {"gradient": False}, 100 * 4096 * 2 + 100 * 256_512),
        (10**5, {"gradient": False}, 10**5 * 4096 * 2 + 2092 * 256_512),
        (10**5, {"trained": False}, 2 * 10**5 * 4096 * 2 + 2092 * 256_512),
        (12552, {}, 2 * 12552 * 8192 + 12552 * 256_512 + 4096 * 128256 * 2),
        (12553, {"part": 4000}, 3 * 12553 * 8192 + 4000 * 256_512 + 4096 * 128256 * 6),
        (12553, {}, 2 * 12553 * 8192 + 2092 * 256_512 + 4096 * 128256 * 2),
    ],
)
def test_the_head_by_hand(predicted: int, how: dict[str, Any], want: float) -> None:
    """A row of logits has 128,256 x 2 bytes, 512 MiB hold 2,092 rows, six times as many are 12,552. Up to those the
    logits of a trained head are kept; beyond, groups go by one at a time where the largest is small enough, and else
    logits are computed again."""
    given = {"gradient": True, "trained": True, "most": None, "part": None, **how}
    assert 512 * MIB // 256_512 == 2092
    assert activations.head_bytes(LLAMA_8B, predicted, 2, **given) == want
