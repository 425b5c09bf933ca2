"""Rows that come with dsalign, so that a first run needs no data: a small file for each kind, named demo:KIND as a
source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

DEMO = "demo:"  # no hub name has a colon, and a name, unlike a path, means the same on every machine
REWARD = "demo:friendly"  # where an algorithm needs a reward and is given none; rewards.py has it
# Options that stand in place of defaults where these rows are read because none were named, so that a first run on a
# CPU takes minutes: the demo reward counts words beyond 40 against an answer, and passes over a rollout take longest.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "demo:prompts": {"max_new_tokens": "64", "num_ppo_epochs": "1", "logging_steps": "1"}
}
_FOLDER = Path(__file__).resolve().parent


def names() -> tuple[str, ...]:
    """The sources demo:demonstrations, demo:labels, demo:pairs and demo:prompts."""
    return tuple(sorted(f"{DEMO}{path.stem}" for path in _FOLDER.glob("*.jsonl")))


def of_kind(kind: str) -> str:
    """The name of the demo rows of a kind: what an algorithm without --dataset reads."""
    return f"{DEMO}{kind}"


def find(name: str) -> Path:
    """The file of demo rows. name: one of `names()`.

    Raises ValueError for another name.
    """
    if name not in names():
        raise ValueError(f"data set {name!r}: expected one of {', '.join(names())}, got no such name; choose one")
    return _FOLDER / f"{name.removeprefix(DEMO)}.jsonl"
