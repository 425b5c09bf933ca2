"""Built-in templates by hand: conversations, tools that may be called, calls as completions, and tools' answers."""

from __future__ import annotations

import pytest

from dsalign.data.rows.iterate import Skipped
from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import Tally, tokenize_rows
from dsalign.data.tokens.group_store import stored, write_store
from dsalign.data.tokens.load_template import NAMES, load_template
from dsalign.rewards.retemplate import Retemplate

ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "q"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "2"}
OFFER = (
    "These functions can be called:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "parameters": {}}}\n</tools>\n'
    'A call is written as\n<tool_call>\n{"name": name, "arguments": {...}}\n</tool_call>'
)
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OWN = "{% for m in messages %}{{ m['role'] + m['content'] }}{% if m.tool_calls %}call{% endif %}{% endfor %}"


END, EOS = 4, 2  # <|im_end|> and </s> of conftest.py


@pytest.fixture
def load(make_tokenizer):
    return lambda name="chatml", **how: load_template(make_tokenizer(**how), name, [])[0]


def ids(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chatml_by_hand(load):
    """The offer after the system prompt; a call behind the text; two answers in one turn of the user."""
    turns = [
        {"role": "system", "content": "s"},
        USER,
        {**CALLS, "content": "so", "tool_calls": [CALL, CALL]},
        TOLD,
        TOLD,
    ]
    assert load().render(turns, [ADD]) == (
        f"<|im_start|>system\ns\n\n{OFFER}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\nso\n{CALLED}\n{CALLED}<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n2\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert load().render([USER], [ADD]).startswith(f"<|im_start|>system\n{OFFER}<|im_end|>\n<|im_start|>user\nq")
    assert load().render([USER]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_qwen_keeps_its_system_prompt(load):
    text = load("qwen").render([USER], [ADD])
    assert text.startswith(f"<|im_start|>system\nYou are a helpful assistant.\n\n{OFFER}<|im_end|>\n")


def test_a_call_is_a_completion(load):
    """Its tokens are what the template writes, and the end token; rows with and without tools in one call."""
    template = load()
    rows = [Row("f:1", (USER,), (CALLS, "no"), tools=(ADD,)), Row("f:2", (USER,), ("a", "b"))]
    groups = tokenize_rows(rows, template, max_length=1000, truncation="raise").groups
    assert template.tokenizer.decode(groups[0].completions[0]) == f"{CALLED}<|im_end|>"
    assert template.tokenizer.decode(groups[0].completions[1]) == "no<|im_end|>"
    assert groups[0].prompt_text == template.render([USER], [ADD])
    assert groups[1].prompt_text == template.render([USER])
    assert groups[0].tools == () and groups[0].turns == (), "a row with completions needs neither again"


def test_all_turns_of_the_assistant_are_learnt_from_and_none_of_a_tool(load):
    template = load()
    row = Row("f:1", (USER, CALLS, TOLD), ("2!",), tools=(ADD,))
    how = {"max_length": 1000, "truncation": "raise", "assistant_turns": "all"}
    (group,) = tokenize_rows([row], template, **how).groups
    ((ids,), (mask,)) = group.completions, group.masks
    assert (
        template.tokenizer.decode([x for x, m in zip(ids, mask, strict=True) if m]) == f"{CALLED}<|im_end|>2!<|im_end|>"
    )
    assert "<tool_response>\n2\n" in template.tokenizer.decode(ids)


def test_a_prompt_keeps_its_tools_for_a_reward_model_with_another_template(load, tmp_path):
    """Also where it was kept on disk in between."""
    template, other = load(), load("qwen")
    row = Row("f:1", (USER, CALLS, TOLD), (), tools=(ADD,))
    (group,) = tokenize_rows([row], template, max_length=1000, truncation="raise").groups
    store = write_store([stored([group])], Tally(), Skipped(), tmp_path / "s")
    assert store[0] == group and group.tools == (ADD,)
    (read,) = Retemplate(other, other.tokenizer.decode, other.end_ids)([group])
    assert other.tokenizer.decode(read.prompt) == other.render(row.prompt, [ADD])


@pytest.mark.parametrize(
    ("turns", "tools", "name"),
    [
        ([USER], [ADD], "tools"),
        ([USER, CALLS, TOLD], [], "tool_calls"),
        ([USER, {"role": "assistant", "content": "a", "reasoning_content": "t"}, USER], [], "reasoning_content"),
    ],
)
def test_a_template_that_would_drop_something_is_refused(load, turns, tools, name):
    with pytest.raises(
        ValueError, match=f"^template 'zephyr': expected a template that writes {name}, got one that do"
    ):
        load("zephyr").render(turns, tools)


def test_the_tokenizers_own_template_may_name_them(load):
    template = load(None, chat_template=OWN)
    assert template.render([USER, CALLS, TOLD]) == "userqassistantcalltool2"
    with pytest.raises(ValueError, match="expected a template that writes tools"):
        template.render([USER], [ADD])
    thought = {"role": "assistant", "content": "a", "reasoning_content": "t"}
    thinks = load(None, chat_template="{% for m in messages %}{{ m.reasoning_content }}{{ m['content'] }}{% endfor %}")
    assert thinks.render([USER, thought]) == "qta"


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_families_without_a_turn_of_a_tool_refuse_it(load, name):
    with pytest.raises(ValueError, match=f"^template '{name}': .*turns of user, assistant, tool.*no turn of a tool"):
        load(name).render([USER, {"role": "assistant", "content": "a"}, TOLD])


TALK = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "p"},
)
WRITTEN = {  # as the families' model cards write it; </s> where the tokenizer has no token of the family's own
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\ns</s><|start_header_id|>user<|end_header_id|>\n\nq</s>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na</s><|start_header_id|>user<|end_header_id|>\n\np</s>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\ns\n\nq</s>\n<start_of_turn>model\na</s>\n<start_of_turn>user\np</s>\n"
    "<start_of_turn>model\n",
    "mistral": "[INST] s\n\nq[/INST] a</s>[INST] p[/INST]",
    "zephyr": "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\np</s>\n<|assistant|>\n",
    "plain": "sqap",
}
WRITTEN["qwen"] = WRITTEN["chatml"]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_template_by_hand(load, name):
    """Of a conversation with a system prompt and two questions; the answer then ends with one end token."""
    template = load(name)
    assert template.render(TALK) == WRITTEN[name]
    prompt, (completion,) = template.encode(TALK, ["c"])
    end = END if name in ("chatml", "qwen") else EOS
    space = ids(template, " ") if name == "mistral" else []
    assert prompt == ids(template, WRITTEN[name])
    assert completion == [*space, *ids(template, "c"), end]


def test_a_named_template_without_a_system_prompt(load):
    """Qwen's models were trained with one where none is given; the others write none."""
    qwen = load("qwen").render([USER])
    assert qwen.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq<|im_end|>")
    assert load("gemma").render([USER]) == "<start_of_turn>user\nq</s>\n<start_of_turn>model\n"


def test_a_family_ends_turns_with_its_own_token_where_there_is_one(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    template, _ = load_template(tokenizer, "llama3", [])
    own = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert template.end_ids == {EOS, own}
    assert template.encode([USER], ["c"])[1] == [[*ids(template, "c"), own]]
