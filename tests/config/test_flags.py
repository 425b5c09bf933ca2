"""Flags and YAML as text: what is read, and what is said of each mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.config import flags
from dsalign.config.parse import ALIASES, ConfigError, parse

BASE = ("--model", "m", "--dataset", "rows")


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse([*argv, *BASE], world_size=1)
    return caught.value.problems


def yaml_file(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return str(folder / "run.yaml")


def test_argv_is_cut_at_its_flags() -> None:
    """The launcher's rank comes first, the verb behind it; a value may begin with one dash."""
    command = flags.split(["--local_rank=3", "rlhf", "--sft-type", "lora", "-h", "--beta", "-1e-3", "--a=--b"], ALIASES)
    assert command.words == ("rlhf",)
    assert [(one.name, one.spelled, one.raw) for one in command.flags] == [
        ("local_rank", "--local_rank", ("3",)),
        ("tuner", "--sft-type", ("lora",)),
        ("help", "-h", ()),
        ("beta", "--beta", ("-1e-3",)),
        ("a", "--a", ("--b",)),
    ]
    assert command.asks("help") and not command.asks("version")
    assert command.without(["tuner", "local_rank"]) == ["rlhf", "-h", "--beta", "-1e-3", "--a=--b"]
    assert flags.split(["--local_rank", "3", "sft"], ALIASES).words == ("sft",)


def test_files_of_several_config_flags_are_read_in_order() -> None:
    command = flags.split(["--config", "a", "b", "--seed", "1", "--config=c"], ALIASES)
    assert command.values("config") == ("a", "b", "c")


def test_yaml_is_text_with_lines() -> None:
    given, wrong = flags.parse_yaml("a-b: 1e-4\nsft_type: 'null'\n\nc: null\nd: [1, ~]\ne: {x: y}\n", "f", ALIASES)
    assert wrong == []
    assert [(one.name, one.raw, one.where) for one in given] == [
        ("a_b", "1e-4", "f:1: a-b"),
        ("tuner", "null", "f:2: sft_type"),
        ("c", None, "f:4: c"),
        ("d", ["1", None], "f:5: d"),
        ("e", {"x": "y"}, "f:6: e"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--seed 1.5", "--seed: expected a whole number, got '1.5'"),
        ("--seed true", "--seed: expected a whole number, got 'true'"),
        ("--seed", "--seed: expected a value, got none"),
        ("--seed 1 2", "--seed: expected one value, got '1 2'; put quotes around a value with blanks"),
        ("--learning_rate fast", "--learning_rate: expected a number, got 'fast'"),
        ("--learning_rate nan", "--learning_rate: expected a finite number, got 'nan'"),
        ("--learning_rate -1e-3", "--learning_rate: expected greater than 0, got '-1e-3'"),
        ("--learning_rate=-1e-3", "--learning_rate: expected greater than 0, got '-1e-3'"),
        ("--split_dataset_ratio 1", "--split_dataset_ratio: expected less than 1, got '1'"),
        ("--trust_remote_code maybe", "--trust_remote_code: expected true or false, got 'maybe'"),
        ("--columns question", "--columns: expected theirs=ours, got 'question'"),
        ("--report_to wandb tensorbord", "--report_to: expected 'tensorboard', 'wandb' or 'trackio', got 'tensorbord'"),
        ("--lora_target_modules=", "--lora_target_modules: expected at least one value, got []"),
        ("--num_train_epoch 2", "--num_train_epoch: expected a known option, got 'num_train_epoch'; did you mean num"),
        ("--qqq", "--qqq: expected a known option, got 'qqq'; see --help for all"),
        ("--seed 1 --seed 2", "--seed: expected seed once, got --seed twice; keep one of them"),
        ("--model_path n", "--model: expected model once, got --model_path and --model; keep one of them"),
        (
            "--print_config run.yaml",
            "--print_config: expected true, false or no value, got 'run.yaml'; write a file as",
        ),
        ("--config", "--config: expected a YAML file, got none; write --config FILE.yaml"),
        ("--config no.yaml", "--config: expected a YAML file that can be read, got 'no.yaml' (No such file or"),
    ],
)
def test_a_wrong_flag(words: str, line: str) -> None:
    (told,) = problems("--algo", "sft", *words.split())
    assert told.startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nseed: 2", ":2: seed: expected seed once, got seed twice (first at {file}:1); keep one of them"),
        (
            "tuner: lora\n\nsft_type: full",
            ":3: sft_type: expected tuner once, got tuner and sft_type (first at {file}:1)",
        ),
        ("seed: [1]", ":1: seed: expected a whole number, got ['1']"),
        ("seed:", ":1: seed: expected a whole number, got null"),
        ("system: [a, b]", ":1: system: expected one piece of text, got ['a', 'b']"),
        ("columns: prompt", ":1: columns: expected pairs theirs=ours (in YAML `theirs: ours`), got 'prompt'"),
        ("val_dataset: {a: b}", ":1: val_dataset: expected a list of values, got {'a': 'b'}"),
        ("columns: {a: b, a: c}", ":1: columns: expected each key once, got a again; keep one of them"),
        ("val_dataset: [[a]]", ":1: val_dataset: expected a value, a list of values or `theirs: ours`, got deeper"),
        ("[a]: b", ":1: expected the name of an option, got a sequence; write `name: value`"),
        ("seed: 1\nmodel: [", ":3: expected YAML, got a syntax error ("),
        ("- seed", ":1: expected lines of `name: value`, got something else"),
        ("config: a.yaml", ":1: config: expected a known option, got 'config'"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    file = yaml_file(tmp_path, text + "\n")
    (told,) = problems("--algo", "sft", "--config", file)
    assert told.startswith(file + line.replace("{file}", file))


def test_a_file_that_is_no_text_or_empty(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"system: caf\xe9\n")
    (told,) = problems("--algo", "sft", "--config", str(tmp_path / "latin.yaml"))
    assert told.endswith("latin.yaml: expected UTF-8 text, got a byte that is none at 11; save it as UTF-8")
    assert flags.read_yaml(yaml_file(tmp_path, "# nothing\n"), ALIASES) == ([], [])
