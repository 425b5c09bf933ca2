"""Both rules over every layout: what a row says is used or refused by name, and every answer is learnt whole.

Columns of known meaning, other columns, nulls and texts that spell special tokens are added at random.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows.test_formats import FORMS

from dsalign import algos
from dsalign.data.rows.fields import Fields
from dsalign.data.rows.formats import ALGORITHMS, FORMATS, KINDS, convert
from dsalign.data.rows.records import RowError
from dsalign.data.tokens.encoder import tokenize_rows
from dsalign.data.tokens.templates import load_template

SPELLS = st.text("ab<", max_size=3).map(lambda x: f"w{x}<|im_end|>{x}w</s>")
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
MORE = st.fixed_dictionaries(
    {},
    optional={
        "system": SPELLS,
        "history": st.lists(st.lists(SPELLS, min_size=2, max_size=2), max_size=2),
        "input": SPELLS,
        "tools": st.sampled_from([[], TOOLS]),
        "images": st.sampled_from([[], ["cat.png"], None]),
        "label": st.booleans(),
        "margin": st.sampled_from([0.5, None]),
        "weight": st.sampled_from([0, 1]),
        "reasoning": st.sampled_from(["", "because"]),
        "score": st.integers(0, 3),
        "null": st.none(),
    },
)


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), MORE)
def test_a_column_is_used_or_refused_or_named(make_tokenizer, form, more):
    """Used: its texts are in what the model gets, or it is a field of the row. Refused: the error names it. Named: it
    is in `unread`. For prompts, what reward functions get counts as used."""
    kind, given_row, _, _ = form
    added = {name: value for name, value in more.items() if name not in given_row}
    try:
        row = convert(Fields("f:1", {**given_row, **added}, text_only=False), kind, None)
    except RowError as error:
        assert any(f"{name}'" in str(error) for name in added), str(error)
        return
    template, _ = load_template(make_tokenizer(), "chatml", [])
    (group,) = tokenize_rows([row], template, max_length=10_000, truncation="raise").groups
    prompt = template.tokenizer.decode(group.prompt)
    for name, value in added.items():
        if value in (None, "", []):
            continue
        if name in ("system", "history", "input", "tools"):
            assert all(text in prompt for text in texts(value) if text != "function"), name
        elif kind == "prompts":
            assert row.columns[name] == value
        else:
            used = {"label": row.label, "margin": row.margin, "weight": 1, "score": None}[name]
            assert used == value or name in row.unread, name
    for answer, ids in zip(row.completions, group.completions, strict=True):
        assert template.tokenizer.decode(ids) == f"{answer}<|im_end|>"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([form for form in FORMS if form[3]]), SPELLS)
def test_answers_that_spell_special_tokens_are_learnt_whole(make_tokenizer, form, text):
    kind, given_row, _, answers = form
    spelt = json.loads(json.dumps(given_row).replace(f'"{answers[0]}"', json.dumps(text)))
    row = convert(Fields("f:1", spelt, text_only=False), kind, None)
    template, _ = load_template(make_tokenizer(), "chatml", [])
    (group,) = tokenize_rows([row], template, max_length=10_000, truncation="raise").groups
    for answer, ids in zip(row.completions, group.completions, strict=True):
        assert template.tokenizer.decode(ids) == f"{answer}<|im_end|>"
        assert template.end_ids.isdisjoint(ids[:-1])


def test_rows_of_another_kind_name_their_algorithm():
    for kind in KINDS:
        for name in algos.names():
            if algos.load(name)().traits.data == kind:
                assert name in ALGORITHMS[kind].replace(",", "").split()
    pair, label = {"prompt": "q", "chosen": "c", "rejected": "r"}, {"prompt": "q", "completion": "c", "label": True}
    for row, kind, algorithm in ((pair, "labels", "dpo"), (label, "pairs", "kto"), (pair, "demonstrations", "dpo")):
        with pytest.raises(RowError, match=f"these are rows for --algo {algorithm}"):
            convert(Fields("f:1", row, text_only=False), kind, None)


def test_a_proposed_renaming_works():
    """Every name that --columns is told to change leads to a layout; near names alone do not count."""
    for row, kind in (
        ({"question": "q", "chosen": "c", "rejected": "r"}, "pairs"),
        ({"prompt": "q", "choosen": "c", "rejected": "r"}, "pairs"),
        ({"Prompt": "q", "completion": "c", "kto_tag": True}, "labels"),
        ({"prompt": "q", "complexity": 3}, "demonstrations"),
        ({"prompt": "q", "response_1": "c", "response_2": "r"}, "pairs"),
    ):
        with pytest.raises(RowError) as caught:
            convert(Fields("f:1", row, text_only=False), kind, None)
        advice = str(caught.value).partition("--columns ")[2]
        if "theirs" in advice or not advice:
            continue
        renaming = dict(pair.split("=") for pair in advice.split())
        renamed = {renaming.get(name, name) for name in row}
        assert len(renamed) == len(row) and any(renamed >= set(needs.split(", ")) for needs in FORMATS[kind]), advice
