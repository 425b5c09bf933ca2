"""Both rules over every layout: what a row says is used or refused by name, and every answer is learnt whole.

Columns of known meaning, other columns, nulls and texts that spell special tokens are added at random.
"""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows.test_formats import FORMS

from dsalign import algos
from dsalign.data.rows.fields import LEARNT, MEDIA, Fields
from dsalign.data.rows.formats import ALGORITHMS, FORMATS, KINDS, convert
from dsalign.data.rows.messages import REASONING
from dsalign.data.rows.records import RowError
from dsalign.data.tokens.encoder import tokenize_rows
from dsalign.data.tokens.load_template import load_template

SPELLS = st.text("ab<", max_size=3).map(lambda x: f"w{x}<|im_end|>{x}w</s>")
CALL = {"id": "a1", "type": "function", "function": {"name": "lookup", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
MORE = st.fixed_dictionaries(
    {},
    optional={
        "system": st.none() | SPELLS,
        "history": st.none() | st.lists(st.lists(SPELLS, min_size=2, max_size=2), max_size=2),
        "input": st.none() | SPELLS,
        "tools": st.sampled_from([[], TOOLS, None]),
        **{name: st.sampled_from([[], ["cat.png"], None]) for name in MEDIA},
        "label": st.none() | st.booleans(),
        "margin": st.sampled_from([0.5, None]),
        **{name: st.sampled_from([0, 1, None]) for name in LEARNT},
        **{name: st.sampled_from(["", "because", None]) for name in REASONING},
        "tool_calls": st.sampled_from([[], [CALL], None]),
        "tool_call_id": st.sampled_from(["", "a1", None]),
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
            used = {"label": row.label, "margin": row.margin, **dict.fromkeys(LEARNT, 1)}.get(name)
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


KEYS = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.sampled_from([0, 1, None]) for name in LEARNT},
        "images": st.sampled_from([[], ["cat.png"], None]),
        "reasoning_content": st.sampled_from(["", "because", None]),
        "tool_call_id": st.sampled_from(["", "a1", None]),
        "tools": st.sampled_from([[], TOOLS, None]),
        "name": st.sampled_from(["", "Ann", None]),
        "score": st.integers(1, 3),
    },
)


def conversations(row):
    """(name, messages) of each conversation in a row, a single message as a list of one."""
    for name, value in row.items():
        inner = value.get("messages", value) if isinstance(value, dict) else value
        found = [inner] if isinstance(inner, dict) else inner
        if isinstance(found, list) and all(isinstance(one, dict) and one.keys() & {"role", "from"} for one in found):
            yield "messages" if inner is not value else name, found


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([form for form in FORMS if any(conversations(form[1]))]), KEYS, st.data())
def test_a_key_of_a_message_is_used_or_refused_or_named(form, keys, data):
    """Of the first or the last message of a conversation. Used: weight 0 is in `unlearnt`, a thought goes with its
    answer. Media, calls' ids and functions in a message of text are always refused."""
    kind, given_row = form[:2]
    row = json.loads(json.dumps(given_row))
    name, messages = data.draw(st.sampled_from(list(conversations(row))))
    chosen = data.draw(st.sampled_from([messages[0], messages[-1]]))
    chosen.update(keys)
    speaks = chosen.get("role", chosen.get("from")) in ("assistant", "gpt", "model")
    try:
        found = convert(Fields("f:1", row, text_only=False), kind, None)
    except RowError as error:
        assert any(key in str(error) for key in (*keys, "weight")), str(error)
        return
    filled = {key: value for key, value in keys.items() if value not in (None, "", [])}
    assert filled.keys().isdisjoint({"images", "tool_call_id", "tools"})
    assert {f"{name}[].{key}" for key in filled.keys() & {"name", "score"}} <= set(found.unread)
    every = [*found.prompt, *(one for one in found.completions if not isinstance(one, str))]
    is_kept = not (kind == "prompts" and speaks and chosen is messages[-1])
    if "reasoning_content" in filled:
        assert speaks and (not is_kept or any(turn.get("reasoning_content") == "because" for turn in every))
    unlearnt = any(keys.get(key) == 0 for key in LEARNT)
    assert bool(found.unlearnt) == (unlearnt and speaks and kind != "prompts")


ODD = [None, 0, 2.5, 10**400, "", "{", '{"name": 3}', [], {}, [None], [[]], {"role": "user"}, {"from": 3}, "a\0",
       "\ud800", [{"type": "text"}], {"name": "f", "arguments": 3}, [{"role": ["user"], "content": "x"}]]  # fmt: skip


def places(value):
    """(list or object, key) of everything within a value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(KINDS), st.data())
def test_whatever_stands_in_a_row_is_read_or_refused(form, kind, data):
    row = json.loads(json.dumps(form[1]))
    for _ in range(data.draw(st.integers(1, 2))):
        holder, key = data.draw(st.sampled_from(list(places(row))))
        holder[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    try:
        found = convert(Fields("f:1", row, text_only=False), data.draw(st.sampled_from([form[0], kind])), None)
    except RowError as error:
        assert str(error).startswith("f:1: ") and len(str(error)) < 1500
    else:
        assert all(isinstance(turn["content"], str) for turn in found.prompt)


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
