"""The config.json of a model by name, without a network: a folder, the hub's cache, or the numbers of a short name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsalign.config.flags import nearest
from dsalign.config.reach_hub import EMBEDDED, HUB_NAMES


def _llama(
    width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


_LLAMA_8B = _llama(4096, 32, 32, 8, 14336, 128256)
# Short name -> what its config.json says of sizes, for a machine that has not loaded it yet.
_SIZES: Mapping[str, Mapping[str, Any]] = {
    EMBEDDED: _llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True),
    "llama3-8b": _LLAMA_8B,
    "llama3-8b-instruct": _LLAMA_8B,
    "llama3_1-8b-instruct": _LLAMA_8B,
    "llama3_2-1b-instruct": _llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True),
    "qwen2_5-0_5b-instruct": _llama(896, 24, 14, 2, 4864, 151936, model_type="qwen2", tie_word_embeddings=True),
    "qwen2_5-7b-instruct": _llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2"),
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128),
    "mistral-7b-instruct-v3": _llama(4096, 32, 32, 8, 14336, 32768, model_type="mistral"),
    "gemma2-9b-instruct": _llama(
        3584, 42, 16, 8, 14336, 256000, model_type="gemma2", head_dim=256, tie_word_embeddings=True
    ),
}
_EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Short name -> (the hub's name, those sizes).
KNOWN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    name: (hub, _SIZES[name]) for name, hub in {EMBEDDED: _EMBEDDED_HUB, **HUB_NAMES}.items()
}


def config_of(name: str) -> tuple[Mapping[str, Any], str]:
    """(the config.json of the model that `name` stands for, where it was found). Nothing is loaded from the network.

    Raises ValueError where it cannot be had, naming the options that describe a model in its place.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            return config_of(str(_json(folder / "adapter_config.json").get("base_model_name_or_path")))
        return _json(folder / "config.json"), str(folder / "config.json")
    by_hub_name = {hub: numbers for hub, numbers in KNOWN.values()}
    hub, numbers = KNOWN.get(name.lower(), (name, by_hub_name.get(name)))
    if (cached := _cached(hub)) is not None:
        return _json(cached), f"{hub} in the hub's cache"
    if numbers is not None:
        return numbers, f"the sizes of {hub}"
    advice = nearest(name.lower(), tuple(KNOWN))
    raise ValueError(
        f"--model: expected a folder with config.json, a short name ({', '.join(KNOWN)}), or a hub name in this "
        f"machine's cache, got {name!r}{advice}; or describe it: --params 70B --layers 80 --hidden 8192"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"--model: {path.parent} holds no config.json; give the folder of a model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--model: {path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--model: {path}: expected a JSON object, got {type(found).__name__}")
    return found


def _cached(hub: str) -> Path | None:
    """The config.json of a hub name in this machine's cache, None where it has none."""
    if hub.count("/") != 1 or hub.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  a fifth of a second that a folder needs not

    found = try_to_load_from_cache(hub, "config.json")
    return Path(found) if isinstance(found, str) else None
