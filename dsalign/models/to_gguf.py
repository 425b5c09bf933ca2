"""Model folders written as GGUF files, for the architecture and the tokenizers that are read back the same here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsalign.models.gguf import cut_names, import_gguf

CHECKED = ("In 2024: 13x  1, it's 1,234.50 EUR.", "naïve café 日本語\n\n\tThe end , 'tis")
BOUND = 1e-3  # of the largest logit


def write_gguf(folder: Path, file: Path) -> float:
    """Write the model of a folder as a GGUF file in float32, and read it back; returns the largest difference of the
    logits of both.

    Raises ValueError where the package gguf is not installed, the file is there already, the architecture or the
    tokenizer is none that is known here, with the command of llama.cpp that converts others, or where what is read back
    differs in a token or a logit.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("gguf: writing a GGUF file needs the package gguf, which is not installed: pip install gguf")
    if file.exists():
        raise ValueError(f"gguf: expected a file that is not there yet, got {file}, which exists; name another one")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if reason := _obstacle(model.config, tokenizer):
        raise ValueError(
            f"gguf: {folder}: {reason}; use llama.cpp's converter: python convert_hf_to_gguf.py {folder} --outfile "
            f"{file}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".gguf-") as beside:
        part = Path(beside) / file.name
        _write(model, tokenizer, part)
        gap = _gap(model, tokenizer, import_gguf(part, Path(beside) / "again"))
        part.replace(file)
    return gap


def _obstacle(config: Any, tokenizer: Any) -> str:
    """Why a model cannot be written here, "" = it can."""
    if config.model_type != "llama":
        return f"expected a model of type llama, got {config.model_type}"
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        return f"expected rotary positions that are not scaled, got {config.rope_parameters['rope_type']}"
    if config.attention_bias or config.mlp_bias:
        return "expected layers without biases, got some with"
    if _cut_of(tokenizer) is None:
        return "expected a byte-level BPE tokenizer that cuts text as gpt-2 or smollm do, got another"
    return ""


def _cut_of(tokenizer: Any) -> str | None:
    """The name by which GGUF calls the way in which a tokenizer cuts text, None where it is none that is known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = {} if backend is None else json.loads(backend.to_str())
    if not stored or stored["model"]["type"] != "BPE" or stored["normalizer"] is not None:
        return None
    cut = json.dumps(stored["pre_tokenizer"], sort_keys=True)
    return next((name for name, known in cut_names().items() if known == cut), None)


def _write(model: Any, tokenizer: Any, file: Path) -> None:
    gguf: Any = importlib.import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name(file.stem)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, tokenizer, config.vocab_size, gguf.TokenType)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        count = next((n for name, n in heads.items() if f".{name}." in key), None)
        if count is not None:  # GGUF has the two numbers that are rotated together beside each other
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, tokenizer: Any, size: int, types: Any) -> None:
    tokens, added = {i: token for token, i in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    kinds = {i: types.CONTROL if token.special else types.USER_DEFINED for i, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut_of(tokenizer))
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, types.NORMAL if i in tokens else types.UNUSED) for i in range(size)])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    for name in ("bos", "eos", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


@torch.no_grad()
def _gap(model: Any, tokenizer: Any, again: Path) -> float:
    """The largest difference of the logits of a model and of the folder that was read back of it.

    Raises ValueError where tokens differ, or a logit by more than the bound.
    """
    other: Any = AutoModelForCausalLM.from_pretrained(again).eval()
    reread: Any = AutoTokenizer.from_pretrained(again)
    gap = largest = 0.0
    for text in CHECKED:
        ids, back = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, reread))
        if ids != back:
            raise ValueError(
                f"gguf: expected {text!r} to be the tokens {ids} when it is read back, got {back}; "
                "use llama.cpp's convert_hf_to_gguf.py, and report this"
            )
        logits = model(torch.tensor([ids])).logits
        gap = max(gap, float((other(torch.tensor([ids])).logits - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    if not gap <= BOUND * max(1.0, largest):
        raise ValueError(
            f"gguf: expected the same logits when it is read back, got a difference of {gap:.3g}; use llama.cpp's "
            "convert_hf_to_gguf.py, and report this"
        )
    return gap
