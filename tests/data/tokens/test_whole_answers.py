"""Templates that leave out some of an answer, of a question or of the system prompt are refused, naming it."""

from __future__ import annotations

import pytest

from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import tokenize_rows
from dsalign.data.tokens.load_template import load_template
from dsalign.data.tokens.whole_answers import answer_end

USER = [{"role": "user", "content": "q"}]
OPEN = "{% if add_generation_prompt %}A:<think>{% endif %}"
CUTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q:{{ m['content'] }}{% else %}"
    "A:{{ m['content'].split('</think>')[-1] }}</s>{% endif %}{% endfor %}" + OPEN
)
KEEPS = CUTS.replace(".split('</think>')[-1]", "")
TRIMS = KEEPS.replace("m['content']", "(m['content'] | trim | replace('\\n\\n', '\\n'))")
NO_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"


def load(make_tokenizer, template):
    return load_template(make_tokenizer(chat_template=template), None, [])[0]


def test_a_thought_that_is_cut_is_refused_and_may_be_left_out(make_tokenizer):
    template = load(make_tokenizer, CUTS)
    message = r"expected the answer whole in what is written, but it leaves out '<think>hm</think>', from character 1"
    with pytest.raises(ValueError, match=message):
        template.encode(USER, ["<think>hm</think>two and more"])
    rows = [Row(f"f:{i}", tuple(USER), (text,)) for i, text in enumerate(["two", "<think>hm</think>two", "one"])]
    found = tokenize_rows(rows, template, max_length=99, truncation="delete", lenient=True)
    assert [group.where for group in found.groups] == ["f:0", "f:2"] and found.num_rows == 2


def test_an_answer_may_begin_with_what_opens_it(make_tokenizer):
    """The template opens answers with <think>: that much of the answer is the prompt's."""
    template = load(make_tokenizer, KEEPS)
    prompt, (completion,) = template.encode(USER, ["<think>hm</think>two"])
    assert template.tokenizer.decode(prompt) == "Q:qA:<think>"
    assert template.tokenizer.decode(completion) == "hm</think>two</s>"


def test_white_space_may_change(make_tokenizer):
    template = load(make_tokenizer, TRIMS)
    assert template.tokenizer.decode(template.encode(USER, [" a\n\nb "])[1][0]) == "a\nb</s>"


def test_a_system_prompt_that_is_left_out(make_tokenizer):
    template = load(make_tokenizer, NO_SYSTEM)
    with pytest.raises(ValueError, match=r"expected the turn of the system whole .* leaves out 'be brief'"):
        template.encode([{"role": "system", "content": "be brief"}, *USER], ["c"])


def test_arguments_of_a_call(make_tokenizer):
    """A template that writes the names of calls alone loses what they are called with."""
    names = (
        "{% for m in messages %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c.function.name }}{% endfor %}"
        "</s>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    with pytest.raises(ValueError, match="leaves out 'city'"):
        load(make_tokenizer, names).encode(USER, [{"role": "assistant", "content": "", "tool_calls": [call]}])
    whole = names.replace("c.function.name", "c.function | tojson")
    assert load(make_tokenizer, whole).encode(USER, [{"role": "assistant", "content": "", "tool_calls": [call]}])[1]


def test_the_place_by_hand():
    """An answer that repeats the question is looked for behind it."""
    said = {"role": "assistant", "content": "two"}
    assert answer_end(said, "Q:two A:two!", "Q:two A:", "A:") == 11


def test_a_turn_of_weight_0_is_not_in_the_mask_and_cannot_be_all(make_tokenizer):
    template, _ = load_template(make_tokenizer(), "chatml", [])
    prompt = (*USER, {"role": "assistant", "content": "bad"}, {"role": "user", "content": "p"})
    how = {"max_length": 999, "truncation": "delete"}
    row = Row("f:1", prompt, ("good",), unlearnt=(1,))
    (group,) = tokenize_rows([row], template, assistant_turns="all", **how).groups
    learnt = [x for x, kept in zip(group.completions[0], group.masks[0], strict=True) if kept]
    assert template.tokenizer.decode(learnt) == "good<|im_end|>"
    with pytest.raises(ValueError, match=r"f:1: expected weight 1 for the last answer"):
        tokenize_rows([Row("f:1", prompt, ("good",), unlearnt=(3,))], template, **how)
    with pytest.raises(ValueError, match=r"f:1: .*every answer of the row has weight 0"):
        tokenize_rows([Row("f:1", prompt, ("good",), unlearnt=(1, 3))], template, assistant_turns="all", **how)
