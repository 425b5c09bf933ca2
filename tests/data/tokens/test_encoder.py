"""?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_tokenizer

from dsalign.contract.groups import Group
from dsalign.data.rows.records import Row
from dsalign.data.tokens.encoder import CHUNK, Tokenized, tokenize_rows
from dsalign.data.tokens.load_template import load_template
from dsalign.data.tokens.templates import Template

EOS = 2


def row(prompt, *completions, where="a.jsonl:1", **known):
    return Row(where, ({"role": "user", "content": prompt},), completions, **known)


@pytest.fixture
def template(make_tokenizer):
    """One id a byte, no template text: "abc" is 3 ids, and a completion "xy" is x, y, EOS."""
    return load_template(make_tokenizer(), "plain", [])[0]


def texts(template, tokenized):
    """(prompt, completions) as text, "." for the end token."""
    decode = template.tokenizer.decode
    return [(decode(g.prompt), tuple(decode(c).replace("</s>", ".") for c in g.completions)) for g in tokenized.groups]


def test_groups_carry_what_the_rows_know(template):
    rows = [
        row("ab", "x", "yz", where="f:1", margin=0.5, columns={"id": 1}),
        row("c", "", where="f:2", label=False),
        row("d", where="f:3"),
    ]
    tokenized = tokenize_rows(rows, template, max_length=5, truncation="raise")
    a, b, c, d, x, y, z = (template.tokenizer(t)["input_ids"][0] for t in "abcdxyz")
    assert tokenized == Tokenized(
        (
            Group(0, "f:1", (a, b), ((x, EOS), (y, z, EOS)), "ab", margin=0.5, columns={"id": 1}),
            Group(1, "f:2", (c,), ((EOS,),), "c", label=False),
            Group(2, "f:3", (d,), (), "d", turns=({"role": "user", "content": "d"},)),
        ),
        3,
        {},
        0,
        noticed={"blank": 1},
    )


def test_lengths_count_the_tokens_that_count():
    """Three and two tokens, all of them; or of a mask the first and the last two of four."""
    group = Group(0, "f:1", (5,), ((6, 7, 2), (8, 2)), "a")
    assert group.lengths == (3, 2)
    assert replace(group, completions=((6, 7, 8, 2),), masks=((True, False, True, True),)).lengths == (3,)


def test_delete_drops_whole_rows_and_numbers_the_rest_without_gaps(template):
    """Lengths with the end token: 2 + 4 = 6 (rejected), 5, 3 + 0 = 3, 6 + 0 = 6; the limit is 5."""
    rows = [row("ab", "x", "xyz", where="f:1"), row("ab", "xy", "x", where="f:2"), row("abc"), row("abcdef")]
    tokenized = tokenize_rows(rows, template, max_length=5, truncation="delete")
    assert [(group.index, group.where) for group in tokenized.groups] == [(0, "f:2"), (1, "a.jsonl:1")]
    assert (dict(tokenized.dropped), tokenized.truncated) == ({"longer than max_length": 2}, 0)


def test_left_cuts_the_prompt_the_same_for_all_completions(template):
    """Limit 5: the longest completion has 3 tokens, so 2 of the prompt stay; "abcdefg" alone keeps its last 5."""
    rows = [row("abcd", "x", "xy"), row("ab", "xy"), row("abcdefg")]
    tokenized = tokenize_rows(rows, template, max_length=5, truncation="left")
    assert texts(template, tokenized) == [("cd", ("x.", "xy.")), ("ab", ("xy.",)), ("cdefg", ())]
    assert (dict(tokenized.dropped), tokenized.truncated) == ({}, 2)
    assert tokenized.groups[0].prompt_text == "abcd"


def test_left_keeps_one_prompt_token_and_cuts_long_completions_without_an_end(template):
    tokenized = tokenize_rows([row("abcd", "vwxyz", "x")], template, max_length=5, truncation="left")
    assert texts(template, tokenized) == [("d", ("vwxy", "x."))]
    assert tokenized.truncated == 1


def test_right_cuts_completions_and_drops_the_row_where_nothing_is_left(template):
    """Limit 5: "abc" leaves 2 tokens each; "abcde" leaves none; a prompt alone fits or is dropped."""
    rows = [row("abc", "xyz", "x"), row("abcde", "x", "y"), row("abcde"), row("abcdef")]
    tokenized = tokenize_rows(rows, template, max_length=5, truncation="right")
    assert texts(template, tokenized) == [("abc", ("xy", "x.")), ("abcde", ())]
    assert (dict(tokenized.dropped), tokenized.truncated) == ({"no completion token left": 2}, 1)


def test_order_is_kept_over_many_calls_of_the_tokenizer(template):
    rows = [row(f"p{i}", f"c{i}", where=f"f:{i}") for i in range(CHUNK + 3)]
    tokenized = tokenize_rows(rows, template, max_length=20, truncation="raise")
    assert texts(template, tokenized) == [(f"p{i}", (f"c{i}.",)) for i in range(CHUNK + 3)]
    assert [group.index for group in tokenized.groups] == list(range(CHUNK + 3))


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text("ab", min_size=1, max_size=6),
    completions=st.lists(st.text("xy", max_size=6), max_size=3),
    max_length=st.integers(2, 8),
    truncation=st.sampled_from(["delete", "left", "right"]),
)
def test_no_group_is_too_long_or_empty(make_tokenizer, prompt, completions, max_length, truncation):
    """Every row is kept within the limit or counted; a completion has its end token exactly where it was not cut."""
    template = load_template(make_tokenizer(), "plain", [])[0]
    rows = [row("a"), row(prompt, *completions)]
    tokenized = tokenize_rows(rows, template, max_length=max_length, truncation=truncation)
    assert len(tokenized.groups) + sum(tokenized.dropped.values()) == 2
    for group in tokenized.groups[1:]:
        assert 1 <= len(group.prompt) <= max_length - max(map(len, group.completions), default=0)
        for text, ids in zip(completions, group.completions, strict=True):
            assert len(ids) >= 1
            assert (ids[-1] == EOS) == (len(ids) == len(text) + 1)


def test_characters_without_a_token_are_counted():
    """In a question and in an answer; a tokenizer whose unknown token ends turns too has none that would show it."""
    rows = [row("a\u4f60", "x"), row("a", "\u597d"), row("a", "x")]
    template = load_template(tiny_tokenizer(), "chatml", [])[0]
    assert tokenize_rows(rows, template, max_length=99, truncation="raise").noticed == {"unknown": 2}
    assert replace(template, end_ids=template.end_ids | {template.tokenizer.unk_token_id}).unknown is None


def test_raise_names_the_row_and_its_length(template):
    rows = [row("a", "x"), row("abc", "xy", where="pairs.jsonl:7")]
    message = r"pairs.jsonl:7: expected at most max_length = 5 tokens, got 6 \(prompt 3\); raise --max_length, or use"
    with pytest.raises(ValueError, match=message):
        tokenize_rows(rows, template, max_length=5, truncation="raise")


def test_all_rows_dropped(template):
    message = r"got none of 2 rows \(2 longer than max_length\); raise --max_length"
    with pytest.raises(ValueError, match=message):
        tokenize_rows([row("abc", "xy")] * 2, template, max_length=5, truncation="delete")
    with pytest.raises(ValueError, match=r"got none of 0 rows \(there was none\)"):
        tokenize_rows([], template, max_length=5, truncation="delete")


def test_bad_arguments(template):
    with pytest.raises(ValueError, match="truncation_strategy: expected one of delete, left, right, raise, got 'cut'"):
        tokenize_rows([row("a")], template, max_length=5, truncation="cut")
    with pytest.raises(ValueError, match=r"max_length: expected at least 2 .*got 1"):
        tokenize_rows([row("a")], template, max_length=1, truncation="left")


def test_a_row_that_the_template_refuses_is_named(template):
    with pytest.raises(ValueError, match=r"f:9: template 'plain': expected at least one prompt token"):
        tokenize_rows([row("a", "x"), row("", "x", where="f:9")], template, max_length=5, truncation="left")


def test_a_failure_that_no_row_shows_alone_is_not_hidden(template, monkeypatch):
    encode_many = Template.encode_many

    def fails_on_two(self, items, tools):
        if len(items) > 1:
            raise ValueError("only together")
        return encode_many(self, items)

    monkeypatch.setattr(Template, "encode_many", fails_on_two)
    with pytest.raises(ValueError, match="only together"):
        tokenize_rows([row("a", "x"), row("b", "x")], template, max_length=5, truncation="left")


def test_all_turns_of_a_demonstration(template):
    """q, then a and c counted, the question p between them not; cut to five tokens c and the end go, to three a too."""
    talk = ({"role": "user", "content": "qq"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "pp"})
    rows = [Row("f:1", talk, ("c",))]
    settings = {"truncation": "right", "assistant_turns": "all"}
    (group,) = tokenize_rows(rows, template, max_length=9, **settings).groups
    assert (group.masks, group.lengths) == (((True, False, False, True, True),), (3,))
    cut = tokenize_rows(rows, template, max_length=5, **settings)
    assert cut.truncated == 1 and cut.groups[0].masks == ((True, False, False),)
    (single,) = tokenize_rows([row("ab", "x")], template, max_length=9, **settings).groups
    assert single.masks is None, "all of them count"
    answer_last = ({"role": "user", "content": "q"}, {"role": "assistant", "content": ""}, talk[2])
    with pytest.raises(ValueError, match=r"got none of 1 rows \(1 no completion token left\)"):
        tokenize_rows([Row("f:1", answer_last, ("c",))], template, max_length=3, **settings)
