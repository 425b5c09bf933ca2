"""Files of rows, the hub, and tokenizers to work out by hand: one id a byte, a few special tokens, two merges."""

from __future__ import annotations

import json

import datasets
import pytest
from row_files import raised
from support import read_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dsalign.data.rows import hub

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(merges, chatml, eos, pad, adds_bos, chat_template) -> a fast tokenizer.

    Every byte is one token; each merge ("a", "b") makes one more. pad: "<pad>" has id 0, "</s>" is pad == eos.
    """

    def make(merges=(), chatml=True, eos="</s>", pad="<pad>", adds_bos=False, chat_template=None, unk=None):
        special = SPECIAL if chatml else SPECIAL[:3]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = [*special, *alphabet, *(a + b for a, b in merges)]
        ids = {token: i for i, token in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.add_special_tokens(special)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token=eos,
            pad_token=pad,
            unk_token=unk,
            chat_template=chat_template,
        )

    return make


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("name", text, bytes or list of rows as JSON lines) -> "name", in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


@pytest.fixture
def read_hub(monkeypatch, tmp_path):
    """Local folders stand for hub repositories: the code path of the library is the same."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lambda name, **how: list(raised(hub.read_hub(name, **how)))


@pytest.fixture
def one(write):
    """one(row, kind, ...) -> the Row of a file with this row alone."""

    def one(row, kind, **options):
        (found,) = read_rows([write("a.jsonl", [row])], kind, **options)
        return found

    return one
