"""Reward functions named on the command line: of a user's python file, or those that come with dsalign.

Imports no torch: the command loads the files, and says what is wrong with them, before it is imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dsalign.assets.rewards import FUNCTIONS

RewardFunction = Callable[..., Sequence[float]]
ALWAYS = ("prompts", "completions")
NAMED = 5  # rows that a message names
LARGEST = 3.4028234663852886e38  # of float32, in which rewards are added up
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_function(name: str) -> RewardFunction:
    """The function that `path/to/file.py:function` or `demo:NAME` names. Running a file is the user's own decision: it
    comes from an option, never from a downloaded model.

    Raises ValueError where the file or the function is missing, the file cannot be imported, or the function is one
    that cannot be called with lists.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    written, _, function = name.rpartition(":")
    path = str(Path(written).expanduser())
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward_funcs: expected path/to/file.py:function of a file that exists, got {name!r}")
    spec = importlib.util.spec_from_file_location(f"dsalign_reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    beside = str(Path(path).parent.absolute())
    if beside not in sys.path:
        sys.path.append(beside)  # for modules beside the file, behind all others
    with _guarded(f"reward_funcs: {written}", "importing it"):
        spec.loader.exec_module(module)
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"reward_funcs: {written} has no function {function!r}; check the name behind the colon")
    if inspect.isclass(found):
        raise ValueError(f"reward_funcs: {name}: expected a function, got a class; name one, or an object of the class")
    if any(map(inspect.iscoroutinefunction, (found, type(found).__call__))):
        raise ValueError(f"reward_funcs: {name}: expected a function, got an async one; write `def` in place of it")
    if alone := [one.name for one in _parameters(found) if one.kind is inspect.Parameter.POSITIONAL_ONLY]:
        raise ValueError(
            f"reward_funcs: {name}: expected parameters that can be passed by name, got {', '.join(alone)} in front of "
            "a /; remove the /"
        )
    if not any(one.kind in (*_NAMED, inspect.Parameter.VAR_KEYWORD) for one in _parameters(found)):
        raise ValueError(
            f"reward_funcs: {name}: expected parameters that are passed by name, such as (completions, **columns), got "
            f"({', '.join(map(str, _parameters(found)))}); name what it judges"
        )
    reward: RewardFunction = found
    return reward


def _parameters(function: RewardFunction) -> Sequence[inspect.Parameter]:
    """The parameters of a function; those of (**columns) where it has no signature that Python can read."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def required(function: RewardFunction) -> frozenset[str]:
    """The columns without which a function cannot be called: its parameters without a default, but for prompts and
    completions."""
    named = (one for one in _parameters(function) if one.kind in _NAMED and one.default is inspect.Parameter.empty)
    return frozenset(one.name for one in named) - set(ALWAYS)


def check_columns(name: str, function: RewardFunction, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError where a function asks for a column that none of the rows has. rows: the further columns of
    each."""
    missing, seen = set(required(function)), set[str]()
    for columns in rows if missing else ():
        seen.update(columns)
        missing -= seen
        if not missing:
            return
    if missing:
        takes = ", ".join(str(one) for one in _parameters(function))
        raise ValueError(
            f"reward_funcs: {name}: takes ({takes}), and is called with {', '.join([*ALWAYS, *sorted(seen)])}: no row "
            f"has {', '.join(sorted(missing))}; rename the parameter, give it a default, or rename a column with "
            "--columns theirs=ours"
        )


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: dict[str, list[Any]],
    rows: Sequence[str] = (),
) -> list[float]:
    """function(prompts=, completions=, **columns) as floats, of these the parameters that the function names; all where
    it has **. A column of either name is not passed; one that the function needs and no row here has is a list of None.
    rows: the row of each completion, for messages.

    Raises ValueError where it does not give one finite number a completion, raises, or ends the process.
    """
    offered = {**columns, "prompts": list(prompts), "completions": list(completions)}
    parameters = _parameters(function)
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        missing = {one: [None] * len(completions) for one in required(function) - offered.keys()}
        names = {one.name for one in parameters if one.kind in _NAMED}
        offered = {key: value for key, value in offered.items() if key in names} | missing
    of = f" of {named_rows(rows)}" if rows else ""
    with _guarded(name, f"called with {len(completions)} completions{of}"):
        given = function(**offered)
        found = _numbers(name, given, of)
    if len(found) != len(completions):
        count = len(completions)
        raise ValueError(f"{name}: expected one reward for each of {count} completions{of}, got {len(found)}")
    for i, (completion, reward) in enumerate(zip(completions, found, strict=True)):
        if not math.isfinite(reward) or abs(reward) > LARGEST:
            row = f" of {rows[i]}" if rows else ""
            raise ValueError(f"{name}: expected a finite reward, got {reward} for {completion[:200]!r}{row}")
    return found


def named_rows(rows: Iterable[str]) -> str:
    """The first few of the rows by file and line, each once, and how many more there are."""
    once = list(dict.fromkeys(rows))
    return ", ".join([*once[:NAMED], *([f"and {len(once) - NAMED} more"] if len(once) > NAMED else [])])


class _NoNumbersError(ValueError):
    """The error of a function that gives something else than numbers: ours, not one that it raised."""


def _numbers(name: str, given: Any, of: str) -> list[float]:
    wrong = _NoNumbersError(
        f"{name}: expected a list of numbers, got {str(given)[:200]!r}{of and ' for completions'}{of}"
    )
    if isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable):
        raise wrong
    values = list(given)  # a generator runs the function's own code here
    try:
        return [float(x) for x in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error


class _ExitError(BaseException):
    """The signal that code of a user asked to end the process at once."""


@contextmanager
def _guarded(name: str, doing: str) -> Iterator[None]:
    """Run code of a user: whatever it raises becomes a ValueError that names it, and so does an attempt to end the
    process, which would leave the other ranks waiting, or end the run as if it were done.

    KeyboardInterrupt passes, as that is the user himself.
    """

    def refuse(code: int = 0) -> NoReturn:
        raise _ExitError(f"os._exit({code})")

    real, os._exit = os._exit, refuse  # type: ignore[assignment]
    try:
        yield
    except _NoNumbersError:
        raise
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        ended = isinstance(error, (SystemExit, _ExitError))
        what = str(error) if isinstance(error, _ExitError) else f"{type(error).__name__}: {error}"
        verb = "it tried to end the process" if ended else "it raised"
        raise ValueError(f"{name}: {doing}, {verb} {what[:400]}{_place(error)}; correct the file") from error
    finally:
        os._exit = real


def _place(error: BaseException) -> str:
    """Where in the user's file an error comes from: the last line of its traceback that is in no library."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at {error.filename}:{error.lineno}"
    own = Path(__file__).parent
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not Path(one.filename).is_relative_to(own)]
    users = [one for one in frames if "site-packages" not in one.filename and not one.filename.startswith("<frozen")]
    return f" at {users[-1].filename}:{users[-1].lineno}" if users else ""
