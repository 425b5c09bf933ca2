"""What --help prints."""

from __future__ import annotations

from typing import Any

from dsalign.config import flags
from dsalign.config.help import help_text
from dsalign.config.parse import ALIASES
from dsalign.config.schema import RUN_OPTIONS


def test_help_has_the_comments_of_an_algorithm(duel: type[Any]) -> None:
    text = help_text(flags.split(["--algo", "duel", "--help"], ALIASES), {"duel": "two of them"})
    assert "--kinds                        one or several [[sword]]" in text
    assert f"see {duel.__module__} [3]" in text
    general = help_text(flags.split(["--help"], ALIASES), {"duel": "two of them"})
    assert "commands\n  duel            two of them\n" in general
    assert "--kinds" not in general and "dsalign --algo NAME --help" in general


def test_help_names_every_option_once_with_its_choices() -> None:
    text = help_text(flags.split(["sft", "--help"], ALIASES), {"duel": "two of them"})
    assert all(text.count(f"  --{name} ") + text.count(f"  --{name},") == 1 for name in RUN_OPTIONS)
    assert "--tuner, --sft_type            train LoRA adapters or every weight: lora, full [lora]" in text
    assert "per_device_train_batch_size" in text
    assert "  --deepspeed, --deepspeed_config\n" + " " * 33 + "zero0, zero1" in text  # 31 characters: a line of its own
