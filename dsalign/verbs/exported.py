"""The plain folder of a model: loaded and written again, or of an adapter its files alone."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from dsalign.checkpoint import plain_folder
from dsalign.checkpoint.export import export
from dsalign.checkpoint.manifest import MANIFEST
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.engines.alone import Alone
from dsalign.models import load
from dsalign.models.names import BASE_FILE, Source, located_base, resolve
from dsalign.models.to_gguf import write_gguf
from dsalign.models.tokenizer import load_tokenizer
from dsalign.report.run_log import quiet
from dsalign.verbs import merged, opened, places

RESUME_ALONE = (MANIFEST, PROGRESS_FILE, "random-*", "prepared-*", ".*")  # files that only a resume reads


def exported(
    name: str, folder: Path, dtype: str, *, merge: bool, gguf: Path | None, trust: bool = False
) -> Iterator[str]:
    """Write the folder `folder` of the model that `name` means, and where `gguf` is given that file; yields a line for
    each.

    merge: of an adapter, whether its base with the adapter added in is written. dtype: of the weights.
    Raises ValueError where the model cannot be opened or written so.
    """
    quiet(0)
    source = resolve(places.model_of(name))
    plain_folder.refuse_taken(folder, "DIR")
    if merge and source.adapter is None:
        raise ValueError(f"merge: expected an adapter, got {name}, which has all its weights; leave --merge out")
    if gguf is not None and source.adapter is not None and not merge:
        raise ValueError(f"gguf: expected a whole model, got the adapter {name}; add --merge")
    if gguf is not None and opened.is_reward(source):
        raise ValueError(
            f"gguf: expected a language model, got the reward model {name}, whose score GGUF has no place for"
        )
    if merge:
        yield merged.merge(name, folder, dtype, trust=trust).text()
    elif source.adapter is not None:
        yield _copied(source, source.adapter, folder, dtype)
    else:
        yield _written(source, folder, dtype, trust)
    if gguf is not None:
        gap = write_gguf(folder, gguf)
        yield (
            f"{gguf}: GGUF, float32, {gguf.stat().st_size / 1e6:,.1f} MB; read back, the largest difference of its "
            f"logits is {gap:.2g}"
        )


def _copied(source: Source, adapter: Path, folder: Path, dtype: str) -> str:
    if dtype != "auto":
        raise ValueError(
            f"dtype: the files of an adapter are copied as they are, got {dtype}; leave --dtype out, or add --merge"
        )

    def fill(staging: Path) -> None:
        for path in adapter.iterdir():
            if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in RESUME_ALONE):
                shutil.copy2(path, staging / path.name)
        named, elsewhere = located_base(source.weights, folder, four_bit=source.four_bit)
        described = json.loads((staging / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
        (staging / "adapter_config.json").write_text(json.dumps(described, indent=2, sort_keys=True))
        (staging / BASE_FILE).unlink(missing_ok=True)
        if elsewhere:
            (staging / BASE_FILE).write_text(json.dumps(elsewhere, indent=2))

    plain_folder.write(folder, fill)
    return (
        f"exported {adapter}: {folder}, an adapter that needs its base {source.weights} and opens with peft on top of "
        f"it; --merge writes a model that needs nothing else"
    )


def _written(source: Source, folder: Path, dtype: str, trust: bool) -> str:
    role = "reward" if opened.is_reward(source) else "policy"
    chosen = merged.dtype_of(source, dtype, trust=trust)
    how = opened.options(str(chosen).removeprefix("torch."), trust=trust)
    module = load.load_as_stored(role, source, how, device=torch.device("cpu"))
    tokenizer = load_tokenizer(source, how)
    plain_folder.write(folder, lambda staging: export(Alone(module), staging, tokenizer, source.weights))
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = (
        "AutoModelForSequenceClassification" if name.endswith("ForSequenceClassification") else "AutoModelForCausalLM"
    )
    head = "; its score is in value_head.safetensors" if role == "reward" and auto == "AutoModelForCausalLM" else ""
    return f"exported {source.weights}: {folder}, {how.dtype}, a {name}; opens with transformers' {auto}{head}"
