"""The DeepSpeed configurations that come with dsalign, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = next(p / "ds_configs" for p in (_PACKAGE, _PACKAGE.parent) if (p / "ds_configs").is_dir())  # wheel, checkout


def names() -> tuple[str, ...]:
    """zero0 ... zero3_nvme."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json")))


def find(name: str) -> Path:
    """The file of a name, or the file that `name` is a path of.

    Raises ValueError where there is none.
    """
    if name in names():
        return FOLDER / f"{name}.json"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"deepspeed: expected one of {', '.join(names())} or a JSON file, got {name!r}")


def read(name: str) -> dict[str, Any]:
    """The configuration as a dictionary.

    Raises ValueError where it is not a JSON object.
    """
    path = find(name)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {path} must hold a JSON object, got {type(settings).__name__}")
    return settings
