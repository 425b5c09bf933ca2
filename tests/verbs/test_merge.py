"""`dsalign merge`: the numbers of the weights, what is carried, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import adapter_of
from safetensors.torch import load_file
from support import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dsalign import cli
from dsalign.verbs import merge, merged

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(tiny, tmp_path_factory.mktemp("lora") / "adapter")


def test_merged_weights_are_the_base_and_the_product(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W + 6 / 2 B A, of each adapted layer; and all that stands beside the weights is there."""
    out = tmp_path / "out"
    assert cli.main(["merge", str(adapter), "--output-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"merged {adapter} into {tiny}: {out}, float32\nlogits of ") and "(bound 0.00" in said
    base, new = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{Q}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(new[f"{Q}.weight"], base[f"{Q}.weight"] + 3 * b @ a, atol=1e-6, rtol=0)
    assert (3 * b @ a).abs().max() > 0.05 and base.keys() == new.keys()
    k = Q.replace("q_proj", "k_proj.weight")
    assert torch.equal(base[k], new[k])
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 5]
    assert not list(tmp_path.glob(".staging*"))


def test_dtype_and_default_folder(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder means its final/; bfloat16 is said to differ by its rounding, and more than float32."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("algo: dpo\n")
    (run / "final").symlink_to(adapter)
    found = merged.merge(str(run), None, "bfloat16")
    assert found.folder == run / "final-merged" and found.gap < 1e-4 < found.stored < 0.1 * found.largest
    assert AutoModelForCausalLM.from_pretrained(found.folder).dtype == torch.bfloat16


def test_a_reward_adapter_keeps_its_head(tiny: Path, tmp_path: Path) -> None:
    """The value head is carried as it is, and the scores of the files are those of the adapter."""
    adapter = adapter_of(tiny, tmp_path / "rm", head=0.25)
    found = merged.merge(str(adapter), None, "auto")
    assert found.what == "scores" and max(found.gap, found.stored) < 1e-4 and found.largest > 0.01
    head = load_file(found.folder / "value_head.safetensors")
    assert torch.equal(head["v_head.summary.weight"], torch.full((1, 32), 0.25))
    assert head["v_head.summary.bias"].tolist() == [0.5]


def test_a_merge_that_computes_something_else_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's unload gives the base without the adapter; nothing is written then."""
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(ValueError, match=r"expected the logits .* to be the same, merged in float32, got a difference"):
        merged.merge(str(adapter), tmp_path / "out", "auto")
    assert not list(tmp_path.iterdir())


def test_refusals(tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: Any) -> str:
        assert cli.main(["merge", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert f"expected an adapter, a folder with adapter_config.json, got {tiny}" in said(tiny)
    assert "exists; name another one" in said(adapter, "--output_dir", tmp_path)
    assert "--dtype: expected one of auto, float32, bfloat16, float16, got 'int8'" in said(adapter, "--dtype", "int8")
    assert "got '--ouput_dir'; did you mean --output_dir?" in said(adapter, "--ouput_dir", "x")
    assert "merge: expected ADAPTER, got none" in said("--dtype", "float32")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("algo: dpo\n")
    assert "got neither; go on with it: dsalign resume" in said(tmp_path / "run")


def test_a_name_on_the_hub_is_asked_for_before_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ADAPTER is a word without a flag, so the answer names none."""
    monkeypatch.setattr("dsalign.config.reach_hub.unreachable", lambda: "no network")
    assert cli.main(["merge", "nobody/nothing"]) == 2
    said = capsys.readouterr().err
    assert "ADAPTER: expected a folder, a short name or a name on the hub, got 'nobody/nothing'" in said
    assert said.endswith("cannot be reached (no network); or copy it here and give the folder\n")


def test_help_and_a_tied_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One matrix for both ends stays one."""
    assert merge.run(merge.read(["-h"])) == 0 and "dsalign merge ADAPTER" in capsys.readouterr().out
    base = tiny_folder(tmp_path / "tied", tie_word_embeddings=True)
    found = merged.merge(str(adapter_of(base, tmp_path / "adapter")), tmp_path / "out", "auto")
    assert load_file(found.folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
