"""Ids by words are those of the whole text, for every pattern that is said to allow it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dsalign.data.tokens import words
from dsalign.data.tokens.words import PATTERNS, Words, reads_words, words_of

BYTES = pre_tokenizers.ByteLevel
CUTTERS = {
    "gpt2": BYTES(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES(add_prefix_space=False)]),
    **{
        f"pattern {i}": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]
        )
        for i, pattern in enumerate(sorted(PATTERNS))
    },
}
CORPUS = [
    "the cat's tail isn't there, they'll say: don't 'tis 12345 times 007",
    "  two  blanks and   three\n\n new\tlines \r\n x",
    "a a a a b b ab ab aba the the 1 2 12 123 . , .. !! 's 't x's é ñ 日本 語",
]
PIECES = [*"ab1 20.,'!\n\t\r", "  ", "the", " the", "'s", "'ll", " 'S", "é", "\u0301", "日本", "\u00a0", "\u3000", "🙂"]
PIECES += ["\u200b", "\x1f", "\x85", "\u2028", "\u180e", "\0", "_", "A\u030a", "ß", "²", "Ⅷ"]
PIECES += ["<|x|>", "<|x", "|>", "x" * 65]
TEXT = st.lists(st.sampled_from(PIECES), max_size=24).map("".join) | st.text(max_size=24)


def trained(cutter, normalizer=None, **model) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges of CORPUS."""
    inner = Tokenizer(models.BPE(**model))
    inner.pre_tokenizer = cutter
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = BYTES.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    return tokenizer


def library(tokenizer: PreTrainedTokenizerFast):
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    return lambda texts: [found.ids for found in encode(list(texts), add_special_tokens=False)]


@pytest.fixture(scope="module", params=[(name, nfc) for name in CUTTERS for nfc in (False, True)], ids=str)
def tokenizer(request) -> PreTrainedTokenizerFast:
    name, nfc = request.param
    return trained(CUTTERS[name], normalizers.NFC() if nfc else None)


@given(texts=st.lists(TEXT, max_size=4))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_the_whole_text(tokenizer, texts):
    """Letters, digits, marks, several kinds of white space and of added tokens, in any order; asked twice."""
    assert reads_words(tokenizer)
    by_words, whole = Words(library(tokenizer)), library(tokenizer)
    assert by_words(texts) == whole(texts) == by_words(texts)


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_words_are_the_text_cut_before_blanks(text):
    """Before a blank behind what is no white space, nowhere else; the quick way and the other one alike."""
    found = [word for word in words_of(text) if word]
    assert "".join(found) == text and found == [word for word in words.CUT.split(text) if word]
    for before, after in pairwise(found):
        assert after[0] == " " and not before[-1].isspace()
    assert not any(words.CUT.search(word) for word in found)


def test_merges_are_there_in_the_tests_above():
    """Words of several letters are one token, and whole texts are fewer tokens than bytes."""
    tokenizer = trained(CUTTERS["gpt2"])
    assert len(library(tokenizer)([" the"])[0]) == 1
    assert len(library(tokenizer)(CORPUS)[0]) < len(CORPUS[0].encode()) / 2


def test_every_word_is_read_once_and_few_are_remembered(monkeypatch):
    """Long words never; all are forgotten once there are too many."""
    monkeypatch.setattr(words, "MOST", 4)
    read: list[str] = []
    by_words = Words(lambda texts: read.extend(texts) or [[len(x)] for x in texts])
    long = " " + "x" * 70
    assert by_words(["a b b", "b a" + long]) == [[1, 2, 2], [1, 2, 71]]
    assert sorted(read) == sorted(["a", " b", "b", " a", long])
    assert by_words(["a b" + long, ""]) == [[1, 2, 71], [0]] and read[5:] in ([long, ""], ["", long])
    assert by_words(["c d"]) == [[1, 2]] and sorted(read[7:]) == [" d", "c"], "five are known, which is too many"
    assert by_words(["a"]) == [[1]] and read[9:] == ["a"], "so it was forgotten"


@pytest.mark.parametrize(
    "why",
    [
        "no fast half", "unigram", "dropout", "unknown pattern", "a blank in front", "blanks made something else",
        "no pattern", "a token with a blank", "a token that takes blanks", "words of a piece",
    ],
)  # fmt: skip
def test_other_tokenizers_read_whole_texts(why):
    gpt2 = CUTTERS["gpt2"]
    found = {
        "no fast half": lambda: object(),
        "unigram": lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0))),
        "dropout": lambda: trained(gpt2, dropout=0.1),
        "unknown pattern": lambda: trained(
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), gpt2])
        ),
        "a blank in front": lambda: trained(BYTES(add_prefix_space=True)),
        "blanks made something else": lambda: trained(gpt2, normalizers.Replace(" ", "_")),
        "no pattern": lambda: trained(BYTES(add_prefix_space=False, use_regex=False)),
        "words of a piece": lambda: trained(pre_tokenizers.Metaspace()),
        "a token with a blank": lambda: trained(gpt2),
        "a token that takes blanks": lambda: trained(gpt2),
    }[why]()
    if why == "a token with a blank":
        found.add_tokens(["a b"])
    if why == "a token that takes blanks":
        found.add_tokens([AddedToken("<t>", rstrip=True)])
    assert not reads_words(found)
