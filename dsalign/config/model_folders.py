"""What a model's folder lacks, told by the names and first bytes of its files: before torch is imported, as half a
download is a matter of seconds and not of minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADAPTER, MODEL = "adapter_config.json", "config.json"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
OF_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken",
)  # fmt: skip
POINTER = b"version https://git-lfs"
SHOWN = 3  # files that a message names


def refuse_no_model(folder: Path) -> None:
    """Raises ValueError for a folder, or a file, that is no model's."""
    if not (folder / MODEL).is_file() and not (folder / ADAPTER).is_file():
        raise ValueError(
            f"model: {folder} holds neither {MODEL} nor {ADAPTER}, so it is no model folder; give the folder that "
            "from_pretrained opens"
        )


def problems(folder: Path, *, tokenizer: bool) -> Iterator[str]:
    """What is wrong with a model's folder, a text for each problem; none for a folder that is no model's, which others
    say. tokenizer: whether it must have one."""
    if (folder / ADAPTER).is_file():
        yield from _json(folder / ADAPTER)
        if not any((folder / name).is_file() for name in OF_ADAPTER):
            yield f"expected {' or '.join(OF_ADAPTER)} beside {ADAPTER}, got none in {folder}; copy the folder again"
        return
    if not (folder / MODEL).is_file():
        return
    yield from _json(folder / MODEL)
    found = [file for pattern in WEIGHTS for file in sorted(folder.glob(pattern)) if file.is_file()]
    pointers = [file.name for file in [*found, *_tokenizers(folder)] if _is_pointer(file)]
    if pointers:
        yield f"expected files, got pointers of Git LFS in {folder}: {_named(pointers)}; run git lfs pull there"
    elif not found:
        yield f"expected weights beside {MODEL}, got no {', '.join(WEIGHTS)} in {folder}; copy the folder again"
    elif empty := [file.name for file in found if not file.stat().st_size]:
        yield f"expected weights, got empty files in {folder}: {_named(empty)}; copy the folder again"
    for index in (folder / name for name in INDICES if (folder / name).is_file()):
        yield from _json(index)
        missing = sorted({file for file in _files_of(index) if not (folder / file).is_file()})
        if missing:
            yield f"expected the {len(missing)} files that {index} names, got no {_named(missing)}; copy them too"
    if tokenizer and not _tokenizers(folder):
        yield f"expected a tokenizer beside {MODEL}, got none of {', '.join(TOKENIZERS)} in {folder}; copy it too"


def _tokenizers(folder: Path) -> list[Path]:
    return [file for pattern in TOKENIZERS for file in sorted(folder.glob(pattern)) if file.is_file()]


def _read(path: Path) -> Any:
    """What a file of JSON holds; None where it holds none, which `_json` says."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _json(path: Path) -> Iterator[str]:
    if not isinstance(_read(path), dict):
        size = path.stat().st_size
        yield f"expected a JSON object in {path}, got {size} bytes that are none; copy the file again"


def _files_of(index: Path) -> Iterator[str]:
    """The names of the files that an index of weights lists."""
    found = _read(index)
    weights = found.get("weight_map") if isinstance(found, dict) else None
    if isinstance(weights, dict):
        yield from (file for file in weights.values() if isinstance(file, str))


def _is_pointer(file: Path) -> bool:
    if file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def _named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
