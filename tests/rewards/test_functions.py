"""Reward functions of a user's file: what is found and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dsalign.rewards.functions import call, check_columns, load_function, required


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
    assert str(caught.value) == f"reward_funcs: {file} has no function {function!r}; check the name behind the colon"


NO_JUDGES = {
    "def f(): return 1": r"expected parameters that are passed by name, such as .*, got \(\); name what it judges",
    "def f(*given): return [1.0]": r"expected parameters that are passed by name, such as .*, got \(\*given\); name",
    "class f:\n def __call__(self, completions): return [1.0]": "expected a function, got a class; name one, or an",
}


@pytest.mark.parametrize("text", NO_JUDGES)
def test_what_would_see_no_completion_is_refused(text: str, tmp_path: Path) -> None:
    """It would be called with nothing, after the first rollout, and might give numbers all the same."""
    (tmp_path / "judge.py").write_text(text)
    with pytest.raises(ValueError, match=NO_JUDGES[text]):
        load_function(f"{tmp_path / 'judge.py'}:f")


def test_modules_beside_the_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python runs the file itself; modules of the same name elsewhere go first."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_the_judge.py").write_text("def length(completions): return [len(c) for c in completions]")
    (tmp_path / "judge.py").write_text("from beside_the_judge import length as f\nimport json\nassert json.dumps")
    (tmp_path / "json.py").write_text("")
    assert call("f", load_function(f"{tmp_path / 'judge.py'}:f"), ["p"], ["abc"], {}) == [3.0]


def test_a_long_completion_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=f"got inf for '{'x' * 200}'$"):
        call("f", lambda prompts, completions: [float("inf")], ["p"], ["x" * 500], {})


def offered(function: Any, **columns: list[Any]) -> list[float]:
    return call("f", function, ["p", "p"], ["a", "bcd"], columns)


def test_a_function_is_passed_what_it_names() -> None:
    """Of prompts, completions and the columns; all where it has **; one that no row here has is None, unless it has a
    default."""
    assert offered(lambda completions: [len(c) for c in completions], answer=["x", "y"]) == [1.0, 3.0]
    assert offered(lambda prompts, completions: [len(prompts), 1], answer=["x", "y"]) == [2.0, 1.0]
    assert offered(lambda completions, answer: [a == "y" for a in answer], answer=["x", "y"]) == [0.0, 1.0]
    assert offered(lambda completions, **rest: [len(rest), 0], answer=["x", "y"]) == [2.0, 0.0]
    assert offered(lambda completions, level, k=3: [level == [None, None], k]) == [1.0, 3.0]
    assert offered(lambda *, completions: [0] * len(completions)) == [0.0, 0.0]


def test_a_column_that_no_row_has_is_refused_before_the_first_rollout() -> None:
    def score(completions: Any, answr: Any, level: Any = None) -> Any: ...

    check_columns("r.py:score", score, [{"answer": 1}, {"answr": 2}])
    with pytest.raises(ValueError) as caught:
        check_columns("r.py:score", score, [{"answer": 1}, {"id": 2}])
    assert str(caught.value) == (
        "reward_funcs: r.py:score: takes (completions: 'Any', answr: 'Any', level: 'Any' = None), and is called with "
        "prompts, completions, answer, id: no row has answr; rename the parameter, give it a default, or rename a "
        "column with --columns theirs=ours"
    )
    assert required(score) == {"answr"}
    check_columns("f", lambda *args, **columns: None, [])


@pytest.mark.parametrize("given", ["0.5", b"12", {0: 1.0, 1: 2.0}, {0.5, 1.5}, None, 3, [[1], [2]], [None, 1]])
def test_what_is_no_list_of_numbers(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^f: expected a list of numbers, got "):
        offered(lambda completions: given)


def test_a_reward_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^f: expected a finite reward, got 1e\+300 for 'bcd'$"):
        offered(lambda completions: [1.0, 1e300])


def raised(how: Any) -> Any:
    raise how


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            lambda: raised(TypeError("mine")),
            r"it raised TypeError: mine at .*test_functions\.py:\d+; correct",
        ),
        (lambda: raised(KeyError("answer")), r"it raised KeyError: 'answer' at "),
        (lambda: sys.exit(0), r"it tried to end the process SystemExit: 0 at "),
        (lambda: os._exit(0), r"it tried to end the process os\._exit\(0\) at "),
        (lambda: raised(MemoryError()), r"it raised MemoryError:  at "),
    ],
)
def test_a_function_that_raises_or_ends_the_process_is_named(body: Any, said: str) -> None:
    """A generator's own code runs while its values are taken."""
    end = os._exit
    with pytest.raises(ValueError, match=r"^f: called with 2 completions, " + said):
        offered(lambda completions: body())
    with pytest.raises(ValueError, match=r"^f: called with 2 completions, " + said):
        offered(lambda completions: (body() for _ in completions))
    assert os._exit is end


def test_an_interrupt_is_the_users() -> None:
    with pytest.raises(KeyboardInterrupt):
        offered(lambda completions: raised(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_there", r"mine\.py: importing it, it raised ModuleNotFoundError: .* at .*mine\.py:1; correct"),
        (
            "import sys\nsys.exit()",
            r"mine\.py: importing it, it tried to end the process SystemExit:  at .*mine\.py:2",
        ),
        ("def f(:", r"mine\.py: importing it, it raised SyntaxError: .* at .*mine\.py:1; correct the file"),
        ("async def f(completions): ...", r"mine\.py:f: expected a function, got an async one; write `def` in place"),
        (
            "def f(completions, /): ...",
            r"mine\.py:f: expected parameters that can be passed by name, got completions",
        ),
    ],
)
def test_a_file_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=rf"^reward_funcs: .*{said}"):
        load_function(f"{tmp_path}/mine.py:f")
