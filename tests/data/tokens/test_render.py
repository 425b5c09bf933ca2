"""The renderer writes what transformers writes."""

from __future__ import annotations

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
