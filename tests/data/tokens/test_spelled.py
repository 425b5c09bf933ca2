"""Text that spells a special token is text, in every place of a row; tokens that the template writes stay tokens."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dsalign.data.tokens.load_template import load_template

PAD, BOS, EOS, START, END = range(5)
PIECES = st.lists(st.sampled_from(["a", " ", "<", "|>", "<|im_end|>", "</s>", "<s>", "<|im_start|>", "é"]), max_size=6)


@settings(max_examples=80, deadline=None)
@given(question=PIECES, answers=st.lists(PIECES, min_size=1, max_size=2), merged=st.booleans(), bos=st.booleans())
def test_any_text_comes_back_and_no_token_of_it_is_special(make_tokenizer, question, answers, merged, bos):
    """Decoded, each part is what was written, and the special ids are those of ChatML: start, end, start; end."""
    tokenizer = make_tokenizer(merges=[("<", "|"), ("a", "<")] if merged else (), adds_bos=bos)
    template, _ = load_template(tokenizer, "chatml", [])
    asked, said = "q" + "".join(question), ["".join(pieces) for pieces in answers]
    (found,) = template.encode_many([([{"role": "user", "content": asked}], said)])
    written = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompt_text == written
    assert [x for x in found.prompt if x < 5] == [BOS] * bos + [START, END, START]
    assert tokenizer.decode(found.prompt) == "<s>" * bos + written
    for text, ids in zip(said, found.completions, strict=True):
        assert [x for x in ids if x < 5] == [END] and ids[-1] == END
        assert tokenizer.decode(ids[:-1]) == text
    assert found.spelled == any(
        name in text for text in (asked, *said) for name in ("<|im_end|>", "</s>", "<s>", "<|im_start|>")
    )


def test_all_turns_system_and_tools(make_tokenizer):
    template, _ = load_template(make_tokenizer(), "chatml", [])
    spells = [
        {"role": "system", "content": "<|im_end|>"},
        {"role": "user", "content": "q</s>"},
        {"role": "assistant", "content": "a<|im_end|>b"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "<|im_start|>"},
    ]
    tools = ({"type": "function", "function": {"name": "f", "description": "<|im_end|>"}},)
    for own in ((), tools):
        (found,) = template.encode_turns([spells], [own])
        learnt = [x for x, kept in zip(found.completions[0], found.masks[0], strict=True) if kept]
        assert template.tokenizer.decode(learnt) == "a<|im_end|>b<|im_end|><|im_start|><|im_end|>"
        assert [x for x in found.prompt if x < 5] == [START, END, START, END, START]
        assert [x for x in learnt if x < 5] == [END, END]


def test_insisted_on_it_is_the_token(make_tokenizer):
    template = replace(load_template(make_tokenizer(), "chatml", [])[0], special_in_text=True)
    (found,) = template.encode_many([([{"role": "user", "content": "<|im_end|>"}], ["c"])])
    assert [x for x in found.prompt if x < 5] == [START, END, END, START] and found.spelled
    assert load_template(make_tokenizer(), "plain", [])[0].special_in_text


def test_what_cannot_be_read_as_text_is_refused(make_tokenizer):
    """A text that has the private characters itself beside a spelled token."""
    template, _ = load_template(make_tokenizer(), "chatml", [])
    try:
        template.encode([{"role": "user", "content": "\U00100000</s>"}], ["c"])
    except ValueError as error:
        assert "no character beyond U+FFFFF" in str(error)
    else:
        raise AssertionError("accepted")
    assert template.encode([{"role": "user", "content": "\U00100000"}], ["c"])[0]
