"""Messages: every key of known meaning is used, or the row is refused naming it; other keys are named."""

from __future__ import annotations

import pytest
from row_files import answer, turns

from dsalign.data.rows.records import RowError

CALLS = [{"id": "abc123xyz", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
CALLED = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "sunny", "tool_call_id": "abc123xyz"},
    {"role": "assistant", "content": "It is sunny."},
]


def test_ids_of_calls_are_kept(one):
    row = one({"messages": CALLED}, "demonstrations")
    assert [dict(turn) for turn in row.prompt] == CALLED[:3] and row.unread == ()


def test_a_turn_of_weight_0_is_not_learnt(one):
    """Turn 1 of system, user, assistant, user, assistant says so; it is turn 2 once the system prompt is in front."""
    given = turns("q", "a", "p", "c")
    for key, no, yes in (("weight", 0, 1), ("loss", False, True), ("train", 0.0, True)):
        said = [given[0], {**given[1], key: no}, {**given[2], key: no}, {**given[3], key: yes}]
        row = one({"messages": said, "system": "s"}, "demonstrations")
        assert (row.prompt, row.completions) == (tuple(turns("q", "a", "p", system="s")), ("c",))
        assert (row.unlearnt, row.unread) == ((2,), ())


def test_one_style_of_role_with_the_other_of_text(one):
    """And a key that is neither is named, with the key that the text belongs under."""
    given = [{"role": "user", "value": "q"}, {"from": "gpt", "content": "c", "weight": 1}]
    row = one({"messages": given}, "demonstrations")
    assert (row.prompt, row.completions, row.unread) == (tuple(turns("q")), ("c",), ())
    both = [{"role": "user", "content": "q", "value": "z"}, {"role": "assistant", "content": "c"}]
    assert one({"messages": both}, "demonstrations").unread == ("messages[].value",)
    with pytest.raises(
        RowError, match=r"'messages\[0\]\.content': expected text, .* are role, text: write its text under c"
    ):
        one({"messages": [{"role": "user", "text": "q"}, *turns("", "c")[1:]]}, "demonstrations")


def test_text_parts_roles_and_one_message_without_a_list(one):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    said = [{"role": "developer", "content": "s"}, {"role": "human", "content": parts}, {"role": "gpt", "content": "c"}]
    row = one({"messages": said}, "demonstrations")
    assert (row.prompt, row.completions) == (tuple(turns("one two", system="s")), ("c",))
    assert one({"prompt": "q", "completion": answer("c")[0]}, "demonstrations").completions == ("c",)
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    (call,) = one({"messages": [*turns("q"), old]}, "demonstrations").completions[0]["tool_calls"]
    assert call["function"] == CALLS[0]["function"]


def test_keys_that_nothing_reads_are_named(one):
    said = [{"role": "user", "content": "q", "time": "noon", "refusal": None}, {**answer("c")[0], "id": 7}]
    assert one({"messages": said}, "demonstrations").unread == ("messages[].time", "messages[].id")


REFUSED = {
    "picture": ({"images": ["cat.png"]}, r"messages\[1\].images'.*dsalign trains on text"),
    "picture part": (
        {"content": [{"type": "image_url", "image_url": "x"}]},
        r"\.content\[0\]': expected parts of type",
    ),
    "half a weight": ({"weight": 0.5}, r"messages\[1\].weight'.*got 0.5; write one of them"),
    "two weights": ({"weight": 0, "train": True}, r"one of weight, train.*contradict"),
    "two thoughts": ({"reasoning": "a", "thinking": "b"}, r"\.thinking': expected one reasoning a message"),
    "answers no call": ({"tool_call_id": "x"}, r"\.tool_call_id': expected none in a turn of the assistant"),
    "tools inside": ({"tools": [{"name": "f"}]}, r"move them to a column tools"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_cannot_be_used(one, case):
    more, message = REFUSED[case]
    with pytest.raises(RowError, match=message):
        one({"messages": [*turns("q"), {"role": "assistant", "content": "c", **more}]}, "demonstrations")


def test_keys_of_another_role(one):
    for key, value in (("reasoning", "r"), ("tool_calls", CALLS), ("weight", 1), ("tool_call_id", "x")):
        with pytest.raises(RowError, match=rf"messages\[0\].{key}': expected .* in a turn of the user"):
            one({"messages": [{**turns("q")[0], key: value}, *answer("c")]}, "demonstrations")
    wrong = [*CALLED[:2], {**CALLED[2], "tool_call_id": "other"}, CALLED[3]]
    with pytest.raises(RowError, match=r"messages\[2\].tool_call_id': expected one of abc123xyz, got 'other'"):
        one({"messages": wrong}, "demonstrations")
    with pytest.raises(RowError, match="weight: expected 1 for an answer of pairs, got 0"):
        one({"prompt": "q", "chosen": [{**answer("c")[0], "weight": 0}], "rejected": "r"}, "pairs")
