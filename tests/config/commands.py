"""Configurations, and what is wrong with others, from the words of a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.config.parse import ConfigError, parse
from dsalign.config.schema import RunConfig

BASE = ("--model", "m", "--dataset", "rows")  # names of a hub: nothing is looked up


def made(*argv: str, world_size: int = 1) -> RunConfig:
    return parse([*argv, *BASE], world_size=world_size).config


def problems(*argv: str, base: tuple[str, ...] = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse([*argv, *base], world_size=1)
    return caught.value.problems


def yaml_file(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def trackers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensorboard and wandb be installed."""
    for name in ("tensorboard", "wandb"):
        (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(str(folder))


def with_checkpoint(folder: Path) -> str:
    """The output folder of a run that has a whole checkpoint."""
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer.json").touch()
    return str(folder)


def told(*argv: str, base: tuple[str, ...] = BASE) -> list[str]:
    """The problems of a command, none where it is right."""
    try:
        parse([*argv, *base], world_size=1)
    except ConfigError as error:
        return error.problems
    return []
