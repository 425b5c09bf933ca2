"""What looks like a secret is left out, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import made

from dsalign.config.parse import parse
from dsalign.config.secrets import redacted

KEY = "a1B2" * 6


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"use hf_{KEY} now", "use [redacted] now"),
        (f"sk-proj-{KEY}", "[redacted]"),
        (f"ghp_{KEY}", "[redacted]"),
        (f"github_pat_{KEY}", "[redacted]"),
        ("AKIAABCDEFGHIJKLMNOP", "[redacted]"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.abc-_", "[redacted]"),
        ("https://me:pa55word@host/rows.jsonl", "https://[redacted]@host/rows.jsonl"),
        (f"https://host/rows.jsonl?token={KEY}&x=1", "https://host/rows.jsonl?token=[redacted]&x=1"),
        (f"WANDB_API_KEY={KEY}", "WANDB_API_KEY=[redacted]"),
        (f"api_key: '{KEY}'", "api_key: '[redacted]'"),
        (f"Authorization: Bearer {KEY}", "Authorization: Bearer [redacted]"),
        (f"--hub_token {KEY}", "--hub_token [redacted]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nx", "[redacted]\nx"),
    ],
)
def test_a_secret_is_left_out(text: str, left: str) -> None:
    assert redacted(text) == left


def test_the_text_of_every_default_run_stays() -> None:
    """Names of models and options, tokens as words of the trade, paths, numbers."""
    for algo in ("sft", "ppo", "dpo"):
        assert redacted(made("--algo", algo).dump()) == made("--algo", algo).dump()
    text = "max_tokens: 20480000\nmax_new_tokens: 512\nmodel: meta-llama/Llama-3.1-8B\nyou keep a secret: the password"
    assert redacted(text) == text


def test_the_files_of_a_run_have_none(tmp_path: Path) -> None:
    config = parse(["--algo", "sft", "--system", f"the key is hf_{KEY}, be kind"], world_size=1).config
    config.to_yaml(tmp_path / "config.yaml")
    written = (tmp_path / "config.yaml").read_text()
    assert KEY not in written and "system: the key is [redacted], be kind" in written
    assert parse(["--config", str(tmp_path / "config.yaml")], world_size=1).config.algo == "sft"
