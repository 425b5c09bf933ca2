"""A GGUF file that is written here is read back by transformers as the same model, or it is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_config, tiny_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from dsalign.models import to_gguf
from dsalign.models.gguf import import_gguf


def byte_level(folder: Path, *, tied: bool, cut: bool = True) -> Path:
    """A tiny Llama with grouped-query attention and a byte-level BPE tokenizer with one merge, th, that cuts text as
    gpt-2 does, or as the plain whitespace splitter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_end|>", *letters, "th"])}
    inner = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.pre_tokenizer = by_bytes if cut else pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), by_bytes])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = tiny_config(vocab_size=len(vocabulary) + 2, eos_token_id=1, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_back_is_the_same(tied: bool, tmp_path: Path) -> None:
    """Logits to 1e-5, tokens with the merge, and the chat template."""
    folder = byte_level(tmp_path / "model", tied=tied)
    assert to_gguf.write_gguf(folder, tmp_path / "out" / "model.gguf") < 1e-4
    again = import_gguf(tmp_path / "out" / "model.gguf", tmp_path / "again")
    ids = AutoTokenizer.from_pretrained(again)("the math")["input_ids"]
    assert len(ids) == 6 and ids == AutoTokenizer.from_pretrained(folder)("the math")["input_ids"]
    assert AutoTokenizer.from_pretrained(again).chat_template == "{{ messages[0]['content'] }}"
    one, other = (AutoModelForCausalLM.from_pretrained(x)(torch.tensor([ids])).logits for x in (folder, again))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf"]


def test_what_is_not_known_is_refused_with_the_command_that_does_it(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    command = rf"use llama.cpp's converter: python convert_hf_to_gguf.py .* --outfile {file}"
    with pytest.raises(ValueError, match=f"cuts text as gpt-2 or smollm do, got another; {command}"):
        to_gguf.write_gguf(tiny, file)
    with pytest.raises(ValueError, match="got another"):
        to_gguf.write_gguf(byte_level(tmp_path / "cut", tied=True, cut=False), file)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="positions that are not scaled, got linear"):
        to_gguf.write_gguf(tiny_folder(tmp_path / "scaled", rope_parameters=scaled), file)
    assert not file.exists()
    file.write_text("")
    with pytest.raises(ValueError, match="a file that is not there yet"):
        to_gguf.write_gguf(tiny, file)
