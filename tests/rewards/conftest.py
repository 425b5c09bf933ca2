"""A file of reward functions, good and bad ones, as a user may write it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
