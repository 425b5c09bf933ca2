"""What a completion is worth: functions of a user's file, scores of a reward model, and their weighted sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import random_groups, tiny_tokenizer

from dsalign.data.tokens.templates import Template
from dsalign.rewards.functions import call, load_function
from dsalign.rewards.retemplate import Reading
from dsalign.rewards.sources import Rewards

END = frozenset({2})
FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Seen:
    prompts: list
    columns: dict

calls: list[Seen] = []

def length(prompts, completions, **columns):
    calls.append(Seen(prompts, columns))
    return [len(c) for c in completions]

def one(prompts, completions, **columns):
    return [1.0] * len(completions)

def short(prompts, completions, **columns):
    return [1.0]

def nothing(prompts, completions, **columns):
    return None

def words(prompts, completions, **columns):
    return ["good"] * len(completions)

def broken(prompts, completions, **columns):
    return [0.5, float("nan")] + [0.0] * (len(completions) - 2)

def tensors(prompts, completions, **columns):
    import torch
    return torch.arange(len(completions)) / 2

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my.rewards.py").write_text(FILE)
    return tmp_path / "my.rewards.py"


def groups(*answers: tuple[tuple[int, ...], ...]) -> list[Any]:
    """A group for each tuple of completions."""
    return [replace(g, completions=c) for g, c in zip(random_groups("prompts", len(answers)), answers, strict=True)]


RAGGED = groups(((5, 6), (7,)), ((0, 0, 0), (2,)))


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
    return Rewards(models(scores), functions, weights, decode, reading)


def numbers(found: list[torch.Tensor]) -> list[list[float]]:
    assert all(x.dtype == torch.float32 for x in found)
    return [x.tolist() for x in found]


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
    assert of(f"{file}:short")([], 4) == []
    assert of(f"{file}:length", scores=[])([], 4) == []


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


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("short", "expected one reward for each of 4 completions, got 1"),
        ("broken", "expected a finite reward, got nan for 'h'"),
        ("nothing", "expected a list of numbers, got 'None'"),
        ("words", "expected a list of numbers, got \"['good', 'good', 'good', 'good']\""),
    ],
)
def test_what_a_function_may_not_give(function: str, text: str, file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        of(f"{file}:{function}")(RAGGED, 4)
    assert str(caught.value) == f"{file}:{function}: {text}"


def test_a_long_completion_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=f"got inf for '{'x' * 200}'$"):
        call("f", lambda prompts, completions: [float("inf")], ["p"], ["x" * 500], {})


def test_an_error_of_the_function_is_its_own() -> None:
    """Not dressed up as a wrong return value."""

    def fails(prompts: Any, completions: Any) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        call("f", fails, ["p"], ["c"], {})


SCORES = [[1.5, -2.0], [0.25, 4.0]]


def test_a_reward_model_scores_completions() -> None:
    rewards = of(scores=SCORES)
    assert numbers(rewards(RAGGED, 7)) == [[1.5, -2.0], [0.25, 4.0]]
    assert numbers(rewards(RAGGED[1:], 1)) == [[0.25, 4.0]]
    assert rewards._models.asked == [("reward", [0, 1], 7), ("reward", [1], 1)]


def test_sources_are_added_with_their_weights(file: Path) -> None:
    """The model first, then the functions in their order: 2 * model + 0.5 * length - 1; without weights each is 1."""
    names = (f"{file}:length", f"{file}:one")
    weighted = of(*names, weights=(2.0, 0.5, -1.0), scores=SCORES)
    assert numbers(weighted(RAGGED, 4)) == [[3.0, -4.5], [1.0, 7.5]]
    assert numbers(of(*names, scores=SCORES)(RAGGED, 4)) == [[4.5, 0.0], [4.25, 6.0]]
    assert numbers(of(*names, weights=(0.0, 3.0))(RAGGED, 4)) == [[3.0, 3.0], [3.0, 3.0]]


def test_a_reward_model_reads_in_its_own_way() -> None:
    """It is asked about its reading, three and two tokens where the policy sampled two and one."""
    read = groups(((5, 6, 7), (1, 2)))
    rewards = of(scores=[[1.0, 2.0]], reading=lambda some: read)
    assert numbers(rewards(RAGGED[:1], 4)) == [[1.0, 2.0]]
    assert rewards._models.given == [read]


def test_reading_renders_the_conversation_again() -> None:
    """Another template and vocabulary; an end token only where one was sampled, or where nothing else is left."""
    tokenizer = tiny_tokenizer()
    template = Template(
        "q", tokenizer, "{% for m in messages %}{{ m.content }}{{ '?' if m.role == 'user' }}{% endfor %}", END
    )
    texts = {(50, 3): "yes", (51,): "no", (52, 3): "", (53,): ""}
    reading = Reading(template, lambda ids: texts[tuple(ids)], frozenset({3}))
    (group,) = groups(tuple(texts))
    (found,) = reading([replace(group, turns=({"role": "user", "content": "so"},))])
    yes, no, so = (tuple(tokenizer(text)["input_ids"]) for text in ("yes", "no", "so?"))
    assert found.prompt == so
    assert found.completions == ((*yes, 2), no, (2,), (2,))
    assert found.where == group.where and reading([]) == []


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0)])
def test_weights_are_one_for_each_source(weights: tuple[float, ...], file: Path) -> None:
    with pytest.raises(ValueError) as caught:
        of(f"{file}:one", weights=weights, scores=SCORES)
    assert str(caught.value) == f"reward_weights: expected one for each of 2 rewards, got {len(weights)}"


def test_no_source_at_all_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        of()
    assert str(caught.value) == "reward: expected a reward, got none; give --reward_model or --reward_funcs"
