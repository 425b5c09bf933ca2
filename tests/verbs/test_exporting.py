"""`dsalign export`: plain folders of whole models, reward models and adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import adapter_of, save_head
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dsalign import cli
from dsalign.verbs import export


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, words)])
    return code, *capsys.readouterr()


def test_a_checkpoint_becomes_a_plain_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights and tokenizer as they are, without what a resume reads; --dtype rounds."""
    kept = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(tiny, kept)
    (kept / "trainer.json").write_text("{}")
    (kept / "engines").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("algo: dpo\n")
    code, said, _ = run(capsys, tmp_path / "run", tmp_path / "plain")
    assert code == 0 and "has no final/: its newest checkpoint, checkpoint-3, is taken" in caplog.text
    assert said.endswith("float32, a LlamaForCausalLM; opens with transformers' AutoModelForCausalLM\n")
    one, other = (load_file(x / "model.safetensors") for x in (tiny, tmp_path / "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not {"trainer.json", "engines"} & {path.name for path in (tmp_path / "plain").iterdir()}
    assert run(capsys, kept, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_reward_model_is_a_classifier(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers opens it, and its logit is the sum of the last hidden state times 0.25."""
    shutil.copytree(tiny, tmp_path / "rm")
    save_head(tmp_path / "rm", torch.full((1, 32), 0.25), 0.0)
    code, said, _ = run(capsys, tmp_path / "rm", tmp_path / "out")
    assert code == 0 and "a LlamaForSequenceClassification; opens with transformers' AutoModelForSequence" in said
    ids = torch.tensor([[7, 8, 9, 2]])
    state = AutoModelForCausalLM.from_pretrained(tiny).model(ids).last_hidden_state[0, -1]
    score = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(score[0, 0], 0.25 * state.sum())


def test_an_adapter_is_copied_or_merged(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    (adapter / "random-0.safetensors").write_text("")
    code, said, _ = run(capsys, adapter, tmp_path / "copy")
    assert code == 0 and f"an adapter that needs its base {tiny}" in said
    here, there = ({path.name for path in x.iterdir()} for x in (adapter, tmp_path / "copy"))
    assert here - there == {"random-0.safetensors"} and "chat_template.jinja" in there
    code, said, _ = run(capsys, adapter, tmp_path / "whole", "--merge")
    assert code == 0 and said.startswith(f"merged {adapter} into {tiny}: {tmp_path / 'whole'}")


def test_refusals(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of(tiny, tmp_path / "adapter")
    out = tmp_path / "out"
    for words, message in (
        ((tiny, out, "--merge"), "leave --merge out"),
        ((adapter, out, "--gguf", "x.gguf"), "got the adapter"),
        ((adapter, out, "--dtype", "float16"), "leave --dtype out, or add --merge"),
        ((tiny, tmp_path), "expected a folder that is not there yet"),
        ((tiny,), "export: expected DIR, got none"),
        (("./nowhere", out), "there is no folder ./nowhere"),
    ):
        code, _, noted = run(capsys, *words)
        assert code == 2 and message in noted
    assert not out.exists() and export.run(export.read(["--help"])) == 0
