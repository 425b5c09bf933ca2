"""What must hold between options: each rule broken once, read in full, and kept once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from commands import BASE, told

from dsalign import algos
from dsalign.config import rules
from dsalign.config.parse import parse
from dsalign.contract.algorithm import Algorithm, Traits


@pytest.mark.parametrize("flag", ["--ref_model", "--ref_model_id_or_path", "--ref_model_type"])
def test_a_reference_needs_an_algorithm_with_one(flag: str) -> None:
    assert told("--algo", "sft", flag, "x") == [
        f"{flag}: expected an algorithm with a frozen reference model, one of dpo, grpo, kto, "
        "online_dpo, ppo, reinforce, rloo, got sft; remove it or change --algo"
    ]
    assert told("--algo", "kto", flag, "x") == []


@pytest.mark.parametrize(
    "flag", ["--reward_model", "--reward_model_id_or_path", "--reward_model_type", "--reward_funcs"]
)
def test_rm_trains_its_reward_model_and_takes_no_frozen_one(flag: str) -> None:
    assert told("--algo", "rm", flag, "x") == [
        f"{flag}: expected an algorithm with a frozen reward model, one of grpo, online_dpo, ppo, reinforce, "
        "rloo, got rm; remove it or change --algo"
    ]


def test_reward_weights_are_for_an_algorithm_with_a_frozen_reward() -> None:
    assert told("--algo", "sft", "--reward_weights", "1", "0.5") == [
        "--reward_weights: expected an algorithm with a frozen reward model, one of grpo, online_dpo, ppo, "
        "reinforce, rloo, got sft; remove it or change --algo"
    ]


def test_ppo_needs_a_reward_of_some_kind(tmp_path: Path) -> None:
    """Without a word about rewards it has a default; an empty list says that there is to be none."""
    assert told("--algo", "ppo") == []
    (tmp_path / "none.yaml").write_text("reward_funcs: []\n")
    assert told("--algo", "ppo", "--config", str(tmp_path / "none.yaml")) == [
        "reward_model: expected a reward for ppo, got neither reward_model nor reward_funcs; give "
        "--reward_model FOLDER (of --algo rm) or --reward_funcs FILE.py:FUNCTION"
    ]
    assert told("--algo", "ppo", "--reward_model", "x") == []
    own = reward_file(tmp_path, "def f(): ...\nfrom y import g")
    assert told("--algo", "ppo", "--reward_funcs", f"{own}:f", f"{own}:g", "--reward_weights", "1", "2") == []
    assert told("--algo", "ppo", "--reward_model", "x", "--reward_funcs", f"{own}:f") == []


def reward_file(folder: Path, text: str) -> str:
    (folder / "x.py").write_text(text)
    return f"{folder}/x.py"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (
            "def scored(): ...\ndef other(): ...",
            "score",
            ": expected a function 'score', got scored, other; did",
        ),
        ("", "score", ": expected a function 'score', got no function; correct the name"),
        (
            "\nasync def f(completions): ...",
            "f",
            ":2: expected a function, got f, which is async; write",
        ),
        ("def f(:\n", "f", ":1: expected Python, got an error: "),
        ("x = 1\n  y = 2\n", "f", ":2: expected Python, got an error: unexpected indent; correct the file"),
    ],
)
def test_a_reward_file_is_read_before_it_is_run(text: str, name: str, said: str, tmp_path: Path) -> None:
    path = reward_file(tmp_path, text)
    (line,) = told("--algo", "ppo", "--reward_funcs", f"{path}:{name}")
    assert line.startswith(f"--reward_funcs: {path}{said}")


def test_a_reward_function_may_depend_on_what_is_installed(tmp_path: Path) -> None:
    """Within if and try, and not within another function or a class."""
    text = "try:\n import x\nexcept ImportError:\n if 1:\n  def f(completions): ...\nclass C:\n def g(self): ...\n"
    path = reward_file(tmp_path, text)
    assert told("--algo", "ppo", "--reward_funcs", f"{path}:f") == []
    (line,) = told("--algo", "ppo", "--reward_funcs", f"{path}:g")
    assert line.startswith(f"--reward_funcs: {path}: expected a function 'g', got no function")


@pytest.mark.parametrize("name", ["x.py", "x.txt:f", ":f", "x.py:", "x.py:a b"])
def test_a_reward_function_has_a_file_and_a_name(name: str) -> None:
    assert told("--algo", "ppo", "--reward_funcs", name) == [
        f"--reward_funcs: expected path/to/file.py:function, got {name!r}; name the file, a colon and the function"
    ]


@pytest.mark.parametrize(("name", "said"), [("zero2.json", "did you mean zero2?"), ("own.json", "check the path")])
def test_a_deepspeed_file_that_is_not_there(name: str, said: str) -> None:
    (line,) = told("--algo", "sft", "--deepspeed", name)
    assert line.endswith(f"or a JSON file that exists, got {name!r}; {said}")


def test_a_reward_file_must_be_there() -> None:
    assert told("--algo", "ppo", "--reward_funcs", "gone.py:f") == [
        "--reward_funcs: expected a file that exists, got 'gone.py' (No such file or directory); check the path"
    ]


def test_reward_weights_are_as_many_as_rewards(tmp_path: Path) -> None:
    own = reward_file(tmp_path, "f = g = sum")
    words = ("--algo", "ppo", "--reward_model", "x", "--reward_funcs", f"{own}:f", f"{own}:g", "--reward_weights")
    assert told(*words, "1", "2", "3") == []
    assert told(*words, "1", "2") == [
        f"--reward_weights: expected one for each of 3 rewards (x, {own}:f, {own}:g), got 2; write as many"
    ]


def test_a_reward_function_that_comes_along_is_named_rightly(tmp_path: Path) -> None:
    own = reward_file(tmp_path, "from y import *")
    assert told("--algo", "ppo", "--reward_funcs", "demo:friendly", f"{own}:f") == []
    assert told("--algo", "ppo", "--reward_funcs", "demo:frendly") == [
        "--reward_funcs: expected one of demo:friendly, got 'demo:frendly'; did you mean demo:friendly?"
    ]
    assert told("--algo", "ppo", "--reward_funcs", "demo:xyz") == [
        "--reward_funcs: expected one of demo:friendly, got 'demo:xyz'; choose one, or give path/to/file.py:function"
    ]


@dataclass(frozen=True, kw_only=True)
class Judged(Algorithm):
    """An algorithm with a frozen reward model that needs two groups a step."""

    traits: ClassVar[Traits] = Traits(
        data="prompts",
        roles={"policy": "train", "reward": "frozen"},
        learning_rates={"full": 1.0, "lora": 1.0},
        min_groups=2,
    )


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algos, "names", lambda: ("judged",))
    monkeypatch.setattr(algos, "load", lambda name: Judged)


@pytest.mark.usefixtures("judged")
def test_a_reward_model_goes_to_an_algorithm_with_that_frozen_role() -> None:
    assert told("--algo", "judged", "--reward_model", "x") == []
    assert told("--algo", "judged", "--reward_model", "x", "--ref_model", "x") == [
        "--ref_model: expected an algorithm with a frozen reference model, another one (none here has it yet), "
        "got judged; remove it or change --algo"
    ]


@pytest.mark.usefixtures("judged")
def test_a_global_batch_may_be_too_small() -> None:
    argv = ("--algo", "judged", "--reward_model", "x", "--gradient_accumulation_steps", "1")
    assert told(*argv) == [
        "--gradient_accumulation_steps: expected a global batch of at least 2 for judged, got batch_size 1 x 1 x 1 "
        "ranks; raise one of them"
    ]
    parse([*argv, *BASE], world_size=2)


def test_eval_steps_need_rows() -> None:
    assert told("--algo", "sft", "--eval_steps", "5") == [
        "--eval_steps: expected rows to evaluate on, got neither val_dataset nor split_dataset_ratio; give one of them"
    ]
    assert told("--algo", "sft", "--eval_steps", "5", "--val_dataset", "more") == []
    assert told("--algo", "sft", "--eval_steps", "5", "--split_dataset_ratio", "0.1") == []


def test_validation_rows_have_one_source() -> None:
    assert told("--algo", "sft", "--val_dataset", "more", "--split_dataset_ratio", "0.1") == [
        "--split_dataset_ratio: expected 0 beside val_dataset (--val_dataset), got 0.1; keep one of them"
    ]
    assert told("--algo", "sft", "--val_dataset", "more", "--split_dataset_ratio", "0") == []


def test_lora_options_need_lora() -> None:
    assert told("--algo", "sft", "--tuner", "full", "--lora_rank", "4", "--lora_alpha", "8") == [
        "--lora_alpha: expected tuner lora, got full (--tuner); remove it or train with lora",
        "--lora_rank: expected tuner lora, got full (--tuner); remove it or train with lora",
    ]
    assert told("--algo", "sft", "--lora_rank", "4") == []


def test_only_a_reference_of_rows_is_cached() -> None:
    for algo in ("ppo", "sft"):
        assert told("--algo", algo, "--ref_cache", "on") == [
            f"--ref_cache: expected auto or off, as {algo} has no frozen reference of rows, got on; remove it"
        ]
        assert told("--algo", algo, "--ref_cache", "auto") == []
    assert told("--algo", "dpo", "--ref_cache", "on") == told("--algo", "kto", "--ref_cache", "on") == []


def test_only_demonstrations_are_learnt_from_turn_by_turn() -> None:
    assert told("--algo", "dpo", "--assistant_turns", "all") == [
        "--assistant_turns: expected last, as dpo learns from the last answer of a row, got all; remove it"
    ]
    assert told("--algo", "sft", "--assistant_turns", "all") == []


def test_there_is_a_weight_for_each_data_set() -> None:
    assert told("--algo", "dpo", "--dataset_weights", "2", "1") == [
        "--dataset_weights: expected one for each of 1 data sets, got 2; write as many as --dataset has names"
    ]
    assert told("--algo", "dpo", "--dataset_weights", "0.5") == []
    assert told("--algo", "dpo", "--dataset_weights", "0")[0].startswith("--dataset_weights: expected greater than 0")


def test_dropout_stays_off_where_the_algorithm_says_so() -> None:
    assert told("--algo", "dpo", "--lora_dropout", "0.1") == [
        "--lora_dropout: expected 0, as dpo runs with all dropout off, got 0.1; remove it"
    ]
    assert told("--algo", "dpo", "--lora_dropout", "0") == []
    assert told("--algo", "sft", "--lora_dropout", "0.1") == []


def test_no_two_columns_get_one_name() -> None:
    assert told("--algo", "dpo", "--columns", "a=prompt", "b=prompt", "c=chosen") == [
        "--columns: expected one column for 'prompt', got a, b; keep one of them"
    ]
    assert told("--algo", "dpo", "--columns", "a=prompt", "prompt=unused") == []


def test_a_rule_is_left_out_where_it_reads_what_could_not_be_read() -> None:
    """eval_steps would have its rows if the share were a number; dpo's own options are wrong as well."""
    lines = told("--algo", "dpo", "--eval_steps", "5", "--split_dataset_ratio", "x", "--beta", "y")
    assert [line.split(":")[0] for line in lines] == ["--split_dataset_ratio", "--beta"]


def test_every_rule_has_a_test() -> None:
    """One a rule, here or in test_file_rules.py, in the order of the table."""
    assert [rule.__name__ for rule in rules.RULES] == [
        "names_can_be_paths",
        "model_has_a_role",
        "rewards_have_a_source",
        "reward_functions_are_known",
        "reward_files_have_the_functions",
        "reward_weights_are_one_a_source",
        "evaluation_has_rows",
        "one_source_of_validation",
        "lora_options_need_lora",
        "four_bits_are_possible",
        "dropout_is_allowed",
        "reference_can_be_cached",
        "all_turns_are_of_demonstrations",
        "weights_are_one_a_data_set",
        "data_files_exist",
        "columns_are_renamed_once",
        "model_folders_exist",
        "template_is_known",
        "trackers_are_installed",
        "output_dir_can_be_written",
        "cache_can_be_written",
        "checkpoint_exists",
        "deepspeed_is_known",
        "global_batch_is_large_enough",
    ]
