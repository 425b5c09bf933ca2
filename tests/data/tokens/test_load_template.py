"""Templates by name: the tokenizer's own, a built-in one, or a file; and the tokens that end a turn in each."""

from __future__ import annotations

import pytest
from test_templates import HEADED, PLAIN_JINJA, USER, ids, load

from dsalign.data.tokens.load_template import load_template

BOS, EOS, START, END = range(1, 5)  # special tokens of the tokenizers of conftest.py


def test_the_tokenizers_own_template_comes_first(make_tokenizer):
    template, warning = load_template(make_tokenizer(chat_template=HEADED), None, [END])
    assert (template.chat_template, warning) == (None, None)
    assert template.render(USER) == "<s>[user]q</s>[assistant]"
    assert template.end_ids == {EOS, END}


def test_without_one_it_is_chatml_with_a_warning(make_tokenizer):
    template, warning = load_template(make_tokenizer(), None, [])
    assert template.name == "chatml" and "no chat template" in warning and "--template" in warning
    assert template.render(({"role": "system", "content": "s"}, *USER)) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert load_template(make_tokenizer(), "chatml", [])[1] is None


def test_chatml_ends_turns_with_eos_where_im_end_is_no_token(make_tokenizer):
    template = load(make_tokenizer(chatml=False))
    assert template.end_ids == {EOS}
    assert template.render(USER) == "<|im_start|>user\nq</s>\n<|im_start|>assistant\n"
    assert template.encode(USER, ["c"]) == (ids(template, template.render(USER)), [[*ids(template, "c"), EOS]])


def test_chatml_takes_an_unknown_token_for_no_token(make_tokenizer):
    """With unk_token "<|im_end|>" the text has one id, but that id is the unknown token."""
    assert load(make_tokenizer(unk="<|im_end|>")).end_ids == {EOS}


def test_chatml_without_eos_ends_with_im_end(make_tokenizer):
    template = load(make_tokenizer(eos=None))
    assert template.end_ids == {END}
    assert template.encode(USER, ["c"])[1] == [[*ids(template, "c"), END]]


def test_template_from_a_file(make_tokenizer, write):
    name = write("own.jinja", HEADED)
    template, warning = load_template(make_tokenizer(), name, [])
    assert (template.name, warning) == ("own.jinja", None)
    assert template.encode(USER, ["c"]) == (
        [BOS, *ids(template, "[user]q"), EOS, *ids(template, "[assistant]")],
        [[*ids(template, "c"), EOS]],
    )


def test_no_end_token(make_tokenizer):
    for tokenizer, name in [
        (make_tokenizer(eos=None), "plain"),
        (make_tokenizer(eos=None, chatml=False), "chatml"),
        (make_tokenizer(eos=None, chat_template=PLAIN_JINJA), None),
    ]:
        with pytest.raises(ValueError, match=r"tokenizer: expected an end token, got none.*set tokenizer.eos_token"):
            load_template(tokenizer, name, [])


def test_unknown_template(make_tokenizer):
    with pytest.raises(
        ValueError, match=r"template: expected chatml, qwen, .*plain or .*got 'chatlm'; did you mean 'chatml'\?"
    ):
        load_template(make_tokenizer(), "chatlm", [])
    with pytest.raises(ValueError, match=r"got 'nowhere.jinja'; check the path"):
        load_template(make_tokenizer(), "nowhere.jinja", [])


def test_a_file_of_another_ending_is_told_what_to_be_called(make_tokenizer, write):
    """Such as a chat_template.json, which holds a template and is none."""
    with pytest.raises(
        ValueError, match=r"a \.jinja file that exists, got 'own\.j2'; if it is a template, call it own\.ji"
    ):
        load_template(make_tokenizer(), write("own.j2", HEADED), [])


def test_template_file_that_is_no_template(make_tokenizer, write):
    with pytest.raises(ValueError, match=r"'bad.jinja': expected a Jinja template, got an error on line 2: "):
        load_template(make_tokenizer(), write("bad.jinja", "x\n{% for %}"), [])
    with pytest.raises(ValueError, match=r"template 'latin.jinja': expected UTF-8 text, got .*save the file as UTF-8"):
        load_template(make_tokenizer(), write("latin.jinja", b"\xe9"), [])
