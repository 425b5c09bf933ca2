"""Where the config.json of a model comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.memory import known
from dsalign.memory.shapes import of_config
from dsalign.models.names import EMBEDDED, HUB_NAMES

PUBLISHED = {  # what the model cards say
    "smollm2-135m-instruct": 134_515_008,
    "llama3-8b": 8_030_261_248,
    "llama3-8b-instruct": 8_030_261_248,
    "llama3_1-8b-instruct": 8_030_261_248,
    "llama3_2-1b-instruct": 1_235_814_400,
    "qwen2_5-0_5b-instruct": 494_032_768,
    "qwen2_5-7b-instruct": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b-instruct-v3": 7_248_023_552,
    "gemma2-9b-instruct": 9_241_705_984,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_short_name_has_the_published_size(name: str) -> None:
    assert of_config(known.KNOWN[name][1]).total == PUBLISHED[name]


def test_short_names_are_those_of_runs() -> None:
    names = {name: hub for name, (hub, _) in known.KNOWN.items() if name != EMBEDDED}
    assert names == dict(HUB_NAMES)


def test_a_folder_an_adapter_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's folder names its base; a hub name is looked for in the cache, before the short name's numbers."""
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    folder.mkdir()
    adapter.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    for name in (folder, adapter):
        assert known.config_of(str(name)) == ({"model_type": "llama"}, str(folder / "config.json"))
    monkeypatch.setattr(known, "_cached", lambda hub: folder / "config.json" if hub == "Qwen/Qwen3-8B" else None)
    assert known.config_of("qwen3-8b") == ({"model_type": "llama"}, "Qwen/Qwen3-8B in the hub's cache")
    assert known.config_of("google/gemma-2-9b-it")[1] == "the sizes of google/gemma-2-9b-it"


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_cached", lambda hub: None)
    with pytest.raises(ValueError, match=r"got 'lama3-8b'; did you mean llama3-8b.*--params 70B --layers 80"):
        known.config_of("lama3-8b")
    with pytest.raises(ValueError, match=r"holds no config\.json; give the folder of a model"):
        known.config_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON: "):
        known.config_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object, got list"):
        known.config_of(str(tmp_path))
