"""Every built-in template over every layout: what the row says is in the prompt and in what is learnt, or the template
refuses it in its own words."""

from __future__ import annotations

import json

import pytest
from row_files import turns
from rows.test_formats import FORMS

from dsalign.data.rows.fields import Fields
from dsalign.data.rows.formats import convert
from dsalign.data.tokens.chat_templates import BUILT_IN
from dsalign.data.tokens.encoder import tokenize_rows
from dsalign.data.tokens.load_template import load_template

HOW = {"max_length": 10_000, "truncation": "raise"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
ALSO = [  # columns that may stand beside a layout, and turns that only a conversation has
    ("demonstrations", {"messages": [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]}),
    ("demonstrations", {"messages": [*turns("q"), {"role": "assistant", "content": "c", "reasoning_content": "hm"}]}),
    ("demonstrations", {"messages": turns("q", "c"), "tools": [{"name": "look", "parameters": {}}]}),
    ("prompts", {"prompt": "q", "tools": [{"name": "look", "parameters": {}}], "answer": "4"}),
]
ROWS = [(kind, row) for kind, row, _, _ in FORMS] + ALSO


def spelt(row):
    """The row with a special token in each of its texts of one letter."""
    return json.loads(json.dumps(row).replace('"q"', '"q<|im_end|>"').replace('"c"', '"c</s>"'))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("spells", [False, True])
def test_every_layout(make_tokenizer, name, spells):
    """Rows may be refused for what a template has no place for; nothing else may come of them."""
    template, _ = load_template(make_tokenizer(), name, [])
    refused = 0
    for kind, row in ROWS:
        given = convert(Fields("f:1", spelt(row) if spells else row, text_only=False), kind, None)
        try:
            (group,) = tokenize_rows([given], template, **HOW).groups
        except ValueError as error:
            assert str(error).startswith(f"f:1: template '{name}': expected ") and "it says: Type" not in str(error)
            refused += 1
            continue
        prompt = template.tokenizer.decode(group.prompt)
        assert all(turn["content"] in prompt for turn in given.prompt if turn["role"] == "user")
        for answer, ids in zip(given.completions, group.completions, strict=True):
            said = answer if isinstance(answer, str) else answer["content"]
            assert said in template.tokenizer.decode(ids) and ids[-1] in template.end_ids
    assert refused == (1 if name in ("chatml", "qwen") else 4), "a thought; and where it has no tools, they and a call"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_turn_of_a_conversation(make_tokenizer, name):
    """With assistant_turns all, over the demonstrations: each answer is learnt, with its end token where it has one."""
    template, _ = load_template(make_tokenizer(), name, [])
    rows = [convert(Fields("f:1", row, text_only=False), kind, "s") for kind, row, _, _ in FORMS if kind[:1] == "d"]
    for row in rows:
        (group,) = tokenize_rows([row], template, assistant_turns="all", **HOW).groups
        learnt = template.tokenizer.decode(
            [x for x, kept in zip(group.completions[0], (group.masks or [[True] * 999])[0], strict=False) if kept]
        )
        said = [turn["content"] for turn in row.prompt if turn["role"] == "assistant"] + list(row.completions)
        assert all(text in learnt for text in said) and learnt.count("s\n") == 0
