"""The DeepSpeed configurations that come with dsalign, by name, and those of the user, by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = next(p / "ds_configs" for p in (_PACKAGE, _PACKAGE.parent) if (p / "ds_configs").is_dir())  # wheel, checkout


def names() -> tuple[str, ...]:
    """The names of those that come with dsalign: zero0 to zero3, and variants with off-loading."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json")))


def find(name: str) -> Path:
    """The file of a configuration. name: one of `names()`, or a path.

    Raises ValueError where it is neither.
    """
    if name in names():
        return FOLDER / f"{name}.json"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"deepspeed: expected one of {', '.join(names())} or a JSON file, got {name!r}")


def settings(name: str) -> dict[str, Any]:
    """A configuration as a dictionary, as it stands in its file. name: one of `names()`, or a path.

    Raises ValueError where there is no such file, or it holds no JSON object.
    """
    path = find(name)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {path} must hold a JSON object, got {type(settings).__name__}")
    return settings


def hybrid(name: str) -> bool:
    """Whether a configuration asks for the hybrid engine: rollouts through DeepSpeed's interface, by our own sampling.

    Raises ValueError where its section is no object with a true or false `enabled`, or asks for what this engine does
    not do: tensor parallel sampling.
    """
    section = settings(name).get("hybrid_engine", {"enabled": False})
    if not isinstance(section, dict) or not isinstance(section.get("enabled", False), bool):
        raise ValueError(f'deepspeed: {name}: hybrid_engine: expected {{"enabled": true or false}}, got {section!r}')
    if section.get("inference_tp_size", 1) != 1:
        raise ValueError(f"deepspeed: {name}: hybrid_engine: inference_tp_size must be 1; each rank samples by itself")
    return bool(section.get("enabled", False))
