"""Columns under new names, and how much of a bad value a message repeats."""

from __future__ import annotations

import pytest

from dsalign.data.rows.records import RowError, printable, rename, shorten


def test_rename_may_swap_but_not_collide():
    assert rename("f:1", {"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    with pytest.raises(RowError, match=r"f:1: two columns are called 'b' after renaming.*rename the other 'b' too"):
        rename("f:1", {"a": 1, "b": 2}, {"a": "b"})


def test_a_message_repeats_at_most_200_characters():
    assert shorten("x") == "'x'"
    assert len(shorten("x" * 1000)) == 200


def test_control_characters_are_shown_as_escapes():
    """ESC, BEL, a C1 character and the mark that turns the direction of writing; tab and line end stay."""
    assert printable("a\x1b]0;x\x07\x9b\u202eb\tc\n\u00e9") == "a\\x1b]0;x\\x07\\x9b\\u202eb\tc\n\u00e9"
    assert shorten("\x1b") == "'\\x1b'"
