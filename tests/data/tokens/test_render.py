"""The renderer writes what transformers writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsalign.data.tokens.chat_templates import BUILT_IN
from dsalign.data.tokens.render import Renderer

TEXT = st.text("ab \n<é{}%", max_size=8)
TOOL = {"type": "function", "function": {"name": "f", "description": "<b> é"}}
THOUGHT = (
    "{% for m in messages %}{{ m.thinking or m.reasoning_content or '' }}{{ m.content }}{{ eos_token }}{% endfor %}"
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*BUILT_IN, "thought"]), texts=st.tuples(TEXT, TEXT), opens=st.booleans(), more=st.booleans()
)
def test_the_same_text_as_by_the_library(make_tokenizer, name, texts, opens, more):
    tokenizer = make_tokenizer()
    template = THOUGHT if name == "thought" else BUILT_IN[name].text.replace("TURN_END", "eos_token")
    turns = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    tools = [TOOL] if more and name in ("chatml", "qwen") else []
    if more and name == "thought":
        turns[1]["reasoning_content"] = "hm"
    (found,) = Renderer("t", tokenizer, template)([(turns, tools)], opens)
    want = tokenizer.apply_chat_template(
        turns, tools=tools or None, chat_template=template, add_generation_prompt=opens, tokenize=False
    )
    assert found == want


ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]


def called(answers):
    """A conversation with the calls a and b, and a tool's answer for each id."""
    calls = [{"id": one, "type": "function", "function": {"name": one, "arguments": {}}} for one in "ab"]
    tools = [{"role": "tool", "content": "x", "tool_call_id": one} for one in answers]
    return [ASKED[0], {**ASKED[1], "tool_calls": calls}, *tools]


@pytest.mark.parametrize(("answers", "right"), [("ab", True), ("a", True), ("ba", False), ("b", False)])
@pytest.mark.parametrize("writes_ids", [False, True])
def test_answers_of_tools_belong_to_their_calls(make_tokenizer, answers, right, writes_ids):
    """Where no id is written only the order says whose answer one is: the second call's, in the first place, is the
    first call's to whoever reads it."""
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{{ m.ID }}{% endfor %}"
    renderer = Renderer("t", make_tokenizer(), template.replace("ID", "tool_call_id" if writes_ids else "name"))
    if right or writes_ids:
        assert renderer([(called(answers), [])])
    else:
        with pytest.raises(
            ValueError, match=r"expected answers of tools in the order of their calls.* got that of b in"
        ):
            renderer([(called(answers), [])])
