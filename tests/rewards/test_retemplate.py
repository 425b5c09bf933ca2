"""A reward model's own template and ids for what the policy wrote."""

from __future__ import annotations

from dataclasses import replace

from support import groups_of, tiny_tokenizer

from dsalign.data.tokens.templates import Template
from dsalign.rewards.retemplate import Retemplate

END = frozenset({2})


def test_reading_renders_the_conversation_again() -> None:
    """Another template and vocabulary; an end token only where one was sampled, or where nothing else is left."""
    tokenizer = tiny_tokenizer()
    template = Template(
        "q", tokenizer, "{% for m in messages %}{{ m.content }}{{ '?' if m.role == 'user' }}{% endfor %}", END
    )
    texts = {(50, 3): "yes", (51,): "no", (52, 3): "", (53,): ""}
    reading = Retemplate(template, lambda ids: texts[tuple(ids)], frozenset({3}))
    (group,) = groups_of(tuple(texts))
    (found,) = reading([replace(group, turns=({"role": "user", "content": "so"},))])
    yes, no, so = (tuple(tokenizer(text)["input_ids"]) for text in ("yes", "no", "so?"))
    assert found.prompt == so
    assert found.completions == ((*yes, 2), no, (2,), (2,))
    assert found.where == group.where and reading([]) == []


def test_a_tag_that_the_prompt_opens_is_the_answers_to_the_judge() -> None:
    """Where the prompt ends with it; a prompt from a row whose answer has none does not."""
    tokenizer = tiny_tokenizer()
    template = Template("q", tokenizer, "{% for m in messages %}{{ m.content }};{% endfor %}", END)
    texts = {(50, 9): "so(", (50,): "so", (51, 3): "a) b"}
    reading = Retemplate(template, lambda ids: texts[tuple(ids)], frozenset({3}), opened="(")
    groups = [
        replace(one, prompt=prompt, turns=({"role": "user", "content": "so"},))
        for prompt, one in zip(((50, 9), (50,)), groups_of(((51, 3),), ((51, 3),)), strict=True)
    ]
    found = [tokenizer.decode(group.completions[0]) for group in reading(groups)]
    assert found == ["(a) b;<|im_end|>", "a) b;<|im_end|>"]
