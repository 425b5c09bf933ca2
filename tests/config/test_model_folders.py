"""Half a model's folder: each thing that a copy, a clone or a download leaves out is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.config.model_folders import problems, refuse_no_model

WHOLE = {"config.json": b"{}", "model.safetensors": b"x" * 9, "tokenizer.json": b"{}"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDED = {"model.safetensors.index.json": INDEX, "model-1.safetensors": b"x", "model.safetensors": None}


def told(folder: Path, files: dict[str, bytes | None], *, tokenizer: bool = True) -> list[str]:
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return list(problems(folder, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config.json": b'{"a": '}, "expected a JSON object in {}/config.json, got 6 bytes that are none; copy"),
        ({"config.json": b"[]"}, "expected a JSON object in {}/config.json, got 2 bytes that are none"),
        ({"model.safetensors": None}, "expected weights beside config.json, got no *.safetensors, *.bin, *.pt,"),
        ({"model.safetensors": b""}, "expected weights, got empty files in {}: model.safetensors; copy"),
        ({"model.safetensors": POINTER}, "expected files, got pointers of Git LFS in {}: model.safetensors; run git"),
        (
            {"tokenizer.json": POINTER},
            "expected files, got pointers of Git LFS in {}: tokenizer.json; run git lfs pull",
        ),
        ({"tokenizer.json": None}, "expected a tokenizer beside config.json, got none of tokenizer.json, "),
        (SHARDED, "expected the 1 files that {}/model.safetensors.index.json names, got no model-2.safetensors; copy"),
        (SHARDED | {"model.safetensors.index.json": b"{"}, "expected a JSON object in {}/model.safetensors.index.json"),
    ],
)
def test_one_thing_is_wrong(changed: dict[str, bytes | None], said: str, tmp_path: Path) -> None:
    (line,) = told(tmp_path, WHOLE | changed)
    assert line.startswith(said.format(tmp_path))


def test_what_is_whole_or_no_model_is_not_refused(tmp_path: Path) -> None:
    assert told(tmp_path, {"readme.txt": b"", "model.safetensors": b"x"}) == []
    assert told(tmp_path, WHOLE) == []
    (tmp_path / "tokenizer.json").unlink()
    assert told(tmp_path, {}, tokenizer=False) == []
    assert told(tmp_path, {"qwen.tiktoken": b"x"}) == []
    assert list(problems(tmp_path / "nowhere", tokenizer=True)) == []


def test_an_adapter(tmp_path: Path) -> None:
    """Its base is looked for elsewhere; its own weights must be there."""
    (line,) = told(tmp_path, {"adapter_config.json": b"{}"})
    assert line.startswith("expected adapter_model.safetensors or adapter_model.bin beside adapter_config.json, got no")
    first, second = told(tmp_path, {"adapter_config.json": b"{]"})
    assert first.startswith(f"expected a JSON object in {tmp_path}/adapter_config.json, got 2 bytes") and second == line
    assert told(tmp_path, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}) == []


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        refuse_no_model(tmp_path / name)
    with pytest.raises(
        ValueError, match=rf"^model: {tmp_path} holds neither config.json nor adapter_config.json, so it"
    ):
        refuse_no_model(tmp_path)
