"""Templates: prompts and completions as ids, one BOS, one end token, masks, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsalign.data.tokens.load_template import load_template
from dsalign.data.tokens.templates import Template

PAD, BOS, EOS, START, END = range(5)  # the special tokens of the tokenizers of conftest.py


USER = ({"role": "user", "content": "q"},)
LLAMA = "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
PLAIN_JINJA = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
HEADED = LLAMA + "{% if add_generation_prompt %}[assistant]{% endif %}"


def load(tokenizer, name="chatml", end_ids=()):
    return load_template(tokenizer, name, end_ids)[0]


def ids(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_plain_joins_the_contents(make_tokenizer):
    template = load(make_tokenizer(), "plain")
    turns = [*USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "p"}]
    assert template.render(turns) == "qap"
    assert template.encode(turns, ["c", ""]) == (ids(template, "qap"), [[*ids(template, "c"), EOS], [EOS]])


def test_chatml_by_hand(make_tokenizer):
    """The line end after the turn end is dropped; the end token is there once."""
    template = load(make_tokenizer())
    prompt, completions = template.encode(USER, ["c", ""])
    line = ids(template, "\n")
    user, assistant = ids(template, "user"), ids(template, "assistant")
    assert prompt == [START, *user, *line, *ids(template, "q"), END, *line, START, *assistant, *line]
    assert completions == [[*ids(template, "c"), END], [END]]


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_pad_does_not_matter(make_tokenizer, pad):
    """pad id 0, and pad == eos: bytes of the pad's text in a completion stay, the end token stays."""
    tokenizer = make_tokenizer(pad=pad, chat_template=HEADED)
    template = replace(load(tokenizer, None), special_in_text=True)
    assert tokenizer.pad_token_id == (PAD if pad == "<pad>" else EOS)
    assert template.encode(USER, ["a<pad>b", ""])[1] == [
        [*ids(template, "a"), PAD, *ids(template, "b"), EOS],
        [EOS],
    ]


def test_no_completions(make_tokenizer):
    template = load(make_tokenizer())
    assert template.encode(USER, []) == (ids(template, template.render(USER)), [])


def test_an_end_token_inside_a_text_is_text_or_refused(make_tokenizer):
    """As text it is its 10 bytes; as the token it would end what is learnt before the "b"."""
    template = load(make_tokenizer())
    (inner,) = template.encode(USER, ["a<|im_end|>b"])[1]
    assert inner[-1] == END and END not in inner[:-1] and len(inner) == 13
    assert template.tokenizer.decode(inner) == "a<|im_end|>b<|im_end|>"
    asked = replace(template, special_in_text=True)
    with pytest.raises(ValueError, match=r"holds the end token '<\|im_end\|>' at character 2 and what follows is lost"):
        asked.encode(USER, ["a<|im_end|>b"])
    assert asked.encode(USER, ["a<|im_end|>"])[1] == [[*ids(template, "a"), END]]


def test_a_template_without_end_token_gets_one_eos(make_tokenizer):
    """Also a template whose turn end is no end token: text after the answer stays, as nothing says it is over."""
    template = load(make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }};{% endfor %}"), None)
    assert template.encode(USER, ["c"]) == (ids(template, "q;"), [[*ids(template, "c;"), EOS]])


def test_without_eos_the_callers_end_token_is_appended(make_tokenizer):
    assert load(make_tokenizer(eos=None), "plain", [END]).encode(USER, [""])[1] == [[END]]


def test_text_between_an_empty_answer_and_its_end_is_dropped(make_tokenizer):
    template = load(make_tokenizer(chat_template=HEADED.replace("+ eos_token", "+ ' ' + eos_token")), None)
    assert template.encode(USER, ["", "c"])[1] == [[EOS], [*ids(template, "c "), EOS]]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("chat_template", [HEADED, HEADED.replace("{{ bos_token }}", "")])
def test_exactly_one_bos(make_tokenizer, adds_bos, chat_template):
    """One where the template or the tokenizer puts one, none where neither does."""
    template = load(make_tokenizer(adds_bos=adds_bos, chat_template=chat_template), None)
    prompt, _ = template.encode(USER, ["c"])
    expected = int(adds_bos or "bos_token" in chat_template)
    assert prompt.count(BOS) == expected and (prompt[0] == BOS) == bool(expected)


def test_merge_across_the_boundary_takes_the_shared_beginning(make_tokenizer):
    """plain "xa" + "b" is x, ab: the prompt is x alone, for all completions of the row."""
    template = load(make_tokenizer(merges=[("a", "b")]), "plain")
    prompt = ({"role": "user", "content": "xa"},)
    x, a, c, ab = (ids(template, text)[0] for text in ("x", "a", "c", "ab"))
    assert template.encode(prompt, ["c"]) == ([x, a], [[c, EOS]])
    assert template.encode(prompt, ["b"]) == ([x], [[ab, EOS]])
    assert template.encode(prompt, ["c", "b", ""]) == ([x], [[a, c, EOS], [ab, EOS], [a, EOS]])


def test_a_generation_prompt_that_the_answer_replaces(make_tokenizer):
    """The generation prompt opens a thought that finished turns do not have."""
    template = load(make_tokenizer(chat_template=HEADED.replace("%}[assistant]{%", "%}[assistant]<think>{%")), None)
    prompt, completions = template.encode(USER, ["c"])
    assert template.tokenizer.decode(prompt) == "<s>[user]q</s>[assistant]"
    assert completions == [[*ids(template, "c"), EOS]]


def test_many_equal_one_by_one(make_tokenizer):
    template = load(make_tokenizer(merges=[("a", "b")]))
    items = [(USER, ["a", "b"]), (({"role": "user", "content": "xa"},), []), (USER, ["ab"])]
    many = template.encode_many(items)
    assert [(x.prompt, x.completions) for x in many] == [template.encode(*item) for item in items]
    assert [x.prompt_text for x in many] == [template.render(prompt) for prompt, _ in items]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([None, "chatml", "plain"]),
    prompt=st.text("xab \né<", min_size=1, max_size=8),
    completions=st.lists(st.text("bax \n>é", max_size=6), min_size=1, max_size=3),
    own=st.booleans(),
)
def test_prompt_and_completion_are_the_whole(make_tokenizer, name, prompt, completions, own):
    """prompt + completion = the rendered conversation up to its end token, of which there is exactly one."""
    merges = [("a", "b"), ("x", "a")]
    template = load(make_tokenizer(merges=merges, adds_bos=True, chat_template=HEADED if own else None), name)
    messages = [{"role": "user", "content": prompt}]
    shared, encoded = template.encode(messages, completions)
    for text, completion in zip(completions, encoded, strict=True):
        (whole,) = template._render_all([([*messages, {"role": "assistant", "content": text}], ())])
        whole = whole.removeprefix("<s>")
        decoded = template.tokenizer.decode([*shared, *completion[:-1]]).removeprefix("<s>")
        assert whole.startswith(decoded) and whole.removeprefix(decoded) in ("", "</s>", "<|im_end|>\n")
        assert completion[-1] in template.end_ids
        assert template.end_ids.isdisjoint(completion[:-1])
        assert [*shared, *completion].count(BOS) == 1


def test_template_that_refuses_a_conversation(make_tokenizer):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + HEADED
    template = load(make_tokenizer(chat_template=strict), None)
    with pytest.raises(
        ValueError, match=r"expected a conversation it accepts, got turns of system, user, and it says: no"
    ):
        template.render(({"role": "system", "content": "s"}, *USER))


def test_template_that_refuses_everything_still_loads(make_tokenizer):
    """A row can be named in the message, so the refusal waits for the rows."""
    template = load(make_tokenizer(chat_template="{{ raise_exception('never') }}"), None)
    with pytest.raises(ValueError, match="it says: never; change the row or name another template"):
        template.encode(USER, [])


def test_a_template_that_writes_a_system_prompt_behind_the_question(make_tokenizer):
    """It does not stand before the answer of a whole conversation: the model would be asked with what it never saw."""
    asked = "{% if add_generation_prompt %}[{{ messages[0].content }}]{% endif %}"
    turns = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    template = load(make_tokenizer(chat_template=turns + asked), None)
    with pytest.raises(
        ValueError, match=r"expected the same prompt with and without an answer, got another one after 'us"
    ):
        template.encode(({"role": "system", "content": "be brief"}, *USER), ["c"])


def test_a_template_that_writes_the_date(make_tokenizer):
    """One moment for all that a run writes: a second later, or resumed after midnight, the rows are the same."""
    dated = load(make_tokenizer(chat_template="{{ strftime_now('%d %b %Y %S') }}" + HEADED), None)
    template = replace(dated, day="2026-11-30T23:59:58")
    assert dated.dated and not load(make_tokenizer(chat_template=HEADED), None).dated
    assert template.render(USER).startswith("30 Nov 2026 58") and not dated.render(USER).startswith("30 Nov 2026 58")
    (whole,) = template.encode_turns([[*USER, {"role": "assistant", "content": "c"}]])
    assert whole.prompt_text.startswith("30 Nov 2026 58")


def test_no_prompt_token(make_tokenizer):
    template = load(make_tokenizer(merges=[("a", "b")]), "plain")
    for prompt, completions in (("", ["c"]), ("a", ["b", "c"]), ("", [])):
        with pytest.raises(
            ValueError, match=r"'plain': expected at least one prompt token before the answer, got none"
        ):
            template.encode([{"role": "user", "content": prompt}], completions)


def test_template_that_rewrites_earlier_turns(make_tokenizer):
    """It shortens the question once there is an answer: the completion would begin inside the prompt."""
    rewriting = HEADED.replace("m['content']", "(m['content'] if loop.last else '')")
    template: Template = load(make_tokenizer(chat_template=rewriting), None)
    with pytest.raises(ValueError, match=r"expected the same prompt with and without an answer, got another one after"):
        template.encode(USER, ["c"])


TALK = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "p"},
)


def marked(template, encoded):
    """The completion as text, the tokens that count in capitals; end tokens as "." and "!"."""
    (completion,), (mask,) = encoded.completions, encoded.masks
    assert len(completion) == len(mask)
    parts = []
    for token, counts in zip(completion, mask, strict=True):
        text = {EOS: ".", END: "."}.get(token) or template.tokenizer.decode([token])
        parts.append(("!" if text == "." else text.upper()) if counts else text)
    return "".join(parts)


ANSWERED = (*TALK, {"role": "assistant", "content": "c"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("zephyr", "A!\n<|user|>\np.\n<|assistant|>\nC!"),
        ("mistral", " A![INST] p[/INST] C!"),
        ("gemma", "A!\n<start_of_turn>user\np.\n<start_of_turn>model\nC!"),
        ("plain", "ApC!"),
    ],
)
def test_every_answer_counts_with_its_end_token(make_tokenizer, name, text):
    """Not the questions between them, nor what the template writes; the last answer gets an end token in any case."""
    template = load(make_tokenizer(), name)
    (encoded,) = template.encode_turns([ANSWERED])
    assert marked(template, encoded) == text
    whole = ids(template, template.render(TALK))
    assert [*encoded.prompt, *encoded.completions[0]][: len(whole)] == whole
    assert encoded.prompt_text == template.render(TALK[:2])


def test_one_answer_is_what_a_single_completion_is(make_tokenizer):
    template = load(make_tokenizer())
    (encoded,) = template.encode_turns([(*USER, {"role": "assistant", "content": "c"})])
    assert (encoded.prompt, encoded.completions) == template.encode(USER, ["c"])
    assert encoded.masks == [[True, True]]


THINKING = (  # forgets what is in front of the last answer, as templates of reasoning models do
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '[a]' + ('<think>' if loop.last else '') + m['content'] + eos_token }}"
    "{% else %}{{ '[u]' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}[a]<think>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    """Its answer as the last one is still learnt from, the text that the generation prompt inserts being prompt."""
    template = load(make_tokenizer(chat_template=THINKING), None)
    turns = ANSWERED[1:]
    with pytest.raises(
        ValueError, match=r"expected earlier turns to stay as they are .*, got 'a</s>.*'<think>a</s>'; u"
    ):
        template.encode_turns([turns])
    prompt, (completion,) = template.encode(turns[:-1], ["c"])
    assert template.tokenizer.decode(prompt) == "[u]q[a]a</s>[u]p[a]<think>"
    assert completion == [*ids(template, "c"), EOS]


def test_turns_without_anything_before_the_answer_are_refused(make_tokenizer):
    template = load(make_tokenizer(), "plain")
    with pytest.raises(ValueError, match=r"expected at least one prompt token before the answer, got none"):
        template.encode_turns([({"role": "user", "content": ""}, {"role": "assistant", "content": "c"})])
