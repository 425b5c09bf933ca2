"""Templates of reasoning models, which open every answer with a tag of its thought: what rows with a thought, rows
without one, and prompts for rollouts become."""

from __future__ import annotations

import types

import pytest

from dsalign.data import dataset
from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import UNOPENED, tokenize_rows
from dsalign.data.tokens.load_template import load_template

USER = ({"role": "user", "content": "q"},)
OPEN = "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
TURNS = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<U>' + m['content'] }}{% else %}"
# As DeepSeek-R1 is shipped: the thought of every answer in a conversation is cut.
CUTS = TURNS + "{{ '<A>' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}" + OPEN
# As its fine-tunes are: content is written as it is.
KEEPS = TURNS + "{{ '<A>' + m['content'] + '</s>' }}{% endif %}{% endfor %}" + OPEN
# As Qwen3-Thinking: the last answer has a thought, which may be empty, from a key of its own.
OWN_KEY = (
    TURNS
    + "{{ '<A>' }}{% if loop.last %}{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '</s>' }}{% endif %}{% endfor %}" + OPEN
)
THOUGHT = "<think>\nhm\n</think>\n\ntwo"


@pytest.fixture
def written(make_tokenizer):
    """written(template, answers, ...) -> (prompt, each completion) as text, and what was noticed of the row."""

    def written(source, *answers, prompt=USER):
        template, _ = load_template(make_tokenizer(chat_template=source), None, [])
        found = tokenize_rows([Row("f:1", prompt, answers)], template, max_length=999, truncation="raise")
        (group,) = found.groups
        decode = template.tokenizer.decode
        return decode(group.prompt), [decode(ids) for ids in group.completions], dict(found.noticed)

    return written


def thinks(thought, text):
    return {"role": "assistant", "content": text, "reasoning_content": thought}


def test_a_thought_is_learnt_where_the_template_keeps_it(written):
    """What opens it is the prompt's, as in use; the rest of the answer is learnt, whole."""
    assert written(KEEPS, THOUGHT) == ("<U>q<A><think>\n", ["hm\n</think>\n\ntwo</s>"], {})
    assert written(KEEPS, "<think>hm</think>two") == ("<U>q<A><think>", ["hm</think>two</s>"], {})
    assert written(OWN_KEY, thinks("hm", "two")) == ("<U>q<A><think>\n", ["hm\n</think>\n\ntwo</s>"], {})


def test_a_thought_is_refused_where_the_template_cuts_it(written):
    lost = r"f:1: template .*: expected the answer whole in what is written, but it leaves out '<think>\\nhm\\n</think>"
    with pytest.raises(ValueError, match=lost):
        written(CUTS, THOUGHT)
    with pytest.raises(ValueError, match=r"f:1: .*expected a template that writes reasoning_content"):
        written(CUTS, thinks("hm", "two"))
    with pytest.raises(ValueError, match=r"f:1: .*leaves out '<think>hm</think"):
        written(CUTS, "two", "<think>hm</think>the answer is three")


@pytest.mark.parametrize("template", [CUTS, KEEPS])
def test_an_answer_without_a_thought_is_learnt_whole_and_noticed(written, template):
    """Its prompt ends before the tag, which the answer does not have and will be asked with; a template that writes an
    empty thought has the tag in both."""
    assert written(template, "two") == ("<U>q<A>", ["two</s>"], {UNOPENED: 1})
    assert written(OWN_KEY, "two") == ("<U>q<A><think>\n", ["\n</think>\n\ntwo</s>"], {})


def test_every_answer_of_a_conversation(make_tokenizer):
    """Each prompt must be that of its use, so answers without the tag are refused; with it they are learnt."""
    template, _ = load_template(make_tokenizer(chat_template=KEEPS), None, [])
    talk = [*USER, {"role": "assistant", "content": THOUGHT}] * 2
    (found,) = template.encode_turns([talk])
    learnt = [x for x, kept in zip(found.completions[0], found.masks[0], strict=True) if kept]
    assert template.tokenizer.decode(learnt) == "hm\n</think>\n\ntwo</s>" * 2
    plain = [*USER, {"role": "assistant", "content": "two"}] * 2
    with pytest.raises(
        ValueError, match=r"expected every answer to begin as the template opens it, got 'two</s>.*'<th"
    ):
        template.encode_turns([plain])


def test_a_pair_of_which_one_thinks(written):
    """Both share the prompt before the tag, so the tag is learnt with the answer that has it."""
    prompt, answers, noticed = written(KEEPS, THOUGHT, "two")
    assert (prompt, answers, noticed) == ("<U>q<A>", [f"{THOUGHT}</s>", "two</s>"], {UNOPENED: 1})


def test_rollouts_begin_behind_the_tag(written):
    assert written(KEEPS) == ("<U>q<A><think>\n", [], {})


def test_the_tag_that_a_template_opens(make_tokenizer):
    """None for templates that open nothing, or open and close it themselves."""

    def opened(source):
        return load_template(make_tokenizer(chat_template=source), None, [])[0].opened

    assert [opened(source) for source in (CUTS, KEEPS, OWN_KEY)] == ["<think>\n"] * 3
    closed = OPEN.replace("<think>\n", "<think>\n\n</think>\n\n")
    for plain in (KEEPS.replace("<think>\n", ""), KEEPS.replace(OPEN, closed), KEEPS.replace(OPEN, "")):
        assert opened(plain) == ""
    for name in ("chatml", "llama3", "gemma", "mistral", "zephyr", "plain", "qwen"):
        assert load_template(make_tokenizer(), name, [])[0].opened == ""


def test_what_is_said_of_it(make_tokenizer):
    """At the start of a run and in `data check`: of answers without the tag, and of rollouts behind it."""
    template, _ = load_template(make_tokenizer(chat_template=KEEPS), None, [])
    how = {"max_length": 999, "truncation": "raise"}
    rows = [Row(f"f:{i}", USER, (text,)) for i, text in enumerate(["two", THOUGHT, "one"])]
    (line,) = dataset.what_was_noticed(template, tokenize_rows(rows, template, **how))
    assert line.startswith("2 rows have answers that do not begin with <think>, with which the template opens every")
    (line,) = dataset.what_was_noticed(template, tokenize_rows([Row("f:1", USER, ())], template, **how))
    assert line.startswith("the template opens every answer with <think>: it is part of the prompt, so")
    none = types.SimpleNamespace(noticed={"blank": 2, "identical": 3}, unread={}, groups=[])
    assert dataset.what_was_noticed(template, none) == [
        "2 rows have a question or an answer without any text; leave them out if they are not meant",
        "3 rows have the same answer as chosen and rejected: they teach nothing, leave them out",
    ]
