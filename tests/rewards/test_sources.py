"""Rewards: reward models, functions and their weighted sum, completion by completion."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import RankPool, groups_of

from dsalign.contract.groups import Scores
from dsalign.engines import dist
from dsalign.rewards.functions import load_function
from dsalign.rewards.sources import Rewards

RAGGED = groups_of(((5, 6), (7,)), ((0, 0, 0), (2,)))


def models(scores: list[list[float]] | None = None) -> Any:
    """Engines with or without a reward model that gives these scores to each group."""
    asked: list[Any] = []
    given: list[Any] = []

    def each_group(role: str, some: Any, batch_size: int) -> list[torch.Tensor]:
        given.append(some)
        asked.append((role, [g.index for g in some], batch_size))
        return [torch.tensor((scores or [])[g.index]) for g in some]

    engines = {} if scores is None else {"reward": None}
    return SimpleNamespace(engines=engines, each_group=each_group, asked=asked, given=given)


def decode(ids: Any) -> str:
    return "".join("abcdefgh"[i] for i in ids)


def of(*functions: str, weights: tuple[float, ...] = (), scores: Any = None, reading: Any = None) -> Rewards:
    return Rewards(models(scores), [(name, load_function(name)) for name in functions], weights, decode, reading)


def numbers(found: Scores) -> list[list[float]]:
    assert all(x.dtype == torch.float32 for each in (found.total, *found.sources.values()) for x in each)
    return [x.tolist() for x in found.total]


def test_a_function_gives_a_number_a_completion(file: Path) -> None:
    """Of decoded completions, back in the groups they came from; lists, tuples and tensors alike."""
    assert numbers(of(f"{file}:length")(RAGGED, 4)) == [[2.0, 1.0], [3.0, 1.0]]
    assert numbers(of(f"{file}:tensors")(RAGGED, 4)) == [[0.0, 0.5], [1.0, 1.5]]


def test_a_function_sees_prompts_and_further_columns(file: Path) -> None:
    """A prompt's text and columns once for each of its completions; a column that a row lacks is None there."""
    some = [replace(RAGGED[0], columns={"answer": "42", "prompts": "mine"}), replace(RAGGED[1], columns={"level": 3})]
    rewards = of(f"{file}:length")
    rewards(some, 4)
    ((_, function),) = rewards._functions
    (seen,) = function.__globals__["calls"]
    assert seen.prompts == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert seen.columns == {"answer": ["42", "42", None, None], "level": [None, None, 3, 3]}


def test_a_rank_without_rows_calls_nothing(file: Path) -> None:
    """`short` would be refused for any number but one."""
    assert of(f"{file}:short")([], 4).total == []
    assert of(f"{file}:length", scores=[])([], 4).total == []


BOTH = " of rows.jsonl:1, rows.jsonl:2"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("short", f"expected one reward for each of 4 completions{BOTH}, got 1"),
        ("broken", "expected a finite reward, got nan for 'h' of rows.jsonl:1"),
        ("nothing", f"expected a list of numbers, got 'None' for completions{BOTH}"),
        ("words", f"expected a list of numbers, got \"['good', 'good', 'good', 'good']\" for completions{BOTH}"),
    ],
)
def test_what_a_function_may_not_give(function: str, text: str, file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        of(f"{file}:{function}")(RAGGED, 4)
    assert str(caught.value) == f"{file}:{function}: {text}"


SCORES = [[1.5, -2.0], [0.25, 4.0]]


def test_a_reward_model_scores_completions() -> None:
    rewards = of(scores=SCORES)
    assert numbers(rewards(RAGGED, 7)) == [[1.5, -2.0], [0.25, 4.0]]
    assert numbers(rewards(RAGGED[1:], 1)) == [[0.25, 4.0]]
    assert rewards._roles.asked == [("reward", [0, 1], 7), ("reward", [1], 1)]


def test_sources_are_added_with_their_weights(file: Path) -> None:
    """The model first, then the functions in their order: 2 * model + 0.5 * length - 1; without weights each is 1."""
    names = (f"{file}:length", f"{file}:one")
    weighted = of(*names, weights=(2.0, 0.5, -1.0), scores=SCORES)
    found = weighted(RAGGED, 4)
    assert numbers(found) == [[3.0, -4.5], [1.0, 7.5]]
    assert {name: [x.tolist() for x in each] for name, each in found.sources.items()} == {
        "reward_model": SCORES,
        "length": [[2.0, 1.0], [3.0, 1.0]],
        "one": [[1.0, 1.0], [1.0, 1.0]],
    }, "each source by itself, without its weight"
    assert numbers(of(*names, scores=SCORES)(RAGGED, 4)) == [[4.5, 0.0], [4.25, 6.0]]
    assert numbers(of(*names, weights=(0.0, 3.0))(RAGGED, 4)) == [[3.0, 3.0], [3.0, 3.0]]


def test_a_reward_model_reads_in_its_own_way() -> None:
    """It is asked about its reading, three and two tokens where the policy sampled two and one."""
    read = groups_of(((5, 6, 7), (1, 2)))
    rewards = of(scores=[[1.0, 2.0]], reading=lambda some: read)
    assert numbers(rewards(RAGGED[:1], 4)) == [[1.0, 2.0]]
    assert rewards._roles.given == [read]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_reward_model_that_is_not_finite_is_named_with_its_rows(number: float) -> None:
    with pytest.raises(ValueError) as caught:
        of(scores=[[1.5, 0.0], [0.25, number]])(RAGGED, 4)
    assert str(caught.value) == f"reward_model: expected a finite score, got {number} for rows.jsonl:2"


def test_a_sum_that_overflows_is_named_with_its_rows(file: Path) -> None:
    """1e38 x 100 is no float32."""
    with pytest.raises(ValueError) as caught:
        of(f"{file}:one", weights=(100.0, 1.0), scores=[[1e38, 0.0], [0.0, 0.0]])(RAGGED, 4)
    assert str(caught.value) == "reward_weights: expected a sum of rewards that is finite, got inf for rows.jsonl:1"


def broken_on_rank_1(kind: str) -> list[str]:
    """The message of each rank where a source fails on the second one only."""

    def function(prompts: Any, completions: Any) -> Any:
        if dist.rank() == 1:
            return {"raises": lambda: 1 / 0, "exits": lambda: sys.exit(0), "nothing": lambda: None}[kind]()
        return [0.0] * len(completions)

    model = models([[1.0, 1.0], [1.0, math.nan if dist.rank() == 1 else 0.0]]) if kind == "model" else models()
    functions = [] if kind == "model" else [("f.py:mine", function)]
    try:
        Rewards(model, functions, (), decode)(RAGGED, 4)
        message = "nothing was raised"
    except ValueError as error:
        message = str(error)
    return dist.everyones(message)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("raises", f"f.py:mine: called with 4 completions{BOTH}, it raised ZeroDivisionError: division by zero"),
        ("exits", f"f.py:mine: called with 4 completions{BOTH}, it tried to end the process SystemExit: 0"),
        ("nothing", f"f.py:mine: expected a list of numbers, got 'None' for completions{BOTH}"),
        ("model", "reward_model: expected a finite score, got nan for rows.jsonl:2"),
    ],
)
def test_a_source_that_fails_on_one_rank_ends_all(kind: str, text: str, two_ranks: RankPool) -> None:
    """With one message, of the rank on which it failed; the other one says whose it is."""
    first, second = two_ranks.run(broken_on_rank_1, kind)
    assert first == f"rank 1 stopped: {second}" and second.startswith(text)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0)])
def test_weights_are_one_for_each_source(weights: tuple[float, ...], file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        of(f"{file}:one", weights=weights, scores=SCORES)
    assert str(caught.value) == f"reward_weights: expected one for each of 2 rewards, got {len(weights)}"


def test_no_source_at_all_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        of()
    assert str(caught.value) == "reward: expected a reward, got none; give --reward_model or --reward_funcs"
