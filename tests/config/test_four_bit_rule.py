"""What --load_in_4bit needs, said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import made, problems

from dsalign.config import rules


def test_four_bits_are_for_a_frozen_base_that_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for a machine with bitsandbytes; nothing is imported to see that."""
    real = rules.importlib.util.find_spec
    there = {"bitsandbytes": True}
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: there[name] if name in there else real(name))
    assert made("--algo", "dpo", "--load_in_4bit", "true")
    assert made("--algo", "dpo", "--load_in_4bit", "true", "--deepspeed", "zero2_offload")
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 3}}')
    for name in ("zero3", str(own)):
        assert problems("--algo", "dpo", "--load_in_4bit", "true", "--deepspeed", name) == [
            "--load_in_4bit: expected a DeepSpeed file of a stage below 3, which would cut 4-bit weights up, got "
            f"{name} (--deepspeed); take zero2 or zero2_offload"
        ]
    assert problems("--algo", "sft", "--load_in_4bit", "true", "--tuner", "full") == [
        "--load_in_4bit: expected tuner lora, as 4-bit weights stay as they are, got full (--tuner); remove it"
    ]
    there["bitsandbytes"] = None
    assert problems("--algo", "sft", "--load_in_4bit", "true") == [
        "--load_in_4bit: expected the package bitsandbytes, which packs weights into 4 bits, got none; run pip install "
        "'dsalign[4bit]', or leave it out"
    ]
    assert made("--algo", "sft", "--load_in_4bit", "false", "--tuner", "full")
