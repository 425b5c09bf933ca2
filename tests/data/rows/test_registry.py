"""Data sets known by a short name: each schema, as the hub has it, becomes rows."""

from __future__ import annotations

import datasets
import pytest
from row_files import read, register

from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.records import RowError
from dsalign.data.rows.registry import REGISTERED, transcript


def test_registered_emoji_pairs(write, read_hub, monkeypatch):
    row = {"question": "q", "answer_zh": "zh", "answer_en": "en"}
    for file in REGISTERED["shareai-llama3-dpo-zh-en-emoji"].files:
        write(f"emoji/{file}", [row])
    write("emoji/merged.jsonl", [{"other": "format"}])
    register(monkeypatch, "shareai-llama3-dpo-zh-en-emoji", "emoji")
    found = read("shareai-llama3-dpo-zh-en-emoji")
    expected = {"query": "q", "response": "zh", "rejected_response": "en"}
    assert found == [(f"shareai-llama3-dpo-zh-en-emoji:row {i}", expected) for i in (1, 2, 3, 4)]


def test_registered_hh_rlhf_cn(write, read_hub, monkeypatch):
    context = [{"role": "human", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "human", "text": "c"}]
    answers = {"chosen": {"role": "assistant", "text": "d"}, "rejected": {"role": "assistant", "text": "e"}}
    write("hh/harmless_base_cn_train.jsonl", [{"context": context, **answers}])
    write("hh/helpful_base_cn_train.jsonl", [{"context": [], **answers}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    ((_, row),) = read("hh-rlhf-cn-harmless-base-cn")
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert row["chosen"] == [{"role": "assistant", "content": "d"}]
    assert row["rejected"] == [{"role": "assistant", "content": "e"}]


def test_registered_data_set_that_has_changed(write, read_hub, monkeypatch):
    write("hh/harmless_base_cn_train.jsonl", [{"question": "a"}])
    register(monkeypatch, "hh-rlhf-cn-harmless-base-cn", "hh")
    with pytest.raises(RowError, match=r"cn:row 1: expected the columns of .*KeyError.*the hub data set has changed"):
        read("hh-rlhf-cn-harmless-base-cn")


TRANSCRIPT = "\n\nHuman: Hi\n\nthere?\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"


def test_a_transcript_by_hand():
    """A blank line inside a turn stays; an answer may be empty; what does not begin like one is none."""
    assert [(m["role"], m["content"]) for m in transcript(TRANSCRIPT)] == [
        ("user", "Hi\n\nthere?"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", ""),
    ]
    with pytest.raises(
        ValueError, match=r"^expected a transcript that begins with a blank line and 'Human:', got 'Hello'$"
    ):
        transcript("Hello")


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OTHER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
SCHEMAS = {  # short name -> (kind, a row as the hub has it, prompt and completions)
    "hh-rlhf": (
        "pairs",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        ("a", "b", "c"),
    ),
    "ultrafeedback-kto": ("labels", {"prompt": "a", "completion": "b", "label": True}, ("a", "b")),
    "kto-mix-14k": ("labels", {"prompt": CHAT[:1], "completion": CHAT[1:], "label": False}, ("a", "b")),
    "orpo-dpo-mix-40k": (
        "pairs",
        {"source": "s", "chosen": CHAT, "rejected": OTHER, "prompt": "a", "question": "a"},
        ("a", "b", "c"),
    ),
    "ultrafeedback-binarized": (
        "pairs",
        {"prompt": "a", "prompt_id": "1", "chosen": CHAT, "rejected": OTHER, "messages": CHAT, "score_chosen": 1.0},
        ("a", "b", "c"),
    ),
    "orca-dpo-pairs": ("pairs", {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c")),
    "distilabel-orca-dpo-pairs": (
        "pairs",
        {"system": "s", "input": "a", "chosen": "b", "rejected": "c", "generations": ["b", "c"], "status": "tie"},
        ("a", "b", "c"),
    ),
    "ultrachat-200k": ("demonstrations", {"prompt": "a", "prompt_id": "1", "messages": CHAT}, ("a", "b")),
    "no-robots": ("demonstrations", {"prompt": "a", "messages": CHAT, "category": "x"}, ("a", "b")),
    "alpaca": ("demonstrations", {"instruction": "a", "input": "", "output": "b", "text": "a b"}, ("a", "b")),
}


@pytest.mark.parametrize("short", SCHEMAS)
def test_registered_schemas_become_rows(short, write, read_hub, monkeypatch):
    """A local folder of the same schema in the place of the hub's: prompt and completions as they should be."""
    kind, row, (prompt, *completions) = SCHEMAS[short]
    write(f"there/data/{REGISTERED[short].split}.jsonl", [row])
    register(monkeypatch, short, "there")
    if REGISTERED[short].split != "train":
        split = {REGISTERED[short].split: f"data/{REGISTERED[short].split}.jsonl"}
        load = datasets.load_dataset
        monkeypatch.setattr("datasets.load_dataset", lambda name, **how: load(name, **{**how, "data_files": split}))
    (found,) = iter_rows([short], kind)
    assert found.prompt[-1]["content"] == prompt and list(found.completions) == completions
    if "system" in row:
        assert found.prompt[0] == {"role": "system", "content": "s"}
