"""Reward functions of a user's file: what is found and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsalign.rewards.functions import call, load_function


@pytest.mark.parametrize("name", ["missing.py:f", "no_colon.py", "", ":f", "notes.txt:f", "folder:f"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError) as caught:
        load_function(name)
    assert str(caught.value) == (f"reward_funcs: expected path/to/file.py:function of a file that exists, got {name!r}")


@pytest.mark.parametrize("function", ["absent", "number", ""])
def test_a_function_that_is_not_there(function: str, file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_function(f"{file}:{function}")
    assert str(caught.value) == f"reward_funcs: {file} has no function {function!r}"


def test_a_long_completion_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=f"got inf for '{'x' * 200}'$"):
        call("f", lambda prompts, completions: [float("inf")], ["p"], ["x" * 500], {})


def test_an_error_of_the_function_is_its_own() -> None:
    """Not dressed up as a wrong return value."""

    def fails(prompts: Any, completions: Any) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        call("f", fails, ["p"], ["c"], {})
