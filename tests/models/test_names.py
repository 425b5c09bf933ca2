"""What a model argument means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.models import names
from dsalign.models.names import BASE_FILE, HUB_NAMES, Source, located_base, resolve


def adapter(folder: Path, base: str | None) -> Path:
    """A folder that says what its base is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_a_model_folder(tiny: Path) -> None:
    assert resolve(str(tiny)) == Source(str(tiny), None, tiny)


def test_an_adapter_folder_has_the_weights_of_its_base(tiny: Path, tmp_path: Path) -> None:
    """Absolute, a hub name, or a short name; a value head lies with the adapter."""
    for base, weights in (
        (str(tiny), str(tiny)),
        ("org/model", "org/model"),
        ("qwen3-8b", "Qwen/Qwen3-8B"),
    ):
        assert resolve(str(adapter(tmp_path, base))) == Source(weights, tmp_path, tmp_path)


def test_a_relative_base_is_relative_to_the_working_directory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in PEFT, and then to the adapter's folder."""
    folder = adapter(tmp_path / "deep" / "adapter", f"../{tiny.name}")
    monkeypatch.chdir(tiny)
    assert resolve(str(folder)) == Source(f"../{tiny.name}", folder, folder)
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(
        ValueError, match=r"^model: the base of the adapter .*/adapter cannot be used: model: there is no "
    ):
        resolve(str(folder))


def moved(folder: Path, named: str, **file: str) -> Path:
    """A run's adapter with a base beside it, both brought here from /gone; file: what base_model.json says."""
    adapter(folder / "run" / "final", named)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    if file:
        (folder / "run" / "final" / BASE_FILE).write_text(json.dumps(file))
    return folder / "run" / "final"


def test_a_run_and_its_base_move_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The base is found from the adapter's folder, a line says so; one that was left behind is named, with the file to
    correct; the embedded model is found by its name."""
    gone = "/gone/model"
    folder = moved(tmp_path / "a", gone, base=gone, relative="../../model")
    assert resolve(str(folder)) == Source(str(tmp_path / "a" / "model"), folder, folder)
    assert caplog.messages == [
        f"{folder}: its base {gone} is not there; taken from {tmp_path / 'a' / 'model'}, beside it"
    ]
    folder = moved(tmp_path / "b", "../../model")
    assert resolve(str(folder)).weights == str(tmp_path / "b" / "model")
    for n, file in enumerate(({}, {"base": gone, "relative": "../other"}, {"base": "/x", "relative": "../../model"})):
        folder = moved(tmp_path / str(n), gone, **file)
        with pytest.raises(ValueError, match=rf"there is no folder {gone}; .*; write where it is into {folder}/adapt"):
            resolve(str(folder))


def test_what_an_adapter_keeps_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute for PEFT, which looks from the working directory, relative for a move; a hub name as it is; a short name
    for the model in the user's cache."""
    base, final = tmp_path / "x" / "model", tmp_path / "x" / "run" / "final"
    base.mkdir(parents=True)
    assert located_base(str(base), final) == (str(base), {"base": str(base), "relative": "../../model"})
    assert located_base("org/name", final) == ("org/name", {})
    monkeypatch.setenv("DSALIGN_CACHE", str(tmp_path))
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    whole = str(tmp_path / "models" / "SmolLM2-135M-Instruct")
    assert located_base(whole, final) == (whole, {"base": whole, "name": "smollm2-135m-instruct"})
    folder = adapter(tmp_path / "moved", "/gone/SmolLM2")
    (folder / BASE_FILE).write_text(json.dumps({"base": "/gone/SmolLM2", "name": "smollm2-135m-instruct"}))
    assert resolve(str(folder)).weights == whole


def test_a_home_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert resolve(f"~/{tiny.name}").weights == str(tiny)


@pytest.mark.parametrize("name", ["llama3-8b-instruct", "Llama3-8B-Instruct"])
def test_a_short_name_is_a_hub_name(name: str) -> None:
    assert resolve(name) == Source(HUB_NAMES["llama3-8b-instruct"])


@pytest.mark.parametrize("name", ["gpt2", "org/model"])
def test_anything_else_is_a_hub_name(name: str) -> None:
    assert resolve(name) == Source(name)


def test_the_embedded_model_is_converted_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def fake(folder: Path) -> Path:
        asked.append(folder)
        return folder / "converted"

    monkeypatch.setenv("DSALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(names, "import_embedded", fake)
    assert resolve("SmolLM2-135M-Instruct") == Source(str(tmp_path / "models" / "converted"))
    assert asked == [tmp_path / "models"]


def test_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSALIGN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert names.cache_folder() == Path("/home/somebody/.cache/dsalign")


@pytest.mark.parametrize("name", ["./out/final", "/no/such/folder", "~/nowhere", "out/run/final"])
def test_a_folder_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model: there is no folder {name}; expected a folder, a hub name or a short"
    ):
        resolve(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds neither config\.json nor adapter_config\.json, so it is no model folder; give the fo"
    ):
        resolve(str(tmp_path))


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/adapter_config\.json names no base model; write one into its base_"):
        resolve(str(adapter(tmp_path, None)))


def test_an_adapter_on_an_adapter_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Else the one beneath would be lost without a word; an adapter on itself would never end."""
    beneath = adapter(tmp_path / "beneath", str(tiny))
    above = adapter(tmp_path / "above", str(beneath))
    for folder in (above, adapter(tmp_path / "loop", str(tmp_path / "loop"))):
        with pytest.raises(ValueError, match=r"is an adapter itself, .*; merge that one first$"):
            resolve(str(folder))
