"""What a resumed run may change is said; what it may not is refused with both values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsalign.checkpoint.fingerprint import CONTENT, MAY_CHANGE, compare, options, settings
from dsalign.config.parse import parse

FOLDER = Path("out/checkpoint-3")
INPUTS = {"rows of dataset": "8 rows a", "files of the policy model": "b", "tokenizer": "c", "template": "d"}
BASE = ("--algo", "dpo", "--model", "m", "--dataset", "rows", "--max_steps", "8", "--gradient_accumulation_steps", "4")


def of(*words: str, ranks: int = 2, batches: int = 8, **inputs: str) -> dict[str, Any]:
    """The settings of a run; a word in `words` replaces that of BASE."""
    given = dict(zip(BASE[::2], BASE[1::2], strict=True)) | dict(zip(words[::2], words[1::2], strict=True))
    config = parse([part for pair in given.items() for part in pair if part != "-"], world_size=ranks).config
    return settings(config, ranks=ranks, inputs=INPUTS | inputs, batches=batches, layout={}, versions={"torch": "2.13"})


def refused(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"^resume: out/checkpoint-3 comes from a run with other settings: ") as error:
        compare(theirs, mine, FOLDER)
    said, _, way_on = str(error.value).partition("other settings: ")[2].partition("; resume with what it was, or ")
    assert way_on == "start a new run from its model with --model out/checkpoint-3 and another --output_dir"
    return said


def test_the_same_run_goes_on() -> None:
    assert compare(of(), of(), FOLDER) == []


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("learning_rate", "2e-05", "5.0e-05"), ("lr_scheduler_type", "linear", "cosine"),
        ("warmup_ratio", "0.0", "0.05"), ("save_total_limit", "9", "2"),
        ("max_steps", "9", "8"), ("num_train_epochs", "2", "1"), ("save_steps", "7", "500"),
        ("logging_steps", "1", "5"), ("deepspeed", "zero3", "zero2"), ("dtype", "bfloat16", "auto"),
        ("max_tokens", "512", "null"), ("gradient_checkpointing", "true", "false"), ("max_bad_steps", "7", "3"),
    ],
)  # fmt: skip
def test_what_may_change_is_said_with_both_values(option: str, value: str, was: str) -> None:
    shown = "2.0e-05" if option == "learning_rate" else value
    assert compare(of(), of(f"--{option}", value), FOLDER) == [f"--{option} was {was}, is {shown}"]


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("seed", "1", "42"), ("lora_rank", "4", "8"), ("beta", "0.2", "0.1"), ("optimizer", "sgd", "adamw"),
        ("weight_decay", "0.0", "0.01"), ("max_grad_norm", "2.0", "1.0"), ("system", "be kind", "null"),
        ("max_length", "64", "2048"), ("max_steps", "7", "8"), ("rpo_alpha", "0.5", "1.0"),
        ("split_dataset_ratio", "0.1", "0.0"), ("adam_beta2", "0.999", "0.95"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_both_values(option: str, value: str, was: str) -> None:
    assert refused(of(), of(f"--{option}", value)) == f"--{option} was {was}, is {value}"


def test_every_option_that_differs_is_named() -> None:
    """Both at once; another algorithm is named alone, as the rest follows from it."""
    assert refused(of(), of("--seed", "1", "--lora_rank", "4")) == "--lora_rank was 8, is 4; --seed was 42, is 1"
    assert refused(of(), of("--algo", "cpo", "--seed", "1")) == "--algo was dpo, is cpo"


def test_a_step_keeps_its_rows() -> None:
    """1 x 4 x 2 = 8 rows, also as 4 x 1 x 2 and 2 x 1 x 4."""
    cut = compare(of(), of("--batch_size", "4", "--gradient_accumulation_steps", "1"), FOLDER)
    assert cut == ["--batch_size was 1, is 4", "--gradient_accumulation_steps was 4, is 1"]
    more = of("--batch_size", "2", "--gradient_accumulation_steps", "1", ranks=4)
    assert compare(of(), more, FOLDER)[-1] == "ranks were 2, are 4"
    assert refused(of(), of(ranks=4)).startswith("rows a step (--batch_size x --gradient_accumulation_steps x ranks) ")
    assert refused(of(), of(ranks=4)).endswith(" were 8, are 16")


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("rows of dataset", "dataset"),
        ("files of the policy model", "model"),
        ("files of the reference model", "ref_model"),
        ("template", "template"),
    ],
)
def test_contents_are_compared_and_not_names(key: str, option: str) -> None:
    """Other content is refused under the same name and under another one; the same content may have moved."""
    changed = {key: "other"}
    was = INPUTS.get(key, "none")
    assert refused(of(), of(**changed)) == f"{key}: was {was}, is other"
    value = "chatml" if option == "template" else "elsewhere"
    before = {"dataset": "[rows]", "model": "m"}.get(option, "null")
    shown = f"[{value}]" if option == "dataset" else value
    named = f"{key}: was {was}, is other, --{option} was {before}, is {shown}"
    assert refused(of(), of(f"--{option}", value, **changed)) == named
    assert compare(of(), of(f"--{option}", value), FOLDER) == []


def test_another_reward_function_is_refused() -> None:
    """Its file is known by name and content."""
    before, after = of(**{"content of r.py:f": "1"}), of(**{"content of r.py:f": "2"})
    assert refused(before, after) == "content of r.py:f: was 1, is 2"
    assert "content of s.py:g: was none, is 2" in refused(before, of(**{"content of s.py:g": "2"}))


def test_other_rows_to_evaluate_on_and_versions_are_said() -> None:
    mine = of(**{"rows of val_dataset": "2 rows z"}) | {"versions": {"torch": "2.14"}}
    held_out, version = compare(of(), mine, FOLDER)
    assert held_out.startswith("the rows to evaluate on are others") and version == "torch was 2.13, is 2.14"


def test_fewer_batches_are_refused_where_no_option_tells() -> None:
    """max_steps 8 becomes null: more, or fewer where an epoch is shorter than that; null becomes a number likewise."""
    assert compare(of(), of("--max_steps", "none", batches=20), FOLDER) == ["--max_steps was 8, is null"]
    assert refused(of(), of("--max_steps", "none", batches=6)).endswith("gave 8 batches, give 6")


def test_a_checkpoint_that_keeps_less_is_compared_in_what_it_keeps() -> None:
    """As one of an earlier version."""
    assert compare({"seed": 1}, of(), FOLDER) == []
    assert compare({"options": {"seed": "42"}}, of(), FOLDER) == []


def test_secrets_are_not_kept() -> None:
    config = parse([*BASE, "--system", "api_key=abcdefgh12345678"], world_size=1).config
    assert options(config)["system"] == "api_key=[redacted]"


def test_the_lists_name_options_of_a_run() -> None:
    """A misspelt name would refuse what may change."""
    known = set(options(parse(BASE, world_size=1).config)) | set(options(parse(["--algo", "ppo"], world_size=1).config))
    assert {name for names in MAY_CHANGE.values() for name in names} | set(CONTENT) <= known
