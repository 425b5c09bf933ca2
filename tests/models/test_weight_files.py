"""Which files a model's weights are in, and that each weight is in them once, among tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import section, tiny_folder
from torch import Tensor
from transformers import AutoConfig

from dsalign.config.schema import ModelOptions
from dsalign.models import load
from dsalign.models.names import resolve
from dsalign.models.weight_files import read_tensors, weight_files
from dsalign.models.weights import load_checked

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One layer: twelve keys."""
    return tiny_folder(tmp_path / "model", num_hidden_layers=1)


def opened(folder: Path, *, value: bool = False) -> Any:
    """The model of a folder, checked."""
    return load_checked(str(folder), AutoConfig.from_pretrained(folder), value=value)


def as_shards(folder: Path, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Put two shards and their index in place of a folder's one file."""
    for name, part in zip(SHARDS, (first, second), strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(first, SHARDS[0]) | dict.fromkeys(second, SHARDS[1])}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def as_pickle(folder: Path, change: Callable[[dict[str, Tensor]], Any], **how: Any) -> Path:
    """Put a pickle of change(weights) in place of a folder's file."""
    file = folder / "pytorch_model.bin"
    torch.save(change(load_file(folder / "model.safetensors")), file, **how)
    (folder / "model.safetensors").unlink()
    return file


@pytest.mark.parametrize(
    ("own", "key"),
    [("lm_head.weight", "module.lm_head.weight"), ("model.norm.weight", "_orig_mod.model.norm.weight"),
     ("model.norm.weight", "norm.weight")],
)  # fmt: skip
@pytest.mark.parametrize("factor", [1, 2])
def test_a_weight_under_two_keys(own: str, key: str, factor: int, folder: Path) -> None:
    """transformers takes either; equal ones are one, and others are refused."""
    state = load_file(folder / "model.safetensors")
    save_file(state | {key: state[own] * factor}, folder / "model.safetensors", metadata={"format": "pt"})
    if factor == 1:
        opened(folder)
    else:
        with pytest.raises(ValueError, match=rf": {own}.*: expected one tensor for a weight, got two that differ"):
            opened(folder)


def test_a_weight_in_two_shards(folder: Path) -> None:
    """The index names one of them, and transformers reads both files whole."""
    state = load_file(folder / "model.safetensors")
    second = {"lm_head.weight": state.pop("lm_head.weight"), "model.norm.weight": state["model.norm.weight"] + 1}
    as_shards(folder, state, second)
    with pytest.raises(
        ValueError, match=rf"{SHARDS[0]}: model.norm.weight and .*{SHARDS[1]}: model.norm.weight: expected one t"
    ):
        opened(folder)


def test_the_files_are_those_that_transformers_reads(folder: Path) -> None:
    """One file goes before shards that were left beside it."""
    state = load_file(folder / "model.safetensors")
    as_shards(folder, state, {})
    assert weight_files(str(folder)) == [folder / SHARDS[0]]
    save_file({k: t + 1 for k, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert weight_files(str(folder)) == [folder / "model.safetensors"]
    assert torch.equal(opened(folder).lm_head.weight, state["lm_head.weight"] + 1)


@pytest.mark.parametrize("content", ['{"metadata": ', '{"metadata": {}}'])
def test_an_index_that_cannot_be_read_is_named(content: str, folder: Path) -> None:
    as_shards(folder, load_file(folder / "model.safetensors"), {})
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: its weights cannot be read: (JSON|KeyErr)"):
        opened(folder)


@pytest.mark.parametrize("new", [True, False])
def test_an_old_pickle_is_read(new: bool, folder: Path) -> None:
    """Before 2020 it was no zip file, which cannot be mapped; its score layer is looked for as well."""
    as_pickle(folder, lambda state: state | {"score.weight": torch.ones(1, 32)}, _use_new_zipfile_serialization=new)
    model = load.load_frozen("reward", resolve(str(folder)), section(ModelOptions), device=torch.device("cpu"))
    assert bool((model.v_head.summary.weight == 1).all())


def test_a_checkpoint_around_the_weights_is_named(folder: Path) -> None:
    file = as_pickle(folder, lambda state: {"module": state, "step": 3})
    with pytest.raises(
        ValueError, match=r"expected tensors alone, got module, step too; .* under 'module': save the we"
    ):
        opened(folder)
    assert file.exists()


def test_a_pickle_of_objects_is_not_opened(folder: Path) -> None:
    """Its message has no codes for a terminal's colours, as torch's has."""
    file = as_pickle(folder, lambda state: state | {"made by": Path("x")})
    with pytest.raises(
        ValueError, match=rf"^{file} holds more than tensors and is not opened; save its tensors alone$"
    ):
        opened(folder)


def test_two_tensors_of_an_adapter_or_a_value_head(tmp_path: Path) -> None:
    """Under two keys that are one without a wrapper's name."""
    save_file({"x.weight": torch.ones(2), "module.x.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"module\.x\.weight and .*x\.weight: expected one tensor for a weight"):
        read_tensors(tmp_path / "a.safetensors")


CAUSES = {
    "other names inside": ("model.h.", r"config\.json is another model's, or the file was saved by other code"),
    "another layer": ("model.layers.2.", r"config\.json is another model's, or the file was saved by other code"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_a_prefix_is_a_wrappers_only_where_keys_fit_without_it(case: str, folder: Path) -> None:
    new, said = CAUSES[case]
    old = "model.layers." if case == "other names inside" else "model.layers.0."
    state = load_file(folder / "model.safetensors")
    renamed = {key.replace(old, new): tensor for key, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        opened(folder)


@pytest.mark.parametrize(
    "key", ["classifier.weight", "value_head.weight", "score.out_proj.weight", "reward_head.weight"]
)
def test_a_score_under_another_name_is_named(key: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {key: torch.ones(1, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"1 keys belong to no weight \({key}\)\. They may be its score: save it as sc"
    ):
        opened(folder, value=True)


def test_numbers_beyond_float16_are_told_from_a_run_that_diverged(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: t * 1e6 for k, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"or they are larger than float16 holds \(--dtype bfloat16 or float32\)"):
        load_checked(str(folder), AutoConfig.from_pretrained(folder), value=False, dtype=torch.float16)
