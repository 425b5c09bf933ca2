"""What comes with dsalign: one small file of rows for each kind, named demo:KIND as a source, and a reward function."""

from __future__ import annotations

from pathlib import Path

PREFIX = "demo:"  # no hub name has a colon, and a name, unlike a path, means the same on every machine
REWARD = "demo:friendly"  # where an algorithm needs a reward and is given none; rewards.py has it
_FOLDER = Path(__file__).resolve().parent


def names() -> tuple[str, ...]:
    """demo:demonstrations, demo:labels, demo:pairs, demo:prompts."""
    return tuple(sorted(f"{PREFIX}{path.stem}" for path in _FOLDER.glob("*.jsonl")))


def find(name: str) -> Path:
    """The file of a name.

    Raises ValueError where there is none.
    """
    if name not in names():
        raise ValueError(f"data set {name!r}: expected one of {', '.join(names())}, got no such name; choose one")
    return _FOLDER / f"{name.removeprefix(PREFIX)}.jsonl"
