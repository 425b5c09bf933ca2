"""Columns under new names, and how much of a bad value a message repeats."""

from __future__ import annotations

import pytest

from dsalign.data.rows.records import RowError, rename, shorten


def test_rename_may_swap_but_not_collide():
    assert rename("f:1", {"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    with pytest.raises(RowError, match=r"f:1: two columns are called 'b' after renaming.*rename the other 'b' too"):
        rename("f:1", {"a": 1, "b": 2}, {"a": "b"})


def test_a_message_repeats_at_most_200_characters():
    assert shorten("x") == "'x'"
    assert len(shorten("x" * 1000)) == 200
