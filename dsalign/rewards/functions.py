"""Reward functions named on the command line: of a user's python file, or those that come with dsalign."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsalign.assets.rewards import FUNCTIONS

RewardFunction = Callable[..., Sequence[float]]


def load_function(name: str) -> RewardFunction:
    """The function that `path/to/file.py:function` or `demo:NAME` names. Running a file is the user's own decision: it
    comes from an option, never from a downloaded model.

    Raises ValueError where the file or the function is missing.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward_funcs: expected path/to/file.py:function of a file that exists, got {name!r}")
    spec = importlib.util.spec_from_file_location(f"dsalign_reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"reward_funcs: {path} has no function {function!r}")
    reward: RewardFunction = found
    return reward


def call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: dict[str, list[Any]],
) -> list[float]:
    """function(prompts=, completions=, **columns) as floats; a column of either name is not passed.

    Raises ValueError where it does not give one finite number a completion.
    """
    given = function(**{**columns, "prompts": list(prompts), "completions": list(completions)})
    try:
        found = [float(x) for x in given]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a list of numbers, got {str(given)[:200]!r}") from error
    if len(found) != len(completions):
        raise ValueError(f"{name}: expected one reward for each of {len(completions)} completions, got {len(found)}")
    for completion, reward in zip(completions, found, strict=True):
        if not math.isfinite(reward):
            raise ValueError(f"{name}: expected a finite reward, got {reward} for {completion[:200]!r}")
    return found
