"""A reward function for runs of a model that writes random letters."""

from __future__ import annotations

from typing import Any


def vowels(prompts: Any, completions: list[str], **columns: Any) -> list[int]:
    """The number of vowels of each completion."""
    return [sum(c in "aeiou" for c in text) for text in completions]
