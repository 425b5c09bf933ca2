"""Text to ids: what is tokenised once for several texts has the ids it has by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AddedToken

from dsalign.data.tokens.text_ids import TextIds, lacks
from dsalign.data.tokens.words import reads_words

PIECES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "user\n", "a", " ", "  ", "é", "\n", "<", "ab"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
PROBE = "<|im_start|>user\n.<|im_end|>\n<|im_start|>assistant\n"


def branches(ids: TextIds, items):
    return [(opening, list(rest)) for opening, rest in ids.branching(items)]


def plain(ids: TextIds, items):
    return [(ids.of([opening])[0], ids.of(texts)) for opening, texts in items]


@pytest.mark.parametrize("adds_bos", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_branches_have_the_ids_of_the_whole_texts(make_tokenizer, adds_bos, data):
    """Whatever stands in the texts, which go on as the opening does or not."""
    ids = TextIds(make_tokenizer([("a", "b"), ("a", "a")], adds_bos=adds_bos), PROBE)
    shared = st.tuples(TEXT, st.lists(TEXT, max_size=3)).map(lambda x: (x[0], [x[0] + rest for rest in x[1]]))
    parted = st.tuples(TEXT, st.lists(TEXT, max_size=3))
    items = data.draw(st.lists(st.one_of(shared, parted), max_size=4))
    assert branches(ids, items) == plain(ids, items)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_branches_by_words_have_the_ids_of_the_whole_texts(make_tokenizer, data):
    """Of a tokenizer by a known pattern, beside the library's reading of each text."""
    tokenizer = make_tokenizer([("a", "b"), ("Ġ", "a")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = TextIds(tokenizer, PROBE)
    assert reads_words(tokenizer)
    items = data.draw(st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=3)), max_size=4))
    items = [(opening, [*rest, opening + "a b"]) for opening, rest in items]
    want = [(ids._by_library([opening])[0], ids._by_library(rest)) for opening, rest in items]
    assert branches(ids, items) == want


def test_the_front_is_tokenised_once(make_tokenizer, monkeypatch):
    """Of an opening and two texts of 40 characters in front of the last turn, 40 are read, not 120."""
    tokenizer = make_tokenizer()
    ids = TextIds(tokenizer, PROBE)
    opening = f"<|im_start|>user\n{'q' * 40}<|im_end|>\n<|im_start|>assistant\n"
    read = []
    monkeypatch.setattr(ids, "_plain", lambda texts: read.extend(texts) or TextIds._plain(ids, texts))
    items = [(opening, [opening + "a", opening + "b"])]
    found = ids.branching(items)
    assert sum(map(len, read)) == len(opening) + 2 * len("<|im_start|>assistant\na")
    assert found == plain(ids, items)


def own(make_tokenizer, token: AddedToken):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return tokenizer


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<turn>", lstrip=True, normalized=False),  # takes the blanks before it
        AddedToken("<turn>", normalized=True),  # found in what the normaliser made of the text
        AddedToken("<turn>", single_word=True, normalized=False),  # found by what stands beside it
        AddedToken("turn>turn", normalized=False),  # can overlap with itself
    ],
)
def test_text_is_not_cut_at_a_token_that_depends_on_what_stands_beside_it(make_tokenizer, token):
    ids = TextIds(own(make_tokenizer, token), token.content)
    assert ids._special == []
    opening = f"a b \n {token.content}"
    items = [(opening, [f"{opening}x", f"{opening} y"])]
    assert branches(ids, items) == plain(ids, items)


def test_text_is_not_cut_at_a_token_that_another_can_take_from(make_tokenizer):
    """Of "a<b<c" the longer token "a<b" is found first, and nothing is left of "<b<c"."""
    tokenizer = own(make_tokenizer, AddedToken("a<b", normalized=False))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<b<c"]}, replace_extra_special_tokens=False)
    ids = TextIds(tokenizer, "<b<c")
    assert "<b<c" not in ids._special
    items = [("xa<b<c", ["xa<b<cy"])]
    assert branches(ids, items) == plain(ids, items)


def test_a_normaliser_that_marks_the_start_of_text_marks_it_once(make_tokenizer):
    """As sentencepiece vocabularies do: a blank in front of the text, and none after a special token."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = TextIds(tokenizer, PROBE)
    items = [("a <|im_start|> b", ["a <|im_start|> b c", "a <|im_start|> b<|im_end|>"]), ("<s>x", ["<s>xy"])]
    assert "<|im_start|>" in ids._special
    assert branches(ids, items) == plain(ids, items)


class Slow:
    """A tokenizer without a fast half: one id a character."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, str):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}
        return {"input_ids": [self(x, add_special_tokens)["input_ids"] for x in text]}


def test_a_tokenizer_without_a_fast_half_reads_whole_texts():
    ids = TextIds(Slow(), "<a>")
    assert ids.branching([("ab", ["abc", "abd"]), ("x", [])]) == [
        ([1, 97, 98], [[1, 97, 98, 99], [1, 97, 98, 100]]),
        ([1, 120], []),
    ]
    assert ids.of([]) == [] == ids.branching([])


def test_what_a_conversation_lacks_of_its_prompt():
    """White space at the end is not missed; a tag is."""
    assert [lacks(whole, "<A><think>\n") for whole in ("<A><think>\nhm", "<A><think>hm", "<A>two")] == [
        False,
        False,
        True,
    ]
